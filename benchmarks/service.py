"""What following, queueing and claiming jobs costs: each figure a ratio of two things measured side by side.

    python benchmarks/service.py                                   # all, on SQLite and on PostgreSQL from its wheel
    python benchmarks/service.py --only polls,claims --seconds 2 --out results.txt

The API runs as `graft serve` in a process of its own, on one core where there are two; the load comes from another.
What is compared runs in turns (A B A B), and a ratio is the median of the pairs with its smallest and largest. Figures
of one machine are not to be held against another's; the ratios are. No GPU is needed.

polls    requests a second of a job's poll, by key, against a bare async endpoint of the same server; with its ETag: 304
queue    p99 of a claim and of a page of jobs with 10,000 queued against 100
claims   claim and finish through `graft.jobs`, against the same statements sent by hand
drain    10,000 jobs that do nothing, 4 workers: lost, done twice, out of order
create   p99 of creating a job, 20 a second; statements of a creation and of a poll
events   a page of events of a job with 260,000 against one with 100
idle     CPU of the API and of a worker that have nothing to do; what they ask the database
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import httptools
import psutil
from sqlalchemy import Table, event, func, insert, select, text
from sqlalchemy.orm import Session

from graft import __version__, files, jobs, tenancy
from graft.adapters import AdapterContent
from graft.db import Database
from graft.ids import new_id
from graft.jobs import Claim, Event
from graft.models import Adapter, Job, JobEvent
from graft.recipe import Recipe
from graft.schemas import JobCreate
from graft.storage import Stored
from graft.tenancy import Caller

ROOT = Path(__file__).parents[1]
KEY = "sk-bench-0123456789abcdef"
CALLER = Caller(tenancy.DEFAULT_PROJECT, tenancy.DEFAULT_ORGANIZATION)
JOBS = "/v1/fine_tuning/jobs"
CONNECTIONS = 16
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
NOTHING = Stored(sha256="0" * 64, size=1)

Say = Callable[[str, str, str, str, bool | None], None]


# -- databases with jobs in them ----------------------------------------------------------------------------------


class Filled:
    """A migrated database with one project, one dataset and as many jobs as are asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.database = Database(url)
        self.database.migrate()
        with self.database.write() as session:
            tenancy.ensure_defaults(session, KEY)
            self.training_file = files.create(
                session,
                CALLER.project_id,
                NOTHING,
                filename="train.jsonl",
                purpose="fine-tune",
                report={"rows": 10, "error_count": 0},
            ).id

    @property
    def name(self) -> str:
        return self.database.engine.dialect.name

    def job(self) -> str:
        """A queued job."""
        body = JobCreate(model="graft-tiny", training_file=self.training_file)
        with self.database.write() as session:
            job_id = jobs.create(session, CALLER, body, base_model="graft-tiny", key=None, body_sha256="0" * 64).id
            assert jobs.queue(session, job_id, Recipe(base_model="graft-tiny"), [], estimate={"seconds": 600.0})
        return job_id

    def running(self) -> Claim:
        """A job that somebody runs, for longer than this takes."""
        job_id = self.job()
        with self.database.write() as session:
            held = jobs.claim(session, "bench", lease_seconds=1e6, job_id=job_id)
        assert held is not None
        return held

    def queue(self, count: int) -> list[str]:
        """So many queued jobs, oldest first: one as it is made, and copies of it that are a second younger each."""
        first = self.job()
        table, told = cast(Table, Job.__table__), cast(Table, JobEvent.__table__)
        with self.database.write() as session:
            row = session.execute(select(table).where(table.c.id == first)).mappings().one()
            events = session.execute(select(told).where(told.c.job_id == first)).mappings().all()
            copies = [
                {**row, "id": new_id("ftjob-"), "created_at": row["created_at"] - count + number}
                for number in range(1, count)
            ]
            if copies:
                session.execute(insert(table), copies)
                session.execute(
                    insert(told),
                    [{**each, "job_id": copy["id"], "id": new_id("ftevent-")} for copy in copies for each in events],
                )
        if self.name == "postgresql":
            with self.database.engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("vacuum analyze"))
        return [*(copy["id"] for copy in copies), first]

    def events(self, held: Claim, count: int) -> None:
        """So many more events of a running job."""
        for begin in range(0, count, 5000):
            told = [
                Event(f"Step {n}: training loss=1.00", type="metrics", data={"step": n, "train_loss": 1.0})
                for n in range(begin, min(begin + 5000, count))
            ]
            with self.database.write() as session:
                assert jobs.beat(session, held, lease_seconds=1e6, events=told)


