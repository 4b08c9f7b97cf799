"""Whatever is asked of jobs, in whatever order, with whatever dying in between: the rules of their life hold.

A model in plain Python does what the rules say; the database does what `graft.jobs` says; after every step the two are
compared. A step may be killed at any statement, and then it must have done nothing. Time is moved by moving the rows'
times, by steps so long that the test's own duration does not matter.

    LIFECYCLE_RUNS=20000 pytest tests/api/test_lifecycle_model.py       # through a night
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from graft import jobs
from graft.db import Database
from graft.errors import Conflict
from graft.jobs import Claim, Event
from graft.models import Desired
from graft.recipe import Recipe
from graft.schemas import JobCreate
from graft.tenancy import Caller

from . import given
from .given import CALLER

RUNS = int(os.environ.get("LIFECYCLE_RUNS", "500"))
STEPS = 50

# Long beside what a run really takes. No sum of moments, forwards and back, is a lease or what a job may run, so that
# the real milliseconds never decide.
MOMENT = 1_000.0
LEASE = 10.5 * MOMENT
MAY_RUN = 2.7 * MOMENT
BACK_OFF = 100.0, 300.0
MAX_RECOVERIES = 2
MOST_PLANS = 1
LIMITED_TO = 1
OTHER = Caller("proj_limited", CALLER.organization_id)
RECIPE = Recipe(base_model="tiny")
ENDED = ("succeeded", "failed", "cancelled")
TABLES = (
    *("fine_tuning_job_events", "fine_tuning_job_checkpoints", "adapter_files", "adapters"),
    *("fine_tuning_job_requests", "outbox", "fine_tuning_jobs"),
)
RESET = [
    *(text(f"delete from {table}") for table in TABLES),
    text("delete from files where purpose = 'fine-tune-results'"),
    text("update projects set usage = 0, usage_at = 0"),
]
TIMES = ("created_at", "started_at", "finished_at", "lease_until", "not_before", "held_since", "held_until")
MOVE = [
    text("update fine_tuning_jobs set " + ", ".join(f"{name} = {name} - :seconds" for name in TIMES)),
    text("update projects set usage_at = usage_at - :seconds"),
]
# What `Model.row` says, and then what must be true of any row. A job's last word is said once.
LOOK = text(
    """
    select status, desired, attempt, recoveries, smaller_plans, error_code, lease_until is not null,
        finished_at is not null,
        (select count(*) from outbox where job_id = job.id),
        (select count(*) from fine_tuning_job_checkpoints where job_id = job.id),
        (select count(*) from fine_tuning_job_events where job_id = job.id and (message like 'The job failed:%'
            or message in ('The job has successfully completed', 'Fine-tuning job cancelled'))),
        (select count(*) from adapters where job_id = job.id and is_final),
        (select count(*) from fine_tuning_job_checkpoints where job_id = job.id and state_sha256 is not null) as states,
        (select count(*) from fine_tuning_job_events where job_id = job.id) as events,
        (select max(seq) from fine_tuning_job_events where job_id = job.id) as last_seq,
        id, last_event, rev, gpu_seconds, created_at
    from fine_tuning_jobs as job
    """
)

WHICH = st.integers(0, 7)
# At which statement the process dies; after the last one and before the commit, if there are fewer.
DEATH = st.sampled_from([None] * 30 + list(range(10)))

Answer = TypeVar("Answer")


class Killed(Exception):
    """The process died at this statement."""


@dataclass
class Model:
    """What is known of one job."""

    id: str
    project: str
    priority: int
    may_run: float | None
    status: str = "validating_files"
    desired: str = "run"
    attempt: int = 0
    recoveries: int = 0
    smaller_plans: int = 0
    code: str | None = None
    not_before: float = -math.inf  # a new job is due whatever the clock says
    held_since: float = 0.0
    lease_until: float = 0.0
    used: float = 0.0
    nudges: int = 0
    rev: int = -1
    created: float = 0.0
    checkpoints: set[int] = field(default_factory=set)

    def row(self) -> tuple[Any, ...]:
        return (
            *(self.status, self.desired, self.attempt, self.recoveries, self.smaller_plans, self.code),
            *(self.status == "running", self.status in ENDED, self.nudges, len(self.checkpoints)),
            *(self.status in ENDED, self.status == "succeeded"),
        )

    @property
    def is_live(self) -> bool:
        return self.status not in ENDED

    def is_late(self, now: float) -> bool:
        return self.may_run is not None and self.used_at(now) > self.may_run

    def used_at(self, now: float) -> float:
        """The lease bounds what a silent worker used; where the clock was set back, it used nothing."""
        return self.used + max(0.0, min(now, self.lease_until) - self.held_since)

    def leave(self, status: str, now: float) -> None:
        if self.status == "running":
            self.used = self.used_at(now)
        self.status = status

    def wait(self, now: float) -> None:
        """Back to where it waits."""
        self.leave("paused" if self.desired == "pause" else "queued", now)
        self.nudges += self.status == "queued"

    def fail(self, code: str, now: float) -> None:
        self.leave("failed", now)
        self.code = code

    def lose(self, now: float) -> None:
        """A worker or an engine was lost."""
        if self.recoveries >= MAX_RECOVERIES and self.desired == "run":
            self.fail("worker_lost", now)
        else:
            self.not_before = now + min(BACK_OFF[0] * 2.0**self.recoveries, BACK_OFF[1])
            self.recoveries += 1
            self.wait(now)
        self.attempt += 1


class Lifecycle(RuleBasedStateMachine):
    """`database` and `content` are set by the test."""

    database: Database
    content: Any
    state: Any
    training: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.jobs: list[Model] = []
        self.claims: list[Claim] = []
        self.left: int | None = None  # statements until death
        with self.database.write() as session:
            for statement in RESET:
                session.execute(statement)
        event.listen(self.database.engine, "before_cursor_execute", self._count_down)

    def teardown(self) -> None:
        event.remove(self.database.engine, "before_cursor_execute", self._count_down)

    def _count_down(self, *_: Any) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1

    def do(self, dies_at: int | None, act: Callable[[Session], Answer]) -> Answer | None:
        """The answer of one transaction; None if it died before its end, and then it did nothing."""
        self.left = dies_at
        try:
            with self.database.write() as session:
                answer = act(session)
                if self.left is not None:
                    raise Killed  # after the last statement and before the commit
                return answer
        except Killed:
            return None
        finally:
            self.left = None

    def _held(self, number: int) -> tuple[Claim, Model, bool]:
        """One of all claims there ever were, its job, and whether it still holds."""
        claim = self.claims[-1 - number % len(self.claims)]
        job = next(job for job in self.jobs if job.id == claim.job_id)
        return claim, job, job.status == "running" and job.attempt == claim.attempt

    def _job(self, number: int) -> Model:
        return self.jobs[-1 - number % len(self.jobs)]

    # -- callers ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.jobs) < 5)
    @rule(
        caller=st.sampled_from([CALLER, OTHER]),
        priority=st.sampled_from([0, 0, 1]),
        may_run=st.sampled_from([None, None, MAY_RUN]),
        dies_at=DEATH,
    )
    def create(self, caller: Caller, priority: int, may_run: float | None, dies_at: int | None) -> None:
        body = JobCreate(
            model="tiny",
            training_file=self.training[caller.project_id],
            priority=priority,
            max_runtime_seconds=may_run,
        )
        made = self.do(
            dies_at, lambda s: jobs.create(s, caller, body, base_model="tiny", key=None, body_sha256="0" * 64).id
        )
        if made is not None:
            self.jobs.append(Model(made, caller.project_id, priority, may_run))

    @precondition(lambda self: self.jobs)
    @rule(number=WHICH, good=st.sampled_from([True, True, True, False]), dies_at=DEATH)
    def validate(self, number: int, good: bool, dies_at: int | None) -> None:
        job = self._job(number)
        if good:
            done = self.do(dies_at, lambda s: jobs.queue(s, job.id, RECIPE, [Event("remark")]))
        else:
            done = self.do(dies_at, lambda s: jobs.reject(s, job.id, code="bad_file", message="bad", param=None))
        if done is None:
            return
        assert done == (job.status == "validating_files")
        if done and good:
            job.status = "paused" if job.desired == "pause" else "queued"
            job.nudges += job.status == "queued"
        elif done:
            job.status, job.code = "failed", "bad_file"

    def _ask(self, dies_at: int | None, job: Model, act: Callable[..., Any], wanted: bool) -> bool:
        """Whether the caller's request was carried out; a refusal must be right too."""

        def ask(session: Session) -> bool:
            try:
                act(session, job.project, job.id)
            except Conflict:
                return False
            return True

        done = self.do(dies_at, ask)
        assert done in (None, wanted)
        return bool(done)

    @precondition(lambda self: self.jobs)
    @rule(number=WHICH, dies_at=DEATH)
    def cancel(self, number: int, dies_at: int | None) -> None:
        job = self._job(number)
        if self._ask(dies_at, job, jobs.cancel, job.is_live):
            job.leave("cancelled", self.now)
            job.attempt += 1

    @precondition(lambda self: self.jobs)
    @rule(number=WHICH, dies_at=DEATH)
    def pause(self, number: int, dies_at: int | None) -> None:
        job = self._job(number)
        if self._ask(dies_at, job, jobs.pause, job.is_live and job.desired == "run"):
            job.desired = "pause"
            if job.status == "queued":
                job.status = "paused"

    @precondition(lambda self: self.jobs)
    @rule(number=WHICH, dies_at=DEATH)
    def resume(self, number: int, dies_at: int | None) -> None:
        job = self._job(number)
        if self._ask(dies_at, job, jobs.resume, job.is_live and job.desired == "pause"):
            job.desired = "run"
            if job.status == "paused":
                job.status = "queued"
                job.nudges += 1

    # -- workers ------------------------------------------------------------------------------------------------

    def _due(self) -> list[Model]:
        running = sum(job.status == "running" for job in self.jobs if job.project == OTHER.project_id)
        return [
            job
            for job in self.jobs
            if job.status == "queued"
            and job.not_before <= self.now
            and (job.project != OTHER.project_id or running < LIMITED_TO)
        ]

    @precondition(lambda self: self.jobs)
    @rule(number=st.none() | WHICH, dies_at=DEATH, again=st.booleans())
    def claim(self, number: int | None, dies_at: int | None, again: bool) -> None:
        """By turn, or by a nudge that names the job and may come twice."""
        named = None if number is None else self._job(number).id
        for _ in range(1 + again):
            due = [job for job in self._due() if named in (None, job.id)]
            held = self.do(dies_at, lambda s: (jobs.claim(s, "w", lease_seconds=LEASE, job_id=named),))
            if held is None:
                return
            if held[0] is None:
                assert not due
                return
            (job,) = [job for job in due if job.id == held[0].job_id]
            # Whose turn it is among projects is the share's to say (see test_fair_queue); these two always hold.
            assert job.priority == max(other.priority for other in due)
            assert not [
                other
                for other in due
                if (other.project, other.priority) == (job.project, job.priority)
                and other.created < job.created - 0.001  # SQLite's clock shows milliseconds
            ]
            job.attempt += 1
            job.status, job.held_since, job.lease_until = "running", self.now, self.now + LEASE
            assert (held[0].attempt, held[0].smaller_plans) == (job.attempt, job.smaller_plans)
            self.claims.append(held[0])

    @precondition(lambda self: self.claims)
    @rule(number=WHICH, says=st.booleans(), dies_at=DEATH)
    def beat(self, number: int, says: bool, dies_at: int | None) -> None:
        claim, job, holds = self._held(number)
        told = [Event("one"), Event("two")] if says else []
        progress = {"step": 3} if says else None
        answer = self.do(dies_at, lambda s: (jobs.beat(s, claim, lease_seconds=LEASE, events=told, progress=progress),))
        if answer is not None:
            assert answer == ((Desired(job.desired) if holds else None),)
            if holds:
                job.lease_until = self.now + LEASE

    @precondition(lambda self: self.claims)
    @rule(number=WHICH, step=st.integers(1, 4), with_adapter=st.booleans(), dies_at=DEATH)
    def checkpoint(self, number: int, step: int, with_adapter: bool, dies_at: int | None) -> None:
        claim, job, holds = self._held(number)
        done = self.do(
            dies_at,
            lambda s: jobs.add_checkpoint(
                s,
                claim,
                step=step,
                metrics={},
                state=self.state,
                content=self.content if with_adapter else None,
                keep=2,
            ),
        )
        assert done in (None, holds)
        if done:
            if step not in job.checkpoints:
                job.recoveries = 0
            job.checkpoints.add(step)

    @precondition(lambda self: self.claims)
    @rule(number=WHICH, way=st.sampled_from(["succeed", "fail", "release", "shrink", "recover"]), dies_at=DEATH)
    def end_attempt(self, number: int, way: str, dies_at: int | None) -> None:
        claim, job, holds = self._held(number)

        def act(session: Session) -> bool:
            if way == "succeed":
                return jobs.succeed(
                    session,
                    claim,
                    step=9,
                    trained_tokens=9,
                    content=self.content,
                    results=self.state,
                    events=[Event("done")],
                )
            if way == "fail":
                return jobs.fail(session, claim, code="nan", message="nan", param=None)
            if way == "release":
                return jobs.release(session, claim, "stopping")
            if way == "shrink":
                return jobs.shrink(session, claim, "memory", most=MOST_PLANS)
            return jobs.recover(session, claim, "engine lost", max_recoveries=MAX_RECOVERIES)

        done = self.do(dies_at, act)
        assert done in (None, holds)
        if not done:
            return
        if way == "succeed":
            job.leave("succeeded", self.now)
        elif way == "fail":
            job.fail("nan", self.now)
        elif way == "release":
            job.wait(self.now)
        elif way == "recover":
            job.lose(self.now)
        elif job.smaller_plans >= MOST_PLANS:
            job.fail("out_of_memory", self.now)
        else:
            job.smaller_plans += 1
            job.wait(self.now)

    # -- the service and the world ------------------------------------------------------------------------------

    @rule(dies_at=DEATH)
    def reap(self, dies_at: int | None) -> None:
        overdue = [
            job
            for job in self.jobs
            if job.status == "running" and (job.lease_until < self.now or job.is_late(self.now))
        ]
        taken = self.do(dies_at, lambda s: jobs.reap(s, max_recoveries=MAX_RECOVERIES))
        if taken is None:
            return
        assert sorted(taken) == sorted(job.id for job in overdue)
        for job in overdue:
            if job.is_late(self.now):
                job.fail("deadline_exceeded", self.now)
                job.attempt += 1
            else:
                job.lose(self.now)

    @rule(dies_at=DEATH)
    def come_back(self, dies_at: int | None) -> None:
        """The database was away."""
        if self.do(dies_at, lambda s: jobs.spare(s, lease_seconds=LEASE)) is not None:
            for job in self.jobs:
                if job.status == "running" and job.lease_until < self.now:
                    job.lease_until = self.now + LEASE

    @rule(seconds=st.sampled_from([MOMENT, 3 * MOMENT, 12 * MOMENT, 100 * MOMENT, -MOMENT]))
    def time_passes(self, seconds: float) -> None:
        """Or the clock is set, forwards or back."""
        with self.database.write() as session:
            for statement in MOVE:
                session.execute(statement, {"seconds": seconds})
        self.now += seconds

    def check_invariants(self, *_: Any, **__: Any) -> None:
        """After every step, of every job."""
        super().check_invariants(*_, **__)
        with self.database.read() as session:
            rows = {row.id: row for row in session.execute(LOOK)}
        assert set(rows) == {job.id for job in self.jobs}
        for job in self.jobs:
            row = rows[job.id]
            assert tuple(row[:12]) == job.row(), (tuple(row[:12]), job)
            assert row.last_event == row.events == row.last_seq  # numbered without gaps
            assert row.states == 0 or job.is_live  # an ended job cannot be resumed
            assert row.rev >= job.rev
            job.rev = row.rev
            job.created = job.created or row.created_at + self.now
            assert row.gpu_seconds == pytest.approx(job.used, abs=MOMENT / 4)


@contextmanager
def quick(database: Database) -> Iterator[None]:
    """No power cut is part of this: nothing waits for the disk."""

    def prepare(connection: Any, record: Any) -> None:
        if database.is_sqlite:
            connection.execute("pragma synchronous = off")
        else:
            connection.execute("set synchronous_commit = off")
            connection.commit()

    database.engine.dispose()
    event.listen(database.engine, "connect", prepare)
    yield
    event.remove(database.engine, "connect", prepare)


@pytest.mark.timeout(7200)  # as many runs as are asked for, on a machine as busy as it is
def test_the_rules_of_a_jobs_life_hold(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "BACK_OFF_SECONDS", BACK_OFF)
    monkeypatch.setattr(logging.getLogger("graft.jobs"), "disabled", True)
    given.project(database, "limited", max_running_jobs=LIMITED_TO)

    class Here(Lifecycle):
        pass

    Here.database = database
    Here.training = {caller.project_id: given.dataset(database, caller.project_id).id for caller in (CALLER, OTHER)}
    Here.content, _ = given.adapter(database)
    Here.state = given.put(database, b"state")
    with quick(database):
        run_state_machine_as_test(
            Here,
            settings=settings(
                max_examples=RUNS // 2,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
