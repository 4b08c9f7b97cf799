"""Following a job costs little: few statements, nothing sent when nothing is new, and no thread held for nothing."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import httpx2
import pytest
import uvicorn
from sqlalchemy import event

from graft import jobs
from graft.db import Database
from graft.jobs import Event

from . import given
from .given import Service

JOBS = "/v1/fine_tuning/jobs"


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """What is sent to the database meanwhile, beginnings and ends of transactions aside."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if not statement.lower().startswith(("begin", "commit", "rollback")):
            sent.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


# -- conditional polls --------------------------------------------------------------------------------------------


def test_a_poll_that_shows_its_etag_is_told_only_what_is_new(service_on_both: Service) -> None:
    service = service_on_both
    database, http = service.database, service.http()
    held = given.running_job(database)
    path = f"{JOBS}/{held.job_id}"

    def poll(tag: str) -> httpx2.Response:
        return http.get(path, headers={"If-None-Match": tag})

    first = http.get(path)
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "private, no-cache"
    for same in (tag, f"W/{tag}"):
        answer = poll(same)
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    with database.write() as session:
        jobs.beat(session, held, lease_seconds=60)  # alive, and nothing new
    assert poll(tag).status_code == 304
    for progress in ({"step": 1}, {"trained_tokens": 5}, {"plan": {"a": 1}}):
        with database.write() as session:
            jobs.beat(session, held, lease_seconds=60, progress=progress)
        answer = poll(tag)
        assert answer.status_code == 200
        assert answer.headers["etag"] != tag
        tag = answer.headers["etag"]
        assert poll(tag).status_code == 304
    given.pause(database, held.job_id)
    assert poll(tag).json()["status"] == "pausing"


def test_a_place_in_the_queue_that_moves_is_new(service: Service) -> None:
    first, second = given.queued_job(service.database), given.queued_job(service.database)
    http, path = service.http(), f"{JOBS}/{second}"
    tag = http.get(path).headers["etag"]
    assert http.get(path, headers={"If-None-Match": tag}).status_code == 304
    service.turn()
    answer = http.get(path, headers={"If-None-Match": tag})
    assert answer.json()["queue_position"] == 2
    tag = answer.headers["etag"]
    assert http.get(path, headers={"If-None-Match": tag}).status_code == 304
    given.cancel(service.database, first)
    service.app.state.service.forecast.FRESH_SECONDS = 0.0
    service.app.state.service.forecast.RESTS = 0
    http.get(path)
    service.turn()
    answer = http.get(path, headers={"If-None-Match": tag})
    assert answer.json()["queue_position"] == 1
    # When it starts it has no place; that it had one is no reason to send it twice.
    given.claim(service.database, second)
    tag = http.get(path, headers={"If-None-Match": answer.headers["etag"]}).headers["etag"]
    assert http.get(path, headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize(
    "tag", ["*", "garbage", '"1"', '"x-y"', '"99999-"', '"1-", "2-"', '"-1-"', '"\u0661-"'.encode()]
)
def test_an_etag_that_is_none_of_ours_gets_the_job(service: Service, tag: Any) -> None:
    held = given.running_job(service.database)
    answer = service.http().get(f"{JOBS}/{held.job_id}", headers={"If-None-Match": tag})
    assert (answer.status_code, answer.json()["id"]) == (200, held.job_id)


def test_an_etag_opens_no_other_projects_job(service: Service) -> None:
    other, key = service.second_project()
    theirs = given.queued_job(service.database, other)
    tag = service.http(key).get(f"{JOBS}/{theirs}").headers["etag"]
    mine = service.http()
    unknown = mine.get(f"{JOBS}/ftjob-unknown", headers={"If-None-Match": tag})
    answer = mine.get(f"{JOBS}/{theirs}", headers={"If-None-Match": tag})
    assert answer.status_code == unknown.status_code == 404


# -- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["validating", "queued", "running", "succeeded"])
def test_a_poll_is_one_statement(service_on_both: Service, state: str) -> None:
    service = service_on_both
    database, http = service.database, service.http()
    job_id = given.new_job(database) if state == "validating" else given.queued_job(database)
    if state in ("running", "succeeded"):
        held = given.claim(database)
        if state == "succeeded":
            given.succeed(database, held)
    service.turn()
    with statements(database) as sent:
        answer = http.get(f"{JOBS}/{job_id}")
        assert len(sent) == 1, sent
        sent.clear()
        assert http.get(f"{JOBS}/{job_id}", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
        assert len(sent) == 1, sent


def test_creating_a_job_is_eight_statements(service_on_both: Service) -> None:
    service = service_on_both
    database, http = service.database, service.http()
    training, validation = given.dataset(database).id, given.dataset(database).id
    body = {"model": "tiny", "training_file": training, "validation_file": validation, "metadata": {"a": "b"}}
    for headers in ({}, {"Idempotency-Key": "k"}, {"x-stainless-retry-count": "1"}):
        with statements(database) as sent:
            assert http.post(JOBS, json=body, headers=headers).status_code == 200
        assert len(sent) <= 8, sent


def test_many_events_are_written_in_one_statement(database: Database) -> None:
    held = given.running_job(database)
    with statements(database) as sent, database.write() as session:
        jobs.beat(
            session, held, lease_seconds=60, events=[Event(f"Step {n}") for n in range(500)], progress={"step": 1}
        )
    assert len(sent) <= 3, sent


def test_an_idle_worker_asks_one_question(database: Database) -> None:
    given.running_job(database)
    with statements(database) as sent, database.read() as session:
        assert not jobs.is_due(session, device_bytes=1)
    assert len(sent) == 1


# -- bursts -------------------------------------------------------------------------------------------------------


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The application on a real port, in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(service.app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_burst_of_requests_is_answered_and_none_with_503(service_on_both: Service) -> None:
    """Far more at once than there are threads and connections: polls, lists, and writes among them."""
    service = service_on_both
    held = given.running_job(service.database)
    training = given.dataset(service.database).id
    one = f"{JOBS}/{held.job_id}"
    asked: list[tuple[str, str, Any]] = [
        ("GET", one, None),
        ("GET", f"{one}/events", None),
        ("GET", JOBS, None),
        ("GET", "/v1/models", None),
        ("GET", f"/v1/files/{training}/content", None),
        ("POST", JOBS, {"model": "tiny", "training_file": training}),
    ]
    start = threading.Barrier(150)

    def ask(number: int) -> int:
        method, path, body = asked[number % len(asked)]
        http = HTTPConnection(address, timeout=60)
        http.connect()
        start.wait()
        headers = {"Authorization": f"Bearer {service.key}", "Content-Type": "application/json"}
        http.request(method, path, None if body is None else json.dumps(body), headers)
        with http.getresponse() as answer:
            answer.read()
        http.close()
        return answer.status

    with served(service) as address, ThreadPoolExecutor(150) as pool:
        assert Counter(pool.map(ask, range(150))) == {200: 150}
        pool_of = service.database.engine.pool
        assert pool_of.checkedout() == 0  # type: ignore[attr-defined]
