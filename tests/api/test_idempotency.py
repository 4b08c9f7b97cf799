"""A request that is sent again makes no second job, whether a key says so or an SDK merely tries again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, update

from graft.models import Job, JobRequest

from . import given
from .given import Service

JOBS = "/v1/fine_tuning/jobs"


def body_of(service: Service, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "training_file": given.dataset(service.database).id, **fields}


def send(service: Service, body: dict[str, Any], headers: dict[str, str], key: str | None = None) -> httpx2.Response:
    return service.http(key).post(JOBS, json=body, headers=headers)


def count(service: Service) -> int:
    with service.database.read() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def test_the_same_key_gives_the_same_job(service_on_both: Service) -> None:
    service = service_on_both
    body = body_of(service)
    first, second = (send(service, body, {"Idempotency-Key": "k1"}) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["id"] == second.json()["id"]
    assert send(service, body, {"Idempotency-Key": "k2"}).json()["id"] != first.json()["id"]
    assert count(service) == 2


def test_a_repetition_shows_the_job_as_it_is_now(service: Service) -> None:
    body = body_of(service)
    made = send(service, body, {"Idempotency-Key": "k1"}).json()
    service.http().post(f"{JOBS}/{made['id']}/cancel")
    assert send(service, body, {"Idempotency-Key": "k1"}).json()["status"] == "cancelled"


def test_a_repetition_outlives_what_the_first_needed(service: Service) -> None:
    """The file may be gone when an answer that was lost is asked for again."""
    body = body_of(service)
    made = send(service, body, {"Idempotency-Key": "k1"}).json()
    service.http().post(f"{JOBS}/{made['id']}/cancel")
    assert service.http().delete(f"/v1/files/{body['training_file']}").status_code == 200
    assert send(service, body, {"Idempotency-Key": "k1"}).json()["id"] == made["id"]
    assert send(service, body, {}).json()["error"]["code"] == "file_not_found"


def test_a_key_with_another_body_is_refused(service_on_both: Service) -> None:
    service = service_on_both
    body = body_of(service)
    send(service, body, {"Idempotency-Key": "k1"})
    answer = send(service, {**body, "seed": 7}, {"Idempotency-Key": "k1"})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "idempotency_mismatch"
    assert answer.json()["error"]["type"] == "idempotency_error"
    assert count(service) == 1


def test_a_key_belongs_to_its_project(service: Service) -> None:
    other, other_key = service.second_project()
    mine = send(service, body_of(service), {"Idempotency-Key": "k1"}).json()
    body = {"model": "tiny", "training_file": given.dataset(service.database, other.project_id).id}
    theirs = send(service, body, {"Idempotency-Key": "k1"}, other_key)
    assert theirs.status_code == 200
    assert theirs.json()["id"] != mine["id"]


def test_a_key_whose_request_was_refused_is_still_free(service: Service) -> None:
    body = body_of(service)
    assert send(service, {**body, "model": "gpt-9"}, {"Idempotency-Key": "k1"}).status_code == 400
    assert send(service, body, {"Idempotency-Key": "k1"}).status_code == 200


def test_an_sdk_that_tries_again_gets_the_job_it_made(service_on_both: Service) -> None:
    service = service_on_both
    body = body_of(service)
    first = send(service, body, {"x-stainless-retry-count": "0"}).json()["id"]
    again = send(service, body, {"x-stainless-retry-count": "1"}).json()["id"]
    assert again == first
    other = send(service, {**body, "seed": 7}, {"x-stainless-retry-count": "1"}).json()["id"]
    assert other != first
    assert count(service) == 2


def test_without_a_retry_the_same_body_means_another_job(service: Service) -> None:
    body = body_of(service)
    ids = {send(service, body, headers).json()["id"] for headers in ({}, {"x-stainless-retry-count": "0"})}
    assert len(ids) == 2
    assert count(service) == 2


def test_a_retry_long_after_means_another_job(service: Service) -> None:
    body = body_of(service)
    first = send(service, body, {}).json()["id"]
    with service.database.write() as session:
        session.execute(update(JobRequest).values(created_at=JobRequest.created_at - 16 * 60))
    assert send(service, body, {"x-stainless-retry-count": "1"}).json()["id"] != first


def test_the_sdk_itself_makes_one_job_when_an_answer_is_lost(service: Service) -> None:
    """The server does its work, the answer is a 500 on the way; the SDK sends the request again by itself."""
    lost = []

    def lose_the_first_answer(response: httpx2.Response) -> None:
        if response.request.method == "POST" and not lost:
            lost.append(response.status_code)
            response.status_code = 500

    sdk = service.sdk().with_options(max_retries=2)
    sdk._client.event_hooks = {"response": [lose_the_first_answer]}
    made = sdk.fine_tuning.jobs.create(**body_of(service))
    assert lost == [200]
    assert count(service) == 1
    assert service.http().get(f"{JOBS}/{made.id}").status_code == 200


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "k1"}], ids=["key"])
def test_requests_at_the_same_moment_make_one_job(service_on_both: Service, headers: dict[str, str]) -> None:
    service = service_on_both
    body = body_of(service)
    for turn in range(3):
        start = threading.Barrier(4)
        named = {name: f"{value}-{turn}" for name, value in headers.items()}

        def ask(_: int, start: threading.Barrier = start, named: dict[str, str] = named) -> tuple[int, str]:
            start.wait()
            answer = send(service, body, named)
            return answer.status_code, answer.json()["id"]

        with ThreadPoolExecutor(4) as pool:
            answers = set(pool.map(ask, range(4)))
        assert len(answers) == 1
        assert answers.pop()[0] == 200
    assert count(service) == 3
