"""What a job will take, before it runs: steps, seconds, memory, on each worker there is.

The planner's arithmetic does it, with the rates that a worker measured of its device; what finished jobs really took on
the same kind of device corrects it. Seconds count from the claim to the result: startup, training, storing. What a
base model takes to come from the Hub is in none of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from graft import planner
from graft.planner import Budget, Card, ModelShape, PlanRefused, Work
from graft.recipe import Recipe

# Before any job has finished, how far off the arithmetic may be, each way; and after.
COLD_SHARE, LEARNT_SHARE = 0.35, 0.15
# Before any job has finished, what it takes to begin: where the worker holds the base model; where it does not, with a
# second for so many parameters to be read and quantised; and, of a CPU alone, whose engine starts with a job, for that.
WARM_SECONDS, COLD_SECONDS, ENGINE_SECONDS = 1.5, 3.0, 6.0
PARAMETERS_A_SECOND, CPU_PARAMETERS_A_SECOND = 0.55e9, 20e6
# And to store the last checkpoint: bytes a second, hashed and written (into SQLite, on two disks, 50e6 and 100e6), and
# what is none of them. The others are those of a CPU; of a GPU only the loading has been measured (14.6 s for an 8B).
STORED_BYTES_A_SECOND, STORING_SECONDS = 80e6, 0.5
# The kernels of a GPU are built in the first job of a machine, and lie on its disk from then on: so long on a host with
# 16 processors.
BUILD_SECONDS = 26.0
# An evaluation is a forward without anything kept: about so much of a step's time a token. On a GPU nothing of it is
# replayed, so that for few tokens the host's launches of a layer count; and so do a step's words to its owner.
EVALUATION_SHARE = 1 / 3
EVALUATION_LAUNCHES, LOOP_SECONDS = 22, 0.004
# Tokens by which a micro-batch is rounded up, in the mean.
ROUNDED_UP = 32
LEARNT_FROM = 8
# Pinned host memory that a worker is taken to have for what is offloaded.
HOST_BYTES = 64 * planner.GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """The rows that a job trains on and evaluates, in tokens after truncation.

    `squares` is the sum of the squared lengths of the training rows; `exact` is false where a part of a large file
    stands for the whole.
    """

    rows: int
    tokens: int
    trained_tokens: int
    squares: float
    longest: int
    valid_rows: int = 0
    valid_tokens: int = 0
    exact: bool = True

    @classmethod
    def of(cls, lengths: Sequence[int], trained_tokens: int, valid_lengths: Sequence[int] = ()) -> Amount:
        """Of rows that have all been tokenised."""
        return cls(
            rows=len(lengths),
            tokens=sum(lengths),
            trained_tokens=trained_tokens,
            squares=float(sum(length * length for length in lengths)),
            longest=max(*lengths, *valid_lengths, 1),
            valid_rows=len(valid_lengths),
            valid_tokens=sum(valid_lengths),
        )

    def scaled(self, rows: int, valid_rows: int) -> Amount:
        """The same kind of rows, as many as there really are."""
        grown, valid = rows / max(self.rows, 1), valid_rows / max(self.valid_rows, 1)
        return Amount(
            rows=rows,
            tokens=round(self.tokens * grown),
            trained_tokens=round(self.trained_tokens * grown),
            squares=self.squares * grown,
            longest=self.longest,
            valid_rows=valid_rows,
            valid_tokens=round(self.valid_tokens * valid),
            exact=self.exact and rows == self.rows and valid_rows == self.valid_rows,
        )


def work_of(
    recipe: Recipe, amount: Amount, *, micro_batch_tokens: int | None = None, head_chunk_rows: int | None = None
) -> Work:
    """What a step computes, in the planner's words. The last two are what a job's earlier start decided."""
    # Steps differ in their rows: the mean, and a quarter more.
    step = int(1.25 * amount.tokens / amount.rows * recipe.batch_size) + 1
    step = min(step, amount.tokens, recipe.batch_size * amount.longest)
    return Work(
        step_tokens=min(max(amount.longest, step), max(recipe.micro_batch_tokens, amount.longest)),
        longest_document=amount.longest,
        document_tokens=amount.squares / amount.tokens,
        packed=recipe.packing,
        deterministic=recipe.deterministic,
        trained_share=min(1.0, max(amount.trained_tokens / amount.tokens, 1e-3)),
        micro_batch_tokens=micro_batch_tokens,
        head_chunk_rows=head_chunk_rows,
    )


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the run."""
    return recipe.n_epochs * math.ceil(rows / recipe.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where a job could run, as a worker describes it. `bytes` is what a plan may fill, None on a CPU; `rates`
    are FLOP/s of a product, bytes/s of a copy, and of the link to the host or, on a CPU, weights decoded a second; of a
    GPU also "built", 0 where no job has built its kernels yet. `holds` is the base model in its memory."""

    name: str
    bytes: int | None
    rates: Mapping[str, float]
    worker: str | None = None
    holds: str | None = None

    def card(self) -> Card:
        """Its rates, in the planner's form."""
        if self.bytes is None:
            return planner.cpu(self.name, **self.rates)
        return planner.H100.scaled(self.name, **{name: self.rates[name] for name in ("gemm", "copy", "link")})


# What an estimate is made for where no worker has said what it has.
REFERENCE = Device(
    name=planner.H100.name,
    bytes=planner.usable_bytes(planner.allocator_budget(80_000_000_000)),
    rates={"gemm": planner.H100.product, "copy": planner.H100.copy, "link": planner.H100.to_host},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """From jobs that finished on such a device with such a base model, medians over `jobs` of them.

    `startup_seconds` is known for those that found the base model in memory (True), for others, for both or for
    neither; `factor` is how much longer than predicted steps and evaluations took. On a GPU the first job builds
    kernels and fills caches all along, so where there are jobs that found the base model in memory, they alone count.
    """

    startup_seconds: Mapping[bool, float] = field(default_factory=dict)
    storing_seconds: float | None = None
    factor: float = 1.0
    jobs: int = 0

    @classmethod
    def from_jobs(cls, finished: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], *, on_gpu: bool) -> Learnt:
        """Of (estimate, measured) pairs, the newest first, as they stand in the jobs' rows."""
        pairs = [(e, m) for e, m in finished if e.get("raw_seconds") and "storing_seconds" in m][:LEARNT_FROM]
        if not pairs:
            return cls()
        startup = {
            warm: statistics.median(found)
            for warm in (False, True)
            if (found := [m["startup_seconds"] for _, m in pairs if m["was_warm"] is warm])
        }
        usual = [pair for pair in pairs if pair[1]["was_warm"] or not on_gpu] or pairs
        return cls(
            startup_seconds=startup,
            storing_seconds=statistics.median(m["storing_seconds"] for _, m in usual),
            factor=statistics.median(m["training_seconds"] / e["raw_seconds"] for e, m in usual),
            jobs=len(pairs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one job will take on one device. Where it does not fit, `refusal` says what would make it fit.

    `peak_bytes` is the plan's, which takes what there is (on a CPU what the process grows by); `needs_bytes` what the
    job could not do without on a GPU. `parts` of `seconds` are startup, training and storing; `raw_seconds` is what the
    arithmetic alone says of the training, before what finished jobs have taught.
    """

    device: str
    worker: str | None
    fits: bool
    refusal: str | None
    steps: int
    peak_bytes: int
    needs_bytes: int
    seconds: float
    seconds_low: float
    seconds_high: float
    parts: Mapping[str, float]
    raw_seconds: float
    step_seconds: float
    learnt_from_jobs: int

    def to_json(self) -> dict[str, Any]:
        """For the job's row and for the wire."""
        return asdict(self)


def estimate(recipe: Recipe, shape: ModelShape, amount: Amount, device: Device, learnt: Learnt) -> Estimate:
    """What the job takes on the device.

    Raises:
        ValueError: a target module is not a linear of this model.
    """
    steps = total_steps(recipe, amount.rows)
    work, card = work_of(recipe, amount), device.card()
    refusal = None
    if device.bytes is None:
        plan = planner.cpu_plan(recipe, shape, work, card)
    else:
        budget = Budget(device=device.bytes, host=HOST_BYTES)
        try:
            plan = planner.plan_for(recipe, shape, work, budget, card=card)
        except PlanRefused as refused:
            refusal = str(refused)
            plan = planner.plan_for(recipe, shape, work, replace(budget, device=refused.needed), card=card)
    # A plan takes what there is; what it could not do without decides who can run the job.
    adapter = planner.AdapterShape.from_settings(recipe.lora, recipe.optimizer)
    least = planner.least_bytes(
        shape, adapter, work, Budget(device=0, host=HOST_BYTES), quantization=recipe.quantization, card=card
    )
    # A step has the mean number of tokens, not the most.
    mean = amount.tokens / max(1.0, amount.rows / recipe.batch_size)
    seconds_a_token = plan.micro_batch_seconds / plan.micro_batch_tokens
    step_seconds = seconds_a_token * mean + plan.optimizer_seconds
    evaluation = amount.valid_tokens * seconds_a_token * EVALUATION_SHARE
    if device.bytes is not None:
        step_seconds += seconds_a_token * ROUNDED_UP + LOOP_SECONDS
        passes = math.ceil(amount.valid_tokens / plan.micro_batch_tokens)
        evaluation = max(evaluation, passes * shape.layers * EVALUATION_LAUNCHES * card.host_launch)
    raw = steps * step_seconds + (max(recipe.n_evals, 1) + 1) * evaluation
    startup = learnt.startup_seconds.get(device.holds == recipe.base_model)
    parts = {
        "startup": _startup_seconds(recipe, shape, device) if startup is None else startup,
        "training": raw * learnt.factor,
        "storing": _storing_seconds(shape, adapter) if learnt.storing_seconds is None else learnt.storing_seconds,
    }
    seconds = sum(parts.values())
    share = LEARNT_SHARE if learnt.jobs >= 2 else COLD_SHARE
    return Estimate(
        device=device.name,
        worker=device.worker,
        fits=refusal is None,
        refusal=refusal,
        steps=steps,
        peak_bytes=plan.peak_bytes,
        needs_bytes=least,
        seconds=seconds,
        seconds_low=seconds * (1 - share),
        seconds_high=seconds * (1 + share),
        parts=parts,
        raw_seconds=raw,
        step_seconds=step_seconds * learnt.factor,
        learnt_from_jobs=learnt.jobs,
    )


def _startup_seconds(recipe: Recipe, shape: ModelShape, device: Device) -> float:
    """From the claim to the first step, where no job has shown it."""
    if device.holds == recipe.base_model:
        return WARM_SECONDS
    parameters = shape.layers * shape.linear_parameters
    if device.bytes is None:
        return ENGINE_SECONDS + WARM_SECONDS + parameters / CPU_PARAMETERS_A_SECOND
    build = 0.0 if device.rates.get("built", 1.0) else BUILD_SECONDS
    return build + COLD_SECONDS + WARM_SECONDS + parameters / PARAMETERS_A_SECOND


def _storing_seconds(shape: ModelShape, adapter: planner.AdapterShape) -> float:
    """The last checkpoint: its state (weights and optimizer), and the adapter as an archive and as files, which is the
    job's result as well."""
    stored = adapter.parameters(shape) * (4 + adapter.state_bytes + 2 * 4)
    return STORING_SECONDS + stored / STORED_BYTES_A_SECOND
