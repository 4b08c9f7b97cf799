"""The frozen base model: from safetensors to the device, tensor by tensor, quantised on the way.

The model is built without memory for its weights and filled one tensor at a time, so the most that is ever held is the
finished model plus one tensor in its stored precision. Code in the repository or folder is never run, and weights are
read from safetensors only: a pickle can execute anything.

Quantised weights are kept on disk (`weight_cache`), so only the first load quantises; later ones get the same bytes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from graft.planner import ModelShape, weight_bytes
from graft.recipe import Quantization
from graft_kernels.nf4 import SECOND_LEVEL_BLOCKSIZE, NF4Weight
from graft_worker.failures import TrainingFailure
from graft_worker.lora import LoraLinear
from graft_worker.weight_cache import CacheKey, DamagedEntry, Entry, EntryWriter, Slot, WeightCache, sha256_of

log = logging.getLogger(__name__)

Report = Callable[[Literal["info", "warn"], str], None]

# Each of these is loaded in the tests and compared with transformers' own loading. Another architecture may well work;
# until it has been compared it is refused, because a base that loads wrongly trains without complaint.
ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
)

_DOWNLOAD = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
# Some repositories carry the same weights twice, in the author's own format.
_DO_NOT_DOWNLOAD = ["*/*", "consolidated*"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKSIZE = 64
# Embedding and head, in every architecture above. Where less than so much would be free beside the whole model, they
# are loaded to the host: a plan for such a card will want them there, and the load is to need no more than the plan.
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_ROOM_BYTES = 1 << 30
# What is smaller shares one segment of the cache with its like.
_LARGE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseModel:
    """A frozen model, ready for an adapter, and what identifies it.

    `fingerprint` is the SHA-256 over the names and contents of the files it was made from. `revision` is the commit for
    a repository, and what was asked for in the case of a folder. `num_bytes` is what the weights occupy.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: str
    revision: str | None
    fingerprint: str
    quantization: Quantization
    device: torch.device
    compute_dtype: torch.dtype
    num_parameters: int
    num_bytes: int


