"""The tools of `make chaos`: the network is as bad as it says, and the judge finds every kind of harm."""

import errno
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update

from graft import jobs
from graft.db import Database
from graft.models import AdapterFile, Job, JobEvent, Outbox
from graft.storage import DatabaseStorage
from graft_worker.failures import named

from .api import given
from .chaos.campaign import DISK_FULL
from .chaos.customer import STEPS, Accepted
from .chaos.judge import judge, weights_sha256
from .chaos.proxy import FAIR, Proxy, Weather

# -- the network --------------------------------------------------------------------------------------------------


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1024):
            self.request.sendall(data)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Proxy(server.server_address[1]) as opened:
            yield opened
        server.shutdown()


def connect(proxy: Proxy, timeout: float = 5) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout)


def test_good_weather_changes_nothing(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"hello")
        assert connection.recv(10) == b"hello"


def test_dropped_packets_arrive_when_it_is_over(proxy: Proxy) -> None:
    with connect(proxy, timeout=0.5) as connection:
        proxy.weather = Weather(stalled=True)
        connection.sendall(b"hello")
        with pytest.raises(TimeoutError):
            connection.recv(10)
        proxy.weather = FAIR
        connection.settimeout(5)
        assert connection.recv(10) == b"hello"


def test_delayed_packets_are_late_both_ways(proxy: Proxy) -> None:
    proxy.weather = Weather(delay=0.2)
    with connect(proxy) as connection:
        began = time.monotonic()
        connection.sendall(b"hello")
        assert connection.recv(10) == b"hello"
        assert time.monotonic() - began >= 0.4


def test_a_cut_ends_what_is_open_and_refusing_what_is_new(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"hello")
        connection.recv(10)
        proxy.weather = Weather(refused=True)
        proxy.cut()
        with pytest.raises(ConnectionError):
            ended(connection)
        with connect(proxy) as another, pytest.raises(ConnectionError):
            ended(another)
    proxy.weather = FAIR
    with connect(proxy) as connection:
        connection.sendall(b"again")
        assert connection.recv(10) == b"again"


def ended(connection: socket.socket) -> None:
    """Raises ConnectionError, whether the other side reset the connection or closed it."""
    connection.sendall(b"x")
    if connection.recv(10) == b"":
        raise ConnectionResetError


# -- the judge ----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(sqlite: Database) -> "World":
    return World(sqlite)


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    with given.migrated(f"sqlite:///{tmp_path / 'graft.db'}") as opened:
        yield opened


class World:
    """A finished and a cancelled job, as they should be."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.done = self._succeed()
        held = given.running_job(database)
        with database.write() as session:
            jobs.cancel(session, given.CALLER.project_id, held.job_id)
        self.accepted = {self.done: Accepted("plain"), held.job_id: Accepted("plain", cancel_sent=True)}
        self.cancelled = held.job_id
        with database.write() as session:
            session.execute(delete(Outbox))
        digest = weights_sha256(database, self.done)
        assert digest is not None
        self.expected = {"plain": digest}

    def _succeed(self) -> str:
        held = given.running_job(self.database)
        table = "step,train_loss\n" + "".join(f"{step},1.0\n" for step in range(1, STEPS + 1))
        content, _ = given.adapter(self.database)
        results = DatabaseStorage(self.database).put([table.encode()])
        with self.database.write() as session:
            assert jobs.succeed(
                session, held, step=STEPS, trained_tokens=9, content=content, results=results, events=[]
            )
        return held.job_id

    def find(self) -> dict[str, set[str]]:
        """What the judge holds against the jobs, by kind."""
        verdict = judge(self.database, self.accepted, self.expected)
        kinds = {"lost": verdict.lost, "double": verdict.double, "differing": verdict.differing, "gaps": verdict.gaps}
        found = {name: jobs for name, jobs in kinds.items() if jobs}
        assert verdict.is_good is (not found and not verdict.other)
        return found | ({"other": set()} if verdict.other else {})


def test_a_world_without_harm_is_good(world: World) -> None:
    assert world.find() == {}


def test_a_job_that_never_ended_or_vanished_is_lost(world: World) -> None:
    held = given.running_job(world.database)
    world.accepted |= {held.job_id: Accepted("plain"), "ftjob-gone": Accepted("plain")}
    with world.database.write() as session:
        session.execute(delete(Outbox))
    assert world.find() == {"lost": {held.job_id, "ftjob-gone"}}


def test_a_job_that_failed_or_was_cancelled_unasked_is_lost(world: World) -> None:
    world.accepted[world.cancelled].cancel_sent = False
    held = given.running_job(world.database)
    world.accepted[held.job_id] = Accepted("plain")
    with world.database.write() as session:
        jobs.fail(session, held, code="internal_error", message="m", param=None)
        session.execute(delete(Outbox))
    assert world.find() == {"lost": {world.cancelled, held.job_id}}
    verdict = judge(world.database, {held.job_id: Accepted("plain")}, {}, may_fail=frozenset({"internal_error"}))
    assert verdict.lost == set()


def test_a_full_disk_may_fail_a_job_by_the_workers_name_for_it(world: World) -> None:
    failure = named(OSError(errno.ENOSPC, "No space left on device"))
    assert failure is not None
    held = given.running_job(world.database)
    world.accepted[held.job_id] = Accepted("plain")
    with world.database.write() as session:
        jobs.fail(session, held, code=failure.code, message=failure.message, param=failure.param)
        session.execute(delete(Outbox))
    assert world.find() == {"lost": {held.job_id}}
    assert judge(world.database, world.accepted, world.expected, may_fail=frozenset({DISK_FULL})).is_good


def test_a_second_ending_and_a_second_job_are_found(world: World) -> None:
    with world.database.write() as session:
        last = session.get_one(Job, world.done).last_event
        session.add(
            JobEvent(
                job_id=world.done,
                seq=last + 1,
                id="ftevent-2",
                created_at=0.0,
                level="info",
                type="message",
                message="The job has successfully completed",
                data=None,
            )
        )
        session.execute(update(Job).where(Job.id == world.done).values(last_event=last + 1))
    phantom = given.new_job(world.database)
    assert world.find() == {"double": {world.done, phantom}}


def test_other_weights_and_other_steps_are_found(world: World) -> None:
    with world.database.write() as session:
        session.execute(
            update(AdapterFile).where(AdapterFile.name == "adapter_model.safetensors").values(sha256="0" * 64)
        )
    assert world.find() == {"differing": {world.done}}


def test_a_missing_event_is_found(world: World) -> None:
    with world.database.write() as session:
        session.execute(delete(JobEvent).where(JobEvent.job_id == world.done, JobEvent.seq == 3))
    assert world.find() == {"gaps": {world.done}}


def test_a_nudge_that_was_never_sent_is_found(world: World) -> None:
    given.queued_job(world.database)
    world.accepted |= {job: Accepted("plain", cancel_sent=True) for job in _all(world.database) - world.accepted.keys()}
    assert "other" in world.find()


def _all(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(select(Job.id)))
