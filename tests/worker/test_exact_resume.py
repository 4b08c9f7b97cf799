"""A job that is killed again and again ends in the bytes of one that was not. `--device cuda` shows it on a card."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.recipe import EarlyStopping, LoraSettings
from graft_worker import checkpoint, trainer
from graft_worker.base_model import BaseModel
from graft_worker.failures import TrainingFailure
from graft_worker.spec import TrainingSpec
from graft_worker.trainer import CheckpointSaved, Finished, Log, StepMetrics, Stopped, train

MakeSpec = Callable[..., TrainingSpec]
DROPOUT = LoraSettings(r=4, alpha=8, dropout=0.1)
SETTINGS: dict[str, dict[str, Any]] = {
    "packed, several micro-batches a step": {"lora": DROPOUT},
    "padded": {"lora": DROPOUT, "packing": False},
    "8-bit optimizer": {"lora": LoraSettings(r=64, dropout=0.1), "optimizer": "adamw_8bit"},
    "early stopping, recomputed": {
        "lora": DROPOUT,
        "early_stopping": EarlyStopping(patience=2),
        "n_evals": 6,
        "gradient_checkpointing": True,
    },
}


def adapter_of(finished: Any) -> bytes:
    assert isinstance(finished, Finished)
    return (Path(finished.adapter_dir) / "adapter_model.safetensors").read_bytes()


def result_of(finished: Any) -> str:
    return Path(finished.result_csv).read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_cut_off_at_random_steps_ends_in_the_same_bytes(name: str, make_spec: MakeSpec, base: BaseModel) -> None:
    settings = SETTINGS[name]
    rng = random.Random(name)
    whole = list(train(make_spec("whole", **settings), base, lambda: None))
    resume_from: Path | None = None
    cuts = 3
    for attempt in range(cuts + 1):
        spec = make_spec(f"attempt-{attempt}", resume_from=resume_from, checkpoint_steps=rng.randint(1, 3), **settings)
        until = rng.randint(1, 4) if attempt < cuts else 99
        run = train(spec, base, lambda: None)
        for event in run:
            if isinstance(event, CheckpointSaved):
                resume_from = Path(event.path)
            until -= isinstance(event, StepMetrics)
            if until == 0:
                run.close()  # what was being written goes on to its end, unannounced
                break
        torch.rand(rng.randrange(5))
    assert adapter_of(event) == adapter_of(whole[-1])
    assert result_of(event) == result_of(whole[-1])
    assert event.trained_tokens == whole[-1].trained_tokens


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15, 0.25, 0.55, 0.9])
def test_a_stop_in_the_middle_of_a_step_or_an_evaluation_costs_no_bit(
    share: float, make_spec: MakeSpec, base: BaseModel
) -> None:
    """After that share of all micro-batches. On a CPU, with 64 tokens each, a step and an evaluation have several."""
    settings = SETTINGS["packed, several micro-batches a step"]
    calls, asked = 10**9, 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked >= calls

    whole = list(train(make_spec("whole", **settings), base, lambda: None, interrupted))
    calls, asked = 1 + int(share * asked), 0
    first = list(train(make_spec("first", **settings), base, lambda: "now" if asked >= calls else None, interrupted))
    stopped = first[-1]
    assert isinstance(stopped, Stopped)
    done = [event.step for event in first if isinstance(event, StepMetrics)]
    # Asked between two micro-batches, it stopped there; after a step's last one, it asked at most once more.
    assert calls <= asked <= calls + 1
    saved = [event for event in first if isinstance(event, CheckpointSaved)][-1]
    assert saved.step == stopped.step
    second = list(train(make_spec("second", resume_from=Path(saved.path), **settings), base, lambda: None))
    assert adapter_of(second[-1]) == adapter_of(whole[-1])
    assert result_of(second[-1]) == result_of(whole[-1])
    told = done + [event.step for event in second if isinstance(event, StepMetrics)]
    assert told == list(range(1, 13))


def test_memory_that_runs_out_before_a_checkpoint_cuts_steps_anew_and_afterwards_does_not(
    make_spec: MakeSpec, base: BaseModel, device: str
) -> None:
    """On a device without a planner; what a plan does is in test_trainer.py."""
    if device != "cpu":
        pytest.skip("with a planner the budget decides")
    settings: dict[str, Any] = {"lora": DROPOUT, "micro_batch_tokens": 256, "packing": True}
    budgets = []
    for smaller in (0, 1, 2):
        run = train(make_spec(f"smaller-{smaller}", smaller_plans=smaller, **settings), base, lambda: None)
        began = next(event for event in run if event.kind == "began")
        budgets.append(began.batching["token_budget"])
        run.close()
    assert budgets == [256, 128, 64]

    whole = list(train(make_spec("whole", **settings), base, lambda: None))
    first = list(train(make_spec("first", **settings), base, stop_after(5)))
    saved = [event for event in first if isinstance(event, CheckpointSaved)][-1]
    # From here on less is kept, the sums are formed as before, and so the bits are those of the unbroken run.
    second = list(
        train(make_spec("second", resume_from=Path(saved.path), smaller_plans=2, **settings), base, lambda: None)
    )
    assert next(event for event in second if event.kind == "began").batching["token_budget"] == 256
    assert adapter_of(second[-1]) == adapter_of(whole[-1])


def test_what_the_first_start_decided_holds_until_it_does_not_fit(
    make_spec: MakeSpec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_plan = {"micro_batch_tokens": 130, "head_chunk_rows": 128}

    def began(name: str) -> tuple[Any, list[str]]:
        run = train(make_spec(name, first_plan=first_plan), base, lambda: None)
        logged = []
        for event in run:
            if isinstance(event, Log):
                logged.append(event.message)
            if event.kind == "began":
                run.close()
                return event, logged
        raise AssertionError("it never began")

    assert began("as it was")[0].batching == {"mode": "packed", "token_budget": 192, "alignment": 64}
    saved = Path(list(train(make_spec("made"), base, stop_after(1)))[-2].path)
    plan = trainer._plan

    def refuse(*arguments: Any) -> Any:
        if any(isinstance(each, checkpoint.Progress) and each.batching for each in arguments):
            raise TrainingFailure("out_of_memory", "The job needs at least 2 GiB.", needs_bytes=2 << 30)
        return plan(*arguments)

    monkeypatch.setattr(trainer, "_plan", refuse)
    event, logged = began("anew")
    assert event.batching["token_budget"] != 192
    assert "Steps are cut anew for this device. The job needs at least 2 GiB." in logged
    with pytest.raises(TrainingFailure) as caught:
        list(train(make_spec("larger", resume_from=saved), base, lambda: None))
    assert caught.value.needs_bytes == 2 << 30


def stop_after(steps: int) -> Callable[[], str | None]:
    asked = iter([None] * steps)
    return lambda: next(asked, "enough")


# -- a real kill -----------------------------------------------------------------------------------------------------

CHILD = """
import dataclasses, json, sys
from graft_worker.base_model import load_base_model
from graft_worker.spec import TrainingSpec
from graft_worker.trainer import train

