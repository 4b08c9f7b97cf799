"""Quantised weights come back from the cache as they went in, or are made again; no load fails for the cache's sake."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from graft.settings import Settings
from graft_kernels.nf4 import NF4Weight
from graft_worker import base_model, weight_cache
from graft_worker.base_model import BaseModel, load_base_model
from graft_worker.engine import Engine
from graft_worker.failures import TrainingFailure
from graft_worker.lora import LoraLinear
from graft_worker.spec import TrainingSpec
from graft_worker.weight_cache import CacheKey, Slot, WeightCache

GIB = 2**30


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache", GIB)


@pytest.fixture
def copy_of_base(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def load(folder: Path, cache: WeightCache | None, device: str = "cpu", **options: Any) -> tuple[BaseModel, list[str]]:
    """The model, and what its owner was told."""
    told: list[str] = []
    base = load_base_model(
        folder,
        quantization="nf4",
        device=device,
        cache=cache,
        report=lambda level, message: told.append(f"{level}: {message}"),
        **options,
    )
    return base, told


def was_quantised(told: list[str]) -> bool:
    return any("Quantised the weights" in message for message in told)


def was_read(told: list[str]) -> bool:
    return len(told) == 1 and told[0].startswith("info: Read the quantised weights from the cache")


def entries(cache: WeightCache) -> list[Path]:
    """All files but the list of digests."""
    return sorted(path for path in cache.folder.glob("*") if path.name != weight_cache.DIGESTS)


def tensors_of(base: BaseModel) -> dict[str, Tensor]:
    found = {**dict(base.model.named_parameters(remove_duplicate=False)), **dict(base.model.named_buffers())}
    for path, module in base.model.named_modules():
        if isinstance(module, LoraLinear):
            assert isinstance(module.weight, NF4Weight)
            for part in ("packed", "absmax", "absmax2", "code2", "offset"):
                found[f"{path}.{part}"] = getattr(module.weight, part)
            if module.bias is not None:
                found[f"{path}.bias"] = module.bias
    return found


def digest_of(base: BaseModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(base).items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logits(base: BaseModel) -> Tensor:
    with torch.no_grad():
        return base.model(torch.arange(20, device=base.device)[None]).logits


def assert_same(a: BaseModel, b: BaseModel) -> None:
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape, tensor.device) == (
            theirs[name].dtype,
            theirs[name].shape,
            theirs[name].device,
        )
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(logits(a), logits(b))
    for field in ("fingerprint", "num_parameters", "num_bytes", "compute_dtype", "device"):
        assert getattr(a, field) == getattr(b, field)


# The same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("gemma3_text", True)]
)
def test_a_load_from_the_cache_is_the_same_to_the_last_bit(
    architecture: str,
    tied: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    cache: WeightCache,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=40,  # so that rows end inside a block of 64, and sizes are no multiples of the alignment
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=20,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain, _ = load(tmp_path, None, device, compute_dtype=dtype)
    first, told = load(tmp_path, cache, device, compute_dtype=dtype)
    assert was_quantised(told)
    assert "kept them in the cache" in told[0]
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", None)  # whoever calls it now fails
    second, told = load(tmp_path, cache, device, compute_dtype=dtype)
    assert was_read(told)
    assert_same(first, plain)
    assert_same(second, first)
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors_of(second).values())


def test_what_several_threads_would_quantise_otherwise_is_read_as_it_was(
    base_folder: Path, cache: WeightCache, device: str
) -> None:
    first, _ = load(base_folder, cache, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert digest_of(load(base_folder, cache, device)[0]) == digest_of(first)
    finally:
        torch.set_num_threads(threads)


def test_segments_of_many_chunks_are_put_together(
    base_folder: Path, cache: WeightCache, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "_CHUNK_BYTES", 1000)
    first, _ = load(base_folder, cache, device)
    monkeypatch.undo()  # the size stands in the entry
    second, told = load(base_folder, cache, device)
    assert was_read(told)
    assert_same(second, first)


def test_an_entry_is_a_safetensors_file_like_any_other(base_folder: Path, cache: WeightCache) -> None:
    first, _ = load(base_folder, cache)
    (path,) = entries(cache)
    assert first.fingerprint in path.name
    stored = {name: part for name, part in load_file(path).items() if not name.startswith("padding.")}
    parts = tensors_of(first)
    assert torch.equal(stored["model.embed_tokens.weight"], parts["model.embed_tokens.weight"])
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(stored[f"{name}.weight.packed"], parts[f"{name}.packed"])
    assert torch.equal(stored["model.layers.0.self_attn.q_proj.bias"], parts["model.layers.0.self_attn.q_proj.bias"])
    assert "lm_head.weight" not in stored  # it is tied


def test_dtypes_have_entries_of_their_own_and_plain_weights_none(base_folder: Path, cache: WeightCache) -> None:
    load(base_folder, cache, compute_dtype=torch.float32)
    assert was_quantised(load(base_folder, cache, compute_dtype=torch.bfloat16)[1])
    load_base_model(base_folder, quantization="none", device="cpu", cache=cache)
    assert len(entries(cache)) == 2


def test_giving_up_a_block_gives_its_memory_back(base_folder: Path, cache: WeightCache, device: str) -> None:
    load(base_folder, cache, device)
    base, told = load(base_folder, cache, device)
    assert was_read(told)
    layers = [module for path, module in base.model.named_modules() if isinstance(module, LoraLinear) and ".0." in path]
    if device == "cpu":  # all segments are one mapping of the file
        assert "-nf4-" in Path("/proc/self/maps").read_text()
        layers = [module for module in base.model.modules() if isinstance(module, LoraLinear)]
        for module in layers:
            module.bias = None
        for parameter in base.model.parameters():
            parameter.data = torch.empty(0)
    else:
        before = torch.cuda.memory_allocated(base.device)
    num_bytes = sum(module.weight.nbytes for module in layers)
    for module in layers:
        module.weight = torch.empty(0)
    gc.collect()
    if device == "cpu":
        assert "-nf4-" not in Path("/proc/self/maps").read_text()
    else:
        assert before - torch.cuda.memory_allocated(base.device) >= num_bytes


# Damage -------------------------------------------------------------------------------------------------------------


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "no header"),
        (lambda data: data[:5], "no header"),
        (lambda data: os.urandom(len(data)), "no header"),
        (lambda data: data[:100], "no header"),
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: data + b"\0", "bytes instead of"),
        (lambda data: _flip(data, 8), "header cannot be read"),
        (lambda data: data.replace(b'"shape": [64]', b'"shape": [63]', 1), "header has been changed"),
        (lambda data: _flip(data, len(data) - 1), "have been changed"),
        (lambda data: _flip(data, 8 + int.from_bytes(data[:8], "little")), "have been changed"),
    ],
    ids=["empty", "tiny", "noise", "no-body", "short", "long", "json", "header", "last-byte", "first-byte"],
)
def test_a_damaged_entry_is_removed_and_made_again(
    damage: Callable[[bytes], bytes],
    words: str,
    base_folder: Path,
    cache: WeightCache,
    device: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, _ = load(base_folder, cache, device)
    (path,) = entries(cache)
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    del whole
    path.unlink()  # the first model's memory may be the file
    path.write_bytes(damaged)
    second, told = load(base_folder, cache, device)
    assert told[0].startswith("warn: The cached weights were damaged")
    assert words in told[0]
    assert was_quantised(told)
    assert path.name in caplog.text
    assert_same(second, first)
    third, told = load(base_folder, cache, device)
    assert was_read(told)
    assert_same(third, first)


def test_an_entry_that_does_not_fit_the_model_is_made_again(
    base_folder: Path, cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = base_model._groups
    monkeypatch.setattr(base_model, "_groups", lambda *arguments: groups(*arguments)[::-1])
    load(base_folder, cache)
    monkeypatch.undo()
    _, told = load(base_folder, cache)
    assert "its tensors are not the model's" in told[0]
    assert was_quantised(told)


def test_an_entry_under_another_models_name_is_not_used(
    base_folder: Path, copy_of_base: Path, cache: WeightCache
) -> None:
    first, _ = load(base_folder, cache)
    (path,) = entries(cache)
    config = json.loads((copy_of_base / "config.json").read_text())
    (copy_of_base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    fingerprint = load_base_model(copy_of_base, quantization="none", device="cpu").fingerprint
    path.rename(cache.folder / path.name.replace(first.fingerprint, fingerprint))
    assert "it is another model's" in load(copy_of_base, cache)[1][0]


def test_a_damaged_entry_that_cannot_be_removed_is_not_used(
    base_folder: Path, base: BaseModel, cache: WeightCache, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(base_folder, cache, device)
    (path,) = entries(cache)
    damaged = _flip(path.read_bytes(), 5000)
    path.unlink()
    path.write_bytes(damaged)
    monkeypatch.setattr(WeightCache, "_remove", lambda *arguments: None)
    loaded, told = load(base_folder, cache, device)
    assert was_quantised(told)
    assert_same(loaded, base)


# Crashes, races, full disks -----------------------------------------------------------------------------------------


def _key(name: str = "a") -> CacheKey:
    return CacheKey(fingerprint=name * 64, quantization="nf4", compute_dtype="float32", blocksize=64)


def _groups(size: int = 5000) -> list[list[Slot]]:
    return [[Slot("x", torch.uint8, (size,))]]


def _write(cache: WeightCache, key: CacheKey, size: int = 5000) -> None:
    writer = cache.create(key, _groups(size))
    assert writer is not None
    writer.put("x", torch.arange(size).to(torch.uint8))
    descriptor = writer.finish()
    assert descriptor is not None
    os.close(descriptor)


def test_a_crash_leaves_no_entry_and_what_it_left_is_swept_up(cache: WeightCache) -> None:
    began = multiprocessing.get_context("fork").Event()

    def crash() -> None:
        writer = cache.create(_key(), _groups())
        assert writer is not None
        writer.put("x", torch.zeros(5000, dtype=torch.uint8))
        began.set()
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=crash)
    process.start()
    assert began.wait(30)
    (left,) = entries(cache)
    assert left.suffix == ".partial"
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    _write(cache, _key("b"))
    assert left.exists()  # however old, it is being written
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cache.open(_key()) is None
    os.utime(left, (long_ago, long_ago))
    _write(cache, _key("c"))
    assert not left.exists()
    assert len(entries(cache)) == 2


def test_a_load_that_fails_leaves_nothing(copy_of_base: Path, cache: WeightCache) -> None:
    path = copy_of_base / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TrainingFailure, match=r"lacks model.norm.weight"):
        load(copy_of_base, cache)
    assert entries(cache) == []


def _race(number: int, folder: Path, cache: Path, barrier: Any, results: Any) -> None:
    """One of two that load at once, each with weights of its own: what it has, whether it made it or read it."""
    fill, quantize = base_model._fill, base_model._quantize

    def fill_together(*arguments: Any) -> None:
        barrier.wait(120)
        fill(*arguments)

    def quantize_differently(tensor: Tensor) -> NF4Weight:
        weight = quantize(tensor)
        assert weight.offset is not None
        weight.offset.add_(number)
        return weight

    base_model._fill = fill_together
    base_model._quantize = quantize_differently
    base, told = load(folder, WeightCache(cache, GIB))
    results.put((digest_of(base), was_quantised(told), was_read(told)))


def test_of_two_processes_that_race_one_writes_and_both_have_its_bytes(base_folder: Path, cache: WeightCache) -> None:
    # Not forked: a process that has used a card has threads and contexts that its copy would only seem to have.
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_race, args=(number, base_folder, cache.folder, barrier, results)) for number in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert len({digest for digest, _, _ in found}) == 1
    assert sorted(found, key=lambda item: item[1])[0][1:] == (False, True)
    assert sorted(found, key=lambda item: item[1])[1][1:] == (True, False)
    assert len(entries(cache)) == 1
    assert digest_of(load(base_folder, cache)[0]) == found[0][0]


def test_a_file_that_may_not_grow_costs_the_cache_not_the_load(
    base_folder: Path, base: BaseModel, cache: WeightCache, device: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        loaded, told = load(base_folder, cache, device)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(loaded, base)
    (warning,) = [message for message in told if message.startswith("warn")]
    assert os.strerror(errno.EFBIG) in warning
    assert str(cache.folder) in warning
    assert entries(cache) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting takes rights that the user does not have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_full_disk_costs_the_cache_not_the_load(
    moment: str, base_folder: Path, base: BaseModel, small_disk: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = WeightCache(small_disk / "cache", GIB)
    cache.folder.mkdir()
    fill = base_model._fill

    def fill_up() -> None:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def fill_with_full_disk(*arguments: Any) -> None:
        fill_up()
        fill(*arguments)

    if moment == "before":
        fill_up()
    else:
        monkeypatch.setattr(base_model, "_fill", fill_with_full_disk)
    loaded, told = load(base_folder, cache, device)
    assert_same(loaded, base)
    assert [os.strerror(errno.ENOSPC) in message for message in told if message.startswith("warn")] == [True]
    assert entries(cache) == []
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    assert "kept them in the cache" in load(base_folder, cache, device)[1][0]


def test_a_folder_that_cannot_be_made_costs_the_cache_not_the_load(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, told = load(base_folder, WeightCache(tmp_path / "file" / "cache", GIB))
    assert was_quantised(told)
    assert os.strerror(errno.ENOTDIR) in told[0]


# The size limit -----------------------------------------------------------------------------------------------------


def test_the_entries_unused_for_longest_make_room(cache: WeightCache) -> None:
    _write(cache, _key("a"), 30_000)
    size = entries(cache)[0].stat().st_size
    cache.max_bytes = 3 * size + 1000
    for name in "bc":
        _write(cache, _key(name), 30_000)
    used = cache.open(_key("a"))
    assert used is not None
    used.close()
    _write(cache, _key("d"), 30_000)
    assert [path.name[0] for path in entries(cache)] == ["a", "c", "d"]
    with pytest.raises(OSError, match="the limit of"):
        cache.create(_key("e"), _groups(10 * size))
    assert len(entries(cache)) == 3  # nothing went for what would not fit anyway
    cache.max_bytes = size
    used = cache.open(_key("d"))
    assert used is not None
    used.close()
    assert [path.name[0] for path in entries(cache)] == ["d"]


def test_files_of_others_in_the_folder_are_not_touched(cache: WeightCache) -> None:
    cache.folder.mkdir()
    others = [cache.folder / name for name in ("model.safetensors", "download.partial", "model-v1.safetensors")]
    for path in others:
        path.write_bytes(bytes(40_000))
        os.utime(path, (1, 1))
    cache.max_bytes = 60_000
    for name in "abc":
        _write(cache, _key(name), 30_000)
    assert all(path.exists() for path in others)
    assert [path.name[0] for path in entries(cache) if path not in others] == ["c"]


def test_an_entry_in_use_is_not_removed(base_folder: Path, cache: WeightCache, device: str) -> None:
    for _ in range(2):  # once written by this process, once read
        base, _ = load(base_folder, cache, device)
        (path,) = entries(cache)
        cache.max_bytes = path.stat().st_size + 20_000
        with pytest.raises(OSError, match="the limit of"):
            cache.create(_key(), _groups(30_000))
        assert path.exists()
        del base
        gc.collect()
    _write(cache, _key(), 30_000)
    assert not path.exists()


def test_without_a_byte_allowed_nothing_is_kept_but_digests(base_folder: Path, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", 0)
    for _ in range(2):
        _, told = load(base_folder, cache)
        assert was_quantised(told)
        assert len(told) == 1
    assert entries(cache) == []


# The fingerprint ----------------------------------------------------------------------------------------------------


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose contents were hashed."""
    names: list[str] = []
    lock = threading.Lock()
    digest = hashlib.file_digest

    def note(file: Any, algorithm: str) -> Any:
        with lock:
            names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", note)
    return names


