"""The parent process: claims, stages the inputs, beats the heart, relays metrics, publishes, finishes.

It holds the database and never the device, so that a stuck or dying engine cannot take the job's record with it. Each
function of `graft.jobs` that it calls is fenced by the attempt: once the claim is lost, nothing more can be written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from graft import jobs
from graft.adapters import AdapterContent
from graft.catalogue import load_catalogue
from graft.db import Database, now
from graft.errors import GraftError
from graft.jobs import Claim, Event
from graft.settings import Settings
from graft.storage import PatientStorage, Storage, StorageUnavailable, open_storage, pieces_of, save_to
from graft_worker import archive
from graft_worker.processes import scratch_folder
from graft_worker.spec import TrainingSpec

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.5
RETRY_SECONDS = 1.0

Message = dict[str, Any]


class ClaimLost(Exception):
    """The attempt is not ours any more: cancelled, or given to another worker. Write nothing."""


class EngineLost(Exception):
    """The engine ended without a word."""


class EngineProcess:
    """The child and the two pipes to it. Started with the first job, kept for its warm base model."""

    def __init__(self) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graft_worker.engine", str(theirs_in), str(theirs_out), str(os.getpid())],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # its own process group, so that it can be killed with all it started
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._commands = os.fdopen(ours_out, "w", encoding="utf-8", buffering=1)
        self._messages = os.fdopen(ours_in, "r", encoding="utf-8")
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="engine-messages", daemon=True).start()

    def _listen(self) -> None:
        # Half a line comes from an engine that was killed while it wrote.
        with self._messages, contextlib.suppress(ValueError):
            for line in self._messages:
                self._inbox.put(json.loads(line))
        self._inbox.put(None)

    def send(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; `receive` says so
            self._commands.write(json.dumps({"kind": kind, **fields}) + "\n")

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None if there was none in time. Raises EngineLost when there will be none."""
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            raise EngineLost(f"the engine ended ({self._ending()})")
        return message

    def _ending(self) -> str:
        code = self._process.wait(timeout=10)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the whole process group, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # a command that it did not live to read
            self._commands.close()


class Heart:
    """Beats from its own thread, so that a long upload to storage does not look like death."""

    def __init__(self, database: Database, claim: Claim, settings: Settings) -> None:
        self._db, self._claim, self._settings = database, claim, settings
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        return self._lost.is_set()

    def lose(self) -> None:
        """A write was refused: the claim is gone, whatever the next beat would say."""
        self._lost.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(self._settings.heartbeat_seconds):
            try:
                with self._db.write() as session:
                    if not jobs.beat(session, self._claim, lease_seconds=self._settings.lease_seconds):
                        self._lost.set()
                        return
                heard = time.monotonic()
            except DBAPIError as error:
                log.warning("a beat did not reach the database: %s", error.orig, extra={"job": self._claim.job_id})
                # The reaper gives a lease that ended while the database was away as long again; so do we.
                if time.monotonic() - heard > 2 * self._settings.lease_seconds:
                    self._lost.set()
                    return


