"""What the API's tests begin with: datasets, a catalogue, jobs in the state a test needs."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import select, update

from graft import files, jobs, tenancy, workers
from graft.adapters import AdapterContent
from graft.app import create_app
from graft.db import Database, now
from graft.jobs import Claim
from graft.models import File, Job, JobEvent, JobRequest, Organization, Project, Worker
from graft.recipe import Recipe
from graft.schemas import JobCreate
from graft.settings import Settings
from graft.storage import DatabaseStorage, Stored
from graft.tenancy import Caller

CALLER = Caller(project_id=tenancy.DEFAULT_PROJECT, organization_id=tenancy.DEFAULT_ORGANIZATION)
ALIAS = "gpt-4o-mini-2024-07-18"
CATALOGUE = f"""
[models.tiny]
source = "./tiny"
context_length = 512

[models."acme/big"]
source = "acme/big-20b"
context_length = 8192
parameters = 20_000_000_000

[aliases]
"{ALIAS}" = "tiny"
"""

# The config of Llama-3.1-8B, as far as the planner reads it.
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def row(number: int = 0) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} and one?"},
            {"role": "assistant", "content": f"{number + 1}"},
        ]
    }


def jsonl(count: int = 10) -> bytes:
    return b"".join(json.dumps(row(number)).encode() + b"\n" for number in range(count))


def write_catalogue(folder: Path) -> Path:
    (folder / "tiny").mkdir(exist_ok=True)
    path = folder / "models.toml"
    path.write_text(CATALOGUE)
    return path


@contextmanager
def migrated(url: str) -> Iterator[Database]:
    """The database with all tables and the default project; closed afterwards."""
    database = Database(url)
    database.migrate()
    with database.write() as session:
        tenancy.ensure_defaults(session, None)
    yield database
    database.dispose()


@dataclass
class Service:
    """The application over one database, driven without its housekeeping thread: `turn` does a round at once."""

    app: FastAPI
    database: Database
    storage: DatabaseStorage
    settings: Settings
    key: str

    @classmethod
    def over(cls, database: Database, folder: Path, **settings: Any) -> Service:
        chosen = Settings(data_dir=folder, models=write_catalogue(folder), **settings)
        with database.write() as session:
            key = tenancy.ensure_defaults(session, chosen.api_key)
            if key is None:
                key = tenancy.create_key(session, tenancy.DEFAULT_PROJECT, "test")[1]
        return cls(create_app(chosen, database), database, DatabaseStorage(database), chosen, key)

    def http(self, key: str | None = None) -> TestClient:
        """A bare HTTP client that shows the given key, or the service's."""
        return TestClient(self.app, headers={"Authorization": f"Bearer {key or self.key}"})

    def stranger(self) -> TestClient:
        """A bare HTTP client without a key."""
        return TestClient(self.app)

    def sdk(self, key: str | None = None) -> OpenAI:
        """OpenAI's own client, as its users make it."""
        return OpenAI(
            api_key=key or self.key,
            base_url="http://testserver/v1",
            http_client=TestClient(self.app),
            max_retries=0,
        )

    def turn(self) -> None:
        self.app.state.service.housekeeping.validate()
        self.app.state.service.housekeeping.turn()
        self.app.state.service.forecast.make()

    def second_project(self) -> tuple[Caller, str]:
        """Another organisation with a project and a key."""
        with self.database.write() as session:
            session.add(Organization(id="org-other", name="other", created_at=now()))
            session.flush()
            session.add(Project(id="proj_other", organization_id="org-other", name="other", created_at=now()))
            session.flush()
            return Caller("proj_other", "org-other"), tenancy.create_key(session, "proj_other", "other")[1]


def dataset(database: Database, project_id: str = CALLER.project_id, content: bytes | None = None) -> File:
    """An uploaded training file."""
    return files.accept(
        database,
        DatabaseStorage(database),
        project_id,
        file=io.BytesIO(jsonl() if content is None else content),
        filename="train.jsonl",
        purpose="fine-tune",
        expires_in=None,
    )


def new_job(database: Database, caller: Caller = CALLER, **body: Any) -> str:
    """A job in `validating_files`."""
    if "training_file" not in body:
        body["training_file"] = dataset(database, caller.project_id).id
    with database.write() as session:
        request = JobCreate(**{"model": "tiny", **body})
        return jobs.create(session, caller, request, base_model="tiny", key=None, body_sha256="0" * 64).id


