"""The FastAPI application: routes, one error shape for everything, request ids, body limits."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft import __version__, schemas
from graft.catalogue import load_catalogue
from graft.db import Database, is_full
from graft.deps import CarriedError, Service
from graft.errors import GraftError, InsufficientStorage, InvalidRequest, NotFound, TooLarge, Unavailable
from graft.housekeeping import Housekeeping
from graft.ids import new_id
from graft.routes import adapters, files, health, jobs, models, preview, workers
from graft.settings import Settings
from graft.storage import StorageUnavailable, open_storage

log = logging.getLogger("graft.http")

MAX_JSON_BODY = 1024 * 1024
UPLOAD_PATH = "/v1/files"
# What a client of OpenAI's may ask for that is not here, and what it can do instead.
INSTEAD = {
    "/v1/uploads": " Send the file whole, with `POST /v1/files`; the operator sets the limit (GRAFT_MAX_UPLOAD_BYTES).",
    **dict.fromkeys(
        ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
        " Graft trains models and runs none: download the adapter (`GET /v1/adapters/{id}/download`, where id may be "
        "the fine-tuned model's name) and load it where the base model runs, with PEFT or vLLM's `--lora-modules`.",
    ),
}


def create_app(settings: Settings, database: Database | None = None) -> FastAPI:
    """An application over a database that is already at this code's version.

    Raises:
        ConfigurationError: the catalogue, the database or the object store cannot be used.
    """
    own = database is None
    database = database or Database(settings.require_database_url())
    storage = open_storage(settings.storage_url, database)
    catalogue = load_catalogue(settings.models)
    housekeeping = Housekeeping(database, storage, catalogue, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        housekeeping.start()
        try:
            yield
        except asyncio.CancelledError:
            return  # the server was told twice to leave, and waits for nothing
        housekeeping.stop()
        if own:
            database.dispose()

    app = FastAPI(
        title="Graft",
        version=__version__,
        description="Runs your OpenAI fine-tuning code on your own GPUs and lets you keep the weights.",
        lifespan=lifespan,
        responses={
            "4XX": {"model": schemas.ErrorEnvelope, "description": "The request is at fault."},
            "5XX": {"model": schemas.ErrorEnvelope, "description": "The server is at fault; trying again may help."},
        },
    )
    app.state.service = Service(settings, database, storage, catalogue, housekeeping)
    # Jobs first: routes are tried one after the other, and a job's poll is asked for most.
    for module in (jobs, files, preview, models, adapters, workers, health):
        app.include_router(module.router)
    _answer_errors(app)
    app.add_middleware(Edge, max_upload=settings.max_upload_bytes)
    return app


# -- errors -------------------------------------------------------------------------------------------------------


def _render(error: GraftError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status_code, headers=error.headers)


def _answer_errors(app: FastAPI) -> None:
    """Every failure leaves in OpenAI's envelope; of FastAPI's own an SDK user would see 'Error code: 422' and no more.

    What no handler here knows is the edge's: see `Edge`.
    """

    @app.exception_handler(GraftError)
    async def known(request: Request, error: GraftError) -> JSONResponse:
        return _render(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _render(_explain(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, CarriedError):
            return _render(error.error)
        code = {404: "unknown_url", 405: "method_not_allowed", 413: "body_too_large"}.get(
            error.status_code, "bad_request"
        )
        instead = INSTEAD.get(request.url.path, "")
        text = {
            404: f"Unknown request URL: {request.method} {request.url.path[:256]}.{instead}",
            405: f"{request.method} is not allowed on {request.url.path[:256]}.",
        }.get(error.status_code, str(error.detail))
        body = {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": code}}
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(OperationalError)
    async def database_away(request: Request, error: OperationalError) -> JSONResponse:
        if is_full(error):
            return no_room(error)
        log.warning("the database does not answer: %s", error.orig)
        return _render(
            Unavailable("The database does not answer at the moment; try again.", code="database_unavailable")
        )

    @app.exception_handler(PoolTimeout)
    async def database_busy(request: Request, error: PoolTimeout) -> JSONResponse:
        return _render(Unavailable("The database is busy at the moment; try again.", code="database_unavailable"))

    @app.exception_handler(StorageUnavailable)
    async def storage_away(request: Request, error: StorageUnavailable) -> JSONResponse:
        log.warning("%s", error)
        return _render(
            Unavailable("The object store does not answer at the moment; try again.", code="storage_unavailable")
        )

    @app.exception_handler(OSError)
    async def disk_full(request: Request, error: OSError) -> JSONResponse:
        if not is_full(error):
            raise error
        return no_room(error)

    def no_room(error: Exception) -> JSONResponse:
        log.error("a disk is full: %s", error)
        text = "The server's disk is full; its operator has to make room before this can succeed."
        return _render(InsufficientStorage(text, code="insufficient_storage"))


_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "string_too_long": "string_too_long",
}


def _explain(error: RequestValidationError) -> InvalidRequest:
    """Pydantic's most telling finding in words a caller can act on."""
    findings = [(_where(found["loc"]), found) for found in error.errors()]
    # A field that takes "auto" or a number is found wrong twice; the number's half says the range.
    where, found = max(findings, key=lambda each: (each[1]["type"] != "literal_error", len(each[0])))
    if not where:
        return InvalidRequest("The request body must be a JSON object.", code="invalid_type")
    param = _dotted(where)[:128]
    kind = str(found["type"])
    code = _CODES.get(kind) or ("invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "extra_forbidden":
        meant = _meant(where)
        text = f"Unknown parameter: '{param}'." + (f" Did you mean '{meant}'?" if meant else "")
    elif kind == "missing":
        text = f"Missing required parameter: '{param}'."
    else:
        words = [other["ctx"]["expected"] for place, other in findings if place == where and _is_word(other, found)]
        text = f"Invalid value for '{param}': {', or '.join([_lower(found['msg']), *words])}."
    if param == "suffix":
        code = "invalid_suffix"
        text = (
            "Invalid value for 'suffix': 1 to 64 letters, digits, '-', '_' or single '.' or spaces between them, "
            "starting with a letter or digit."
        )
    return InvalidRequest(text, code=code, param=param)


def _is_word(other: Any, found: Any) -> bool:
    return other is not found and other["type"] == "literal_error"


def _where(loc: Sequence[int | str]) -> list[int | str]:
    """The path as the caller wrote it.

    Pydantic also names where the value stood (body, query, path) and the branch of a union it tried
    (`literal['auto']`, `constrained-int`).
    """
    where = list(loc[1:]) if loc and loc[0] in ("body", "query", "path") else list(loc)
    if where[:1] == ["metadata"]:  # its keys are the caller's, whatever they look like
        return where[:2]
    return [part for part in where if isinstance(part, int) or not _BRANCH.fullmatch(part)]


_BRANCH = re.compile(r"literal\[.*\]|constrained-.*|int|float|bool|list\[.*\]|dict\[.*\]|function-.*")


def _dotted(where: Sequence[int | str]) -> str:
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


# Where each field of a job request lives; the older place of the hyperparameters comes last: it is not advertised.
_SECTIONS: dict[str, type[schemas.Request]] = {
    "": schemas.JobCreate,
    "lora": schemas.LoraRequest,
    "method": schemas.MethodRequest,
    "method.supervised": schemas.SupervisedRequest,
    "method.supervised.hyperparameters": schemas.HyperparametersRequest,
    "early_stopping": schemas.EarlyStoppingRequest,
    "supervision": schemas.SupervisionRequest,
    "hyperparameters": schemas.HyperparametersRequest,
}
# What PEFT and other services call the fields of `lora`.
_FOREIGN = {"rank": "r", "lora_r": "r", "lora_rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}


def _meant(where: Sequence[int | str]) -> str | None:
    """The field that an unknown one was probably meant to be: of the same section, or else of another."""
    section, name = _dotted(where[:-1]), str(where[-1])[:64]
    if section in ("", "lora") and name in _FOREIGN:
        return f"lora.{_FOREIGN[name]}"
    for place in sorted(_SECTIONS, key=lambda place: place != section):
        near = get_close_matches(name, _SECTIONS[place].model_fields, n=1, cutoff=0.7)
        if near:
            return f"{place}.{near[0]}".lstrip(".")
    return None


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


# -- the edge -----------------------------------------------------------------------------------------------------


class Edge:
    """Outermost: gives each request its id, refuses what no route should see, bounds bodies, writes one log line.

    A plain ASGI class, so that streams pass through it piece by piece.
    """

    def __init__(self, app: ASGIApp, *, max_upload: int) -> None:
        self.app = app
        self.max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_id("req_")
        began = time.perf_counter()
        status = 0
        tag = {"request": request_id}

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
                # No id holds a NUL, and PostgreSQL would refuse the question itself.
                await _render(NotFound("Unknown request URL.", code="unknown_url"))(scope, receive, tagged)
                return
            most = self.max_upload + 65536 if scope["path"] == UPLOAD_PATH else MAX_JSON_BODY
            await self.app(scope, _bounded(receive, most), tagged)
        except ClientDisconnect:
            log.info("the caller hung up while sending", extra=tag)
        except Exception:
            # The caller gets the request id, which stands in the log beside the traceback, and nothing else.
            log.exception("%s %s failed", scope["method"], scope["path"], extra=tag)
            if status:
                raise  # the answer has begun: only closing the connection can tell that it is not whole
            failed = GraftError("Something went wrong on this server; its log tells more.", code="internal_error")
            await _render(failed)(scope, receive, tagged)
        finally:
            milliseconds = (time.perf_counter() - began) * 1000
            # Polling is most of the traffic and says nothing new; what changes something, or fails, is worth a line.
            level = logging.DEBUG if scope["method"] in ("GET", "HEAD") and status < 400 else logging.INFO
            log.log(level, "%s %s %d %.1f ms", scope["method"], scope["path"], status, milliseconds, extra=tag)


def _bounded(receive: Receive, most: int) -> Receive:
    """Stop reading a body at its limit, whatever length was declared."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            if taken > most:
                raise CarriedError(TooLarge(f"The request body is over {most} bytes.", code="body_too_large"))
        return message

    return limited
