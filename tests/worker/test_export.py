"""The adapter is PEFT's, and means there what it meant in training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graft.recipe import LoraSettings
from graft_worker import lora
from graft_worker.base_model import BaseModel, load_base_model
from graft_worker.batches import pad
from graft_worker.data import encode_file
from graft_worker.decoder import Decoder
from graft_worker.spec import TrainingSpec
from graft_worker.trainer import train

MakeSpec = Callable[..., TrainingSpec]
SETTINGS = LoraSettings(r=6, alpha=9, use_rslora=True, dropout=0.1)


@pytest.fixture
def spec(make_spec: MakeSpec) -> TrainingSpec:
    return make_spec(lora=SETTINGS, learning_rate=1e-2, model_revision="abc123", extras={"service": "test"})


@pytest.fixture
def folder(spec: TrainingSpec, base: BaseModel) -> Path:
    return Path(list(train(spec, base, lambda: None))[-1].adapter_dir)


def test_logits_of_the_loaded_adapter_agree_with_the_trainers(
    folder: Path, spec: TrainingSpec, base: BaseModel, base_folder: Path
) -> None:
    exact = load_base_model(base_folder, quantization="nf4", device=base.device, compute_dtype=torch.float32)
    rows = encode_file(spec.validation_file, base.tokenizer, max_seq_length=128).rows
    batch = pad(rows, 1, 0).to(base.device)
    inputs = {"input_ids": batch.input_ids.view(batch.shape), "attention_mask": batch.attention_mask}
    real = batch.attention_mask.flatten().bool()
    adapter = lora.attach(exact.model, SETTINGS, seed=0)
    adapter.load_state_dict(load_file(folder / "adapter_model.safetensors"))
    ours = Decoder(exact.model, max_positions=128).logits(batch)[real]

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.float32, quantization_config=quantization, device_map={"": base.device}
    )
    plain = model.train()(**inputs).logits.flatten(0, 1)[real]
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()  # in eval() bitsandbytes may repack its weights on the CPU, which changes them
    with torch.no_grad():
        theirs = model(**inputs).logits.flatten(0, 1)[real]

    error = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
    effect = torch.linalg.vector_norm(plain - theirs) / torch.linalg.vector_norm(theirs)
    print(f"logits: relative error {error:.1e}, effect of the adapter {effect:.1e}")
    assert error <= 1e-5
    assert effect > 0.1


def test_the_files_are_those_peft_writes_itself(folder: Path, base_folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=6, lora_alpha=9, use_rslora=True, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "peft"))
    assert {name: (part.shape, part.dtype) for name, part in ours.items()} == {
        name: (part.shape, part.dtype) for name, part in theirs.items()
    }
    ours_config, theirs_config = (
        json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "peft")
    )
    own = ("base_model_name_or_path", "revision")
    assert ours_config.keys() <= theirs_config.keys()
    for name, value in ours_config.items():
        if name == "target_modules":
            # PEFT writes whole paths for "all-linear"; names alone match the same modules and are what vLLM reads.
            assert value == sorted({path.rpartition(".")[2] for path in theirs_config[name]})
        elif name not in own:
            assert value == theirs_config[name], name
    assert [ours_config[name] for name in own] == ["example/tiny", None]


def test_the_adapter_holds_nothing_but_low_rank_pairs(folder: Path) -> None:
    """What vLLM asks for: no saved modules, no output head, the targets by name, an integer alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert config["use_dora"] is False
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary: it has no __iter__
            assert name.startswith("base_model.model.model.layers.")
            assert name.endswith((".lora_A.weight", ".lora_B.weight"))
            assert "lm_head" not in name
            assert name.split(".")[-3] in config["target_modules"]


def test_the_manifest_says_how_to_make_it_again(folder: Path, spec: TrainingSpec, base: BaseModel) -> None:
    manifest: dict[str, Any] = json.loads((folder / "graft_manifest.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert manifest["adapter"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert manifest["adapter"]["step"] == 12
    assert manifest["training_file"]["sha256"] == hashlib.sha256(spec.training_file.read_bytes()).hexdigest()
    assert manifest["base_model"]["fingerprint"] == base.fingerprint
    assert manifest["recipe"] == spec.recipe.to_json() | {"lora": manifest["recipe"]["lora"]}
    assert manifest["extras"] == {"service": "test"}
    assert {"python", "torch", "transformers", "bitsandbytes"} <= manifest["libraries"].keys()
    assert str(spec.work_dir) not in json.dumps(manifest)


def test_the_card_tells_a_reader_what_it_is_and_how_to_load_it(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for words in (
        'base_model: "example/tiny"',
        "library_name: peft",
        "QLoRA (NF4 base, double quantization), rank-stabilised, r = 6, alpha = 9, dropout = 0.1",
        "| Conversations | 24 for training, 8 for validation |",
        "| full_valid_loss |",
        "PeftModel.from_pretrained",
        "--max-lora-rank 8",
    ):
        assert words in card


def test_equal_weights_give_equal_files(make_spec: MakeSpec, base: BaseModel) -> None:
    folders = [Path(list(train(make_spec(name), base, lambda: None))[-1].adapter_dir) for name in ("one", "two")]
    for name in ("adapter_model.safetensors", "adapter_config.json", "graft_manifest.json", "README.md"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
