"""`/v1/fine_tuning/preview` and `/v1/fine_tuning/jobs/estimate`: what a job would do, before there is one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from fastapi import APIRouter

from graft import dry_run, files
from graft import preview as previews
from graft.deps import CallerDep, Service, ServiceDep, StrictRoute
from graft.errors import Unavailable
from graft.models import File
from graft.schemas import EstimateObject, JobCreate, PreviewObject, PreviewRequest
from graft.tenancy import Caller

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"], route_class=StrictRoute)

# Each one loads a tokenizer, which may take some hundred megabytes, and may take all cores.
_places = threading.BoundedSemaphore(2)
WAIT_SECONDS = 30.0


@router.post("/preview")
def preview(body: PreviewRequest, caller: CallerDep, service: ServiceDep) -> PreviewObject:
    """What would be learnt from some rows of a training file, token by token, before there is a job."""
    base = service.catalogue.resolve(body.model)
    with service.database.read() as session:
        row = files.require_dataset(session, caller.project_id, body.training_file, "training_file")
    with _place():
        today = datetime.now(UTC).date().isoformat()
        return previews.preview(body, base, row, service.storage, today=today)


@router.post("/jobs/estimate")
def estimate(body: JobCreate, caller: CallerDep, service: ServiceDep) -> EstimateObject:
    """What a job with this body will take: tokens, steps, memory and time on each worker, and what to change if it does
    not fit. Nothing is made; what would fail the job is answered as an error."""
    base = service.catalogue.resolve(body.model)
    sources = _files_of(body, caller, service)
    with _place():
        return dry_run.estimate(body, base, sources, service.database, service.storage, service.settings)


def _files_of(body: JobCreate, caller: Caller, service: Service) -> dict[str, File]:
    named = {"training_file": body.training_file, "validation_file": body.validation_file}
    with service.database.read() as session:
        return {
            param: files.require_dataset(session, caller.project_id, file_id, param)
            for param, file_id in named.items()
            if file_id is not None
        }


@contextmanager
def _place() -> Iterator[None]:
    if not _places.acquire(timeout=WAIT_SECONDS):
        raise Unavailable("Too many previews and estimates at once; try again.", code="server_busy")
    try:
        yield
    finally:
        _places.release()
