"""Adapters: the rows that make trained weights downloadable, and fine-tuned models by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from sqlalchemy import Table, insert, or_, select
from sqlalchemy.orm import Session

from graft.db import Prepared, now
from graft.errors import NotFound
from graft.ids import new_id
from graft.models import Adapter, AdapterFile
from graft.storage import Stored


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """An adapter that lies in storage: one archive of everything, and each file by itself."""

    archive: Stored
    files: Mapping[str, Stored]


def create(
    session: Session,
    project_id: str,
    job_id: str,
    model: str,
    base_model: str,
    step: int,
    content: AdapterContent,
    *,
    is_final: bool,
    adapter_id: str | None = None,
) -> None:
    """The rows of a stored adapter, in the caller's transaction; without an id it gets a new one."""
    adapter_id = adapter_id or new_id("adapter-")
    row = {
        "id": adapter_id,
        "project_id": project_id,
        "job_id": job_id,
        "model": model,
        "base_model": base_model,
        "step": step,
        "is_final": is_final,
        "archive_sha256": content.archive.sha256,
        "archive_bytes": content.archive.size,
    }
    parts = [
        {"adapter_id": adapter_id, "name": name, "sha256": stored.sha256, "bytes": stored.size}
        for name, stored in content.files.items()
    ]
    _ADAPTER(session, row)
    if parts:
        _FILES(session, parts)


_ADAPTER = Prepared(insert(cast(Table, Adapter.__table__)).values(created_at=now()))
_FILES = Prepared(insert(cast(Table, AdapterFile.__table__)))


def get(session: Session, project_id: str, name: str) -> Adapter:
    """An adapter of the project by its id or by the name of the fine-tuned model. Raises NotFound."""
    row = session.scalar(
        select(Adapter).where(Adapter.project_id == project_id, or_(Adapter.id == name, Adapter.model == name))
    )
    if row is None:
        raise NotFound(f"No such adapter: '{name[:128]}'.", code="adapter_not_found", param="id")
    return row


def files_of(session: Session, adapter: Adapter) -> Sequence[AdapterFile]:
    """The adapter's files by name."""
    return session.scalars(
        select(AdapterFile).where(AdapterFile.adapter_id == adapter.id).order_by(AdapterFile.name)
    ).all()


def fine_tuned_models(session: Session, project_id: str) -> Sequence[Adapter]:
    """The results of the project's jobs, newest first (checkpoints are found through their job)."""
    return session.scalars(
        select(Adapter).where(Adapter.project_id == project_id, Adapter.is_final).order_by(Adapter.created_at.desc())
    ).all()


def delete(session: Session, adapter: Adapter) -> None:
    """Delete the adapter; its content goes when nothing else names it."""
    for row in files_of(session, adapter):
        session.delete(row)
    session.flush()
    session.delete(adapter)
