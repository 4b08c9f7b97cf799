"""Files: accepting an upload all or nothing, listing, deleting. Every query is bound to one project."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO, cast

from sqlalchemy import Table, Update, and_, insert, or_, select, update
from sqlalchemy.orm import Session, defer

from graft import datasets
from graft.db import Database, Prepared, changed, now
from graft.errors import Conflict, InvalidRequest, NotFound
from graft.ids import new_id
from graft.models import LIVE, File, Job
from graft.paging import Cursor, page
from graft.storage import CHUNK, Storage, Stored

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
RESULTS = "fine-tune-results"

# Codes that say "this is not a dataset at all": such an upload is refused at once. Any other fault belongs to single
# rows; the file is kept with status `error`, so that the report can be read; a job that names it fails with the line.
REFUSED_AT_UPLOAD = {"not_jsonl", "empty_file", "too_many_lines"}

# A training file of up to so many bytes and lines is read before the upload is answered, a larger one soon after, by a
# process of its own.
READ_AT_ONCE = 8 * 1024 * 1024
LINES_AT_ONCE = 50_000
# The beginning of a larger one tells whether it is a dataset at all: room for a line that is too long, or for more
# empty lines than there may be. Of shorter rows less is enough.
BEGINNING = 2 * 1024 * 1024
FIRST_ROWS = 128 * 1024

# That process is tried so often. One that takes nothing of the file and gives no answer for so long hangs.
READ_ATTEMPTS = 3
READ_PATIENCE = 300.0
READ_PAUSE = 1.0  # seconds after the first failure, twice as many after the second

log = logging.getLogger(__name__)


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
        whole = len(head) <= READ_AT_ONCE and head.count(b"\n") <= LINES_AT_ONCE
        found = datasets.examine(io.BytesIO(head if whole else _beginning(head)))
        code = _refusal(found, whole)
        if code is not None:
            raise InvalidRequest(f"{clean_filename(filename)}, {found.summary()}", code=code, param="file")
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

    In a process of its own, so that reading 500 MB does not hold up the answers to everyone else. A file that it cannot
    read to its end, however often, gets the status `error` and is not waited for.

    Raises:
        StorageUnavailable: the content cannot be had at the moment; the file stays as it is.
    """
    with database.read() as session:
        row = session.get_one(File, file_id)
    if row.status != "uploaded" or row.deleted_at is not None:
        return  # another process of the service was quicker
    try:
        answer = _in_a_process([], lambda: storage.read(row.sha256))
        report, summary = answer["report"], answer["summary"]
    except (KeyError, OSError) as error:
        log.exception("a training file cannot be read", extra={"file": file_id})
        found = datasets.unread(row.bytes, _reason(error))
        report, summary = found.to_json(), found.summary()
    status, details, report = _verdict(report, summary)
    with database.write() as session:
        changed(
            session,
            update(File)
            .where(File.id == file_id, File.status == "uploaded", File.deleted_at.is_(None))
            .values(status=status, status_details=details, report=report),
        )


def duplicates_between(storage: Storage, training: File, validation: File) -> tuple[int, list[int]] | None:
    """How many rows of the training file stand in the validation file too, and on which lines (the first of them); None
    if the two cannot be compared. Both are processed. Large ones are compared in a process of its own.

    Raises:
        StorageUnavailable: the content cannot be had at the moment.
    """

    def pieces() -> Iterable[bytes]:
        return chain(storage.read(validation.sha256), storage.read(training.sha256))

    arguments = ["duplicates", str(validation.bytes)]
    try:
        if training.bytes + validation.bytes <= READ_AT_ONCE:
            answer = datasets.main(arguments, io.BytesIO(b"".join(pieces())))
        else:
            answer = _in_a_process(arguments, pieces)
    except (KeyError, OSError, datasets.InvalidRow):
        log.exception("two files cannot be compared", extra={"training": training.id, "validation": validation.id})
        return None
    return answer["count"], answer["lines"]


