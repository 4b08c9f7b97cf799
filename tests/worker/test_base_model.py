"""A base model is loaded exactly, frozen, and from nothing that could run code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from graft.recipe import LoraSettings
from graft_kernels.nf4 import NF4Weight, decode
from graft_worker import base_model, lora
from graft_worker.base_model import ARCHITECTURES, BaseModel, load_base_model
from graft_worker.batches import pack
from graft_worker.data import Row
from graft_worker.decoder import KEEP_ALL, Decoder
from graft_worker.failures import TrainingFailure
from graft_worker.lora import LoraLinear
from graft_worker.weight_cache import WeightCache


@pytest.fixture
def copy_of_base(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loading_agrees_with_transformers(
    architecture: str, tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    loaded = load_base_model(tmp_path, quantization="none", device="cpu").model
    tokens = torch.randint(1, len(tokenizer), (2, 17))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)


def test_linears_of_the_blocks_are_nf4_and_nothing_else_is(base: BaseModel, base_folder: Path) -> None:
    stored = load_file(base_folder / "model.safetensors")
    layers = {name: part for name, part in base.model.named_modules() if isinstance(part, LoraLinear)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        assert isinstance(layer.weight, NF4Weight)
        weight = stored[name + ".weight"].to(base.device)
        packed, state = quantize_4bit(weight.float(), compress_statistics=True, quant_type="nf4")
        expected = dequantize_4bit(packed, state)
        assert torch.equal(decode(layer.weight, torch.float32), expected)
    embedding = base.model.get_input_embeddings().weight
    assert torch.equal(embedding, stored["model.embed_tokens.weight"].to(embedding))
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.num_bytes < sum(part.nbytes for part in stored.values())  # NF4 and the rest, against bf16 alone


def test_shards_are_read_by_their_index(copy_of_base: Path, base: BaseModel) -> None:
    tensors = load_file(copy_of_base / "model.safetensors")
    (copy_of_base / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, copy_of_base / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (copy_of_base / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_base_model(copy_of_base, quantization="nf4", device=base.device)
    tokens = torch.arange(20, device=base.device)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, base.model(tokens).logits)
    (copy_of_base / "model-00002-of-00002.safetensors").unlink()
    assert _failure(copy_of_base).message.endswith(
        "the index names model-00002-of-00002.safetensors, which is not there."
    )


def test_the_fingerprint_follows_the_contents(copy_of_base: Path, base: BaseModel) -> None:
    assert load_base_model(copy_of_base, quantization="none", device="cpu").fingerprint == base.fingerprint
    config = json.loads((copy_of_base / "config.json").read_text())
    (copy_of_base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert load_base_model(copy_of_base, quantization="none", device="cpu").fingerprint != base.fingerprint


def test_on_a_small_card_the_tables_are_loaded_to_the_host_and_the_numbers_stay(
    base_folder: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(1, torch.arange(3, 35).int(), torch.arange(4, 36).int(), 32)]
    batch = pack(rows, 8, 0).to(base.device)
    decoder = Decoder(base.model, max_positions=64)
    expected = decoder.evaluate(batch).loss
    monkeypatch.setattr(base_model, "_lacks_room", lambda *_: True)
    for _ in range(2):  # from the checkpoint, then from the cache
        small = load_base_model(
            base_folder, quantization="nf4", device=base.device, cache=WeightCache(tmp_path, 1 << 30)
        )
        assert small.model.get_input_embeddings().weight.device.type == "cpu"
        decoder = Decoder(small.model, max_positions=64)
        assert torch.equal(decoder.evaluate(batch).loss, expected)
        decoder.follow([KEEP_ALL] * 2)
        assert decoder.head.device == base.device
        assert torch.equal(decoder.evaluate(batch).loss, expected)
        decoder.close()
        assert small.model.get_output_embeddings().weight.device.type == "cpu"


def test_attaching_is_repeatable_and_detaching_restores_the_base(base: BaseModel) -> None:
    tokens = torch.arange(20, device=base.device)[None]
    with torch.no_grad():
        before = base.model(tokens).logits
    states = []
    for seed in (1, 1, 2):
        torch.rand(seed * 7)  # whatever else was drawn
        adapter = lora.attach(base.model, LoraSettings(r=4), seed)
        states.append(adapter.state_dict())
        with pytest.raises(ValueError, match="already carries an adapter"):
            lora.attach(base.model, LoraSettings(r=4), seed)
        with torch.no_grad():
            assert torch.equal(base.model(tokens).logits, before)  # B is zero
            for part in adapter.parameters():
                part.add_(0.1)
            assert not torch.equal(base.model(tokens).logits, before)
        lora.detach(base.model)
    with torch.no_grad():
        assert torch.equal(base.model(tokens).logits, before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_targets_are_matched_as_peft_matches_them(base: BaseModel) -> None:
    everything = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    for wanted, names, count in (
        ("all-linear", everything, 14),
        (("q_proj", "v_proj"), ("q_proj", "v_proj"), 4),
        (("layers.1.self_attn.q_proj",), ("layers.1.self_attn.q_proj",), 1),
        ("o_proj", ("o_proj",), 2),
    ):
        adapter = lora.attach(base.model, LoraSettings(r=2, target_modules=wanted), 0)
        lora.detach(base.model)
        assert (adapter.target_modules, len(adapter.layers)) == (names, count)
    for unknown in (("q_proj", "lm_head"), ("proj",), ()):
        with pytest.raises(TrainingFailure, match="down_proj, gate_proj, k_proj") as caught:
            lora.attach(base.model, LoraSettings(target_modules=unknown), 0)
        assert (caught.value.code, caught.value.param) == ("unsupported_target_module", "lora.target_modules")


def _failure(source: str | Path) -> TrainingFailure:
    with pytest.raises(TrainingFailure) as caught:
        load_base_model(source, quantization="nf4", device="cpu")
    return caught.value


def test_pickled_weights_are_not_read(copy_of_base: Path) -> None:
    (copy_of_base / "model.safetensors").rename(copy_of_base / "pytorch_model.bin")
    assert _failure(copy_of_base).code == "unsafe_weights"
    (copy_of_base / "pytorch_model.bin").unlink()
    assert _failure(copy_of_base).code == "base_model_unavailable"


def test_a_source_that_cannot_be_had_is_unavailable(tmp_path: Path) -> None:
    for source, words in (
        (tmp_path / "nowhere", "does not exist"),
        ("graft-tests/no-such-repository", "not in the local cache and the Hub cannot be reached"),
        ("too/many/parts", "neither a folder nor a repository id"),
        (tmp_path, "holds no"),
    ):
        failure = _failure(source)
        assert failure.code == "base_model_unavailable"
        assert words in failure.message


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(copy_of_base: Path) -> None:
    path = copy_of_base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    for change, code, words in (
        ({name: None}, "base_model_unavailable", f"lacks {name}"),
        ({"model.layers.9.extra": torch.zeros(1)}, "base_model_unavailable", "holds model.layers.9.extra"),
        ({name: torch.zeros(3, 64)}, "unsupported_base_model", "(192, 64) is expected"),
        ({name: tensors[name].to(torch.int8)}, "unsupported_base_model", "torch.int8"),
    ):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(changed, path, metadata={"format": "pt"})
        failure = _failure(copy_of_base)
        assert failure.code == code
        assert words in failure.message
    path.write_bytes(path.read_bytes()[:1000])
    assert "is damaged" in _failure(copy_of_base).message


def test_unknown_architectures_and_quantised_checkpoints_are_refused(copy_of_base: Path) -> None:
    path = copy_of_base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    assert "quantised already" in _failure(copy_of_base).message
    path.write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "is a 'gpt2' model" in _failure(copy_of_base).message
    path.write_text(json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (copy_of_base / "mine.py").write_text("raise SystemExit('this code must never run')")
    assert "without running its own code" in _failure(copy_of_base).message


def test_failures_cross_process_boundaries() -> None:
    failure = pickle.loads(pickle.dumps(TrainingFailure("no_chat_template", "words", "model")))
    assert (failure.code, failure.message, failure.param) == ("no_chat_template", "words", "model")
    assert str(failure) == "no_chat_template: words"
