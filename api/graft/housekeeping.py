"""What the service does on its own, in four threads of the API process.

It reads large uploads, validates new jobs, takes jobs back from silent workers, ends those that ran for too long, tells
which jobs no worker can take, forecasts the queue, sends nudges, removes what is expired.
Any number of API processes may run it; each step is a compare-and-set.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import delete, select
from sqlalchemy.exc import OperationalError

from graft import fair_queue, files, jobs, queue, validation, workers
from graft.catalogue import Catalogue
from graft.db import Database
from graft.models import Outbox
from graft.settings import Settings
from graft.storage import Storage, StorageUnavailable

log = logging.getLogger(__name__)

TURN_SECONDS = 5.0
SHORTEST_PAUSE_SECONDS = 0.1
TELL_SECONDS = 15.0
SWEEP_SECONDS = 600.0
SWEEP_AGE_SECONDS = 24 * 3600.0
FORGET_WORKER_SECONDS = 3600.0


class Housekeeping:
    """Start it, `wake` it when there is something new, stop it."""

    def __init__(self, database: Database, storage: Storage, catalogue: Catalogue, settings: Settings) -> None:
        self._db = database
        self._storage = storage
        self._catalogue = catalogue
        self._settings = settings
        self._swept_at = time.monotonic()
        self._told_at = -math.inf
        # Whether the database itself was away, as far as this process knows: at its start it has to ask.
        self._was_away: bool | None = None
        # A broker that hangs holds up its own messages, and no job's validation or recovery.
        # A large dataset takes minutes to read, and a silent worker's job is taken back meanwhile.
        self._turns = Rounds("housekeeping", self.turn)
        self._reading = Rounds("validation", self.validate)
        self._nudges = Rounds("nudges", self.send_nudges)
        self._forecasts = Rounds("forecast", self._make_forecast)
        self.forecast = fair_queue.Forecast(
            database, heartbeat_seconds=settings.heartbeat_seconds, wake=self._forecasts.wake
        )

    def start(self) -> None:
        self._turns.start()
        self._reading.start()
        self._nudges.start()
        self._forecasts.start()

    def wake(self) -> None:
        """There is a new file or job: do not wait for the next turn."""
        self._reading.wake()

    def stop(self) -> None:
        self._turns.stop(timeout=10)
        self._reading.stop(timeout=1)  # what it did not finish is begun again
        self._forecasts.stop(timeout=1)
        self._nudges.stop(timeout=1)  # what it did not send is still in the outbox

    def validate(self) -> None:
        """Read the files that wait for it, then the files of the jobs that do."""
        with self._db.read() as session:
            unread = files.unread(session)
        for file_id in unread:
            with _one_of_many("the file cannot be read", file=file_id):
                files.read(self._db, self._storage, file_id)
        with self._db.read() as session:
            waiting = jobs.waiting_for_validation(session)
        for job_id in waiting:
            with _one_of_many("the job cannot be validated", job=job_id):
                validation.validate(self._db, self._storage, self._catalogue, self._settings, job_id)
        self._nudges.wake()

    def turn(self) -> float | None:
        """Take back the jobs of silent workers, tell which jobs no worker can take, now and then clean up.

        Returns:
            Seconds until a lease ends or a job has run for as long as it may; None if no job runs.
        """
        try:
            with self._db.read() as session:
                overdue = jobs.until_overdue(session)
            if self._was_away is None:
                self._was_away = self._db.came_back(self._settings.lease_seconds)
        except OperationalError:
            self._was_away = True
            raise
        if self._was_away:
            # No worker could beat meanwhile: each gets as long again, and only then counts as silent.
            with self._db.write() as session:
                jobs.spare(session, lease_seconds=self._settings.lease_seconds)
            self._was_away = False
        elif overdue is not None and overdue <= 0:
            with self._db.write() as session:
                jobs.reap(session, max_recoveries=self._settings.max_recoveries)
            self._nudges.wake()
        if time.monotonic() - self._told_at > TELL_SECONDS:
            self._told_at = time.monotonic()
            self._tell_waiting()
        if time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            with self._db.write() as session:
                files.remove_expired(session)
                workers.sweep(session, FORGET_WORKER_SECONDS)
            self._storage.sweep(SWEEP_AGE_SECONDS)
        return overdue

    def _tell_waiting(self) -> None:
        with self._db.read() as session:
            changes = fair_queue.waiting_changes(session, heartbeat_seconds=self._settings.heartbeat_seconds)
        if changes:
            with self._db.write() as session:
                jobs.tell_waiting(session, changes)

    def _make_forecast(self) -> None:
        self.forecast.make()

    def send_nudges(self) -> None:
        """At least once: a row goes only after the broker has taken its message."""
        with self._db.read() as session:
            rows = session.execute(select(Outbox.id, Outbox.job_id).order_by(Outbox.id).limit(1000)).all()
        sent = []
        for row in rows:
            if self._settings.broker_url is not None:
                try:
                    queue.nudge(self._settings.broker_url, row.job_id)
                except (BrokerError, OSError) as error:
                    log.warning("the broker is away, jobs start a little later: %s", error)
                    break
            sent.append(row.id)
        if sent:
            with self._db.write() as session:
                session.execute(delete(Outbox).where(Outbox.id.in_(sent)))


@contextmanager
def _one_of_many(what: str, **names: str) -> Iterator[None]:
    """One that fails must not keep the others waiting."""
    try:
        yield
    except OperationalError:  # it is away for all of them
        raise
    except StorageUnavailable as error:  # other contents may lie in another store
        log.warning("%s, trying again: %s", what, error, extra=names)
    except Exception:
        log.exception(what, extra=names)


class Rounds(threading.Thread):
    """Calls one function every few seconds, and as soon as it is woken. No fault ends it: it serves every job.

    The function may return in how many seconds it wants to be called again, if that is sooner.
    """

    def __init__(self, name: str, once: Callable[[], float | None]) -> None:
        super().__init__(name=name, daemon=True)
        self._once = once
        self._wake = threading.Event()
        self._stopping = False

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout: float) -> None:
        self._stopping = True
        self._wake.set()
        self.join(timeout)

    def run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            pause: float | None = None
            try:
                pause = self._once()
            except OperationalError as error:
                log.warning("the database is away, trying again in %.0f s: %s", TURN_SECONDS, error.orig)
            except StorageUnavailable as error:
                log.warning("%s; trying again in %.0f s", error, TURN_SECONDS)
            except Exception:
                log.exception("%s failed, trying again in %.0f s", self.name, TURN_SECONDS)
            self._wake.wait(TURN_SECONDS if pause is None else min(max(pause, SHORTEST_PAUSE_SECONDS), TURN_SECONDS))
