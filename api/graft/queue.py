"""The broker: an address and a task's name. It wakes workers up and is trusted with nothing else.

A nudge holds a job id. Losing one costs a few seconds (idle workers also look in the database), a second one costs
nothing (only one claim wins), so Celery acknowledges early and the broker keeps no results.
"""

from __future__ import annotations

import functools

from celery import Celery

TASK = "graft.finetune"
QUEUE = "graft"


@functools.cache
def celery_app(broker_url: str) -> Celery:
    """The Celery application, as both sides need it."""
    app = Celery("graft", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        task_acks_late=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        # A busy worker leaves the next nudge on the queue, for one that is idle.
        worker_disable_prefetch=True,
        worker_send_task_events=False,
        # A broker that restarts is no reason to stop a training run.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # Nobody asks a worker anything through the broker; what it does stands in the database.
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=4,
        # Without a time limit a publish on a dead connection waits for ever. The visibility timeout is left alone: a
        # message is gone with its acknowledgement, before the job begins, so nothing is ever delivered again.
        broker_transport_options={
            "socket_timeout": 10,
            "socket_connect_timeout": 4,
            "socket_keepalive": True,
            "retry_on_timeout": True,
        },
    )
    return app


def nudge(broker_url: str, job_id: str) -> None:
    """Tell the workers that a job is due. Raises kombu's OperationalError if the broker is away."""
    celery_app(broker_url).send_task(TASK, args=[job_id], retry=False)
