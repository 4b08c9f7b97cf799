"""Two processes race for every pair of changes of one job, from behind a barrier, and at most one of them may win.

    python benchmarks/races.py --rounds 1000                       # SQLite, and PostgreSQL from its wheel
    python benchmarks/races.py --database-url postgresql://... --rounds 1000 --pairs cancel-succeed

A round makes a job in the state that both changes start from, lets the two loose at once, and then looks at the row and
its events: how many won, whether the row says what the winner said, whether the events are numbered without gaps and
end once. Some pairs may both win one after the other (a pause and then the end); `may_both_win` says which. Any other
outcome is printed as wrong, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Table, func, insert, select, text, update
from sqlalchemy.orm import Session

from graft import files, jobs, tenancy
from graft.adapters import AdapterContent
from graft.db import Database, now
from graft.errors import Conflict
from graft.ids import new_id
from graft.jobs import Claim
from graft.models import Adapter, Job, JobEvent
from graft.recipe import Recipe
from graft.schemas import JobCreate
from graft.storage import Stored
from graft.tenancy import Caller

# Rounds that are prepared, run and judged together.
BATCH = 100
CALLER = Caller(tenancy.DEFAULT_PROJECT, tenancy.DEFAULT_ORGANIZATION)
RECIPE = Recipe(base_model="tiny")
ENDED = ("succeeded", "failed", "cancelled")
LAST_WORDS = ("The job has successfully completed", "Fine-tuning job cancelled", "The job failed:")


@dataclass(frozen=True, slots=True)
class Round:
    """What both racers know."""

    job_id: str
    claim: Claim | None
    content: AdapterContent
    results: Stored


Act = Callable[[Session, Round], bool]


def _asked(act: Callable[..., Any]) -> Act:
    def ask(session: Session, this: Round) -> bool:
        try:
            act(session, CALLER.project_id, this.job_id)
        except Conflict:
            return False
        return True

    return ask


def _held(act: Callable[[Session, Claim, Round], Any]) -> Act:
    def write(session: Session, this: Round) -> bool:
        assert this.claim is not None
        return bool(act(session, this.claim, this))

    return write


# Every change of a live job, by the state it starts from.
FROM_VALIDATING: dict[str, Act] = {
    "queue": lambda session, this: jobs.queue(session, this.job_id, RECIPE, []),
    "reject": lambda session, this: jobs.reject(session, this.job_id, code="bad", message="bad", param=None),
    "cancel": _asked(jobs.cancel),
    "pause": _asked(jobs.pause),
}
FROM_QUEUED: dict[str, Act] = {
    "claim": lambda session, this: jobs.claim(session, "racer", lease_seconds=60, job_id=this.job_id) is not None,
    "cancel": _asked(jobs.cancel),
    "pause": _asked(jobs.pause),
}
FROM_PAUSED: dict[str, Act] = {"resume": _asked(jobs.resume), "cancel": _asked(jobs.cancel)}
# The lease is over and nobody has noticed yet: the one state in which the reaper and the worker both may act.
FROM_RUNNING: dict[str, Act] = {
    "succeed": _held(
        lambda session, claim, this: jobs.succeed(
            session, claim, step=9, trained_tokens=9, content=this.content, results=this.results, events=[]
        )
    ),
    "fail": _held(lambda session, claim, this: jobs.fail(session, claim, code="nan", message="nan", param=None)),
    "release": _held(lambda session, claim, this: jobs.release(session, claim, "stopping")),
    "shrink": _held(lambda session, claim, this: jobs.shrink(session, claim, "memory", most=2)),
    "recover": _held(lambda session, claim, this: jobs.recover(session, claim, "lost", max_recoveries=3)),
    "reap": lambda session, this: this.job_id in jobs.reap(session, max_recoveries=3),
    "beat": _held(lambda session, claim, this: jobs.beat(session, claim, lease_seconds=60, progress={"step": 5})),
    "cancel": _asked(jobs.cancel),
    "pause": _asked(jobs.pause),
}
STATES = {"validating": FROM_VALIDATING, "queued": FROM_QUEUED, "paused": FROM_PAUSED, "running": FROM_RUNNING}

# What may follow the other in one round without either being wrong. A beat and a pause end no attempt; a cancel follows
# whatever leaves the job alive, and a claim or a pause whatever leaves it in the queue.
ALIVE = {"queue", "claim", "pause", "resume", "release", "shrink", "recover", "reap", "beat"}


def may_both_win(first: str, second: str) -> bool:
    """Whether the two are no rivals, so that one after the other is right."""
    pair = {first, second}
    if len(pair) == 1:
        return first == "beat"  # the same holder twice
    if "cancel" in pair:
        return bool(pair & ALIVE)
    return "pause" in pair or "beat" in pair


@dataclass(frozen=True, slots=True)
class Pair:
    """Two changes that start from the same state."""

    state: str
    first: str
    second: str

    @property
    def name(self) -> str:
        return f"{self.state}: {self.first} - {self.second}"


def pairs() -> list[Pair]:
    """All of them, and each change against itself."""
    return [
        Pair(state, first, second)
        for state, acts in STATES.items()
        for first, second in itertools.combinations_with_replacement(acts, 2)
    ]


# -- one database -------------------------------------------------------------------------------------------------


class Track:
    """A database with a project and a dataset, on which rounds are run."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.database.migrate()
        with self.database.write() as session:
            tenancy.ensure_defaults(session, None)
            stored = Stored(sha256="0" * 64, size=1)
            row = files.create(session, CALLER.project_id, stored, filename="train.jsonl", purpose="fine-tune")
            self.training_file = row.id
        self.content = AdapterContent(archive=stored, files={"adapter_config.json": stored})
        self.results = stored

    def prepare(self, state: str, count: int) -> list[Round]:
        """So many jobs in this state: one is brought there, the others are its copies."""
        body = JobCreate(model="tiny", training_file=self.training_file)
        claim = None
        with self.database.write() as session:
            first = jobs.create(session, CALLER, body, base_model="tiny", key=None, body_sha256="0" * 64).id
            if state != "validating":
                assert jobs.queue(session, first, RECIPE, [])
            if state == "paused":
                jobs.pause(session, CALLER.project_id, first)
            elif state == "running":
                claim = jobs.claim(session, "holder", lease_seconds=3600, job_id=first)
                assert claim is not None
            ids = [first, *(new_id("ftjob-") for _ in range(count - 1))]
            table, told = cast(Table, Job.__table__), cast(Table, JobEvent.__table__)
            row = session.execute(select(table).where(table.c.id == first)).mappings().one()
            events = session.execute(select(told).where(told.c.job_id == first)).mappings().all()
            if count > 1:
                session.execute(insert(table), [{**row, "id": job_id} for job_id in ids[1:]])
                copies = (
                    {**event, "job_id": job_id, "id": new_id("ftevent-")} for event in events for job_id in ids[1:]
                )
                session.execute(insert(told), list(copies))
        claims = (
            None if claim is None else replace(claim, job_id=job_id, model_name=f"ft:tiny:default::{job_id[-16:]}")
            for job_id in ids
        )
        return [Round(*each, self.content, self.results) for each in zip(ids, claims, strict=True)]

    def faults(self, pair: Pair, won: dict[str, tuple[object, object]]) -> dict[str, list[str]]:
        """Of each job, what is wrong with how its round came out."""
        told: dict[str, list[tuple[int, str]]] = defaultdict(list)
        with self.database.read() as session:
            rows = session.scalars(select(Job)).all()
            for job_id, seq, message in session.execute(
                select(JobEvent.job_id, JobEvent.seq, JobEvent.message).order_by(JobEvent.job_id, JobEvent.seq)
            ):
                told[job_id].append((seq, message))
            final = select(Adapter.job_id, func.count()).where(Adapter.is_final).group_by(Adapter.job_id)
            finals = {row[0]: row[1] for row in session.execute(final)}
        return {job.id: self._faults(pair, job, told[job.id], finals.get(job.id, 0), won[job.id]) for job in rows}

    def _faults(
        self, pair: Pair, job: Job, told: list[tuple[int, str]], finals: int, won: tuple[object, object]
    ) -> list[str]:
        found = [str(each) for each in won if not isinstance(each, bool)]
        if not any(won):
            found.append("nobody won")
        if all(won) and not may_both_win(pair.first, pair.second):
            found.append("both won")
        if [seq for seq, _ in told] != list(range(1, job.last_event + 1)):
            found.append("the events are not numbered without gaps")
        last_words = [message for _, message in told if message.startswith(LAST_WORDS)]
        if len(last_words) != (job.status in ENDED):
            found.append(f"{len(last_words)} last words of a job that is {job.status}")
        if finals != (job.status == "succeeded"):
            found.append(f"{finals} results of a job that is {job.status}")
        if job.attempt > 3:
            found.append(f"{job.attempt} attempts")
        return found

    def forget(self) -> None:
        """Keep the tables small: what is measured is the race, not the size."""
        tables = ("fine_tuning_job_events", "fine_tuning_job_requests", "adapter_files", "adapters", "outbox")
        with self.database.write() as session:
            for table in (*tables, "fine_tuning_jobs"):
                session.execute(text(f"delete from {table}"))
            session.execute(text("delete from files where purpose <> 'fine-tune'"))


