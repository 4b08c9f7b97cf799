"""What routes are given: the caller, a session, the storage. `Service` is everything one API process shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session
from starlette.responses import Response

from graft import strict_json, tenancy
from graft.catalogue import Catalogue
from graft.db import Database
from graft.errors import GraftError, InvalidRequest, UnsupportedMediaType
from graft.housekeeping import Housekeeping
from graft.settings import Settings
from graft.storage import Storage
from graft.tenancy import Caller


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one API process."""

    settings: Settings
    database: Database
    storage: Storage
    catalogue: Catalogue
    housekeeping: Housekeeping


def service_of(request: Request) -> Service:
    """The parts of the process that serves this request."""
    return cast(Service, request.app.state.service)


ServiceDep = Annotated[Service, Depends(service_of)]

# Only for the OpenAPI document; the check itself is `caller`.
_bearer = HTTPBearer(auto_error=False, description="An API key of this server.")


def caller(request: Request, _: Annotated[Any, Depends(_bearer)]) -> Caller:
    """The project behind the request's key, which `StrictRoute` has checked."""
    return cast(Caller, request.state.caller)


def _authenticate(request: Request) -> Caller:
    with service_of(request).database.read() as session:
        return tenancy.authenticate(session, request.headers.get("authorization"))


CallerDep = Annotated[Caller, Depends(caller)]


def reading(service: ServiceDep) -> Iterator[Session]:
    """A session for looking."""
    with service.database.read() as session:
        yield session


def writing(service: ServiceDep) -> Iterator[Session]:
    """A session that commits when the route has returned."""
    with service.database.write() as session:
        yield session


# Scope "function": the session ends before the answer is sent. So a 200 is never followed by a failed commit, and a
# slow download holds no connection.
ReadDep = Annotated[Session, Depends(reading, scope="function")]
WriteDep = Annotated[Session, Depends(writing, scope="function")]


class CarriedError(HTTPException):
    """A GraftError that passes through the places where FastAPI lets only its own exceptions through."""

    def __init__(self, error: GraftError) -> None:
        super().__init__(error.status_code)
        self.error = error


class StrictRequest(Request):
    """Reads its JSON body by the standard (see `strict_json`), instead of by Python's looser rules."""

    async def json(self) -> Any:
        try:
            return strict_json.loads(await self.body())
        except strict_json.StrictJsonError as error:
            raise CarriedError(InvalidRequest(f"The request body: {error.message}", code=error.code)) from error


class StrictRoute(APIRoute):
    """The route class of all `/v1` routes. The key is checked first: nothing a stranger sends is parsed."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()
        takes_json = self.body_field is not None
        known = {field.alias for field in self.dependant.query_params}

        async def strict(request: Request) -> Response:
            strict_request = StrictRequest(request.scope, request.receive)
            strict_request.state.caller = await run_in_threadpool(_authenticate, strict_request)
            for name in request.query_params:
                if name.partition("[")[0] not in known:  # `metadata[key]` is an entry of `metadata`
                    shown = name[:64]
                    raise InvalidRequest(f"Unknown query parameter: '{shown}'.", code="unknown_parameter", param=shown)
            if takes_json:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if request.headers.get("content-encoding", "identity").lower() != "identity":
                    raise UnsupportedMediaType("Send the body without Content-Encoding.", code="unsupported_encoding")
                if kind != "application/json":
                    raise UnsupportedMediaType(
                        f"Send JSON with 'Content-Type: application/json', not '{kind[:64]}'.",
                        code="unsupported_media_type",
                    )
                if not await strict_request.body():
                    raise InvalidRequest("The request body is empty; send a JSON object.", code="empty_body")
            response: Response = await handle(strict_request)
            return response

        return strict
