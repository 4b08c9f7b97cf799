"""What only a bucket can do to us: large objects in parts, broken connections, wrong settings, secrets."""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from graft.db import Database
from graft.errors import ConfigurationError
from graft.storage import (
    CHUNK,
    PART,
    WINDOW,
    PatientStorage,
    S3Storage,
    Storage,
    StorageUnavailable,
    open_storage,
    pieces_of,
    remade,
)

from .bucket import KEY_ID, SECRET, Bucket, Gate, S3Server


@pytest.fixture
def gate(s3_server: S3Server) -> Iterator[Gate]:
    opened = Gate(s3_server.port)
    yield opened
    opened.shut()


@pytest.fixture
def gated(sqlite: Database, bucket: Bucket, gate: Gate) -> Storage:
    """A store whose every connection goes through the gate."""
    return open_storage(bucket.url(gate.port), sqlite)


def pieces(size: int) -> Iterator[bytes]:
    """Bytes no part of which is like another, made as they are asked for."""
    for at in range(0, size, CHUNK):
        yield hashlib.shake_128(str(at).encode()).digest(min(CHUNK, size - at))


def answer(status: int, code: str) -> bytes:
    """A refusal as such servers word it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    moment = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    return f"{head}Date: {moment}\r\nConnection: close\r\n\r\n".encode() + body


# -- objects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 5 * PART + 7])
def test_a_large_object_goes_in_parts_and_comes_back_in_windows(sqlite: Database, bucket: Bucket, size: int) -> None:
    storage = open_storage(bucket.url(), sqlite)
    whole = b"".join(pieces(size))
    stored = storage.put(pieces(size))
    assert stored.sha256 == hashlib.sha256(whole).hexdigest()
    assert b"".join(storage.read(stored.sha256)) == whole
    assert max(map(len, storage.read(stored.sha256))) == WINDOW
    for start, end in ((0, 1), (PART - 3, PART + 3), (WINDOW, 2 * WINDOW), (size - 5, size), (17, size - 1)):
        assert b"".join(storage.read(stored.sha256, start, end)) == whole[start:end]
    (key,) = bucket.keys()
    assert re.fullmatch(r"content/[0-9a-f]{16}", key)
    assert bucket.get(key) == whole
    etag = bucket.server.client.head_object(Bucket=bucket.name, Key=key)["ETag"]
    parts = -(-size // PART)
    assert etag.endswith(f'-{parts}"') == (size >= PART)


def test_a_large_upload_takes_the_memory_of_a_few_parts(bucket: Bucket, sqlite: Database) -> None:
    code = """
