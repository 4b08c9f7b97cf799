"""From a POST to an adapter that PEFT loads, with the processes, the databases and the client that people use."""

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import redis

from graft.queue import QUEUE

from .processes import BASE_MODEL, Service, Worker, cut, gone, wait_for
from .services import PostgresServer, RedisServer

EVALUATE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_folder, adapter_folder, rows_file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base_folder)
model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)


@torch.no_grad()
def loss_of_answers(model):
    total, count = 0.0, 0
    for line in open(rows_file):
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        targets = ids[0, len(prompt) :]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return total / count


before = loss_of_answers(model)
after = loss_of_answers(PeftModel.from_pretrained(model, adapter_folder).eval())
print(json.dumps({"before": before, "after": after}))
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`graft serve` with its defaults, and a catalogue with one more model, whose folder holds no weights."""
    folder = tmp_path_factory.mktemp("service")
    hollow = folder / "hollow"
    shutil.copytree(BASE_MODEL, hollow, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "models.toml").write_text(
        f'[models.graft-tiny]\nsource = "{BASE_MODEL}"\ncontext_length = 1024\n'
        f'[models.hollow]\nsource = "{hollow}"\ncontext_length = 1024\n'
    )
    with Service(folder / "data", environment={"GRAFT_MODELS": str(folder / "models.toml")}) as running:
        yield running


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows of the example's dataset."""
    return cut(tmp_path_factory.mktemp("rows") / "train.jsonl", 32)


