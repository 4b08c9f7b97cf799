"""The faults of broker, database, storage and API, injected for real. docs/faults.md says which test is for which.

Those of workers and engines are in tests/worker and test_processes.py; all of them at random are in `make chaos`.
"""

import contextlib
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import func, select, text, update

from graft import db, jobs, queue
from graft.db import Database
from graft.errors import ConfigurationError
from graft.models import Blob, BlobChunk, Job, Outbox
from graft.storage import DatabaseStorage

from .api import given
from .chaos.proxy import FAIR, Proxy, Weather
from .processes import KEY, Service, Worker, cut, wait_for
from .services import PostgresServer, RedisServer

SHORT = {"GRAFT_LEASE_SECONDS": "4", "GRAFT_HEARTBEAT_SECONDS": "1", "GRAFT_POLL_SECONDS": "1"}


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with given.migrated(database_url) as opened:
        yield opened


@pytest.fixture
def on_postgres(postgres_url: str) -> Iterator[Database]:
    with given.migrated(postgres_url) as opened:
        yield opened


@pytest.fixture
def unheard_url(redis_url: str) -> str:
    """A broker to which no worker listens: the module's worker does to the first of the server's databases."""
    return redis_url.removesuffix("/0") + "/1"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(tmp_path_factory.mktemp("rows") / "train.jsonl", 16)


class Far:
    """PostgreSQL and Redis as from another machine: over TCP, through a network that can be made bad."""

    def __init__(self, postgres: PostgresServer, broker: RedisServer) -> None:
        self.postgres, self.redis = postgres, broker
        self.name = f"far_{uuid.uuid4().hex}"
        postgres.create_database(self.name)
        self.to_postgres = Proxy(postgres.folder / ".s.PGSQL.5432")
        self.to_redis = Proxy(broker.port)
        self.environment = {
            **SHORT,
            "GRAFT_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{self.to_postgres.port}/{self.name}",
            "GRAFT_BROKER_URL": f"redis://127.0.0.1:{self.to_redis.port}/0",
        }

    def close(self) -> None:
        for server in (self.postgres, self.redis):
            if not server.running:
                server.restart()
        self.to_postgres.__exit__()
        self.to_redis.__exit__()
        self.postgres.release_database(self.name)


@pytest.fixture(scope="module")
def far(
    postgres_server: PostgresServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Far]:
    for server in (postgres_server, redis_server):
        if not server.running:
            server.restart()
    made = Far(postgres_server, redis_server)
    yield made
    made.close()


@pytest.fixture(scope="module")
def service(far: Far, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("api"), environment=far.environment) as running:
        yield running