class Supervisor:
    """Runs claimed jobs, one at a time. `stop` is set from outside when the worker is to save its work and go."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, name: str) -> None:
        self.name = name
        self.stop = threading.Event()
        self._settings, self._db, self._storage = settings, database, storage
        self._catalogue = load_catalogue(settings.models)
        self._engine: EngineProcess | None = None
        # The kernel ends an engine with the thread that started it, so one that stays starts them all.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-starter")
        self._busy = threading.Lock()

    def leave(self) -> None:
        """Set `stop` from a signal handler, which may have interrupted a thread that holds the event's own lock."""
        threading.Thread(target=self.stop.set, name="leave").start()

    def run_next(self, job_id: str | None = None) -> bool:
        """Claim the named job, or the oldest that is due, and run it to its end. False if there was nothing to run."""
        if self.stop.is_set() or not self._busy.acquire(blocking=False):
            return False
        try:
            with self._db.read() as session:
                if not jobs.is_due(session, job_id):
                    return False
            with self._db.write() as session:
                claim = jobs.claim(session, self.name, lease_seconds=self._settings.lease_seconds, job_id=job_id)
            if claim is None:
                return False
            self._run(claim)
            return True
        finally:
            self._busy.release()

    def close(self) -> None:
        """End the engine, for good."""
        self._end_engine()
        self._starter.shutdown()

    def _end_engine(self) -> None:
        if self._engine is not None:
            self._engine.kill()
            self._engine = None

    # -- one job ------------------------------------------------------------------------------------------------

    def _run(self, claim: Claim) -> None:
        heart = Heart(self._db, claim, self._settings)
        storage = PatientStorage(self._storage, give_up=lambda: heart.is_lost or self.stop.is_set())
        run = Run(claim, self._db, storage, self._settings, heart)
        try:
            with scratch_folder(self._settings.data_dir / "work", f"{claim.job_id}-{claim.attempt}") as work_dir:
                spec = self._stage(run, work_dir)
                try:
                    run.drive(self._warm_engine(), spec, self.stop)
                except BaseException:
                    self._end_engine()  # it is still at work on this job, and in this folder
                    raise
        except ClaimLost:
            log.info("the claim is gone; stopping at once", extra={"job": claim.job_id})
        except EngineLost as lost:
            self._recover(run, str(lost))
        except StorageUnavailable:  # until this worker was told to stop
            text = "The worker stopped while the object store was away; the job goes on from its last checkpoint"
            run.persist(lambda s: jobs.release(s, claim, text))
        except GraftError as error:
            code, message, param = error.code or "internal_error", error.message, error.param
            run.persist(lambda s: jobs.fail(s, claim, code=code, message=message, param=param))
        except Exception as error:
            log.exception("the supervisor failed", extra={"job": claim.job_id})
            self._recover(run, f"{type(error).__name__}: {error}")
        finally:
            heart.stop()

    def _warm_engine(self) -> EngineProcess:
        if self._engine is None or not self._engine.is_alive:
            self._end_engine()
            self._engine = self._starter.submit(EngineProcess).result()
        return self._engine

    def _recover(self, run: Run, cause: str) -> None:
        run.persist(lambda s: jobs.recover(s, run.claim, cause, max_recoveries=self._settings.max_recoveries))

    def _stage(self, run: Run, work_dir: Path) -> TrainingSpec:
        """Bring everything that the engine needs onto this machine's disk."""
        claim = run.claim
        base = self._catalogue.resolve(claim.recipe.base_model)
        return TrainingSpec(
            job_id=claim.job_id,
            recipe=claim.recipe,
            model_source=base.source,
            model_revision=None if base.is_local else base.revision,
            context_length=base.context_length,
            base_model_name=base.id if base.is_local else base.source,
            training_file=run.stage_file(claim.training_file, work_dir / "training.jsonl", "training_file"),
            validation_file=None
            if claim.validation_file is None
            else run.stage_file(claim.validation_file, work_dir / "validation.jsonl", "validation_file"),
            work_dir=work_dir / "train",
            resume_from=run.stage_state(work_dir),
            extras={"fine_tuned_model": claim.model_name},
        )


