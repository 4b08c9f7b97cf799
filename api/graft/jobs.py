"""The life of a fine-tuning job. The only writer of `Job.status`.

    validating_files -> queued -> running -> succeeded | failed | cancelled

Every change is one compare-and-set (`UPDATE ... WHERE status IN (...) AND attempt = ?`), and the event that tells of it
is written in the same transaction. `attempt` is the fence: it grows when a worker claims the job and when the right to
run is taken away, so a worker that was frozen and wakes up late can change nothing. Functions take the session they
work in; the caller owns the transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Update, select, update
from sqlalchemy.orm import Session

from graft import adapters, files
from graft.adapters import AdapterContent
from graft.db import changed, has_entry, now
from graft.errors import Conflict, IdempotencyMismatch, InvalidRequest, NotFound
from graft.ids import new_id
from graft.models import LIVE, Checkpoint, File, Job, JobEvent, JobRequest, JobStatus, Organization, Outbox, Project
from graft.paging import Cursor, page
from graft.recipe import Recipe
from graft.schemas import JobCreate
from graft.storage import Stored
from graft.tenancy import Caller

log = logging.getLogger(__name__)

# How long a repeated request without a key still finds the job it made: longer than any SDK goes on retrying.
RETRY_WINDOW_SECONDS = 15 * 60


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's story, before it has a number."""

    message: str
    level: str = "info"
    type: str = "message"
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one attempt of one job."""

    job_id: str
    attempt: int
    project_id: str
    recipe: Recipe
    training_file: str
    validation_file: str | None
    model_name: str
    worker: str


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
        _require_dataset(session, caller.project_id, getattr(body, param), param)
    job = Job(
        id=new_id("ftjob-"),
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
        created_at=now(),
    )
    session.add(job)
    session.flush()
    session.add(
        JobRequest(job_id=job.id, project_id=caller.project_id, key=key, body_sha256=body_sha256, created_at=now())
    )
    _tell(session, job.id, [Event(f"Created fine-tuning job: {job.id}"), Event("Validating the files")])
    session.refresh(job)
    return job


def _require_dataset(session: Session, project_id: str, file_id: str | None, param: str) -> None:
    if file_id is None:
        return
    try:
        row = files.get(session, project_id, file_id)
    except NotFound:
        raise InvalidRequest(
            f"No such file: '{file_id[:64]}'. Upload it with `POST /v1/files` and purpose 'fine-tune'.",
            code="file_not_found",
            param=param,
        ) from None
    if row.purpose != "fine-tune":
        raise InvalidRequest(
            f"The file {row.id} has the purpose '{row.purpose}'; upload it again with purpose 'fine-tune'.",
            code="invalid_file_purpose",
            param=param,
        )


# -- looking ------------------------------------------------------------------------------------------------------


def get(session: Session, project_id: str, job_id: str) -> Job:
    """One job of the project. Raises NotFound."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))
    if job is None:
        raise NotFound(f"No such fine-tuning job: '{job_id[:64]}'.", code="job_not_found", param="id")
    return job


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
    """One page of the job's checkpoints, newest first."""
    query = select(Checkpoint).where(Checkpoint.job_id == job.id)
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


def has_silent(session: Session) -> bool:
    """Whether some job's lease is over: asked often, and cheaper than taking the write lock to find nothing."""
    query = select(Job.id).where(Job.status == JobStatus.RUNNING, Job.lease_until < now()).limit(1)
    return session.scalar(query) is not None


# -- transitions by the API ---------------------------------------------------------------------------------------


def queue(session: Session, job_id: str, recipe: Recipe, events: Sequence[Event]) -> bool:
    """validating_files -> queued, with the recipe that every attempt will train from."""
    if not _move(session, job_id, (JobStatus.VALIDATING_FILES,), JobStatus.QUEUED, recipe=recipe.to_json()):
        return False
    _tell(session, job_id, [*events, Event("Files validated, moving job to queued state")])
    _nudge(session, job_id)
    return True


