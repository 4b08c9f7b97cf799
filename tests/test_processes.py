"""What can happen to a process: Ctrl-C, kill -9, freezing, no memory. The work survives, and nobody is left behind.

Interrupted runs are held against the digest of one that was never interrupted: a resumed job trains the same bits.
"""

import contextlib
import csv
import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import text

from graft import jobs
from graft.db import Database
from graft.models import Job
from graft_worker.engine_process import EngineLost, EngineProcess
from graft_worker.processes import scratch_folder

from .processes import Service, Worker, cut, gone, wait_for

# Short leases, because tests wait for their end.
ENVIRONMENT = {
    "GRAFT_LEASE_SECONDS": "3",
    "GRAFT_HEARTBEAT_SECONDS": "1",
    "GRAFT_POLL_SECONDS": "0.5",
}
STEPS = 48
CHECKPOINTS = [12, 24, 36, 48]


class House:
    """One data folder, and the service over it: running whenever a test asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._service: Service | None = None
        self._training_file: str | None = None

    @property
    def service(self) -> Service:
        if self._service is None or self._service.process.poll() is not None:
            self.close()
            self._service = Service(self.folder, environment=ENVIRONMENT)
        return self._service

    def create(self) -> FineTuningJob:
        if self._training_file is None:
            self._training_file = self.service.upload(cut(self.folder / "train.jsonl", 16))
        return self.service.create(
            self._training_file, n_epochs=3, batch_size=1, extra_body={"n_evals": len(CHECKPOINTS)}
        )

    def close(self) -> None:
        if self._service is not None:
            self._service.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("house"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(house: House) -> str:
    """The digest of the weights when nothing happens."""
    return house.service.weights_sha256(house.service.wait_for_end(house.create().id))


def stored(house: House, job_id: str) -> Job:
    """The job's row, also while no service runs."""
    database = Database(f"sqlite:///{house.folder / 'graft.db'}")
    with database.read() as session:
        row = session.get_one(Job, job_id)
    database.dispose()
    return row


def result_steps(service: Service, job: FineTuningJob) -> list[int]:
    table = service.client.files.content(job.result_files[0]).text
    return [int(row["step"]) for row in csv.DictReader(io.StringIO(table))]


def test_ctrl_c_while_the_model_is_loading_leaves_at_once(house: House) -> None:
    service = house.service
    job = house.create()
    wait_for("an engine that still imports", service.engines, 20)
    began = time.monotonic()
    service.interrupt()
    assert service.process.wait(20) == 0
    assert time.monotonic() - began < 4
    assert service.left_over(1) == []
    row = stored(house, job.id)
    assert (row.status, row.recoveries) == ("queued", 0)
    house.service.client.fine_tuning.jobs.cancel(job.id)


def test_after_ctrl_c_a_second_start_goes_on_where_the_first_stopped(house: House, expected: str) -> None:
    job = house.create()
    house.service.wait_for_step(job.id, 3)
    first = house.service
    assert first.engines()
    began = time.monotonic()
    first.interrupt()
    code = first.process.wait(40)
    print(f"\nCtrl-C: exit code {code} after {time.monotonic() - began:.1f} s")
    assert code == 0
    assert first.left_over(1) == []
    assert "Traceback" not in first.log
    row = stored(house, job.id)
    assert (row.status, row.attempt, row.lease_until) == ("queued", 1, None)
    stopped_at = row.step
    assert 3 <= stopped_at < STEPS

    ended = house.service.wait_for_end(job.id)
    assert house.service.weights_sha256(ended) == expected
    assert ended.attempt == 2  # type: ignore[attr-defined]
    messages = [event.message for event in house.service.events(job.id)]
    assert f"Checkpoint created at step {stopped_at}" in messages
    assert f"Resumed at step {stopped_at} of {STEPS}." in messages
    # Nothing was done twice.
    assert [data["step"] for data in house.service.metrics(job.id)] == list(range(1, STEPS + 1))
    assert result_steps(house.service, ended) == list(range(1, STEPS + 1))