@pytest.fixture(scope="module")
def worker(far: Far, service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker"), far.environment) as running:
        yield running


@pytest.fixture(scope="module")
def expected(service: Service, worker: Worker, rows: Path) -> str:
    """The digest of the weights when nothing happens."""
    return service.weights_sha256(service.wait_for_end(long_job(service, rows)))


def long_job(service: Service, rows: Path) -> str:
    return service.create(service.upload(rows), n_epochs=4, batch_size=1, extra_body={"n_evals": 4}).id


class Poller(threading.Thread):
    """Somebody who asks for the job all the time, with the SDK's own retries."""

    def __init__(self, service: Service, job_id: str) -> None:
        super().__init__()
        self._client = service.client.with_options(max_retries=2, timeout=10)
        self._job_id = job_id
        self.stop = threading.Event()
        self.failed: list[Exception] = []
        self.slowest, self.asked = 0.0, 0

    def run(self) -> None:
        while not self.stop.wait(0.1):
            began = time.monotonic()
            try:
                self._client.fine_tuning.jobs.retrieve(self._job_id)
            except openai.OpenAIError as error:
                self.failed.append(error)
            self.asked += 1
            self.slowest = max(self.slowest, time.monotonic() - began)

    def __enter__(self) -> "Poller":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.join()


# -- the broker ---------------------------------------------------------------------------------------------------


def test_a_nudge_that_is_delivered_fifty_times_runs_the_job_once(
    far: Far, service: Service, worker: Worker, rows: Path
) -> None:
    job = service.create(service.upload(rows)).id
    for _ in range(50):
        queue.nudge(far.redis.url, job)
    assert service.wait_for_end(job).attempt == 1  # type: ignore[attr-defined]
    with redis.Redis.from_url(far.redis.url) as client:
        wait_for("all of them to be read", lambda: client.llen(queue.QUEUE) == 0, 20)
    after = service.job(job)
    assert (after.status, after.attempt) == ("succeeded", 1)  # type: ignore[attr-defined]
    messages = [event.message for event in service.events(job)]
    assert messages.count("Fine-tuning job started") == 1


def test_packets_to_the_broker_that_are_dropped_hold_up_no_request_and_no_training(
    far: Far, service: Service, worker: Worker, rows: Path, expected: str
) -> None:
    first = long_job(service, rows)
    service.wait_for_step(first, 3)
    far.to_redis.weather = Weather(stalled=True)
    try:
        file = service.upload(rows)
        began = time.monotonic()
        others = [service.create(file).id for _ in range(2)]
        assert time.monotonic() - began < 2 * 2
        ended = service.wait_for_end(first)
    finally:
        far.to_redis.weather = FAIR
    assert (ended.attempt, service.weights_sha256(ended)) == (1, expected)  # type: ignore[attr-defined]
    # Without a nudge the worker looks for itself; with one again, the queue drains.
    for each in others:
        assert service.wait_for_end(each).attempt == 1  # type: ignore[attr-defined]


def test_a_nudge_whose_sending_was_not_written_down_is_sent_again(
    database: Database, tmp_path: Path, unheard_url: str
) -> None:
    made = given.Service.over(database, tmp_path, broker_url=unheard_url)
    job = given.queued_job(database)
    # The sender is killed after the broker has taken the message, and before its row is gone.
    with database.write() as session:
        if database.is_sqlite:
            session.execute(text("create trigger dies before delete on outbox begin select raise(abort, 'dies'); end"))
        else:
            session.execute(
                text(
                    "create function dies() returns trigger language plpgsql as $$ begin raise exception 'dies'; end $$"
                )
            )
            session.execute(text("create trigger dies before delete on outbox for each row execute function dies()"))
    with pytest.raises(Exception, match="dies"):
        made.app.state.service.housekeeping.send_nudges()
    with database.write() as session:
        session.execute(text("drop trigger dies" if database.is_sqlite else "drop trigger dies on outbox"))
    made.app.state.service.housekeeping.send_nudges()
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 0
    with redis.Redis.from_url(unheard_url) as client:
        assert client.llen(queue.QUEUE) == 2
    # However often it was sent, it is one job for one worker.
    claims = []
    for worker in ("a", "b"):
        with database.write() as session:
            claims.append(jobs.claim(session, worker, lease_seconds=60, job_id=job))
    assert [claim is not None for claim in claims] == [True, False]


def test_a_broker_that_is_away_keeps_its_nudges_in_the_outbox(
    database: Database, tmp_path: Path, redis_server: RedisServer, unheard_url: str
) -> None:
    made = given.Service.over(database, tmp_path, broker_url=unheard_url)
    given.queued_job(database)
    redis_server.kill()
    began = time.monotonic()
    made.app.state.service.housekeeping.send_nudges()
    assert time.monotonic() - began < 10
    with pytest.raises((BrokerError, OSError)):
        queue.nudge(unheard_url, "ftjob-x")
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 1
    redis_server.restart()
    made.app.state.service.housekeeping.send_nudges()
    with redis.Redis.from_url(unheard_url) as client:
        assert client.llen(queue.QUEUE) == 1


# -- PostgreSQL ---------------------------------------------------------------------------------------------------


def test_a_database_that_is_killed_again_and_again_fails_no_job_and_no_patient_poll(
    far: Far, service: Service, worker: Worker, rows: Path, expected: str
) -> None:
    job = long_job(service, rows)
    service.wait_for_step(job, 3)
    with Poller(service, job) as poller:
        for _ in range(3):
            far.postgres.kill()
            time.sleep(0.5)
            with pytest.raises(openai.InternalServerError) as refused:
                service.job(job)
            assert refused.value.status_code == 503
            assert refused.value.code == "database_unavailable"
            assert refused.value.response.headers["Retry-After"] == "2"
            far.postgres.restart()
            time.sleep(2)
        ended = service.wait_for_end(job)
    assert (ended.attempt, service.weights_sha256(ended)) == (1, expected), worker.log  # type: ignore[attr-defined]
    assert len(poller.failed) <= 0.01 * poller.asked, poller.failed
    assert "Traceback" not in worker.log
    seqs = [event.id for event in service.events(job)]
    assert len(seqs) == len(set(seqs))


def test_a_network_that_is_cut_between_worker_and_database_costs_nothing(
    far: Far, worker: Worker, service: Service, rows: Path, expected: str, tmp_path: Path
) -> None:
    # The API reaches the database another way, and looks for silent workers all the while.
    job = long_job(service, rows)
    service.wait_for_step(job, 3)
    far.to_postgres.weather = Weather(refused=True)
    far.to_postgres.cut()
    time.sleep(2.5)  # less than a lease
    far.to_postgres.weather = FAIR
    ended = service.wait_for_end(job)
    assert (ended.attempt, service.weights_sha256(ended)) == (1, expected), worker.log  # type: ignore[attr-defined]


def test_a_pool_that_is_used_up_answers_503_in_time_and_recovers(on_postgres: Database, tmp_path: Path) -> None:
    made = given.Service.over(on_postgres, tmp_path)
    http = made.http()
    with contextlib.ExitStack() as held:
        for _ in range(30):
            held.enter_context(on_postgres.engine.connect())
        began = time.monotonic()
        answer = http.get("/v1/models")
        assert time.monotonic() - began < 7
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "2"
        assert answer.json()["error"]["code"] == "database_unavailable"
    assert http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("code", ["40P01", "40001"], ids=["deadlock", "serialization failure"])
def test_a_conflict_between_transactions_is_not_seen_by_the_sdk(
    on_postgres: Database, tmp_path: Path, code: str
) -> None:
    made = given.Service.over(on_postgres, tmp_path)
    file = given.dataset(on_postgres)
    with on_postgres.write() as session:
        # Every other insertion is the victim, as told by the server itself.
        session.execute(text("create sequence turns"))
        session.execute(
            text(
                "create function victim() returns trigger language plpgsql as $$ begin "
                f"if nextval('turns') % 2 = 1 then raise exception 'victim' using errcode = '{code}'; end if; "
                "return new; end $$"
            )
        )
        session.execute(
            text("create trigger victim before insert on fine_tuning_jobs for each row execute function victim()")
        )
    patient = made.sdk().with_options(max_retries=2)
    made_ids = [patient.fine_tuning.jobs.create(model="tiny", training_file=file.id, seed=n).id for n in range(2)]
    with on_postgres.read() as session:
        assert sorted(session.scalars(select(Job.id))) == sorted(made_ids)
        assert session.scalar(text("select last_value from turns")) == 4


def test_leases_go_by_the_databases_clock_alone(
    on_postgres: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = given.queued_job(on_postgres)
    real = time.time
    for jump in (7200.0, -7200.0, 0.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        with on_postgres.write() as session:
            claim = jobs.claim(session, "w", lease_seconds=30, job_id=job)
        assert claim is not None
        with on_postgres.write() as session:
            assert jobs.until_overdue(session) == pytest.approx(30, abs=1)
            assert jobs.reap(session, max_recoveries=3) == []
            assert jobs.beat(session, claim, lease_seconds=30)
            left = session.scalar(select(Job.lease_until - db.now()).where(Job.id == job))
            assert left == pytest.approx(30, abs=1)
            assert jobs.release(session, claim, "next")


def test_four_reapers_take_each_job_back_once(database: Database) -> None:
    ids = [given.queued_job(database) for _ in range(20)]
    for job in ids:
        with database.write() as session:
            assert jobs.claim(session, "silent", lease_seconds=60, job_id=job) is not None
    with database.write() as session:
        session.execute(update(Job).values(lease_until=db.now() - 1))

    def reap(_: int) -> list[str]:
        with database.write() as session:
            return jobs.reap(session, max_recoveries=3)

    with ThreadPoolExecutor(4) as reapers:
        reaped = [job for each in reapers.map(reap, range(8)) for job in each]
    assert sorted(reaped) == sorted(ids)
    with database.read() as session:
        assert set(session.execute(select(Job.status, Job.recoveries, Job.attempt)).all()) == {("queued", 1, 2)}


def test_a_migration_that_is_killed_is_finished_by_the_next(database_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graft.cli", "migrate"]
    environment = {**os.environ, "GRAFT_DATABASE_URL": database_url, "GRAFT_DATA_DIR": str(tmp_path)}
    if database_url.startswith("sqlite"):

        def begun() -> bool:
            with contextlib.closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), timeout=0)) as connection:
                try:
                    connection.execute("begin immediate")
                except sqlite3.OperationalError:
                    return True
                return False

    else:
        looking = Database(database_url)

        def begun() -> bool:
            with looking.read() as session:
                held = "select count(*) from pg_locks where locktype = 'advisory' and database = (select oid from "
                return bool(session.scalar(text(held + "pg_database where datname = current_database())")))

    killed = 0
    for delay in (0.0, 0.01, 0.04):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and not begun():
                pass
            time.sleep(delay)
            killed += process.poll() is None
            process.kill()
    assert killed >= 1
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    opened = Database(database_url)
    opened.require_current()
    opened.dispose()
    if not database_url.startswith("sqlite"):
        looking.dispose()


# -- SQLite -------------------------------------------------------------------------------------------------------


def test_a_write_waits_for_another_process_that_holds_the_lock(tmp_path: Path) -> None:
    with Service(tmp_path, "--workers", "0") as service:
        file = service.upload(cut(tmp_path / "rows.jsonl", 12))
        with contextlib.closing(sqlite3.connect(tmp_path / "graft.db", isolation_level=None)) as other:
            other.execute("begin immediate")
            with ThreadPoolExecutor(5) as pool:
                made = [pool.submit(service.create, file) for _ in range(4)]
                time.sleep(2)
                assert service.client.fine_tuning.jobs.list().data == []  # looking needs no lock
                other.execute("rollback")
                assert len({each.result(timeout=20).id for each in made}) == 4


MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
nas:/export /srv/nas nfs4 rw,vers=4.2 0 0
nas:/export/local\\040disk /srv/nas/local\\040disk xfs rw 0 0
//nas/share /srv/share cifs rw 0 0
share /srv/virtual virtiofs rw 0 0
drive /srv/drive 9p rw 0 0
me@host: /srv/remote fuse.sshfs rw 0 0
/dev/sdb1 /srv/stick fuseblk rw 0 0
overlay /srv/container overlay rw 0 0
old:/a /srv/twice nfs rw 0 0
/dev/sdc /srv/twice btrfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "shared"),
    [
        ("/home/me/graft.db", "ext4", False),
        ("/srv/nas/graft.db", "nfs4", True),
        ("/srv/nas/local disk/graft.db", "xfs", False),
        ("/srv/nasty/graft.db", "ext4", False),
        ("/srv/share/a/b/graft.db", "cifs", True),
        ("/srv/virtual/graft.db", "virtiofs", True),
        ("/srv/drive/graft.db", "9p", True),
        ("/srv/remote/graft.db", "fuse.sshfs", True),
        ("/srv/stick/graft.db", "fuseblk", False),
        ("/srv/container/graft.db", "overlay", False),
        ("/srv/twice/graft.db", "btrfs", False),
    ],
)
def test_a_file_system_is_found_in_the_table_of_mounts(path: str, kind: str, shared: bool) -> None:
    assert db.file_system_of(Path(path), MOUNTS)[1] == kind
    assert db.is_shared(kind) is shared


