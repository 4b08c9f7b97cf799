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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from graft.planner import Plan
from graft.recipe import EarlyStopping, Recipe
from graft.supervision import Limits, remarks
from graft.tokens import TokenCache
from graft_kernels.adamw import AdamW
from graft_worker import checkpoint, export, lora, planning
from graft_worker.base_model import BaseModel
from graft_worker.batches import Batching, MicroBatch, epoch_order, pack, rows_of_step
from graft_worker.checkpoint import Progress
from graft_worker.data import EncodedDataset, Row, Rows, encode_file, longest_first, split_rows
from graft_worker.decoder import Decoder, UnsupportedModel
from graft_worker.failures import TrainingFailure
from graft_worker.spec import TrainingSpec
from graft_worker.transformers_network import TransformersNetwork

CHECKPOINTS_WITHOUT_EVALUATIONS = 10
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
    """`path` is the folder to resume from, complete in itself; `adapter_dir` is the adapter inside it."""

    step: int
    path: str
    adapter_dir: str
    metrics: dict[str, Any]
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """The run ended at the caller's wish; the checkpoint of `step` has been announced before this."""

    step: int
    reason: str
    kind: Literal["stopped"] = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The adapter is in `adapter_dir`: the last weights, or the best ones where early stopping watched for them."""

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
    kind: Literal["finished"] = "finished"


Event = Log | DataReady | StepMetrics | CheckpointSaved | Stopped | Finished


# The loop -------------------------------------------------------------------------------------------------------------


def train(spec: TrainingSpec, base: BaseModel, should_stop: Callable[[], str | None]) -> Iterator[Event]:
    """Train one adapter on a warm base model, and leave the base as it was.

    `should_stop` is asked before the first step and after every one; a reason ends the run with a checkpoint. The last
    event is `Stopped` or `Finished`.

    Raises:
        TrainingFailure: the job cannot go on; nothing else is raised for anything a user or a machine can cause.
    """
    recipe, model, device = spec.recipe, base.model, base.device
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
                message=f"This model is trained through transformers, slower and with padded rows: {reason}.",
            )
        for share in planning.BUDGET_SHARES:
            batching, plan = _plan(base, recipe, network, lengths, rows, progress, share)
            if plan is None:
                break
            yield Log(level="info", message=f"The plan: {plan.summary()}.", data={"plan": plan.to_json()})
            try:
                with _memory_guard("the rehearsal of the largest micro-batch", recipe):
                    _rehearse(network, batching, longest_first(rows, valid_rows), min(lengths), device)
                progress.head_chunk_rows = plan.head_chunk_rows
                break
            except TrainingFailure as failure:
                if share == planning.BUDGET_SHARES[-1]:
                    raise
                yield Log(
                    level="warn", message=f"It did not fit after all, and a smaller one is made. {failure.message}"
                )
        progress.batching = dataclasses.asdict(batching)

        def save_checkpoint() -> CheckpointSaved:
            folder = spec.work_dir / "checkpoints" / f"step-{progress.step:08d}"
            checkpoint.save(
                folder,
                run_id=run_id,
                progress=progress,
                optimizer=optimizer,
                device=device,
                write_adapter=lambda path: export.write_adapter_folder(
                    path, adapter, provenance, step=progress.step, metrics=progress.last
                ),
                best_adapter=best_adapter,
                result_csv=result_csv.read_text(encoding="utf-8"),
            )
            return CheckpointSaved(
                step=progress.step,
                path=str(folder),
                adapter_dir=str(folder / checkpoint.ADAPTER_FOLDER),
                metrics=progress.last,
            )

        if valid_rows and progress.initial_valid_loss is None:
            with _memory_guard("the evaluation before training", recipe):
                before = evaluate(network, valid_rows, batching, base)
            progress.initial_valid_loss = before.loss
            yield Log(
                level="info",
                message=f"Validation loss before training: {before.loss:.4f}.",
                data={"step": 0, "full_valid_loss": before.loss, "full_valid_mean_token_accuracy": before.accuracy},
            )
        if progress.step < total_steps and not progress.stopped_early and (reason := should_stop()):
            yield save_checkpoint()
            yield Stopped(step=progress.step, reason=reason)
            return

        # Steps
        order_epoch, order = -1, list[int]()
        while progress.step < total_steps and not progress.stopped_early:
            started = time.monotonic()
            epoch, step_in_epoch = divmod(progress.step, steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(len(rows), recipe.seed, epoch)
            step_rows = rows_of_step(rows, order, step_in_epoch, recipe.batch_size)
            num_trained = sum(row.num_trained for row in step_rows)
            learning_rate = learning_rate_at(progress.step, total_steps, recipe)
            step = progress.step + 1

            with _memory_guard(f"step {step}", recipe):
                network.clear_gradients()
                totals = torch.zeros(2, dtype=torch.float64, device=device)
                for batch in batching.micro_batches(step_rows, pad_token_id(base)):
                    totals += torch.stack([part.double() for part in network.accumulate(batch.to(device), num_trained)])
                norm = optimizer.grad_norm()
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
            seconds = time.monotonic() - started

            valid_loss = valid_accuracy = None
            if step in eval_steps and valid_rows:
                with _memory_guard(f"the evaluation at step {step}", recipe):
                    found = evaluate(network, valid_rows, batching, base)
                valid_loss, valid_accuracy = found.loss, found.accuracy
            metrics = StepMetrics(
                step=step,
                total_steps=total_steps,
                epoch=step / steps_per_epoch,
                train_loss=loss_total / num_trained,
                train_mean_token_accuracy=correct_total / num_trained,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                trained_tokens=num_trained,
                tokens=sum(len(row.input_ids) for row in step_rows),
                seconds=seconds,
                valid_loss=valid_loss,
                valid_mean_token_accuracy=valid_accuracy,
                full_valid_loss=valid_loss,
                full_valid_mean_token_accuracy=valid_accuracy,
            )
            progress.step = step
            progress.trained_tokens += num_trained
            progress.seconds += time.monotonic() - started
            progress.last = _summary(metrics)
            if valid_loss is not None and _note_evaluation(progress, recipe.early_stopping):
                best_adapter = adapter.state_dict()
            with result_csv.open("a", encoding="utf-8") as file:
                file.write(_csv_line(metrics))
            yield metrics

            if step in save_steps:
                yield save_checkpoint()
            if step < total_steps and not progress.stopped_early and (reason := should_stop()):
                if step not in save_steps:
                    yield save_checkpoint()
                yield Stopped(step=step, reason=reason)
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
        )
    finally:
        lora.detach(model)
        if network is not None:
            network.close()


# The mathematics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean cross-entropy per trained token, in nats, and the share of them guessed."""

    loss: float
    accuracy: float