def _racer(url: str, side: int, inbox: Any, outbox: Any, start: Barrier) -> None:
    """One of the two: waits for the other before each round, acts, and says at the end which it won."""
    logging.disable()
    database = Database(url)
    while (task := inbox.get()) is not None:
        pair, rounds = task
        act = STATES[pair.state][(pair.first, pair.second)[side]]
        won: list[object] = []
        for this in rounds:
            if pair.state == "running":
                start.wait(60)  # whoever reaps would find the lease of the round before its own
                if side == 0:
                    with database.write() as session:
                        session.execute(update(Job).where(Job.id == this.job_id).values(lease_until=now() - 1))
            start.wait(60)
            try:
                with database.write() as session:
                    won.append(act(session, this))
            except Exception as error:
                won.append(f"{type(error).__name__}: {error}")
        outbox.put(won)
    database.dispose()


@contextmanager
def racers(url: str) -> Iterator[Callable[[Pair, list[Round]], list[tuple[object, object]]]]:
    """Two processes, and a function that lets them loose on some rounds."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    lanes = [(context.SimpleQueue(), context.SimpleQueue()) for _ in range(2)]
    processes = [
        context.Process(target=_racer, args=(url, side, *lanes[side], start), daemon=True) for side in range(2)
    ]
    for process in processes:
        process.start()

    def race(pair: Pair, rounds: list[Round]) -> list[tuple[object, object]]:
        for inbox, _ in lanes:
            inbox.put((pair, rounds))
        first, second = (outbox.get() for _, outbox in lanes)
        return list(zip(first, second, strict=True))

    try:
        yield race
    finally:
        for inbox, _ in lanes:
            inbox.put(None)
        for process in processes:
            process.join(10)


def run(url: str, rounds: int, wanted: list[Pair], say: Callable[[str], None] = print) -> list[str]:
    """Every pair so often; what was wrong, with the pair's name and the job's id."""
    track, wrong = Track(url), []
    name = track.database.engine.dialect.name
    with racers(url) as race:
        for pair in wanted:
            came_out: Counter[str] = Counter()
            for first in range(0, rounds, BATCH):
                made = track.prepare(pair.state, min(BATCH, rounds - first))
                won = dict(zip((this.job_id for this in made), race(pair, made), strict=True))
                for job_id, faults in track.faults(pair, won).items():
                    wrong += [f"{name} {pair.name}: {fault} ({job_id}: {won[job_id]})" for fault in faults]
                    came_out["wrong" if faults else ("neither", "one", "both")[sum(map(bool, won[job_id]))]] += 1
                track.forget()
            say(
                f"{name:12}{pair.name:32}one {came_out['one']:5}  both {came_out['both']:5}  "
                f"wrong {came_out['wrong']:3}  {'both may' if may_both_win(pair.first, pair.second) else ''}".rstrip()
            )
    track.database.dispose()
    return wrong


def main() -> int:
    """The table, and the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="of each pair and database (default: 1000)")
    parser.add_argument("--database-url", help="an empty database; left out: an SQLite file and a new PostgreSQL")
    parser.add_argument("--pairs", help="only those that contain this, such as `cancel` or `running: succeed - reap`")
    options = parser.parse_args()
    logging.disable()
    wanted = [pair for pair in pairs() if options.pairs is None or options.pairs in pair.name]
    began = time.monotonic()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.database_url:
            wrong += run(options.database_url, options.rounds, wanted)
        else:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from tests.services import PostgresServer

            wrong += run(f"sqlite:///{folder}/graft.db", options.rounds, wanted)
            with PostgresServer() as server:
                wrong += run(server.create_database("races"), options.rounds, wanted)
    for line in wrong[:50]:
        print("WRONG", line)
    print(f"{len(wanted)} pairs x {options.rounds} rounds, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
