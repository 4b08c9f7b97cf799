"""One campaign: jobs keep coming, faults keep striking, and at the end every accepted job is held to its promise."""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from graft.models import Checkpoint, Job, Outbox

from ..processes import cut
from .customer import SPECS, Customer
from .faults import FAULTS, Fault, possible
from .installation import Installation
from .judge import Verdict, judge, weights_sha256

JOBS_AT_ONCE = 4
PROGRESS_SECONDS = 30.0  # how long most faults wait for a checkpoint, or a job's end, since the one before
HURRIED = 0.3  # the share of the others, which strike again at once: while something imports, loads, or is taken back
DRAIN_SECONDS = 300.0
# With which a worker fails a job that has met it in every attempt. (An upload is refused with 507 and another code.)
DISK_FULL = "disk_full"


@dataclass
class Row:
    """What a kind of fault was done to, and for how long."""

    times: int = 0
    seconds: float = 0.0
    jobs: set[str] = field(default_factory=set)


@dataclass
class Report:
    """What a campaign found."""

    kind: str
    seed: int
    rows: dict[str, Row]
    verdict: Verdict
    kills: int
    seconds: float
    notes: list[str]

    def table(self) -> str:
        """A row a fault, and one for all."""
        head = f"{'fault':34}{'times':>6}{'jobs':>6}{'lost':>6}{'double':>8}{'differing':>11}{'gaps':>6}{'seconds':>9}"
        lines = [f"{self.kind}, seed {self.seed}", head, "-" * len(head)]
        for name, row in self.rows.items():
            lines.append(self._line(name, row.times, row.jobs, row.seconds))
        every = set(self.verdict.told) | self.verdict.lost
        times = sum(row.times for row in self.rows.values())
        lines.append("-" * len(head))
        lines.append(self._line("all", times, every, self.seconds, jobs=self.verdict.jobs))
        lines.append(f"{self.kills} SIGKILLs of a supervisor or an engine")
        lines += self.notes + self.verdict.other
        lines += [f"VIOLATION {job_id}: {text}" for job_id, text in sorted(self.verdict.told.items())]
        return "\n".join(lines)

    def _line(self, name: str, times: int, touched: set[str], seconds: float, jobs: int | None = None) -> str:
        v = self.verdict
        counts = [len(touched & found) for found in (v.lost, v.double, v.differing, v.gaps)]
        return (
            f"{name:34}{times:6}{len(touched) if jobs is None else jobs:6}"
            + "{:6}{:8}{:11}{:6}".format(*counts)
            + f"{seconds:9.1f}"
        )