def test_a_shard_is_hashed_once_and_again_when_it_has_changed(
    copy_of_base: Path, base: BaseModel, cache: WeightCache, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "_SETTLED_NS", 0)
    time.sleep(0.02)  # more than a tick of the file system's clock
    shard = copy_of_base / "model.safetensors"
    for reads in (1, 0, 0):
        read_files.clear()
        assert load(copy_of_base, cache)[0].fingerprint == base.fingerprint
        assert read_files.count(shard.name) == reads
    before = shard.stat()
    data = shard.read_bytes()
    time.sleep(0.02)
    with shard.open("r+b") as file:  # the same file, of the same size and the same age
        file.seek(len(data) - 1)
        file.write(bytes([data[-1] ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed, told = load(copy_of_base, cache)
    assert changed.fingerprint != base.fingerprint
    assert changed.fingerprint == load(copy_of_base, None)[0].fingerprint
    assert was_quantised(told)
    assert len(entries(cache)) == 2


def test_what_changed_just_now_is_not_remembered(
    copy_of_base: Path, base: BaseModel, cache: WeightCache, read_files: list[str]
) -> None:
    (copy_of_base / "model.safetensors").touch()
    for _ in range(2):
        read_files.clear()
        assert load(copy_of_base, cache)[0].fingerprint == base.fingerprint
        assert "model.safetensors" in read_files


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', "{"])
def test_a_damaged_list_of_digests_is_made_again(
    text: str, base_folder: Path, base: BaseModel, cache: WeightCache
) -> None:
    cache.folder.mkdir()
    (cache.folder / weight_cache.DIGESTS).write_text(text)
    assert load(base_folder, cache)[0].fingerprint == base.fingerprint


def test_the_blobs_of_a_snapshot_are_known_by_their_names(
    base_folder: Path, base: BaseModel, tmp_path: Path, cache: WeightCache, read_files: list[str]
) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in base_folder.iterdir():
        data = path.read_bytes()
        large = path.suffix == ".safetensors"  # the Hub names small files by git's SHA-1
        blob = blobs / (hashlib.sha256(data) if large else hashlib.sha1(data)).hexdigest()
        blob.write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    for given in (None, cache):
        loaded = load(snapshot, given)[0]
        assert (loaded.fingerprint, loaded.revision) == (base.fingerprint, "0123abcd")
    assert "model.safetensors" not in read_files
    assert "config.json" in read_files


# The engine ---------------------------------------------------------------------------------------------------------


def test_the_job_is_told_where_its_weights_came_from(
    make_spec: Callable[..., TrainingSpec], tmp_path: Path, device: str
) -> None:
    settings = Settings(data_dir=tmp_path / "data", device=device)
    told = []
    for _ in range(2):
        commands, messages = os.pipe(), os.pipe()
        engine = Engine(commands[0], messages[1], settings)
        spec = make_spec()
        base = engine._warm_base(spec)
        assert engine._warm_base(spec) is base
        engine._messages.close()
        engine._commands.close()
        os.close(commands[1])
        with os.fdopen(messages[0]) as lines:
            told.append([json.loads(line)["message"] for line in lines])
    assert [len(messages) for messages in told] == [3, 3]
    assert told[0][1].startswith("Quantised the weights")
    assert told[1][1].startswith("Read the quantised weights from the cache")
    assert len(list((tmp_path / "data" / "weights").glob("*.safetensors"))) == 1