class Places:
    """Where databases are made: SQLite files in a folder, and databases of one PostgreSQL."""

    def __init__(self, folder: Path, server: Any) -> None:
        self._folder, self._server = folder, server
        self._count = 0

    def fill(self, kind: str) -> Filled:
        """A new one."""
        self._count += 1
        if kind == "sqlite":
            return Filled(f"sqlite:///{self._folder / f'{self._count}.db'}")
        return Filled(self._server.create_database(f"bench_{self._count}"))

    @property
    def folder(self) -> Path:
        return self._folder

    def statements(self) -> int:
        """How many PostgreSQL has logged, without those that begin or end a transaction."""
        return len(_LOGGED.findall((self._server.folder / "log").read_text()))


_LOGGED = re.compile(r" LOG:  (?:statement|execute [^:]+): (?!BEGIN|COMMIT|ROLLBACK)")


# -- servers and load ---------------------------------------------------------------------------------------------


def _pin(core: int) -> Callable[[], None] | None:
    """For a child process: its own core, where there is more than one."""
    if len(CORES) < 2:
        return None
    return lambda: os.sched_setaffinity(0, {CORES[core]})


@contextmanager
def serving(command: list[str], environment: dict[str, str] | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """A server that prints its address: `127.0.0.1:port`, and the process."""
    with tempfile.NamedTemporaryFile("r") as log, Path(log.name).open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "GRAFT_LOG_LEVEL": "WARNING", **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_pin(0),
        )
        try:
            deadline = time.monotonic() + 60
            while (found := re.search(r"127\.0\.0\.1:\d+", log.read())) is None:
                log.seek(0)
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {log.read()}")
                time.sleep(0.05)
            yield found.group(), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def graft_serve(filled: Filled, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`graft serve` without workers over this database."""
    command = ["-m", "graft.cli", "serve", "--port", "0", "--workers", "0", "--data-dir", str(folder)]
    with serving(command, {"GRAFT_DATABASE_URL": filled.url, "GRAFT_API_KEY": KEY}) as found:
        yield found


def bare() -> None:
    """The endpoint that polls are measured against: the same framework and server, and nothing else."""
    import socket

    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/v1/fine_tuning/jobs/{job_id}")
    async def job(job_id: str) -> dict[str, str]:
        return {"id": job_id, "status": "running"}

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # as `graft serve` does
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, http="httptools")).run(sockets=[listener])


class _Client(asyncio.Protocol):
    """One connection that asks the same again as soon as it is answered."""

    def __init__(self, request: bytes, wanted: int, latencies: list[float]) -> None:
        self._request, self._wanted, self._latencies = request, wanted, latencies
        self._parser: Any = httptools.HttpResponseParser(self)
        self._transport: Any = None
        self._asked = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._asked = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        assert status == self._wanted, f"answered with {status}"
        self._latencies.append(time.perf_counter() - self._asked)
        self._parser = httptools.HttpResponseParser(self)
        self._ask()

    def close(self) -> None:
        self._transport.abort()


async def _run_load(address: str, request: bytes, wanted: int, seconds: float) -> list[float]:
    host, port = address.split(":")
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: _Client(request, wanted, latencies), host, int(port))
        for _ in range(CONNECTIONS)
    ]
    await asyncio.sleep(seconds)
    taken = list(latencies)
    for _, client in made:
        client.close()
    return taken


def _loader(inbox: Any, outbox: Any) -> None:
    if len(CORES) > 1:
        os.sched_setaffinity(0, {CORES[1]})
    while (task := inbox.get()) is not None:
        outbox.put(asyncio.run(_run_load(*task)))


@contextmanager
def load() -> Iterator[Callable[[str, bytes, int, float], list[float]]]:
    """A process that keeps CONNECTIONS connections busy: the latencies of all answers within the seconds."""
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=_loader, args=(inbox, outbox), daemon=True)
    process.start()

    def run(address: str, request: bytes, wanted: int, seconds: float) -> list[float]:
        inbox.put((address, request, wanted, seconds))
        found: list[float] = outbox.get()
        return found

    yield run
    inbox.put(None)
    process.join(10)


def get(path: str, **headers: str) -> bytes:
    """A request as bytes."""
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {KEY}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


class Patient:
    """One patient client with one connection."""

    def __init__(self, address: str) -> None:
        self._http = HTTPConnection(address, timeout=60)

    def __call__(self, path: str, body: Any = None) -> tuple[float, dict[str, str], bytes]:
        """Seconds, headers and content of one answer."""
        began = time.perf_counter()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        self._http.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
        answer = self._http.getresponse()
        content = answer.read()
        seconds = time.perf_counter() - began
        assert answer.status == 200, f"{path}: {answer.status} {content!r}"
        return seconds, {name.lower(): value for name, value in answer.getheaders()}, content


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds."""
    return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, str]:
    """Median of first ÷ second, and it with the smallest and the largest in words."""
    ratios = [first / second for first, second in pairs]
    middle = statistics.median(ratios)
    return middle, f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


