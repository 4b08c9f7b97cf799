"""The training loop, to be read from top to bottom. It yields what happens; it knows no database and no storage.

The loss of a step is the sum of its token losses over the number of its trained tokens, counted over all micro-batches:
how a step is cut does not change what is learnt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from graft import planner
from graft.estimate import Amount, work_of
from graft.planner import Plan
from graft.recipe import EarlyStopping, Recipe
from graft.supervision import Limits, remarks
from graft.tokens import TokenCache
from graft_kernels.adamw import AdamW
from graft_worker import checkpoint, export, lora, planning
from graft_worker.base_model import BaseModel
from graft_worker.batches import ALIGNMENT, Batching, BatchMode, MicroBatch, epoch_order, pack, rows_of_step
from graft_worker.checkpoint import Progress
from graft_worker.data import EncodedDataset, Row, Rows, encode_file, longest_first, split_rows
from graft_worker.decoder import Decoder, UnsupportedModel
from graft_worker.failures import TrainingFailure, is_out_of_memory, named
from graft_worker.spec import TrainingSpec
from graft_worker.transformers_network import TransformersNetwork

CHECKPOINTS_WITHOUT_EVALUATIONS = 10
# In a row; a worker whose disk stays full had better let another one go on.
MOST_FAILED_WRITES = 3
_CSV_HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"

# What comes out -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """Something the owner of the job should read."""

    level: Literal["info", "warn"]
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    kind: Literal["log"] = "log"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReady:
    """The files are tokenised; `training` and `validation` are `DatasetStatistics` as dictionaries."""

    training: dict[str, Any]
    validation: dict[str, Any] | None
    num_training_rows: int
    num_validation_rows: int
    total_steps: int
    steps_per_epoch: int
    trained_tokens_per_epoch: int
    tokens_per_epoch: int
    kind: Literal["data_ready"] = "data_ready"


@dataclass(frozen=True, kw_only=True, slots=True)
class Began:
    """All is loaded and planned, and the first evaluation or step is next. `plan` is the planner's, on a GPU."""

    step: int
    total_steps: int
    plan: dict[str, Any] | None
    batching: dict[str, Any]
    kind: Literal["began"] = "began"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step. Losses are in nats per trained token; tokens are the step's own, padding not counted.

    The validation metrics are those of the whole validation set, so OpenAI's `valid_*` and `full_valid_*` are equal;
    they are None at steps without an evaluation. `grad_norm` is taken before clipping.
    """

    step: int
    total_steps: int
    epoch: float
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    tokens: int
    seconds: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    kind: Literal["step_metrics"] = "step_metrics"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """On the disk: `path` is the folder to resume from, complete in itself; `adapter_dir` is the adapter inside it.

    It comes when it has been written, which is some time after its step. `wanted` tells one that was asked for, by the
    recipe or to stop, from one that only bounds what can be lost.
    """

    step: int
    path: str
    adapter_dir: str
    metrics: dict[str, Any]
    wanted: bool
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """The run ended at the caller's wish; the checkpoint of `step` has been announced before this."""

    step: int
    reason: str
    kind: Literal["stopped"] = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The adapter is in `adapter_dir`: the last weights, or the best ones where early stopping watched for them.

    `measured`: peak_bytes; loop_seconds of this attempt, from `Began` to here with all waiting; and step_seconds and
    tokens_per_second of its steps but the first. Bytes are the allocator's on a GPU, on a CPU what the process grew by,
    base model included.
    """

    adapter_dir: str
    adapter_step: int
    weights: Literal["last", "best"]
    result_csv: str
    steps: int
    stopped_early: bool
    trained_tokens: int
    seconds: float
    initial_valid_loss: float | None
    final_metrics: dict[str, Any]
    best_metrics: dict[str, Any]
    measured: dict[str, float | int]
    kind: Literal["finished"] = "finished"


Event = Log | DataReady | Began | StepMetrics | CheckpointSaved | Stopped | Finished


# The loop -------------------------------------------------------------------------------------------------------------


def train(
    spec: TrainingSpec,
    base: BaseModel,
    should_stop: Callable[[], str | None],
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train one adapter on a warm base model, and leave the base as it was.

    `should_stop` is asked before the first step and after every one; a reason ends the run with a checkpoint. The last
    event is `Stopped` or `Finished`. `interrupted` is asked after every micro-batch, also of an evaluation; if it says
    so, `should_stop` is asked at once, and what the step has summed up is dropped: the checkpoint is that of the last
    whole step. Checkpoints are written beside the training; one that cannot be is told of and tried again later, until
    `MOST_FAILED_WRITES` in a row have failed.

    Raises:
        TrainingFailure: the job cannot go on; nothing else is raised for anything a user or a machine can cause.
    """
    recipe, model, device = spec.recipe, base.model, base.device
    memory = MemoryMeter(base)
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    _seed_everything(recipe.seed)

    # Data
    max_seq_length = min(recipe.max_seq_length, spec.context_length)
    if max_seq_length < recipe.max_seq_length:
        yield Log(
            level="warn",
            message=f"max_seq_length {recipe.max_seq_length} exceeds the model's context; {max_seq_length} is used.",
        )
    training, validation = _encode(spec, base, max_seq_length)
    rows, valid_rows = training.rows, training.rows[:0] if validation is None else validation.rows
    if validation is None and recipe.validation_split > 0:
        rows, valid_rows = split_rows(rows, recipe.validation_split, recipe.seed)
    if recipe.early_stopping is not None and not valid_rows:
        raise TrainingFailure("no_validation_data", "Early stopping needs a validation file or a validation_split.")
    yield from _remarks(training, "training", max_seq_length, recipe)
    if validation is not None:
        yield from _remarks(validation, "validation", max_seq_length, recipe)

    steps_per_epoch = math.ceil(len(rows) / recipe.batch_size)
    total_steps = recipe.n_epochs * steps_per_epoch
    eval_steps = evaluation_steps(total_steps, recipe.n_evals)
    # A run without evaluations must not be a run without checkpoints.
    save_steps = eval_steps or evaluation_steps(total_steps, CHECKPOINTS_WITHOUT_EVALUATIONS)
    yield DataReady(
        training=dataclasses.asdict(training.statistics),
        validation=None if validation is None else dataclasses.asdict(validation.statistics),
        num_training_rows=len(rows),
        num_validation_rows=len(valid_rows),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        trained_tokens_per_epoch=rows.num_trained,
        tokens_per_epoch=rows.num_tokens,
    )
    provenance = export.Provenance(
        job_id=spec.job_id,
        recipe=recipe,
        base_model_name=spec.base_model_name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        chat_template_sha256=export.chat_template_sha256(base),
        training=training.statistics,
        validation=None if validation is None else validation.statistics,
        num_training_rows=len(rows),
        num_validation_rows=len(valid_rows),
        device=export.device_name(device),
        extras=spec.extras,
    )
    run_id = _run_id(spec, provenance)
    network: Network | None = None
    saver: Saver | None = None

    try:
        # Adapter, optimizer, and where an earlier attempt got to
        adapter = lora.attach(model, recipe.lora, recipe.seed)
        parameters = adapter.parameters()
        optimizer = make_optimizer(recipe, parameters)
        if recipe.optimizer == "paged_adamw_8bit":
            yield Log(level="warn", message="An adapter's state is too small to page; adamw_8bit is what runs.")
        result_csv = spec.work_dir / "result.csv"
        progress, best_adapter = Progress(), None
        if spec.resume_from is None:
            result_csv.write_text(_CSV_HEADER, encoding="utf-8")
        else:
            restored = checkpoint.restore(
                spec.resume_from, run_id=run_id, adapter=adapter, optimizer=optimizer, device=device
            )
            progress, best_adapter = restored.progress, restored.best_adapter
            result_csv.write_text(restored.result_csv, encoding="utf-8")
            yield Log(level="info", message=f"Resumed at step {progress.step} of {total_steps}.")

        # The network, and what the memory of this device lets it keep
        lengths = [*rows.lengths, *valid_rows.lengths]
        network, reason = _network(base, recipe, parameters, max(lengths))
        if reason:
            yield Log(
                level="warn",
                message=f"This model is trained through transformers, slower and with padded rows: {reason}."
                + (" Its sums have no fixed order on a GPU." if recipe.deterministic and device.type == "cuda" else ""),
            )
        if spec.first_plan is not None and spec.resume_from is None:
            # What the first start decided before it was lost: so that this one computes the same.
            budget = -(-int(spec.first_plan["micro_batch_tokens"]) // ALIGNMENT) * ALIGNMENT
            progress.batching = dataclasses.asdict(Batching(mode=_mode(recipe, network), token_budget=budget))
            progress.head_chunk_rows = spec.first_plan["head_chunk_rows"]
        smaller = min(spec.smaller_plans, len(planning.BUDGET_SHARES) - 1)
        while True:
            try:
                batching, plan = _plan(base, recipe, network, lengths, rows, progress, smaller)
                if plan is None:
                    break
                yield Log(level="info", message=f"The plan: {plan.summary()}.", data={"plan": plan.to_json()})
                with _memory_guard("the rehearsal of the largest micro-batch", recipe):
                    _rehearse(network, batching, longest_first(rows, valid_rows), min(lengths), device)
                progress.head_chunk_rows = plan.head_chunk_rows
                break
            except TrainingFailure as failure:
                if failure.needs_bytes is not None:
                    if smaller > 0:  # it is not the device that is too small, but the share of it that proved real
                        raise TrainingFailure("out_of_memory", failure.message) from failure
                    # With a checkpoint, how steps are cut is settled, and only a larger device can go on.
                    if spec.resume_from is not None or not progress.batching:
                        raise
                    progress.batching, progress.head_chunk_rows = {}, None
                    yield Log(level="warn", message=f"Steps are cut anew for this device. {failure.message}")
                    continue
                smaller += 1
                if smaller == len(planning.BUDGET_SHARES):
                    raise
                yield Log(
                    level="warn", message=f"It did not fit after all, and a smaller one is made. {failure.message}"
                )
        progress.batching = dataclasses.asdict(batching)
        yield Began(
            step=progress.step,
            total_steps=total_steps,
            plan=None if plan is None else plan.to_json(),
            batching=progress.batching,
        )

        loop_began = time.monotonic()
        saver = Saver(spec, run_id)

        def save_checkpoint(generators: dict[str, Any], *, wanted: bool) -> Iterator[Event]:
            metrics, step = progress.last, progress.step
            yield from saver.start(
                checkpoint.snapshot(
                    run_id=run_id,
                    progress=progress,
                    adapter=adapter,
                    optimizer=optimizer,
                    generators=generators,
                    device=device,
                    best_adapter=best_adapter,
                    result_csv=result_csv.read_text(encoding="utf-8"),
                ),
                lambda path, state: export.write_adapter_folder(
                    path, adapter, provenance, step=step, metrics=metrics, state=state
                ),
                wanted=wanted,
            )

        def stop(reason: str, generators: dict[str, Any]) -> Iterator[Event]:
            if saver.step != progress.step or progress.pending is not None:
                yield from save_checkpoint(generators, wanted=True)
            yield from saver.finish()
            yield Stopped(step=progress.step, reason=reason)

        generators = checkpoint.generators(device)
        if valid_rows and progress.initial_valid_loss is None:
            started = time.monotonic()
            with _memory_guard("the evaluation before training", recipe):
                before = evaluate(network, valid_rows, batching, base, interrupted)
            if before is None:
                yield from stop(should_stop() or "interrupted", generators)
                return
            progress.initial_valid_loss = before.loss
            progress.seconds += time.monotonic() - started
            yield Log(
                level="info",
                message=f"Validation loss before training: {before.loss:.4f}.",
                data={"step": 0, "full_valid_loss": before.loss, "full_valid_mean_token_accuracy": before.accuracy},
            )
        if progress.step < total_steps and not progress.stopped_early and (reason := should_stop()):
            yield from stop(reason, generators)
            return

        # Steps
        orders: dict[int, list[int]] = {}

        def cut(step: int) -> tuple[list[Row], list[MicroBatch]]:
            """The rows of a step, counted from 0, and its micro-batches, on the CPU."""
            epoch, step_in_epoch = divmod(step, steps_per_epoch)
            if epoch not in orders:
                orders.clear()
                orders[epoch] = epoch_order(len(rows), recipe.seed, epoch)
            step_rows = rows_of_step(rows, orders[epoch], step_in_epoch, recipe.batch_size)
            return step_rows, list(batching.micro_batches(step_rows, pad_token_id(base)))

        ahead: tuple[list[Row], list[MicroBatch]] | None = None
        paces: list[tuple[float, int]] = []  # seconds and tokens of each step
        while (progress.step < total_steps or progress.pending is not None) and not progress.stopped_early:
            started = time.monotonic()
            generators = checkpoint.generators(device)
            if progress.pending is None:
                step_rows, batches = cut(progress.step) if ahead is None else ahead
                num_trained = sum(row.num_trained for row in step_rows)
                learning_rate = learning_rate_at(progress.step, total_steps, recipe)
                step = progress.step + 1

                with _memory_guard(f"step {step}", recipe):
                    network.clear_gradients()
                    totals = torch.zeros(2, dtype=torch.float64, device=device)
                    for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
                        part = network.accumulate(batch.to(device), num_trained)
                        totals += torch.stack([each.double() for each in part])
                        yield from saver.poll()
                        if interrupted() and left and (reason := should_stop()):
                            yield from stop(reason, generators)
                            return
                    norm = optimizer.grad_norm()
                    # While a GPU computes; it would have to wait for that between two steps.
                    ahead = cut(step) if step < total_steps else None
                    # The one place of a step where a GPU is waited for.
                    loss_total, correct_total, grad_norm = torch.cat((totals, norm.double()[None])).tolist()
                    if not (math.isfinite(loss_total) and math.isfinite(grad_norm)):
                        raise TrainingFailure(
                            "non_finite_loss",
                            f"Step {step} gave loss {loss_total / num_trained:g} and gradient norm {grad_norm:g}; "
                            f"the weights of step {progress.step} are untouched. A lower learning rate (now "
                            f"{learning_rate:g}) or a longer warm-up often helps; the rows were on lines "
                            f"{', '.join(str(row.line) for row in step_rows[:10])}.",
                        )
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate
                    optimizer.step(max_norm=recipe.max_grad_norm or None, norm=norm)
                numbers: dict[str, Any] = {
                    "step": step,
                    "total_steps": total_steps,
                    "epoch": step / steps_per_epoch,
                    "train_loss": loss_total / num_trained,
                    "train_mean_token_accuracy": correct_total / num_trained,
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm,
                    "trained_tokens": num_trained,
                    "tokens": sum(len(row.input_ids) for row in step_rows),
                    "seconds": time.monotonic() - started,
                }
                progress.step = step
                progress.trained_tokens += num_trained
                paces.append((numbers["seconds"], numbers["tokens"]))
            else:
                numbers, progress.pending = progress.pending, None
                step = progress.step

            if step in eval_steps and valid_rows:
                generators = checkpoint.generators(device)
                with _memory_guard(f"the evaluation at step {step}", recipe):
                    found = evaluate(network, valid_rows, batching, base, interrupted)
                if found is None:
                    progress.pending, progress.last = numbers, _summary(StepMetrics(**numbers))
                    progress.seconds += time.monotonic() - started
                    yield from stop(should_stop() or "interrupted", generators)
                    return
                numbers |= {
                    "valid_loss": found.loss,
                    "valid_mean_token_accuracy": found.accuracy,
                    "full_valid_loss": found.loss,
                    "full_valid_mean_token_accuracy": found.accuracy,
                }
            metrics = StepMetrics(**numbers)
            progress.seconds += time.monotonic() - started
            progress.last = _summary(metrics)
            if metrics.full_valid_loss is not None and _note_evaluation(progress, recipe.early_stopping):
                best_adapter = adapter.state_dict()
            with result_csv.open("a", encoding="utf-8") as file:
                file.write(_csv_line(metrics))
            yield metrics

            yield from saver.poll()
            if step in save_steps:
                yield from save_checkpoint(checkpoint.generators(device), wanted=True)
            elif step < total_steps and saver.is_due(step):
                yield from save_checkpoint(checkpoint.generators(device), wanted=False)
            if step < total_steps and not progress.stopped_early and (reason := should_stop()):
                yield from stop(reason, checkpoint.generators(device))
                return

        # Result
        weights: Literal["last", "best"] = "last"
        adapter_metrics = progress.last
        if best_adapter is not None:
            weights, adapter_metrics = "best", progress.best
            adapter.load_state_dict(best_adapter)
        adapter_dir = spec.work_dir / "adapter"
        adapter_step = int(adapter_metrics["step"])
        export.write_adapter_folder(adapter_dir, adapter, provenance, step=adapter_step, metrics=adapter_metrics)
        yield from saver.finish()
        yield Finished(
            adapter_dir=str(adapter_dir),
            adapter_step=adapter_step,
            weights=weights,
            result_csv=str(result_csv),
            steps=progress.step,
            stopped_early=progress.stopped_early,
            trained_tokens=progress.trained_tokens,
            seconds=progress.seconds,
            initial_valid_loss=progress.initial_valid_loss,
            final_metrics=progress.last,
            best_metrics=progress.best,
            measured={
                "peak_bytes": memory.peak(),
                "loop_seconds": time.monotonic() - loop_began,
                **_pace(paces),
            },
        )
    except Exception:
        if saver is not None:
            yield from saver.give_up()  # what is being written is whole, and the next attempt begins there
        raise
    finally:
        if saver is not None:
            saver.close()
        lora.detach(model)
        if network is not None:
            network.close()


# Saving ---------------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints beside the training and says when they are on the disk. Its methods give events to yield.

    At most one is on its way: one that is asked for waits for the one before, one that only bounds a loss is left out.
    """

    def __init__(self, spec: TrainingSpec, run_id: str) -> None:
        self.step: int | None = None  # of the newest one that was begun and has not failed
        self._spec, self._run_id = spec, run_id
        self._writer = checkpoint.Writer()
        self._announcement: CheckpointSaved | None = None
        self._failures = 0
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether time or steps ask for a checkpoint, and nothing is on its way."""
        seconds, steps = self._spec.checkpoint_seconds, self._spec.checkpoint_steps
        by_time = seconds is not None and time.monotonic() - self._last >= seconds
        return not self._writer.is_busy and (by_time or (steps is not None and step % steps == 0))

    def start(
        self,
        state: checkpoint.Snapshot,
        write_adapter: Callable[[Path, dict[str, Tensor]], None],
        *,
        wanted: bool,
    ) -> Iterator[Event]:
        yield from self.poll(wait=True)
        folder = self._spec.work_dir / "checkpoints" / f"step-{state.progress.step:08d}"
        self.step = state.progress.step
        self._last = time.monotonic()
        self._announcement = CheckpointSaved(
            step=state.progress.step,
            path=str(folder),
            adapter_dir=str(folder / checkpoint.ADAPTER_FOLDER),
            metrics=state.progress.last,
            wanted=wanted,
        )
        self._writer.start(lambda: checkpoint.write(folder, state, write_adapter))

    def poll(self, *, wait: bool = False) -> Iterator[Event]:
        """What has come to its end. Raises TrainingFailure when too many writes in a row have failed."""
        try:
            if self._writer.is_done(wait=wait):
                assert self._announcement is not None
                self._failures = 0
                yield self._announcement
        except OSError as error:
            failure = named(error)
            if failure is None:
                raise
            self.step = None
            self._failures += 1
            if self._failures == MOST_FAILED_WRITES:
                raise failure from error
            yield Log(
                level="warn",
                message=f"A checkpoint could not be written, and the training goes on without it. {failure.message}",
                data={"code": failure.code},
            )

    def finish(self) -> Iterator[Event]:
        """Wait for the last one. Raises TrainingFailure if that cannot be written."""
        self._failures = MOST_FAILED_WRITES - 1
        yield from self.poll(wait=True)

    def give_up(self) -> Iterator[Event]:
        """Wait for the last one, whatever becomes of it."""
        with suppress(Exception):  # it may have met what ended the run
            yield from self.poll(wait=True)

    def close(self) -> None:
        self._writer.close()


# The mathematics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean cross-entropy per trained token, in nats, and the share of them guessed."""

    loss: float
    accuracy: float


def evaluate(
    network: Network,
    rows: Sequence[Row],
    batching: Batching,
    base: BaseModel,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Over all of `rows`, without dropout; None if it was interrupted before its end.

    Draws no random number, so evaluating does not change the training.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=base.device)
    for batch in batching.micro_batches(rows, pad_token_id(base)):
        if interrupted():
            return None
        totals += torch.stack([part.double() for part in network.evaluate(batch.to(base.device))])
    loss_total, correct_total = totals.tolist()
    num_trained = sum(row.num_trained for row in rows)
    if not math.isfinite(loss_total):
        raise TrainingFailure(
            "non_finite_loss", f"The validation loss is {loss_total:g}. A lower learning rate often helps."
        )
    return Evaluation(loss_total / num_trained, correct_total / num_trained)


def learning_rate_at(step: int, total_steps: int, recipe: Recipe) -> float:
    """The rate of step `step`, counted from 0. No state, so there is none to resume.

    Warm-up rises linearly and reaches the full rate at its last step; then linear or cosine decay runs towards
    `min_lr_ratio` times the rate, which it would reach one step after the last.
    """
    peak = recipe.learning_rate
    if recipe.lr_scheduler == "constant":
        return peak
    warmup = math.ceil(recipe.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.lr_scheduler == "constant_with_warmup":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    share = 1 - done if recipe.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * share)


def evaluation_steps(total_steps: int, n_evals: int) -> frozenset[int]:
    """After which steps (counted from 1) to evaluate and save: evenly spaced, always the last one."""
    return frozenset(math.ceil(total_steps * index / n_evals) for index in range(1, n_evals + 1)) | {total_steps}


def make_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> AdamW:
    """AdamW with betas (0.9, 0.999) and moments in fp32 or 8 bits. The loop sets the rate at every step."""
    bits = 32 if recipe.optimizer == "adamw_torch" else 8
    return AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=recipe.weight_decay,
        state_bits=bits,
    )


