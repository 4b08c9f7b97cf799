"""Where content lives: datasets, adapters and training states, each under the SHA-256 of its bytes.

`put` streams in, `read` streams out, with ranges. Content that nobody names any more is removed by `sweep`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import ColumnElement, and_, delete, exists, select, update
from sqlalchemy.exc import IntegrityError

from graft.db import Database, changed, now
from graft.models import Adapter, AdapterFile, Blob, BlobChunk, Checkpoint, File

CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """What `put` gave back: the address and the number of bytes."""

    sha256: str
    size: int


class Storage(Protocol):
    """What every store can do."""

    def put(self, pieces: Iterable[bytes]) -> Stored:
        """Keep the joined pieces; all of them or nothing becomes readable."""
        ...

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in pieces. Raises KeyError if the content is not here."""
        ...

    def sweep(self, older_than: float) -> int:
        """Remove what no row names and nobody touched for `older_than` seconds; returns how many."""
        ...


class DatabaseStorage:
    """Content in the database itself, so that API and workers need to share nothing else."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def put(self, pieces: Iterable[bytes]) -> Stored:
        digest = hashlib.sha256()
        size = 0
        with self._db.write() as session:
            blob = Blob(sha256=None, size=0, touched_at=now())
            session.add(blob)
            session.flush()
            blob_id = blob.id
        try:
            # One short transaction a chunk: a long upload never holds the database.
            for seq, data in enumerate(_in_chunks(pieces)):
                digest.update(data)
                size += len(data)
                with self._db.write() as session:
                    session.add(BlobChunk(blob_id=blob_id, seq=seq, data=data))
            stored = Stored(digest.hexdigest(), size)
            if not self._publish(blob_id, stored):
                self._drop(blob_id)
        except BaseException:
            self._drop(blob_id)
            raise
        return stored

    def _publish(self, blob_id: int, stored: Stored) -> bool:
        """Give the chunks their address; False if the same content is already here (and now freshly touched)."""
        try:
            with self._db.write() as session:
                known = changed(session, update(Blob).where(Blob.sha256 == stored.sha256).values(touched_at=now()))
                if known == 0:
                    session.execute(
                        update(Blob)
                        .where(Blob.id == blob_id)
                        .values(sha256=stored.sha256, size=stored.size, touched_at=now())
                    )
                return known == 0
        except IntegrityError:  # two uploads of the same bytes ended together; the other one won
            return False

    def _drop(self, blob_id: int) -> None:
        with self._db.write() as session:
            session.execute(delete(BlobChunk).where(BlobChunk.blob_id == blob_id))
            session.execute(delete(Blob).where(Blob.id == blob_id))

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with self._db.read() as session:
            row = session.execute(select(Blob.id, Blob.size).where(Blob.sha256 == sha256)).one_or_none()
        if row is None:
            raise KeyError(sha256)
        stop = row.size if end is None else min(end, row.size)
        return self._pieces(row.id, start, stop)

    def _pieces(self, blob_id: int, start: int, stop: int) -> Iterator[bytes]:
        position = start
        while position < stop:
            seq, offset = divmod(position, CHUNK)
            # A session a chunk: a slow reader holds no connection.
            with self._db.read() as session:
                data = session.scalar(select(BlobChunk.data).where(BlobChunk.blob_id == blob_id, BlobChunk.seq == seq))
            if data is None or len(data) <= offset:
                raise KeyError(f"chunk {seq} of blob {blob_id}")
            piece = data[offset : offset + stop - position]
            position += len(piece)
            yield piece

    def sweep(self, older_than: float) -> int:
        with self._db.write() as session:
            # Locked: an upload of the same bytes either touched the row before, or finds it gone and keeps its own.
            stale = session.scalars(
                select(Blob.id)
                .where(Blob.touched_at < now() - older_than, _is_unnamed())
                .limit(100)
                .with_for_update(skip_locked=True)
            ).all()
            session.execute(delete(BlobChunk).where(BlobChunk.blob_id.in_(stale)))
            session.execute(delete(Blob).where(Blob.id.in_(stale)))
        return len(stale)


def _is_unnamed() -> ColumnElement[bool]:
    """No row refers to the blob; the half-written one, which has no address yet, is unnamed too."""
    names = (File.sha256, AdapterFile.sha256, Adapter.archive_sha256, Checkpoint.state_sha256)
    return and_(*(~exists().where(column == Blob.sha256) for column in names))


def save_to(storage: Storage, sha256: str, path: Path) -> None:
    """Write the content to a file and check on the way that it is what its name says.

    Raises:
        KeyError: the content is not in the store.
        OSError: the bytes do not match their address.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in storage.read(sha256):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != sha256:
        raise OSError(f"stored content {sha256} reads back as {digest.hexdigest()}")


def pieces_of(path: Path) -> Iterator[bytes]:
    """A file's bytes in pieces, for `put`."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def _in_chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of exactly CHUNK, the last one shorter."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= CHUNK:
            yield bytes(held[:CHUNK])
            del held[:CHUNK]
    if held:
        yield bytes(held)
