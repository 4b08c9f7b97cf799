"""Files: accepting an upload all or nothing, listing, deleting. Every query is bound to one project."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, BinaryIO

from sqlalchemy import Update, and_, or_, select, update
from sqlalchemy.orm import Session, defer

from graft import datasets
from graft.db import Database, changed, now
from graft.errors import Conflict, InvalidRequest, NotFound
from graft.ids import new_id
from graft.models import LIVE, File, Job
from graft.paging import Cursor, page
from graft.storage import CHUNK, Storage, Stored

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
RESULTS = "fine-tune-results"

# Codes that say "this is not a dataset at all": such an upload is refused at once. Any other fault belongs to single
# rows; the file is kept with status `error`, so that the report can be read; a job that names it fails with the line.
REFUSED_AT_UPLOAD = {"not_jsonl", "empty_file"}

# A training file of up to this many bytes is read before the upload is answered, a larger one soon after.
READ_AT_ONCE = 8 * 1024 * 1024


def accept(
    database: Database,
    storage: Storage,
    project_id: str,
    *,
    file: BinaryIO,
    filename: str,
    purpose: str,
    expires_in: int | None,
) -> File:
    """Check and keep an upload; nothing is listed before the last byte is stored.

    Raises:
        InvalidRequest: unknown purpose, empty file, or a training file that is not JSON lines.
    """
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"The purpose '{purpose[:64]}' is not known; a training file has 'fine-tune'. "
            f"Known: {', '.join(PURPOSES)}.",
            code="invalid_value",
            param="purpose",
        )
    if not file.read(1):
        raise InvalidRequest("The uploaded file is empty.", code="empty_file", param="file")
    file.seek(0)
    status, details, report = "processed", None, None
    if purpose == "fine-tune":
        head = file.read(READ_AT_ONCE + 1)
        file.seek(0)
        whole = len(head) <= READ_AT_ONCE
        # Of a large one only whether it is a dataset at all: its beginning tells that.
        found = datasets.examine(io.BytesIO(head if whole else head[: head.rfind(b"\n") + 1] or head))
        if found.errors and found.errors[0].code in REFUSED_AT_UPLOAD:
            raise InvalidRequest(f"{filename}, {found.summary()}", code=found.errors[0].code, param="file")
        if whole:
            status, details, report = _verdict(found.to_json(), found.summary())
        else:
            status = "uploaded"
    stored = storage.put(iter(lambda: file.read(CHUNK), b""))
    with database.write() as session:
        return create(
            session,
            project_id,
            stored,
            filename=filename,
            purpose=purpose,
            status=status,
            details=details,
            report=report,
            expires_in=expires_in,
        )


def unread(session: Session) -> list[str]:
    """Ids of the training files that have not been read line by line yet, oldest first."""
    return list(session.scalars(select(File.id).where(File.status == "uploaded", _alive()).order_by(File.created_at)))


def read(database: Database, storage: Storage, file_id: str) -> None:
    """Examine an uploaded training file: uploaded -> processed, or -> error with the lines at fault.

    In a process of its own, so that reading 500 MB does not hold up the answers to everyone else.
    """
    with database.read() as session:
        row = session.get_one(File, file_id)
    report, summary = _examined(storage.read(row.sha256))
    status, details, report = _verdict(report, summary)
    with database.write() as session:
        changed(
            session,
            update(File)
            .where(File.id == file_id, File.status == "uploaded", File.deleted_at.is_(None))
            .values(status=status, status_details=details, report=report),
        )


def _verdict(report: dict[str, Any], summary: str) -> tuple[str, str | None, dict[str, Any]]:
    return ("error", summary, report) if report["error_count"] else ("processed", None, report)


def _examined(pieces: Iterable[bytes]) -> tuple[dict[str, Any], str]:
    with subprocess.Popen(
        [sys.executable, "-m", "graft.datasets"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has seen enough
                for piece in pieces:
                    child.stdin.write(piece)
                child.stdin.close()
            answer = json.loads(child.stdout.read())
        finally:
            child.kill()
    return answer["report"], answer["summary"]


def create(
    session: Session,
    project_id: str,
    stored: Stored,
    *,
    filename: str,
    purpose: str,
    status: str = "processed",
    details: str | None = None,
    report: dict[str, Any] | None = None,
    expires_in: int | None = None,
) -> File:
    """The row that makes stored content a file of the project."""
    row = File(
        id=new_id("file-"),
        project_id=project_id,
        purpose=purpose,
        filename=clean_filename(filename),
        bytes=stored.size,
        sha256=stored.sha256,
        status=status,
        status_details=details,
        report=report,
        created_at=now(),
        expires_at=None if expires_in is None else now() + expires_in,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def clean_filename(name: str) -> str:
    """A name that is safe to show and to send back in a header: the last path part, without control characters."""
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[\x00-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "", last).strip()[:255] or "file"


def get(session: Session, project_id: str, file_id: str) -> File:
    """One file of the project. Raises NotFound."""
    row = session.scalar(select(File).where(File.id == file_id, File.project_id == project_id, _alive()))
    if row is None:
        raise NotFound(f"No such file: '{file_id[:64]}'.", code="file_not_found", param="id")
    return row


def list_page(
    session: Session, project_id: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool
) -> tuple[list[File], bool]:
    """One page of the project's files, and whether there are more."""
    # A report can have 1,000 faults, a page 10,000 files.
    query = select(File).where(File.project_id == project_id, _alive()).options(defer(File.report))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    cursor = None if after is None else get_cursor(session, project_id, after)
    return page(session, query, File, cursor=cursor, limit=limit, ascending=ascending)


def get_cursor(session: Session, project_id: str, after: str) -> Cursor:
    """Where the page after this file begins. Raises InvalidRequest."""
    row = session.scalar(select(File).where(File.id == after, File.project_id == project_id))
    if row is None:
        raise InvalidRequest(f"after: no such file: '{after[:64]}'.", code="invalid_cursor", param="after")
    return Cursor(row.created_at, row.id)


def remove(session: Session, project_id: str, file_id: str) -> None:
    """Delete a file; its content goes when nothing else names it.

    Raises:
        NotFound: no such file in the project.
        Conflict: a job that has not ended still needs it.
    """
    row = get(session, project_id, file_id)
    user = session.scalar(
        select(Job.id)
        .where(or_(Job.training_file == row.id, Job.validation_file == row.id), Job.status.in_(LIVE))
        .limit(1)
    )
    if user is not None:
        raise Conflict(
            f"The file is in use by {user}; cancel that job first, or wait for it.", code="file_in_use", param="id"
        )
    changed(session, _empty().where(File.id == row.id))


def remove_expired(session: Session) -> int:
    """Delete the files whose time is over; returns how many."""
    return changed(session, _empty().where(File.expires_at < now()))


def _empty() -> Update:
    """Deleting: nothing of the file is kept but its place in the list."""
    return (
        update(File)
        .where(File.deleted_at.is_(None))
        .values(deleted_at=now(), sha256="", filename="", bytes=0, status_details=None, report=None)
    )


def _alive() -> Any:
    return and_(File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > now()))