import torch
torch.set_num_threads(1)
spec = TrainingSpec.from_json(json.loads(sys.argv[1]))
base = load_base_model(spec.model_source, quantization=spec.recipe.quantization, device=sys.argv[2])
for event in train(spec, base, lambda: None):
    print(json.dumps(dataclasses.asdict(event)), flush=True)
"""


def test_a_process_killed_at_three_random_steps_ends_in_the_same_adapter(make_spec: MakeSpec, device: str) -> None:
    """SIGKILL, a new process each time, and nothing but the newest folder on the disk to go on from."""
    rng = random.Random(5)
    settings = {"lora": DROPOUT, "n_epochs": 4, "checkpoint_steps": 2}

    def run(spec: TrainingSpec, kill_at: int | None) -> dict[str, Any]:
        command = [sys.executable, "-c", CHILD, json.dumps(spec.to_json()), device]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            last: dict[str, Any] = {}
            for line in process.stdout:
                last = json.loads(line)
                if kill_at is not None and last["kind"] == "step_metrics" and last["step"] >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
        assert (process.returncode == -signal.SIGKILL) == (kill_at is not None)
        return last

    def adapter(last: dict[str, Any]) -> bytes:
        assert last["kind"] == "finished"
        return (Path(last["adapter_dir"]) / "adapter_model.safetensors").read_bytes()

    whole = adapter(run(make_spec("whole", **settings), None))
    resume_from: Path | None = None
    for number, kill_at in enumerate(sorted(rng.sample(range(3, 23), 3))):
        spec = make_spec(f"killed-{number}", resume_from=resume_from, **settings)
        run(spec, kill_at)
        found = sorted((spec.work_dir / "checkpoints").glob("step-*"))
        resume_from = found[-1] if found else resume_from
    assert resume_from is not None
    last = run(make_spec("last", resume_from=resume_from, **settings), None)
    assert adapter(last) == whole


def test_a_kill_at_any_moment_of_a_write_leaves_a_whole_checkpoint_or_none(
    make_spec: MakeSpec, base: BaseModel, tmp_path: Path, device: str
) -> None:
    """A forked process writes one over an older one of the same name and is killed at each of its calls in turn."""
    if device != "cpu":
        pytest.skip("a forked process has no device")
    events = list(train(make_spec("made"), base, stop_after(2)))
    source = Path(next(event for event in events if isinstance(event, CheckpointSaved)).path)
    state = json.loads((source / "state.json").read_text())
    snapshot = checkpoint.Snapshot(
        run_id=state["run_id"],
        progress=checkpoint.Progress(**state["progress"]),
        adapter={},
        optimizer={},
        generators={},
        best_adapter=None,
        result_csv="step\n",
        copied=None,
    )

    def write_adapter(folder: Path, _: dict[str, Any]) -> None:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")

    target = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.write(target, snapshot, write_adapter)
    survived = killed = 0
    for moment in range(1, 100):
        child = os.fork()
        if child == 0:
            die_at_call(moment)
            checkpoint.write(target, snapshot, write_adapter)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            survived = os.WEXITSTATUS(status) == 0
            break
        killed += 1
        whole = [path for path in target.parent.iterdir() if path.name.startswith("step-")]
        for folder in whole:
            recorded = json.loads((folder / "state.json").read_text())["files"]
            assert recorded == {name: checkpoint._sha256(folder / name) for name in checkpoint._files(folder)}
        # Between two renames the older one stands under another name; nothing half is under this one.
        assert whole or (target.parent / ".step-00000002.old" / "state.json").exists()
    assert survived
    assert killed > 10
    assert [path.name for path in target.parent.iterdir()] == ["step-00000002"]


def die_at_call(moment: int) -> None:
    """SIGKILL this process at its next so many calls that reach for the disk."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    os.fsync = counted(os.fsync)
    os.rename = counted(os.rename)
    for name in ("mkdir", "write_text", "write_bytes", "rename"):
        setattr(Path, name, counted(getattr(Path, name)))


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_training(
    make_spec: MakeSpec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writes = checkpoint.write, 0

    def full(*arguments: Any) -> None:
        nonlocal writes
        writes += 1
        if writes in (2, 3):
            raise OSError(28, "No space left on device")
        write(*arguments)

    whole = list(train(make_spec("whole", n_evals=6), base, lambda: None))
    monkeypatch.setattr(checkpoint, "write", full)
    events = list(train(make_spec("full", n_evals=6), base, lambda: None))
    assert adapter_of(events[-1]) == adapter_of(whole[-1])
    warnings = [event for event in events if isinstance(event, Log) and event.level == "warn"]
    assert [event.data["code"] for event in warnings] == ["disk_full", "disk_full"]
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [2, 8, 10, 12]
