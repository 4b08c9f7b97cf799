"""What the service does on its own, in one thread of the API process: validate new jobs, take jobs back from silent workers,
send nudges, remove what is expired. Any number of API processes may run it; each step is a compare-and-set.
"""

from __future__ import annotations

import logging
import threading
import time

from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import delete, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from graft import files, jobs, queue, resolve
from graft.catalogue import Catalogue
from graft.db import Database
from graft.models import Outbox
from graft.settings import Settings
from graft.storage import Storage

log = logging.getLogger(__name__)

TURN_SECONDS = 5.0
SWEEP_SECONDS = 600.0
SWEEP_AGE_SECONDS = 24 * 3600.0


class Housekeeping:
    """Start it, `wake` it when there is something new, stop it."""

    def __init__(self, database: Database, storage: Storage, catalogue: Catalogue, settings: Settings) -> None:
        self._db = database
        self._storage = storage
        self._catalogue = catalogue
        self._settings = settings
        self._wake = threading.Event()
        self._stopping = False
        self._swept_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is a new job: do not wait for the next turn."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self.turn()
            except OperationalError as error:
                log.warning("the database is away, trying again in %.0f s: %s", TURN_SECONDS, error.orig)
            except SQLAlchemyError:
                log.exception("housekeeping failed, trying again in %.0f s", TURN_SECONDS)
            self._wake.wait(TURN_SECONDS)

    def turn(self) -> None:
        """One round of everything that is due."""
        with self._db.read() as session:
            waiting = jobs.waiting_for_validation(session)
        for job_id in waiting:
            resolve.validate(self._db, self._catalogue, job_id, min_examples=self._settings.min_examples)
        with self._db.read() as session:
            silent = jobs.has_silent(session)
        if silent:
            with self._db.write() as session:
                jobs.reap(session, max_recoveries=self._settings.max_recoveries)
        self._send_nudges()
        if time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            with self._db.write() as session:
                files.remove_expired(session)
            self._storage.sweep(SWEEP_AGE_SECONDS)

    def _send_nudges(self) -> None:
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
