"""A folder to resume from, such that the resumed run computes the same bits as one that was never interrupted.

    adapter/                    the exported adapter (export.py); its weights are the ones trained
    trainer_state.pt            optimizer state and the states of the random generators; tensors and numbers only
    best_adapter.safetensors    the best weights so far, where early stopping keeps them
    result.csv                  the metrics of every step so far
    state.json                  progress, what run it belongs to, and the SHA-256 of every other file

The position in the data needs no file of its own: the order is a function of seed and epoch, and the step gives both.
There is no position inside a step: what a step has summed up so far is dropped, and it is begun again.

A `snapshot` is taken between two steps and copies what they change; `write` makes a folder of it beside the training. A
folder is written under another name, synced, and renamed, so a crash leaves either the whole of it or nothing.
Nothing in it is unpickled into anything but tensors, numbers and containers of them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from graft_worker.export import WEIGHTS_NAME
from graft_worker.failures import TrainingFailure
from graft_worker.lora import Adapter

FORMAT = 2
ADAPTER_FOLDER = "adapter"
_STATE = "state.json"
_TRAINER_STATE = "trainer_state.pt"
_BEST = "best_adapter.safetensors"
_RESULT = "result.csv"


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run has come; the loop's only mutable state besides tensors. `seconds` excludes interruptions."""

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    initial_valid_loss: float | None = None
    num_evals: int = 0
    evals_without_improvement: int = 0
    stopped_early: bool = False
    # The numbers of a step whose evaluation was broken off: it is made up for before the next step.
    pending: dict[str, Any] | None = None
    best: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    # How steps are cut and how many rows the head takes at once, as the first start decided: both decide about bits.
    batching: dict[str, Any] = field(default_factory=dict)
    head_chunk_rows: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Restored:
    """What a checkpoint held besides what was put back in place."""

    progress: Progress
    best_adapter: dict[str, Tensor] | None
    result_csv: str


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """Everything that a checkpoint holds, on the host and as it was at one moment: training may go on at once.

    On a GPU the copies are only under way when this is made: `wait` for them.
    """

    run_id: str
    progress: Progress
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    generators: dict[str, Any]
    best_adapter: dict[str, Tensor] | None
    result_csv: str
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def snapshot(
    *,
    run_id: str,
    progress: Progress,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    generators: dict[str, Any],
    device: torch.device,
    best_adapter: dict[str, Tensor] | None,
    result_csv: str,
) -> Snapshot:
    """The state of a run as it is now, or as it will be when what is queued on the device is done.

    `run_id` is what `restore` must be given, `generators` what `generators(device)` gave when the next step began.
    """
    copied = torch.cuda.Event() if device.type == "cuda" else None
    made = Snapshot(
        run_id=run_id,
        progress=copy.deepcopy(progress),
        adapter={name: _on_host(part) for name, part in adapter.named_parameters().items()},
        optimizer=_all_on_host(optimizer.state_dict()),
        generators=generators,
        best_adapter=best_adapter,
        result_csv=result_csv,
        copied=copied,
    )
    if copied is not None:
        copied.record(torch.cuda.current_stream(device))
    return made


def _on_host(x: Tensor) -> Tensor:
    """A copy in memory of the host. From a GPU, in order with what is queued there and without waiting for it."""
    x = x.detach()
    if x.device.type != "cuda":
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _all_on_host(part: Any) -> Any:
    if isinstance(part, Tensor):
        return _on_host(part)
    if isinstance(part, dict):
        return {key: _all_on_host(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(_all_on_host(value) for value in part)
    return part


def write(folder: Path, state: Snapshot, write_adapter: Callable[[Path, dict[str, Tensor]], None]) -> None:
    """Write the checkpoint `folder`, replacing one of that name; it is on the disk when this returns.

    `write_adapter` is given the folder to make and the weights of that moment.
    """
    state.wait()
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        write_adapter(staging / ADAPTER_FOLDER, state.adapter)
        with (staging / _TRAINER_STATE).open("wb") as file:
            torch.save({"optimizer": state.optimizer, "generators": state.generators}, file)
        if state.best_adapter is not None:
            (staging / _BEST).write_bytes(safetensors.torch.save(state.best_adapter))
        (staging / _RESULT).write_text(state.result_csv, encoding="utf-8")
        content = {
            "format": FORMAT,
            "run_id": state.run_id,
            "progress": dataclasses.asdict(state.progress),
            "files": {name: _sha256(staging / name) for name in _files(staging)},
        }
        (staging / _STATE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in (*staging.rglob("*"), staging):
            _sync(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk has no room for halves
        raise
    # A folder cannot be renamed onto another. Between the two renames only the older copy's name is missing.
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class Writer:
    """Writes checkpoints beside the training, one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        return self._writing is not None

    def start(self, write: Callable[[], None]) -> None:
        """Begin; nothing else may be on its way."""
        assert self._writing is None
        self._writing = self._thread.submit(write)

    def is_done(self, *, wait: bool) -> bool:
        """Whether what was begun is now on the disk; then something else may be. Raises what writing it raised."""
        if self._writing is None or not (wait or self._writing.done()):
            return False
        writing, self._writing = self._writing, None
        writing.result()
        return True

    def close(self) -> None:
        """Wait for what is on its way, and forget it."""
        self._thread.shutdown()


def restore(
    folder: Path, *, run_id: str, adapter: Adapter, optimizer: torch.optim.Optimizer, device: torch.device
) -> Restored:
    """Put adapter, optimizer and random generators back as `snapshot` found them.

    Raises:
        TrainingFailure: checkpoint_corrupt when a file is missing, altered or unreadable; checkpoint_mismatch when the
            checkpoint belongs to another run. Files are checked before anything is changed.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
        recorded: dict[str, str] = state["files"]
        if odd := recorded.keys() ^ set(_files(folder)):
            raise ValueError(f"{min(odd)} is missing or does not belong")
        if damaged := [name for name, digest in sorted(recorded.items()) if _sha256(folder / name) != digest]:
            raise ValueError(f"{damaged[0]} has been altered")
        if state["run_id"] != run_id:
            raise TrainingFailure(
                "checkpoint_mismatch",
                f"The checkpoint {folder.name} belongs to another recipe, other files or another base model.",
            )
        progress = Progress(**state["progress"])
        saved = torch.load(folder / _TRAINER_STATE, map_location="cpu", weights_only=True)
        adapter.load_state_dict(safetensors.torch.load_file(folder / ADAPTER_FOLDER / WEIGHTS_NAME))
        optimizer.load_state_dict(saved["optimizer"])
        best = safetensors.torch.load_file(folder / _BEST) if _BEST in recorded else None
        result_csv = (folder / _RESULT).read_text(encoding="utf-8")
        _restore_generators(saved["generators"], device)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        EOFError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise TrainingFailure(
            "checkpoint_corrupt", f"The checkpoint {folder.name} cannot be restored: {error}."
        ) from error
    return Restored(progress, best, result_csv)


def generators(device: torch.device) -> dict[str, Any]:
    """The states of every random generator that a step might draw from."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _restore_generators(saved: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = saved["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)


def _files(folder: Path) -> list[str]:
    """Every file but state.json, by its path inside the folder."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != folder / _STATE
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
