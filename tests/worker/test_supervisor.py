"""What becomes of a job when its engine names a fault, hangs, or is asked to stop; and what the registry hears.

The database, the storage and the supervisor are real. The engine is a script here, because a device cannot be made to
fail on demand; what the real one does is in tests/test_processes.py and tests/test_kills.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from celery import Celery
from sqlalchemy import select, update

from graft import jobs, workers
from graft.db import Database
from graft.errors import ConfigurationError
from graft.jobs import Claim
from graft.models import Adapter, AdapterFile, BlobChunk, Desired, Job, JobEvent, Worker
from graft.recipe import Recipe
from graft.settings import Settings
from graft.storage import DatabaseStorage, Stored
from graft_worker import archive, measure, supervisor
from graft_worker import engine as engine_module
from graft_worker.app import take_nudges
from graft_worker.engine import Engine
from graft_worker.engine_process import EngineLost
from graft_worker.failures import named
from graft_worker.presence import Presence
from graft_worker.supervisor import MOST_SMALLER_PLANS, StallLimit, Supervisor

from ..api import given

Script = Iterable[dict[str, Any] | Callable[[dict[str, Any]], Any]]
SILENCE: dict[str, Any] = {}


class ScriptedEngine:
    """Says what it is told to. A function in the script is called with the spec until it has something to say."""

    def __init__(self, *scripts: Script) -> None:
        self.device: dict[str, Any] | None = None
        self.holds: str | None = None
        self.is_alive = True
        self.measured = threading.Event()
        self.sent: list[str] = []
        self.specs: list[dict[str, Any]] = []
        self._scripts = iter(scripts)
        self._script: list[Any] = []

    def send(self, kind: str, **fields: Any) -> None:
        self.sent.append(kind)
        if kind == "measure":
            self.measured.set()
        if kind == "run":
            self.specs.append(fields["spec"])
            self._script = list(next(self._scripts))

    def receive(self, timeout: float) -> dict[str, Any] | None:
        if not self.is_alive:
            raise EngineLost("the engine ended (signal SIGKILL)")
        if self._script:
            item = self._script[0]
            if said := item(self.specs[-1]) if callable(item) else item:
                self._script.pop(0)
                return dict(said)
        time.sleep(min(timeout, 0.02))
        return None

    def kill(self) -> None:
        self.is_alive = False


class House:
    """One database with a supervisor over it."""

    def __init__(self, database: Database, folder: Path, **settings: Any) -> None:
        self.database = database
        self.storage = DatabaseStorage(database)
        self.settings = Settings(
            data_dir=folder,
            models=given.write_catalogue(folder),
            **{"heartbeat_seconds": 0.1, "lease_seconds": 30.0, "poll_seconds": 0.1, "grace_seconds": 1.0, **settings},
        )
        given.Service.over(database, folder)
        self.supervisor = Supervisor(self.settings, database, self.storage, "worker-1")

    def engine(self, *scripts: Script) -> ScriptedEngine:
        made = ScriptedEngine(*scripts)
        self.supervisor._engine = made  # type: ignore[assignment]
        return made

    def run(self, job_id: str, *scripts: Script) -> ScriptedEngine:
        """One attempt of the job, past its back-off."""
        with self.database.write() as session:
            session.get_one(Job, job_id).not_before = 0.0
        engine = self.engine(*scripts)
        assert self.supervisor.run_next()
        return engine

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def told(self, job_id: str, level: str = "warn") -> list[str]:
        with self.database.read() as session:
            query = select(JobEvent.message).where(JobEvent.job_id == job_id, JobEvent.level == level)
            return list(session.scalars(query.order_by(JobEvent.seq)))

    def with_checkpoint(self, step: int, content: bytes = b"weights") -> str:
        """A queued job that an earlier attempt has brought so far."""
        job_id = given.queued_job(self.database)
        held = given.claim(self.database, job_id)
        self.add_state(held, step, content)
        with self.database.write() as session:
            assert jobs.release(session, held, "it begins")
        return job_id

    def add_state(self, held: Claim, step: int, content: bytes = b"weights") -> None:
        folder = self.settings.data_dir / f"made-{held.job_id}-{step}"
        folder.mkdir()
        (folder / "state").write_bytes(content + str(step).encode())
        state = self.storage.put(archive.stream(folder, name=f"state-{step}", compress=False))
        adapter, _ = given.adapter(self.database, f"{held.job_id}-{step}")
        with self.database.write() as session:
            assert jobs.add_checkpoint(session, held, step=step, metrics={}, state=state, content=adapter, keep=3)


@pytest.fixture
def house(database_url: str, tmp_path: Path) -> Iterator[House]:
    database = Database(database_url)
    database.migrate()
    made = House(database, tmp_path)
    yield made
    made.supervisor.close()
    database.dispose()


def failed(code: str, **fields: Any) -> dict[str, Any]:
    base = {"kind": "failed", "code": code, "message": f"It was {code}.", "param": None}
    return {**base, "passing": False, "needs_bytes": None, **fields}


def began(**fields: Any) -> dict[str, Any]:
    return {"kind": "began", "step": 0, "total_steps": 9, "plan": None, "batching": {}, **fields}


def step(number: int, seconds: float = 0.01) -> dict[str, Any]:
    metrics = {"train_loss": 1.0, "full_valid_loss": None}
    return {"kind": "step_metrics", "step": number, "total_steps": 9, "seconds": seconds, **metrics}


def saved(number: int, content: bytes = b"x", *, wanted: bool = True) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Write a checkpoint as the engine does, and announce it."""

    def write(spec: dict[str, Any]) -> dict[str, Any]:
        folder = Path(spec["work_dir"]) / "checkpoints" / f"step-{number}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(content)
        (folder / "state.json").write_text(json.dumps({"step": number}))
        return {
            "kind": "checkpoint_saved",
            "step": number,
            "path": str(folder),
            "adapter_dir": str(folder / "adapter"),
            "metrics": {},
            "wanted": wanted,
        }

    return write