class Run:
    """One attempt: what it has to say, and how it is written down."""

    def __init__(self, claim: Claim, database: Database, storage: Storage, settings: Settings, heart: Heart) -> None:
        self.claim = claim
        self._db, self._storage, self._settings, self._heart = database, storage, settings, heart
        self._events: list[Event] = []
        self._progress: dict[str, Any] = {}
        self._flushed = 0.0
        self._began: tuple[float, int] | None = None  # when the first step of this attempt ended, and its number

    # -- staging ------------------------------------------------------------------------------------------------

    def stage_file(self, file_id: str, path: Path, param: str) -> Path:
        """A dataset, checked against its digest. Raises GraftError if it was deleted."""
        with self._db.read() as session:
            row = jobs.file_of(session, self.claim.project_id, file_id)
        if row is None:
            raise GraftError(
                f"The file {file_id} was deleted before the job started.", code="file_not_found", param=param
            )
        save_to(self._storage, row.sha256, path)
        return path

    def stage_state(self, work_dir: Path) -> Path | None:
        """The newest training state that reads back whole, or None to begin at the beginning."""
        with self._db.read() as session:
            states = jobs.latest_states(session, self.claim.job_id)
        for state in states:
            assert state.state_sha256 is not None
            tar = work_dir / f"state-{state.step}.tar"
            try:
                save_to(self._storage, state.state_sha256, tar)
                return archive.unpack(tar, work_dir / f"state-{state.step}")
            except (KeyError, OSError) as error:
                self._events.append(
                    Event(
                        f"The checkpoint of step {state.step} cannot be read ({error}); using the one before it",
                        level="warn",
                    )
                )
            finally:
                tar.unlink(missing_ok=True)
        return None

    # -- driving ------------------------------------------------------------------------------------------------

    def drive(self, engine: EngineProcess, spec: TrainingSpec, stop: threading.Event) -> None:
        """Follow the engine from the first message to the job's end.

        Raises:
            ClaimLost: stop at once and write nothing.
            EngineLost: the engine is gone, the job is not.
        """
        engine.send("run", spec=spec.to_json())
        training = False
        leave_by: float | None = None
        while True:
            message = engine.receive(timeout=FLUSH_SECONDS)
            self._require_claim()
            if message is not None:
                training = training or message["kind"] == "data_ready"
                if self._handle(message):
                    return
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush()
            if stop.is_set():
                if leave_by is None:
                    leave_by = time.monotonic() + (self._settings.grace_seconds if training else 0)
                    engine.send("stop", reason="the worker is stopping")
                elif time.monotonic() > leave_by:
                    # It is loading a model, or a step takes longer than the grace: the last checkpoint will have to do.
                    engine.kill()
                    self._flush()
                    self.persist(
                        lambda s: jobs.release(s, self.claim, "The worker stopped; the job goes on with the next one")
                    )
                    return

    def _handle(self, message: Message) -> bool:
        """Take one message in; True if it was the job's last."""
        kind = message["kind"]
        if kind == "log":
            self._events.append(Event(message["message"], level=message["level"], data=message["data"] or None))
        elif kind == "data_ready":
            self._on_data(message)
        elif kind == "step_metrics":
            self._on_step(message)
        elif kind == "checkpoint_saved":
            self._on_checkpoint(message)
        elif kind == "finished":
            self._on_finished(message)
            return True
        elif kind == "stopped":
            self._flush()
            text = f"The worker stopped after step {message['step']}; the job goes on with the next one"
            self.persist(lambda s: jobs.release(s, self.claim, text))
            return True
        elif kind == "failed":
            self._flush()
            failure = {name: message[name] for name in ("code", "message", "param")}
            self.persist(lambda s: jobs.fail(s, self.claim, **failure))
            return True
        elif kind == "crashed":
            log.error("the engine failed:\n%s", message["traceback"], extra={"job": self.claim.job_id})
            self._flush()
            self.persist(
                lambda s: jobs.fail(s, self.claim, code="internal_error", message=message["message"], param=None)
            )
            return True
        return False

    def _on_data(self, message: Message) -> None:
        training = message["training"]
        self._progress["total_steps"] = message["total_steps"]
        self._events.append(
            Event(
                f"Training on {message['num_training_rows']} conversations, {message['trained_tokens_per_epoch']} "
                f"trained of {message['tokens_per_epoch']} tokens an epoch, {message['total_steps']} steps",
                data={"training": training, "validation": message["validation"], "total_steps": message["total_steps"]},
            )
        )

    def _on_step(self, message: Message) -> None:
        step, total = message["step"], message["total_steps"]
        metrics = {name: value for name, value in message.items() if name != "kind" and value is not None}
        text = f"Step {step}/{total}: training loss={message['train_loss']:.2f}"
        if message["full_valid_loss"] is not None:
            text += f", full validation loss={message['full_valid_loss']:.2f}"
        self._events.append(Event(text, type="metrics", data=metrics))
        moment = time.monotonic()
        if self._began is None:
            self._began = (moment - message["seconds"], step - 1)
        began, first = self._began
        # From the wall clock, so that evaluations and checkpoints count in.
        remaining = (moment - began) / (step - first) * (total - step)
        self._progress.update(step=step, total_steps=total, estimated_finish=now() + remaining)

    def _on_checkpoint(self, message: Message) -> None:
        self._flush()
        folder, adapter_dir = Path(message["path"]), Path(message["adapter_dir"])
        step = message["step"]
        tar = folder.with_suffix(".tar")
        archive.pack(folder, tar, name=f"state-{step}", compress=False)
        try:
            state = self._storage.put(pieces_of(tar))
            content = self._store_adapter(adapter_dir)
        finally:
            tar.unlink()
        self._require(
            lambda s: jobs.add_checkpoint(
                s,
                self.claim,
                step=step,
                metrics=message["metrics"],
                state=state,
                content=content,
                keep=self._settings.keep_checkpoints,
            )
        )
        shutil.rmtree(folder, ignore_errors=True)

    def _on_finished(self, message: Message) -> None:
        self._flush()
        content = self._store_adapter(Path(message["adapter_dir"]))
        results = self._storage.put(pieces_of(Path(message["result_csv"])))
        events = []
        if message["initial_valid_loss"] is not None:
            before, after = message["initial_valid_loss"], message["final_metrics"].get("full_valid_loss")
            if after is not None:
                events.append(
                    Event(
                        f"Validation loss: {before:.4f} before training, {after:.4f} after",
                        data={"initial_valid_loss": before, "full_valid_loss": after},
                    )
                )
        if message["stopped_early"]:
            events.append(
                Event(
                    f"Stopped early; the adapter is the best one, of step {message['adapter_step']}",
                    data=message["best_metrics"],
                )
            )
        self._require(
            lambda s: jobs.succeed(
                s,
                self.claim,
                step=message["steps"],
                trained_tokens=message["trained_tokens"],
                content=content,
                results=results,
                events=events,
            )
        )

    def _store_adapter(self, folder: Path) -> AdapterContent:
        tar = folder.with_suffix(".tar.gz")
        archive.pack(folder, tar, name="adapter", compress=True)
        try:
            return AdapterContent(
                archive=self._storage.put(pieces_of(tar)),
                files={
                    path.name: self._storage.put(pieces_of(path)) for path in sorted(folder.iterdir()) if path.is_file()
                },
            )
        finally:
            tar.unlink()

    # -- writing ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write down what has gathered. While the database is away it goes on gathering."""
        if not self._events and not self._progress and time.monotonic() - self._flushed < self._settings.poll_seconds:
            return  # with nothing to say, only often enough to learn in time that the job was cancelled
        self._flushed = time.monotonic()
        events, progress = self._events, self._progress
        try:
            with self._db.write() as session:
                mine = jobs.beat(
                    session, self.claim, lease_seconds=self._settings.lease_seconds, events=events, progress=progress
                )
        except OperationalError as error:
            log.warning(
                "the database is away, %d events wait: %s", len(events), error.orig, extra={"job": self.claim.job_id}
            )
            return
        if not mine:
            self._heart.lose()
            raise ClaimLost
        self._events, self._progress = [], {}

    def persist(self, write: Callable[[Session], bool]) -> bool:
        """Run one transaction, again and again while the database is away and the claim may still be ours."""
        while True:
            try:
                with self._db.write() as session:
                    return write(session)
            except OperationalError as error:
                if self._heart.is_lost:
                    return False
                log.warning("the database is away, trying again: %s", error.orig, extra={"job": self.claim.job_id})
                time.sleep(RETRY_SECONDS)

    def _require(self, write: Callable[[Session], bool]) -> None:
        if not self.persist(write):
            raise ClaimLost

    def _require_claim(self) -> None:
        if self._heart.is_lost:
            raise ClaimLost


@contextlib.contextmanager
def supervisor(settings: Settings, name: str) -> Iterator[Supervisor]:
    """A supervisor over the configured database, closed at the end.

    Raises:
        ConfigurationError: the database is missing, away, or of another version; the catalogue or the object store
            cannot be used.
    """
    database = Database(settings.require_database_url())
    database.require_current()
    made = Supervisor(settings, database, open_storage(settings.storage_url, database), name)
    try:
        yield made
    finally:
        made.close()
        database.dispose()
