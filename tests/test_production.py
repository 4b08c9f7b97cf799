"""The production path: PostgreSQL, Redis, a bucket, several API processes and several workers.

Everything runs as an operator starts it, and shares what machines of their own would share: nothing else.
"""

import hashlib
import signal
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
import redis
from sqlalchemy import func, select

from graft.db import Database
from graft.models import BlobChunk
from graft.queue import QUEUE, celery_app

from .api.bucket import Gate, S3Server, set_credentials
from .processes import KEY, Service, Worker, cut, wait_for
from .services import PostgresServer, RedisServer

SHORT = {"GRAFT_LEASE_SECONDS": "4", "GRAFT_HEARTBEAT_SECONDS": "1", "GRAFT_POLL_SECONDS": "1"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(tmp_path_factory.mktemp("rows") / "train.jsonl", 16)


@pytest.fixture(scope="module")
def broker_and_database(postgres_server: PostgresServer, redis_server: RedisServer) -> Iterator[dict[str, str]]:
    for server in (postgres_server, redis_server):
        if not server.running:
            server.restart()
    name = f"production_{uuid.uuid4().hex}"
    yield {
        **SHORT,
        "GRAFT_DATABASE_URL": postgres_server.create_database(name),
        "GRAFT_BROKER_URL": redis_server.url,
    }
    postgres_server.release_database(name)


def test_two_api_processes_and_two_workers_run_each_job_once(
    broker_and_database: dict[str, str], redis_server: RedisServer, rows: Path, tmp_path: Path
) -> None:
    with ExitStack() as house:
        apis = [house.enter_context(Service(tmp_path / f"api{n}", environment=broker_and_database)) for n in range(2)]
        workers = [house.enter_context(Worker(tmp_path / f"worker{n}", broker_and_database)) for n in range(2)]
        file = apis[0].upload(rows)
        # Every other job by the other process, and read by the one that did not make it.
        made = [apis[n % 2].create(file).id for n in range(6)]
        ended = [apis[(n + 1) % 2].wait_for_end(job) for n, job in enumerate(made)]
        logs = "\n".join(each.log for each in (*apis, *workers))
        assert [job.status for job in ended] == ["succeeded"] * 6, logs
        assert [job.attempt for job in ended] == [1] * 6, logs  # type: ignore[attr-defined]
        assert len({apis[0].weights_sha256(job) for job in ended}) == 1
        for job in ended:
            messages = [event.message for event in apis[1].events(job.id)]
            assert messages.count("Fine-tuning job started") == 1
            assert messages.count("The job has successfully completed") == 1
            assert [data["step"] for data in apis[0].metrics(job.id)] == [1, 2, 3, 4]
        assert "Traceback" not in logs
        # Acknowledged at once, and no results: the broker is as empty as it was.
        with redis.Redis.from_url(redis_server.url) as client:
            wait_for("an empty broker", lambda: client.llen(QUEUE) == 0, 10)
            assert client.hlen("unacked") == 0
            assert [key for key in client.scan_iter() if b"result" in key or b"celery-task-meta" in key] == []


def test_celerys_harder_stop_saves_the_job_as_well(
    broker_and_database: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    with Service(tmp_path / "api", environment=broker_and_database) as service:
        job = service.create(service.upload(rows), n_epochs=50)
        with Worker(tmp_path / "worker", broker_and_database) as worker:
            service.wait_for_step(job.id, 3)
            worker.processes()
            worker.process.send_signal(signal.SIGQUIT)
            worker.process.wait(40)
            assert worker.left_over(5) == []
            after = service.job(job.id)
            assert after.status == "queued", worker.log
            (checkpoint,) = service.client.fine_tuning.jobs.checkpoints.list(job.id)
            assert checkpoint.step_number == after.progress["step"]  # type: ignore[attr-defined]
        service.client.fine_tuning.jobs.cancel(job.id)


# -- a bucket -----------------------------------------------------------------------------------------------------


def test_a_job_goes_through_a_bucket_that_goes_away_and_comes_back(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server() as server:
        set_credentials(monkeypatch)
        bucket, gate = server.bucket(), Gate(server.port)
        environment = {**SHORT, "GRAFT_STORAGE_URL": bucket.url(gate.port)}
        with Service(tmp_path, environment=environment) as service:
            file = service.upload(rows)
            assert len(bucket.keys()) == 1
            job = service.create(file, n_epochs=8, extra_body={"n_evals": 4})
            service.wait_for_step(job.id, 2)
            gate.shut()
            # The API says so, and goes on with everything else.
            with pytest.raises(openai.InternalServerError) as refused:
                service.upload(cut(tmp_path / "other.jsonl", 12, start=20))
            assert refused.value.status_code == 503
            assert refused.value.code == "storage_unavailable"
            assert refused.value.response.headers["Retry-After"] == "2"
            with pytest.raises(openai.InternalServerError):
                service.client.files.content(file)
            assert service.job(job.id).status == "running"
            # The worker waits with its checkpoint, longer than a lease.
            wait_for("the worker to wait", lambda: "content waits for its store" in service.log, 30)
            time.sleep(5)
            assert service.job(job.id).status == "running", service.log
            again = gate.reopen()
            ended = service.wait_for_end(job.id)
            assert ended.status == "succeeded", service.log
            assert ended.attempt == 1  # type: ignore[attr-defined]
            assert [event for event in service.events(job.id) if event.level == "warn"] == []

            adapter = service.get(f"/v1/adapters/{ended.adapter_id}")  # type: ignore[attr-defined]
            whole = service.download(adapter["url"])
            assert hashlib.sha256(whole).hexdigest() == adapter["sha256"]
            headers = {"Authorization": f"Bearer {KEY}", "Range": f"bytes=100-{len(whole) - 50}"}
            request = urllib.request.Request(service.url + adapter["url"], headers=headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.status == 206
                assert answer.read() == whole[100 : len(whole) - 49]
            again.shut()
        database = Database(f"sqlite:///{tmp_path / 'graft.db'}")
        with database.read() as session:
            assert session.scalar(select(func.count()).select_from(BlobChunk)) == 0
        database.dispose()


def test_a_worker_that_is_told_to_stop_while_the_bucket_is_away_gives_its_job_back(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server() as server:
        set_credentials(monkeypatch)
        gate = Gate(server.port)
        grace = {"GRAFT_GRACE_SECONDS": "5"}  # all of which it takes, for the bucket stays away
        environment = {**SHORT, **grace, "GRAFT_STORAGE_URL": server.bucket().url(gate.port)}
        with Service(tmp_path, "--workers", "0", environment=environment) as service:
            job = service.create(service.upload(rows), n_epochs=6, extra_body={"n_evals": 3})
            with Worker(tmp_path, environment) as worker:
                service.wait_for_step(job.id, 2)
                gate.shut()
                wait_for("the worker to wait", lambda: "content waits for its store" in worker.log, 30)
                began = time.monotonic()
                assert worker.stop() == 0, worker.log
                assert time.monotonic() - began < 5 + 10
            row = service.job(job.id)
            assert row.status == "queued", worker.log
            # Let go, not lost: a loss would count against the job.
            assert "goes back to the queue: " not in "\n".join(event.message for event in service.events(job.id))
            again = gate.reopen()
            with Worker(tmp_path, environment) as worker:
                assert service.wait_for_end(job.id).status == "succeeded", worker.log
            again.shut()


# -- Celery's settings --------------------------------------------------------------------------------------------


def test_no_connection_to_the_broker_waits_for_ever_and_no_result_is_kept(redis_url: str) -> None:
    app = celery_app(redis_url)
    for connect in (app.connection_for_read, app.connection_for_write):
        with connect() as connection:
            limits = connection.default_channel.client.connection_pool.connection_kwargs
            assert limits["socket_timeout"] == 10
            assert limits["socket_connect_timeout"] == 4
    assert type(app.backend).__name__ == "DisabledBackend"
    assert app.conf.task_acks_late is False
    assert app.conf.worker_disable_prefetch is True
    # With either, a healthy run would be stopped, or begun a second time, because of the broker.
    assert app.conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert "visibility_timeout" not in app.conf.broker_transport_options
