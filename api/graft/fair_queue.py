"""Whose turn it is: priority, then weighted fair share by project, then age.

A project's usage is the GPU-seconds that its jobs have held a worker, of which each counts half after a day, divided by
the project's weight. Of the projects whose next job has the highest priority, the one with the least usage is served.
So a project with a thousand queued jobs does not keep another waiting for longer than until the next worker is free.

A project's running jobs count as they run, each for a minute at least: what was claimed a moment ago has used nothing
yet, and several workers that become free together shall not all serve the same project. Claims are made one at a time,
so each sees the ones before; they take milliseconds, and jobs take minutes.
"""

from __future__ import annotations

import functools
import heapq
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Double,
    Row,
    Select,
    String,
    Subquery,
    Table,
    bindparam,
    case,
    false,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session, aliased

from graft.db import Database, Prepared, connection_of, now, one_at_a_time
from graft.models import Job, JobStatus, Organization, Project
from graft.workers import alive

HALF_LIFE_SECONDS = 24 * 3600.0
# A running job counts so many GPU-seconds from its first moment on.
LEAST_SECONDS = 60.0
# A job on the base model that the worker holds overtakes older ones of its project and priority, if they are not older
# than it by more than this. So each job is overtaken by finitely many, and no other project is.
WARM_SECONDS = 600.0

# The indexes of queued jobs serve a query that spells this value, not one that binds it.
QUEUED: ColumnElement[str] = literal_column(f"'{JobStatus.QUEUED}'", String())


@dataclass(frozen=True, slots=True)
class Turn:
    """The project that is next, and the place of its job that would be taken."""

    project_id: str
    priority: int
    created_at: float


# -- choosing -----------------------------------------------------------------------------------------------------


def whose_turn(
    session: Session, *, device_bytes: int | None = None, job_id: str | None = None, passed: Collection[str] = ()
) -> Turn | None:
    """The project that the next free worker should serve; None if nothing can be run.

    Costs a few index entries for each project, however many jobs are queued.

    Args:
        device_bytes: the memory that the worker has for a job; None takes any job.
        job_id: look at this job only.
        passed: projects that are to be passed over.
    """
    asked = {"device_bytes": device_bytes, "job_id": job_id}
    kind = device_bytes is not None, job_id is not None
    if passed:  # seldom, and a list of any length is written into the statement anew each time
        row = connection_of(session).execute(_turn(*kind, passes=True), {**asked, "passed": list(passed)}).one_or_none()
    else:
        row = _first_turn(*kind)(session, asked).one_or_none()
    return None if row is None else Turn(row.id, row.priority, row.created_at)


# Statements that are asked all the time are made once: making them takes longer than answering them.
@functools.cache
def _turn(is_sized: bool, is_named: bool, passes: bool) -> Select[Any]:
    mine, first = aliased(Job), aliased(Job)
    due = [mine.project_id == Project.id, *_due(mine, is_sized, is_named)]
    # Named, because the second holds the first inside, which would otherwise look at all projects at once.
    of_this = select(mine.priority).where(*due).correlate(Project)
    priority = of_this.order_by(mine.priority.desc()).limit(1).scalar_subquery()
    due = [first.project_id == Project.id, first.priority == priority, *_due(first, is_sized, is_named)]
    oldest = select(first.created_at).where(*due).correlate(Project)
    created_at = oldest.order_by(first.created_at).limit(1).scalar_subquery()
    running = _running()
    candidates = (
        select(Project.id, priority.label("priority"), created_at.label("created_at"), _share(running).label("share"))
        .outerjoin(running, running.c.project_id == Project.id)
        .where(or_(Project.max_running_jobs.is_(None), func.coalesce(running.c.jobs, 0) < Project.max_running_jobs))
    )
    if passes:
        candidates = candidates.where(Project.id.not_in(bindparam("passed", expanding=True)))
    found = candidates.subquery()
    return (
        select(found)
        .where(found.c.priority.is_not(None))
        .order_by(found.c.priority.desc(), found.c.share, found.c.created_at, found.c.id)
        .limit(1)
    )


