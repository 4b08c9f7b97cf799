"""`finetune(job_id)`: the one task. Celery hands it ids; without a broker the worker's own loop calls it.

The message is a nudge: what there is to do stands in the database, and the claim decides who does it.
"""

from __future__ import annotations

import logging
import threading

from sqlalchemy.exc import OperationalError

from graft.settings import Settings
from graft_worker.supervisor import Supervisor

log = logging.getLogger(__name__)


def finetune(supervisor: Supervisor, job_id: str | None = None) -> None:
    """Run the named job if it is due and this worker is free; then whatever else is due, until nothing is."""
    while supervisor.run_next(job_id):
        job_id = None


def look_for_work(supervisor: Supervisor, settings: Settings) -> None:
    """Ask the database every few seconds until `supervisor.stop`: it repairs lost nudges, and is the embedded mode."""
    away = False
    while not supervisor.stop.is_set():
        try:
            finetune(supervisor)
            away = False
        except OperationalError as error:
            if not away:
                log.warning("the database is away, asking again every %.0f s: %s", settings.poll_seconds, error.orig)
            away = True
        except Exception:  # of one job or one moment; the loop is what brings lost jobs back, and must outlive it
            log.exception("looking for work failed, trying again in %.0f s", settings.poll_seconds)
        supervisor.stop.wait(settings.poll_seconds)


def start_looking(supervisor: Supervisor, settings: Settings) -> threading.Thread:
    """`look_for_work` in a thread of its own."""
    thread = threading.Thread(target=look_for_work, args=(supervisor, settings), name="look-for-work")
    thread.start()
    return thread
