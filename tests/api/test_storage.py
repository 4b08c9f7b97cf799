"""Content under its address: what goes in comes out, whole or in part, once, or not at all; wherever it is kept."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select, update

from graft import files
from graft.db import Database, now
from graft.models import Blob, BlobChunk
from graft.storage import CHUNK, PART, DatabaseStorage, S3Storage, Storage, Stored, open_storage, pieces_of, save_to

from . import given
from .bucket import Bucket

SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7)


def bytes_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@dataclass
class Place:
    """A store, its settings, and the bytes in it as somebody sees them who does not ask the store."""

    database: Database
    storage: Storage
    url: str | None
    bucket: Bucket | None

    def counts(self) -> tuple[int, int]:
        """Blobs, and the pieces that their bytes lie in: objects and unfinished uploads, or chunks."""
        with self.database.read() as session:
            blobs = session.scalar(select(func.count()).select_from(Blob)) or 0
            chunks = session.scalar(select(func.count()).select_from(BlobChunk)) or 0
        if self.bucket is None:
            return blobs, chunks
        assert chunks == 0
        return blobs, len(self.bucket.keys()) + len(self.bucket.uploads())

    def pieces(self, size: int) -> int:
        """How many pieces that many bytes lie in."""
        return 1 if self.bucket is not None else -(-size // CHUNK)

    def replace(self, content: bytes | None) -> None:
        """Put something else where the bytes of the only blob lie; None: nothing."""
        if self.bucket is not None:
            (key,) = self.bucket.keys()
            if content is None:
                self.bucket.delete(key)
            else:
                self.bucket.put(key, content)
            return
        with self.database.write() as session:
            blob_id = session.scalars(select(Blob.id)).one()
            session.execute(delete(BlobChunk))
            for seq, at in enumerate(range(0, len(content or b""), CHUNK)):
                session.add(BlobChunk(blob_id=blob_id, seq=seq, data=(content or b"")[at : at + CHUNK]))


@pytest.fixture(params=["in the database", "in a bucket"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def place_over(database: Database, kind: str, request: pytest.FixtureRequest) -> Place:
    if kind == "in the database":
        return Place(database, open_storage(None, database), None, None)
    bucket: Bucket = request.getfixturevalue("bucket")
    return Place(database, open_storage(bucket.url(), database), bucket.url(), bucket)


@pytest.fixture
def place(database: Database, kind: str, request: pytest.FixtureRequest) -> Place:
    """A test that takes it runs over both stores, and with both databases."""
    return place_over(database, kind, request)


@pytest.fixture
def sqlite_place(sqlite: Database, kind: str, request: pytest.FixtureRequest) -> Place:
    """For what no database changes."""
    return place_over(sqlite, kind, request)


def read(storage: Storage, stored: Stored) -> bytes:
    return b"".join(storage.read(stored.sha256))


def test_every_size_comes_back_whole_and_in_parts(sqlite_place: Place) -> None:
    storage = sqlite_place.storage
    for size in SIZES:
        content = bytes_of(size)
        stored = storage.put([content])
        assert stored == Stored(hashlib.sha256(content).hexdigest(), size)
        assert read(storage, stored) == content
        edges = {0, 1, CHUNK - 1, CHUNK, CHUNK + 1, size - 1, size, size + 5}
        for start in sorted(edge for edge in edges if 0 <= edge <= size):
            for end in sorted(edge for edge in edges if edge >= start):
                assert b"".join(storage.read(stored.sha256, start, end)) == content[start:end], (size, start, end)


def test_content_comes_back_with_either_database(place: Place) -> None:
    content = bytes_of(2 * CHUNK + 7)
    stored = place.storage.put([content])
    assert read(place.storage, stored) == content
    assert b"".join(place.storage.read(stored.sha256, 5, CHUNK + 5)) == content[5 : CHUNK + 5]


def test_how_the_bytes_are_cut_on_the_way_in_does_not_matter(sqlite_place: Place) -> None:
    content = bytes_of(2 * CHUNK + 7)
    for cut in (1000, CHUNK // 2 + 1, CHUNK, 3 * CHUNK):
        pieces = [content[at : at + cut] for at in range(0, len(content), cut)]
        assert sqlite_place.storage.put([b"", *pieces, b""]).sha256 == hashlib.sha256(content).hexdigest()
    assert sqlite_place.counts() == (1, sqlite_place.pieces(len(content)))


def test_the_same_content_is_kept_once(place: Place) -> None:
    assert place.storage.put([b"same"]) == place.storage.put([b"sa", b"me"])
    assert place.counts() == (1, 1)


def test_a_file_that_is_here_already_is_not_written_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"w" * (CHUNK + 1))
    first = place.storage.put(pieces_of(file))
    monkeypatch.setattr(place.storage, "_write", lambda *_: pytest.fail("written again"))
    assert place.storage.put(pieces_of(file)) == first


def test_the_same_content_from_many_sides_is_kept_once(place: Place) -> None:
    start = threading.Barrier(6)

    def put(_: int) -> Stored:
        def pieces() -> Iterator[bytes]:
            yield bytes_of(CHUNK)
            start.wait()  # all end at the same moment
            yield b"end"

        return place.storage.put(pieces())

    with ThreadPoolExecutor(6) as pool:
        (stored,) = set(pool.map(put, range(6)))
    assert place.counts() == (1, place.pieces(stored.size))
    assert read(place.storage, stored) == bytes_of(CHUNK) + b"end"


PUT = """
import sys
from graft.db import Database
from graft.storage import open_storage