# The network ----------------------------------------------------------------------------------------------------------

Network = Decoder | TransformersNetwork


def _network(
    base: BaseModel, recipe: Recipe, parameters: list[nn.Parameter], longest: int
) -> tuple[Network, str | None]:
    """Our decoder; or transformers' model, and why."""
    try:
        decoder = Decoder(base.model, max_positions=longest, deterministic=recipe.deterministic)
    except UnsupportedModel as unsupported:
        return TransformersNetwork(base.model, parameters, recompute=recipe.gradient_checkpointing), str(unsupported)
    decoder.attach_gradients()
    return decoder, None


def _mode(recipe: Recipe, network: Network) -> BatchMode:
    return "packed" if recipe.packing and isinstance(network, Decoder) else "padded"


def _plan(
    base: BaseModel,
    recipe: Recipe,
    network: Network,
    lengths: list[int],
    rows: Rows,
    progress: Progress,
    smaller: int,
) -> tuple[Batching, Plan | None]:
    """How steps are cut, as it was stored or decided now; and what is kept, where there is a GPU to plan for.

    `smaller` counts the plans before that did not fit. Without a planner a smaller one recomputes what it can, and cuts
    steps into halves as often; where that is stored, it stays as it is.
    """
    mode = _mode(recipe, network)
    stored = Batching(**progress.batching) if progress.batching else None
    if not isinstance(network, Decoder) or base.device.type != "cuda":
        if isinstance(network, Decoder):
            network.head_chunk_rows = progress.head_chunk_rows
            recompute = recipe.gradient_checkpointing or smaller > 0
            planning.follow_without_plan(network, dataclasses.replace(recipe, gradient_checkpointing=recompute))
        tokens = max(1, min(planner.CPU_TOKENS, recipe.micro_batch_tokens) >> smaller)
        cut = dataclasses.replace(recipe, micro_batch_tokens=tokens)
        return stored or planning.default_batching(cut, lengths, mode), None
    work = work_of(
        recipe,
        Amount.of(rows.lengths, rows.num_trained, lengths[len(rows.lengths) :]),
        micro_batch_tokens=None if stored is None else stored.token_budget,
        head_chunk_rows=progress.head_chunk_rows,
    )
    plan = planning.make_plan(base, recipe, work, planning.BUDGET_SHARES[smaller])
    planning.follow(network, plan, recipe)
    return stored or planning.batching_of(plan, mode), plan


