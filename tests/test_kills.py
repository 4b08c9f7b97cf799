"""Twenty kills of supervisors and engines: no job lost, none completed twice, no adapter that differs."""

import uuid
from pathlib import Path

import pytest

from .kills import ENVIRONMENT, campaign
from .processes import Service
from .services import PostgresServer, RedisServer

KILLS = 10
pytestmark = pytest.mark.timeout(900)


def test_ten_kills_on_sqlite_lose_nothing_and_change_no_bit(tmp_path: Path) -> None:
    with Service(tmp_path, "--workers", "0", environment=ENVIRONMENT) as service:
        outcome = campaign(service, ENVIRONMENT, kills=KILLS, seed=11)
    print(f"\n{outcome}")
    assert not outcome.faults, outcome
    assert sum(outcome.kills.values()) >= KILLS


def test_ten_kills_on_postgresql_and_redis_lose_nothing_and_change_no_bit(
    tmp_path: Path, postgres_server: PostgresServer, redis_server: RedisServer
) -> None:
    name = f"kills_{uuid.uuid4().hex}"
    environment = {
        **ENVIRONMENT,
        "GRAFT_DATABASE_URL": postgres_server.create_database(name),
        "GRAFT_BROKER_URL": redis_server.url,
    }
    with Service(tmp_path, "--workers", "0", environment=environment) as service:
        outcome = campaign(service, environment, kills=KILLS, seed=12)
    postgres_server.release_database(name)
    print(f"\n{outcome}")
    assert not outcome.faults, outcome
    assert sum(outcome.kills.values()) >= KILLS