def default_compute_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a GPU; fp32 on the CPU, where bf16 products are slower and round more."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_base_model(
    source: str | Path,
    revision: str | None = None,
    *,
    quantization: Quantization,
    device: torch.device | str,
    compute_dtype: torch.dtype | None = None,
    cache: WeightCache | None = None,
    report: Report | None = None,
    meanwhile: Callable[[PreTrainedTokenizerFast], None] | None = None,
) -> BaseModel:
    """Load a Hugging Face repository or a local folder, frozen, onto `device`.

    The linear layers of the decoder blocks become `LoraLinear`, in NF4 with double quantisation if asked for.
    Embeddings, norms and the output head stay in `compute_dtype` (None: `default_compute_dtype`); embedding and head
    are left in pinned memory on the host where a GPU has hardly room for the whole. With a `cache`, quantised weights
    are read from there, or written there; a cache that fails costs time and a warning, no more. `report` is told where
    the weights came from, in sentences for the owner of the job (None: the log is). `meanwhile` is done beside the
    loading of the weights, in a thread, and is at its end when this returns; what it raises is logged.

    Raises:
        TrainingFailure: base_model_unavailable, unsafe_weights, unsupported_base_model, out_of_memory.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # tensors always know their index, and are compared with it
        device = torch.device("cuda", torch.cuda.current_device())
    compute_dtype = compute_dtype or default_compute_dtype(device)
    folder = _resolve(str(source), revision)
    shards = _weight_files(folder, str(source))
    config = _read(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), str(source))
    _check_supported(config, str(source))
    fingerprint = _fingerprint(folder, shards, cache, str(source))
    loader = _Loader(
        config=config,
        shards=shards,
        quantization=quantization,
        device=device,
        dtype=compute_dtype,
        source=str(source),
        fingerprint=fingerprint,
        cache=cache if quantization == "nf4" else None,  # else an entry would be a second copy of the checkpoint
        tables_on_host=_lacks_room(config, quantization, device),
        report=report or _to_log,
    )
    try:
        entry = loader.begin()
        try:
            tokenizer = _read(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False), str(source))
            if not tokenizer.is_fast:
                raise TrainingFailure(
                    "unsupported_base_model", f"{source} has no tokenizer.json; a fast tokenizer is needed.", "model"
                )
        except BaseException:
            if entry is not None:
                entry.close()
            raise
        with _beside(meanwhile, tokenizer):
            model = loader.load(entry)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingFailure(
            "out_of_memory",
            f"The base model {source} does not fit on {device} as {quantization}: {error}",
            "model",
        ) from error
    model.eval()
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        source=str(source),
        revision=_commit(folder) or revision,
        fingerprint=fingerprint,
        quantization=quantization,
        device=device,
        compute_dtype=compute_dtype,
        num_parameters=_num_parameters(model),
        num_bytes=_num_bytes(model),
    )


@contextlib.contextmanager
def _beside(
    work: Callable[[PreTrainedTokenizerFast], None] | None, tokenizer: PreTrainedTokenizerFast
) -> Iterator[None]:
    """Do the work in a thread of its own, and wait for its end. It is done for later; whoever needs it finds out."""

    def run() -> None:
        assert work is not None
        try:
            work(tokenizer)
        except Exception as error:
            log.warning("what was to be done while the base model is loaded failed: %s", error)

    thread = None if work is None else threading.Thread(target=run, name="beside-loading", daemon=True)
    if thread is not None:
        thread.start()
    yield
    if thread is not None:
        thread.join()


def _lacks_room(config: Any, quantization: Quantization, device: torch.device) -> bool:
    """Whether a GPU has no room to speak of beside the whole model."""
    if device.type != "cuda":
        return False
    weights = weight_bytes(ModelShape.from_config(config.to_dict()), quantization, "device", "device")
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + reserved - allocated < sum(weights.values()) + _ROOM_BYTES


def _to_log(level: Literal["info", "warn"], message: str) -> None:
    log.log(logging.WARNING if level == "warn" else logging.INFO, message)


# Where the files are ------------------------------------------------------------------------------------------------


def _resolve(source: str, revision: str | None) -> Path:
    """The folder that holds the files: the source itself, or the repository's snapshot in the local cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")):
        raise TrainingFailure("base_model_unavailable", f"The base model's folder {source} does not exist.", "model")
    passing = False
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=_DOWNLOAD, ignore_patterns=_DO_NOT_DOWNLOAD)
        )
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError, so it comes first
        reason = "its authors ask for a licence to be accepted: do so on its page and set HF_TOKEN on the worker"
        cause: Exception = error
    except RepositoryNotFoundError as error:
        reason, cause = "there is no such repository (or it is private, and HF_TOKEN does not open it)", error
    except RevisionNotFoundError as error:
        reason, cause = f"it has no revision '{revision}'", error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = (
            "it is not in the local cache and the Hub cannot be reached: let the worker reach it once, copy a cache to "
            "its HF_HOME, or name a folder with the model's files as its source in models.toml (GRAFT_MODELS)"
        )
        cause = error
        passing = not constants.is_offline_mode()
    except HFValidationError as error:
        reason, cause = "this is neither a folder nor a repository id of the form 'owner/name'", error
    except (HfHubHTTPError, OSError) as error:
        reason, cause, passing = f"the download failed ({error})", error, True
    raise TrainingFailure(
        "base_model_unavailable", f"The base model {source} cannot be had: {reason}.", "model", passing=passing
    ) from cause


def _weight_files(folder: Path, source: str) -> list[Path]:
    """The safetensors shards: those the index names, or every one there is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise TrainingFailure(
                "base_model_unavailable", f"{source}: the index names {missing[0]}, which is not there.", "model"
            )
        return [folder / name for name in names]
    shards = sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith(("consolidated", "adapter"))
    )
    if shards:
        return shards
    if _has_pickles(folder, source):
        raise TrainingFailure(
            "unsafe_weights",
            f"{source} has weights as pickles only (.bin, .pt), which can run code when they are read. Convert them to "
            "safetensors, or choose a revision that has them.",
            "model",
        )
    raise TrainingFailure("base_model_unavailable", f"{source} holds no *.safetensors file.", "model")


def _has_pickles(folder: Path, source: str) -> bool:
    if Path(source).expanduser().is_dir():
        return any(path.suffix in _PICKLES for path in folder.iterdir())
    try:
        return any(name.endswith(_PICKLES) for name in HfApi().list_repo_files(source, revision=_commit(folder)))
    except (HfHubHTTPError, OSError):
        return False


def _commit(folder: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache (…/snapshots/<commit>), None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _fingerprint(folder: Path, shards: list[Path], cache: WeightCache | None, source: str) -> str:
    """SHA-256 over (name, SHA-256 of the contents) of every file the model and its tokenizer were made from."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    small = [folder / name for name in names if (folder / name).is_file()]
    try:
        digests = [*sha256_of(small), *(sha256_of(shards) if cache is None else cache.digests(shards))]
    except OSError as error:
        raise TrainingFailure("base_model_unavailable", f"{source} cannot be read: {error}", "model") from error
    digest = hashlib.sha256()
    for path, contents in zip([*small, *shards], digests, strict=True):
        digest.update(f"{path.name} {contents}\n".encode())
    return digest.hexdigest()


