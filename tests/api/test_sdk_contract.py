"""OpenAI's own client goes through the whole API as its users know it, and every answer has the fields it promises."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from graft import adapters, jobs
from graft.db import Database
from graft.jobs import Event

from . import given
from .given import ALIAS, Service

FILE_KEYS = {"id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details"}
JOB_KEYS = {
    *("id", "object", "created_at", "error", "fine_tuned_model", "finished_at", "hyperparameters", "model"),
    *("organization_id", "result_files", "seed", "status", "trained_tokens", "training_file", "validation_file"),
    *("estimated_finish", "integrations", "metadata", "method", "user_provided_suffix"),
}
EVENT_KEYS = {"id", "object", "created_at", "level", "message", "type", "data"}
CHECKPOINT_KEYS = {
    *("id", "object", "created_at", "fine_tuned_model_checkpoint", "fine_tuning_job_id", "step_number", "metrics"),
}
MODEL_KEYS = {"id", "object", "created", "owned_by"}
PAGE_KEYS = {"object", "data", "has_more", "first_id", "last_id"}


def upload(sdk: OpenAI, count: int = 10) -> Any:
    return sdk.files.create(file=("train.jsonl", given.jsonl(count)), purpose="fine-tune")


# -- files --------------------------------------------------------------------------------------------------------


def test_a_client_may_delete_what_it_pages_through(sdk: OpenAI) -> None:
    for index in range(5):
        sdk.files.create(file=(f"{index}.txt", b"some text"), purpose="user_data")
    deleted = [sdk.files.delete(file.id).id for file in sdk.files.list(limit=2)]
    assert len(deleted) == 5
    assert sdk.files.list().data == []


def test_a_file_from_upload_to_deletion(sdk: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(given.jsonl(12))
    made = sdk.files.create(file=path.open("rb"), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert (made.object, made.filename, made.purpose) == ("file", "train.jsonl", "fine-tune")
    assert (made.bytes, made.status) == (len(given.jsonl(12)), "processed")
    assert made.expires_at is None
    assert made._request_id is not None
    assert made._request_id.startswith("req_")
    assert sdk.files.wait_for_processing(made.id, poll_interval=0.01, max_wait_seconds=5).status == "processed"
    assert sdk.files.retrieve(made.id) == made
    assert sdk.files.content(made.id).read() == given.jsonl(12)
    gone = sdk.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(made.id)


def test_a_file_with_faults_is_kept_and_says_where(sdk: OpenAI) -> None:
    lines = given.jsonl(10) + b'{"messages": [{"role": "robot", "content": "x"}]}\n'
    made = sdk.files.create(file=("train.jsonl", lines), purpose="fine-tune")
    assert made.status == "error"
    assert made.status_details is not None
    assert "line 11, messages[0].role" in made.status_details
    assert sdk.files.wait_for_processing(made.id, poll_interval=0.01, max_wait_seconds=5).status == "error"


def test_a_file_can_expire(sdk: OpenAI) -> None:
    made = sdk.files.create(
        file=("a.jsonl", given.jsonl()),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.expires_at == made.created_at + 3600


@pytest.mark.parametrize("purpose", ["assistants", "batch", "vision", "user_data", "evals"])
def test_other_purposes_are_kept_unread(sdk: OpenAI, purpose: Any) -> None:
    made = sdk.files.create(file=("picture.bin", b"\x89PNG\x00\xff"), purpose=purpose)
    assert (made.status, made.purpose) == ("processed", purpose)
    assert sdk.files.content(made.id).read() == b"\x89PNG\x00\xff"


def test_files_are_paged_newest_first(sdk: OpenAI, http: TestClient) -> None:
    ids = [upload(sdk).id for _ in range(5)]
    other = sdk.files.create(file=("b.bin", b"x"), purpose="batch").id
    assert [file.id for file in sdk.files.list(purpose="fine-tune", limit=2)] == ids[::-1]
    assert [file.id for file in sdk.files.list(order="asc", limit=4)] == [*ids, other]
    assert [file.id for file in sdk.files.list(purpose="batch")] == [other]
    page = http.get("/v1/files", params={"limit": 2}).json()
    assert page.keys() == PAGE_KEYS
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (other, ids[-1])
    after_the_last = http.get("/v1/files", params={"after": ids[0]}).json()
    assert after_the_last == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


# -- jobs ---------------------------------------------------------------------------------------------------------


def test_a_job_with_everything_a_caller_can_say(sdk: OpenAI, service: Service) -> None:
    training, validation = upload(sdk, 20), upload(sdk, 11)
    made = sdk.fine_tuning.jobs.create(
        model="tiny",
        training_file=training.id,
        validation_file=validation.id,
        suffix="support.bot 2",
        seed=7,
        metadata={"team": "search", "ticket": "GR-1"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}},
        },
        extra_body={
            "lora": {"r": 8, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
            "lr_scheduler": "cosine",
            "min_lr_ratio": 0.1,
            "max_seq_length": 256,
            "n_evals": 3,
            "early_stopping": {"patience": 2},
            "weight_decay": 0.01,
        },
    )
    assert made.id.startswith("ftjob-")
    assert (made.object, made.status, made.model) == ("fine_tuning.job", "validating_files", "tiny")
    assert (made.training_file, made.validation_file) == (training.id, validation.id)
    assert made.to_dict()["user_provided_suffix"] == "support.bot 2"
    assert (made.seed, made.metadata) == (7, {"team": "search", "ticket": "GR-1"})
    assert made.hyperparameters.n_epochs == 2
    assert made.error is None
    assert made.result_files == []
    service.turn()
    job = sdk.fine_tuning.jobs.retrieve(made.id)
    assert job.status == "queued"
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.batch_size == 4
    recipe: Any = job.to_dict()["recipe"]
    assert recipe["lora"] == {
        "r": 8,
        "alpha": 8.0,
        "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
    }
    assert (recipe["lr_scheduler"], recipe["max_seq_length"], recipe["n_evals"]) == ("cosine", 256, 3)
    assert recipe["learning_rate"] == pytest.approx(1e-4)
    assert recipe["early_stopping"] == {"patience": 2, "min_delta": 0.0, "warmup_evals": 1}
    assert recipe["validation_split"] == 0.0


def test_explicit_nulls_are_taken_for_left_out(sdk: OpenAI) -> None:
    made = sdk.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(sdk).id,
        validation_file=None,
        suffix=None,
        seed=None,
        metadata=None,
        integrations=None,
    )
    assert (made.validation_file, made.metadata, made.seed) == (None, None, 42)


def test_the_older_place_of_the_hyperparameters_still_works(sdk: OpenAI, service: Service) -> None:
    made = sdk.fine_tuning.jobs.create(
        model="tiny", training_file=upload(sdk).id, hyperparameters={"n_epochs": 5, "batch_size": "auto"}
    )
    assert (made.hyperparameters.n_epochs, made.hyperparameters.batch_size) == (5, "auto")
    service.turn()
    job = sdk.fine_tuning.jobs.retrieve(made.id)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (5, 1)
    assert job.hyperparameters.learning_rate_multiplier == 1.0


def test_a_script_that_names_an_openai_model_runs_on_the_base_the_operator_chose(sdk: OpenAI, service: Service) -> None:
    made = sdk.fine_tuning.jobs.create(model=ALIAS, training_file=upload(sdk).id)
    assert made.model == ALIAS
    assert made.to_dict()["base_model"] == "tiny"
    service.turn()
    messages = [event.message for event in sdk.fine_tuning.jobs.list_events(made.id)]
    assert f"'{ALIAS}' stands for tiny on this server" in messages


def test_jobs_are_paged_and_found_by_their_metadata(service_on_both: Service) -> None:
    service = service_on_both
    sdk, http = service.sdk(), service.http()
    training = upload(sdk).id

    def make(metadata: dict[str, str] | None) -> str:
        return sdk.fine_tuning.jobs.create(model="tiny", training_file=training, metadata=metadata).id

    odd = {'a "quoted" key': "a.b[0]'$", "": "empty key", "ключ": "значение", "a\\b": "%"}
    plain = make(None)
    red, red_big, strange = make({"color": "red"}), make({"color": "red", "size": "big"}), make(odd)
    empty = make({"color": ""})
    every = [empty, strange, red_big, red, plain]
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=2)] == every
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"color": "red"})] == [red_big, red]
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"color": "red", "size": "big"})] == [red_big]
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"color": "blue"})] == []
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"color": ""})] == [empty]
    assert [job.id for job in sdk.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [plain]
    for key, value in odd.items():
        assert [job["id"] for job in http.get(f"/v1/fine_tuning/jobs?{_filter(key, value)}").json()["data"]] == [
            strange
        ]
    assert sdk.fine_tuning.jobs.retrieve(strange).metadata == odd
    after_the_last = http.get("/v1/fine_tuning/jobs", params={"after": plain}).json()
    assert (after_the_last["data"], after_the_last["has_more"]) == ([], False)


def _filter(key: str, value: str) -> str:
    return f"{quote(f'metadata[{key}]', safe='')}={quote(value, safe='')}"


def test_a_job_is_cancelled_once(sdk: OpenAI, service: Service) -> None:
    made = sdk.fine_tuning.jobs.create(model="tiny", training_file=upload(sdk).id)
    cancelled = sdk.fine_tuning.jobs.cancel(made.id)
    assert (cancelled.status, cancelled.id) == ("cancelled", made.id)
    assert cancelled.finished_at is not None
    patient = service.sdk().with_options(max_retries=2)  # an answer that will not change must not be asked for again
    with pytest.raises(openai.ConflictError) as caught:
        patient.fine_tuning.jobs.cancel(made.id)
    assert caught.value.code == "job_terminal"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_events_are_paged_over_many(sdk: OpenAI, service: Service) -> None:
    held = given.running_job(service.database)
    with service.database.write() as session:
        assert jobs.beat(session, held, lease_seconds=60, events=[Event(f"Step {n}") for n in range(45)])
    told = list(sdk.fine_tuning.jobs.list_events(held.job_id, limit=7))
    assert [event.message for event in told[:45]] == [f"Step {n}" for n in reversed(range(45))]
    assert told[-1].message == f"Created fine-tuning job: {held.job_id}"
    assert len({event.id for event in told}) == len(told) == 49
    assert len(sdk.fine_tuning.jobs.list_events(held.job_id).data) == 20
    last = service.http().get(f"/v1/fine_tuning/jobs/{held.job_id}/events", params={"after": told[-1].id}).json()
    assert (last["data"], last["has_more"], last["first_id"]) == ([], False, None)


def test_a_finished_job_with_checkpoints_results_and_model(service_on_both: Service) -> None:
    service = service_on_both
    sdk = service.sdk()
    held = given.running_job(service.database, suffix="bot")
    for step in range(1, 13):
        assert given.add_checkpoint(service.database, held, step, loss=2.0 - step / 10)
    assert given.succeed(service.database, held)

    found = list(sdk.fine_tuning.jobs.checkpoints.list(held.job_id, limit=5))
    assert [checkpoint.step_number for checkpoint in found] == list(range(12, 0, -1))
    assert found[0].fine_tuning_job_id == held.job_id
    assert found[0].fine_tuned_model_checkpoint == f"{held.model_name}:ckpt-step-12"
    assert found[0].metrics.full_valid_loss == pytest.approx(0.8)
    assert found[0].metrics.step == 12
    assert len(sdk.fine_tuning.jobs.checkpoints.list(held.job_id).data) == 10
    path = f"/v1/fine_tuning/jobs/{held.job_id}/checkpoints"
    assert service.http().get(path, params={"after": found[-1].id}).json()["data"] == []

    job = sdk.fine_tuning.jobs.retrieve(held.job_id)
    assert (job.status, job.trained_tokens) == ("succeeded", 1234)
    assert sdk.files.content(job.result_files[0]).read() == b"step,train_loss\n1,0.5\n"
    assert sdk.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"
    assert job.fine_tuned_model is not None
    model = sdk.models.retrieve(job.fine_tuned_model)
    assert (model.id, model.owned_by) == (job.fine_tuned_model, "org-default")
    assert model.to_dict()["base_model"] == "tiny"
    assert sdk.models.delete(job.fine_tuned_model).deleted is True
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve(job.fine_tuned_model)


# -- models -------------------------------------------------------------------------------------------------------


def test_models_are_the_catalogue_its_aliases_and_what_was_trained(sdk: OpenAI, service: Service) -> None:
    held = given.running_job(service.database)
    given.add_checkpoint(service.database, held, 1)
    given.succeed(service.database, held)
    listed = {model.id: model for model in sdk.models.list()}
    assert set(listed) == {"tiny", "acme/big", ALIAS, held.model_name}
    assert listed[ALIAS].to_dict()["base_model"] == "tiny"
    assert listed["tiny"].owned_by == "graft"


@pytest.mark.parametrize("path", ["/v1/models/acme/big", "/v1/models/acme%2Fbig", "/v1/models/acme%2fbig"])
def test_a_slash_in_a_models_id_may_be_encoded_or_not(http: TestClient, path: str) -> None:
    assert http.get(path).json()["id"] == "acme/big"


def test_the_sdk_finds_a_model_with_a_slash(sdk: OpenAI) -> None:
    assert sdk.models.retrieve("acme/big").id == "acme/big"


def test_a_fine_tuned_model_of_a_base_with_a_slash(service: Service) -> None:
    held = given.running_job(service.database)
    name = "ft:acme/big:default::12345678"
    content, _ = given.adapter(service.database)
    with service.database.write() as session:
        adapters.create(session, held.project_id, held.job_id, name, "acme/big", 1, content, is_final=True)
    assert service.http().get(f"/v1/models/{name}").json()["id"] == name
    assert service.http().get(f"/v1/adapters/{name}").json()["fine_tuned_model"] == name
    assert service.http().get(f"/v1/adapters/{name}/download").status_code == 200
    assert service.sdk().models.delete(name).id == name


@pytest.mark.parametrize("name", ["tiny", "acme/big", ALIAS])
def test_a_base_model_cannot_be_deleted(sdk: OpenAI, name: str) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        sdk.models.delete(name)
    assert (caught.value.code, caught.value.param) == ("not_deletable", "model")


# -- errors -------------------------------------------------------------------------------------------------------


def test_errors_arrive_as_the_right_classes_with_message_param_and_code(sdk: OpenAI, service: Service) -> None:
    def check(kind: type[openai.APIStatusError], caught: Any, code: str, param: str | None, word: str) -> None:
        error = caught.value
        assert type(error) is kind
        assert (error.code, error.param) == (code, param)
        assert word in error.message
        assert error.type
        assert error.request_id.startswith("req_")

    with pytest.raises(openai.APIStatusError) as caught:
        sdk.fine_tuning.jobs.create(model="gpt-9", training_file="file-x")
    check(openai.BadRequestError, caught, "model_not_found", "model", "gpt-9")
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.fine_tuning.jobs.create(model="tiny", training_file="file-x")
    check(openai.BadRequestError, caught, "file_not_found", "training_file", "file-x")
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.fine_tuning.jobs.create(model="tiny", training_file=upload(sdk).id, extra_body={"lora": {"rank": 8}})
    check(openai.BadRequestError, caught, "unknown_parameter", "lora.rank", "Did you mean 'lora.r'?")
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.fine_tuning.jobs.retrieve("ftjob-nothing")
    check(openai.NotFoundError, caught, "job_not_found", "id", "ftjob-nothing")
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.files.content("file-nothing")
    check(openai.NotFoundError, caught, "file_not_found", "id", "file-nothing")
    with pytest.raises(openai.APIStatusError) as caught:
        service.sdk(key="sk-graft-wrong").models.list()
    check(openai.AuthenticationError, caught, "invalid_api_key", None, "Invalid API key")
    with pytest.raises(openai.APIStatusError) as caught:
        list(sdk.fine_tuning.jobs.list(after="ftjob-nothing"))
    check(openai.BadRequestError, caught, "invalid_cursor", "after", "ftjob-nothing")
    used = given.new_job(service.database)
    training = sdk.fine_tuning.jobs.retrieve(used).training_file
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.files.delete(training)
    check(openai.ConflictError, caught, "file_in_use", "id", used)


# -- every key, always --------------------------------------------------------------------------------------------


def test_every_object_carries_every_key(http: TestClient, service: Service) -> None:
    held = given.running_job(service.database)
    given.add_checkpoint(service.database, held, 1)
    fresh = given.new_job(service.database)
    for job_id in (held.job_id, fresh):
        assert http.get(f"/v1/fine_tuning/jobs/{job_id}").json().keys() >= JOB_KEYS
    jobs_page = http.get("/v1/fine_tuning/jobs").json()
    events_page = http.get(f"/v1/fine_tuning/jobs/{held.job_id}/events").json()
    checkpoints_page = http.get(f"/v1/fine_tuning/jobs/{held.job_id}/checkpoints").json()
    models_page, files_page = http.get("/v1/models").json(), http.get("/v1/files").json()
    for page, keys in (
        (jobs_page, JOB_KEYS),
        (events_page, EVENT_KEYS),
        (checkpoints_page, CHECKPOINT_KEYS),
        (models_page, MODEL_KEYS),
        (files_page, FILE_KEYS),
    ):
        assert page.keys() == PAGE_KEYS
        assert page["data"]
        assert all(item.keys() >= keys for item in page["data"])


def test_a_deleted_answer_has_openais_keys(http: TestClient, service: Service) -> None:
    made = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", io.BytesIO(b"x"))}).json()
    assert http.delete(f"/v1/files/{made['id']}").json() == {"id": made["id"], "object": "file", "deleted": True}


def test_a_deleted_file_stops_being_a_cursor_and_a_training_file(service_on_both: Service) -> None:
    sdk = service_on_both.sdk()
    made = upload(sdk)
    sdk.files.delete(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.fine_tuning.jobs.create(model="tiny", training_file=made.id)
    assert (caught.value.code, caught.value.param) == ("file_not_found", "training_file")


def test_numbers_survive_both_databases(database: Database, tmp_path: Path) -> None:
    service = Service.over(database, tmp_path)
    made = service.http().post(
        "/v1/fine_tuning/jobs",
        json={
            "model": "tiny",
            "training_file": given.dataset(database).id,
            "learning_rate": 0.000123,
            "lora": {"alpha": 32, "dropout": 0.0},
            "hyperparameters": {"n_epochs": 1},
        },
    )
    assert made.status_code == 200
    service.turn()
    job = service.http().get(f"/v1/fine_tuning/jobs/{made.json()['id']}").json()
    assert job["recipe"]["learning_rate"] == 0.000123
    assert job["recipe"]["lora"]["alpha"] == 32.0
