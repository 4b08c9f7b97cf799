"""`finetune`: the one task. Celery calls it for each nudge; the worker's own loop every few seconds.

A nudge wakes a worker and no more: what there is to do, and whose turn it is, stands in the database. The job that it
names is not looked for. A free worker would otherwise serve whoever asked last, before those that have waited longer.
"""

from __future__ import annotations

import logging
import threading

from sqlalchemy.exc import OperationalError

from graft.settings import Settings
from graft_worker.supervisor import Supervisor

log = logging.getLogger(__name__)


def finetune(supervisor: Supervisor) -> None:
    """If this worker is free, run what is due, one after the other by their turn, until nothing is."""
    while supervisor.run_next():
        pass


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