@functools.cache
def _first_turn(is_sized: bool, is_named: bool) -> Prepared:
    return Prepared(_turn(is_sized, is_named, passes=False))


def take(
    session: Session, *, device_bytes: int | None = None, warm: str | None = None, job_id: str | None = None
) -> Row[Any] | None:
    """The job that a free worker should run, locked until the transaction ends; None if there is none.

    Of it: `id`, `attempt`, `started_at`, and the name of its `organization`.

    Args:
        warm: the base model that the worker holds already.
    """
    # Whoever is next knows what the one before took: two at once would serve the same project, or overrun its limit.
    one_at_a_time(session, "claims")
    passed: set[str] = set()
    while (turn := whose_turn(session, device_bytes=device_bytes, job_id=job_id, passed=passed)) is not None:
        asked = {
            "project_id": turn.project_id,
            "priority": turn.priority,
            "device_bytes": device_bytes,
            "job_id": job_id,
            "warm": warm,
            "soon": turn.created_at + WARM_SECONDS,
        }
        is_sized, is_named = device_bytes is not None, job_id is not None
        for is_warm in (False,) if warm is None else (True, False):
            job = _next(is_sized, is_named, is_warm)(session, asked).one_or_none()
            if job is not None:
                return job
        passed.add(turn.project_id)  # its callers are just changing all it has
    return None


@functools.cache
def _next(is_sized: bool, is_named: bool, is_warm: bool) -> Prepared:
    """The job that a project's turn falls to; a warm one only if it is hardly younger than the oldest."""
    turn = [Job.project_id == bindparam("project_id"), Job.priority == bindparam("priority")]
    if is_warm:
        turn += [Job.base_model == bindparam("warm"), Job.created_at <= bindparam("soon")]
    name = select(Organization.name).join(Project, Project.organization_id == Organization.id)
    return Prepared(
        select(Job.id, Job.attempt, Job.started_at, name.where(Project.id == Job.project_id).label("organization"))
        .where(*turn, *_due(Job, is_sized, is_named))
        .order_by(Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)
    )


def _due(job: type[Job], is_sized: bool, is_named: bool) -> list[ColumnElement[bool]]:
    conditions = [job.status == QUEUED, job.not_before <= now()]
    if is_sized:
        conditions.append(or_(job.needs_bytes.is_(None), job.needs_bytes <= bindparam("device_bytes")))
    if is_named:
        conditions.append(job.id == bindparam("job_id"))
    return conditions


def _running() -> Subquery:
    """Of each project with running jobs: how many, and the GPU-seconds they count."""
    held = func.coalesce(now() - Job.held_since, 0.0)
    return (
        select(
            Job.project_id,
            func.count().label("jobs"),
            func.sum(case((held > LEAST_SECONDS, held), else_=LEAST_SECONDS)).label("seconds"),
        )
        .where(Job.status == JobStatus.RUNNING)
        .group_by(Job.project_id)
        .subquery()
    )


# -- shares -------------------------------------------------------------------------------------------------------


_projects = cast(Table, Project.__table__)


def _decayed() -> ColumnElement[float]:
    """A project's usage as it counts now."""
    half_lives = (now() - _projects.c.usage_at) / HALF_LIFE_SECONDS
    # Below 0 where the database's clock was set back: then it counts as it stands.
    return case(
        (half_lives > 100.0, 0.0),
        (half_lives < 0.0, _projects.c.usage),
        else_=_projects.c.usage * func.pow(0.5, half_lives),
    )


def _share(running: Subquery) -> ColumnElement[float]:
    return (_decayed() + func.coalesce(running.c.seconds, 0.0)) / Project.weight


def charge(session: Session, project_id: str, seconds: float) -> None:
    """Count the GPU-seconds of an attempt that has ended."""
    _CHARGE(session, {"project_id": project_id, "seconds": seconds})


_CHARGE = Prepared(
    update(_projects)
    .where(_projects.c.id == bindparam("project_id"))
    .values(usage=_decayed() + bindparam("seconds", type_=Double()), usage_at=now())
)