def test_a_killed_engine_costs_the_steps_since_the_last_checkpoint(house: House, expected: str) -> None:
    job = house.create()
    house.service.wait_for_step(job.id, CHECKPOINTS[0] + 1)
    (engine,) = house.service.engines()
    engine.kill()
    ended = house.service.wait_for_end(job.id)
    assert house.service.weights_sha256(ended) == expected
    warnings = [event.message for event in house.service.events(job.id) if event.level == "warn"]
    assert warnings == ["The job goes back to the queue: the engine ended (signal SIGKILL)"]
    assert result_steps(house.service, ended) == list(range(1, STEPS + 1))
    steps = [checkpoint.step_number for checkpoint in house.service.client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert steps == CHECKPOINTS[::-1]


def test_a_killed_service_leaves_no_process_behind(house: House, expected: str) -> None:
    job = house.create()
    house.service.wait_for_step(job.id, CHECKPOINTS[0] + 1)
    first = house.service
    first.stop(signal.SIGKILL)
    began = time.monotonic()
    assert first.left_over(10) == []
    print(f"\nworker and engine ended {time.monotonic() - began:.1f} s after their service was killed")
    assert stored(house, job.id).status == "queued"  # the worker was asked to stop, and saved the job
    ended = house.service.wait_for_end(job.id)
    assert house.service.weights_sha256(ended) == expected


@pytest.mark.parametrize("pause", [0.2, 1.0], ids=["while the server closes", "while the workers save"])
def test_a_second_ctrl_c_ends_the_waiting_and_the_lease_brings_the_job_back(
    house: House, expected: str, pause: float
) -> None:
    job = house.create()
    house.service.wait_for_step(job.id, CHECKPOINTS[0] + 1)
    first = house.service
    (engine,) = first.engines()
    engine.suspend()  # an engine that does not listen, as in a step that takes minutes
    first.interrupt()
    time.sleep(pause)
    assert first.process.poll() is None
    first.interrupt()
    assert first.process.wait(10) == 130
    assert first.left_over(2) == []
    assert "Traceback" not in first.log
    assert stored(house, job.id).status == "running"
    ended = house.service.wait_for_end(job.id)
    assert house.service.weights_sha256(ended) == expected
    warnings = [event.message for event in house.service.events(job.id) if event.level == "warn"]
    assert warnings == ["The job goes back to the queue: its worker went silent"]
    # What the killed worker had on disk is gone too.
    wait_for("an empty scratch folder", lambda: not list((house.folder / "work").iterdir()), 5)


def test_two_ctrl_c_in_one_moment_are_no_error(tmp_path: Path) -> None:
    """The second comes before the server has begun to close, and cancels what waits to be told so."""
    with Service(tmp_path, "--workers", "0") as service:
        service.interrupt()
        time.sleep(0.05)
        service.interrupt()
        assert service.process.wait(10) == 130
        assert "ERROR" not in service.log


def test_a_worker_that_was_frozen_past_its_lease_changes_nothing_when_it_wakes_up(house: House, expected: str) -> None:
    job = house.create()
    service = house.service
    service.wait_for_step(job.id, CHECKPOINTS[0] + 1)
    (worker,), (engine,) = service.workers(), service.engines()
    freeze(worker, house.folder / "graft.db")
    engine.suspend()
    with Worker(house.folder, ENVIRONMENT) as other:
        ended = service.wait_for_end(job.id)
        assert service.weights_sha256(ended) == expected, other.log
        assert ended.attempt == 3  # type: ignore[attr-defined]
        story = [event.id for event in service.events(job.id)]
        adapters = [model.id for model in service.client.models.list()]
        engine.resume()
        worker.resume()
        wait_for("the frozen worker to notice", lambda: "the claim is gone" in service.log, 10)
        assert gone([engine], 5) == []
    assert worker.is_running()
    assert [event.id for event in service.events(job.id)] == story
    assert [model.id for model in service.client.models.list()] == adapters
    assert service.job(job.id) == ended
    messages = [event.message for event in service.events(job.id)]
    assert messages.count("The job has successfully completed") == 1
    assert "Traceback" not in service.log


def freeze(process: psutil.Process, database: Path) -> None:
    """Stop it at a moment when it does not hold SQLite's write lock, which would stop everybody else as well."""
    while True:
        process.suspend()
        with contextlib.closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:
            try:
                connection.execute("begin immediate")
            except sqlite3.OperationalError:
                process.resume()
                time.sleep(0.01)
            else:
                connection.execute("rollback")
                return


def test_a_hung_step_is_noticed_and_a_pause_gives_the_device_back(house: House, expected: str) -> None:
    """An engine that is stopped in the middle of a step stands for a GPU that hangs. Then the job is paused."""
    house.close()
    with Service(house.folder, environment={**ENVIRONMENT, "GRAFT_STALL_SECONDS": "4"}) as service:
        job = service.create(
            service.upload(cut(house.folder / "train.jsonl", 16)),
            n_epochs=3,
            batch_size=1,
            extra_body={"n_evals": len(CHECKPOINTS)},
        )
        service.wait_for_step(job.id, CHECKPOINTS[0] + 1)
        (engine,) = service.engines()
        engine.suspend()
        assert gone([engine], 4 + 10) == []
        service.wait_for_step(job.id, CHECKPOINTS[1] + 1)
        stalls = [event.message for event in service.events(job.id) if "stalled" in event.message]
        assert len(stalls) == 1
        assert "The job goes back to the queue: the training stalled: no sign of it for" in stalls[0]

        database = Database(f"sqlite:///{house.folder / 'graft.db'}")
        with database.write() as session:
            row = session.get_one(Job, job.id)
            jobs.pause(session, row.project_id, row.id)
        wait_for("the pause", lambda: service.job(job.id).status == "paused", 20)
        paused_at = service.step(job.id)
        assert paused_at < STEPS
        with database.write() as session:
            jobs.resume(session, row.project_id, row.id)
        database.dispose()
        ended = service.wait_for_end(job.id)
        assert service.weights_sha256(ended) == expected
        assert f"Resumed at step {paused_at} of {STEPS}." in [event.message for event in service.events(job.id)]
        # Each step was told once, although some were trained twice.
        assert [data["step"] for data in service.metrics(job.id)] == list(range(1, STEPS + 1))


def wait_until_measured(folder: Path) -> None:
    """A worker without a GPU measures it at its start, in a process that then ends."""

    def has_measured() -> bool:
        with contextlib.closing(sqlite3.connect(folder / "graft.db")) as connection:
            return connection.execute("select 1 from workers where rates like '%gemm%'").fetchone() is not None

    wait_for("what the worker has measured, so that a first job has an estimate", has_measured, 60, pause=0.5)
    time.sleep(1)  # for the process that did it


def test_an_engine_that_dies_at_every_start_fails_the_job_by_name(tmp_path: Path) -> None:
    with Service(tmp_path, environment={**ENVIRONMENT, "GRAFT_MAX_RECOVERIES": "1"}) as service:
        wait_until_measured(tmp_path)  # it has all its threads then, whose memory counts in the limit
        (worker,) = service.workers()
        # Room for the worker, not for torch: engines inherit the limit and end in their imports.
        limit = worker.memory_info().vms + 128 * 2**20
        worker.rlimit(psutil.RLIMIT_AS, (limit, limit))
        job = service.wait_for_end(service.create(service.upload(cut(tmp_path / "train.jsonl", 12))).id, 60)
        assert job.status == "failed"
        assert job.error is not None
        assert job.error.code == "worker_lost", service.log
        assert "2 times" in job.error.message
        assert "the engine ended (" in job.error.message  # how depends on which allocation fails
        assert service.engines() == []
        assert worker.is_running()


def test_an_idle_service_costs_next_to_nothing(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        print(f"\nfirst answer of /healthz {service.start_seconds:.2f} s after the start")
        assert service.start_seconds < 10

        wait_until_measured(tmp_path)
        processes = service.processes()
        assert len(processes) == 2
        began, before = time.monotonic(), cpu_seconds(processes)
        time.sleep(10)
        share = (cpu_seconds(processes) - before) / (time.monotonic() - began)
        memory = sum(process.memory_info().rss for process in processes) / 2**20
        print(f"idle: {share:.2%} of a core, {memory:.0f} MiB in {len(processes)} processes")
        assert share < 0.05
        for process in processes:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtorch" not in maps

        # A second one on the same port: one line, and the first goes on.
        port = service.url.rpartition(":")[2]
        command = [sys.executable, "-m", "graft.cli", "serve", "--port", port, "--data-dir", str(tmp_path / "second")]
        second = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert (second.returncode, second.stdout) == (1, "")
        (line,) = second.stderr.splitlines()
        assert f"Cannot listen on 127.0.0.1 port {port}" in line
        assert service.get("/healthz") == {"status": "ok"}


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@pytest.mark.parametrize("state", ["empty", "newer"])
def test_a_worker_refuses_a_database_of_another_version_in_one_line(tmp_path: Path, state: str) -> None:
    if state == "newer":
        database = Database(f"sqlite:///{tmp_path / 'graft.db'}")
        database.migrate()
        with database.write() as session:
            session.execute(text("update alembic_version set version_num = 'from_the_future'"))
        database.dispose()
    command = [sys.executable, "-m", "graft.cli", "worker", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert ("graft migrate" if state == "empty" else "newer Graft") in line


# -- the parts ------------------------------------------------------------------------------------------------------


def test_an_engine_leaves_no_descriptor_behind_however_it_ends() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(3):
        others = psutil.Process().children()
        engine = EngineProcess()
        (process,) = [child for child in psutil.Process().children() if child not in others]
        process.kill()
        gone([process], 5)
        for _ in range(2):
            engine.send("stop", reason="it is dead, and nobody has looked")
        with pytest.raises(EngineLost, match="SIGKILL"):
            engine.receive(timeout=5)
        engine.kill()
    wait_for("closed pipes", lambda: descriptors() == before, 5)


def test_a_scratch_folder_goes_with_its_owner_even_if_that_is_killed(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from graft_worker.processes import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1]), 'theirs') as folder:\n"
        "    (folder / 'file').write_text('x'); print('made', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"made\n"
        with scratch_folder(tmp_path, "ours") as ours:
            assert ours.is_dir()
            assert (tmp_path / "theirs" / "file").is_file()
        assert not ours.exists()
        other.kill()
    with scratch_folder(tmp_path, "ours"):
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert list(tmp_path.iterdir()) == []
