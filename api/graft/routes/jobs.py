"""`/v1/fine_tuning/jobs`."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import IntegrityError

from graft import jobs, resolve
from graft.deps import CallerDep, ReadDep, Service, ServiceDep, StrictRoute, WriteDep
from graft.errors import InvalidRequest
from graft.models import Checkpoint, Job, JobEvent
from graft.schemas import (
    CheckpointMetrics,
    CheckpointObject,
    HyperparametersObject,
    JobCreate,
    JobError,
    JobEventObject,
    JobObject,
    MethodObject,
    Page,
    Progress,
    SupervisedObject,
)
from graft.tenancy import Caller

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=StrictRoute)

Limit = Annotated[int, Query(ge=1, le=100)]
MAX_FILTERS = 16  # as many as a job can have entries
EventLimit = Annotated[int, Query(ge=1, le=1000)]


def wire(job: Job, organization_id: str) -> JobObject:
    """A row as OpenAI shows it, with Graft's fields beside."""
    recipe = job.recipe
    # Not parsed as a request again: an old job is shown as it was, whatever the rules have become since.
    asked = ((job.request.get("method") or {}).get("supervised") or {}).get("hyperparameters")
    named = asked or job.request.get("hyperparameters") or {}
    multiplier = named.get("learning_rate_multiplier", "auto")
    hyperparameters = HyperparametersObject(
        n_epochs=named.get("n_epochs", "auto") if recipe is None else recipe["n_epochs"],
        batch_size=named.get("batch_size", "auto") if recipe is None else recipe["batch_size"],
        learning_rate_multiplier=1.0 if recipe is not None and multiplier == "auto" else multiplier,
    )
    return JobObject(
        id=job.id,
        created_at=int(job.created_at),
        estimated_finish=None if job.estimated_finish is None else int(job.estimated_finish),
        finished_at=None if job.finished_at is None else int(job.finished_at),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=organization_id,
        status=job.status,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=[] if job.result_file is None else [job.result_file],
        trained_tokens=job.trained_tokens,
        error=None
        if job.error_code is None
        else JobError(code=job.error_code, message=job.error_message or "", param=job.error_param),
        hyperparameters=hyperparameters,
        method=MethodObject(supervised=SupervisedObject(hyperparameters=hyperparameters)),
        seed=job.seed,
        suffix=job.suffix,
        user_provided_suffix=job.suffix,
        integrations=[],
        metadata=job.labels,
        base_model=job.base_model,
        adapter_id=job.adapter_id,
        progress=Progress(step=job.step, total_steps=job.total_steps),
        attempt=job.attempt,
        recipe=recipe,
        audit=job.audit,
    )


def wire_event(event: JobEvent) -> JobEventObject:
    """An event as OpenAI shows it."""
    return JobEventObject(
        id=event.id,
        created_at=int(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


def wire_checkpoint(row: Checkpoint) -> CheckpointObject:
    """A checkpoint as OpenAI shows it."""
    known = {name: value for name, value in row.metrics.items() if name in CheckpointMetrics.model_fields}
    return CheckpointObject(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuned_model_checkpoint=row.model,
        fine_tuning_job_id=row.job_id,
        step_number=row.step,
        metrics=CheckpointMetrics(**{**known, "step": row.step}),
    )


@router.post("")
async def create_job(body: JobCreate, request: Request, caller: CallerDep, service: ServiceDep) -> JobObject:
    """Create a fine-tuning job. Sent again with the same Idempotency-Key, it answers with the job made before."""
    digest = hashlib.sha256(await request.body()).hexdigest()
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 255 and key.isprintable() and key.isascii()):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 printable ASCII characters.", code="invalid_idempotency_key"
        )
    is_retry = request.headers.get("x-stainless-retry-count", "0") not in ("", "0")
    return await run_in_threadpool(_create, service, caller, body, key, digest, is_retry)


def _create(
    service: Service, caller: Caller, body: JobCreate, key: str | None, digest: str, is_retry: bool
) -> JobObject:
    try:
        job = _find_or_create(service, caller, body, key, digest, is_retry)
    except IntegrityError:  # the same key at the same moment: the other request made the job, and now it can be found
        job = _find_or_create(service, caller, body, key, digest, is_retry)
    service.housekeeping.wake()
    return wire(job, caller.organization_id)


def _find_or_create(
    service: Service, caller: Caller, body: JobCreate, key: str | None, digest: str, is_retry: bool
) -> Job:
    with service.database.write() as session:
        job = jobs.find_earlier(session, caller, key=key, body_sha256=digest, is_retry=is_retry)
        if job is None:
            base = service.catalogue.resolve(body.model)
            resolve.check(body, base)
            job = jobs.create(session, caller, body, base_model=base.id, key=key, body_sha256=digest)
    return job


@router.get("")
def list_jobs(
    request: Request,
    caller: CallerDep,
    session: ReadDep,
    after: str | None = None,
    limit: Limit = 20,
    metadata: str | None = None,
) -> Page[JobObject]:
    """The project's jobs, newest first. `metadata[key]=value` filters; `metadata=null` finds jobs without any."""
    labels = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if metadata not in (None, "null"):
        raise InvalidRequest(
            "Filter with metadata[key]=value, or with metadata=null.", code="invalid_value", param="metadata"
        )
    if len(labels) > MAX_FILTERS:
        raise InvalidRequest(f"At most {MAX_FILTERS} metadata filters.", code="invalid_value", param="metadata")
    rows, more = jobs.list_page(
        session, caller.project_id, after=after, limit=limit, labels=labels, unlabelled=metadata == "null"
    )
    return Page.of([wire(row, caller.organization_id) for row in rows], more)


@router.get("/{job_id}")
def retrieve_job(job_id: str, caller: CallerDep, session: ReadDep) -> JobObject:
    """One job."""
    return wire(jobs.get(session, caller.project_id, job_id), caller.organization_id)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: CallerDep, session: WriteDep) -> JobObject:
    """Cancel a live job, at once."""
    return wire(jobs.cancel(session, caller.project_id, job_id), caller.organization_id)


@router.get("/{job_id}/events")
def list_events(
    job_id: str, caller: CallerDep, session: ReadDep, after: str | None = None, limit: EventLimit = 20
) -> Page[JobEventObject]:
    """What happened to a job, newest first."""
    job = jobs.get(session, caller.project_id, job_id)
    rows, more = jobs.events_page(session, job, after=after, limit=limit)
    return Page.of([wire_event(row) for row in rows], more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, caller: CallerDep, session: ReadDep, after: str | None = None, limit: Limit = 10
) -> Page[CheckpointObject]:
    """A job's checkpoints, newest first; each one's adapter can be downloaded."""
    job = jobs.get(session, caller.project_id, job_id)
    rows, more = jobs.checkpoints_page(session, job, after=after, limit=limit)
    return Page.of([wire_checkpoint(row) for row in rows], more)
