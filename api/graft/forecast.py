"""What a job will take on each worker there is: by the audit's numbers, the workers' rates, and what jobs took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from graft import workers
from graft.estimate import REFERENCE, Amount, Device, Estimate, Learnt, estimate
from graft.models import Job
from graft.planner import ModelShape
from graft.recipe import Recipe
from graft.supervision import Facts

# Finished jobs that are looked at for what they took.
MOST_JOBS = 64


def amount_of(facts: Mapping[str, Facts], recipe: Recipe, *, rows: Mapping[str, int] | None = None) -> Amount:
    """What a job trains on and evaluates: of its files' facts, by the field that names the file.

    Args:
        rows: how many rows the files really have, where the facts are of a part of them.
    """
    training, validation = facts["training_file"], facts.get("validation_file")
    whole = Amount(
        rows=training.examples,
        tokens=training.tokens,
        trained_tokens=training.trained_tokens,
        squares=training.squares,
        longest=max(training.longest, 0 if validation is None else validation.longest, 1),
        valid_rows=0 if validation is None else validation.examples,
        valid_tokens=0 if validation is None else validation.tokens,
    )
    if rows is not None:
        valid = 0 if validation is None else _grown(validation, rows["validation_file"])
        whole = whole.scaled(_grown(training, rows["training_file"]), valid)
    if validation is None and recipe.validation_split > 0 and whole.rows > 1:
        # Which rows are held out is drawn; they are taken to be like the others.
        held_out = min(max(1, round(whole.rows * recipe.validation_split)), whole.rows - 1)
        share = held_out / whole.rows
        return Amount(
            rows=whole.rows - held_out,
            tokens=round(whole.tokens * (1 - share)),
            trained_tokens=round(whole.trained_tokens * (1 - share)),
            squares=whole.squares * (1 - share),
            longest=whole.longest,
            valid_rows=held_out,
            valid_tokens=round(whole.tokens * share),
            exact=False,
        )
    return whole


def num_examples(training: Facts, rows: Mapping[str, int] | None = None) -> int:
    """How many examples the training file gives; `rows` as of `amount_of`."""
    return training.examples if rows is None else _grown(training, rows["training_file"])


def _grown(facts: Facts, rows: int) -> int:
    """The examples that so many rows give."""
    return max(1, round(facts.examples * rows / max(facts.rows, 1)))


def devices(session: Session, heartbeat_seconds: float) -> list[Device]:
    """Where a job could run: the workers that are there and have said how fast they are; a reference where none has."""
    found = [
        Device(name=row.device, bytes=row.device_bytes, rates=row.rates, worker=row.id, holds=row.base_model)
        for row in workers.alive(session, heartbeat_seconds)
        if row.rates
    ]
    return found or [REFERENCE]


def learnt_from(session: Session, base_model: str, device: Device) -> Learnt:
    """From the newest jobs that finished on such a device with this base model, in one go."""
    rows = session.execute(
        select(Job.estimate, Job.measured)
        .where(
            Job.base_model == base_model,
            Job.attempt == 1,
            Job.measured.is_not(None),
            Job.estimate.is_not(None),
        )
        .order_by(Job.finished_at.desc())
        .limit(MOST_JOBS)
    )
    pairs = [(e, m) for e, m in rows if e and m and e.get("device") == device.name]
    return Learnt.from_jobs(pairs, on_gpu=device.bytes is not None)


def estimates(
    session: Session, recipe: Recipe, shape: ModelShape, amount: Amount, *, heartbeat_seconds: float
) -> list[Estimate]:
    """One for each device, those that fit first, the fastest of them first.

    Raises:
        ValueError: a target module is not a linear of this model.
    """
    found = [
        estimate(recipe, shape, amount, device, learnt_from(session, recipe.base_model, device))
        for device in devices(session, heartbeat_seconds)
    ]
    return ranked(found)


def ranked(found: Sequence[Estimate]) -> list[Estimate]:
    """Those that fit first, the fastest of them first."""
    return sorted(found, key=lambda each: (not each.fits, each.seconds))
