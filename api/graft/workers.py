"""The registry of workers: who is there, with which device, at what.

A worker writes its row at its start and again with every beat of its own heart, by the database's clock; one that was
not seen for three beats counts as gone. Nothing depends on a row being right: a job belongs to whoever holds its lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from graft import __version__
from graft.db import changed, now
from graft.models import Worker

# Beats that may be missed before a worker counts as gone.
MISSED_BEATS = 3


def register(
    session: Session, name: str, *, device: str, device_bytes: int | None, rates: Mapping[str, Any] | None = None
) -> None:
    """A worker has started: its row anew, in the place of one of the same name (in a container all have one pid).

    Args:
        device: for people, such as "NVIDIA H100 80GB HBM3" or "cpu".
        device_bytes: the memory that a job's plan may use there; None takes any job.
        rates: the planner's rates of the card, as measured.
    """
    forget(session, name)
    session.add(
        Worker(
            id=name,
            device=device,
            device_bytes=device_bytes,
            rates=None if rates is None else dict(rates),
            version=__version__,
            started_at=now(),
            seen_at=now(),
        )
    )
    session.flush()


def see(session: Session, name: str, *, base_model: str | None, job_id: str | None) -> bool:
    """The worker is alive; `base_model` is what its engine holds, `job_id` what it runs. False: register first."""
    seen = update(Worker).where(Worker.id == name)
    return changed(session, seen.values(seen_at=now(), base_model=base_model, job_id=job_id)) == 1


def forget(session: Session, name: str) -> None:
    """The worker has left."""
    session.execute(delete(Worker).where(Worker.id == name))


def list_all(session: Session) -> list[Worker]:
    """Every row, by name."""
    return list(session.scalars(select(Worker).order_by(Worker.id)))


def alive(session: Session, heartbeat_seconds: float) -> list[Worker]:
    """Those seen within the last three beats, by name."""
    since = now() - MISSED_BEATS * heartbeat_seconds
    return list(session.scalars(select(Worker).where(Worker.seen_at > since).order_by(Worker.id)))


def sweep(session: Session, older_than_seconds: float) -> int:
    """Forget those that were not seen for so long; how many they were."""
    return changed(session, delete(Worker).where(Worker.seen_at < now() - older_than_seconds))