def list_projects(session: Session) -> Sequence[Row[Any]]:
    """Of each project by id: `id`, `name`, `weight`, `max_running_jobs`, `running`, `queued`, and the `gpu_hours` that
    count against it now."""
    running = _running()
    queued = select(func.count()).where(Job.project_id == Project.id, Job.status == QUEUED).scalar_subquery()
    used = (_decayed() + func.coalesce(running.c.seconds, 0.0)) / 3600.0
    return session.execute(
        select(
            Project.id,
            Project.name,
            Project.weight,
            Project.max_running_jobs,
            func.coalesce(running.c.jobs, 0).label("running"),
            queued.label("queued"),
            used.label("gpu_hours"),
        )
        .outerjoin(running, running.c.project_id == Project.id)
        .order_by(Project.id)
    ).all()


def set_limits(
    session: Session, project_id: str, *, weight: float | None = None, max_running_jobs: int | None = None
) -> bool:
    """Set a project's share beside the others, and how many of its jobs may run at once (0: no limit).

    None leaves a value as it is. False: no such project.

    Raises:
        ValueError: the weight is not above 0, or the limit is negative.
    """
    project = session.get(Project, project_id)
    if project is None:
        return False
    if weight is not None:
        if not (0 < weight < math.inf):
            raise ValueError(f"A project's weight must be above 0, not {weight}.")
        project.weight = weight
    if max_running_jobs is not None:
        if max_running_jobs < 0:
            raise ValueError(f"The limit on running jobs must be 0 (none) or more, not {max_running_jobs}.")
        project.max_running_jobs = max_running_jobs or None
    session.flush()
    return True


# -- looking ahead ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a queued job stands. `predicted_start` is None where no estimate covers all that is ahead."""

    position: int
    predicted_start: float | None
    waiting_for: str | None


def queue_position(session: Session, job_id: str, *, heartbeat_seconds: float) -> Place | None:
    """Where the job stands; None if it is not queued. For many jobs, or often, ask a `Forecast`."""
    return forecast(session, heartbeat_seconds=heartbeat_seconds).get(job_id)


def forecast(session: Session, *, heartbeat_seconds: float) -> dict[str, Place]:
    """The place of every queued job, from letting the workers that are alive work through the queue in thought.

    Durations are the jobs' estimates (`estimate["seconds"]`, less what is trained already) and the running jobs'
    `estimated_finish`. Beyond `MOST_STARTS` jobs the order is by priority and age alone.
    """
    return _Simulation(session, heartbeat_seconds).run()


# What is predicted beyond that is too far ahead to be true.
MOST_STARTS = 1000
# Stands for a duration that nobody knows, so that the order goes on; what comes after is not predicted.
UNKNOWN_SECONDS = 600.0


