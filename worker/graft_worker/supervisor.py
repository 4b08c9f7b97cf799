"""The parent process: claims, stages the inputs, beats the heart, relays metrics, publishes, finishes.

It holds the database and never the device, so that a stuck or dying engine cannot take the job's record with it. Each
function of `graft.jobs` that it calls is fenced by the attempt: once the claim is lost, nothing more can be written.

What becomes of an attempt that did not finish is decided here (`Supervisor._run`, `Run._on_failed`):

    the claim is gone       the engine is killed and nothing is written: cancelled, past its deadline, or another's job
    asked to stop or pause  a checkpoint, stored, and back into the queue (`release`)
    lost or stalled engine  back into the queue, counted (`recover`); a new engine takes the next job
    passing failures        the same, and when the count is used up the job fails by that name (`failures.PASSING`)
    out of memory           back into the queue for the next smaller plan, counted (`shrink`)
    a rotten checkpoint     the one before, or the beginning, in the same attempt
    anything else           the job fails by its name (`fail`): another attempt would meet it again
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from graft import jobs
from graft.adapters import AdapterContent
from graft.catalogue import load_catalogue
from graft.db import Database
from graft.errors import ConfigurationError, GraftError
from graft.jobs import Claim, Event
from graft.models import Desired, Job
from graft.settings import Settings
from graft.storage import PatientStorage, Storage, StorageUnavailable, open_storage, pieces_of, remade, save_to
from graft_worker import archive
from graft_worker.engine_process import EngineLost, EngineProcess, Message
from graft_worker.failures import named
from graft_worker.presence import Presence
from graft_worker.processes import scratch_folder
from graft_worker.spec import TrainingSpec
from graft_worker.uploads import Uploads

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.5
RETRY_SECONDS = 1.0
# An engine is given so many times the slowest of its first steps, and before the first so many times the least.
STALL_FACTOR, STALL_STEPS, STALL_LOADING = 10.0, 5, 12.0
# Smaller plans that a job may ask for; `graft_worker.planning` has a share of the memory for each.
MOST_SMALLER_PLANS = 2
MEASURE_SECONDS = 300.0

# The database is away, or busy: the same again may work.
AWAY = (OperationalError, InterfaceError, PoolTimeout)


class ClaimLost(Exception):
    """The attempt is not ours any more: cancelled, or given to another worker. Write nothing."""


class Stalled(Exception):
    """The engine runs and does nothing."""


class CheckpointUnusable(Exception):
    """The engine could not restore what it was given to resume from."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A cause with a name, of the engine's or of ours."""

    code: str
    message: str
    param: str | None = None
    passing: bool = False
    needs_bytes: int | None = None


