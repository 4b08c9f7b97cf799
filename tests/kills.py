"""Jobs that run while their supervisors and engines are killed at random, and the judgement on what became of them.

    with Service(folder, "--workers", "0", environment=environment) as service:
        outcome = campaign(service, environment, kills=200, seed=7)
    assert not outcome.faults, outcome

The environment's database and broker decide whether that is SQLite or PostgreSQL with Redis and Celery. Everything
random comes from the seed, but for what the machine's own timing makes of it.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from .processes import Service, Worker, cut

# Short leases, because every killed supervisor waits for the end of one; and recoveries are counted elsewhere.
ENVIRONMENT = {
    "GRAFT_LEASE_SECONDS": "3",
    "GRAFT_HEARTBEAT_SECONDS": "1",
    "GRAFT_POLL_SECONDS": "0.5",
    "GRAFT_MAX_RECOVERIES": "100",
    "GRAFT_CHECKPOINT_STEPS": "5",
}
STEPS = 30
WORKERS = 2
JOBS_AT_ONCE = 3
END_SECONDS = 400.0  # of a machine that has much else to do


@dataclass
class Outcome:
    """What a campaign found: jobs by what befell them, each of the three lists to be empty."""

    seed: int
    kills: dict[str, int] = field(default_factory=lambda: {"supervisor": 0, "engine": 0})
    jobs: int = 0
    recoveries: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)  # without an end, or ended in anything but success
    twice: list[str] = field(default_factory=list)  # completed more than once
    differing: list[str] = field(default_factory=list)  # another adapter or result than the uninterrupted run's

    @property
    def faults(self) -> list[str]:
        return [*self.lost, *self.twice, *self.differing]

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.kills['supervisor']} supervisors and {self.kills['engine']} engines killed in "
            f"{self.seconds:.0f} s under {self.jobs} jobs, {self.recoveries} recoveries; {len(self.lost)} lost, "
            f"{len(self.twice)} run twice, {len(self.differing)} adapters differing {self.faults or ''}"
        )


class Crew:
    """Some workers; one that was killed is replaced at once."""

    def __init__(self, service: Service, environment: dict[str, str], count: int) -> None:
        self._service, self._environment = service, environment
        self._started = 0
        self.workers = [self._start() for _ in range(count)]

    def _start(self) -> Worker:
        self._started += 1
        # On SQLite all share the data folder; what is scratch in it is each process's own.
        folder = self._service.folder
        return Worker(folder, self._environment)

    def replace_dead(self) -> None:
        for index, worker in enumerate(self.workers):
            if worker.process.poll() is not None:
                worker.close()
                self.workers[index] = self._start()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@contextlib.contextmanager
def crew(service: Service, environment: dict[str, str], count: int = WORKERS) -> Iterator[Crew]:
    """Workers beside a service that has none, ended with what they started."""
    made = Crew(service, environment, count)
    try:
        yield made
    finally:
        made.close()


def campaign(service: Service, environment: dict[str, str], *, kills: int, seed: int) -> Outcome:
    """Keep some jobs alive, kill a random supervisor or engine again and again, then wait for every job's end.

    `service` runs without workers of its own. `environment` is what its workers need, `ENVIRONMENT` included.
    """
    rng = random.Random(seed)
    outcome = Outcome(seed)
    began = time.monotonic()
    training_file = service.upload(cut(service.folder / "train.jsonl", 12))

    def create() -> str:
        body = {"n_evals": 2, "packing": bool(len(created) % 2)}
        created.append(service.create(training_file, n_epochs=5, batch_size=2, extra_body=body).id)
        return created[-1]

    created: list[str] = []
    with crew(service, environment) as workers:
        # One of each kind, with nobody in its way.
        expected = [service.weights_sha256(service.wait_for_end(create(), END_SECONDS)) for _ in range(2)]
        steps = service.job(created[0]).progress["step"]  # type: ignore[attr-defined]
        assert steps == STEPS
        live: list[str] = []
        while sum(outcome.kills.values()) < kills:
            workers.replace_dead()
            live = [job_id for job_id in live if service.job(job_id).finished_at is None]
            live += [create() for _ in range(JOBS_AT_ONCE - len(live))]
            time.sleep(rng.uniform(0.1, 2.5))
            victims = {
                "engine": [engine for worker in workers.workers for engine in worker.engines()],
                "supervisor": [each for worker in workers.workers for each in worker.workers() if worker.engines()],
            }
            kind = rng.choice(["engine", "supervisor"])
            if victims[kind]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rng.choice(victims[kind]).kill()
                    outcome.kills[kind] += 1
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and any(service.job(job_id).finished_at is None for job_id in live):
            workers.replace_dead()
            time.sleep(0.2)
    for index, job_id in enumerate(created):
        job = service.job(job_id)
        messages = [event.message for event in service.events(job_id)]
        outcome.recoveries += sum(message.startswith("The job goes back to the queue") for message in messages)
        if job.status != "succeeded":
            outcome.lost.append(f"{job_id} is {job.status}: {job.error}")
            continue
        if messages.count("The job has successfully completed") != 1:
            outcome.twice.append(job_id)
        lines = service.client.files.content(job.result_files[0]).text.splitlines()
        if service.weights_sha256(job) != expected[index % 2] or len(lines) != STEPS + 1:
            outcome.differing.append(job_id)
    outcome.jobs = len(created)
    outcome.seconds = time.monotonic() - began
    return outcome