# -- causes by name --------------------------------------------------------------------------------------------------


def test_out_of_memory_is_tried_again_with_the_next_smaller_plan_and_said(house: House) -> None:
    job_id = given.queued_job(house.database)
    plan = {"micro_batch_tokens": 512, "head_chunk_rows": 128}
    for number in range(1, MOST_SMALLER_PLANS + 1):
        engine = house.run(job_id, [began(plan=plan), step(1), failed("out_of_memory")])
        row = house.job(job_id)
        assert (row.status, row.smaller_plans, row.recoveries) == ("queued", number, 0)
        assert row.plan is None  # without a checkpoint the steps may be cut anew
        assert f"tried again with a smaller plan ({number} of {MOST_SMALLER_PLANS})" in house.told(job_id)[-1]
        assert engine.specs[0]["smaller_plans"] == number - 1
        assert engine.is_alive
    house.run(job_id, [failed("out_of_memory")])
    row = house.job(job_id)
    assert (row.status, row.error_code) == ("failed", "out_of_memory")


def test_after_a_checkpoint_a_smaller_plan_keeps_how_the_steps_are_cut(house: House) -> None:
    job_id = given.queued_job(house.database)
    plan = {"micro_batch_tokens": 512, "head_chunk_rows": 128, "peak_bytes": 1}
    house.run(job_id, [began(plan=plan), step(1), saved(1), failed("out_of_memory")])
    assert house.job(job_id).plan == plan
    engine = house.run(job_id, [failed("no_trainable_tokens")])
    assert engine.specs[0]["first_plan"] == {"micro_batch_tokens": 512, "head_chunk_rows": 128}
    assert engine.specs[0]["resume_from"].endswith("state-1")


def test_a_job_that_outgrew_this_device_waits_for_a_larger_one_and_says_so(house: House) -> None:
    job_id = house.with_checkpoint(3)
    house.supervisor._presence.device_bytes = 1000
    house.run(job_id, [failed("out_of_memory", needs_bytes=2000)])
    row = house.job(job_id)
    assert (row.status, row.needs_bytes, row.smaller_plans) == ("queued", 2000, 0)
    assert not house.supervisor.run_next()
    house.supervisor._presence.device_bytes = 2000
    house.run(job_id, [failed("no_trainable_tokens")])
    # A job that no plan fits and that has done nothing yet ends at once, with what would make it fit.
    fresh = given.queued_job(house.database)
    house.run(fresh, [failed("out_of_memory", needs_bytes=3000)])
    assert (house.job(fresh).status, house.job(fresh).error_code) == ("failed", "out_of_memory")
    # What would fit if somebody else did not hold the memory is tried again.
    fresh = given.queued_job(house.database)
    house.run(fresh, [failed("out_of_memory", needs_bytes=1500)])
    assert (house.job(fresh).status, house.job(fresh).recoveries) == ("queued", 1)