class Heart:
    """Beats from its own thread, so that nothing else that takes long looks like death. Learns what is desired."""

    def __init__(self, database: Database, claim: Claim, settings: Settings) -> None:
        self._db, self._claim, self._settings = database, claim, settings
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._desired = Desired.RUN
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        return self._lost.is_set()

    @property
    def desired(self) -> Desired:
        return self._desired

    def hear(self, answer: Desired | None) -> None:
        """A beat's answer, of this thread or another's. None: the claim is gone, whatever a later one would say."""
        if answer is None:
            self._lost.set()
        else:
            self._desired = answer

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(self._settings.heartbeat_seconds):
            try:
                with self._db.write() as session:
                    self.hear(jobs.beat(session, self._claim, lease_seconds=self._settings.lease_seconds))
                if self.is_lost:
                    return
                heard = time.monotonic()
            except SQLAlchemyError as error:
                log.warning("a beat did not reach the database: %s", _why(error), extra={"job": self._claim.job_id})
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
        self._presence = Presence(database, name, beat_seconds=settings.heartbeat_seconds)
        self._engine: EngineProcess | None = None
        self._measuring: subprocess.Popen[str] | None = None
        self._was_paused = False
        # The kernel ends an engine with the thread that started it, so one that stays starts them all.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-starter")
        self._busy = threading.Lock()

    def start(self) -> None:
        """Enter the registry. With a GPU only when the engine has opened and measured it: no job is claimed that does
        not fit. Without one an idle worker starts no engine: a process that ends again measures the CPU meanwhile.

        Raises:
            ConfigurationError: the GPU cannot be used.
        """
        if _expects_gpu(self._settings):
            engine = self._warm_engine()
            engine.send("measure")
            if not engine.measured.wait(MEASURE_SECONDS) or engine.device is None or engine.device["device"] is None:
                raise ConfigurationError(
                    f"The device {self._settings.device or 'cuda'} cannot be used; the engine's log above says why. "
                    "GRAFT_DEVICE=cpu trains without it."
                )
            self._describe()
        else:
            self._measuring = self._starter.submit(_measure_cpu).result()
            threading.Thread(target=self._learn_rates, args=(self._measuring,), name="measuring", daemon=True).start()
        self._presence.start()

    def leave(self) -> None:
        """Set `stop` from a signal handler, which may have interrupted a thread that holds the event's own lock."""
        threading.Thread(target=self.stop.set, name="leave").start()

    def run_next(self) -> bool:
        """Claim the job whose turn it is, and run it to its end. False if there was none."""
        if self.stop.is_set() or not self._busy.acquire(blocking=False):
            return False
        try:
            self._describe()  # a GPU that was not expected is measured when its first job has ended
            claim = self._claim()
            if claim is None:
                if self._was_paused:
                    self._free_device()
                return False
            self._was_paused = False
            self._presence.does(claim.job_id)
            try:
                self._run(claim)
            finally:
                self._describe()
                self._presence.does(None)
            return True
        finally:
            self._busy.release()

    def _claim(self) -> Claim | None:
        device_bytes = self._presence.device_bytes
        with self._db.read() as session:
            if not jobs.is_due(session, device_bytes=device_bytes):
                return None
        with self._db.write() as session:
            return jobs.claim(
                session,
                self.name,
                lease_seconds=self._settings.lease_seconds,
                device_bytes=device_bytes,
                warm=self._presence.base_model,
            )

    def close(self) -> None:
        """End the engine and leave the registry, for good."""
        self._end_engine()
        if self._measuring is not None:
            self._measuring.kill()
            self._measuring.wait()
        self._starter.shutdown()
        self._presence.stop()

    def _describe(self) -> None:
        """Tell the registry what the engine holds, and what it has measured."""
        engine = self._engine
        self._presence.base_model = None if engine is None else engine.holds
        if engine is not None and engine.device is not None:
            found = engine.device
            self._presence.describe(device=found["device"], device_bytes=found["device_bytes"], rates=found["rates"])

    def _learn_rates(self, measuring: subprocess.Popen[str]) -> None:
        """What the process says of the CPU, for the registry. Without it jobs run as well, and are not estimated."""
        assert measuring.stdout is not None
        with measuring.stdout, contextlib.suppress(ValueError):  # it was ended, or could not do it: its log says why
            self._presence.describe(**json.loads(measuring.stdout.read()))
        measuring.wait()

    def _free_device(self) -> None:
        """After a pause, when no other job wants the device: a GPU goes back whole, a CPU's engine may stay warm."""
        self._was_paused = False
        if self._presence.device_bytes is not None:
            self._end_engine()
            self._describe()

    def _end_engine(self) -> None:
        if self._engine is not None:
            self._engine.kill()
            self._engine = None

    # -- one job ------------------------------------------------------------------------------------------------

    def _run(self, claim: Claim) -> None:
        heart = Heart(self._db, claim, self._settings)
        storage = PatientStorage(self._storage, give_up=lambda: heart.is_lost or self.stop.is_set())
        run = Run(claim, self._db, storage, self._settings, heart, self._presence.device_bytes)
        try:
            with scratch_folder(self._settings.data_dir / "work", f"{claim.job_id}-{claim.attempt}") as work_dir:
                try:
                    self._attempt(run, work_dir)
                except BaseException:
                    self._end_engine()  # it is still at work on this job, and in this folder
                    raise
        except ClaimLost:
            log.info("the claim is gone; stopping at once", extra={"job": claim.job_id})
        except (EngineLost, Stalled) as lost:
            run.recover(Failure("worker_lost", str(lost)))
        except StorageUnavailable:  # until this worker was told to stop
            text = "The worker stopped while the object store was away; the job goes on from its last checkpoint"
            run.persist(lambda s: jobs.release(s, claim, text))
        except GraftError as error:
            run.fail(Failure(error.code or "internal_error", error.message, error.param))
        except Exception as error:
            cause = named(error)
            if cause is not None:
                run.recover(Failure(cause.code, cause.message))
            else:
                log.exception("the supervisor failed", extra={"job": claim.job_id})
                run.recover(Failure("worker_lost", f"{type(error).__name__}: {error}"))
        finally:
            run.close()
            heart.stop()
            self._was_paused = heart.desired is Desired.PAUSE

    def _attempt(self, run: Run, work_dir: Path) -> None:
        """From the staged files to the job's end, or the attempt's."""
        engine = self._warm_engine()  # it imports while the files come
        unusable: set[int] = set()
        while True:
            spec = self._stage(run, work_dir, unusable)
            try:
                run.drive(engine, spec, self.stop)
                if run.engine_is_spent:
                    engine.kill()
                return
            except CheckpointUnusable as error:
                unusable.add(run.resumes_from or 0)
                run.warn(f"{error} The one before it is used, or the beginning")
            except (EngineLost, Stalled):
                engine.kill()
                run.drain()
                raise

    def _warm_engine(self) -> EngineProcess:
        if self._engine is None or not self._engine.is_alive:
            self._end_engine()
            self._engine = self._starter.submit(EngineProcess).result()
        return self._engine

    def _stage(self, run: Run, work_dir: Path, unusable: set[int]) -> TrainingSpec:
        """Bring everything that the engine needs onto this machine's disk."""
        claim = run.claim
        base = self._catalogue.resolve(claim.recipe.base_model)
        names = ("micro_batch_tokens", "head_chunk_rows")
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
            resume_from=run.stage_state(work_dir, unusable),
            token_cache=self._settings.token_cache,
            token_cache_bytes=self._settings.token_cache_bytes,
            checkpoint_seconds=self._settings.checkpoint_seconds,
            checkpoint_steps=self._settings.checkpoint_steps,
            smaller_plans=claim.smaller_plans,
            first_plan=None if claim.plan is None else {name: claim.plan[name] for name in names},
            extras={"fine_tuned_model": claim.model_name},
        )


