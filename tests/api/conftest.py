"""A migrated database (on both servers, or on SQLite alone), the service over it, and an empty bucket."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from graft.db import Database

from . import given
from .bucket import Bucket, S3Server, set_credentials
from .given import Service


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with all tables and the default project, to be copied: making one takes half a second."""
    path = tmp_path_factory.mktemp("migrated") / "graft.db"
    with given.migrated(f"sqlite:///{path}"):
        return path


@pytest.fixture
def database(database_url: str, migrated_file: Path) -> Iterator[Database]:
    """A database on SQLite and on PostgreSQL: a test that takes it runs on both."""
    if database_url.startswith("sqlite:///"):
        shutil.copy(migrated_file, database_url.removeprefix("sqlite:///"))
    with given.migrated(database_url) as database:
        yield database


@pytest.fixture
def sqlite(migrated_file: Path, tmp_path: Path) -> Iterator[Database]:
    """A database on SQLite alone, for what no database changes."""
    path = shutil.copy(migrated_file, tmp_path / "graft.db")
    with given.migrated(f"sqlite:///{path}") as database:
        yield database


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


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    set_credentials(monkeypatch)
    return s3_server.bucket()