def reject(session: Session, job_id: str, *, code: str, message: str, param: str | None) -> bool:
    """validating_files -> failed: the files cannot be trained on."""
    if not _move(
        session,
        job_id,
        (JobStatus.VALIDATING_FILES,),
        JobStatus.FAILED,
        **_failure(code, message, param),
        finished_at=now(),
    ):
        return False
    _tell(session, job_id, [Event(f"The job failed: {message}", level="error", data={"code": code, "param": param})])
    return True


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Any live status -> cancelled, at once; the growing attempt shuts out the worker that may still be running it.

    Raises:
        NotFound: no such job.
        Conflict: the job has already ended.
    """
    job = get(session, project_id, job_id)
    if not _move(
        session, job.id, LIVE, JobStatus.CANCELLED, attempt=Job.attempt + 1, finished_at=now(), estimated_finish=None
    ):
        session.refresh(job)
        raise Conflict(f"The job {job.id} has already ended: it is {job.status}.", code="job_terminal", param="id")
    _tell(session, job.id, [Event("Fine-tuning job cancelled", level="warn")])
    session.refresh(job)
    return job


def reap(session: Session, *, max_recoveries: int) -> list[str]:
    """running -> queued (or failed) for jobs whose worker was silent for a whole lease; returns their ids."""
    query = (
        select(Job).where(Job.status == JobStatus.RUNNING, Job.lease_until < now()).with_for_update(skip_locked=True)
    )
    return [
        job.id
        for job in session.scalars(query).all()
        if _recover(session, job, job.attempt, "its worker went silent", max_recoveries)
    ]


# -- transitions by a worker --------------------------------------------------------------------------------------


def is_due(session: Session, job_id: str | None = None) -> bool:
    """Whether a claim could succeed: asked often by idle workers, and cheaper than the write lock."""
    query = select(Job.id).where(Job.status == JobStatus.QUEUED, Job.not_before <= now())
    if job_id is not None:
        query = query.where(Job.id == job_id)
    return session.scalar(query.limit(1)) is not None


def claim(session: Session, worker: str, *, lease_seconds: float, job_id: str | None = None) -> Claim | None:
    """queued -> running for the oldest job that is due (or the named one); None if there is none, or no longer."""
    due = select(Job).where(Job.status == JobStatus.QUEUED, Job.not_before <= now())
    if job_id is not None:
        due = due.where(Job.id == job_id)
    job = session.scalar(due.order_by(Job.created_at, Job.id).limit(1).with_for_update(skip_locked=True))
    if job is None:
        return None
    first = job.started_at is None
    if not _move(
        session,
        job.id,
        (JobStatus.QUEUED,),
        JobStatus.RUNNING,
        fence=job.attempt,
        attempt=job.attempt + 1,
        lease_owner=worker,
        lease_until=now() + lease_seconds,
        **({"started_at": now()} if first else {}),
    ):
        return None
    session.refresh(job)
    _tell(
        session,
        job.id,
        [Event("Fine-tuning job started" if first else f"Fine-tuning job taken up again (attempt {job.attempt})")],
    )
    assert job.recipe is not None, "a queued job has a recipe"
    return Claim(
        job_id=job.id,
        attempt=job.attempt,
        project_id=job.project_id,
        recipe=Recipe.from_json(job.recipe),
        training_file=job.training_file,
        validation_file=job.validation_file,
        model_name=_model_name(session, job),
        worker=worker,
    )


def beat(
    session: Session,
    held: Claim,
    *,
    lease_seconds: float,
    events: Sequence[Event] = (),
    progress: Mapping[str, Any] | None = None,
) -> bool:
    """Prove life, extend the lease, and write down what happened since. False: the right to run is gone, stop at once.

    Args:
        progress: new values of step, total_steps, trained_tokens, estimated_finish.
    """
    if changed(session, _fenced(held).values(lease_until=now() + lease_seconds, **(progress or {}))) != 1:
        return False
    _tell(session, held.job_id, events)
    return True


def add_checkpoint(
    session: Session,
    held: Claim,
    *,
    step: int,
    metrics: Mapping[str, Any],
    state: Stored,
    content: AdapterContent,
    keep: int,
) -> bool:
    """Make a checkpoint visible: its adapter can be downloaded, its state can be resumed from. False: fenced off.

    Old training states are given up, but for the last `keep` and the one with the best validation loss.
    """
    if changed(session, _fenced(held).values(attempt=held.attempt)) != 1:
        return False
    known = select(Checkpoint.id).where(Checkpoint.job_id == held.job_id, Checkpoint.step == step)
    if session.scalar(known) is not None:
        return True  # an earlier attempt came this far; the same recipe makes the same state
    changed(session, _fenced(held).values(recoveries=0))  # real progress: the count of losses starts again
    name = f"{held.model_name}:ckpt-step-{step}"
    adapters.create(session, held.project_id, held.job_id, name, held.recipe.base_model, step, content, is_final=False)
    session.add(
        Checkpoint(
            id=new_id("ftckpt_"),
            job_id=held.job_id,
            step=step,
            attempt=held.attempt,
            model=name,
            metrics=dict(metrics),
            state_sha256=state.sha256,
            created_at=now(),
        )
    )
    session.flush()
    _give_up_old_states(session, held.job_id, keep)
    _tell(session, held.job_id, [Event(f"Checkpoint created at step {step}", data={"step": step, "model": name})])
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
) -> bool:
    """running -> succeeded: adapter, result file and status become visible together. False: fenced off."""
    if not _move(
        session,
        held.job_id,
        (JobStatus.RUNNING,),
        JobStatus.SUCCEEDED,
        fence=held.attempt,
        finished_at=now(),
        estimated_finish=None,
        lease_until=None,
        step=step,
        trained_tokens=trained_tokens,
        fine_tuned_model=held.model_name,
    ):
        return False
    adapter = adapters.create(
        session, held.project_id, held.job_id, held.model_name, held.recipe.base_model, step, content, is_final=True
    )
    result_file = files.create(session, held.project_id, results, filename="step_metrics.csv", purpose=files.RESULTS)
    session.execute(update(Job).where(Job.id == held.job_id).values(adapter_id=adapter.id, result_file=result_file.id))
    for checkpoint in latest_states(session, held.job_id):
        checkpoint.state_sha256 = None  # nothing will be resumed any more
    _tell(
        session,
        held.job_id,
        [
            *events,
            Event(f"New fine-tuned model created: {held.model_name}"),
            Event("The job has successfully completed"),
        ],
    )
    return True


def fail(session: Session, held: Claim, *, code: str, message: str, param: str | None) -> bool:
    """running -> failed, for a cause that another attempt would meet again. False: fenced off."""
    if not _move(
        session,
        held.job_id,
        (JobStatus.RUNNING,),
        JobStatus.FAILED,
        fence=held.attempt,
        finished_at=now(),
        estimated_finish=None,
        lease_until=None,
        **_failure(code, message, param),
    ):
        return False
    _tell(
        session, held.job_id, [Event(f"The job failed: {message}", level="error", data={"code": code, "param": param})]
    )
    return True


def release(session: Session, held: Claim, message: str) -> bool:
    """running -> queued: the worker is stopping and has saved its work."""
    if not _move(
        session,
        held.job_id,
        (JobStatus.RUNNING,),
        JobStatus.QUEUED,
        fence=held.attempt,
        lease_until=None,
        estimated_finish=None,
    ):
        return False
    _tell(session, held.job_id, [Event(message)])
    _nudge(session, held.job_id)
    return True


def recover(session: Session, held: Claim, cause: str, *, max_recoveries: int) -> bool:
    """running -> queued (or failed): the engine was lost under a living worker."""
    job = session.get(Job, held.job_id, populate_existing=True)
    return job is not None and _recover(session, job, held.attempt, cause, max_recoveries)


# -- inside -------------------------------------------------------------------------------------------------------


def _fenced(held: Claim) -> Update:
    """An UPDATE that only the holder of the current attempt can make."""
    return update(Job).where(Job.id == held.job_id, Job.attempt == held.attempt, Job.status == JobStatus.RUNNING)


def _move(
    session: Session,
    job_id: str,
    origin: Sequence[JobStatus],
    to: JobStatus,
    *,
    fence: int | None = None,
    **values: Any,
) -> bool:
    """The compare-and-set that every transition is made of."""
    where = [Job.id == job_id, Job.status.in_(origin)]
    if fence is not None:
        where.append(Job.attempt == fence)
    return changed(session, update(Job).where(*where).values(status=to, **values)) == 1


def _recover(session: Session, job: Job, attempt: int, cause: str, max_recoveries: int) -> bool:
    if job.recoveries >= max_recoveries:
        message = f"The job lost its worker {job.recoveries + 1} times without reaching a new checkpoint ({cause})."
        moved = _move(
            session,
            job.id,
            (JobStatus.RUNNING,),
            JobStatus.FAILED,
            fence=attempt,
            attempt=attempt + 1,
            finished_at=now(),
            estimated_finish=None,
            lease_until=None,
            **_failure("worker_lost", message, None),
        )
        if moved:
            _tell(session, job.id, [Event(f"The job failed: {message}", level="error", data={"code": "worker_lost"})])
        return moved
    delay = 2.0**job.recoveries
    moved = _move(
        session,
        job.id,
        (JobStatus.RUNNING,),
        JobStatus.QUEUED,
        fence=attempt,
        attempt=attempt + 1,
        recoveries=job.recoveries + 1,
        not_before=now() + delay,
        lease_until=None,
        estimated_finish=None,
    )
    if moved:
        _tell(session, job.id, [Event(f"The job goes back to the queue: {cause}", level="warn")])
        _nudge(session, job.id)
    return moved


def _give_up_old_states(session: Session, job_id: str, keep: int) -> None:
    states = latest_states(session, job_id)
    scored = [state for state in states if state.metrics.get("full_valid_loss") is not None]
    best = min(scored, key=lambda state: state.metrics["full_valid_loss"], default=None)
    for state in states[keep:]:
        if state is not best:
            state.state_sha256 = None


def _failure(code: str, message: str, param: str | None) -> dict[str, Any]:
    return {"error_code": code, "error_message": message, "error_param": param}


def _tell(session: Session, job_id: str, events: Sequence[Event]) -> None:
    """Write events with the next numbers. The counter lies on the job's row: two writers cannot take the same one."""
    if not events:
        return
    last = session.execute(
        update(Job).where(Job.id == job_id).values(last_event=Job.last_event + len(events)).returning(Job.last_event)
    ).scalar_one()
    first = last - len(events) + 1
    for seq, event in enumerate(events, start=first):
        session.add(
            JobEvent(
                job_id=job_id,
                seq=seq,
                id=new_id("ftevent-"),
                created_at=now(),
                level=event.level,
                type=event.type,
                message=event.message,
                data=None if event.data is None else dict(event.data),
            )
        )
        if event.type == "message":
            log.log(_LEVELS[event.level], "%s", event.message, extra={"job": job_id})
    session.flush()


_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def _nudge(session: Session, job_id: str) -> None:
    session.add(Outbox(job_id=job_id, created_at=now()))


def _model_name(session: Session, job: Job) -> str:
    """`ft:<base>:<organisation>:<suffix>:<8 characters>`, OpenAI's form; the same for every attempt."""
    organization = session.execute(
        select(Organization.name)
        .join(Project, Project.organization_id == Organization.id)
        .where(Project.id == job.project_id)
    ).scalar_one()
    return f"ft:{job.base_model}:{organization}:{job.suffix or ''}:{job.id[-8:]}"


def file_of(session: Session, project_id: str, file_id: str) -> File | None:
    """A job's file, or None if it was deleted meanwhile."""
    query = select(File).where(File.id == file_id, File.project_id == project_id, File.deleted_at.is_(None))
    return session.scalar(query)