# What the files say -------------------------------------------------------------------------------------------------


def _read(load: Callable[[], Any], source: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrainingFailure(
            "base_model_unavailable", f"{source} cannot be read without running its own code: {error}", "model"
        ) from error


def _check_supported(config: Any, source: str) -> None:
    if config.model_type not in ARCHITECTURES:
        raise TrainingFailure(
            "unsupported_base_model",
            f"{source} is a '{config.model_type}' model. Trained here: {', '.join(ARCHITECTURES)}.",
            "model",
        )
    if getattr(config, "quantization_config", None):
        raise TrainingFailure(
            "unsupported_base_model",
            f"{source} is quantised already. Name the original weights; they are quantised when they are loaded.",
            "model",
        )


class _EmptyOnMeta(TorchFunctionMode):
    """Gives `torch.empty` no memory, and leaves every other constructor alone.

    Layers allocate their weights with `torch.empty`, while buffers that no checkpoint carries (rotary frequencies,
    embedding scales) are computed from the config. Building under `torch.device("meta")` would lose those.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with _EmptyOnMeta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


# Filling ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class _Loader:
    """The ways to a filled model: out of the cache; or out of the checkpoint, and into the cache on the way."""

    config: Any
    shards: list[Path]
    quantization: Quantization
    device: torch.device
    dtype: torch.dtype
    source: str
    fingerprint: str
    cache: WeightCache | None
    tables_on_host: bool
    report: Report

    def begin(self) -> Entry | None:
        """Start to read the cache's entry in the background; None if there is none that could be read."""
        if self.cache is None:
            return None
        try:
            entry = self.cache.open(self._key)
        except DamagedEntry as error:
            self._report_damage(error)
            return None
        if entry is not None:
            try:
                entry.start(self.device, _TABLES if self.tables_on_host else ())
            except OSError as error:
                self._discard(entry, DamagedEntry(f"it cannot be read: {error}"))
                return None
            except BaseException:
                entry.close()
                raise
        return entry

    def load(self, entry: Entry | None) -> PreTrainedModel:
        """The filled model: from this entry, which is being read, or else from the checkpoint."""
        model = self._load(entry, self.cache)
        if model is None:
            # Another process has written the entry while we quantised. Its bytes are those that later loads will see,
            # and ours may differ in a last bit; so we take them too, once our own have made room.
            gc.collect()
            model = self._load(self.begin(), None)
        assert model is not None  # None comes only from a writer
        return model

    def _load(self, entry: Entry | None, into: WeightCache | None) -> PreTrainedModel | None:
        model = None if entry is None else self._from_cache(entry)
        return self._from_checkpoint(into) if model is None else model

    @property
    def _key(self) -> CacheKey:
        return CacheKey(
            fingerprint=self.fingerprint,
            quantization=self.quantization,
            compute_dtype=str(self.dtype).removeprefix("torch."),
            blocksize=_BLOCKSIZE,
        )

    def _discard(self, entry: Entry, error: DamagedEntry) -> None:
        assert self.cache is not None
        self.cache.remove(entry, str(error))
        self._report_damage(error)

    def _report_damage(self, error: DamagedEntry) -> None:
        self.report("warn", f"The cached weights were damaged ({error}) and are made again")

    def _from_cache(self, entry: Entry) -> PreTrainedModel | None:
        """None if the entry is damaged; it is gone then."""
        model = _empty_model(self.config, self.dtype)
        try:
            if not entry.fits(_groups(model, self.dtype)):
                raise DamagedEntry("its tensors are not the model's")
            tensors = entry.tensors()
        except DamagedEntry as error:
            self._discard(entry, error)
            return None
        except BaseException:
            entry.close()
            raise
        _fill_from_entry(model, tensors, self.device, self.source)
        weakref.finalize(model, entry.close).atexit = False
        self.report(
            "info", f"Read the quantised weights from the cache ({entry.num_bytes / 1e9:.1f} GB, {entry.seconds:.1f} s)"
        )
        return model

    def _from_checkpoint(self, cache: WeightCache | None) -> PreTrainedModel | None:
        """Filled, and `cache` with it; None if another process has written the entry in the meantime."""
        began = time.monotonic()
        model = _empty_model(self.config, self.dtype)
        writer = None
        try:
            if cache is not None:
                writer = cache.create(self._key, _groups(model, self.dtype))
        except OSError as error:
            self._report_uncached(error)
        try:
            _fill(
                model, self.shards, self.quantization, self.device, self.dtype, self.source, writer, self.tables_on_host
            )
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
        quantised = f"Quantised the weights ({time.monotonic() - began:.1f} s)"
        if writer is None:
            if self.quantization == "nf4":
                self.report("info", quantised)
            return model
        try:
            descriptor = writer.finish()
        except OSError as error:
            self.report("info", quantised)
            self._report_uncached(error)
            return model
        if descriptor is None:
            return None
        weakref.finalize(model, os.close, descriptor).atexit = False
        seconds = time.monotonic() - began
        self.report(
            "info", f"{quantised} and kept them in the cache ({writer.num_bytes / 1e9:.1f} GB, {seconds:.1f} s)"
        )
        return model

    def _report_uncached(self, error: OSError) -> None:
        assert self.cache is not None
        reason = error.strerror or str(error)
        self.report(
            "warn",
            f"The quantised weights are not kept in {self.cache.folder} ({reason}): the next load makes them again",
        )


def _fill(
    model: PreTrainedModel,
    shards: list[Path],
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    source: str,
    writer: EntryWriter | None,
    tables_on_host: bool,
) -> None:
    """Read every tensor once, straight to its place, and show `writer` what becomes of it."""
    linears = _decoder_linears(model)
    owners = {name: name.rpartition(".")[::2] for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = _tied(model)
    biases: dict[str, Tensor] = {}
    weights: dict[str, NF4Weight | Tensor] = {}
    filled: set[str] = set()
    unexpected: list[str] = []
    for name, tensor in _tensors(shards, device, source):
        if name not in owners:
            # Old checkpoints store the rotary frequencies, which are computed from the config.
            if not name.endswith("rotary_emb.inv_freq"):
                unexpected.append(name)
            continue
        path, attribute = owners[name]
        module = model.get_submodule(path)
        expected = getattr(module, attribute)
        if tensor.shape != expected.shape or tensor.dtype not in _FLOATS:
            raise TrainingFailure(
                "unsupported_base_model",
                f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}; a float tensor of shape "
                f"{tuple(expected.shape)} is expected.",
                "model",
            )
        filled.add(name)
        if path in linears and attribute == "weight" and quantization == "nf4":
            weight = weights[path] = _quantize(tensor)
            parts = _parts(weight)
        else:
            tensor = tensor.to(dtype)
            if tables_on_host and name in _TABLES:
                tensor = torch.empty(tensor.shape, dtype=dtype, pin_memory=device.type == "cuda").copy_(tensor)
            parts = {"": tensor}
            if path not in linears:
                setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
            elif attribute == "weight":
                weights[path] = tensor
            else:
                biases[path] = tensor
        if writer is not None and name not in tied:
            for part, value in parts.items():
                writer.put(name + part, value)
    missing = sorted(owners.keys() - filled - tied)
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"holds {sorted(unexpected)[0]}, which its config has no place for"
        raise TrainingFailure("base_model_unavailable", f"The checkpoint of {source} {what}.", "model")
    _complete(model, weights, biases, device, source)


def _fill_from_entry(model: PreTrainedModel, tensors: dict[str, Tensor], device: torch.device, source: str) -> None:
    """Put the tensors of a cache's entry in their places. Small ones may have come to the host with a table."""
    tensors = {name: tensor if name in _TABLES else tensor.to(device) for name, tensor in tensors.items()}
    linears = _decoder_linears(model)
    biases: dict[str, Tensor] = {}
    weights: dict[str, NF4Weight | Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        path, _, attribute = name.rpartition(".")
        if path not in linears:
            setattr(model.get_submodule(path), attribute, nn.Parameter(tensors[name], requires_grad=False))
        elif attribute == "bias":
            biases[path] = tensors[name]
        else:
            parts = {part: tensors[name + suffix] for part, suffix in _PARTS.items()}
            N, K = parameter.shape
            weights[path] = NF4Weight(shape=(N, K), blocksize=_BLOCKSIZE, **parts)
    _complete(model, weights, biases, device, source)


def _complete(
    model: PreTrainedModel,
    weights: dict[str, NF4Weight | Tensor],
    biases: dict[str, Tensor],
    device: torch.device,
    source: str,
) -> None:
    """The rest, when all tensors are there. Afterwards nothing of the model is on the meta device."""
    for path, weight in weights.items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoraLinear(weight, biases.get(path)))
    model.tie_weights()
    for module in model.modules():
        for buffer_name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[buffer_name] = buffer.to(device)
    left = [
        name
        for name, part in [*model.named_parameters(), *model.named_buffers()]
        if part.device != device and not (name in _TABLES and part.device.type == "cpu")
    ]
    if left:
        raise TrainingFailure(
            "unsupported_base_model", f"{source}: {left[0]} was not filled from the checkpoint.", "model"
        )


def _tensors(shards: list[Path], device: torch.device, source: str) -> Iterator[tuple[str, Tensor]]:
    for shard in shards:
        try:
            with safe_open(shard, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary: it has no __iter__
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise TrainingFailure(
                "base_model_unavailable", f"{source}: {shard.name} is damaged ({error}).", "model"
            ) from error


def _blocks(model: PreTrainedModel) -> list[str]:
    """Paths of the lists of decoder blocks."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def _decoder_linears(model: PreTrainedModel) -> set[str]:
    """Paths of the linear layers inside the decoder blocks, the places an adapter can go. Never the output head."""
    blocks = _blocks(model)
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(block + ".") for block in blocks)
    }


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that are another one under a second name."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _quantize(tensor: Tensor) -> NF4Weight:
    """NF4, blocks of 64, scales quantised again: QLoRA's storage (arXiv 2305.14314)."""
    # Takes seconds to import, and weights that come out of the cache do without.
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(tensor, blocksize=_BLOCKSIZE, compress_statistics=True, quant_type="nf4")
    return NF4Weight.from_bitsandbytes(packed, state)


# The parts of an NF4Weight, and how their names in the cache end.
_PARTS = {part: f".{part}" for part in ("packed", "absmax", "absmax2", "code2", "offset")}


def _parts(weight: NF4Weight) -> dict[str, Tensor]:
    return {suffix: getattr(weight, part) for part, suffix in _PARTS.items()}


def _groups(model: PreTrainedModel, dtype: torch.dtype) -> list[list[Slot]]:
    """What the cache holds of a model (its empty form says it), by segment.

    A segment is memory that is given back as a whole: the quantised weights of one block, or one large tensor.
    """
    linears, tied, blocks = _decoder_linears(model), _tied(model), _blocks(model)
    groups: dict[str, list[Slot]] = {}
    small: list[Slot] = []
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        if path in linears and attribute == "weight":
            list_path = next(block for block in blocks if path.startswith(block + "."))
            block = list_path + "." + path.removeprefix(list_path + ".").split(".")[0]
            groups.setdefault(block, []).extend(_nf4_slots(name, parameter.numel()))
        elif name not in tied:
            slot = Slot(name, dtype, tuple(parameter.shape))
            if slot.nbytes < _LARGE_BYTES:
                small.append(slot)
            else:
                groups[name] = [slot]
    return [*groups.values(), *([small] if small else [])]


def _nf4_slots(name: str, numel: int) -> list[Slot]:
    num_blocks = -(-numel // _BLOCKSIZE)
    return [
        Slot(name + _PARTS["packed"], torch.uint8, (-(-numel // 2),)),
        Slot(name + _PARTS["absmax"], torch.uint8, (num_blocks,)),
        Slot(name + _PARTS["absmax2"], torch.float32, (-(-num_blocks // SECOND_LEVEL_BLOCKSIZE),)),
        Slot(name + _PARTS["code2"], torch.float32, (256,)),
        Slot(name + _PARTS["offset"], torch.float32, ()),
    ]


def _num_parameters(model: nn.Module) -> int:
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, LoraLinear):
            total += module.out_features * module.in_features + (0 if module.bias is None else module.bias.numel())
    return total


def _num_bytes(model: nn.Module) -> int:
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, LoraLinear):
            total += module.weight.nbytes + (0 if module.bias is None else module.bias.nbytes)
    return total