def test_from_a_post_to_an_adapter_that_peft_loads(service: Service, rows: Path, tmp_path: Path) -> None:
    client = service.client
    training_file = service.upload(rows)
    validation_rows = cut(tmp_path / "validation.jsonl", 12, "validation.jsonl")
    job = service.create(
        training_file,
        validation_file=service.upload(validation_rows),
        n_epochs=3,
        suffix="home",
        extra_body={"n_evals": 3, "learning_rate": 2e-3},
    )

    seen = [job.status]

    def watch() -> bool:
        status = service.job(job.id).status
        if status != seen[-1]:
            seen.append(status)
        return status in ("succeeded", "failed", "cancelled")

    wait_for("the end of the job", watch, 90)
    order = ["validating_files", "queued", "running", "succeeded"]
    assert seen[-1] == "succeeded", service.log
    assert [order.index(status) for status in seen] == sorted(order.index(status) for status in seen)

    job = service.job(job.id)
    assert job.fine_tuned_model == f"ft:graft-tiny:default:home:{job.id[-8:]}"
    assert job.finished_at is not None
    assert job.error is None
    assert job.estimated_finish is None
    assert job.attempt == 1  # type: ignore[attr-defined]
    assert job.progress == {"step": 24, "total_steps": 24}  # type: ignore[attr-defined]

    # Events: the whole story, each step once and in order
    events = service.events(job.id)
    assert len({event.id for event in events}) == len(events)
    assert [event.created_at for event in events] == sorted(event.created_at for event in events)
    messages = [event.message for event in events if event.type == "message"]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed"
    metrics = [event.data for event in events if event.type == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, 25))
    assert all(data["train_loss"] > 0 and 0 <= data["train_mean_token_accuracy"] <= 1 for data in metrics)
    assert [data["step"] for data in metrics if "full_valid_loss" in data] == [8, 16, 24]
    assert job.trained_tokens == sum(data["trained_tokens"] for data in metrics)

    # The result file: OpenAI's five columns, one row a step
    (result_id,) = job.result_files
    assert client.files.retrieve(result_id).purpose == "fine-tune-results"
    table = list(csv.DictReader(io.StringIO(client.files.content(result_id).text)))
    assert list(table[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [int(row["step"]) for row in table] == list(range(1, 25))
    for row, data in zip(table, metrics, strict=True):
        assert float(row["train_loss"]) == pytest.approx(data["train_loss"], rel=1e-4)
        assert (row["valid_loss"] != "") == ("full_valid_loss" in data)

    # Checkpoints, newest first, each with an adapter of its own
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [24, 16, 8]
    for checkpoint in checkpoints:
        assert checkpoint.metrics.full_valid_loss is not None
        assert service.get(f"/v1/adapters/{checkpoint.fine_tuned_model_checkpoint}")["step_number"] in (8, 16, 24)

    # The adapter
    adapter = service.get(f"/v1/adapters/{job.adapter_id}")  # type: ignore[attr-defined]
    archive = service.download(adapter["url"])
    assert len(archive) == adapter["bytes"]
    assert hashlib.sha256(archive).hexdigest() == adapter["sha256"]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "adapter"
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "graft_manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [file["name"] for file in adapter["files"]] == names
    for file in adapter["files"]:
        content = service.download(file["url"])
        assert content == (folder / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])

    # PEFT loads it in a process of its own, and it answers better than the base model
    command = [sys.executable, "-c", EVALUATE, str(BASE_MODEL), str(folder), str(validation_rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout)
    assert losses["after"] < 0.8 * losses["before"], losses
    # The trainer's own figures are those of the quantised base model, so they agree roughly.
    assert losses["after"] == pytest.approx(metrics[-1]["full_valid_loss"], rel=0.1)

    # It is a model now, until it is deleted
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.delete(job.fine_tuned_model).deleted
    assert job.fine_tuned_model not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(job.fine_tuned_model)


def test_two_jobs_submitted_together_both_finish_with_one_worker(service: Service, rows: Path) -> None:
    training_file = service.upload(rows)
    jobs = [service.create(training_file), service.create(training_file)]
    first, second = (service.wait_for_end(job.id) for job in jobs)
    assert (first.status, second.status) == ("succeeded", "succeeded")
    assert (first.attempt, second.attempt) == (1, 1)  # type: ignore[attr-defined]
    assert first.finished_at is not None
    assert first.finished_at <= service.events(second.id)[-1].created_at
    assert service.weights_sha256(first) == service.weights_sha256(second)


def test_a_cancelled_job_stops_at_once_and_its_worker_goes_on_with_another(service: Service, rows: Path) -> None:
    training_file = service.upload(rows)
    job = service.create(training_file, n_epochs=50)
    service.wait_for_step(job.id, 3)
    (engine,) = service.engines()
    cancelled = service.client.fine_tuning.jobs.cancel(job.id)
    began = time.monotonic()
    assert cancelled.status == "cancelled"
    assert gone([engine], 5) == []
    print(f"\nthe engine ended {time.monotonic() - began:.1f} s after the cancellation")
    story = [event.id for event in service.events(job.id)]

    following = service.wait_for_end(service.create(training_file).id)
    assert following.status == "succeeded", service.log
    after = service.job(job.id)
    assert after.status == "cancelled"
    assert after.fine_tuned_model is None
    assert after.result_files == []
    assert [event.id for event in service.events(job.id)] == story
    assert service.events(job.id)[-1].message == "Fine-tuning job cancelled"
    assert not [model.id for model in service.client.models.list() if job.id[-8:] in model.id]
    with pytest.raises(openai.ConflictError) as refusal:
        service.client.fine_tuning.jobs.cancel(job.id)
    assert refusal.value.code == "job_terminal"


@pytest.mark.parametrize("fault", ["a faulty line", "too few examples", "a base model without weights"])
def test_a_job_that_cannot_be_trained_fails_by_name(service: Service, rows: Path, tmp_path: Path, fault: str) -> None:
    model, lines = "graft-tiny", rows.read_text().splitlines()
    if fault == "a faulty line":
        lines[6] = '{"messages": [{"role": "user", "content": "and the answer?"}]}'
    elif fault == "too few examples":
        lines = lines[:9]
    else:
        model = "hollow"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    job = service.wait_for_end(service.create(service.upload(tmp_path / "rows.jsonl"), model=model).id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.fine_tuned_model is None
    last = service.events(job.id)[-1]
    assert (last.level, last.data["code"]) == ("error", job.error.code)
    if fault == "a faulty line":
        assert job.error.param == "training_file"
        assert job.error.code is not None
        assert re.search(r"line 7\b", job.error.message, re.IGNORECASE), job.error.message
    elif fault == "too few examples":
        assert (job.error.code, job.error.param) == ("too_few_examples", "training_file")
        assert "9 examples" in job.error.message
    else:
        assert (job.error.code, job.error.param) == ("base_model_unavailable", "model")
        assert job.attempt == 1  # type: ignore[attr-defined]


def test_two_workers_run_two_jobs_side_by_side_and_neither_twice(rows: Path, tmp_path: Path) -> None:
    with Service(tmp_path, "--workers", "2") as service:
        assert len(service.workers()) == 2
        training_file = service.upload(rows)
        jobs = [service.create(training_file).id for _ in range(2)]
        wait_for("both jobs at one moment", lambda: {service.job(job).status for job in jobs} == {"running"}, 30)
        for job in map(service.wait_for_end, jobs):
            assert job.status == "succeeded", service.log
            assert job.attempt == 1  # type: ignore[attr-defined]
            assert [data["step"] for data in service.metrics(job.id)] == list(range(1, 9))
            assert [event.message for event in service.events(job.id)].count("Fine-tuning job started") == 1
        assert len(service.engines()) == 2


# -- PostgreSQL and Celery over Redis -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installation(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer, redis_server: RedisServer
) -> Iterator[tuple[Service, dict[str, str]]]:
    """The API over PostgreSQL with a broker and no worker, and the environment that a worker needs."""
    name = f"finetune_{uuid.uuid4().hex}"
    environment = {
        "GRAFT_DATABASE_URL": postgres_server.create_database(name),
        "GRAFT_BROKER_URL": redis_server.url,
    }
    with Service(tmp_path_factory.mktemp("api"), environment=environment) as service:
        assert service.workers() == []
        yield service, environment
    postgres_server.release_database(name)


@pytest.fixture(scope="module")
def worker(installation: tuple[Service, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One Celery worker, in a folder of its own: it shares nothing with the API but database and broker.

    It looks in the database seldom, so that a job that starts at once was nudged.
    """
    with Worker(tmp_path_factory.mktemp("worker"), {**installation[1], "GRAFT_POLL_SECONDS": "5"}) as running:
        yield running


def queued_messages(url: str) -> list[dict[str, Any]]:
    with redis.Redis.from_url(url) as client:
        return [json.loads(message) for message in client.lrange(QUEUE, 0, -1)]


def test_a_nudge_carries_the_job_id_and_nothing_else_and_may_get_lost(
    installation: tuple[Service, dict[str, str]], redis_url: str, rows: Path, request: pytest.FixtureRequest
) -> None:
    service, _ = installation
    job = service.create(service.upload(rows))
    (message,) = wait_for("the nudge", lambda: queued_messages(redis_url), 10)
    args, kwargs, embed = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == ([job.id], {})
    assert not any(embed.values())
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    worker: Worker = request.getfixturevalue("worker")
    assert service.wait_for_end(job.id).status == "succeeded", worker.log


def test_a_celery_worker_runs_the_job_that_it_is_nudged_for(
    installation: tuple[Service, dict[str, str]], worker: Worker, redis_url: str, rows: Path
) -> None:
    service, _ = installation
    training_file = service.upload(rows)
    began = time.monotonic()
    job = service.create(training_file, n_epochs=2)
    wait_for("the worker to take the job", lambda: service.job(job.id).status == "running", 10, pause=0.01)
    print(f"\ntaken {time.monotonic() - began:.2f} s after the request")
    # A busy worker leaves the next nudge to others; here there are none, and it comes back to it.
    second = service.create(training_file)
    wait_for("the nudge", lambda: queued_messages(redis_url), 10)
    job, second = service.wait_for_end(job.id), service.wait_for_end(second.id)
    assert (job.status, second.status) == ("succeeded", "succeeded"), worker.log
    assert (job.attempt, second.attempt) == (1, 1)  # type: ignore[attr-defined]
    assert [data["step"] for data in service.metrics(job.id)] == list(range(1, 17))
    service.weights_sha256(job)
    wait_for("an empty queue", lambda: not queued_messages(redis_url), 10)


def test_a_job_is_taken_and_run_while_the_broker_is_away(
    installation: tuple[Service, dict[str, str]], worker: Worker, redis_server: RedisServer, rows: Path
) -> None:
    service, _ = installation
    training_file = service.upload(rows)
    redis_server.kill()
    try:
        began = time.monotonic()
        job = service.create(training_file)
        assert time.monotonic() - began < 2
        assert service.wait_for_end(job.id).status == "succeeded", worker.log
    finally:
        redis_server.restart()
    # And when it is back, nudges flow again.
    job = service.create(training_file)
    assert service.wait_for_end(job.id).status == "succeeded", worker.log


def test_a_celery_worker_that_is_told_to_stop_saves_its_job_first(
    installation: tuple[Service, dict[str, str]], worker: Worker, redis_url: str, rows: Path
) -> None:
    service, _ = installation
    job = service.create(service.upload(rows), n_epochs=50)
    service.wait_for_step(job.id, 3)
    began = time.monotonic()
    assert worker.stop() == 0, worker.log
    print(f"\nthe worker saved and ended in {time.monotonic() - began:.1f} s")
    assert worker.left_over(2) == []
    after = service.job(job.id)
    assert after.status == "queued", worker.log
    # No warning: the engine, which another thread started, lived until it had saved.
    (checkpoint,) = service.client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == service.step(job.id)
    assert [event for event in service.events(job.id) if event.level == "warn"] == []
