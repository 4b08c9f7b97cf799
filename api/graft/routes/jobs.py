"""`/v1/fine_tuning/jobs`."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Row
from sqlalchemy.exc import IntegrityError
from starlette.responses import Response

from graft import jobs, resolve
from graft.db import KEPT_CONNECTIONS
from graft.deps import CallerDep, ReadDep, Service, ServiceDep, StrictRoute, WriteDep, json_answer
from graft.errors import InvalidRequest
from graft.fair_queue import Forecast
from graft.models import Checkpoint, Desired, Job, JobEvent, JobStatus
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


def wire(job: Job | Row[Any], organization_id: str, forecast: Forecast) -> JobObject:
    """A row as OpenAI shows it, with Graft's fields beside."""
    place = forecast.of(job.id, job.status)
    recipe = job.recipe
    # A running job that is desired to pause is OpenAI's `pausing`.
    is_pausing = job.status == JobStatus.RUNNING and job.desired == Desired.PAUSE
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
        status="pausing" if is_pausing else job.status,
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
        priority=job.priority,
        max_runtime_seconds=job.max_runtime_seconds,
        queue_position=None if place is None else place.position,
        predicted_start=None if place is None or place.predicted_start is None else int(place.predicted_start),
        waiting_for=job.waiting_for if place is None else place.waiting_for,
        audit=job.audit,
        estimate=job.estimate,
        plan=job.plan,
        measured=job.measured,
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


def retrieve_job(job_id: str, request: Request, caller: CallerDep, service: ServiceDep) -> Response:
    """One job. With the ETag of an earlier answer in If-None-Match: 304 as long as there is nothing new."""
    headers = request.headers
    return _poll(service, headers.get("authorization"), job_id, headers.get("if-none-match"))


def _poll(service: Service, authorization: str | None, job_id: str, seen: str | None) -> Response:
    """One statement, or two if something is new to one who has seen the job before."""
    with service.database.read() as session:
        if seen is not None:
            tag = _tag(service, job_id, *jobs.version(session, authorization, job_id))
            if seen.removeprefix("W/") == tag:
                return Response(status_code=304, headers={"ETag": tag, "Cache-Control": "private, no-cache"})
        job = jobs.shown(session, authorization, job_id)
    headers = {"ETag": _tag(service, job_id, job.rev, job.status), "Cache-Control": "private, no-cache"}
    return json_answer(wire(job, job.organization_id, service.forecast), headers)


def _tag(service: Service, job_id: str, rev: int, status: str) -> str:
    """What a job's answer is made of. The place in the queue is not of the row."""
    place = service.forecast.of(job_id, status)
    return f'"{rev}"' if place is None else f'"{rev}-{place.position}-{int(place.predicted_start or 0)}"'


class PollRoute(StrictRoute):
    """The route that is asked most, without the resolving of dependencies, which takes as long as all the rest.

    Its threads are its own. The way to them and back is half as long as to those that the framework lends, and as many
    polls as there are kept connections take all that a process has of a core; more would open and close some each time.
    """

    def get_route_handler(self) -> Any:
        careful = super().get_route_handler()

        async def poll(request: Request) -> Response:
            if request.scope["query_string"]:
                found: Response = await careful(request)
                return found
            service, headers = request.app.state.service, request.headers
            asked = headers.get("authorization"), request.path_params["job_id"], headers.get("if-none-match")
            return await asyncio.get_running_loop().run_in_executor(_THREADS, _poll, service, *asked)

        return poll


_THREADS = ThreadPoolExecutor(KEPT_CONNECTIONS, thread_name_prefix="poll")

# Before all others, since routes are tried one after the other.
router.add_api_route(
    "/{job_id}",
    retrieve_job,
    response_model=JobObject,
    responses={304: {"description": "There is nothing new since that ETag."}},
    methods=["GET"],
    route_class_override=PollRoute,
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
    return await run_in_threadpool(_create, service, caller, body, key, digest, _is_retry(request))


def _is_retry(request: Request) -> bool:
    """Whether OpenAI's SDK sends this again by itself, because no answer or a passing error came."""
    return request.headers.get("x-stainless-retry-count", "0") not in ("", "0")


def _create(
    service: Service, caller: Caller, body: JobCreate, key: str | None, digest: str, is_retry: bool
) -> JobObject:
    try:
        job = _find_or_create(service, caller, body, key, digest, is_retry)
    except IntegrityError:  # the same key at the same moment: the other request made the job, and now it can be found
        job = _find_or_create(service, caller, body, key, digest, is_retry)
    service.housekeeping.wake()
    return wire(job, caller.organization_id, service.forecast)


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
    service: ServiceDep,
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
    return Page.of([wire(row, caller.organization_id, service.forecast) for row in rows], more)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, request: Request, caller: CallerDep, service: ServiceDep, session: WriteDep) -> JobObject:
    """Cancel a live job, at once."""
    job = jobs.cancel(session, caller.project_id, job_id, is_retry=_is_retry(request))
    return wire(job, caller.organization_id, service.forecast)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, request: Request, caller: CallerDep, service: ServiceDep, session: WriteDep) -> JobObject:
    """Pause a live job. A running one is `pausing` until its worker has saved a checkpoint and let go of the device."""
    job = jobs.pause(session, caller.project_id, job_id, is_retry=_is_retry(request))
    return wire(job, caller.organization_id, service.forecast)


@router.post("/{job_id}/resume")
def resume_job(job_id: str, request: Request, caller: CallerDep, service: ServiceDep, session: WriteDep) -> JobObject:
    """Queue a paused job again, with the place of its age; it goes on from its last checkpoint."""
    job = jobs.resume(session, caller.project_id, job_id, is_retry=_is_retry(request))
    return wire(job, caller.organization_id, service.forecast)


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