class _Simulation:
    """The queue and the workers as they are now, and then as they will be."""

    def __init__(self, session: Session, heartbeat_seconds: float) -> None:
        running = _running()
        rows = session.execute(
            select(
                Project.id,
                Project.weight,
                Project.max_running_jobs,
                _share(running).label("share"),
                func.coalesce(running.c.jobs, 0).label("jobs"),
                now().label("now"),
            ).outerjoin(running, running.c.project_id == Project.id)
        ).all()
        self.now = rows[0].now if rows else 0.0
        self.weight = {row.id: row.weight for row in rows}
        self.limit = {row.id: row.max_running_jobs for row in rows if row.max_running_jobs is not None}
        self.share = {row.id: row.share for row in rows}
        self.running = {row.id: row.jobs for row in rows}
        workers = alive(session, heartbeat_seconds)
        self.has_workers = bool(workers)
        self.devices = sorted({math.inf if worker.device_bytes is None else worker.device_bytes for worker in workers})
        self.releases: list[tuple[float, str]] = []
        self.slots: list[tuple[float, int, float, bool]] = []  # free at, number, memory, whether that is known
        busy: dict[str, tuple[float, bool]] = {}
        for row in session.execute(_with_seconds(JobStatus.RUNNING, Job.lease_owner, Job.estimated_finish)):
            ends = row.estimated_finish or (None if row.seconds is None else self.now + _remaining(row))
            known = ends is not None
            ends = max(self.now, ends) if ends is not None else self.now + UNKNOWN_SECONDS
            busy[row.lease_owner] = (ends, known)
            heapq.heappush(self.releases, (ends, row.project_id))
        for worker in workers:
            free, known = busy.pop(worker.id, (self.now, True))
            self._add_slot(free, math.inf if worker.device_bytes is None else worker.device_bytes, known)
        if not workers:  # nobody knows when, but still in which order
            self.devices = [math.inf]
            self._add_slot(self.now, math.inf, False)
        columns = (Job.id, Job.priority, Job.created_at, Job.not_before, Job.needs_bytes, Job.waiting_for)
        self.queued = session.execute(
            _with_seconds(JobStatus.QUEUED, *columns).order_by(Job.priority.desc(), Job.created_at, Job.id)
        ).all()

    def _add_slot(self, free: float, memory: float, known: bool) -> None:
        heapq.heappush(self.slots, (free, len(self.slots), memory, known))

    def run(self) -> dict[str, Place]:
        """The jobs in the order in which they start."""
        # A line holds the jobs of one project that the same workers can run; its first is always the next.
        lines: dict[tuple[str, float], deque[Any]] = defaultdict(deque)
        too_large = []
        for row in self.queued:
            fitting = [device for device in self.devices if (row.needs_bytes or 0) <= device]
            if fitting:
                lines[row.project_id, fitting[0]].append(row)
            else:
                too_large.append(row)
        heap = [self._entry(key, line) for key, line in lines.items()]
        heapq.heapify(heap)
        full = {project for project, most in self.limit.items() if self.running[project] >= most}
        starts: list[tuple[Any, float | None]] = []
        while heap and self.slots and len(starts) < MOST_STARTS:
            free, number, memory, known = heapq.heappop(self.slots)
            while self.releases and self.releases[0][0] <= free:
                self.running[heapq.heappop(self.releases)[1]] -= 1
            aside, key, limited = [], None, False
            while heap:
                entry = heapq.heappop(heap)
                (project, needs), line = entry[-1], lines[entry[-1]]
                if entry[1] != self.share[project]:
                    heapq.heappush(heap, self._entry((project, needs), line))
                elif needs <= memory and self.running[project] < self.limit.get(project, math.inf):
                    key = (project, needs)
                    break
                else:
                    limited = limited or needs <= memory
                    aside.append(entry)
            for entry in aside:
                heapq.heappush(heap, entry)
            if key is None:
                if limited and self.releases:  # nothing for this worker until one of them ends
                    heapq.heappush(self.slots, (self.releases[0][0], number, memory, False))
                continue
            row = lines[key].popleft()
            start = max(free, row.not_before)
            starts.append((row, start if known else None))
            seconds = UNKNOWN_SECONDS if row.seconds is None else _remaining(row)
            self.share[key[0]] += max(seconds, LEAST_SECONDS) / self.weight[key[0]]
            self.running[key[0]] += 1
            heapq.heappush(self.releases, (start + seconds, key[0]))
            heapq.heappush(self.slots, (start + seconds, number, memory, known and row.seconds is not None))
            if lines[key]:
                heapq.heappush(heap, self._entry(key, lines[key]))
        rest = sorted((row for line in lines.values() for row in line), key=lambda row: (-row.priority, row.created_at))
        placed = [*starts, *((row, None) for row in [*rest, *too_large])]
        largest = max(self.devices)
        places = {}
        for position, (row, begins) in enumerate(placed, start=1):
            reason = row.waiting_for
            if not self.has_workers:
                reason = reason or "No worker is running."
            elif (row.needs_bytes or 0) > largest:
                reason = reason or too_large_for(row.needs_bytes, int(largest))
            elif row.project_id in full:
                reason = f"The project's limit of {self.limit[row.project_id]} running jobs is reached."
            places[row.id] = Place(position, begins, reason)
        return places

    def _entry(self, key: tuple[str, float], line: deque[Any]) -> tuple[Any, ...]:
        return (-line[0].priority, self.share[key[0]], line[0].created_at, line[0].id, key)


