"""What must hold at the end, read from the database: every accepted job has ended once, with the right bytes."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import func, select

from graft.db import Database
from graft.models import Adapter, AdapterFile, File, Job, JobEvent, Outbox
from graft.storage import DatabaseStorage

from .customer import STEPS, Accepted

ENDINGS = ("The job has successfully completed", "The job failed: ", "Fine-tuning job cancelled")


@dataclass
class Verdict:
    """Job ids by what is wrong with them; `other` are sentences."""

    jobs: int = 0
    lost: set[str] = field(default_factory=set)
    double: set[str] = field(default_factory=set)
    differing: set[str] = field(default_factory=set)
    gaps: set[str] = field(default_factory=set)
    other: list[str] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.double or self.differing or self.gaps or self.other)


def weights_sha256(database: Database, job_id: str) -> str | None:
    """The digest of the weights of a job's final adapter."""
    with database.read() as session:
        return session.scalar(
            select(AdapterFile.sha256)
            .join(Adapter, Adapter.id == AdapterFile.adapter_id)
            .where(Adapter.job_id == job_id, Adapter.is_final, AdapterFile.name == "adapter_model.safetensors")
        )


def judge(
    database: Database,
    accepted: Mapping[str, Accepted],
    expected: Mapping[str, str],
    *,
    may_fail: frozenset[str] = frozenset(),
) -> Verdict:
    """Hold every job against what it was accepted for.

    Args:
        expected: the digest of the weights of each spec's uninterrupted run.
        may_fail: error codes with which a job may have failed, because what was done to it makes that right.
    """
    verdict = Verdict(jobs=len(accepted))
    storage = DatabaseStorage(database)

    def blame(kind: set[str], job_id: str, text: str) -> None:
        kind.add(job_id)
        verdict.told[job_id] = text

    with database.read() as session:
        unknown = set(session.scalars(select(Job.id))) - accepted.keys()
        for job_id in sorted(unknown):
            blame(verdict.double, job_id, "one request made a second job")
        if waiting := session.scalar(select(func.count()).select_from(Outbox)):
            verdict.other.append(f"{waiting} nudges were never sent")
    for job_id, wanted in accepted.items():
        with database.read() as session:
            job = session.get(Job, job_id)
            if job is None:
                blame(verdict.lost, job_id, "it is not in the database")
                continue
            events = session.execute(
                select(JobEvent.seq, JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
            ).all()
            finals = session.scalar(
                select(func.count()).select_from(Adapter).where(Adapter.job_id == job_id, Adapter.is_final)
            )
            result = session.get(File, job.result_file) if job.result_file else None
        endings = [event.message for event in events if event.message.startswith(ENDINGS)]
        if [event.seq for event in events] != list(range(1, job.last_event + 1)):
            blame(verdict.gaps, job_id, f"events {[event.seq for event in events]}, last {job.last_event}")
        if len(endings) > 1 or (finals or 0) > 1:
            blame(verdict.double, job_id, f"{endings}, {finals} adapters")
        if job.status == "succeeded":
            found = weights_sha256(database, job_id)
            if found != expected[wanted.spec]:
                blame(verdict.differing, job_id, f"{wanted.spec}: {found} in place of {expected[wanted.spec]}")
            table = b"" if result is None else b"".join(storage.read(result.sha256))
            steps = [int(row["step"]) for row in csv.DictReader(io.StringIO(table.decode()))]
            if steps != list(range(1, STEPS + 1)):
                blame(verdict.differing, job_id, f"steps of the result file: {steps}")
        elif job.status == "cancelled":
            if not wanted.cancel_sent:
                blame(verdict.lost, job_id, "cancelled, and nobody asked for that")
            elif finals:
                blame(verdict.double, job_id, "cancelled, and yet there is an adapter")
        elif job.status == "failed":
            if job.error_code not in may_fail:
                blame(verdict.lost, job_id, f"failed: {job.error_code}: {job.error_message}")
        else:
            blame(verdict.lost, job_id, f"still {job.status}, attempt {job.attempt}, step {job.step}")
        if not endings and job.status in ("succeeded", "failed", "cancelled"):
            blame(verdict.lost, job_id, f"{job.status}, and no event tells of it")
    return verdict
