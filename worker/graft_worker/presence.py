"""The worker's row in the registry: written at the start, kept fresh by a beat of its own, removed at the end.

It says what the worker has and does; a job belongs to whoever holds its lease, whatever stands here.
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from graft import workers
from graft.db import Database

log = logging.getLogger(__name__)


class Presence:
    """One worker in the registry. `device_bytes` is what a job's plan may use; None takes any job."""

    def __init__(self, database: Database, name: str, *, beat_seconds: float) -> None:
        self.name = name
        self.device_bytes: int | None = None
        # Set by the supervisor: what its engine holds, and what it runs.
        self.base_model: str | None = None
        self.job_id: str | None = None
        self._db = database
        self._beat_seconds = beat_seconds
        self._device = f"CPU ({platform.machine()})"
        self._rates: Mapping[str, Any] | None = None
        self._is_registered = False
        self._lock = threading.Lock()
        self._stop = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Register, and beat from now on."""
        self.tell()
        self._thread.start()

    def describe(self, *, device: str | None, device_bytes: int | None, rates: Mapping[str, Any] | None) -> None:
        """What was measured, for a new row. Without a name nothing is known, and the row stays as it is."""
        with self._lock:
            if device is None or (device, device_bytes, rates) == (self._device, self.device_bytes, self._rates):
                return
            self._device, self.device_bytes, self._rates = device, device_bytes, rates
            self._is_registered = False
        self._wake.set()

    def does(self, job_id: str | None) -> None:
        """What it runs from now on."""
        self.job_id = job_id
        self._wake.set()

    def tell(self) -> None:
        """Write it down now. While the database is away nothing is lost: the next beat says it again."""
        try:
            with self._lock, self._db.write() as session:
                seen = self._is_registered and workers.see(
                    session, self.name, base_model=self.base_model, job_id=self.job_id
                )
                if not seen:
                    workers.register(
                        session,
                        self.name,
                        device=self._device,
                        device_bytes=self.device_bytes,
                        rates=self._rates,
                    )
                    workers.see(session, self.name, base_model=self.base_model, job_id=self.job_id)
                    self._is_registered = True
        except SQLAlchemyError as error:
            log.warning("the registry of workers was not reached: %s", getattr(error, "orig", None) or error)

    def stop(self) -> None:
        """Leave."""
        self._stop = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            with self._db.write() as session:
                workers.forget(session, self.name)
        except SQLAlchemyError as error:
            log.warning("the registry of workers was not reached: %s", getattr(error, "orig", None) or error)

    def _run(self) -> None:
        while True:
            self._wake.wait(self._beat_seconds)
            if self._stop:
                return
            self._wake.clear()
            self.tell()
