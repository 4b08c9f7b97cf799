"""Real parts in small: a byte-level BPE tokenizer trained on the spot, and random Llama-shaped models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft.recipe import LoraSettings, Recipe
from graft_worker.base_model import BaseModel, load_base_model
from graft_worker.spec import TrainingSpec

from .tiny import CONTROL_TOKENS, MARKED_TEMPLATE, conversation


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The models are so small that a second thread only adds waiting."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, ChatML with generation markers. Tests that change the template take a copy."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for index in range(200) for message in conversation(index)["messages"]]
    backend.train_from_iterator([*texts, "system user assistant tool developer"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=MARKED_TEMPLATE,
    )


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with grouped queries, biases and tied embeddings, as a folder of safetensors in bf16."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_bias=True,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(base_folder: Path, device: str) -> BaseModel:
    """The warm NF4 base that the tests of a session share, as jobs share it."""
    return load_base_model(base_folder, quantization="nf4", device=device)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def make_spec(tmp_path: Path, base_folder: Path, write_jsonl: Callable[..., Path]) -> Callable[..., TrainingSpec]:
    """A spec of 24 training and 8 validation rows; keywords of `Recipe`, of `LoraSettings` and of the spec override."""

    def make(name: str = "job", lora: LoraSettings | None = None, **overrides: Any) -> TrainingSpec:
        spec_fields = {
            field: overrides.pop(field) for field in list(overrides) if field in TrainingSpec.__dataclass_fields__
        }
        recipe = Recipe(
            **{
                "base_model": "tiny",
                "n_epochs": 2,
                "batch_size": 4,
                "micro_batch_tokens": 64,
                "max_seq_length": 128,
                "learning_rate": 2e-3,
                "n_evals": 3,
                "gradient_checkpointing": False,
                "lora": lora or LoraSettings(r=4, alpha=8),
                **overrides,
            }
        )
        return TrainingSpec(
            **{
                "job_id": "ftjob-test",
                "recipe": recipe,
                "model_source": str(base_folder),
                "model_revision": None,
                "context_length": 256,
                "base_model_name": "example/tiny",
                "training_file": write_jsonl([conversation(i) for i in range(24)], "train.jsonl"),
                "validation_file": write_jsonl([conversation(i) for i in range(100, 108)], "valid.jsonl"),
                "work_dir": tmp_path / name,
                **spec_fields,
            }
        )

    return make