def evaluate(network: Network, rows: Sequence[Row], batching: Batching, base: BaseModel) -> Evaluation:
    """Over all of `rows`, without dropout. Draws no random number, so evaluating does not change the training."""
    totals = torch.zeros(2, dtype=torch.float64, device=base.device)
    for batch in batching.micro_batches(rows, pad_token_id(base)):
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
        decoder = Decoder(base.model, max_positions=longest)
    except UnsupportedModel as unsupported:
        return TransformersNetwork(base.model, parameters, recompute=recipe.gradient_checkpointing), str(unsupported)
    decoder.attach_gradients()
    return decoder, None


def _plan(
    base: BaseModel,
    recipe: Recipe,
    network: Network,
    lengths: list[int],
    rows: Rows,
    progress: Progress,
    share: float,
) -> tuple[Batching, Plan | None]:
    """How steps are cut, as it was stored or decided now; and what is kept, where there is a GPU to plan for."""
    mode: Literal["packed", "padded"] = "packed" if recipe.packing and isinstance(network, Decoder) else "padded"
    stored = Batching(**progress.batching) if progress.batching else None
    if not isinstance(network, Decoder) or base.device.type != "cuda":
        if isinstance(network, Decoder):
            network.head_chunk_rows = progress.head_chunk_rows
            planning.follow_without_plan(network, recipe)
        return stored or planning.default_batching(recipe, lengths, mode), None
    work = planning.work_of(recipe, rows.lengths, max(lengths), rows.num_trained, stored, progress.head_chunk_rows)
    plan = planning.make_plan(base, recipe, work, share)
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
    network.accumulate(batch.to(device), 1.0)
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
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU's allocator and cuBLAS have no exception class of their own for it.
        known = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
        if type(error) is RuntimeError and not any(words in str(error) for words in known):
            raise
        raise TrainingFailure(
            "out_of_memory",
            f"Memory ran out in {what}, with conversations of up to {recipe.max_seq_length} tokens. A smaller "
            f"max_seq_length or rank needs less. ({str(error).splitlines()[0] if str(error) else 'MemoryError'})",
        ) from error