def test_a_database_on_a_shared_file_system_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text(f"/dev/vda / ext4 rw 0 0\nnas:/x {tmp_path / 'nas'} nfs rw 0 0\n")
    monkeypatch.setattr(db, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "nas").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nas")
    for folder in ("nas", "link"):
        with pytest.raises(ConfigurationError, match=r"of type nfs.*corrupts there.*GRAFT_DATABASE_URL"):
            Database(f"sqlite:///{tmp_path / folder / 'graft.db'}")
    assert list((tmp_path / "nas").iterdir()) == []
    Database(f"sqlite:///{tmp_path / 'graft.db'}").dispose()


# -- full disks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    point = tmp_path / "small"
    point.mkdir()
    options = ["-t", "tmpfs", "-o", "size=16m,mode=700", "graft-test"]
    if os.geteuid() != 0 or subprocess.run(["mount", *options, point], capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk, and not everywhere")
    yield point
    subprocess.run(["umount", "--lazy", point], check=True)


@pytest.mark.parametrize("place", ["the database's", "/tmp's"])
def test_an_upload_that_finds_the_disk_full_is_507_and_is_never_seen(
    small_disk: Path, tmp_path: Path, place: str
) -> None:
    reserve = small_disk / "reserve"
    reserve.write_bytes(bytes(8 * 2**20))
    data = small_disk if place == "the database's" else tmp_path / "data"
    environment = {"TMPDIR": str(small_disk)} if place == "/tmp's" else {}
    large = tmp_path / "large.jsonl"
    large.write_bytes(cut(tmp_path / "rows.jsonl", 300).read_bytes() * 150)
    assert large.stat().st_size > 10 * 2**20
    with Service(data, "--workers", "0", environment=environment) as service:
        for _ in range(3):
            with pytest.raises(openai.InternalServerError) as refused:
                service.upload(large)
            assert refused.value.status_code == 507, service.log
            assert refused.value.code == "insufficient_storage"
        assert list(service.client.files.list()) == []
        # It goes on as soon as somebody has made room.
        reserve.unlink()
        file = service.upload(tmp_path / "rows.jsonl")
        assert service.client.files.content(file).content == (tmp_path / "rows.jsonl").read_bytes()
        assert "Traceback" not in service.log
    assert [each for each in small_disk.iterdir() if not each.name.startswith(("graft.db", "serve-"))] == []
    # What could not be removed while nothing could be written goes with the next sweep.
    opened = Database(f"sqlite:///{data / 'graft.db'}")
    DatabaseStorage(opened).sweep(-1)
    with opened.read() as session:
        assert session.scalar(select(func.count()).select_from(Blob)) == 1
        assert session.scalar(select(func.count()).select_from(BlobChunk)) == 1
    opened.dispose()


# -- the API's process --------------------------------------------------------------------------------------------


def test_an_api_that_is_told_to_stop_finishes_what_it_is_at(tmp_path: Path) -> None:
    rows = cut(tmp_path / "rows.jsonl", 60).read_bytes()
    head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
    head += b'Content-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    body = head + rows + b"\r\n--b--\r\n"
    with Service(tmp_path, "--workers", "0") as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            lines = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
            lines += f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(lines.encode() + body[:1000])
            time.sleep(0.5)
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            time.sleep(1)
            connection.sendall(body[1000:])
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert service.process.wait(30) == 0
        assert time.monotonic() - began < 30
    with Service(tmp_path, "--workers", "0") as service:
        (file,) = service.client.files.list()
        assert file.bytes == len(rows)


def test_more_connections_than_descriptors_are_survived(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))

    with Service(tmp_path, "--workers", "0", preexec_fn=limit) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as held:
            for _ in range(150):
                held.enter_context(socket.create_connection((host, int(port)), timeout=5))
            time.sleep(1)
            assert service.process.poll() is None
        wait_for("an answer", lambda: answers(service), 20)
        service.upload(cut(tmp_path / "rows.jsonl", 12))
        assert service.stop() == 0


def answers(service: Service) -> bool:
    try:
        with urllib.request.urlopen(f"{service.url}/healthz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
