"""Who is asking, and whose rows they may see. The rules hold for every route that the OpenAPI document names."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text, update

from graft import jobs, tenancy
from graft.app import create_app
from graft.db import Base, Database, now
from graft.ids import new_id
from graft.models import ApiKey, Organization, Project
from graft.settings import Settings

from . import given
from .given import Service

# -- keys ---------------------------------------------------------------------------------------------------------


def test_every_wrong_key_gets_the_same_answer(service_on_both: Service) -> None:
    service = service_on_both
    with service.database.write() as session:
        revoked, revoked_key = tenancy.create_key(session, tenancy.DEFAULT_PROJECT, "revoked")
        expired, expired_key = tenancy.create_key(session, tenancy.DEFAULT_PROJECT, "expired")
        tenancy.revoke_key(session, revoked.id)
        session.execute(update(ApiKey).where(ApiKey.id == expired.id).values(expires_at=now() - 1))
    wrong: list[str | bytes | None] = [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic " + service.key,
        service.key,
        "Bearer sk-graft-wrong",
        f"Bearer {service.key[:-1]}",
        f"Bearer {service.key}x",
        f"Bearer {service.key[:16]}" + "x" * 33,
        f"Bearer {revoked_key}",
        f"Bearer {expired_key}",
        f"Bearer {service.key} {service.key}",
        "Bearer " + "x" * 10_000,
        "Bearer ключ".encode(),
        b"Bearer \xff\xfe",
        "Bearer ' or 1=1 --",
    ]
    http = service.stranger()
    answers = [http.get("/v1/models", headers={} if value is None else {"Authorization": value}) for value in wrong]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.content for answer in answers}) == 1
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    for good in (f"Bearer {service.key}", f"bearer {service.key}", f"BEARER  {service.key} "):
        assert http.get("/v1/models", headers={"Authorization": good}).status_code == 200


def test_a_key_in_the_url_is_no_key_and_is_not_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    assert service.stranger().get("/v1/models", params={"api_key": service.key}).status_code == 401
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("graft", "uvicorn"))]
    assert any("/v1/models" in line for line in ours)
    assert not any(service.key in line for line in ours)


def test_a_stranger_has_nothing_parsed(service: Service) -> None:
    """Whatever is wrong with a body, without a key the answer is 401."""
    http = service.stranger()
    for headers, body in (
        ({}, b""),
        ({"Content-Type": "application/json"}, b"{"),
        ({"Content-Type": "application/json"}, b'{"unknown": 1}'),
        ({"Content-Type": "image/png"}, b"\x89PNG"),
        ({"Content-Type": "multipart/form-data"}, b"x"),
    ):
        for path in ("/v1/fine_tuning/jobs", "/v1/files"):
            assert http.post(path, content=body, headers=headers).status_code == 401
    assert http.get("/v1/fine_tuning/jobs?limit=abc").status_code == 401


def test_the_first_start_makes_one_key_once_and_keeps_only_its_hash(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    with database.write() as session:
        key = tenancy.ensure_defaults(session, None)
    assert key is not None
    assert re.fullmatch(r"sk-graft-[A-Za-z0-9]{40}", key)
    with database.write() as session:
        assert tenancy.ensure_defaults(session, None) is None
    with database.read() as session:
        row = session.scalars(select(ApiKey)).one()
        assert (row.hash, row.prefix) == (hashlib.sha256(key.encode()).hexdigest(), key[:16])
        assert key not in json.dumps({name: str(value) for name, value in vars(row).items()})
        assert session.scalar(select(func.count()).select_from(Organization)) == 1
        assert session.scalar(select(func.count()).select_from(Project)) == 1
        # Nor anywhere else in the database.
        for table in Base.metadata.tables:
            assert not any(key in str(record) for record in session.execute(text(f"select * from {table}")))
    database.dispose()


def test_services_that_start_together_for_the_first_time_make_one_key(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    start = threading.Barrier(4)

    def begin(_: int) -> str | None:
        start.wait()
        with database.write() as session:
            return tenancy.ensure_defaults(session, None)

    with ThreadPoolExecutor(4) as pool:
        keys = [key for key in pool.map(begin, range(4)) if key is not None]
    assert len(keys) == 1
    database.dispose()


def test_the_operators_own_key_is_accepted(sqlite: Database, tmp_path: Path) -> None:
    own = "my-own-key-0123456789"
    service = Service.over(sqlite, tmp_path, api_key=own)
    assert service.http(own).get("/v1/models").status_code == 200
    with sqlite.write() as session:
        assert tenancy.ensure_defaults(session, own) is None  # again at the next start
        row = session.scalars(select(ApiKey).where(ApiKey.name == "GRAFT_API_KEY")).one()
        assert own not in (row.hash, row.prefix)
        tenancy.revoke_key(session, row.id)
        tenancy.ensure_defaults(session, own)
    assert service.http(own).get("/v1/models").status_code == 401


def test_health_needs_no_key(service: Service) -> None:
    http = service.stranger()
    assert (http.get("/healthz").status_code, http.get("/readyz").status_code) == (200, 200)


def test_whoever_opens_the_address_without_a_key_reads_what_answers_there(service: Service) -> None:
    http = service.stranger()
    answer = http.get("/")
    assert answer.status_code == 200
    for named in ("/openapi.json", "/docs"):
        assert named in answer.json()["message"]
        assert http.get(named).status_code == 200


# -- every route --------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A service with two projects that each have one of everything."""

    service: Service
    mine: TestClient
    ids: dict[str, list[str]]
    """What the other project has, by the name of the path parameter."""