@pytest.mark.parametrize("code", ["disk_full", "device_fault", "base_model_unavailable"])
def test_a_passing_fault_is_tried_again_and_in_the_end_fails_by_its_name(house: House, code: str) -> None:
    job_id = given.queued_job(house.database)
    for number in range(1, house.settings.max_recoveries + 1):
        engine = house.run(job_id, [began(), failed(code, passing=True)])
        assert (house.job(job_id).status, house.job(job_id).recoveries) == ("queued", number)
        assert house.told(job_id)[-1] == f"The job goes back to the queue: It was {code}."
        assert engine.is_alive == (code != "device_fault")  # a lost context is of no more use
    house.run(job_id, [failed(code, passing=True)])
    row = house.job(job_id)
    assert (row.status, row.error_code, row.attempt) == ("failed", code, 2 * house.settings.max_recoveries + 1)


def test_what_another_attempt_would_meet_again_fails_at_once(house: House) -> None:
    job_id = given.queued_job(house.database)
    engine = house.run(job_id, [began(), step(1), failed("non_finite_loss")])
    row = house.job(job_id)
    assert (row.status, row.error_code, row.attempt, row.step) == ("failed", "non_finite_loss", 1, 1)
    assert engine.is_alive


def test_the_machines_own_errors_have_names() -> None:
    class AcceleratorError(RuntimeError):
        """As torch calls it."""

    for error, code in (
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EMFILE, "Too many open files"), "machine_fault"),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), "device_fault"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "device_fault"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
    ):
        found = named(error)
        assert found is not None
        assert (found.code, found.passing) == (code, code != "out_of_memory")
    assert named(RuntimeError("size mismatch")) is None
    assert named(OSError(errno.ENOENT, "No such file")) is None


# -- silence ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_falls_silent_is_killed_and_the_job_recovered(database_url: str, tmp_path: Path) -> None:
    database = Database(database_url)
    database.migrate()
    house = House(database, tmp_path, stall_seconds=0.3)
    job_id = given.queued_job(database)
    started = time.monotonic()
    engine = house.run(job_id, [began(), step(1), saved(1), step(2)])
    assert 0.3 < time.monotonic() - started < 10
    assert not engine.is_alive
    row = house.job(job_id)
    assert (row.status, row.recoveries, row.step) == ("queued", 1, 2)
    assert "the training stalled: no sign of it for " in house.told(job_id)[-1]
    # What it had announced before was stored first.
    with database.read() as session:
        assert [state.step for state in jobs.latest_states(session, job_id)] == [1]
    # A sign of life from inside a long evaluation is enough.
    alive = [lambda _: time.sleep(0.2) or {"kind": "alive"}] * 4
    house.run(job_id, [began(), step(1), *alive, failed("no_trainable_tokens")])
    assert house.job(job_id).error_code == "no_trainable_tokens"
    house.supervisor.close()
    database.dispose()


def test_how_long_silence_may_last_is_learnt_from_the_first_steps() -> None:
    limit = StallLimit(300.0)
    assert limit.seconds == 3600.0  # a large model may take long to load
    for seconds in (50.0, 2.0, 2.0):
        limit.learn(seconds)
    assert limit.seconds == 500.0
    quick = StallLimit(300.0)
    for seconds in (1.0, 0.1, 0.1, 0.1, 0.1, 900.0):  # the last is none of the first
        quick.learn(seconds)
    assert quick.seconds == 300.0


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_restore_gives_way_to_the_one_before_and_to_the_beginning(house: House) -> None:
    job_id = house.with_checkpoint(3)
    held = given.claim(house.database, job_id)
    house.add_state(held, 6)
    with house.database.write() as session:
        assert jobs.release(session, held, "and stops")
    corrupt = [failed("checkpoint_corrupt")]
    engine = house.run(job_id, corrupt, corrupt, [began(), failed("no_trainable_tokens")])
    resumed = [None if spec["resume_from"] is None else Path(spec["resume_from"]).name for spec in engine.specs]
    assert resumed == ["state-6", "state-3", None]
    assert house.told(job_id) == ["It was checkpoint_corrupt. The one before it is used, or the beginning"] * 2
    assert house.job(job_id).attempt == 3  # of which this was one


