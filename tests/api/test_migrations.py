"""The schema: from nothing to now, on both databases, by anybody at any time, and never backwards by accident."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from sqlalchemy import func, inspect, select, text

from graft import tenancy
from graft.app import create_app
from graft.db import Base, Database, head_revision, migrations_folder
from graft.errors import ConfigurationError
from graft.models import Organization
from graft.recipe import Recipe
from graft.settings import Settings

from . import given


@pytest.fixture
def empty(database_url: str) -> Iterator[Database]:
    """A database without any table."""
    opened = Database(database_url)
    yield opened
    opened.dispose()


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names())


def differences(database: Database) -> list[Any]:
    """Between the tables that there are and the models."""
    with database.engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True, "render_as_batch": database.is_sqlite}
        return compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)


def alembic(database: Database, action: str, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    with database.engine.connect() as connection:
        config.attributes["connection"] = connection
        getattr(command, action)(config, revision)
        connection.commit()


def test_from_nothing_to_the_tables_of_the_models(empty: Database) -> None:
    with pytest.raises(ConfigurationError, match=r"at version none.*Run `graft migrate`"):
        empty.require_current()
    empty.migrate()
    empty.require_current()
    assert tables(empty) == {*Base.metadata.tables, "alembic_version"}


def test_migrations_and_models_agree(empty: Database) -> None:
    empty.migrate()
    assert differences(empty) == []


def test_migrating_again_changes_nothing(empty: Database) -> None:
    empty.migrate()
    with empty.write() as session:
        tenancy.ensure_defaults(session, None)
    held = given.running_job(empty)
    assert given.succeed(empty, held)
    empty.migrate()
    empty.migrate()
    with empty.read() as session:
        assert session.scalar(select(func.count()).select_from(Organization)) == 1
    assert tables(empty) == {*Base.metadata.tables, "alembic_version"}


def test_threads_may_migrate_together(database_url: str) -> None:
    def migrate(_: int) -> None:
        database = Database(database_url)
        database.migrate()
        database.require_current()
        database.dispose()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, range(4)))


def test_processes_may_migrate_together(database_url: str, tmp_path: Path) -> None:
    """As two services that are started at the same moment do: both come up, and one key is made."""
    environment = {**os.environ, "GRAFT_DATABASE_URL": database_url, "GRAFT_DATA_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "graft.cli", "migrate"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("shown only now" in output for output in outputs) == 1


def test_a_newer_database_is_refused_and_left_alone(empty: Database, tmp_path: Path) -> None:
    empty.migrate()
    with empty.write() as session:
        session.execute(text("update alembic_version set version_num = '9999'"))
    for refuse in (empty.migrate, empty.require_current):
        with pytest.raises(ConfigurationError) as caught:
            refuse()
        assert "is at version 9999" in caught.value.message
        assert f"head {head_revision()}" in caught.value.message
        assert "written by a newer Graft" in caught.value.message
    assert tables(empty) == {*Base.metadata.tables, "alembic_version"}


def test_down_to_nothing_and_up_again(empty: Database) -> None:
    empty.migrate()
    alembic(empty, "downgrade", "base")
    assert tables(empty) == {"alembic_version"}
    empty.migrate()
    assert tables(empty) == {*Base.metadata.tables, "alembic_version"}


def test_one_version_down_and_up_again_loses_no_row(empty: Database) -> None:
    """As when an upgrade is taken back: the code before knows no paused job, and so it queues it."""
    empty.migrate()
    with empty.write() as session:
        tenancy.ensure_defaults(session, None)
    done = given.running_job(empty, suffix="done")
    assert given.add_checkpoint(empty, done, 3)
    assert given.succeed(empty, done)
    running, queued, paused = given.running_job(empty), given.queued_job(empty, priority=5), given.queued_job(empty)
    given.pause(empty, paused)
    given.worker(empty)
    names = ("id", "status", "attempt", "recipe", "request", "created_at", "fine_tuned_model", "last_event")
    counted = ("fine_tuning_job_events", "fine_tuning_job_checkpoints", "adapters", "adapter_files", "files", "outbox")

    def rows() -> dict[str, tuple[object, ...]]:
        with empty.read() as session:
            found = session.execute(text(f"select {', '.join(names)} from fine_tuning_jobs"))
            return {row.id: tuple(row) for row in found}

    def counts() -> list[int]:
        with empty.read() as session:
            return [session.scalar(text(f"select count(*) from {name}")) or 0 for name in counted]

    before, many = rows(), counts()
    assert before[paused][1] == "paused"
    alembic(empty, "downgrade", "0001")
    assert "desired" not in {column["name"] for column in inspect(empty.engine).get_columns("fine_tuning_jobs")}
    empty.migrate()
    before[paused] = (paused, "queued", *before[paused][2:])
    assert rows() == before
    assert counts() == many
    job = given.look(empty, queued)
    assert (job.priority, job.desired, job.gpu_seconds, job.rev) == (0, "run", 0.0, 0)
    assert given.claim(empty, paused).attempt == 1
    assert given.succeed(empty, running)
    assert differences(empty) == []


def test_the_code_before_goes_on_working_over_the_new_tables(empty: Database) -> None:
    """It names no new column, so each of them must have a default."""
    empty.migrate()
    with empty.write() as session:
        tenancy.ensure_defaults(session, None)
        session.execute(
            text(
                "insert into fine_tuning_jobs (id, project_id, model, base_model, training_file, seed, request, recipe,"
                " status, attempt, recoveries, not_before, created_at, step, last_event) values ('ftjob-old',"
                " 'proj_default', 'tiny', 'tiny', 'file-x', 42, '{}', :recipe, 'queued', 0, 0, 0, 1000, 0, 0)"
            ),
            {"recipe": json.dumps(Recipe(base_model="tiny").to_json())},
        )
    assert given.claim(empty).job_id == "ftjob-old"


def test_readiness_tells_of_a_schema_of_another_version(empty: Database, tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path, models=given.write_catalogue(tmp_path)), empty)
    http = TestClient(app)
    assert http.get("/readyz").status_code == 503
    assert "graft migrate" in http.get("/readyz").json()["reason"]
    assert http.get("/healthz").status_code == 200
    empty.migrate()
    assert http.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("mysql://localhost/x", "'mysql' is not supported"),
        ("sqlite://", "cannot be shared"),
        ("nonsense", "cannot be used"),
        ("sqlite:////no/such/folder/graft.db", "cannot be opened"),
        ("postgresql://user:secret@127.0.0.1:1/x", "cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(url: str, word: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database(url).migrate()
    assert word in caught.value.message
    assert "secret" not in caught.value.message
