"""`/v1/fine_tuning/preview`."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

from fastapi import APIRouter

from graft import resolve
from graft.deps import CallerDep, ServiceDep, StrictRoute
from graft.errors import Unavailable
from graft.schemas import PreviewObject, PreviewRequest

router = APIRouter(prefix="/v1/fine_tuning/preview", tags=["fine-tuning"], route_class=StrictRoute)

# Each one loads a tokenizer, which may take some hundred megabytes.
_places = threading.BoundedSemaphore(2)
WAIT_SECONDS = 30.0


@router.post("")
def preview(body: PreviewRequest, caller: CallerDep, service: ServiceDep) -> PreviewObject:
    """What would be learnt from some rows of a training file, token by token, before there is a job."""
    base = service.catalogue.resolve(body.model)
    with service.database.read() as session:
        row = resolve.dataset(session, caller.project_id, body.training_file)
    if not _places.acquire(timeout=WAIT_SECONDS):
        raise Unavailable("Too many previews at once; try again.", code="preview_busy")
    try:
        today = datetime.now(UTC).date().isoformat()
        return resolve.preview(body, base, row, service.storage, today=today)
    finally:
        _places.release()