def test_a_rotten_state_is_noticed_by_its_digest_and_the_one_before_is_used(house: House) -> None:
    job_id = house.with_checkpoint(3)
    held = given.claim(house.database, job_id)
    house.add_state(held, 6, b"these will rot")
    with house.database.write() as session:
        assert jobs.release(session, held, "and stops")
        for chunk in session.scalars(select(BlobChunk)):
            if b"these will rot" in chunk.data:
                chunk.data = chunk.data.replace(b"these will rot", b"these did r0t ")
    engine = house.run(job_id, [failed("no_trainable_tokens")])
    assert engine.specs[0]["resume_from"].endswith("state-3")
    (warning,) = house.told(job_id)
    assert warning.startswith("The checkpoint of step 6 cannot be read (")


class Slow(DatabaseStorage):
    """A store that takes its time, or refuses, for what a test says."""

    def __init__(self, database: Database, before: Callable[[], None]) -> None:
        super().__init__(database)
        self._before = before

    def put(self, pieces: Iterable[bytes]) -> Stored:
        self._before()
        return super().put(pieces)


def test_a_slow_store_holds_up_neither_the_training_nor_its_story(house: House) -> None:
    gate = threading.Event()
    house.supervisor._storage = Slow(house.database, lambda: gate.wait(20) and None)
    job_id = given.queued_job(house.database)

    def told_meanwhile(_: dict[str, Any]) -> dict[str, Any]:
        if house.job(job_id).step < 4:
            return SILENCE
        seen.append(house.job(job_id).step)
        gate.set()
        return {"kind": "stopped", "step": 4, "reason": "that is enough"}

    seen: list[int] = []
    script = [began(), step(1), saved(1), saved(2, wanted=False), saved(3, wanted=False), step(4)]
    house.run(job_id, [*script, told_meanwhile])
    assert seen == [4]
    with house.database.read() as session:
        states = [state.step for state in jobs.latest_states(session, job_id)]
        # In their order; one that only bounds a loss gave way to the next, and the wanted one did not.
        shown = session.scalars(select(Adapter.step).where(Adapter.job_id == job_id)).all()
    assert states == [3, 1]
    assert shown == [1]  # nobody asked for the other one's adapter
    assert house.job(job_id).status == "queued"


def test_a_checkpoint_that_cannot_be_stored_costs_a_warning_and_no_training(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft_worker.uploads.FIRST_PAUSE_SECONDS", 0.001)

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    house.supervisor._storage = Slow(house.database, refuse)
    job_id = given.queued_job(house.database)
    house.run(job_id, [began(), step(1), saved(1), step(2), {"kind": "stopped", "step": 2, "reason": "enough"}])
    row = house.job(job_id)
    assert (row.status, row.recoveries, row.step) == ("queued", 0, 2)
    (warning,) = house.told(job_id)
    assert warning.startswith("The checkpoint of step 1 could not be stored, and the training goes on without it.")
    assert "No space left on device" in warning


def test_steps_that_an_earlier_attempt_told_of_are_not_told_again(house: House) -> None:
    job_id = given.queued_job(house.database)
    house.run(job_id, [began(), step(1), saved(1), step(2), step(3), failed("device_fault", passing=True)])
    house.run(job_id, [began(step=1), step(2), step(3), step(4), failed("no_trainable_tokens")])
    with house.database.read() as session:
        query = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics")
        told = [data["step"] for data in session.scalars(query.order_by(JobEvent.seq)) if data]
    assert told == [1, 2, 3, 4]


def die_at_write(database: Database, moment: int) -> None:
    """SIGKILL this process before (odd) or after (even) a commit."""
    original, count = database.write, 0

    @contextlib.contextmanager
    def write() -> Iterator[Any]:
        nonlocal count
        with original() as session:
            yield session
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    database.write = write  # type: ignore[method-assign]


def test_a_kill_at_any_commit_leaves_no_half_adapter_and_the_job_comes_to_its_end(
    database_url: str, tmp_path: Path
) -> None:
    """Forked supervisors, each killed a little later than the one before, until one gets through."""

    def finished(spec: dict[str, Any]) -> dict[str, Any]:
        folder = Path(spec["work_dir"]) / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"the last weights")
        (folder.parent / "result.csv").write_text("step\n2\n")
        return {
            "kind": "finished",
            "adapter_dir": str(folder),
            "adapter_step": 2,
            "weights": "last",
            "result_csv": str(folder.parent / "result.csv"),
            "steps": 2,
            "stopped_early": False,
            "trained_tokens": 10,
            "seconds": 1.0,
            "initial_valid_loss": None,
            "final_metrics": {},
            "best_metrics": {},
            "measured": {},
        }

    database = Database(database_url)
    database.migrate()
    house = House(database, tmp_path)
    job_id = given.queued_job(database)
    kills = 0
    for moment in range(1, 400, 3):
        database.dispose()
        child = os.fork()
        if child == 0:
            try:
                (tmp_path / str(moment)).mkdir()
                theirs = House(Database(database_url), tmp_path / str(moment), heartbeat_seconds=10.0)
                with theirs.database.write() as session:
                    session.get_one(Job, job_id).not_before = 0.0
                die_at_write(theirs.database, moment)
                theirs.run(job_id, [began(), step(1), saved(1), step(2), finished])
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)  # never back into pytest
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        with database.read() as session:
            for row in session.scalars(select(AdapterFile)):
                assert len(b"".join(house.storage.read(row.sha256))) == row.bytes
            finals = list(session.scalars(select(Adapter).where(Adapter.is_final)))
        job = house.job(job_id)
        assert (len(finals) == 1) == (job.status == "succeeded") == (job.fine_tuned_model is not None)
        if job.status == "succeeded":
            break
        with database.write() as session:
            row = session.get_one(Job, job_id)
            if row.status == "running":
                row.lease_until, row.recoveries = 0.0, 0
                session.flush()
                assert jobs.reap(session, max_recoveries=3) == [job_id]
    assert kills > 5
    assert job.status == "succeeded"
    with database.read() as session:
        told = list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id)))
    assert told.count("The job has successfully completed") == 1
    house.supervisor.close()
    database.dispose()