import resource, sys
from graft.db import Database
from graft.storage import open_storage
storage = open_storage(sys.argv[2], Database(sys.argv[1]))
storage.put([b"warm"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stored = storage.put(bytes(1024 * 1024) for _ in range(160))
print(stored.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(sqlite.url), bucket.url()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    size, kilobytes = map(int, done.stdout.split())
    assert size == 160 * CHUNK
    assert kilobytes < 80 * 1024


def test_every_body_is_signed_by_its_own_digest(gated: Storage, gate: Gate) -> None:
    stored = gated.put(pieces(PART + 10))
    sent = b"".join(gate.requests)
    digests = re.findall(rb"(?i)x-amz-content-sha256: (\S+)", sent)
    assert len(digests) >= 4
    assert all(re.fullmatch(rb"[0-9a-f]{64}", digest) for digest in digests)
    whole = b"".join(pieces(PART + 10))
    for part in (whole[:PART], whole[PART:]):
        assert hashlib.sha256(part).hexdigest().encode() in digests
    # What stores other than Amazon's do not all understand.
    assert not re.search(rb"(?i)(x-amz-trailer|aws-chunked|x-amz-sdk-checksum)", sent)
    assert b"".join(gated.read(stored.sha256)) == whole


# -- a store that is away -----------------------------------------------------------------------------------------


def test_a_store_that_is_away_says_so_and_works_when_it_is_back(gated: Storage, gate: Gate, bucket: Bucket) -> None:
    stored = gated.put([b"before"])
    gate.shut()
    began = time.monotonic()
    where = rf"s3://{bucket.name}/content/ at http://127.0.0.1:{gate.port} does not answer"
    for ask in (
        lambda: gated.read(stored.sha256),
        lambda: gated.put([b"meanwhile"]),
        lambda: gated.put([b"before"]),
        lambda: gated.sweep(-1),
    ):
        with pytest.raises(StorageUnavailable, match=where):
            ask()
    assert time.monotonic() - began < 60
    again = gate.reopen()
    assert b"".join(gated.read(gated.put([b"meanwhile"]).sha256)) == b"meanwhile"
    assert b"".join(gated.read(gated.put([b"before"]).sha256)) == b"before"
    while gated.sweep(-1):
        pass
    assert bucket.keys() == []
    again.shut()


def test_a_store_that_is_busy_is_asked_again(gated: Storage, gate: Gate) -> None:
    # A connection that is kept would go round the gate's answers.
    gated._client.close()  # type: ignore[attr-defined]
    gate.canned += [answer(503, "SlowDown"), answer(500, "InternalError")]
    stored = gated.put([b"in the end"])
    assert gate.canned == []
    assert b"".join(gated.read(stored.sha256)) == b"in the end"


def test_a_store_that_goes_on_refusing_is_named_with_its_code(gated: Storage, gate: Gate) -> None:
    gated._client.close()  # type: ignore[attr-defined]
    gate.canned += [answer(403, "AccessDenied")] * 4
    with pytest.raises(StorageUnavailable, match="refused an upload: AccessDenied"):
        gated.put([b"no"])


def test_a_download_that_breaks_off_goes_on(gated: Storage, gate: Gate) -> None:
    stored = gated.put(pieces(3 * WINDOW))
    gated._client.close()  # type: ignore[attr-defined]
    gate.cuts += [WINDOW // 2, 100, 3 * CHUNK]
    assert b"".join(gated.read(stored.sha256)) == b"".join(pieces(3 * WINDOW))
    assert gate.cuts == []


def test_a_part_that_breaks_off_is_sent_again(gated: Storage, gate: Gate, bucket: Bucket) -> None:
    gated._client.close()  # type: ignore[attr-defined]
    gate.cuts += [0, 0]
    stored = gated.put(pieces(2 * PART))
    assert gate.cuts == []
    assert b"".join(gated.read(stored.sha256)) == b"".join(pieces(2 * PART))
    while gated.sweep(-1):
        pass
    assert (bucket.keys(), bucket.uploads()) == ([], [])


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/some/folder", "only buckets are known; write s3://bucket/prefix"),
        ("http://127.0.0.1/bucket", "only buckets are known"),
        ("s3:///prefix", "only buckets are known"),
        ("s3://bucket?endpont=http://127.0.0.1", "unknown option 'endpont'"),
        ("s3://bucket?endpoint=127.0.0.1:9000", "the endpoint begins with http:// or https://"),
        ("s3://bucket?endpoint=http://", "GRAFT_STORAGE_URL cannot be used"),
        ("s3://bucket?path_style=yes", "path_style is true or false"),
        ("s3://key:hidden@bucket", "credentials do not belong in it"),
    ],
)
def test_a_url_that_cannot_be_used_is_named(sqlite: Database, url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)) as caught:
        open_storage(url, sqlite)
    assert "hidden" not in caught.value.message


def test_without_a_url_content_lies_in_the_database(sqlite: Database) -> None:
    assert not isinstance(open_storage(None, sqlite), S3Storage)


def test_the_prefix_and_the_path_style_are_ours_to_say(sqlite: Database, bucket: Bucket) -> None:
    port = bucket.server.port
    for prefix, expected in (("", ""), ("/", ""), ("/a/b", "a/b/"), ("/a/b/", "a/b/")):
        url = f"s3://{bucket.name}{prefix}?endpoint=http://127.0.0.1:{port}&region=garage&path_style=true"
        storage = open_storage(url, sqlite)
        storage.put([b"x"])
        (key,) = bucket.keys()
        assert re.fullmatch(rf"{expected}[0-9a-f]{{16}}", key)
        storage.sweep(-1)


def test_a_client_that_is_not_installed_is_named(
    sqlite: Database, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'graft-server\[s3\]'"):
        open_storage(bucket.url(), sqlite)


def test_the_client_is_loaded_only_for_a_bucket() -> None:
    code = "import sys, graft.app; print([name for name in sys.modules if name.startswith(('boto', 's3transfer'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_bucket_that_is_not_there_is_named(sqlite: Database, bucket: Bucket) -> None:
    url = bucket.url().replace(bucket.name, "nothing-there")
    with pytest.raises(ConfigurationError, match=r"no bucket for s3://nothing-there/content/ at http"):
        open_storage(url, sqlite)


def test_credentials_that_are_missing_or_refused_are_named(
    sqlite: Database, bucket: Bucket, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.canned += [answer(403, "InvalidAccessKeyId")]
    with pytest.raises(ConfigurationError, match=r"refuses these credentials or this region \(HTTP 403\)"):
        open_storage(bucket.url(gate.port), sqlite)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigurationError, match="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_storage(bucket.url(), sqlite)


def test_a_store_that_is_away_at_the_start_may_still_come(
    sqlite: Database, bucket: Bucket, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.shut()
    storage = open_storage(bucket.url(gate.port), sqlite)
    assert "does not answer" in caplog.text
    again = gate.reopen()
    assert b"".join(storage.read(storage.put([b"late"]).sha256)) == b"late"
    again.shut()


def test_no_log_shows_a_credential(
    sqlite: Database, bucket: Bucket, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    with caplog.at_level(logging.DEBUG):
        storage = open_storage(bucket.url(gate.port), sqlite)
        b"".join(storage.read(storage.put(pieces(PART + 1)).sha256))
        gate.shut()
        with pytest.raises(StorageUnavailable) as caught:
            storage.put([b"x"])
    assert KEY_ID.encode() in b"".join(gate.requests)  # it was used
    for text in (caplog.text, str(caught.value), repr(caught.value.__cause__)):
        assert KEY_ID not in text
        assert SECRET not in text
        assert "Signature" not in text


# -- a worker's patience ------------------------------------------------------------------------------------------


def test_a_patient_store_waits_for_one_that_is_away(
    gated: Storage, gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "content"
    file.write_bytes(b"".join(pieces(6 * WINDOW)))
    patient = PatientStorage(gated, give_up=lambda: False)
    gate.shut()
    with ThreadPoolExecutor(1) as worker:
        put = worker.submit(patient.put, remade(lambda: iter(pieces_of(file))))
        until("the store is missed", lambda: "trying again" in caplog.text)
        again = gate.reopen()
        stored = put.result(timeout=30)
        assert stored.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()

        # In the middle of a download: it goes on behind what came through.
        content = patient.read(stored.sha256)
        first = next(content)
        again.shut()
        caplog.clear()
        rest = worker.submit(lambda: b"".join(content))
        until("the store is missed", lambda: "trying again" in caplog.text)
        last = again.reopen()
        assert first + rest.result(timeout=30) == file.read_bytes()
        last.shut()


def test_patience_ends_when_nobody_waits_any_more(gated: Storage, gate: Gate, tmp_path: Path) -> None:
    file = tmp_path / "content"
    file.write_bytes(b"x")
    stored = gated.put(pieces_of(file))
    gate.shut()
    asked: list[None] = []

    def give_up() -> bool:
        asked.append(None)
        return len(asked) > 2

    patient = PatientStorage(gated, give_up)
    with pytest.raises(StorageUnavailable):
        patient.put(pieces_of(file))
    with pytest.raises(StorageUnavailable):
        next(patient.read(stored.sha256))
    # What can be read only once cannot be sent twice.
    with pytest.raises(StorageUnavailable):
        PatientStorage(gated, give_up=lambda: False).put(iter([b"once"]))


def test_patience_is_of_no_use_with_a_disk_that_is_full(sqlite: Database, tmp_path: Path) -> None:
    file = tmp_path / "content"
    file.write_bytes(bytes(4 * CHUNK))
    with sqlite.engine.connect() as connection:
        pages = connection.exec_driver_sql("pragma page_count").scalar_one()
    sqlite.dispose()
    limited = Database(str(sqlite.url))

    @event.listens_for(limited.engine, "connect")
    def limit(connection: Any, record: Any) -> None:
        connection.execute(f"pragma max_page_count = {pages + 100}")

    with pytest.raises(OperationalError, match="full"):
        PatientStorage(open_storage(None, limited), give_up=lambda: False).put(pieces_of(file))
    limited.dispose()


def until(what: str, look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
