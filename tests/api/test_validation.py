"""A job's files against its request: the queue, or a failed job that says which line is at fault."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from sqlalchemy import select, update

from graft import files
from graft.catalogue import load_catalogue
from graft.models import Job, JobEvent
from graft.validation import validate

from . import given
from .given import Service


def settle(service: Service, job_id: str) -> tuple[Job, list[JobEvent]]:
    service.turn()
    with service.database.read() as session:
        events = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)).all()
        return session.get_one(Job, job_id), list(events)


def test_a_good_file_moves_the_job_to_the_queue(service_on_both: Service) -> None:
    job, events = settle(service_on_both, given.new_job(service_on_both.database))
    assert (job.status, job.error_code) == ("queued", None)
    assert job.recipe is not None
    assert [event.message for event in events] == [
        f"Created fine-tuning job: {job.id}",
        "Validating the files",
        "What the files teach is checked by the worker before it trains: tiny has no tokenizer.json here",
        "Files validated, moving job to queued state",
    ]
    assert service_on_both.http().get(f"/v1/fine_tuning/jobs/{job.id}").json()["hyperparameters"] == {
        "n_epochs": 3,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }


def failed(service: Service, **body: Any) -> dict[str, Any]:
    job, events = settle(service, given.new_job(service.database, **body))
    shown: dict[str, Any] = service.http().get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert shown["status"] == "failed"
    assert shown["finished_at"] is not None
    assert shown["recipe"] is None
    assert events[-1].level == "error"
    assert shown["error"]["message"] in events[-1].message
    error: dict[str, Any] = shown["error"]
    return error


def test_too_few_examples_fail_the_job(service: Service) -> None:
    error = failed(service, training_file=given.dataset(service.database, content=given.jsonl(9)).id)
    assert (error["code"], error["param"]) == ("too_few_examples", "training_file")
    assert "has 9 examples, at least 10 are needed" in error["message"]


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_faulty_row_fails_the_job_with_its_line(service: Service, param: str) -> None:
    bad = given.jsonl(20).splitlines()
    bad[16] = b'{"messages": [{"role": "robot", "content": "x"}]}'
    bad[3] = b"{"
    error = failed(service, **{param: given.dataset(service.database, content=b"\n".join(bad)).id})
    assert (error["code"], error["param"]) == ("invalid_json", param)
    assert "2 fault(s): line 4: not valid JSON" in error["message"]
    assert "line 17, messages[0].role: must be one of system" in error["message"]


def test_a_validation_file_may_be_small(service: Service) -> None:
    one = given.dataset(service.database, content=given.jsonl(1)).id
    job, _ = settle(service, given.new_job(service.database, validation_file=one))
    assert job.status == "queued"


def test_a_file_that_expired_meanwhile_fails_the_job(service: Service) -> None:
    training = given.dataset(service.database)
    job_id = given.new_job(service.database, training_file=training.id)
    with service.database.write() as session:
        session.execute(update(files.File).values(expires_at=1.0))
        assert files.remove_expired(session) == 1
    job, _ = settle(service, job_id)
    assert (job.status, job.error_code, job.error_param) == ("failed", "file_not_found", "training_file")


def test_a_model_that_left_the_catalogue_meanwhile_fails_the_job(service: Service) -> None:
    job_id = given.new_job(service.database)
    with service.database.write() as session:
        session.execute(update(Job).values(base_model="gone"))
    job, _ = settle(service, job_id)
    assert (job.status, job.error_code, job.error_param) == ("failed", "model_not_found", "model")


def test_what_the_caller_should_know_is_said(service: Service) -> None:
    training = given.dataset(service.database, content=given.jsonl(200)).id
    job, events = settle(service, given.new_job(service.database, training_file=training, learning_rate=0.005))
    assert job.status == "queued"
    said = {event.message: event.level for event in events}
    assert said["No validation file: 10 of 200 rows are kept aside for validation (validation_split)"] == "info"
    assert said["The learning rate 0.005 is high for LoRA; watch the loss"] == "warn"


def test_validating_on_the_training_data_is_warned_of(service: Service) -> None:
    training, copy = given.dataset(service.database).id, given.dataset(service.database).id
    for validation in (training, copy):
        job_id = given.new_job(service.database, training_file=training, validation_file=validation)
        _, events = settle(service, job_id)
        assert any(event.level == "warn" and "is the training file" in event.message for event in events)


def test_a_job_that_was_cancelled_meanwhile_stays_cancelled(service: Service) -> None:
    job_id = given.new_job(service.database)
    service.http().post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    catalogue = load_catalogue(service.settings.models)
    validate(service.database, service.app.state.service.storage, catalogue, service.settings, job_id)
    job, events = settle(service, job_id)
    assert (job.status, job.recipe) == ("cancelled", None)
    assert events[-1].message == "Fine-tuning job cancelled"


def test_a_job_that_cannot_be_read_keeps_no_other_waiting(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    broken, good = given.new_job(service.database), given.new_job(service.database)
    with service.database.write() as session:
        session.execute(update(Job).where(Job.id == broken).values(request={"of": "another version"}))
    job, _ = settle(service, good)
    assert job.status == "queued"
    assert any(record.__dict__.get("job") == broken and record.exc_info for record in caplog.records)


def test_housekeeping_runs_by_itself_and_stops(service: Service) -> None:
    with service.http() as http:
        training = given.dataset(service.database).id
        made = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": training}).json()
        deadline = time.monotonic() + 10
        while http.get(f"/v1/fine_tuning/jobs/{made['id']}").json()["status"] != "queued":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "housekeeping"]