def queued_job(
    database: Database, caller: Caller = CALLER, *, seconds: float | None = None, needs: int | None = None, **body: Any
) -> str:
    """A job in `queued`; `seconds` is its estimate, `needs` the device memory that it cannot do without."""
    job_id = new_job(database, caller, **body)
    estimate = None if seconds is None else {"seconds": seconds}
    with database.write() as session:
        assert jobs.queue(session, job_id, Recipe(base_model="tiny"), [], estimate=estimate, needs_bytes=needs)
    return job_id


def project(database: Database, name: str, *, weight: float = 1.0, max_running_jobs: int | None = None) -> Caller:
    """Another project of the default organisation, without a key."""
    with database.write() as session:
        session.add(
            Project(
                id=f"proj_{name}",
                organization_id=CALLER.organization_id,
                name=name,
                created_at=now(),
                weight=weight,
                max_running_jobs=max_running_jobs,
            )
        )
    return Caller(f"proj_{name}", CALLER.organization_id)


def time_passes(database: Database, seconds: float) -> None:
    """As if the database's clock had gone on by so much: every time in it moves into the past instead."""
    columns = {
        Job: ("created_at", "started_at", "finished_at", "lease_until", "not_before", "held_since", "held_until"),
        Project: ("usage_at",),
        Worker: ("started_at", "seen_at"),
        JobRequest: ("created_at",),
    }
    with database.write() as session:
        for table, names in columns.items():
            session.execute(update(table).values({name: getattr(table, name) - seconds for name in names}))


def try_claim(database: Database, job_id: str | None = None, *, worker: str = "w", **wanted: Any) -> Claim | None:
    with database.write() as session:
        return jobs.claim(session, worker, lease_seconds=wanted.pop("lease", 60.0), job_id=job_id, **wanted)


def claim(database: Database, job_id: str | None = None, *, worker: str = "w", **wanted: Any) -> Claim:
    held = try_claim(database, job_id, worker=worker, **wanted)
    assert held is not None
    return held


def reap(database: Database, max_recoveries: int = 3) -> list[str]:
    with database.write() as session:
        return jobs.reap(session, max_recoveries=max_recoveries)


def release(database: Database, held: Claim) -> bool:
    with database.write() as session:
        return jobs.release(session, held, "The worker stopped")


def pause(database: Database, job_id: str, project_id: str = CALLER.project_id) -> Job:
    with database.write() as session:
        return jobs.pause(session, project_id, job_id)


def resume(database: Database, job_id: str, project_id: str = CALLER.project_id) -> Job:
    with database.write() as session:
        return jobs.resume(session, project_id, job_id)


def cancel(database: Database, job_id: str, project_id: str = CALLER.project_id) -> Job:
    with database.write() as session:
        return jobs.cancel(session, project_id, job_id)


def worker(database: Database, name: str = "w", device_bytes: int | None = None, base_model: str | None = None) -> None:
    """A worker in the registry, alive now."""
    with database.write() as session:
        workers.register(session, name, device="NVIDIA H100", device_bytes=device_bytes)
        assert workers.see(session, name, base_model=base_model, job_id=None)


def look(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def story(database: Database, job_id: str) -> list[JobEvent]:
    with database.read() as session:
        return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))


def running_job(database: Database, caller: Caller = CALLER, *, lease: float = 60.0, **body: Any) -> Claim:
    return claim(database, queued_job(database, caller, **body), lease=lease)


def put(database: Database, content: bytes) -> Stored:
    return DatabaseStorage(database).put([content])


def adapter(database: Database, salt: str = "") -> tuple[AdapterContent, dict[str, bytes]]:
    """A stored adapter, and the bytes of its archive and of its two files."""
    parts = {
        "adapter_config.json": json.dumps({"r": 16, "salt": salt}).encode(),
        "adapter_model.safetensors": bytes(range(256)) * 8 * 1024 + salt.encode(),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    stored = {name: put(database, content) for name, content in parts.items()}
    return AdapterContent(put(database, buffer.getvalue()), stored), {**parts, "archive": buffer.getvalue()}


def add_checkpoint(
    database: Database,
    held: Claim,
    step: int,
    *,
    loss: float | None = None,
    keep: int = 3,
    with_adapter: bool = True,
) -> bool:
    content = adapter(database, f"{held.job_id}-{step}")[0] if with_adapter else None
    state = put(database, f"state of {held.job_id} at {step}".encode())
    with database.write() as session:
        metrics = {"train_loss": 1.0, "full_valid_loss": loss}
        return jobs.add_checkpoint(session, held, step=step, metrics=metrics, state=state, content=content, keep=keep)


def succeed(database: Database, held: Claim) -> bool:
    content, _ = adapter(database, held.job_id)
    results = put(database, b"step,train_loss\n1,0.5\n")
    with database.write() as session:
        return jobs.succeed(session, held, step=7, trained_tokens=1234, content=content, results=results, events=[])