def _beginning(head: bytes) -> bytes:
    """The first rows of a large file, whole."""
    head = head[:BEGINNING]
    start = len(head) - len(head.lstrip())
    end = max(head.find(b"\n", start), head.rfind(b"\n", start, start + FIRST_ROWS))
    return head if end < 0 else head[: end + 1]


def _refusal(found: datasets.Report, whole: bool) -> str | None:
    """The code with which an upload is refused, if it is: of a whole file, or of the beginning of a larger one."""
    code = found.errors[0].code if found.errors else None
    if code == "line_too_long" and found.rows == 1:  # the only line, or there is no end to it
        return code
    if code == "empty_file" and not whole:  # rows may follow
        return None
    return code if code in REFUSED_AT_UPLOAD else None


def _verdict(report: dict[str, Any], summary: str) -> tuple[str, str | None, dict[str, Any]]:
    return ("error", summary, report) if report["error_count"] else ("processed", None, report)


def _reason(error: Exception) -> str:
    if isinstance(error, ReaderDiedError):
        return f"The file could not be read to its end: {error}."
    return "The stored content of the file is missing or damaged."


class ReaderDiedError(OSError):
    """The process that reads a file ended, or was ended, before it had answered."""


def _in_a_process(arguments: list[str], pieces: Callable[[], Iterable[bytes]]) -> dict[str, Any]:
    """The answer of `graft.datasets`, run as a program over these bytes.

    Raises:
        ReaderDiedError: it died each time.
    """
    attempt = 1
    while True:
        try:
            return _run(arguments, pieces())
        except ReaderDiedError as error:
            if attempt == READ_ATTEMPTS:
                raise
            log.warning("%s; trying again", error)
            time.sleep(attempt * READ_PAUSE)  # what the machine lacked, it may have then
            attempt += 1


def _run(arguments: list[str], pieces: Iterable[bytes]) -> dict[str, Any]:
    # Without -P, a `csv.py` in the folder where the service was started would be taken for Python's own.
    command = [sys.executable, "-P", "-m", "graft.datasets", *arguments]
    pipe = subprocess.PIPE
    try:
        # In a session of its own: Ctrl-C is for the service. When the service ends, the pipe does, and so the process.
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
    except OSError as error:
        raise ReaderDiedError(f"the process that reads it could not be started ({error.strerror})") from error
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has seen enough, or is dead
                for piece in pieces:
                    with _patience(child):
                        child.stdin.write(piece)
            with _patience(child):
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()
                text = child.stdout.read()
                code = child.wait()
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
    if code != 0:
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        raise ReaderDiedError(f"the process that reads it ended with {how}")
    answer: dict[str, Any] = json.loads(text)
    return answer


@contextlib.contextmanager
def _patience(child: subprocess.Popen[bytes]) -> Iterator[None]:
    watchdog = threading.Timer(READ_PATIENCE, child.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


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


def add_results(session: Session, project_id: str, file_id: str, stored: Stored, *, filename: str) -> None:
    """The same for what a job has produced, under an id that its row names already."""
    row = {"id": file_id, "project_id": project_id, "filename": filename, "bytes": stored.size, "sha256": stored.sha256}
    _RESULTS(session, row)


_RESULTS = Prepared(insert(cast(Table, File.__table__)).values(purpose=RESULTS, status="processed", created_at=now()))


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


def require_dataset(session: Session, project_id: str, file_id: str, param: str) -> File:
    """The training file that a request's `param` names.

    Raises:
        InvalidRequest: there is none such in the project, or it is for something else.
    """
    try:
        row = get(session, project_id, file_id)
    except NotFound:
        raise InvalidRequest(
            f"No such file: '{file_id[:64]}'. Upload it with `POST /v1/files` and purpose 'fine-tune'.",
            code="file_not_found",
            param=param,
        ) from None
    if row.purpose != "fine-tune":
        raise InvalidRequest(
            f"The file {row.id} has the purpose '{row.purpose}'; upload it again with purpose 'fine-tune'.",
            code="invalid_file_purpose",
            param=param,
        )
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