def _rehearse(
    network: Network, batching: Batching, longest_first: Iterable[Row], shortest: int, device: torch.device
) -> None:
    """Run the largest micro-batch there can be, to no effect: what memory there is not is missed now, and not later."""
    generators = torch.get_rng_state()
    chosen: list[Row] = []
    room = batching.token_budget
    for row in longest_first:
        if not chosen or len(row.input_ids) <= room:
            chosen.append(row)
            room -= len(row.input_ids)
        if room < shortest:
            break
    batch = _largest(chosen, batching)
    try:
        network.accumulate(batch.to(device), 1.0)
    finally:
        network.clear_gradients()
        torch.set_rng_state(generators)


def _largest(rows: Sequence[Row], batching: Batching) -> MicroBatch:
    return next(batching.micro_batches(rows, 0)) if batching.mode == "padded" else pack(rows, batching.alignment, 0)


# Helpers --------------------------------------------------------------------------------------------------------------


def pad_token_id(base: BaseModel) -> int:
    """Padding is masked out of attention and loss, so any id will do where the tokenizer has none."""
    found = base.tokenizer.pad_token_id
    return 0 if found is None else int(found)


def _encode(spec: TrainingSpec, base: BaseModel, max_seq_length: int) -> tuple[EncodedDataset, EncodedDataset | None]:
    recipe = spec.recipe
    options: dict[str, Any] = {
        "max_seq_length": max_seq_length,
        "train_on_inputs": recipe.train_on_inputs,
        "truncation": recipe.truncation,
        "today": recipe.today,
        "limits": Limits(
            max_untrained=recipe.max_untrained,
            max_without_end=recipe.max_without_end,
            max_left_out=recipe.max_left_out,
        ),
        "cache": None if spec.token_cache is None else TokenCache(spec.token_cache, spec.token_cache_bytes),
    }
    training = encode_file(spec.training_file, base.tokenizer, **options)
    if spec.validation_file is None:
        return training, None
    return training, encode_file(spec.validation_file, base.tokenizer, **options, param="validation_file")


