"""`/v1/workers`: where jobs run. The same for every project, and nothing of any project in it."""

from __future__ import annotations

from fastapi import APIRouter

from graft import workers
from graft.deps import CallerDep, ReadDep, ServiceDep, StrictRoute
from graft.schemas import Page, WorkerObject

router = APIRouter(prefix="/v1/workers", tags=["workers"], route_class=StrictRoute)


@router.get("")
def list_workers(caller: CallerDep, service: ServiceDep, session: ReadDep) -> Page[WorkerObject]:
    """The workers that are there, and those that were within the last hour, by name."""
    alive = {row.id for row in workers.alive(session, service.settings.heartbeat_seconds)}
    found = [
        WorkerObject(
            id=row.id,
            device=row.device,
            device_bytes=row.device_bytes,
            base_model=row.base_model,
            is_alive=row.id in alive,
            is_busy=row.id in alive and row.job_id is not None,
            version=row.version,
            started_at=int(row.started_at),
            seen_at=int(row.seen_at),
        )
        for row in workers.list_all(session)
    ]
    return Page.of(found, False)
