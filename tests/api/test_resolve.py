"""From a request and its files to a recipe, or to a failed job that says which line is at fault."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from sqlalchemy import select, update

from graft import files, jobs, resolve
from graft.catalogue import load_catalogue
from graft.db import Database
from graft.models import Job, JobEvent
from graft.recipe import Recipe
from graft.schemas import JobCreate

from . import given
from .given import Service


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_catalogue(given.write_catalogue(tmp_path_factory.mktemp("catalogue")))


def recipe(bases: Any, rows: int, **fields: Any) -> Recipe:
    body = JobCreate(**{"model": "tiny", "training_file": "file-x", **fields})
    return resolve.recipe(body, bases.resolve(body.model), rows=rows)


# -- auto ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "split_rows"),
    [
        (10, 3, 1, 0),
        (99, 3, 2, 0),
        (100, 3, 2, 10),
        (300, 3, 8, 15),
        (1000, 2, 16, 50),
        (10_500, 2, 16, 500),
        (20_000, 1, 16, 500),
        (200_000, 1, 16, 500),
    ],
)
def test_auto_follows_the_number_of_rows(bases: Any, rows: int, epochs: int, batch: int, split_rows: int) -> None:
    found = recipe(bases, rows)
    assert (found.n_epochs, found.batch_size) == (epochs, batch)
    assert round(found.validation_split * rows) == split_rows


def test_the_defaults_are_those_of_the_literature(bases: Any) -> None:
    found = recipe(bases, 50)
    assert (found.learning_rate, found.lr_scheduler, found.warmup_ratio) == (2e-4, "linear", 0.03)
    assert (found.lora.r, found.lora.alpha, found.lora.dropout) == (16, 32.0, 0.0)
    assert (found.lora.target_modules, found.lora.use_rslora) == ("all-linear", False)
    assert (found.quantization, found.optimizer, found.seed) == ("nf4", "adamw_torch", 42)
    assert (found.weight_decay, found.max_grad_norm, found.min_lr_ratio) == (0.0, 1.0, 0.0)
    assert (found.train_on_inputs, found.gradient_checkpointing, found.early_stopping) == (False, True, None)


def test_a_large_model_gets_a_lower_rate_and_the_multiplier_scales_it(bases: Any) -> None:
    assert recipe(bases, 50, model="acme/big").learning_rate == 1e-4
    scaled = {"hyperparameters": {"learning_rate_multiplier": 0.5}}
    assert recipe(bases, 50, **scaled).learning_rate == 1e-4
    assert recipe(bases, 50, model="acme/big", **scaled).learning_rate == 5e-5
    assert recipe(bases, 50, learning_rate=3e-4, model="acme/big").learning_rate == 3e-4


def test_the_sequence_length_is_the_models_or_2048(bases: Any) -> None:
    assert recipe(bases, 50).max_seq_length == 512
    assert recipe(bases, 50, model="acme/big").max_seq_length == 2048
    assert recipe(bases, 50, model="acme/big", max_seq_length=8192).max_seq_length == 8192


def test_rows_are_packed_unless_refused(bases: Any) -> None:
    assert recipe(bases, 50).packing
    assert recipe(bases, 50, packing=True).packing
    assert not recipe(bases, 50, packing=False).packing


def test_what_the_caller_names_is_taken(bases: Any) -> None:
    found = recipe(
        bases,
        50,
        seed=0,
        hyperparameters={"n_epochs": 7, "batch_size": 200},
        lora={"r": 8, "target_modules": ["q_proj"]},
        validation_split=0.5,
        train_on_inputs=True,
    )
    assert (found.seed, found.n_epochs, found.batch_size) == (0, 7, 25)  # no more than there are rows to train on
    assert (found.lora.r, found.lora.alpha, found.lora.target_modules) == (8, 16.0, ("q_proj",))
    assert (found.validation_split, found.train_on_inputs) == (0.5, True)


def test_a_validation_file_leaves_all_rows_for_training(bases: Any) -> None:
    assert recipe(bases, 1000, validation_file="file-v", validation_split=0.2).validation_split == 0.0
    assert recipe(bases, 1000, validation_split=0.0).validation_split == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"early_stopping": {"patience": 2}},
        {"lora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, "learning_rate": 1.23e-5},
    ],
)
def test_a_recipe_comes_back_from_the_database_as_it_was(database: Database, bases: Any, fields: Any) -> None:
    job_id = given.new_job(database, **fields)
    wanted = recipe(bases, 10, **fields)
    with database.write() as session:
        assert jobs.queue(session, job_id, wanted, [])
    assert given.claim(database, job_id).recipe == wanted


# -- validation ---------------------------------------------------------------------------------------------------


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
    resolve.validate(service.database, service.app.state.service.storage, catalogue, service.settings, job_id)
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