# -- what is measured ---------------------------------------------------------------------------------------------


def polls(kind: str, places: Places, seconds: float, say: Say) -> None:
    """L1 to L3."""
    filled = places.fill(kind)
    held = filled.running()
    filled.events(held, 50)
    path = f"{JOBS}/{held.job_id}"
    with (
        serving([__file__, "--bare"]) as (bare_address, bare_process),
        graft_serve(filled, places.folder) as (address, process),
        load() as run,
    ):
        tag = Patient(address)(path)[1]["etag"]
        asked = [
            (bare_address, get(path), 200, bare_process),
            (address, get(path), 200, process),
            (address, get(path, If_None_Match=tag), 304, process),
        ]
        rates: list[list[tuple[float, float]]] = [[], [], []]
        latencies: list[float] = []
        for _ in range(5):
            for which, (where, request, status, server) in enumerate(asked):
                used = cpu(server)
                taken = run(where, request, status, seconds)
                rates[which].append((len(taken) / seconds, len(taken) / (cpu(server) - used)))
                if which == 1:
                    latencies += taken
    goal = 0.20 if kind == "sqlite" else 0.10
    number = "L1" if kind == "sqlite" else "L2"
    for what, top, bottom, most in (
        (f"{number} poll / bare endpoint", rates[1], rates[0], goal),
        ("L3 poll with ETag (304) / poll", rates[2], rates[1], 1.3),
    ):
        middle, words = ratio([(a, b) for (a, _), (b, _) in zip(top, bottom, strict=True)])
        _, of_cpu = ratio([(a, b) for (_, a), (_, b) in zip(top, bottom, strict=True)])
        each = f"{top[-1][0]:.0f}/s to {bottom[-1][0]:.0f}/s; by the server's CPU {of_cpu}"
        say(what, kind, f"{words}; {each}", f">= {most:.2f}", middle >= most)
    say("poll p99 at 16 connections", kind, f"{p99(latencies) * 1e3:.0f} ms", "", None)