def _with_seconds(status: JobStatus, *columns: Any) -> Select[Any]:
    seconds = Job.estimate["seconds"].as_float().label("seconds")
    query = select(Job.project_id, Job.step, Job.total_steps, seconds, *columns)
    return query.where(Job.status == (QUEUED if status is JobStatus.QUEUED else status))


def _remaining(row: Any) -> float:
    done = row.step / row.total_steps if row.total_steps else 0.0
    return float(row.seconds * max(0.0, 1.0 - done))


def too_large_for(needs_bytes: int, largest: int) -> str:
    """The sentence for a job that fits no worker's device."""
    return (
        f"The job needs {needs_bytes / 2**30:.1f} GiB of device memory; the largest worker has {largest / 2**30:.1f} "
        "GiB. It starts when a larger one is there."
    )


def waiting_changes(session: Session, *, heartbeat_seconds: float) -> dict[str, str | None]:
    """Queued jobs that fit no living worker and do not say so, with their sentence; those that fit again, with None.

    Without any worker nothing is said: that is no property of a job.
    """
    workers = alive(session, heartbeat_seconds)
    if not workers:
        return {}
    devices = [worker.device_bytes for worker in workers if worker.device_bytes is not None]
    largest = max(devices) if len(devices) == len(workers) else None
    too_large = false() if largest is None else Job.needs_bytes > largest
    rows = session.execute(
        select(Job.id, Job.needs_bytes, Job.waiting_for)
        .where(Job.status == QUEUED, or_(Job.waiting_for.is_not(None), too_large))
        .order_by(Job.waiting_for.is_not(None), Job.created_at)
        .limit(1000)
    )
    changes: dict[str, str | None] = {}
    for row in rows:
        fits = largest is None or row.needs_bytes is None or row.needs_bytes <= largest
        sentence = None if fits or largest is None else too_large_for(row.needs_bytes, largest)
        if sentence != row.waiting_for:
            changes[row.id] = sentence
    return changes


class Forecast:
    """The last forecast of one API process, made anew in the background when somebody has asked and it is old.

    So a thousand clients that follow their queued jobs cost as much as one, and no poll more than it did.
    """

    FRESH_SECONDS = 5.0
    # For a job that came into the queue since.
    FRESH_FOR_NEW_SECONDS = 0.5
    # And it rests so many times as long as it took: with 10,000 queued it takes a quarter of a second, which holds up
    # the process's other answers, and one in a hundred of them must not meet it.
    RESTS = 200

    def __init__(self, database: Database, *, heartbeat_seconds: float, wake: Callable[[], None]) -> None:
        """`wake` is called when `make` should be, from the thread of whoever asked."""
        self._db, self._heartbeat, self._wake = database, heartbeat_seconds, wake
        self._places: dict[str, Place] = {}
        self._made = -math.inf
        self._took = 0.0
        self._asked = False

    def of(self, job_id: str, status: str) -> Place | None:
        """Where the job stands. None: it is not queued, or was queued just now."""
        if status != JobStatus.QUEUED:
            return None
        place = self._places.get(job_id)
        fresh = self.FRESH_SECONDS if place is not None else self.FRESH_FOR_NEW_SECONDS
        if not self._asked and time.monotonic() - self._made > max(fresh, self.RESTS * self._took):
            self._asked = True
            self._wake()
        return place

    def make(self) -> None:
        """Look at the queue, if somebody has asked since the last time."""
        if not self._asked:
            return
        began = time.thread_time()
        with self._db.read() as session:
            self._places = forecast(session, heartbeat_seconds=self._heartbeat)
        self._took = time.thread_time() - began
        self._made, self._asked = time.monotonic(), False