@pytest.fixture(scope="module")
def world(migrated_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    database = Database(f"sqlite:///{folder / 'graft.db'}")
    database.migrate()
    service = Service.over(database, folder)
    other, _ = service.second_project()
    made = []
    for caller in (given.CALLER, other):
        held = given.running_job(database, caller, metadata={"owner": caller.project_id})
        given.add_checkpoint(database, held, 1)
        given.succeed(database, held)
        live = given.running_job(database, caller)
        with database.read() as session:
            job = jobs.get(session, caller.project_id, held.job_id)
            checkpoint = jobs.checkpoints_page(session, job, after=None, limit=1)[0][0]
        made.append((held, live, job, checkpoint))
    held, live, job, checkpoint = made[1]
    ids = {
        "file_id": [held.training_file, job.result_file],
        "job_id": [held.job_id, live.job_id],
        "model": [held.model_name, checkpoint.model],
        "adapter": [job.adapter_id, held.model_name, checkpoint.model],
        "name": ["adapter_config.json"],
    }
    yield World(service, service.http(), ids)
    database.dispose()


def routes() -> list[tuple[str, str]]:
    """Every method and path of the document; it is the same over any database."""
    document = create_app(Settings(), Database("sqlite:///never-opened.db")).openapi()
    return [(method, path) for path, item in document["paths"].items() for method in item if path.startswith("/v1")]


def random_like(name: str, real: str) -> str:
    """An id of the same form that nobody has."""
    prefix = re.match(r"(ft:|[a-z]+[-_])?", real)
    assert prefix is not None
    return prefix.group() + new_id("", len(real) - len(prefix.group()))


def without_id(answer: httpx2.Response, asked: str) -> tuple[int, bytes]:
    """An answer with the caller's own words taken out, for comparison byte by byte."""
    words = sorted({asked, asked[:64], asked[:128]}, key=len, reverse=True)
    content = answer.content
    for word in words:
        content = content.replace(word.encode(), b"<id>")
    return answer.status_code, content


@pytest.mark.parametrize(("method", "path"), routes())
def test_a_route_is_closed_to_strangers_and_to_other_projects(world: World, method: str, path: str) -> None:
    """A new route either takes ids that are known here, or has none; it is never left out."""
    names = re.findall(r"{(\w+)}", path)
    unknown = set(names) - set(world.ids)
    assert not unknown, f"{path}: say in `World.ids` what another project's {unknown} would be"
    example = path.format(**{name: world.ids[name][0] for name in names})
    stranger = world.service.stranger().request(method, example)
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (401, "invalid_api_key")
    if not names:
        return
    subject = names[0]
    for real in world.ids[subject]:
        fixed = {name: world.ids[name][0] for name in names}
        foreign = world.mine.request(method, path.format(**{**fixed, subject: real}))
        asked = random_like(subject, real)
        unheard = world.mine.request(method, path.format(**{**fixed, subject: asked}))
        assert foreign.status_code == 404
        assert without_id(foreign, real) == without_id(unheard, asked)


def test_no_route_is_served_beyond_the_document(world: World) -> None:
    """Else it would be a way in that the rules above do not look at. HEAD goes with its GET."""
    served = {
        (method.lower(), (route.path or "").replace(":path", ""))
        for route in iter_route_contexts(world.service.app.routes)
        for method in route.methods or ()
    }
    ours = {(method, path) for method, path in served if path.startswith("/v1")}
    assert len(ours) >= 18
    assert {("get" if method == "head" else method, path) for method, path in ours} == set(routes())
    assert {path for _, path in served if not path.startswith("/v1")} == {
        *("/", "/healthz", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
    }
    for method, path in ours:
        if method == "head":
            example = path.format(**{name: values[0] for name, values in world.ids.items()})
            assert world.service.stranger().head(example).status_code == 401
            assert world.mine.head(example).status_code == 404


CREATE = "/v1/fine_tuning/jobs"


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_another_projects_file_cannot_be_named_in_a_job(world: World, param: str) -> None:
    def ask(file_id: str) -> tuple[int, bytes]:
        mine = given.dataset(world.service.database).id
        body = {"model": "tiny", "training_file": mine, param: file_id}
        return without_id(world.mine.post(CREATE, json=body), file_id)

    real = world.ids["file_id"][0]
    assert ask(real) == ask(random_like("file_id", real))
    assert ask(real)[0] == 400


@pytest.mark.parametrize(("path", "name"), [("/v1/files", "file_id"), (CREATE, "job_id")], ids=["files", "jobs"])
def test_another_projects_id_is_no_cursor(world: World, path: str, name: str) -> None:
    def ask(after: str) -> tuple[int, bytes]:
        return without_id(world.mine.get(path, params={"after": after}), after)

    real = world.ids[name][0]
    assert ask(real) == ask(random_like(name, real))
    assert ask(real)[0] == 400


def test_no_list_shows_another_projects_rows(world: World) -> None:
    theirs = {value for values in world.ids.values() for value in values} - {"adapter_config.json"}
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models", f"{CREATE}?metadata[owner]=proj_other"):
        body = world.mine.get(path).text
        assert not any(value in body for value in theirs), path
    assert world.mine.get(f"{CREATE}?metadata[owner]=proj_other").json()["data"] == []
    assert len(world.mine.get(f"{CREATE}?metadata[owner]={given.CALLER.project_id}").json()["data"]) == 1


def test_the_same_bytes_in_two_projects_are_two_files(service: Service) -> None:
    _, other_key = service.second_project()
    mine, other = service.http(), service.http(other_key)

    def send(http: TestClient) -> dict[str, Any]:
        made: dict[str, Any] = http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", given.jsonl())}
        ).json()
        return made

    first, second = send(mine), send(other)
    assert first["id"] != second["id"]
    assert mine.delete(f"/v1/files/{first['id']}").status_code == 200
    service.storage.sweep(0)
    assert other.get(f"/v1/files/{second['id']}/content").content == given.jsonl()
