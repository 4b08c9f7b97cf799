"""A resumed run is the uninterrupted run, bit for bit; a damaged checkpoint is never used."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.recipe import EarlyStopping, LoraSettings
from graft_worker.base_model import BaseModel
from graft_worker.failures import TrainingFailure
from graft_worker.spec import TrainingSpec
from graft_worker.trainer import CheckpointSaved, Finished, Log, StepMetrics, Stopped, train

MakeSpec = Callable[..., TrainingSpec]
DROPOUT = LoraSettings(r=4, alpha=8, dropout=0.1)


def stop_after(step: int) -> Callable[[], str | None]:
    """A caller that asks for the `step`-th step boundary to be the last (0: before the first step)."""
    asked = iter([None] * step)
    return lambda: next(asked, "paused")


def outcome(events: list[Any]) -> tuple[bytes, str, list[tuple[float, ...]]]:
    """(adapter, result file, per-step numbers) of a finished run."""
    finished = events[-1]
    assert isinstance(finished, Finished)
    steps = [event for event in events if isinstance(event, StepMetrics)]
    return (
        (Path(finished.adapter_dir) / "adapter_model.safetensors").read_bytes(),
        Path(finished.result_csv).read_text(),
        [(event.step, event.train_loss, event.grad_norm, event.learning_rate) for event in steps],
    )


_WHOLE: dict[str, Any] = {}


def uninterrupted(settings: dict[str, Any], make_spec: MakeSpec, base: BaseModel) -> Any:
    """The outcome of the run that nothing stops: made once for equal settings."""
    key = repr(sorted(settings.items()))
    if key not in _WHOLE:
        _WHOLE[key] = outcome(list(train(make_spec("whole", **settings), base, lambda: None)))
    return _WHOLE[key]


@pytest.mark.parametrize("stop_at", [0, 1, 5, 6, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"lora": DROPOUT},
        {"lora": LoraSettings(r=64, dropout=0.1), "optimizer": "adamw_8bit"},
        {"lora": DROPOUT, "early_stopping": EarlyStopping(patience=2), "gradient_checkpointing": True},
    ],
    ids=["adamw", "adamw_8bit", "early_stopping"],
)
def test_a_resumed_run_computes_the_same_bits(
    settings: dict[str, Any], stop_at: int, make_spec: MakeSpec, base: BaseModel
) -> None:
    whole = uninterrupted(settings, make_spec, base)
    first = list(train(make_spec("first", **settings), base, stop_after(stop_at)))
    saved, stopped = first[-2:]
    assert isinstance(saved, CheckpointSaved)
    assert isinstance(stopped, Stopped)
    assert (saved.step, stopped.step, stopped.reason) == (stop_at, stop_at, "paused")
    # The folder alone is what another machine gets.
    moved = Path(saved.path).parent.parent.parent / "moved"
    shutil.move(saved.path, moved)
    shutil.rmtree(moved.parent / "first")
    torch.rand(100)
    second = list(train(make_spec("second", resume_from=moved, **settings), base, lambda: None))
    adapter, result, numbers = outcome(second)
    assert numbers == whole[2][stop_at:]
    assert adapter == whole[0]
    assert result == whole[1]
    assert any(isinstance(event, Log) and event.message == f"Resumed at step {stop_at} of 12." for event in second)
    finished = second[-1]
    assert (finished.steps, finished.initial_valid_loss is not None) == (12, True)


def test_a_run_resumed_after_its_last_step_only_exports(make_spec: MakeSpec, base: BaseModel) -> None:
    events = list(train(make_spec("whole"), base, lambda: None))
    last = [event for event in events if isinstance(event, CheckpointSaved)][-1]
    again = list(train(make_spec("again", resume_from=Path(last.path)), base, stop_after(0)))
    assert outcome(again)[:2] == outcome(events)[:2]
    assert not any(isinstance(event, StepMetrics) for event in again)
    assert again[-1].trained_tokens == events[-1].trained_tokens


def test_a_run_that_stopped_early_stays_stopped(make_spec: MakeSpec, base: BaseModel) -> None:
    settings: dict[str, Any] = {
        "n_evals": 12,
        "early_stopping": EarlyStopping(patience=2, min_delta=100.0),  # no evaluation improves by that much
    }
    events = list(train(make_spec("whole", **settings), base, lambda: None))
    assert events[-1].stopped_early
    assert events[-1].steps == 3
    last = [event for event in events if isinstance(event, CheckpointSaved)][-1]
    again = list(train(make_spec("again", resume_from=Path(last.path), **settings), base, lambda: None))
    assert outcome(again)[:2] == outcome(events)[:2]
    assert again[-1].weights == "best"


def test_a_stop_twice_at_the_same_step_replaces_the_checkpoint(make_spec: MakeSpec, base: BaseModel) -> None:
    first = list(train(make_spec(), base, stop_after(3)))[-2]
    again = list(train(make_spec(resume_from=Path(first.path)), base, stop_after(0)))[-2]
    assert again.path == first.path
    folder = Path(again.path)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000003"]
    state = json.loads((folder / "state.json").read_text())
    assert state["progress"]["step"] == 3
    assert oct((folder / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o044) == "0o44"


@pytest.fixture
def saved(make_spec: MakeSpec, base: BaseModel) -> Path:
    return Path(list(train(make_spec("before"), base, stop_after(2)))[-2].path)


def refuse(spec: TrainingSpec, base: BaseModel) -> TrainingFailure:
    with pytest.raises(TrainingFailure) as caught:
        list(train(spec, base, lambda: None))
    return caught.value


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "trainer_state.pt", "result.csv"]
)
def test_an_altered_or_missing_file_is_noticed(name: str, saved: Path, make_spec: MakeSpec, base: BaseModel) -> None:
    original = (saved / name).read_bytes()
    (saved / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    failure = refuse(make_spec(resume_from=saved), base)
    assert failure.code == "checkpoint_corrupt"
    assert f"{name} has been altered" in failure.message
    (saved / name).unlink()
    failure = refuse(make_spec(resume_from=saved), base)
    assert failure.code == "checkpoint_corrupt"
    assert f"{name} is missing" in failure.message


def test_a_broken_or_missing_state_is_noticed(saved: Path, make_spec: MakeSpec, base: BaseModel) -> None:
    state = saved / "state.json"
    content = json.loads(state.read_text())
    for text in (
        "",
        "[]",
        "{}",
        json.dumps({**content, "format": 99}),
        json.dumps({**content, "progress": {"steps": 1}}),
    ):
        state.write_text(text)
        assert refuse(make_spec(resume_from=saved), base).code == "checkpoint_corrupt"
    state.unlink()
    assert refuse(make_spec(resume_from=saved), base).code == "checkpoint_corrupt"
    assert refuse(make_spec(resume_from=saved / "nowhere"), base).code == "checkpoint_corrupt"


def test_another_runs_checkpoint_is_refused(saved: Path, make_spec: MakeSpec, base: BaseModel, tmp_path: Path) -> None:
    assert refuse(make_spec(resume_from=saved, learning_rate=1e-3), base).code == "checkpoint_mismatch"
    other = make_spec(resume_from=saved)
    other.training_file.write_text(other.training_file.read_text() * 2)
    assert refuse(other, base).code == "checkpoint_mismatch"


class Exploit:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_in_a_checkpoint_is_not_executed(saved: Path, make_spec: MakeSpec, base: BaseModel) -> None:
    trap = saved.parent / "trap"
    for write in (
        lambda path: torch.save({"optimizer": Exploit(trap)}, path),
        lambda path: path.write_bytes(pickle.dumps(Exploit(trap))),
    ):
        write(saved / "trainer_state.pt")
        state = json.loads((saved / "state.json").read_text())
        state["files"]["trainer_state.pt"] = hashlib.sha256((saved / "trainer_state.pt").read_bytes()).hexdigest()
        (saved / "state.json").write_text(json.dumps(state))
        assert refuse(make_spec(resume_from=saved), base).code == "checkpoint_corrupt"
        assert not trap.exists()


def test_a_write_that_breaks_off_leaves_no_checkpoint(
    make_spec: MakeSpec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    spec = make_spec()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingFailure, match=r"^disk_full: The worker's disk is full: .*No space left"):
        list(train(spec, base, stop_after(1)))
    assert list((spec.work_dir / "checkpoints").iterdir()) == []  # nor half of one, which would fill the disk