def cpu(process: psutil.Process) -> float:
    """Seconds of CPU that the process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


class _Undone(Exception):
    """Ends a transaction that shall leave nothing behind."""


def queue(kind: str, places: Places, seconds: float, say: Say) -> None:
    """L10."""
    small, large = places.fill(kind), places.fill(kind)
    small.queue(100)
    ids = large.queue(10_000)

    def claim(filled: Filled) -> float:
        began = time.perf_counter()
        with suppress(_Undone), filled.database.write() as session:
            assert jobs.claim(session, "bench", lease_seconds=60, device_bytes=2**40, warm="graft-tiny") is not None
            took = time.perf_counter() - began
            raise _Undone
        return took

    rounds = max(100, int(seconds * 100))
    for filled in (small, large):
        for _ in range(10):
            claim(filled)
    pairs = []
    for _ in range(5):
        taken = [(claim(small), claim(large)) for _ in range(rounds)]
        pairs.append((p99([b for _, b in taken]), p99([a for a, _ in taken])))
    middle, words = ratio(pairs)
    say("L10 claim p99, 10,000 queued / 100", kind, f"{words}; {pairs[-1][0] * 1e3:.1f} ms", "<= 1.50", middle <= 1.5)

    with (
        graft_serve(small, places.folder / "small") as (one, _),
        graft_serve(large, places.folder / "large") as (other, _),
    ):
        clients = Patient(one), Patient(other)
        for path in (JOBS, f"{JOBS}?after={ids[5000]}"):
            pages = []
            where = JOBS if path == JOBS else f"{JOBS}?after={_middle(clients[0])}"
            for _ in range(5):
                taken = [(clients[0](where)[0], clients[1](path)[0]) for _ in range(rounds)]
                pages.append((p99([b for _, b in taken]), p99([a for a, _ in taken])))
            middle, words = ratio(pages)
            name = "first page" if path == JOBS else "page in the middle"
            took = f"{pages[-1][0] * 1e3:.1f} ms"
            say(f"L10 {name} p99, 10,000 queued / 100", kind, f"{words}; {took}", "<= 1.50", middle <= 1.5)


def _middle(client: Patient) -> str:
    found: str = json.loads(client(f"{JOBS}?limit=50")[2])["last_id"]
    return found


def claims(kind: str, places: Places, seconds: float, say: Say) -> None:
    """L9. What goes to the driver is noted while `graft.jobs` works, and then sent to an equal database by hand."""
    rounds = max(200, int(seconds * 150))
    pairs = []
    for _ in range(3):
        noted, through, by_hand = (places.fill(kind) for _ in range(3))
        noted.queue(rounds)
        for copy in (through, by_hand):
            _copy(noted, copy)
        sent = _noting(noted, lambda filled=noted: _claim_and_finish(filled, "bench"))  # type: ignore[misc]
        took = _claim_and_finish(through, "bench")
        pairs.append((_replay(by_hand, sent), took))
        for filled in (noted, through, by_hand):
            filled.database.dispose()
    middle, words = ratio(pairs)
    each = f"{rounds / pairs[-1][1]:.0f} jobs/s against {rounds / pairs[-1][0]:.0f}"
    say("L9 the same SQL by hand / claim and finish", kind, f"{words}; {each}", ">= 0.50", middle >= 0.5)


def _copy(source: Filled, target: Filled) -> None:
    with source.database.read() as session, target.database.write() as copy:
        for table in (Job.__table__, JobEvent.__table__):
            rows = [dict(row) for row in session.execute(select(cast(Table, table))).mappings()]
            copy.execute(insert(cast(Table, table)), rows)


def _finish(session: Session, held: Claim) -> bool:
    content = AdapterContent(archive=NOTHING, files={"adapter_model.safetensors": NOTHING})
    return jobs.succeed(session, held, step=1, trained_tokens=1, content=content, results=NOTHING, events=[])


def _claim_and_finish(filled: Filled, name: str) -> float:
    """Until nothing is due: the seconds it took."""
    began = time.perf_counter()
    while True:
        with filled.database.write() as session:
            held = jobs.claim(session, name, lease_seconds=600)
        if held is None:
            return time.perf_counter() - began
        with filled.database.write() as session:
            assert _finish(session, held)


Sent = list[tuple[str, Any, bool]]


def _noting(filled: Filled, act: Callable[[], object]) -> Sent:
    """What goes to the driver meanwhile: statement, parameters, whether for many; a commit as "commit"."""
    sent: Sent = []
    engine = filled.database.engine

    def begin(connection: Any) -> None:
        if engine.dialect.name == "sqlite":  # SQLAlchemy lets the other's driver begin by itself
            sent.append((connection.engine.dialect.opening, (), False))

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        sent.append((statement, parameters, many))

    def commit(connection: Any) -> None:
        sent.append(("commit", None, False))

    event.listen(engine, "begin", begin)
    event.listen(engine, "before_cursor_execute", note)
    event.listen(engine, "commit", commit)
    act()
    event.remove(engine, "begin", begin)
    event.remove(engine, "before_cursor_execute", note)
    event.remove(engine, "commit", commit)
    return sent


def _replay(filled: Filled, sent: Sent) -> float:
    """The same by hand, through the driver alone."""
    connection = filled.database.engine.raw_connection()
    driver: Any = connection.driver_connection
    began = time.perf_counter()
    for statement, parameters, many in sent:
        if statement == "commit":
            driver.commit()
            continue
        cursor = driver.cursor()
        if many:
            cursor.executemany(statement, parameters)
        else:
            cursor.execute(statement, parameters)
            if cursor.description is not None:
                cursor.fetchall()
        cursor.close()
    took = time.perf_counter() - began
    connection.close()
    with filled.database.read() as session:
        left = session.scalar(select(func.count()).where(Job.status != "succeeded"))
    assert not left, "what was sent by hand did not do the same"
    return took


def _drain(url: str, name: str) -> None:
    logging.disable()
    database = Database(url)
    with database.read() as session:
        session.execute(text("select 1"))
    _claim_and_finish(_Over(database), name)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Over:
    database: Database


def drain(kind: str, places: Places, seconds: float, say: Say) -> None:
    """L11."""
    count = 10_000 if seconds >= 2 else 1000
    filled = places.fill(kind)
    ids = filled.queue(count)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_drain, args=(filled.url, f"w{number}")) for number in range(4)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - began
    with filled.database.read() as session:
        rows = {row.id: row for row in session.execute(select(Job.id, Job.status, Job.attempt, Job.started_at)).all()}
        results = Counter(session.scalars(select(Adapter.job_id).where(Adapter.is_final)))
    lost = sum(rows[job_id].status != "succeeded" for job_id in ids)
    twice = sum(rows[job_id].attempt != 1 or results[job_id] != 1 for job_id in ids) - lost
    starts = [rows[job_id].started_at or 0.0 for job_id in ids]
    inversions = sum(later < earlier for earlier, later in pairwise(starts))
    words = f"lost {lost}, twice {twice}, out of order {inversions}; {count / took:.0f} jobs/s"
    good = (lost, twice, inversions) == (0, 0, 0) and all(worker.exitcode == 0 for worker in workers)
    say(f"L11 {count:,} jobs, 4 workers", kind, words, "0, 0, 0", good)


def create(kind: str, places: Places, seconds: float, say: Say) -> None:
    """L13, L14."""
    filled = places.fill(kind)
    held = filled.running()
    with graft_serve(filled, places.folder) as (address, _):
        body = {"model": "graft-tiny", "training_file": filled.training_file}
        local = threading.local()

        def make(due: float) -> float:
            time.sleep(max(0.0, due - time.perf_counter()))
            if not hasattr(local, "client"):
                local.client = Patient(address)
            local.client(JOBS, body)
            return time.perf_counter() - due  # from when it was due: one that waits for the one before is late

        count = max(100, int(seconds * 100))
        begin = time.perf_counter() + 0.5
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(make, (begin + number / 20 for number in range(count))))
    value = p99(taken[20:]) * 1e3
    say("L13 create a job, p99, 20 a second", kind, f"{value:.0f} ms", "<= 150 ms", value <= 150)

    from fastapi.testclient import TestClient

    from graft.app import create_app
    from graft.settings import Settings

    http = TestClient(create_app(Settings(data_dir=places.folder), filled.database))
    http.headers["Authorization"] = f"Bearer {KEY}"
    both = {**body, "validation_file": filled.training_file}

    def count_of(act: Callable[[], Any]) -> int:
        return sum(not statement.lower().startswith(("begin", "commit")) for statement, _, _ in _noting(filled, act))

    made = count_of(lambda: http.post(JOBS, json=both, headers={"Idempotency-Key": "bench"}))
    say("L13 statements to create a job", kind, str(made), "<= 8", made <= 8)
    polled = count_of(lambda: http.get(f"{JOBS}/{held.job_id}"))
    say("L14 statements of a poll", kind, str(polled), "<= 2", polled <= 2)


def events(kind: str, places: Places, seconds: float, say: Say) -> None:
    """L15."""
    filled = places.fill(kind)
    few, many = filled.running(), filled.running()
    filled.events(few, 100)
    filled.events(many, 260_000)
    rounds = max(100, int(seconds * 60))
    with graft_serve(filled, places.folder) as (address, _):
        client = Patient(address)
        with filled.database.read() as session:
            middle_of = {
                held.job_id: session.scalar(
                    select(JobEvent.id).where(JobEvent.job_id == held.job_id, JobEvent.seq == seq)
                )
                for held, seq in ((few, 60), (many, 130_000))
            }
        for name in ("newest", "middle"):
            paths = [
                f"{JOBS}/{held.job_id}/events?limit=50"
                + ("" if name == "newest" else f"&after={middle_of[held.job_id]}")
                for held in (few, many)
            ]
            pairs = []
            for _ in range(5):
                taken = [(client(paths[0])[0], client(paths[1])[0]) for _ in range(rounds)]
                pairs.append((statistics.median(b for _, b in taken), statistics.median(a for a, _ in taken)))
            middle, words = ratio(pairs)
            took = f"{pairs[-1][0] * 1e3:.1f} ms"
            say(f"L15 {name} page of 260,000 events / of 100", kind, f"{words}; {took}", "<= 1.50", middle <= 1.5)


def idle(kind: str, places: Places, seconds: float, say: Say) -> None:
    """L17. The worker is the real one, where its packages are installed."""
    filled = places.fill(kind)
    seconds = max(10.0, seconds * 5)

    with graft_serve(filled, places.folder) as (_, process):
        time.sleep(3)
        before = cpu(process)
        time.sleep(seconds)
        share = 100 * (cpu(process) - before) / seconds
    say("L17 the idle API's share of a core", kind, f"{share:.2f} %", "<= 2 %", share <= 2)
    if importlib.util.find_spec("torch") is None:
        return
    environment = {"GRAFT_DATABASE_URL": filled.url, "GRAFT_LOG_LEVEL": "WARNING", "GRAFT_DATA_DIR": str(places.folder)}
    if kind == "postgresql":  # the worker's connections are the only ones to come
        name = filled.database.url.database
        with filled.database.write() as session:
            session.execute(text(f"alter database {name} set log_statement = 'all'"))
    worker = subprocess.Popen([sys.executable, "-m", "graft_worker"], env={**os.environ, **environment})
    # An idle worker looks for jobs every 3 seconds and beats every 10: a time that holds both without remainder.
    seconds = 30 * math.ceil(seconds / 30)
    try:
        time.sleep(15)
        process = psutil.Process(worker.pid)
        before, asked = cpu(process), 0 if kind == "sqlite" else places.statements()
        time.sleep(seconds)
        share = 100 * (cpu(process) - before) / seconds
        if kind == "postgresql":
            rate = (places.statements() - asked) / seconds
            say("L17 statements a second of an idle worker", kind, f"{rate:.2f}", "<= 0.5", rate <= 0.5)
    finally:
        worker.terminate()
        worker.wait(30)
    say("L17 the idle worker's share of a core", kind, f"{share:.2f} %", "<= 2 %", share <= 2)


PARTS: dict[str, Callable[[str, Places, float, Say], None]] = {
    "polls": polls,
    "queue": queue,
    "claims": claims,
    "drain": drain,
    "create": create,
    "events": events,
    "idle": idle,
}


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument("--databases", default="sqlite,postgresql", help="(default: both)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each single measurement (default: 3)")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare()
        return 0
    unknown = set(options.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    logging.disable()
    lines = []

    def show(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def say(what: str, kind: str, value: str, goal: str, good: bool | None) -> None:
        show(f"{what:44}{kind:12}{value:80}{goal:12}{'' if good is None else 'met' if good else 'MISSED'}")

    show(
        f"graft {__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"SQLite {sqlite3.sqlite_version}, {time.strftime('%Y-%m-%d')}; load before: {os.getloadavg()[0]:.1f}"
    )
    sys.path.insert(0, str(ROOT))
    from tests.services import PostgresServer

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(PostgresServer()) if "postgresql" in options.databases else None
        places = Places(folder, server)
        for part in options.only.split(","):
            for kind in options.databases.split(","):
                PARTS[part](kind, places, options.seconds, say)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
