"""The frozen base model: from safetensors to the device, tensor by tensor, quantised on the way.

The model is built without memory for its weights and filled one tensor at a time, so the most that is ever held is the
finished model plus one tensor in its stored precision. Code in the repository or folder is never run, and weights are
read from safetensors only: a pickle can execute anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from huggingface_hub import HfApi, snapshot_download
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

from graft.recipe import Quantization
from graft_kernels.nf4 import NF4Weight
from graft_worker.failures import TrainingFailure
from graft_worker.lora import LoraLinear

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
) -> BaseModel:
    """Load a Hugging Face repository or a local folder, frozen, onto `device`.

    The linear layers of the decoder blocks become `LoraLinear`, in NF4 with double quantisation if asked for.
    Embeddings, norms and the output head stay in `compute_dtype` (None: `default_compute_dtype`).

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
    tokenizer = _read(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False), str(source))
    if not tokenizer.is_fast:
        raise TrainingFailure(
            "unsupported_base_model", f"{source} has no tokenizer.json; a fast tokenizer is needed.", "model"
        )
    try:
        model = _empty_model(config, compute_dtype)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        _fill(model, shards, quantization, device, compute_dtype, str(source))
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
        fingerprint=_fingerprint(folder, shards),
        quantization=quantization,
        device=device,
        compute_dtype=compute_dtype,
        num_parameters=num_parameters,
        num_bytes=_num_bytes(model),
    )


# Where the files are ------------------------------------------------------------------------------------------------


def _resolve(source: str, revision: str | None) -> Path:
    """The folder that holds the files: the source itself, or the repository's snapshot in the local cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")):
        raise TrainingFailure("base_model_unavailable", f"The base model's folder {source} does not exist.", "model")
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
        reason, cause = "it is not in the local cache and the Hub cannot be reached", error
    except HFValidationError as error:
        reason, cause = "this is neither a folder nor a repository id of the form 'owner/name'", error
    except (HfHubHTTPError, OSError) as error:
        reason, cause = f"the download failed ({error})", error
    raise TrainingFailure(
        "base_model_unavailable", f"The base model {source} cannot be had: {reason}.", "model"
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


def _fingerprint(folder: Path, shards: list[Path]) -> str:
    """SHA-256 over (name, SHA-256 of the contents) of every file the model and its tokenizer were made from."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    digest = hashlib.sha256()
    for path in [*(folder / name for name in names if (folder / name).is_file()), *shards]:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
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


def _fill(
    model: PreTrainedModel,
    shards: list[Path],
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    source: str,
) -> None:
    """Read every tensor once, straight to its place. Afterwards nothing of the model is on the meta device."""
    linears = _decoder_linears(model)
    owners = {name: name.rpartition(".")[::2] for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
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
        if path in linears and attribute == "weight":
            weights[path] = _quantize(tensor) if quantization == "nf4" else tensor.to(dtype)
        elif path in linears:
            biases[path] = tensor.to(dtype)
        else:
            setattr(module, attribute, nn.Parameter(tensor.to(dtype), requires_grad=False))
    missing = sorted(owners.keys() - filled - tied)
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"holds {sorted(unexpected)[0]}, which its config has no place for"
        raise TrainingFailure("base_model_unavailable", f"The checkpoint of {source} {what}.", "model")
    for path in linears:
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoraLinear(weights[path], biases.get(path)))
    model.tie_weights()
    for module in model.modules():
        for buffer_name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[buffer_name] = buffer.to(device)
    left = [name for name, part in [*model.named_parameters(), *model.named_buffers()] if part.device != device]
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


def _decoder_linears(model: PreTrainedModel) -> set[str]:
    """Paths of the linear layers inside the decoder blocks, the places an adapter can go. Never the output head."""
    blocks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(block + ".") for block in blocks)
    }


def _quantize(tensor: Tensor) -> NF4Weight:
    """NF4, blocks of 64, scales quantised again: QLoRA's storage (arXiv 2305.14314)."""
    packed, state = quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
    return NF4Weight.from_bitsandbytes(packed, state)


def _num_bytes(model: nn.Module) -> int:
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, LoraLinear):
            total += module.weight.nbytes + (0 if module.bias is None else module.bias.nbytes)
    return total