def _remarks(dataset: EncodedDataset, name: str, max_seq_length: int, recipe: Recipe) -> Iterator[Log]:
    """What deserves a look; the numbers are in `DataReady`."""
    for level, message in remarks(dataset.facts, name, max_seq_length=max_seq_length, truncation=recipe.truncation):
        if level == "warn":
            yield Log(level="warn", message=f"{message}.")


class MemoryMeter:
    """The most memory that a run takes."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        if base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(base.device)
        else:
            with suppress(OSError):  # the kernel's own highest mark goes on from here
                Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def peak(self) -> int:
        """Bytes: of the allocator on a GPU; on a CPU what the process grew by, and the base model."""
        if self._base.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._base.device)
        return max(0, _resident("VmHWM") - self._before) + self._base.num_bytes


def _resident(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _pace(paces: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Without the first step, which pays for what is made once; nothing of fewer than two."""
    seconds, tokens = sum(pace[0] for pace in paces[1:]), sum(pace[1] for pace in paces[1:])
    if not seconds:
        return {}
    return {"step_seconds": seconds / len(paces[1:]), "tokens_per_second": tokens / seconds}


def _note_evaluation(progress: Progress, stopping: EarlyStopping | None) -> bool:
    """Bring best metrics and patience up to date; true when these weights are the ones to keep."""
    loss = progress.last["full_valid_loss"]
    best = progress.best.get("full_valid_loss", math.inf)
    progress.num_evals += 1
    if stopping is not None and progress.num_evals > stopping.warmup_evals:
        improved = loss < best - stopping.min_delta
        progress.evals_without_improvement = 0 if improved else progress.evals_without_improvement + 1
        progress.stopped_early = progress.evals_without_improvement >= stopping.patience
    if loss < best or not progress.best:
        progress.best = dict(progress.last)
        return stopping is not None
    return False


