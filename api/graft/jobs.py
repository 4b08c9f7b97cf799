r"""The life of a fine-tuning job. The only writer of `Job.status`.

    validating_files -> queued -> running -> succeeded | failed | cancelled
                          ^  \      |
                          |   paused
                          +-----+

What the caller wants of a live job stands in `desired`. A queued job that is to pause is paused at once; a running one
when its worker has saved a checkpoint and let go, and until then it is shown as OpenAI's `pausing`. Every way back
into the queue ends in `paused` instead if that is desired; a job that ends first has ended.

Every change is one compare-and-set (`UPDATE ... WHERE status IN (...) AND attempt = ?`), and the event that tells of it
is written in the same transaction. `attempt` is the fence: it grows when a worker claims the job and when the right to
run is taken away, so a worker that was frozen and wakes up late can change nothing. Functions take the session they
work in; the caller owns the transaction.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Double,
    Integer,
    Row,
    Table,
    Update,
    and_,
    bindparam,
    case,
    func,
    insert,
    inspect,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from graft import adapters, fair_queue, files, tenancy
from graft.adapters import AdapterContent
from graft.db import Prepared, changed, connection_of, has_entry, now
from graft.errors import Conflict, IdempotencyMismatch, InvalidRequest, NotAuthenticated, NotFound
from graft.ids import new_id
from graft.models import (
    LIVE,
    Checkpoint,
    Desired,
    File,
    Job,
    JobEvent,
    JobRequest,
    JobStatus,
    Outbox,
    Project,
)
from graft.paging import Cursor, page
from graft.recipe import Recipe
from graft.schemas import JobCreate
from graft.storage import Stored
from graft.tenancy import Caller

log = logging.getLogger(__name__)

# How long a repeated request without a key still finds the job it made: longer than any SDK goes on retrying.
RETRY_WINDOW_SECONDS = 15 * 60
# After the first loss a job waits so long, after each further one twice as long as before, up to the second.
BACK_OFF_SECONDS = 1.0, 300.0


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's story, before it has a number."""

    message: str
    level: str = "info"
    type: str = "message"
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one attempt of one job.

    `gpu_seconds` were used by the attempts before; `plan` is what one of them wrote down; `smaller_plans` counts how
    often a lack of memory has asked for a smaller one.
    """

    job_id: str
    attempt: int
    project_id: str
    recipe: Recipe
    training_file: str
    validation_file: str | None
    model_name: str
    worker: str
    gpu_seconds: float = 0.0
    smaller_plans: int = 0
    plan: Mapping[str, Any] | None = None


# -- creating -----------------------------------------------------------------------------------------------------


def find_earlier(session: Session, caller: Caller, *, key: str | None, body_sha256: str, is_retry: bool) -> Job | None:
    """The job that the same request made before, if this one is a repetition.

    With an Idempotency-Key the key decides. OpenAI's SDKs send none, yet repeat a POST whose answer was lost; they
    count the repetition in `x-stainless-retry-count`, so a repeated body in the window is taken for the same request.

    Raises:
        IdempotencyMismatch: the key was used with another body.
    """
    query = select(JobRequest).where(JobRequest.project_id == caller.project_id)
    if key is not None:
        query = query.where(JobRequest.key == key)
    elif is_retry:
        query = query.where(
            JobRequest.body_sha256 == body_sha256, JobRequest.created_at > now() - RETRY_WINDOW_SECONDS
        ).order_by(JobRequest.created_at.desc())
    else:
        return None
    earlier = session.scalars(query.limit(1)).one_or_none()
    if earlier is None:
        return None
    if earlier.body_sha256 != body_sha256:
        raise IdempotencyMismatch(
            "This Idempotency-Key was used before with another body. Use a new key for a new job.",
            code="idempotency_mismatch",
        )
    return session.get_one(Job, earlier.job_id)


def create(
    session: Session, caller: Caller, body: JobCreate, *, base_model: str, key: str | None, body_sha256: str
) -> Job:
    """Insert the job, its first event and its request in the caller's transaction.

    Raises:
        InvalidRequest: a file cannot be used (`param` says which).
    """
    for param in ("training_file", "validation_file"):
        file_id = getattr(body, param)
        if file_id is not None:
            files.require_dataset(session, caller.project_id, file_id, param)
    job_id = new_id("ftjob-")
    job = Job(
        id=job_id,
        project_id=caller.project_id,
        model=body.model,
        base_model=base_model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=42 if body.seed is None else body.seed,
        labels=body.metadata,
        request=body.model_dump(mode="json"),
        status=JobStatus.VALIDATING_FILES,
        priority=body.priority,
        max_runtime_seconds=body.max_runtime_seconds,
        created_at=now(),
        last_event=len(told := [Event(f"Created fine-tuning job: {job_id}"), Event("Validating the files")]),
    )
    session.add(job)
    session.flush()
    session.add(
        JobRequest(job_id=job_id, project_id=caller.project_id, key=key, body_sha256=body_sha256, created_at=now())
    )
    session.flush()
    _write_events(session, job_id, 1, told)
    session.refresh(job)
    return job


# -- looking ------------------------------------------------------------------------------------------------------


def get(session: Session, project_id: str, job_id: str, *, lock: bool = False) -> Job:
    """One job of the project; with `lock`, nobody else changes it until the transaction ends. Raises NotFound."""
    job = session.scalar(_GET_LOCKED if lock else _GET, {"job_id": job_id, "project_id": project_id})
    if job is None:
        raise _not_found(job_id)
    return job


# Asked most of all, so made once.
_GET = select(Job).where(Job.id == bindparam("job_id"), Job.project_id == bindparam("project_id"))
_GET_LOCKED = _GET.with_for_update(of=Job)


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"No such fine-tuning job: '{job_id[:64]}'.", code="job_not_found", param="id")


def version(session: Session, authorization: str | None, job_id: str) -> tuple[int, str]:
    """Revision and status of a job of the caller behind an Authorization header: all that a poll needs which finds
    nothing new.

    Raises:
        NotAuthenticated: as `tenancy.authenticate`.
        NotFound: the caller's project has no such job.
    """
    asked = tenancy.asked(authorization) | {"job_id": job_id}
    row = _of_caller(_VERSION(session, asked), job_id)
    return row.rev, row.status


def shown(session: Session, authorization: str | None, job_id: str) -> Row[Any]:
    """One job of the caller behind an Authorization header: what `Job` has, and the `organization_id`.

    Raises:
        NotAuthenticated: as `tenancy.authenticate`.
        NotFound: the caller's project has no such job.
    """
    asked = tenancy.asked(authorization) | {"job_id": job_id}
    return _of_caller(connection_of(session).execute(_SHOWN, asked), job_id)


def _of_caller(found: CursorResult[Any], job_id: str) -> Row[Any]:
    row = found.one_or_none()
    if row is None:
        raise NotAuthenticated
    if row.rev is None:
        raise _not_found(job_id)
    return row


_table = cast(Table, Job.__table__)
_CALLERS = tenancy.CALLER.outerjoin(
    _table, and_(_table.c.id == bindparam("job_id"), _table.c.project_id == cast(Table, Project.__table__).c.id)
)
_VERSION = Prepared(_CALLERS.with_only_columns(_table.c.rev, _table.c.status))
_SHOWN = _CALLERS.with_only_columns(
    cast(Table, Project.__table__).c.organization_id,
    *(attribute.columns[0].label(attribute.key) for attribute in inspect(Job).column_attrs),
)


def list_page(
    session: Session, project_id: str, *, after: str | None, limit: int, labels: Mapping[str, str], unlabelled: bool
) -> tuple[list[Job], bool]:
    """One page of the project's jobs, and whether there are more; `labels` must all match the job's metadata."""
    query = select(Job).where(Job.project_id == project_id)
    for name, value in labels.items():
        query = query.where(has_entry(Job.labels, name, value))
    if unlabelled:
        query = query.where(Job.labels.is_(None))
    cursor = None
    if after is not None:
        last = session.scalar(select(Job).where(Job.id == after, Job.project_id == project_id))
        if last is None:
            raise InvalidRequest(f"after: no such job: '{after[:64]}'.", code="invalid_cursor", param="after")
        cursor = Cursor(last.created_at, last.id)
    return page(session, query, Job, cursor=cursor, limit=limit)


def events_page(session: Session, job: Job, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
    """One page of the job's events, newest first."""
    query = select(JobEvent).where(JobEvent.job_id == job.id)
    if after is not None:
        last = session.scalar(select(JobEvent.seq).where(JobEvent.job_id == job.id, JobEvent.id == after))
        if last is None:
            raise InvalidRequest(f"after: no such event: '{after[:64]}'.", code="invalid_cursor", param="after")
        query = query.where(JobEvent.seq < last)
    rows = list(session.scalars(query.order_by(JobEvent.seq.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def checkpoints_page(session: Session, job: Job, *, after: str | None, limit: int) -> tuple[list[Checkpoint], bool]:
    """One page of the job's checkpoints that have an adapter, newest first."""
    query = select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.model != "")
    if after is not None:
        last = session.scalar(select(Checkpoint.step).where(Checkpoint.job_id == job.id, Checkpoint.id == after))
        if last is None:
            raise InvalidRequest(f"after: no such checkpoint: '{after[:64]}'.", code="invalid_cursor", param="after")
        query = query.where(Checkpoint.step < last)
    rows = list(session.scalars(query.order_by(Checkpoint.step.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def waiting_for_validation(session: Session) -> list[str]:
    """Ids of the jobs whose files have not been read yet, oldest first."""
    return list(
        session.scalars(select(Job.id).where(Job.status == JobStatus.VALIDATING_FILES).order_by(Job.created_at))
    )


def until_overdue(session: Session) -> float | None:
    """Seconds until `reap` has something to do (0 or less: it has); None if no job runs.

    Asked often, and cheaper than taking the write lock to find nothing.
    """
    silent = func.coalesce(Job.lease_until, 0.0) - now()
    late = func.coalesce(Job.max_runtime_seconds - _used(), silent)
    soonest = case((late < silent, late), else_=silent)
    seconds: float | None = session.scalar(select(func.min(soonest)).where(Job.status == JobStatus.RUNNING))
    return seconds


# -- transitions by the API ---------------------------------------------------------------------------------------


def queue(
    session: Session,
    job_id: str,
    recipe: Recipe,
    events: Sequence[Event],
    *,
    audit: Mapping[str, Any] | None = None,
    estimate: Mapping[str, Any] | None = None,
    needs_bytes: int | None = None,
) -> bool:
    """validating_files -> queued (or paused), with the recipe that every attempt will train from.

    Args:
        audit: what the files would teach.
        estimate: what is predicted; its `seconds` is how long the training will take.
        needs_bytes: device memory without which no plan fits; None: any worker may take the job.
    """
    status = _move(
        session,
        job_id,
        (JobStatus.VALIDATING_FILES,),
        _waiting(),
        recipe=recipe.to_json(),
        audit=audit,
        estimate=estimate,
        needs_bytes=needs_bytes,
    )
    if status is None:
        return False
    _tell(session, job_id, events)
    _tell_waiting(session, job_id, status, Event("Files validated, moving job to queued state"))
    return True


def reject(
    session: Session,
    job_id: str,
    *,
    code: str,
    message: str,
    param: str | None,
    audit: Mapping[str, Any] | None = None,
) -> bool:
    """validating_files -> failed: the files cannot be trained on."""
    failure = _failure(code, message, param)
    if not _move(
        session,
        job_id,
        (JobStatus.VALIDATING_FILES,),
        JobStatus.FAILED,
        **failure,
        audit=audit,
        finished_at=now(),
    ):
        return False
    _tell(session, job_id, [_failed(code, message, param)])
    return True


def cancel(session: Session, project_id: str, job_id: str, *, is_retry: bool = False) -> Job:
    """Any live status -> cancelled, at once; the growing attempt shuts out the worker that may still be running it.

    With `is_retry` the answer to the same request may have been lost: what it has done already is no conflict.

    Raises:
        NotFound: no such job.
        Conflict: the job has already ended.
    """
    job = get(session, project_id, job_id, lock=True)
    if is_retry and job.status == JobStatus.CANCELLED:
        return job
    _require_live(job)
    told = Event("Fine-tuning job cancelled", level="warn")
    if job.status == JobStatus.RUNNING:
        _leave(session, job.id, JobStatus.CANCELLED, [told], fence=job.attempt, attempt=job.attempt + 1)
    else:
        end: dict[str, Any] = {"attempt": Job.attempt + 1, "finished_at": now(), "waiting_for": None}
        _move(session, job.id, (JobStatus(job.status),), JobStatus.CANCELLED, **end)
        _tell(session, job.id, [told])
    _give_up_states(session, job.id)
    session.refresh(job)
    return job


def pause(session: Session, project_id: str, job_id: str, *, is_retry: bool = False) -> Job:
    """queued -> paused. A running job is paused by its worker, after a checkpoint; one in validation, after that.

    Raises:
        NotFound: no such job.
        Conflict: the job has ended, is paused, or is about to be (unless `is_retry`, as in `cancel`).
    """
    job = get(session, project_id, job_id, lock=True)
    _require_live(job)
    if is_retry and job.desired == Desired.PAUSE:
        return job
    if job.desired == Desired.PAUSE:
        state = "paused already" if job.status == JobStatus.PAUSED else "about to be paused"
        raise Conflict(f"The job {job.id} is {state}.", code="job_paused", param="id")
    if job.status == JobStatus.QUEUED:
        told = PAUSED
        _move(session, job.id, (JobStatus.QUEUED,), JobStatus.PAUSED, desired=Desired.PAUSE, waiting_for=None)
    else:
        told = Event("Pausing the job")
        _move(session, job.id, (JobStatus(job.status),), JobStatus(job.status), desired=Desired.PAUSE)
    _tell(session, job.id, [told])
    session.refresh(job)
    return job


def resume(session: Session, project_id: str, job_id: str, *, is_retry: bool = False) -> Job:
    """paused -> queued, with its place by age. A pause that is still on its way is taken back.

    Raises:
        NotFound: no such job.
        Conflict: the job has ended, or was not paused (unless `is_retry`, as in `cancel`).
    """
    job = get(session, project_id, job_id, lock=True)
    _require_live(job)
    if is_retry and job.desired == Desired.RUN:
        return job
    if job.desired == Desired.RUN:
        raise Conflict(f"The job {job.id} is not paused: it is {job.status}.", code="job_not_paused", param="id")
    if job.status == JobStatus.PAUSED:
        told = Event("Fine-tuning job resumed, moving it to queued state")
        _move(session, job.id, (JobStatus.PAUSED,), JobStatus.QUEUED, desired=Desired.RUN)
        _nudge(session, job.id)
    else:
        told = Event("Fine-tuning job resumed before it was paused")
        _move(session, job.id, (JobStatus(job.status),), JobStatus(job.status), desired=Desired.RUN)
    _tell(session, job.id, [told])
    session.refresh(job)
    return job


def reap(session: Session, *, max_recoveries: int) -> list[str]:
    """Take jobs away from workers that were silent for a whole lease, and end those that ran for too long.

    running -> queued or paused, or -> failed with `worker_lost` or `deadline_exceeded`; returns their ids.
    """
    late = func.coalesce(_used() > Job.max_runtime_seconds, False)
    silent = func.coalesce(Job.lease_until, 0.0) < now()
    query = (
        select(Job, late)
        .where(Job.status == JobStatus.RUNNING, or_(silent, late))
        # By project: two that reap at once charge the projects in one order, and so never wait for each other.
        .order_by(Job.project_id, Job.id)
        .with_for_update(skip_locked=True, of=Job)
        .execution_options(populate_existing=True)
    )
    return [
        job.id
        for job, is_late in session.execute(query).all()
        if (_end_of_time(session, job) if is_late else _recover(session, job, "its worker went silent", max_recoveries))
    ]


def spare(session: Session, *, lease_seconds: float) -> int:
    """Give every lease that is over as long again: the database itself was away, and no worker could beat."""
    silent = update(Job).where(Job.status == JobStatus.RUNNING, Job.lease_until < now())
    return changed(session, silent.values(lease_until=now() + lease_seconds))


def tell_waiting(session: Session, changes: Mapping[str, str | None]) -> None:
    """Write down which queued jobs no worker can take, and tell it once (`fair_queue.waiting_changes` finds them)."""
    for job_id, sentence in sorted(changes.items()):  # in one order, so that two processes never wait for each other
        queued = update(Job).where(Job.id == job_id, Job.status == JobStatus.QUEUED)
        values = {"waiting_for": sentence, "rev": Job.rev + 1}
        if sentence is not None and changed(session, queued.where(Job.waiting_for.is_(None)).values(values)) == 1:
            _tell(session, job_id, [Event(sentence, level="warn")])
        else:  # it can run again, or the sentence names another worker now: nothing to tell again
            changed(session, queued.where(Job.waiting_for.is_not(None)).values(values))


# -- transitions by a worker --------------------------------------------------------------------------------------


def is_due(session: Session, job_id: str | None = None, *, device_bytes: int | None = None) -> bool:
    """Whether a claim could succeed: asked often by idle workers, and cheaper than the write lock."""
    return fair_queue.whose_turn(session, device_bytes=device_bytes, job_id=job_id) is not None


def claim(
    session: Session,
    worker: str,
    *,
    lease_seconds: float,
    job_id: str | None = None,
    device_bytes: int | None = None,
    warm: str | None = None,
) -> Claim | None:
    """queued -> running for the job whose turn it is; None if there is none, or no longer.

    Args:
        job_id: this job or none, whoever's turn it is.
        device_bytes: the memory that the worker has for a job; None takes any.
        warm: the base model that the worker's engine holds already.
    """
    job = fair_queue.take(session, device_bytes=device_bytes, warm=warm, job_id=job_id)
    if job is None:
        return None
    first = job.started_at is None
    asked = {"job_id": job.id, "fence": job.attempt, "owner": worker, "lease": lease_seconds}
    taken = connection_of(session).execute(_CLAIM, asked).one_or_none()
    if taken is None:
        return None
    told = f"Fine-tuning job {'started' if first else 'taken up again'}"
    _write_events(session, job.id, taken.last_event, [Event(told)])
    assert taken.recipe is not None, "a queued job has a recipe"
    return Claim(
        job_id=job.id,
        attempt=taken.attempt,
        project_id=taken.project_id,
        recipe=Recipe.from_json(taken.recipe),
        training_file=taken.training_file,
        validation_file=taken.validation_file,
        # OpenAI's form; the same for every attempt.
        model_name=f"ft:{taken.base_model}:{job.organization}:{(taken.suffix or '').replace(' ', '-')}:{job.id[-8:]}",
        worker=worker,
        gpu_seconds=taken.gpu_seconds,
        smaller_plans=taken.smaller_plans,
        plan=taken.plan,
    )


def beat(
    session: Session,
    held: Claim,
    *,
    lease_seconds: float,
    events: Sequence[Event] = (),
    progress: Mapping[str, Any] | None = None,
) -> Desired | None:
    """Prove life, extend the lease, and write down what happened since.

    Args:
        progress: new values of step, total_steps, trained_tokens, plan, measured, needs_bytes, and `seconds_left`, from
            which `estimated_finish` follows.

    Returns:
        What the caller wants of the job: with `Desired.PAUSE`, save a checkpoint and `release` it. None: the right to
        run is gone, stop at once.
    """
    progress = progress or {}
    asked = {"job_id": held.job_id, "fence": held.attempt, "lease": lease_seconds, "told": len(events)}
    row = _one(session, _beaten(frozenset(progress)), {**asked, **_new(progress)})
    if row is None:
        return None
    _write_events(session, held.job_id, row.last_event - len(events) + 1, events)
    return Desired(row.desired)


def add_checkpoint(
    session: Session,
    held: Claim,
    *,
    step: int,
    metrics: Mapping[str, Any],
    state: Stored,
    content: AdapterContent | None,
    keep: int,
) -> bool:
    """Make a checkpoint visible: its state can be resumed from, its adapter can be downloaded. False: fenced off.

    Without `content` it only bounds what can be lost: it is not listed, and nothing of it outlives its state. Old
    training states are given up, but for the last `keep` and the one with the best validation loss.
    """
    if changed(session, _fenced(held).values(attempt=held.attempt)) != 1:
        return False
    row = session.scalar(select(Checkpoint).where(Checkpoint.job_id == held.job_id, Checkpoint.step == step))
    if row is None:
        changed(session, _fenced(held).values(recoveries=0))  # real progress: the count of losses starts again
        row = Checkpoint(
            id=new_id("ftckpt_"),
            job_id=held.job_id,
            step=step,
            attempt=held.attempt,
            model="",
            metrics=dict(metrics),
            state_sha256=state.sha256,
            created_at=now(),
        )
        session.add(row)
        if content is None:
            _tell(session, held.job_id, [Event(f"Training state saved at step {step}", data={"step": step})])
    else:
        # The run came this far before. That state may be why it had to come here again: it could not be read. An
        # adapter that was shown stays, with its metrics; the evaluation may have been still to come.
        row.state_sha256 = state.sha256
        row.metrics = {**metrics, **{name: value for name, value in row.metrics.items() if value is not None}}
    if content is not None and not row.model:
        name = row.model = f"{held.model_name}:ckpt-step-{step}"
        row.attempt, row.metrics = held.attempt, dict(metrics)
        base = held.recipe.base_model
        adapters.create(session, held.project_id, held.job_id, name, base, step, content, is_final=False)
        _tell(session, held.job_id, [Event(f"Checkpoint created at step {step}", data={"step": step, "model": name})])
    session.flush()
    _give_up_old_states(session, held.job_id, keep)
    return True


def latest_states(session: Session, job_id: str) -> list[Checkpoint]:
    """The checkpoints that can be resumed from, newest first."""
    return list(
        session.scalars(
            select(Checkpoint)
            .where(Checkpoint.job_id == job_id, Checkpoint.state_sha256.is_not(None))
            .order_by(Checkpoint.step.desc())
        )
    )


def succeed(
    session: Session,
    held: Claim,
    *,
    step: int,
    trained_tokens: int,
    content: AdapterContent,
    results: Stored,
    events: Sequence[Event],
    measured: Mapping[str, Any] | None = None,
) -> bool:
    """running -> succeeded: adapter, result file and status become visible together. False: fenced off.

    A pause that was asked for while the last step ran comes too late.
    """
    told = [
        *events,
        Event(f"New fine-tuned model created: {held.model_name}"),
        Event("The job has successfully completed"),
    ]
    adapter_id, result_file = new_id("adapter-"), new_id("file-")
    if not _leave(
        session,
        held.job_id,
        JobStatus.SUCCEEDED,
        told,
        fence=held.attempt,
        step=step,
        trained_tokens=trained_tokens,
        fine_tuned_model=held.model_name,
        adapter_id=adapter_id,
        result_file=result_file,
        **({} if measured is None else {"measured": dict(measured)}),
    ):
        return False
    project, base = held.project_id, held.recipe.base_model
    adapters.create(
        session, project, held.job_id, held.model_name, base, step, content, is_final=True, adapter_id=adapter_id
    )
    files.add_results(session, project, result_file, results, filename="step_metrics.csv")
    _give_up_states(session, held.job_id)
    return True


def fail(session: Session, held: Claim, *, code: str, message: str, param: str | None) -> bool:
    """running -> failed, for a cause that another attempt would meet again. False: fenced off."""
    failure = _failure(code, message, param)
    told = [_failed(code, message, param)]
    if not _leave(session, held.job_id, JobStatus.FAILED, told, fence=held.attempt, **failure):
        return False
    _give_up_states(session, held.job_id)
    return True


def release(session: Session, held: Claim, message: str) -> bool:
    """running -> queued, or paused if that is desired: the worker has saved its work and lets go. False: fenced off."""
    status = _leave(session, held.job_id, None, fence=held.attempt)
    if status is None:
        return False
    _tell_waiting(session, held.job_id, status, Event(message))
    return True


def shrink(session: Session, held: Claim, message: str, *, most: int) -> bool:
    """running -> queued (or paused), to be tried again with the next smaller plan: the device's memory ran out.

    After `most` smaller plans the job fails with `out_of_memory` and the message. False: fenced off.
    """
    if held.smaller_plans >= most:
        return fail(session, held, code="out_of_memory", message=message, param=None)
    number = held.smaller_plans + 1
    status = _leave(session, held.job_id, None, fence=held.attempt, smaller_plans=number)
    if status is None:
        return False
    told = Event(f"{message} The job is tried again with a smaller plan ({number} of {most})", level="warn")
    _tell_waiting(session, held.job_id, status, told, always=True)
    return True


def recover(session: Session, held: Claim, cause: str, *, max_recoveries: int) -> bool:
    """running -> queued, paused or failed: the engine was lost under a living worker. False: fenced off."""
    running = select(Job).where(Job.id == held.job_id, Job.status == JobStatus.RUNNING, Job.attempt == held.attempt)
    job = session.scalar(running.with_for_update().execution_options(populate_existing=True))
    return job is not None and _recover(session, job, cause, max_recoveries)


# -- inside -------------------------------------------------------------------------------------------------------

PAUSED = Event("Fine-tuning job paused")


def _require_live(job: Job) -> None:
    if job.status not in LIVE:
        raise Conflict(f"The job {job.id} has already ended: it is {job.status}.", code="job_terminal", param="id")


def _fenced(held: Claim) -> Update:
    """An UPDATE that only the holder of the current attempt can make."""
    return update(Job).where(Job.id == held.job_id, Job.attempt == held.attempt, Job.status == JobStatus.RUNNING)


def _waiting() -> ColumnElement[str]:
    """Where a job waits that could run: in the queue, unless its caller has paused it."""
    return case((_table.c.desired == Desired.PAUSE, JobStatus.PAUSED.value), else_=JobStatus.QUEUED.value)


def _held_until() -> ColumnElement[float]:
    """When the running attempt ends if it ends now. The lease bounds it: a worker that is silent after its end may have
    been dead for long. So does its beginning: the database's clock may have been set back."""
    began = func.coalesce(_table.c.held_since, now())
    ends = case((_table.c.lease_until < now(), _table.c.lease_until), else_=now())
    return case((ends < began, began), else_=ends)


def _used() -> ColumnElement[float]:
    """GPU-seconds of all attempts, the running one included."""
    return _table.c.gpu_seconds + _held_until() - func.coalesce(_table.c.held_since, now())


# Statements that workers send all the time are of the table, and made once. Making one anew, and holding it against
# what the session has loaded, took nearly three times as long as PostgreSQL took to answer it. So the session does not
# learn what they change: whoever has loaded the job reads it again.


def _one(session: Session, statement: Prepared, asked: Mapping[str, Any]) -> Row[Any] | None:
    """The row that a prepared statement returns, in the session's transaction."""
    return statement(session, asked).one_or_none()


def _new(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of columns, by the names that a statement made by `_columns` gives them."""
    return {f"new_{name}": value for name, value in values.items()}


def _columns(names: frozenset[str]) -> dict[str, ColumnElement[Any]]:
    return {name: bindparam(f"new_{name}", type_=_table.c[name].type) for name in sorted(names)}


_JOB = _table.c.id == bindparam("job_id")
_HELD = and_(_JOB, _table.c.status == JobStatus.RUNNING, _table.c.attempt == bindparam("fence"))
_UNTIL = now() + bindparam("lease", type_=Double())

# Not `Prepared`, for it returns JSON.
_CLAIM = (
    update(_table)
    .where(_JOB, _table.c.status == JobStatus.QUEUED, _table.c.attempt == bindparam("fence"))
    .values(
        status=JobStatus.RUNNING,
        rev=_table.c.rev + 1,
        attempt=_table.c.attempt + 1,
        lease_owner=bindparam("owner"),
        lease_until=_UNTIL,
        held_since=now(),
        held_until=None,
        waiting_for=None,
        started_at=func.coalesce(_table.c.started_at, now()),
        last_event=_table.c.last_event + 1,
    )
    .returning(
        *(_table.c[name] for name in ("attempt", "last_event", "project_id", "recipe", "base_model", "suffix")),
        *(_table.c[name] for name in ("training_file", "validation_file", "gpu_seconds", "smaller_plans", "plan")),
    )
)


@functools.cache
def _beaten(names: frozenset[str]) -> Prepared:
    """A sign of life, with new values of these columns."""
    values: dict[str, Any] = _columns(names - {"seconds_left"})
    if names:
        values["rev"] = _table.c.rev + 1
    if "step" in names:
        values["progress_at"] = now()
    if "seconds_left" in names:
        values["estimated_finish"] = now() + bindparam("new_seconds_left", type_=Double())
    values |= {"lease_until": _UNTIL, "last_event": _table.c.last_event + bindparam("told", type_=Integer())}
    return Prepared(update(_table).where(_HELD).values(values).returning(_table.c.desired, _table.c.last_event))


@functools.cache
def _left(waits: bool, names: frozenset[str]) -> Prepared:
    """The end of an attempt: to where it waits, or for good; with new values of these columns."""
    values: dict[str, Any] = _columns(names - {"pause"})
    if "pause" in names:
        values["not_before"] = now() + bindparam("new_pause", type_=Double())
    values |= {
        "status": _waiting() if waits else bindparam("to"),
        "rev": _table.c.rev + 1,
        "lease_until": None,
        "estimated_finish": None,
        "held_until": _held_until(),
        "gpu_seconds": _used(),
        "last_event": _table.c.last_event + bindparam("told", type_=Integer()),
    }
    if not waits:
        values["finished_at"] = now()
    seconds = (_table.c.held_until - _table.c.held_since).label("seconds")
    answer = _table.c.status, _table.c.project_id, _table.c.last_event, seconds
    return Prepared(update(_table).where(_HELD).values(values).returning(*answer))


_TOLD = Prepared(
    update(_table)
    .where(_JOB)
    .values(last_event=_table.c.last_event + bindparam("told", type_=Integer()))
    .returning(_table.c.last_event)
)
# All in one statement, although the clock is the database's.
_EVENTS = Prepared(insert(cast(Table, JobEvent.__table__)).values(created_at=now()))

_states = cast(Table, Checkpoint.__table__)
_GIVEN_UP = Prepared(
    update(_states)
    .where(_states.c.job_id == bindparam("of_job"), _states.c.state_sha256.is_not(None))
    .values(state_sha256=None)
)


def _move(
    session: Session,
    job_id: str,
    origin: Sequence[JobStatus],
    to: JobStatus | ColumnElement[str],
    *,
    fence: int | None = None,
    **values: Any,
) -> JobStatus | None:
    """The compare-and-set that every transition is made of: the new status, or None if it was not ours to make."""
    where = [Job.id == job_id, Job.status.in_(origin)]
    if fence is not None:
        where.append(Job.attempt == fence)
    moved = update(Job).where(*where).values(status=to, rev=Job.rev + 1, **values)
    status = session.execute(moved.returning(Job.status)).scalar()
    return None if status is None else JobStatus(status)


def _leave(
    session: Session, job_id: str, to: JobStatus | None, told: Sequence[Event] = (), *, fence: int, **values: Any
) -> JobStatus | None:
    """running -> an end, or (None) to where the job waits: the attempt ends, and its GPU-seconds are counted.

    Args:
        told: what is told of it, if that does not depend on where the job waits.
        values: of columns; `pause` is how many seconds nobody may take the job.
    """
    asked = {"job_id": job_id, "fence": fence, "told": len(told), **({} if to is None else {"to": to})}
    row = _one(session, _left(to is None, frozenset(values)), {**asked, **_new(values)})
    if row is None:
        return None
    fair_queue.charge(session, row.project_id, row.seconds or 0.0)
    _write_events(session, job_id, row.last_event - len(told) + 1, told)
    return JobStatus(row.status)


def _tell_waiting(session: Session, job_id: str, status: JobStatus, queued: Event, *, always: bool = False) -> None:
    """Tell that the job waits: with the event if it is in the queue (or in any case), and that it is paused if so."""
    if status is JobStatus.QUEUED:
        _tell(session, job_id, [queued])
        _nudge(session, job_id)
    else:
        _tell(session, job_id, [queued, PAUSED] if always else [PAUSED])


def _recover(session: Session, job: Job, cause: str, max_recoveries: int) -> bool:
    """Of a job that is locked: as often as `max_recoveries` without a new checkpoint, and then no more."""
    if job.recoveries >= max_recoveries and job.desired == Desired.RUN:
        message = f"The job lost its worker {job.recoveries + 1} times without reaching a new checkpoint ({cause})."
        return _end(session, job, "worker_lost", message)
    first, most = BACK_OFF_SECONDS
    status = _leave(
        session,
        job.id,
        None,
        fence=job.attempt,
        attempt=job.attempt + 1,
        recoveries=job.recoveries + 1,
        pause=min(first * 2.0 ** min(job.recoveries, 30), most),
    )
    if status is None:
        return False
    told = Event(f"The job goes back to the queue: {cause}", level="warn")
    if status is JobStatus.PAUSED:
        told = Event(f"The job was interrupted: {cause}", level="warn")
    _tell_waiting(session, job.id, status, told, always=True)
    return True


def _end_of_time(session: Session, job: Job) -> bool:
    """Of a job that is locked: running -> failed, because it has run for longer than its caller allows."""
    message = f"The job has run for longer than its max_runtime_seconds of {job.max_runtime_seconds:g}."
    return _end(session, job, "deadline_exceeded", message)


def _end(session: Session, job: Job, code: str, message: str) -> bool:
    """running -> failed, and whoever runs it is shut out."""
    failure = _failure(code, message, None)
    told = [_failed(code, message, None)]
    if not _leave(session, job.id, JobStatus.FAILED, told, fence=job.attempt, attempt=job.attempt + 1, **failure):
        return False
    _give_up_states(session, job.id)
    return True


def _give_up_states(session: Session, job_id: str) -> None:
    """Of a job that has ended: nothing will be resumed any more."""
    _GIVEN_UP(session, {"of_job": job_id})


def _give_up_old_states(session: Session, job_id: str, keep: int) -> None:
    states = latest_states(session, job_id)
    scored = [state for state in states if state.metrics.get("full_valid_loss") is not None]
    best = min(scored, key=lambda state: state.metrics["full_valid_loss"], default=None)
    for state in states[keep:]:
        if state is not best:
            state.state_sha256 = None


def _failure(code: str, message: str, param: str | None) -> dict[str, Any]:
    return {"error_code": code, "error_message": message, "error_param": param}


def _failed(code: str, message: str, param: str | None) -> Event:
    return Event(f"The job failed: {message}", level="error", data={"code": code, "param": param})


def _tell(session: Session, job_id: str, events: Sequence[Event]) -> None:
    """Write events with the next numbers. The counter lies on the job's row: two writers cannot take the same one."""
    if not events:
        return
    last = _TOLD(session, {"job_id": job_id, "told": len(events)}).scalar_one()
    _write_events(session, job_id, last - len(events) + 1, events)


def _write_events(session: Session, job_id: str, first: int, events: Sequence[Event]) -> None:
    rows = [
        {
            "job_id": job_id,
            "seq": seq,
            "id": new_id("ftevent-"),
            "level": event.level,
            "type": event.type,
            "message": event.message,
            "data": None if event.data is None else dict(event.data),
        }
        for seq, event in enumerate(events, start=first)
    ]
    if rows:
        _EVENTS(session, rows)
    for event in events:
        if event.type == "message":
            log.log(_LEVELS[event.level], "%s", event.message, extra={"job": job_id})


_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def _nudge(session: Session, job_id: str) -> None:
    session.add(Outbox(job_id=job_id, created_at=now()))


def file_of(session: Session, project_id: str, file_id: str) -> File | None:
    """A job's file, or None if it was deleted meanwhile."""
    query = select(File).where(File.id == file_id, File.project_id == project_id, File.deleted_at.is_(None))
    return session.scalar(query)
