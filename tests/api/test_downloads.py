"""Downloads: length, address, ranges and conditions as HTTP has them, for files and for adapters."""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest
import uvicorn
from fastapi.testclient import TestClient

from graft import files, jobs
from graft.db import Database
from graft.routes.download import disposition
from graft.storage import CHUNK

from . import given
from .given import Service

CONTENT = bytes(range(256)) * 10_000  # two chunks and a half
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of one service for all that only reads."""
    folder = tmp_path_factory.mktemp("downloads")
    database = Database(f"sqlite:///{folder / 'graft.db'}")
    database.migrate()
    yield Service.over(database, folder).http()
    database.dispose()


@pytest.fixture(scope="module")
def url(http: TestClient) -> str:
    """Where CONTENT can be downloaded."""
    made = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("результат 1.bin", CONTENT)}).json()
    return f"/v1/files/{made['id']}/content"


def test_the_whole_content_with_its_headers(http: TestClient, url: str) -> None:
    answer = http.get(url)
    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["etag"] == f'"{SHA}"'
    assert answer.headers["x-checksum-sha256"] == SHA
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == (
        'attachment; filename="1.bin"; '
        "filename*=UTF-8''%D1%80%D0%B5%D0%B7%D1%83%D0%BB%D1%8C%D1%82%D0%B0%D1%82%201.bin"
    )
    assert "private" in answer.headers["cache-control"]


def test_head_says_the_same_without_the_content(http: TestClient, url: str) -> None:
    whole, head = http.get(url), http.head(url)
    assert head.status_code == 200
    assert head.content == b""
    same = ("content-length", "etag", "content-disposition", "content-type", "accept-ranges", "x-checksum-sha256")
    assert {name: head.headers[name] for name in same} == {name: whole.headers[name] for name in same}
    ranged = http.head(url, headers={"Range": "bytes=0-9"})  # a range is defined for GET alone
    assert (ranged.status_code, ranged.headers["content-length"]) == (200, str(len(CONTENT)))


@pytest.mark.parametrize("tag", [f'"{SHA}"', f'W/"{SHA}"', "*", f'"other", "{SHA}"'])
def test_content_that_the_caller_has_is_not_sent_again(http: TestClient, url: str, tag: str) -> None:
    for method in ("GET", "HEAD"):
        answer = http.request(method, url, headers={"If-None-Match": tag, "Range": "bytes=0-1"})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == f'"{SHA}"'


def test_other_content_is_sent(http: TestClient, url: str) -> None:
    assert http.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


SIZE = len(CONTENT)


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        (f"bytes={CHUNK - 1}-{CHUNK}", CHUNK - 1, CHUNK + 1),
        (f"bytes={CHUNK}-", CHUNK, SIZE),
        (f"bytes=5-{2 * CHUNK + 5}", 5, 2 * CHUNK + 6),
        ("bytes=100-99999999999", 100, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-1000", SIZE - 1000, SIZE),
        ("bytes=-99999999999", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    ],
)
def test_a_range_gives_its_part(http: TestClient, url: str, asked: str, start: int, stop: int) -> None:
    answer = http.get(url, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=5-2", "bytes=-0"])
def test_a_range_that_is_not_there_says_how_long_the_content_is(http: TestClient, url: str, asked: str) -> None:
    answer = http.get(url, headers={"Range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == "range_not_satisfiable"


@pytest.mark.parametrize(
    "asked",
    [
        *("items=0-5", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=0-5-9", "garbage", "bytes=--5", "bytes=1.5-2"),
        "bytes=0-5,10-15",
        "bytes=" + ",".join(f"{n}-{n}" for n in range(2500)),
    ],
    ids=lambda asked: asked[:20],
)
def test_a_range_that_makes_no_sense_is_ignored(http: TestClient, url: str, asked: str) -> None:
    answer = http.get(url, headers={"Range": asked})
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


@pytest.mark.parametrize(
    ("condition", "status"),
    [(f'"{SHA}"', 206), ('"old"', 200), (f'W/"{SHA}"', 200), ("Tue, 03 Nov 2026 10:00:00 GMT", 200)],
)
def test_a_range_of_other_content_is_not_mixed_in(http: TestClient, url: str, condition: str, status: int) -> None:
    answer = http.get(url, headers={"Range": "bytes=10-19", "If-Range": condition})
    assert answer.status_code == status
    assert answer.content == (CONTENT[10:20] if status == 206 else CONTENT)


def test_pieces_put_together_are_the_whole(http: TestClient, url: str) -> None:
    got, tag = b"", http.head(url).headers["etag"]
    while len(got) < SIZE:
        headers = {"Range": f"bytes={len(got)}-{len(got) + 700_000}", "If-Range": tag}
        piece = http.get(url, headers=headers)
        assert piece.status_code == 206
        got += piece.content
    assert hashlib.sha256(got).hexdigest() == SHA


# -- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_whole_and_file_by_file(service_on_both: Service) -> None:
    service = service_on_both
    held = given.running_job(service.database)
    assert given.succeed(service.database, held)
    _, parts = given.adapter(service.database, held.job_id)
    http = service.http()
    job = http.get(f"/v1/fine_tuning/jobs/{held.job_id}").json()
    found = http.get(f"/v1/adapters/{job['adapter_id']}").json()
    assert found == http.get(f"/v1/adapters/{job['fine_tuned_model']}").json()
    assert found.keys() == {
        *("id", "object", "created_at", "fine_tuned_model", "base_model", "fine_tuning_job_id", "step_number"),
        *("bytes", "sha256", "url", "files"),
    }
    assert (found["fine_tuning_job_id"], found["base_model"], found["step_number"]) == (held.job_id, "tiny", 7)

    whole = http.get(found["url"])
    assert whole.headers["content-type"] == "application/gzip"
    assert whole.headers["content-length"] == str(found["bytes"])
    assert hashlib.sha256(whole.content).hexdigest() == found["sha256"]
    assert f'filename="{found["id"]}.tar.gz"' in whole.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(whole.content)) as archive:
        assert sorted(archive.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]

    assert [file["name"] for file in found["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in found["files"]:
        for path in (file["url"], f"/v1/adapters/{job['fine_tuned_model']}/files/{file['name']}"):
            answer = http.get(path)
            assert answer.content == parts[file["name"]]
            assert answer.headers["etag"] == f'"{file["sha256"]}"'
            assert len(answer.content) == file["bytes"]
            half = len(answer.content) // 2
            rest = http.get(path, headers={"Range": f"bytes={half}-"})
            assert rest.content == answer.content[half:]
    for wrong in ("nothing.bin", "../adapter_config.json", "%2e%2e%2fadapter_config.json"):
        assert http.get(f"/v1/adapters/{found['id']}/files/{wrong}").status_code == 404


def test_content_shared_by_two_adapters_survives_the_deletion_of_one(service: Service) -> None:
    first, second = given.running_job(service.database), given.running_job(service.database)
    content, parts = given.adapter(service.database)
    for held in (first, second):
        with service.database.write() as session:
            results = content.archive
            assert jobs.succeed(session, held, step=1, trained_tokens=1, content=content, results=results, events=[])
    http = service.http()
    assert http.delete(f"/v1/models/{first.model_name}").status_code == 200
    service.storage.sweep(0)
    assert http.get(f"/v1/adapters/{second.model_name}/download").content == parts["archive"]


# -- one header, always -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ['a"b.bin', "a\r\nSet-Cookie: x=1", "a;b=c", "a\\b", "данные", "日本.bin", "", "a%22b", "é.bin", "\u202ea"]
)
def test_a_name_makes_one_safe_header(name: str) -> None:
    value = disposition(name)
    assert value.isascii()
    assert value.isprintable()
    assert value.count('"') == 2
    plain, encoded = value.removeprefix('attachment; filename="').split("\"; filename*=UTF-8''")
    assert plain
    assert not set(plain) & set('"\\;%')
    assert all(letter.isalnum() or letter in "-._~%" for letter in encoded)


# -- over a real connection ---------------------------------------------------------------------------------------


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The application behind a real server on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=20)
        listener.close()
        assert not thread.is_alive()


def test_slow_downloads_hold_no_connection_to_the_database(service: Service) -> None:
    """Many callers begin a large download and do not read on."""
    size = 24 * CHUNK
    stored = service.storage.put(b"\x07" * CHUNK for _ in range(24))
    with service.database.write() as session:
        made = files.create(session, given.CALLER.project_id, stored, filename="big.bin", purpose="batch")
    with served(service) as base:
        head = f"GET /v1/files/{made.id}/content HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\n\r\n"
        address = ("127.0.0.1", int(base.rpartition(":")[2]))
        slow = [socket.create_connection(address, timeout=20) for _ in range(35)]
        try:
            for connection in slow:
                connection.sendall(head.encode())
            for connection in slow:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
            deadline = time.monotonic() + 10
            while service.database.engine.pool.checkedout():  # type: ignore[attr-defined]
                assert time.monotonic() < deadline, "a waiting download holds a connection"
                time.sleep(0.02)
            with httpx2.Client(base_url=base, headers={"Authorization": f"Bearer {service.key}"}, timeout=20) as http:
                assert http.get("/v1/models").status_code == 200
                part = http.get(f"/v1/files/{made.id}/content", headers={"Range": f"bytes={size - 5}-"})
                assert part.content == b"\x07" * 5
        finally:
            for connection in slow:
                connection.close()


def test_an_upload_that_is_cut_off_leaves_nothing(sqlite: Database, service: Service) -> None:
    with served(service) as base:
        address = ("127.0.0.1", int(base.rpartition(":")[2]))
        with socket.create_connection(address, timeout=20) as connection:
            head = (
                f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\n"
                "Content-Type: multipart/form-data; boundary=XX\r\nContent-Length: 1000000\r\n\r\n"
                '--XX\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
            )
            connection.sendall(head.encode() + given.jsonl(100))
            time.sleep(0.2)
        with httpx2.Client(base_url=base, headers={"Authorization": f"Bearer {service.key}"}, timeout=20) as http:
            assert http.get("/v1/files").json()["data"] == []
