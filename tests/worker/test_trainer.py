"""What one training run promises."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.planner import Budget, ModelShape, Work, plan_for
from graft.recipe import EarlyStopping, LoraSettings, Recipe
from graft_worker import lora, planning, trainer
from graft_worker.base_model import BaseModel, load_base_model
from graft_worker.decoder import Decoder
from graft_worker.failures import TrainingFailure
from graft_worker.spec import TrainingSpec
from graft_worker.trainer import (
    CheckpointSaved,
    DataReady,
    Finished,
    Log,
    StepMetrics,
    evaluation_steps,
    learning_rate_at,
    train,
)

from .tiny import conversation

MakeSpec = Callable[..., TrainingSpec]


def run(spec: TrainingSpec, base: BaseModel) -> list[Any]:
    return list(train(spec, base, lambda: None))


def steps(events: list[Any]) -> list[StepMetrics]:
    return [event for event in events if isinstance(event, StepMetrics)]


def adapter_bytes(events: list[Any]) -> bytes:
    return (Path(events[-1].adapter_dir) / "adapter_model.safetensors").read_bytes()


def test_a_run_tells_its_story_in_order_and_learns(make_spec: MakeSpec, base: BaseModel) -> None:
    events = run(make_spec(n_epochs=4, learning_rate=1e-2), base)
    ready, finished = events[0], events[-1]
    assert isinstance(ready, DataReady)
    assert isinstance(finished, Finished)
    assert (ready.total_steps, ready.steps_per_epoch, ready.num_training_rows, ready.num_validation_rows) == (
        24,
        6,
        24,
        8,
    )
    assert [event.step for event in steps(events)] == list(range(1, 25))
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [8, 16, 24]
    assert [event.step for event in steps(events) if event.full_valid_loss is not None] == [8, 16, 24]
    assert finished.final_metrics["full_valid_loss"] < 0.5 * finished.initial_valid_loss
    assert finished.trained_tokens == 4 * ready.trained_tokens_per_epoch == sum(s.trained_tokens for s in steps(events))
    assert (finished.weights, finished.adapter_step, finished.stopped_early) == ("last", 24, False)
    for event in events:
        assert json.loads(json.dumps(dataclasses.asdict(event)))["kind"] == event.kind


def test_the_result_file_has_openais_columns_and_a_line_per_step(make_spec: MakeSpec, base: BaseModel) -> None:
    events = run(make_spec(), base)
    with Path(events[-1].result_csv).open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [int(line["step"]) for line in lines] == list(range(1, 13))
    for line, event in zip(lines, steps(events), strict=True):
        assert float(line["train_loss"]) == pytest.approx(event.train_loss, rel=1e-5)
        assert (line["valid_loss"] == "") == (event.full_valid_loss is None)


def test_how_a_step_is_cut_does_not_change_what_is_learnt(make_spec: MakeSpec, base_folder: Path, device: str) -> None:
    """One row at a time, two, four, packed or padded, with unequal numbers of trained tokens.

    In fp32 everywhere: in bf16 products of another shape round differently, by more than the bound.
    """
    base = load_base_model(base_folder, quantization="nf4", device=device, compute_dtype=torch.float32)
    runs = {
        cut: run(
            make_spec(f"{cut}", micro_batch_tokens=cut[0], packing=cut[1], batch_size=4, max_grad_norm=0.0, n_epochs=1),
            base,
        )
        for cut in ((1, True), (128, True), (4096, True), (1, False), (4096, False))
    }
    for cut in runs:
        for ours, whole in zip(steps(runs[cut]), steps(runs[4096, True]), strict=True):
            assert ours.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
            assert ours.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
            assert (ours.trained_tokens, ours.tokens) == (whole.trained_tokens, whole.tokens)


def test_the_same_spec_gives_the_same_bytes_on_a_warm_base(make_spec: MakeSpec, base: BaseModel) -> None:
    dropout = LoraSettings(r=4, alpha=8, dropout=0.2)
    first = adapter_bytes(run(make_spec("one", lora=dropout), base))
    run(make_spec("between", seed=7, lora=LoraSettings(r=2)), base)
    assert adapter_bytes(run(make_spec("two", lora=dropout), base)) == first
    assert adapter_bytes(run(make_spec("other", lora=dropout, seed=43), base)) != first


def test_checkpointing_activations_changes_nothing(make_spec: MakeSpec, base: BaseModel) -> None:
    dropout = LoraSettings(r=4, alpha=8, dropout=0.2)
    plain = run(make_spec("plain", lora=dropout, n_epochs=1), base)
    recomputed = run(make_spec("recomputed", lora=dropout, n_epochs=1, gradient_checkpointing=True), base)
    assert adapter_bytes(plain) == adapter_bytes(recomputed)


def test_a_plain_base_is_trained_as_well(make_spec: MakeSpec, base_folder: Path) -> None:
    dense = load_base_model(base_folder, quantization="none", device="cpu")
    finished = run(make_spec(quantization="none", learning_rate=1e-2), dense)[-1]
    assert finished.final_metrics["full_valid_loss"] < finished.initial_valid_loss


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_learn_the_same(optimizer: str, make_spec: MakeSpec, base: BaseModel) -> None:
    # Rank 64 makes tensors of 4,096 elements, from which on the optimizer keeps its state in 8 bits.
    settings = {"lora": LoraSettings(r=64, alpha=64), "learning_rate": 1e-3}
    exact = run(make_spec("exact", **settings), base)[-1]
    events = run(make_spec("small", optimizer=optimizer, **settings), base)
    gained = exact.initial_valid_loss - exact.final_metrics["full_valid_loss"]
    assert events[-1].final_metrics["full_valid_loss"] == pytest.approx(
        exact.final_metrics["full_valid_loss"], abs=0.1 * gained
    )
    warned = any(isinstance(event, Log) and "too small to page" in event.message for event in events)
    assert warned == optimizer.startswith("paged")


def test_a_split_replaces_a_missing_validation_file(make_spec: MakeSpec, base: BaseModel) -> None:
    events = run(make_spec(validation_file=None, validation_split=0.25, n_epochs=1), base)
    assert (events[0].num_training_rows, events[0].num_validation_rows) == (18, 6)
    assert events[-1].final_metrics["full_valid_loss"] > 0


def test_without_validation_there_are_checkpoints_all_the_same(make_spec: MakeSpec, base: BaseModel) -> None:
    events = run(make_spec(validation_file=None, n_epochs=1), base)
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [2, 4, 6]
    assert all(event.valid_loss is None for event in steps(events))
    assert (events[-1].initial_valid_loss, events[-1].best_metrics) == (None, {})


def test_early_stopping_ends_the_run_and_keeps_the_best_weights(make_spec: MakeSpec, base: BaseModel) -> None:
    # A rate this high makes the validation loss jump about; no evaluation improves it by min_delta.
    spec = make_spec(
        learning_rate=0.3,
        lr_scheduler="constant",
        n_epochs=4,
        n_evals=24,
        max_grad_norm=0.0,
        early_stopping=EarlyStopping(patience=6, min_delta=100.0, warmup_evals=2),
    )
    events = run(spec, base)
    finished = events[-1]
    losses = {event.step: event.full_valid_loss for event in steps(events)}
    best = min(losses, key=losses.__getitem__)
    assert finished.stopped_early
    assert finished.steps == max(losses) == 8
    assert (finished.weights, finished.adapter_step) == ("best", best)
    assert finished.best_metrics["full_valid_loss"] == losses[best]
    at_best = next(event for event in events if isinstance(event, CheckpointSaved) and event.step == best)
    assert (Path(at_best.adapter_dir) / "adapter_model.safetensors").read_bytes() == adapter_bytes(events)


def test_early_stopping_lets_an_improving_run_finish(make_spec: MakeSpec, base: BaseModel) -> None:
    finished = run(make_spec(early_stopping=EarlyStopping(patience=1)), base)[-1]
    assert (finished.stopped_early, finished.steps, finished.weights, finished.adapter_step) == (False, 12, "best", 12)


def test_clipping_bounds_the_update_and_reports_the_norm_before(make_spec: MakeSpec, base: BaseModel) -> None:
    free = run(make_spec("free", max_grad_norm=0.0, n_epochs=1), base)
    clipped = run(make_spec("clipped", max_grad_norm=0.01, n_epochs=1), base)
    assert steps(free)[0].grad_norm == steps(clipped)[0].grad_norm > 0.01
    assert adapter_bytes(free) != adapter_bytes(clipped)


@pytest.mark.parametrize(
    ("scheduler", "warmup", "floor", "expected"),
    [
        ("linear", 0.2, 0.0, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", 0.0, 0.5, [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        ("constant", 0.5, 0.0, [1] * 10),
        ("constant_with_warmup", 0.4, 0.0, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("cosine", 0.0, 0.1, [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]),
        ("linear", 1.0, 0.0, [i / 10 for i in range(1, 11)]),
    ],
)
def test_schedules_have_the_promised_values(scheduler: Any, warmup: float, floor: float, expected: list[float]) -> None:
    recipe = Recipe(base_model="m", learning_rate=2e-4, lr_scheduler=scheduler, warmup_ratio=warmup, min_lr_ratio=floor)
    rates = [learning_rate_at(step, 10, recipe) / 2e-4 for step in range(10)]
    assert rates == pytest.approx(expected)


def test_evaluations_are_evenly_spaced_and_end_the_run() -> None:
    assert evaluation_steps(12, 3) == {4, 8, 12}
    assert evaluation_steps(10, 3) == {4, 7, 10}
    assert evaluation_steps(2, 10) == {1, 2}
    assert evaluation_steps(7, 1) == evaluation_steps(7, 0) == {7}


def test_the_spec_survives_the_pipe(make_spec: MakeSpec, tmp_path: Path) -> None:
    for overrides in (
        {},
        {"validation_file": None, "resume_from": tmp_path / "c", "extras": {"a": [1]}},
        {"lora": LoraSettings(target_modules=("q_proj",)), "early_stopping": EarlyStopping()},
    ):
        spec = make_spec(**overrides)
        assert TrainingSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_what_was_done_to_the_data_is_said(
    make_spec: MakeSpec, base: BaseModel, write_jsonl: Callable[..., Path]
) -> None:
    rows = [conversation(index) for index in range(24)]
    rows[0]["messages"][2]["weight"] = 0
    rows[1]["messages"][1]["content"] = "<|im_end|>"
    rows[2]["messages"][2]["content"] = "very " * 80
    path = write_jsonl(rows, "odd.jsonl")
    events = run(make_spec(training_file=path, max_seq_length=512, context_length=64, n_epochs=1), base)
    logged = " ".join(event.message for event in events if isinstance(event, Log))
    for words in (
        "max_seq_length 512 exceeds the model's context; 64 is used",
        "1 of 24 training rows were cut on the right to fit max_seq_length 64",
        "1 of 24 training rows hold nothing to learn and are left out (line 1)",
        "1 of 24 training rows spell a control token",
    ):
        assert words in logged


def test_a_loss_that_explodes_ends_the_job_before_the_update(make_spec: MakeSpec, base: BaseModel) -> None:
    events: list[Any] = []
    spec = make_spec(learning_rate=1e30, lr_scheduler="constant", validation_file=None)
    with pytest.raises(TrainingFailure, match=r"^non_finite_loss: Step \d+ gave loss") as caught:
        events.extend(train(spec, base, lambda: None))  # keeps what came before the failure
    assert f"the weights of step {len(steps(events))} are untouched" in caught.value.message
    assert not any(isinstance(module, lora.LoraLinear) and module.lora_A is not None for module in base.model.modules())


def test_a_validation_loss_that_explodes_ends_the_job(make_spec: MakeSpec, base: BaseModel) -> None:
    with pytest.raises(TrainingFailure, match=r"^non_finite_loss: The validation loss is nan"):
        run(make_spec(learning_rate=1e30, lr_scheduler="constant", n_evals=100), base)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), TrainingFailure),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), TrainingFailure),
        (MemoryError(), TrainingFailure),
        (RuntimeError("something else"), RuntimeError),
    ],
    ids=["cuda", "cpu", "python", "other"],
)
def test_running_out_of_memory_is_said_in_the_jobs_terms(
    error: Exception,
    expected: type[Exception],
    make_spec: MakeSpec,
    base: BaseModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Decoder, "accumulate", fail)
    with pytest.raises(expected) as caught:
        run(make_spec(), base)
    if isinstance(caught.value, TrainingFailure):
        assert caught.value.code == "out_of_memory"
        assert "Memory ran out in " in caught.value.message
        assert "with conversations of up to 128 tokens" in caught.value.message


def test_a_plan_that_does_not_fit_after_all_is_made_smaller(
    make_spec: MakeSpec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plan of a GPU, whose rehearsal fails once; on a CPU there would be none."""
    shape = ModelShape.from_config(base.model.config.to_dict())
    accumulate, make = Decoder.accumulate, trainer._plan
    shares: list[float] = []

    def plan(*arguments: Any) -> Any:
        shares.append(planning.BUDGET_SHARES[arguments[-1]])
        batching, _ = make(*arguments)
        work = Work(step_tokens=256, longest_document=64, packed=True)
        return batching, plan_for(arguments[1], shape, work, Budget(device=int(shares[-1] * 2**30)))

    def fail_once(*arguments: Any) -> Any:
        if len(shares) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return accumulate(*arguments)

    plain = adapter_bytes(run(make_spec("plain", n_epochs=1), base))
    monkeypatch.setattr(trainer, "_plan", plan)
    monkeypatch.setattr(Decoder, "accumulate", fail_once)
    events = run(make_spec("planned", n_epochs=1), base)
    assert shares == list(planning.BUDGET_SHARES[:2])
    logged = [event for event in events if isinstance(event, Log)]
    assert sum(event.message.startswith("The plan: ") for event in logged) == 2
    assert any("did not fit after all" in event.message for event in logged)
    assert adapter_bytes(events) == plain


