"""Content under its address: what goes in comes out, whole or in part, once, or not at all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from graft import files
from graft.db import Database, now
from graft.models import Blob, BlobChunk
from graft.storage import CHUNK, DatabaseStorage, pieces_of, save_to

from . import given

SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7)


def bytes_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def counts(database: Database) -> tuple[int, int]:
    with database.read() as session:
        blobs = session.scalar(select(func.count()).select_from(Blob))
        chunks = session.scalar(select(func.count()).select_from(BlobChunk))
    return blobs or 0, chunks or 0


def test_every_size_comes_back_whole_and_in_parts(database: Database) -> None:
    storage = DatabaseStorage(database)
    for size in SIZES:
        content = bytes_of(size)
        stored = storage.put([content])
        assert stored.sha256 == hashlib.sha256(content).hexdigest()
        assert stored.size == size
        assert b"".join(storage.read(stored.sha256)) == content
        edges = {0, 1, CHUNK - 1, CHUNK, CHUNK + 1, size - 1, size, size + 5}
        for start in sorted(edge for edge in edges if 0 <= edge <= size):
            for end in sorted(edge for edge in edges if edge >= start):
                assert b"".join(storage.read(stored.sha256, start, end)) == content[start:end], (size, start, end)


def test_how_the_bytes_are_cut_on_the_way_in_does_not_matter(sqlite: Database) -> None:
    storage = DatabaseStorage(sqlite)
    content = bytes_of(2 * CHUNK + 7)
    for cut in (1000, CHUNK // 2 + 1, CHUNK, 3 * CHUNK):
        pieces = [content[at : at + cut] for at in range(0, len(content), cut)]
        assert storage.put([b"", *pieces, b""]).sha256 == hashlib.sha256(content).hexdigest()
    assert counts(sqlite) == (1, 3)


def test_the_same_content_is_kept_once(database: Database) -> None:
    storage = DatabaseStorage(database)
    assert storage.put([b"same"]) == storage.put([b"sa", b"me"])
    assert counts(database) == (1, 1)


def test_the_same_content_from_many_sides_is_kept_once(database: Database) -> None:
    storage = DatabaseStorage(database)
    start = threading.Barrier(6)

    def put(_: int) -> str:
        def pieces() -> Iterator[bytes]:
            yield bytes_of(CHUNK)
            start.wait()  # all end at the same moment
            yield b"end"

        return storage.put(pieces()).sha256

    with ThreadPoolExecutor(6) as pool:
        addresses = set(pool.map(put, range(6)))
    assert len(addresses) == 1
    assert counts(database) == (1, 2)
    assert b"".join(storage.read(addresses.pop())) == bytes_of(CHUNK) + b"end"


def test_an_upload_that_fails_leaves_nothing(database: Database) -> None:
    storage = DatabaseStorage(database)

    def broken() -> Iterator[bytes]:
        yield bytes_of(2 * CHUNK)
        assert counts(database)[0] == 1
        raise ConnectionResetError("the caller went away")

    with pytest.raises(ConnectionResetError):
        storage.put(broken())
    assert counts(database) == (0, 0)


def test_content_that_is_not_here_is_missed_at_once(sqlite: Database) -> None:
    with pytest.raises(KeyError):
        DatabaseStorage(sqlite).read("0" * 64)


def test_content_that_lost_bytes_is_an_error_and_no_endless_loop(sqlite: Database, tmp_path: Path) -> None:
    storage = DatabaseStorage(sqlite)
    stored = storage.put([bytes_of(CHUNK + 10)])
    with sqlite.write() as session:
        session.execute(update(BlobChunk).where(BlobChunk.seq == 1).values(data=b"short"))
    with pytest.raises(KeyError):
        b"".join(storage.read(stored.sha256))
    with sqlite.write() as session:
        session.execute(update(BlobChunk).where(BlobChunk.seq == 1).values(data=b"x" * 10))
    with pytest.raises(OSError, match="reads back as"):
        save_to(storage, stored.sha256, tmp_path / "copy")


def test_a_file_goes_in_and_comes_out(sqlite: Database, tmp_path: Path) -> None:
    storage = DatabaseStorage(sqlite)
    (tmp_path / "in").write_bytes(bytes_of(CHUNK + 10))
    stored = storage.put(pieces_of(tmp_path / "in"))
    save_to(storage, stored.sha256, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes_of(CHUNK + 10)


def test_a_sweep_takes_only_what_nobody_names_and_is_old(database: Database) -> None:
    storage = DatabaseStorage(database)
    held = given.running_job(database)  # its training file is named
    assert given.add_checkpoint(database, held, 1)  # so are an adapter, its files and a training state
    assert given.succeed(database, held)  # which gives the state up, and names a result
    unnamed = storage.put([b"old and unnamed"])
    young = storage.put([b"young and unnamed"])
    again = storage.put([b"old, but sent again just now"])
    with database.write() as session:
        session.add(Blob(sha256=None, size=0, touched_at=now()))  # an upload that is still being written
        session.flush()
        session.execute(update(Blob).where(Blob.sha256.is_not(None)).values(touched_at=now() - 1000))
        session.execute(update(Blob).where(Blob.sha256 == young.sha256).values(touched_at=now() - 10))
    storage.put([b"old, but sent again just now"])
    before = counts(database)[0]
    assert storage.sweep(100) == 2  # the unnamed one and the training state
    assert counts(database)[0] == before - 2
    for kept in (young, again):
        assert b"".join(storage.read(kept.sha256))
    with pytest.raises(KeyError):
        storage.read(unnamed.sha256)
    with database.read() as session:
        training = files.get(session, held.project_id, held.training_file)
    assert b"".join(storage.read(training.sha256)) == given.jsonl()
    assert storage.sweep(100) == 0


def test_a_half_written_upload_is_swept_when_it_is_old(sqlite: Database) -> None:
    with sqlite.write() as session:
        blob = Blob(sha256=None, size=0, touched_at=now() - 1000)
        session.add(blob)
        session.flush()
        session.add(BlobChunk(blob_id=blob.id, seq=0, data=b"half"))
    assert DatabaseStorage(sqlite).sweep(100) == 1
    assert counts(sqlite) == (0, 0)


def test_expired_files_go_and_their_content_after_them(database: Database) -> None:
    storage = DatabaseStorage(database)
    for name, seconds in (("gone", -1), ("stays", 3600), ("for ever", None)):
        stored = storage.put([name.encode()])
        with database.write() as session:
            files.create(session, given.CALLER.project_id, stored, filename=name, purpose="batch", expires_in=seconds)
    with database.read() as session:
        page, _ = files.list_page(session, given.CALLER.project_id, purpose=None, after=None, limit=10, ascending=True)
        assert [file.filename for file in page] == ["stays", "for ever"]  # also before anything was removed
    with database.write() as session:
        assert files.remove_expired(session) == 1
        assert files.remove_expired(session) == 0
        session.execute(update(Blob).values(touched_at=now() - 1000))
    assert storage.sweep(100) == 1
    with pytest.raises(KeyError):
        storage.read(hashlib.sha256(b"gone").hexdigest())