database_url, storage_url, size = sys.argv[1:]
storage = open_storage(storage_url or None, Database(database_url))

def pieces():
    whole = (bytes(range(251)) * (int(size) // 251 + 1))[:int(size)]
    for at in range(0, len(whole), 1024 * 1024):
        yield whole[at : at + 1024 * 1024]
    print("ready", flush=True)
    sys.stdin.readline()
    yield b"end"

print(storage.put(pieces()).sha256)
"""


def putting(place: Place, size: int) -> subprocess.Popen[str]:
    """A process of its own that puts some bytes, and waits for a line before the last of them."""
    arguments = [place.database.url.render_as_string(hide_password=False), place.url or "", str(size)]
    process = subprocess.Popen(
        [sys.executable, "-c", PUT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_that_put_the_same_at_once_both_find_it(place: Place) -> None:
    processes = [putting(place, CHUNK + 1) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    expected = bytes_of(CHUNK + 1) + b"end"
    for process in processes:
        answer, _ = process.communicate(timeout=60)
        assert (process.returncode, answer.strip()) == (0, hashlib.sha256(expected).hexdigest())
    assert place.counts() == (1, place.pieces(len(expected)))
    assert b"".join(place.storage.read(hashlib.sha256(expected).hexdigest())) == expected


def test_an_upload_whose_process_was_killed_is_never_seen_and_is_swept(sqlite_place: Place) -> None:
    place = sqlite_place
    process = putting(place, 2 * PART)  # in a bucket: one part has been sent
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for sent in (bytes_of(2 * PART), bytes_of(PART), bytes_of(2 * PART) + b"end"):
        with pytest.raises(KeyError):
            place.storage.read(hashlib.sha256(sent).hexdigest())
    assert place.counts()[0] == 1
    assert place.counts()[1] > 0
    assert place.storage.sweep(100) == 0  # it might be a slow one
    assert place.storage.sweep(-1) == 1
    assert place.counts() == (0, 0)


def test_an_upload_that_fails_leaves_nothing(place: Place) -> None:
    def broken(size: int) -> Iterator[bytes]:
        yield bytes_of(size)
        assert place.counts()[0] == 1
        raise ConnectionResetError("the caller went away")

    for size in (1, 2 * CHUNK, 2 * PART):
        with pytest.raises(ConnectionResetError, match="the caller went away"):
            place.storage.put(broken(size))
        assert place.counts() == (0, 0)


def test_an_upload_that_was_swept_meanwhile_is_an_error(sqlite_place: Place) -> None:
    def slow() -> Iterator[bytes]:
        yield bytes_of(10)
        assert sqlite_place.storage.sweep(-1) == 1

    with pytest.raises(OSError, match="took so long"):
        sqlite_place.storage.put(slow())
    assert sqlite_place.counts() == (0, 0)


def test_content_that_is_not_here_is_missed_at_once(sqlite_place: Place) -> None:
    with pytest.raises(KeyError):
        sqlite_place.storage.read("0" * 64)


def test_content_that_lost_bytes_is_an_error_and_no_endless_loop(sqlite_place: Place, tmp_path: Path) -> None:
    storage = sqlite_place.storage
    stored = storage.put([bytes_of(CHUNK + 10)])
    for left in (bytes_of(CHUNK + 5), bytes_of(CHUNK), bytes_of(5), None):
        sqlite_place.replace(left)
        with pytest.raises((KeyError, OSError)):
            read(storage, stored)
        with pytest.raises((KeyError, OSError)):
            b"".join(storage.read(stored.sha256, CHUNK - 1, CHUNK + 10))
        with pytest.raises((KeyError, OSError)):
            save_to(storage, stored.sha256, tmp_path / "copy")


def test_who_reads_damaged_content_whole_never_gets_all_of_it(sqlite_place: Place, tmp_path: Path) -> None:
    content = bytes_of(5 * CHUNK)
    stored = sqlite_place.storage.put([content])
    for at in (0, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[at] ^= 1
        sqlite_place.replace(bytes(damaged))
        got = 0
        with pytest.raises(OSError, match="reads back as"):  # noqa: PT012 - all but the end of it may pass
            for piece in sqlite_place.storage.read(stored.sha256):
                got += len(piece)
        assert got < stored.size
        with pytest.raises(OSError, match="reads back as"):
            save_to(sqlite_place.storage, stored.sha256, tmp_path / "copy")


def test_content_whose_bytes_are_gone_comes_back_with_the_next_upload(place: Place) -> None:
    stored = place.storage.put([b"once more"])
    place.replace(None)
    with pytest.raises(KeyError):
        read(place.storage, stored)
    assert place.storage.put([b"once more"]) == stored
    assert read(place.storage, stored) == b"once more"
    assert place.storage.sweep(-1) == 2  # the row of the bytes that are gone, too
    assert place.counts() == (0, 0)


def test_a_file_goes_in_and_comes_out(sqlite_place: Place, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes_of(CHUNK + 10))
    stored = sqlite_place.storage.put(pieces_of(tmp_path / "in"))
    save_to(sqlite_place.storage, stored.sha256, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes_of(CHUNK + 10)


def test_a_sweep_takes_only_what_nobody_names_and_is_old(place: Place) -> None:
    storage, database = place.storage, place.database
    held = given.running_job(database)  # its training file is named
    assert given.add_checkpoint(database, held, 1)  # so are an adapter, its files and a training state
    assert given.succeed(database, held)  # which gives the state up, and names a result
    named = storage.put([b"named, and in this store"])
    with database.write() as session:
        files.create(session, held.project_id, named, filename="f", purpose="batch")
    unnamed = storage.put([b"old and unnamed"])
    young = storage.put([b"young and unnamed"])
    again = storage.put([b"old, but sent again just now"])
    with database.write() as session:
        session.add(Blob(sha256=None, size=0, touched_at=now()))  # an upload that is still being written
        session.flush()
        session.execute(update(Blob).where(Blob.sha256.is_not(None)).values(touched_at=now() - 1000))
        session.execute(update(Blob).where(Blob.sha256 == young.sha256).values(touched_at=now() - 10))
    storage.put([b"old, but sent again just now"])
    before = blobs(database)
    assert storage.sweep(100) == 2  # the unnamed one and the training state
    assert blobs(database) == before - 2
    for kept in (named, young, again):
        assert read(storage, kept)
    if place.bucket is not None:
        assert len(place.bucket.keys()) == 3
    with pytest.raises(KeyError):
        storage.read(unnamed.sha256)
    with database.read() as session:
        training = files.get(session, held.project_id, held.training_file)
    assert b"".join(storage.read(training.sha256)) == given.jsonl()
    assert storage.sweep(100) == 0


def blobs(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Blob)) or 0


def test_a_half_written_upload_is_swept_when_it_is_old(sqlite_place: Place) -> None:
    with sqlite_place.database.write() as session:
        blob = Blob(sha256=None, size=0, touched_at=now() - 1000)
        session.add(blob)
        session.flush()
        session.add(BlobChunk(blob_id=blob.id, seq=0, data=b"half"))
    assert sqlite_place.storage.sweep(100) == 1
    assert sqlite_place.counts() == (0, 0)


def test_expired_files_go_and_their_content_after_them(sqlite_place: Place) -> None:
    storage, database = sqlite_place.storage, sqlite_place.database
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


def test_what_was_put_at_the_moment_of_a_sweep_is_there(place: Place) -> None:
    stored = place.storage.put([b"old and unnamed"])
    with ThreadPoolExecutor(2) as pool:
        for _ in range(25):
            with place.database.write() as session:
                session.execute(update(Blob).values(touched_at=now() - 1000))
            sweeping = pool.submit(place.storage.sweep, 100)
            assert pool.submit(place.storage.put, [b"old and unnamed"]).result() == stored
            sweeping.result()
            assert read(place.storage, stored) == b"old and unnamed"
    place.storage.sweep(-1)
    assert place.counts() == (0, 0)


# -- from one store to the other ----------------------------------------------------------------------------------


def test_what_lay_in_the_database_is_read_and_swept_after_a_bucket_was_set(database: Database, bucket: Bucket) -> None:
    content = bytes_of(2 * CHUNK + 7)
    stored = DatabaseStorage(database).put([content])
    storage = open_storage(bucket.url(), database)
    assert isinstance(storage, S3Storage)
    assert read(storage, stored) == content
    assert b"".join(storage.read(stored.sha256, 3, CHUNK + 3)) == content[3 : CHUNK + 3]
    assert storage.put([content]) == stored
    assert bucket.keys() == []  # it is there already
    assert storage.sweep(-1) == 1
    assert blobs(database) == 0


def test_what_lies_in_a_bucket_is_missed_without_it_and_comes_back_with_the_next_upload(
    database: Database, bucket: Bucket
) -> None:
    stored = open_storage(bucket.url(), database).put([b"in the bucket"])
    storage = DatabaseStorage(database)
    with pytest.raises(KeyError):
        storage.read(stored.sha256)
    assert storage.put([b"in the bucket"]) == stored
    assert read(storage, stored) == b"in the bucket"
    assert read(open_storage(bucket.url(), database), stored) == b"in the bucket"


def test_two_installations_in_one_bucket_do_not_touch_each_other(
    sqlite: Database, bucket: Bucket, tmp_path: Path
) -> None:
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    other.migrate()
    ours, theirs = (open_storage(bucket.url(), each) for each in (sqlite, other))
    stored = [ours.put([b"same"]), theirs.put([b"same"]), theirs.put([b"their own"])]
    assert len(bucket.keys()) == 3
    assert ours.sweep(-1) == 1
    assert [read(theirs, each) for each in stored[1:]] == [b"same", b"their own"]
    other.dispose()