def test_a_model_that_our_decoder_does_not_compute_is_trained_through_transformers(
    make_spec: MakeSpec, base: BaseModel, base_folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, and the events say why."""
    exact = load_base_model(base_folder, quantization="nf4", device=device, compute_dtype=torch.float32)
    ours = run(make_spec("ours", max_grad_norm=0.0, n_epochs=1), exact)
    exact.model.config.attention_dropout = 1e-9
    for recompute in (False, True):
        events = run(make_spec("theirs", max_grad_norm=0.0, n_epochs=1, gradient_checkpointing=recompute), exact)
        assert any(isinstance(e, Log) and "attention_dropout is 1e-09" in e.message for e in events)
        for a, b in zip(steps(ours), steps(events), strict=True):
            assert a.train_loss == pytest.approx(b.train_loss, rel=1e-4)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in exact.model.modules())
        assert not exact.model.training


def test_the_last_checkpoints_adapter_is_the_result_to_the_byte(make_spec: MakeSpec, base: BaseModel) -> None:
    """So that storage holds it once."""
    events = run(make_spec(), base)
    saved = [event for event in events if isinstance(event, CheckpointSaved)][-1]
    finished = events[-1]
    assert isinstance(finished, Finished)
    kept, result = (
        {path.name: path.read_bytes() for path in Path(each.adapter_dir).iterdir()} for each in (saved, finished)
    )
    assert kept == result


def test_early_stopping_needs_something_to_watch(make_spec: MakeSpec, base: BaseModel) -> None:
    with pytest.raises(TrainingFailure, match=r"^no_validation_data"):
        run(make_spec(validation_file=None, early_stopping=EarlyStopping()), base)


def test_an_unknown_target_leaves_the_base_clean(make_spec: MakeSpec, base: BaseModel) -> None:
    with pytest.raises(TrainingFailure, match=r"^unsupported_target_module"):
        run(make_spec(lora=LoraSettings(target_modules=("nope",))), base)
    assert isinstance(run(make_spec(n_epochs=1), base)[-1], Finished)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_recipe_says_whether_sums_have_an_order(
    deterministic: bool, make_spec: MakeSpec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Decoder] = []

    class Watched(Decoder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(trainer, "Decoder", Watched)
    run(make_spec(n_epochs=1, deterministic=deterministic), base)
    assert [decoder.deterministic for decoder in made] == [deterministic]