class Run:
    """One attempt: what it has to say, and how it is written down."""

    def __init__(
        self,
        claim: Claim,
        database: Database,
        storage: Storage,
        settings: Settings,
        heart: Heart,
        device_bytes: int | None = None,
    ) -> None:
        self.claim = claim
        self.resumes_from: int | None = None  # the step of the state that was staged last
        self.engine_is_spent = False  # by a fault that it will not get over
        self._db, self._storage, self._settings, self._heart = database, storage, settings, heart
        self._device_bytes = device_bytes
        self._events: list[Event] = []
        self._progress: dict[str, Any] = {}
        self._gathering = threading.Lock()  # of the two above
        self._writing = threading.Lock()  # so that events come in their order
        self._flushed = 0.0
        self._claimed = time.monotonic()
        self._was_warm = False  # the engine held the base model already
        self._startup_seconds: float | None = None
        self._began: tuple[float, int] | None = None  # when the first step of this attempt ended, and its number
        self._told_step: int | None = None  # up to there earlier attempts have told their story
        self._stall_limit = StallLimit(settings.stall_seconds)
        self._uploads = Uploads(self._store_checkpoint, self._give_up_checkpoint)

    def close(self) -> None:
        self._uploads.close()

    # -- staging ------------------------------------------------------------------------------------------------

    def stage_file(self, file_id: str, path: Path, param: str) -> Path:
        """A dataset, checked against its digest. Raises GraftError if it was deleted."""
        self._require_claim()
        with self._db.read() as session:
            row = jobs.file_of(session, self.claim.project_id, file_id)
        if row is None:
            raise GraftError(
                f"The file {file_id} was deleted before the job started.", code="file_not_found", param=param
            )
        if not path.exists():
            save_to(self._storage, row.sha256, path)
        return path

    def stage_state(self, work_dir: Path, unusable: set[int]) -> Path | None:
        """The newest training state that reads back whole, or None to begin at the beginning."""
        self._require_claim()
        with self._db.read() as session:
            states = [(state.step, state.state_sha256) for state in jobs.latest_states(session, self.claim.job_id)]
            self._told_step = session.scalar(select(Job.step).where(Job.id == self.claim.job_id))
        for step, sha256 in states:
            if step in unusable:
                continue
            assert sha256 is not None
            tar = work_dir / f"state-{step}.tar"
            try:
                save_to(self._storage, sha256, tar)
                found = archive.unpack(tar, work_dir / f"state-{step}")
                self.resumes_from = step
                return found
            except (KeyError, OSError) as error:
                if (cause := named(error)) is not None:  # this machine's fault and not the checkpoint's
                    raise cause from error
                self.warn(f"The checkpoint of step {step} cannot be read ({error}); using the one before it")
            finally:
                tar.unlink(missing_ok=True)
        self.resumes_from = None
        return None

    # -- driving ------------------------------------------------------------------------------------------------

    def drive(self, engine: EngineProcess, spec: TrainingSpec, stop: threading.Event) -> None:
        """Follow the engine from the first message to the job's end.

        Raises:
            ClaimLost: stop at once and write nothing.
            EngineLost: the engine is gone, the job is not.
            Stalled: the engine is there and does nothing.
            CheckpointUnusable: it could not restore the state that it was given.
        """
        self._was_warm = engine.holds == self.claim.recipe.base_model
        if not self._was_warm:
            engine.holds = None
        engine.send("run", spec=spec.to_json())
        leaving: str | None = None  # why, once the engine has been told
        leave_by: float | None = None
        is_training = False
        heard = time.monotonic()
        while True:
            message = engine.receive(timeout=FLUSH_SECONDS)
            self._require_claim()
            if message is not None:
                heard = time.monotonic()
                if message["kind"] == "began":
                    is_training = True
                    engine.holds = self.claim.recipe.base_model
                if self._handle(message, leaving, leave_by):
                    return
            elif (silence := time.monotonic() - heard) > self._stall_limit.seconds:
                raise Stalled(f"the training stalled: no sign of it for {silence:.0f} s")
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush()
            if leaving is None and stop.is_set():
                leaving = "The worker stopped"
                leave_by = time.monotonic() + (self._settings.grace_seconds if is_training else 0)
                engine.send("stop", reason="the worker is stopping")
            elif leaving is None and self._heart.desired is Desired.PAUSE:
                # Nothing hurries it but that the device is wanted: what is not training yet has nothing to save.
                leaving = "The training paused"
                leave_by = None if is_training else time.monotonic()
                engine.send("stop", reason="the job is to pause")
            elif stop.is_set() and leave_by is None:
                leave_by = time.monotonic() + self._settings.grace_seconds
            if leave_by is not None and time.monotonic() > leave_by:
                # It is loading a model, or a step takes longer than the grace: the last checkpoint will have to do.
                engine.kill()
                self._release(f"{leaving}; the job goes on with the next one", until=time.monotonic())
                return

    def _handle(self, message: Message, leaving: str | None, leave_by: float | None) -> bool:
        """Take one message in; True if it was the job's last."""
        kind = message["kind"]
        if kind == "log":
            self._tell(Event(message["message"], level=message["level"], data=message["data"] or None))
        elif kind == "data_ready":
            self._on_data(message)
        elif kind == "began":
            self._startup_seconds = time.monotonic() - self._claimed
            if message["plan"] is not None:
                self._progress_is(plan=message["plan"])
        elif kind == "step_metrics":
            self._on_step(message)
        elif kind == "checkpoint_saved":
            self._uploads.add(message)
        elif kind == "finished":
            self._on_finished(message)
            return True
        elif kind == "stopped":
            self._release(
                f"{leaving or 'The training stopped'} after step {message['step']}; the job goes on with the next one",
                until=leave_by,
            )
            return True
        elif kind == "failed":
            self._on_failed(
                Failure(*(message[name] for name in ("code", "message", "param", "passing", "needs_bytes")))
            )
            return True
        elif kind == "crashed":
            log.error("the engine failed:\n%s", message["traceback"], extra={"job": self.claim.job_id})
            self.drain()
            self.fail(Failure("internal_error", message["message"]))
            return True
        return False

    def _on_data(self, message: Message) -> None:
        self._progress_is(total_steps=message["total_steps"])
        self._tell(
            Event(
                f"Training on {message['num_training_rows']} conversations, {message['trained_tokens_per_epoch']} "
                f"trained of {message['tokens_per_epoch']} tokens an epoch, {message['total_steps']} steps",
                data={
                    "training": message["training"],
                    "validation": message["validation"],
                    "total_steps": message["total_steps"],
                },
            )
        )

    def _on_step(self, message: Message) -> None:
        step, total = message["step"], message["total_steps"]
        moment = time.monotonic()
        self._stall_limit.learn(message["seconds"])
        if self._began is None:
            self._began = (moment - message["seconds"], step - 1)
        began, first = self._began
        # From the wall clock, so that evaluations and checkpoints count in.
        remaining = (moment - began) / (step - first) * (total - step)
        self._progress_is(seconds_left=remaining)
        if self.resumes_from is not None and step <= (self._told_step or 0):
            return  # an earlier attempt has told of it, and it computed the same
        metrics = {name: value for name, value in message.items() if name != "kind" and value is not None}
        text = f"Step {step}/{total}: training loss={message['train_loss']:.2f}"
        if message["full_valid_loss"] is not None:
            text += f", full validation loss={message['full_valid_loss']:.2f}"
        self._tell(Event(text, type="metrics", data=metrics))
        self._progress_is(step=step, total_steps=total)

    def _on_finished(self, message: Message) -> None:
        self.drain()
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
                measured={**self._times(message["seconds"]), **message["measured"]},
            )
        )

    def _times(self, training: float) -> dict[str, Any]:
        """Seconds from the claim to the result, and of them: up to the first step (or evaluation), the training (of all
        attempts), and beside it what checkpoints and the result kept waiting."""
        whole, startup = time.monotonic() - self._claimed, self._startup_seconds or 0.0
        return {
            "seconds": whole,
            "was_warm": self._was_warm,
            "startup_seconds": startup,
            "training_seconds": training,
            "storing_seconds": max(0.0, whole - startup - training),
        }

    # -- an end without a result --------------------------------------------------------------------------------

    def _on_failed(self, failure: Failure) -> None:
        """The engine has named what ended the attempt."""
        if failure.code == "checkpoint_corrupt" and self.resumes_from is not None:
            raise CheckpointUnusable(failure.message)
        self.drain()
        if failure.code == "out_of_memory":
            self._on_out_of_memory(failure)
        elif failure.passing:
            self.engine_is_spent = failure.code in ("device_fault", "machine_fault")
            self.recover(failure)
        else:
            self.fail(failure)

    def _on_out_of_memory(self, failure: Failure) -> None:
        if failure.needs_bytes is not None:
            if self._device_bytes is not None and failure.needs_bytes <= self._device_bytes:
                self.recover(failure)  # somebody else holds the memory now
            elif self._device_bytes is not None and self.resumes_from is not None:
                # The checkpoint's steps are cut for a larger device. It waits for one, and says so.
                self._progress_is(needs_bytes=failure.needs_bytes)
                self._release(f"This worker's device is too small to go on. {failure.message}", until=None)
            else:
                self.fail(failure)  # with what would make it fit
            return
        if not self._has_checkpoint():
            self._progress_is(plan=None)  # how steps are cut may be decided anew
        self._flush_all()
        self.persist(lambda s: jobs.shrink(s, self.claim, failure.message, most=MOST_SMALLER_PLANS))

    def _has_checkpoint(self) -> bool:
        with self._db.read() as session:
            return bool(jobs.latest_states(session, self.claim.job_id))

    def fail(self, failure: Failure) -> None:
        """The job ends by this name."""
        self._flush_all()
        code, message, param = failure.code, failure.message, failure.param
        self.persist(lambda s: jobs.fail(s, self.claim, code=code, message=message, param=param))

    def recover(self, failure: Failure) -> None:
        """Another attempt, unless too many have ended without a new checkpoint: then the job ends by this name."""

        def write(session: Session) -> bool:
            most = self._settings.max_recoveries
            if failure.code != "worker_lost":
                row = session.execute(select(Job.recoveries, Job.desired).where(Job.id == self.claim.job_id)).one()
                if row.recoveries >= most and row.desired == Desired.RUN:
                    message = f"{failure.message} ({row.recoveries + 1} attempts have met it.)"
                    return jobs.fail(session, self.claim, code=failure.code, message=message, param=failure.param)
            return jobs.recover(session, self.claim, failure.message, max_recoveries=most)

        with contextlib.suppress(ClaimLost):
            self._flush_all()
            self.persist(write)

    def _release(self, message: str, *, until: float | None) -> None:
        """Let go of the job when its checkpoints are stored, or when there is no more time to wait for that."""
        if not self.drain(until):
            message += ". There was no time to store its newest checkpoint"
        self._flush_all()
        self.persist(lambda s: jobs.release(s, self.claim, message))

    # -- storing ------------------------------------------------------------------------------------------------

    def drain(self, until: float | None = None) -> bool:
        """Wait until every announced checkpoint is stored or given up; False if the time is over before.

        Raises:
            ClaimLost: there is nothing to wait for any more.
        """
        while not self._uploads.wait(FLUSH_SECONDS / 5):
            self._require_claim()
            if until is not None and time.monotonic() > until:
                return False
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush()
        self._require_claim()
        return True

    def _store_checkpoint(self, message: Message) -> None:
        """In the uploads' thread."""
        folder, step = Path(message["path"]), message["step"]
        state = self._storage.put(remade(lambda: archive.stream(folder, name=f"state-{step}", compress=False)))
        content = self._store_adapter(Path(message["adapter_dir"])) if message["wanted"] else None
        # Whoever resumes from it does not tell again of the steps before.
        if not self._flush_all() or not self.persist(
            lambda s: jobs.add_checkpoint(
                s,
                self.claim,
                step=step,
                metrics=message["metrics"],
                state=state,
                content=content,
                keep=self._settings.keep_checkpoints,
            )
        ):
            self._heart.hear(None)

    def _give_up_checkpoint(self, message: Message, error: Exception) -> None:
        cause = named(error)
        why = f"{type(error).__name__}: {error}" if cause is None else cause.message
        self.warn(
            f"The checkpoint of step {message['step']} could not be stored, and the training goes on without it. {why}",
            code=None if cause is None else cause.code,
        )

    def _store_adapter(self, folder: Path) -> AdapterContent:
        return AdapterContent(
            archive=self._storage.put(remade(lambda: archive.stream(folder, name="adapter", compress=True))),
            files={
                path.name: self._storage.put(pieces_of(path)) for path in sorted(folder.iterdir()) if path.is_file()
            },
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def warn(self, message: str, code: str | None = None) -> None:
        self._tell(Event(message, level="warn", data=None if code is None else {"code": code}))

    def _tell(self, event: Event) -> None:
        with self._gathering:
            self._events.append(event)

    def _progress_is(self, **values: Any) -> None:
        with self._gathering:
            self._progress.update(values)

    def _flush(self) -> bool:
        """Write down what has gathered. While the database is away it goes on gathering; False."""
        with self._writing:
            with self._gathering:
                events, progress = self._events, self._progress
                self._events, self._progress = [], {}
            if not events and not progress and time.monotonic() - self._flushed < self._settings.poll_seconds:
                return True  # with nothing to say, only often enough to learn in time that the job was cancelled
            self._flushed = time.monotonic()
            try:
                with self._db.write() as session:
                    answer = jobs.beat(
                        session,
                        self.claim,
                        lease_seconds=self._settings.lease_seconds,
                        events=events,
                        progress=progress,
                    )
            except AWAY as error:
                with self._gathering:
                    self._events, self._progress = events + self._events, {**progress, **self._progress}
                log.warning(
                    "the database is away, %d events wait: %s",
                    len(events),
                    _why(error),
                    extra={"job": self.claim.job_id},
                )
                return False
        self._heart.hear(answer)
        if answer is None:
            raise ClaimLost
        return True

    def _flush_all(self) -> bool:
        """Write down what has gathered, however long the database is away; False if the claim is lost by then."""
        while not self._heart.is_lost:
            try:
                if self._flush():
                    return True
            except ClaimLost:
                return False
            time.sleep(RETRY_SECONDS)
        return False

    def persist(self, write: Callable[[Session], bool]) -> bool:
        """Run one transaction, again and again while the database is away and the claim may still be ours."""
        while True:
            try:
                with self._db.write() as session:
                    return write(session)
            except AWAY as error:
                if self._heart.is_lost:
                    return False
                log.warning("the database is away, trying again: %s", _why(error), extra={"job": self.claim.job_id})
                time.sleep(RETRY_SECONDS)

    def _require(self, write: Callable[[Session], bool]) -> None:
        if not self.persist(write):
            raise ClaimLost

    def _require_claim(self) -> None:
        if self._heart.is_lost:
            raise ClaimLost


class StallLimit:
    """How long an engine may be silent: learnt from its first steps, and long before them.

    A training says that it moves on after every micro-batch, so that a long evaluation is no silence.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._steps: list[float] = []

    def learn(self, step_seconds: float) -> None:
        """One of the steps; the first few count."""
        if len(self._steps) < STALL_STEPS:
            self._steps.append(step_seconds)

    @property
    def seconds(self) -> float:
        if not self._steps:
            return self._least * STALL_LOADING
        return max(self._least, STALL_FACTOR * max(self._steps))


def _expects_gpu(settings: Settings) -> bool:
    """Whether the engine will want one, as far as can be told without its libraries."""
    if settings.device is not None:
        return settings.device.startswith("cuda")
    return os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def _measure_cpu() -> subprocess.Popen[str]:
    """`graft_worker.measure`, on its way."""
    return subprocess.Popen(
        [sys.executable, "-m", "graft_worker.measure", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C at the terminal is not for it
    )


def _why(error: SQLAlchemyError) -> object:
    return getattr(error, "orig", None) or error


@contextlib.contextmanager
def supervisor(settings: Settings, name: str) -> Iterator[Supervisor]:
    """A supervisor over the configured database, closed at the end.

    Raises:
        ConfigurationError: the database is missing, away, or of another version; the catalogue, the object store or the
            GPU cannot be used.
    """
    database = Database(settings.require_database_url())
    database.require_current()
    made = Supervisor(settings, database, open_storage(settings.storage_url, database), name)
    try:
        made.start()
        yield made
    finally:
        made.close()
        database.dispose()
