"""`/v1/files`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import Response

from graft import files
from graft.datasets import Report
from graft.deps import CallerDep, ReadDep, ServiceDep, StrictRoute, WriteDep
from graft.errors import InvalidRequest, NotYet, TooLarge, UnsupportedMediaType
from graft.models import File
from graft.routes.download import send
from graft.schemas import Deleted, FileObject, FileReportObject, Page

router = APIRouter(prefix="/v1/files", tags=["files"], route_class=StrictRoute)

_FIELDS = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}

_UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


def wire(row: File) -> FileObject:
    """A row as OpenAI shows it."""
    return FileObject(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=None if row.expires_at is None else int(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,
        status_details=row.status_details,
        sha256=row.sha256,
    )


@router.post("", openapi_extra=_UPLOAD_SCHEMA)
async def upload(request: Request, caller: CallerDep, service: ServiceDep) -> FileObject:
    """Upload a file. A training file (purpose `fine-tune`) is read line by line; a large one soon after the answer."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedMediaType(
            "Upload as multipart/form-data with the fields 'purpose' and 'file'.", code="unsupported_media_type"
        )
    most = service.settings.max_upload_bytes
    declared = request.headers.get("content-length", "")
    # The envelope around the file is small; past this, there is no need to read on to know the answer.
    if declared.isdecimal() and int(declared) > most + 65536:
        raise _too_large(most)
    async with request.form(max_files=2, max_fields=16, max_part_size=4096) as form:
        if unknown := sorted(set(form) - _FIELDS):
            raise InvalidRequest(
                f"Unknown field: '{unknown[0][:64]}'.", code="unknown_parameter", param=unknown[0][:64]
            )
        parts = form.getlist("file")
        if len(parts) != 1 or not isinstance(parts[0], UploadFile):
            raise InvalidRequest("Send exactly one file, in the field 'file'.", code="missing_file", param="file")
        purpose = form.get("purpose")
        if not isinstance(purpose, str):
            raise InvalidRequest(
                "The field 'purpose' is missing; a training file has 'fine-tune'.",
                code="missing_required_parameter",
                param="purpose",
            )
        part = parts[0]
        if (part.size or 0) > most:
            raise _too_large(most)
        row = await run_in_threadpool(
            files.accept,
            service.database,
            service.storage,
            caller.project_id,
            file=part.file,
            filename=part.filename or "file",
            purpose=purpose,
            expires_in=_expires_in(form.get("expires_after[anchor]"), form.get("expires_after[seconds]")),
        )
    if row.status == "uploaded":
        service.housekeeping.wake()
    return wire(row)


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"The file is over this server's limit of {most} bytes.", code="file_too_large", param="file")


def _expires_in(anchor: object, seconds: object) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after[anchor] must be 'created_at'.", code="invalid_value", param="expires_after")
    if not isinstance(seconds, str) or not re.fullmatch("[0-9]{4,7}", seconds) or not 3600 <= int(seconds) <= 2_592_000:
        raise InvalidRequest(
            "expires_after[seconds] must be 3600 to 2592000.", code="invalid_value", param="expires_after"
        )
    return int(seconds)


@router.get("")
def list_files(
    caller: CallerDep,
    session: ReadDep,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The project's files, newest first."""
    rows, more = files.list_page(
        session, caller.project_id, purpose=purpose, after=after, limit=limit, ascending=order == "asc"
    )
    return Page.of([wire(row) for row in rows], more)


@router.get("/{file_id}")
def retrieve_file(file_id: str, caller: CallerDep, session: ReadDep) -> FileObject:
    """One file."""
    return wire(files.get(session, caller.project_id, file_id))


@router.head("/{file_id}/content", response_class=Response, include_in_schema=False)
@router.get("/{file_id}/content", response_class=Response)
def file_content(file_id: str, request: Request, caller: CallerDep, service: ServiceDep, session: ReadDep) -> Response:
    """The file's bytes; ranges and conditional requests are honoured."""
    row = files.get(session, caller.project_id, file_id)
    return send(
        request,
        service.storage,
        sha256=row.sha256,
        size=row.bytes,
        filename=row.filename,
        media_type="application/octet-stream",
    )


@router.get("/{file_id}/report")
def file_report(file_id: str, caller: CallerDep, session: ReadDep) -> FileReportObject:
    """What is in a training file: its format, lengths and turns, and every fault with its line and how to mend it."""
    row = files.get(session, caller.project_id, file_id)
    if row.status == "uploaded":
        raise NotYet(f"The file {row.id} is still being read; ask again shortly.", code="file_not_processed")
    if row.report is None:
        raise InvalidRequest(
            f"The file {row.id} has the purpose '{row.purpose}'; only training files ('fine-tune') have a report.",
            code="no_report",
            param="id",
        )
    # What an earlier version did not count is empty.
    return FileReportObject(id=row.id, status=row.status, **{**Report().to_json(), **row.report})


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: CallerDep, session: WriteDep) -> Deleted:
    """Delete a file that no live job needs."""
    files.remove(session, caller.project_id, file_id)
    return Deleted(id=file_id, object="file")
