"""`/v1/adapters`: the weights themselves. An adapter answers to its id and to the name of its fine-tuned model."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import Response

from graft import adapters
from graft.deps import CallerDep, ReadDep, ServiceDep, StrictRoute
from graft.errors import NotFound
from graft.routes.download import send
from graft.schemas import AdapterFileObject, AdapterObject

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=StrictRoute)


# The two downloads stand first: the plain route below takes a name with slashes, and so every path.
@router.head("/{adapter:path}/download", response_class=Response, include_in_schema=False)
@router.get("/{adapter:path}/download", response_class=Response)
def download_adapter(
    adapter: str, request: Request, caller: CallerDep, service: ServiceDep, session: ReadDep
) -> Response:
    """Everything in one .tar.gz; ranges and conditional requests are honoured."""
    row = adapters.get(session, caller.project_id, adapter)
    return send(
        request,
        service.storage,
        sha256=row.archive_sha256,
        size=row.archive_bytes,
        filename=f"{row.id}.tar.gz",
        media_type="application/gzip",
    )


@router.head("/{adapter:path}/files/{name}", response_class=Response, include_in_schema=False)
@router.get("/{adapter:path}/files/{name}", response_class=Response)
def download_adapter_file(
    adapter: str, name: str, request: Request, caller: CallerDep, service: ServiceDep, session: ReadDep
) -> Response:
    """One file of an adapter."""
    row = adapters.get(session, caller.project_id, adapter)
    file = next((file for file in adapters.files_of(session, row) if file.name == name), None)
    if file is None:
        raise NotFound(f"The adapter has no file '{name[:64]}'.", code="file_not_found", param="name")
    return send(
        request,
        service.storage,
        sha256=file.sha256,
        size=file.bytes,
        filename=name,
        media_type="application/octet-stream",
    )


@router.get("/{adapter:path}")
def retrieve_adapter(adapter: str, caller: CallerDep, session: ReadDep) -> AdapterObject:
    """What an adapter is, and where its bytes are."""
    row = adapters.get(session, caller.project_id, adapter)
    base = f"/v1/adapters/{quote(row.id)}"
    return AdapterObject(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuned_model=row.model,
        base_model=row.base_model,
        fine_tuning_job_id=row.job_id,
        step_number=row.step,
        bytes=row.archive_bytes,
        sha256=row.archive_sha256,
        url=f"{base}/download",
        files=[
            AdapterFileObject(
                name=file.name, bytes=file.bytes, sha256=file.sha256, url=f"{base}/files/{quote(file.name)}"
            )
            for file in adapters.files_of(session, row)
        ],
    )
