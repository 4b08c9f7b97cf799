"""The Celery entry point: a worker that takes nudges from the broker and, when idle, also looks for itself."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from celery import Celery, Task
from celery.platforms import SecurityWarning
from celery.signals import worker_shutting_down

from graft.queue import QUEUE, TASK, celery_app
from graft.settings import Settings
from graft_worker.supervisor import Supervisor
from graft_worker.tasks import finetune, start_looking

log = logging.getLogger(__name__)


def take_nudges(app: Celery, supervisor: Supervisor) -> Task:
    """The task that Celery calls for each nudge."""

    @app.task(name=TASK)
    def nudged(job_id: str) -> None:
        finetune(supervisor)  # whose turn it is, and not whom it names

    task: Task = nudged
    return task


def run_celery(supervisor: Supervisor, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; the running job is saved and goes back to the queue."""
    assert settings.broker_url is not None
    app = celery_app(settings.broker_url)
    # SIGTERM waits for the running task by itself; SIGQUIT, or REMAP_SIGTERM=SIGQUIT, only with this.
    app.conf.worker_soft_shutdown_timeout = settings.grace_seconds + 5

    take_nudges(app, supervisor)

    def stop(**kwargs: Any) -> None:
        supervisor.leave()

    worker_shutting_down.connect(stop)
    # Its lines about a task repeat ours about the job; its warning to root is of pickle, which is not accepted here.
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(max(logging.getLogger().level, logging.WARNING))
    warnings.simplefilter("ignore", SecurityWarning)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # what it will change in its next version
    looking = start_looking(supervisor, settings)
    try:
        # Threads, one of them: training happens in the engine's process, and this one must keep answering the broker.
        worker = app.Worker(
            hostname=f"{supervisor.name}",
            pool="threads",
            concurrency=1,
            queues=[QUEUE],
            loglevel=logging.getLogger().level,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
            redirect_stdouts=False,
        )
        wait = worker.wait_for_soft_shutdown

        def tell_and_wait() -> None:
            supervisor.leave()  # Celery's signal, `stop` above, would come after the waiting
            wait()

        worker.wait_for_soft_shutdown = tell_and_wait
        worker.start()
    finally:
        supervisor.stop.set()
        looking.join()