class Campaign:
    """Faults by a seed against one installation, until `kills` or `seconds` are reached."""

    def __init__(
        self,
        house: Installation,
        seed: int,
        *,
        kills: int | None,
        seconds: float | None,
        without: Collection[str],
        say: Callable[[str], None],
    ) -> None:
        self._house, self._seed, self._say = house, seed, say
        self._faults = [fault for fault in possible(house) if fault.name not in without]
        self._wrong: list[str] = []
        self._left_out = [f"{name}: left out, as asked" for name in without]
        self._rng = Random(seed)
        self._kills, self._seconds = kills, seconds
        self._customer = Customer(house.urls, seed + 1, jobs_at_once=JOBS_AT_ONCE)
        self._rows: dict[str, Row] = {}
        self._mends: list[tuple[float, Callable[[], None]]] = []
        self._seen = (0, 0)

    def run(self, expected: dict[str, str]) -> Report:
        """`expected` is filled with the digests of the uninterrupted runs, unless it holds them already."""
        self._customer.upload(cut(self._house.folder / "rows.jsonl", 16))
        for spec in SPECS:
            job_id = self._customer.create(spec)
            self._until(lambda: self._all_ended(), 240, f"the uninterrupted run of '{spec}'")
            digest = weights_sha256(self._house.direct, job_id)
            assert digest is not None, f"the uninterrupted run of '{spec}' did not succeed"
            if expected.setdefault(spec, digest) != digest:
                self._wrong.append(f"two uninterrupted runs of '{spec}' differ")
        self._say(f"{self._house.kind}: {len(SPECS)} uninterrupted runs are there; the faults begin")

        began = time.monotonic()
        failure: list[BaseException] = []
        thread = threading.Thread(target=self._work, args=(failure,), name="customer", daemon=True)
        thread.start()
        try:
            kills = self._strike_until_enough(began, failure)
        finally:
            self._customer.stop.set()
            for _, mend in self._mends:
                mend()
            self._mends.clear()
            self._house.mend()
        notes = list(self._left_out)
        try:
            # A thread that insists on an answer needs the installation to come back first.
            self._until(lambda: not thread.is_alive(), 120, "the customer's last answer")
            self._until(self._all_ended, DRAIN_SECONDS, "the end of every job")
            self._until(self._outbox_is_empty, 20, "an empty outbox")
        except TimeoutError as error:
            failure.append(error)
        may_fail = frozenset({DISK_FULL} if "disk full" in self._rows else ())
        verdict = judge(self._house.direct, self._customer.accepted, expected, may_fail=may_fail)
        verdict.other += self._wrong + [f"{type(error).__name__}: {error}" for error in failure]
        left = [process.pid for part in self._house.parts for process in part.left_over()]
        if left:
            verdict.other.append(f"processes of ended commands still run: {left}")
        for part in self._house.parts:
            if part.name.startswith("api"):
                for log in part.logs():
                    if "Traceback" in log.read_text(errors="replace"):
                        notes.append(f"a traceback in {log}")
        notes.append(
            f"{self._customer.asked} requests: {self._customer.unanswered} without an answer, "
            f"{self._customer.server_errors} answered with a 5xx other than 503"
        )
        if self._customer.server_errors:
            verdict.other.append("a request was answered with a 5xx other than 503")
        if self._house.small_disk is None:
            notes.append(f"disk full: left out, no small disk could be mounted ({self._house.small_disk_missing})")
        rows = {fault.name: self._rows[fault.name] for fault in FAULTS if fault.name in self._rows}
        return Report(self._house.kind, self._seed, rows, verdict, kills, time.monotonic() - began, notes)

    # -- striking -----------------------------------------------------------------------------------------------

    def _strike_until_enough(self, began: float, failure: list[BaseException]) -> int:
        faults, kills = self._faults, 0
        while not failure:
            if self._kills is not None and kills >= self._kills:
                break
            if self._seconds is not None and time.monotonic() - began > self._seconds:
                break
            (fault,) = self._rng.choices(faults, [each.weight for each in faults])
            struck_at = time.monotonic()
            mends = fault.strike(self._house, self._rng)
            if mends is None:
                self._pause(0.5)
                continue
            kills += fault.is_kill
            self._mends += [(struck_at + after, mend) for after, mend in mends]
            self._note(fault)
            self._pause(max((after for after, _ in mends), default=0.0))
            if self._rng.random() >= HURRIED:
                self._wait_for_progress()
            self._pause(self._rng.uniform(0.0, 2.5))
            self._rows[fault.name].seconds += time.monotonic() - struck_at
        return kills

    def _note(self, fault: Fault) -> None:
        row = self._rows.setdefault(fault.name, Row())
        row.times += 1
        row.jobs |= set(self._customer.accepted) - self._customer.ended
        total = sum(each.times for each in self._rows.values())
        self._say(f"{self._house.kind}: {total:4} {fault.name}")

    def _wait_for_progress(self) -> None:
        deadline = time.monotonic() + PROGRESS_SECONDS
        while time.monotonic() < deadline:
            now = self._progress()
            if now is not None and now != self._seen:
                self._seen = now
                return
            self._turn()

    def _progress(self) -> tuple[int, int] | None:
        try:
            with self._house.direct.read() as session:
                saved = session.scalar(select(func.count()).select_from(Checkpoint)) or 0
                return saved, session.scalar(select(func.count(Job.finished_at))) or 0
        except DBAPIError:
            return None

    # -- waiting ------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """What has to go on all the time."""
        due = [mend for mend in self._mends if mend[0] <= time.monotonic()]
        for each in due:
            self._mends.remove(each)
            each[1]()
        self._house.tend()
        time.sleep(0.1)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._turn()

    def _until(self, look: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not look():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
            self._turn()

    def _all_ended(self) -> bool:
        self._customer.look()
        return self._customer.accepted.keys() <= self._customer.ended

    def _outbox_is_empty(self) -> bool:
        with self._house.direct.read() as session:
            return not session.scalar(select(func.count()).select_from(Outbox))

    def _work(self, failure: list[BaseException]) -> None:
        try:
            self._customer.run()
        except BaseException as error:
            failure.append(error)


def run(
    kind: str,
    folder: Path,
    seed: int,
    expected: dict[str, str],
    *,
    kills: int | None,
    seconds: float | None,
    without: Collection[str],
    say: Callable[[str], None],
) -> Report:
    """A campaign on a new installation in `folder`."""
    folder.mkdir(parents=True)
    with Installation(kind, folder, Random(seed + 2)) as house:
        return Campaign(house, seed, kills=kills, seconds=seconds, without=without, say=say).run(expected)
