"""What routes are given: the caller, a session, the storage. `Service` is everything one API process shares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.responses import Response

from graft import strict_json, tenancy
from graft.catalogue import Catalogue
from graft.db import Database
from graft.errors import GraftError, InvalidRequest, UnsupportedMediaType
from graft.fair_queue import Forecast
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

    @property
    def forecast(self) -> Forecast:
        """Where the queued jobs stand."""
        return self.housekeeping.forecast


# The dependencies here are coroutines that do not wait: a plain function would be sent to a thread for nothing.
async def service_of(request: Request) -> Service:
    """The parts of the process that serves this request."""
    return _service(request)


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


ServiceDep = Annotated[Service, Depends(service_of)]

# Only for the OpenAPI document; the check itself is `StrictRoute`'s.
_bearer = HTTPBearer(auto_error=False, description="An API key of this server.")


async def caller(request: Request, _: Annotated[Any, Depends(_bearer)]) -> Caller:
    """The project behind the request's key, which `StrictRoute` checks before the route is run."""
    return cast(Caller, request.state.caller)


CallerDep = Annotated[Caller, Depends(caller)]


@dataclass(frozen=True, slots=True)
class Opening:
    """A session to be opened in the route's own thread, and closed there before the thread is given up.

    A request that waits for a thread holds no connection. So however many come at once, those that hold one can finish,
    and the others wait for a thread and not for a connection that nobody can give back.
    """

    database: Database
    writes: bool

    def open(self) -> AbstractContextManager[Session]:
        return self.database.write() if self.writes else self.database.read()


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A caller whose key is checked in the route's own thread, before the route is run."""

    database: Database
    authorization: str | None

    def check(self, session: Session | None = None) -> Caller:
        if session is not None:
            return tenancy.authenticate(session, self.authorization)
        with self.database.read() as own:
            return tenancy.authenticate(own, self.authorization)


async def reading(service: ServiceDep) -> Opening:
    """A session for looking."""
    return Opening(service.database, writes=False)


async def writing(service: ServiceDep) -> Opening:
    """A session that commits when the route has returned: a 200 is never followed by a failed commit."""
    return Opening(service.database, writes=True)


# Only in routes that are plain functions: `StrictRoute` opens the session for them.
ReadDep = Annotated[Session, Depends(reading)]
WriteDep = Annotated[Session, Depends(writing)]


def json_answer(answer: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """As it is: it was made of typed fields just now, and checking it again would cost as much as making it."""
    return Response(answer.__pydantic_serializer__.to_json(answer), media_type="application/json", headers=headers)


def in_one_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The route with everything that touches the database around it: key, session, commit, and the answer's bytes."""

    @functools.wraps(endpoint)
    def whole(**values: Any) -> Any:
        reader = next((v for v in values.values() if isinstance(v, Opening) and not v.writes), None)
        with ExitStack() as stack:
            looking = None if reader is None else stack.enter_context(reader.open())
            for name, value in values.items():
                if isinstance(value, Unchecked):
                    values[name] = value.check(looking)
            for name, value in values.items():
                if isinstance(value, Opening):
                    values[name] = looking if value is reader else stack.enter_context(value.open())
            answer = endpoint(**values)
            return json_answer(answer) if isinstance(answer, BaseModel) else answer

    whole.in_one_thread = True  # type: ignore[attr-defined]
    return whole


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

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if not inspect.iscoroutinefunction(endpoint) and not hasattr(endpoint, "in_one_thread"):
            endpoint = in_one_thread(endpoint)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()
        takes_json = self.body_field is not None
        known = {field.alias for field in self.dependant.query_params}
        names_caller = any(dependency.call is caller for dependency in self.dependant.dependencies)
        # Without a body there is nothing to parse, and the key can be checked on the way: one thread, one connection.
        on_the_way = (
            names_caller and hasattr(self.endpoint, "in_one_thread") and set(self.methods or ()) <= {"GET", "HEAD"}
        )

        async def strict(request: Request) -> Response:
            strict_request = StrictRequest(request.scope, request.receive)
            unchecked = Unchecked(_service(request).database, request.headers.get("authorization"))
            if not on_the_way:
                strict_request.state.caller = await run_in_threadpool(unchecked.check)
            else:
                strict_request.state.caller = unchecked
            for name in request.query_params:
                if name.partition("[")[0] not in known:  # `metadata[key]` is an entry of `metadata`
                    if on_the_way:
                        await run_in_threadpool(unchecked.check)
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
            try:
                response: Response = await handle(strict_request)
            except RequestValidationError:
                if on_the_way:  # the route was not run, and so its caller not checked: a stranger learns nothing
                    await run_in_threadpool(unchecked.check)
                raise
            return response

        return strict