# -- asked to stop ---------------------------------------------------------------------------------------------------


def test_a_pause_waits_for_the_checkpoint_and_ends_in_paused(house: House) -> None:
    job_id = given.queued_job(house.database)

    def pause(_: dict[str, Any]) -> dict[str, Any]:
        with house.database.write() as session:
            jobs.pause(session, given.CALLER.project_id, job_id)
        return {"kind": "alive"}

    def save_when_told(spec: dict[str, Any]) -> dict[str, Any]:
        return saved(2)(spec) if "stop" in engine.sent else SILENCE

    stopped = {"kind": "stopped", "step": 2, "reason": "pause"}
    engine = house.engine([began(), step(1), step(2), pause, save_when_told, stopped])
    assert house.supervisor.run_next()
    row = house.job(job_id)
    assert (row.status, row.desired, row.recoveries) == ("paused", Desired.PAUSE, 0)
    with house.database.read() as session:
        assert [state.step for state in jobs.latest_states(session, job_id)] == [2]
    assert engine.is_alive  # warm, on a CPU
    with house.database.write() as session:
        jobs.resume(session, given.CALLER.project_id, job_id)
    engine = house.run(job_id, [failed("no_trainable_tokens")])
    assert engine.specs[0]["resume_from"].endswith("state-2")


def test_a_gpu_goes_back_whole_after_a_pause_unless_another_job_takes_it(house: House) -> None:
    house.supervisor._presence.device_bytes = 1000
    for other in (True, False):
        engine = house.engine([failed("no_trainable_tokens")])
        house.supervisor._was_paused = True
        if other:
            given.queued_job(house.database)
        assert house.supervisor.run_next() is other
        assert engine.is_alive is other


# -- whose turn it is ------------------------------------------------------------------------------------------------


def test_a_nudge_wakes_the_worker_for_whose_turn_it_is_and_not_for_the_job_it_names(house: House) -> None:
    young, urgent, old = (given.new_job(house.database) for _ in range(3))
    with house.database.write() as session:
        for job_id, priority, age in ((urgent, 5, 10), (old, 0, 30), (young, 0, 20)):
            assert jobs.queue(session, job_id, Recipe(base_model="tiny"), [])
            session.execute(
                update(Job).where(Job.id == job_id).values(priority=priority, created_at=Job.created_at - age)
            )
    house.engine(*([failed("no_trainable_tokens")] for _ in range(3)))
    take_nudges(Celery(set_as_current=False), house.supervisor).apply(args=[young], throw=True)
    with house.database.read() as session:
        started = select(Job.id).where(Job.started_at.is_not(None)).order_by(Job.started_at)
        assert list(session.scalars(started)) == [urgent, old, young]


# -- the registry ----------------------------------------------------------------------------------------------------


def row_of(house: House, name: str) -> Worker | None:
    with house.database.read() as session:
        return session.get(Worker, name)