def _summary(metrics: StepMetrics) -> dict[str, Any]:
    """The metrics of a checkpoint, under OpenAI's names; those that were not measured are left out."""
    names = (
        "step",
        "train_loss",
        "train_mean_token_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
        "full_valid_loss",
        "full_valid_mean_token_accuracy",
    )
    return {name: value for name in names if (value := getattr(metrics, name)) is not None}


def _csv_line(metrics: StepMetrics) -> str:
    values = (
        metrics.train_loss,
        metrics.train_mean_token_accuracy,
        metrics.full_valid_loss,
        metrics.full_valid_mean_token_accuracy,
    )
    return f"{metrics.step}," + ",".join("" if value is None else f"{value:.6g}" for value in values) + "\n"


def _run_id(spec: TrainingSpec, provenance: export.Provenance) -> str:
    """What must be the same for a checkpoint to be continued."""
    parts = {
        "recipe": spec.recipe.to_json(),
        "context_length": spec.context_length,
        "base": provenance.base_fingerprint,
        "training": provenance.training.sha256,
        "validation": None if provenance.validation is None else provenance.validation.sha256,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _seed_everything(seed: int) -> None:
    """Dropout draws from torch; Python's and NumPy's generators are set for libraries that might."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _memory_guard(what: str, recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own class is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise TrainingFailure(
            "out_of_memory",
            f"Memory ran out in {what}, with conversations of up to {recipe.max_seq_length} tokens. A smaller "
            f"max_seq_length or rank needs less. ({str(error).splitlines()[0] if str(error) else 'MemoryError'})",
        ) from error
