"""`/`: what this is. `/healthz`: the process answers. `/readyz`: it can work, because the database answers and has the
right schema."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from graft.deps import ServiceDep
from graft.errors import ConfigurationError

router = APIRouter(tags=["health"])


@router.get("/")
async def what_this_is() -> dict[str, str]:
    """For whoever opens the address that the server printed."""
    return {
        "message": "This is Graft, which fine-tunes models through OpenAI's API. It is under /v1 and wants the key "
        "that the first start printed; every route is described in /openapi.json, and in a browser at /docs."
    }


@router.get("/healthz")
async def alive() -> dict[str, str]:
    """Always 200 while the process runs."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "not ready"}})
def ready(service: ServiceDep) -> Response:
    """200, or 503 with the reason."""
    try:
        service.database.require_current()
    except ConfigurationError as error:
        return JSONResponse({"status": "unavailable", "reason": error.message}, status_code=503)
    return JSONResponse({"status": "ready"})