def test_the_registry_knows_what_the_worker_has_and_does(house: House) -> None:
    house.supervisor._presence.start()
    row = row_of(house, "worker-1")
    assert row is not None
    assert (row.device_bytes, row.job_id) == (None, None)
    job_id = given.queued_job(house.database)
    seen: list[tuple[str | None, str | None]] = []

    def look(_: dict[str, Any]) -> dict[str, Any]:
        row = row_of(house, "worker-1")
        assert row is not None
        if row.job_id is None:
            return SILENCE
        seen.append((row.job_id, row.base_model))
        return failed("no_trainable_tokens")

    with house.database.write() as session:
        session.get_one(Job, job_id).not_before = 0.0
    engine = house.engine([began(), look])
    engine.device = {"device": "A card", "device_bytes": 7000, "rates": {"gemm": 1.0}}
    assert house.supervisor.run_next()
    assert seen == [(job_id, None)]
    deadline = time.monotonic() + 10
    while (row := row_of(house, "worker-1")) is None or row.job_id or row.base_model is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (row.device, row.device_bytes, row.rates, row.base_model) == ("A card", 7000, {"gemm": 1.0}, "tiny")
    with house.database.read() as session:
        assert [each.id for each in workers.alive(session, 10.0)] == ["worker-1"]
    house.supervisor.close()
    assert row_of(house, "worker-1") is None


def test_with_a_gpu_nothing_is_claimed_before_it_is_measured(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_expects_gpu", lambda _: True)
    engine = house.engine([failed("no_trainable_tokens")])
    engine.device = {"device": "A card", "device_bytes": 1000, "rates": {"gemm": 1.0, "copy": 1.0, "link": 1.0}}
    house.supervisor.start()
    assert engine.sent == ["measure"]
    row = row_of(house, "worker-1")
    assert row is not None
    assert (row.device, row.device_bytes) == ("A card", 1000)
    job_id = given.new_job(house.database)
    with house.database.write() as session:
        assert jobs.queue(session, job_id, Recipe(base_model="tiny"), [], needs_bytes=1001)
    assert not house.supervisor.run_next()
    engine.device = {"device": None, "device_bytes": None, "rates": None}
    with pytest.raises(ConfigurationError, match="The device cuda cannot be used"):
        house.supervisor.start()


def test_a_gpu_that_had_no_kernels_is_described_again_after_the_job_that_built_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands, messages = os.pipe(), os.pipe()
    engine = Engine(commands[0], messages[1], Settings())
    found: dict[str, Any] = {"device": "A card", "device_bytes": 1000, "rates": {"built": 0.0}}

    def one_job(spec: object) -> None:
        if found["rates"]["built"]:
            raise KeyboardInterrupt
        engine._base = SimpleNamespace(device=torch.device("cuda"))
        found["rates"] = {"built": 1.0}

    monkeypatch.setattr(engine_module.TrainingSpec, "from_json", lambda _: None)
    monkeypatch.setattr(measure, "measured", lambda _: found)
    monkeypatch.setattr(engine, "_one_job", one_job)
    monkeypatch.setattr(engine, "_listen", lambda: None)
    for kind in ("measure", "job", "job"):
        engine._todo.put({"kind": kind, "spec": {}})
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    said = [json.loads(line) for line in os.read(messages[0], 10_000).splitlines()]
    os.close(commands[1])
    os.close(messages[0])
    assert [(message["kind"], message["rates"]) for message in said] == [
        ("device", {"built": 0.0}),
        ("device", {"built": 1.0}),
    ]


def test_work_without_steps_is_a_sign_of_life_and_waiting_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "WORKING_SECONDS", 0.02)
    commands, messages = os.pipe(), os.pipe()
    engine = Engine(commands[0], messages[1], Settings())
    readings = iter([0.0, 0.2, 0.4, 5.0, 9.0])
    asked = threading.Event()

    def meter() -> float:
        found = next(readings, None)
        if found is None:
            asked.set()
        return 9.0 if found is None else found

    with engine._working(meter, 1.0):
        assert asked.wait(10)
    os.close(commands[1])
    os.set_blocking(messages[0], False)
    assert os.read(messages[0], 1000) == b'{"kind": "alive"}\n' * 2
    os.close(messages[0])


def test_a_row_that_was_swept_comes_back_with_the_next_beat(house: House) -> None:
    presence = Presence(house.database, "worker-2", beat_seconds=0.05)
    presence.start()
    with house.database.write() as session:
        workers.forget(session, "worker-2")
    deadline = time.monotonic() + 10
    while row_of(house, "worker-2") is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    presence.stop()
    assert row_of(house, "worker-2") is None
