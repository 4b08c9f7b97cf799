"""What every test stands on: a clean environment, no network, a real PostgreSQL and a real Redis."""

import ipaddress
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any import of the program: whoever runs the tests may have a service, a broker or a database of their own set.
proxies = ("http_proxy", "https_proxy", "all_proxy")
for variable in list(os.environ):
    if variable.startswith(("GRAFT_", "CELERY_", "PG")) or variable.lower() in proxies:
        del os.environ[variable]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import redis  # noqa: E402

from .services import PostgresServer, RedisServer  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device cuda` runs the numerical tests (tests/kernels, tests/worker) on a GPU; without it everything is CPU."""
    parser.addoption("--device", default="cpu", help="torch device of the numerical tests")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the numerical tests compute."""
    return str(request.config.getoption("--device"))


class NetworkBlocked(RuntimeError):
    """A test tried to leave this machine. Not an OSError: code that forgives a broken network must not hide it."""


def is_local(family: int, address: Any) -> bool:
    """Whether connecting there stays on this machine."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0].decode() if isinstance(address[0], bytes | bytearray) else address[0]
    if host in ("", "localhost"):
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_loopback or ip.is_unspecified


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Lets tests connect to this machine only. Guards Python's sockets in this process, not its children's."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def check(sock: socket.socket, address: Any) -> None:
        if not is_local(sock.family, address):
            raise NetworkBlocked(f"a test tried to connect to {address!r}; tests may only reach this machine")

    def guarded_connect(sock: socket.socket, address: Any) -> None:
        check(sock, address)
        connect(sock, address)

    def guarded_connect_ex(sock: socket.socket, address: Any) -> int:
        check(sock, address)
        return connect_ex(sock, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        yield


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the whole run. A test may kill it; `redis_url` and `database_url` start it again if need be."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty Redis."""
    if not redis_server.running:
        redis_server.restart()
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the whole run. A test that uses it makes databases of its own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty PostgreSQL database, gone afterwards."""
    if not postgres_server.running:
        postgres_server.restart()
    name = f"test_{uuid.uuid4().hex}"
    yield postgres_server.create_database(name)
    if not postgres_server.running:
        postgres_server.restart()
    postgres_server.release_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once as an SQLite file and once in PostgreSQL: a test that takes it runs on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'graft.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url
