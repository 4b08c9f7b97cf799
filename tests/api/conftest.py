"""A migrated database (on both servers, or on SQLite alone) and the service over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from graft import tenancy
from graft.db import Database

from .given import Service


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with all tables and the default project, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "graft.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.dispose()
    return path


@pytest.fixture
def database(database_url: str, migrated_file: Path) -> Iterator[Database]:
    """A database on SQLite and on PostgreSQL: a test that takes it runs on both."""
    opened = Database(database_url)
    if opened.is_sqlite:
        shutil.copy(migrated_file, str(opened.url.database))
    else:
        opened.migrate()
    with opened.write() as session:
        tenancy.ensure_defaults(session, None)
    yield opened
    opened.dispose()


@pytest.fixture
def sqlite(migrated_file: Path, tmp_path: Path) -> Iterator[Database]:
    """A database on SQLite alone, for what no database changes."""
    path = shutil.copy(migrated_file, tmp_path / "graft.db")
    opened = Database(f"sqlite:///{path}")
    with opened.write() as session:
        tenancy.ensure_defaults(session, None)
    yield opened
    opened.dispose()


@pytest.fixture
def service(sqlite: Database, tmp_path: Path) -> Service:
    return Service.over(sqlite, tmp_path)


@pytest.fixture
def service_on_both(database: Database, tmp_path: Path) -> Service:
    return Service.over(database, tmp_path)


@pytest.fixture
def http(service: Service) -> TestClient:
    return service.http()


@pytest.fixture
def sdk(service: Service) -> OpenAI:
    return service.sdk()
