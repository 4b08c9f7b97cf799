"""The faults. Each does its harm at once and returns after how many seconds the harm is to end, and how."""

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import psutil

from .installation import LEASE_SECONDS, Installation
from .proxy import FAIR, Weather

Mend = tuple[float, Callable[[], None]]


@dataclass(frozen=True)
class Fault:
    """A kind of harm.

    Attributes:
        weight: how often it is chosen, against the others.
        is_kill: whether it is a SIGKILL of a supervisor or of an engine, which KILLS counts.
        strike: does it; None if there was nothing to do it to.
    """

    name: str
    weight: float
    strike: Callable[[Installation, Random], list[Mend] | None]
    is_kill: bool = False
    needs: str = ""  # "postgresql", "small disk", or nothing


def _send(processes: list[psutil.Process], number: signal.Signals) -> bool:
    sent = False
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            sent = True
    return sent


def _kill_engine(house: Installation, rng: Random) -> list[Mend] | None:
    engines = house.engines()
    return [] if engines and _send([rng.choice(engines)], signal.SIGKILL) else None


def _kill_supervisor(house: Installation, rng: Random) -> list[Mend] | None:
    return [] if _send(rng.choice(house.workers).processes()[:1], signal.SIGKILL) else None


def _kill_both(house: Installation, rng: Random) -> list[Mend] | None:
    return [] if _send(rng.choice(house.workers).processes(), signal.SIGKILL) else None


def _kill_api(house: Installation, rng: Random) -> list[Mend] | None:
    return [] if _send(rng.choice(house.apis).processes()[:1], signal.SIGKILL) else None


def _stop_worker(house: Installation, rng: Random) -> list[Mend] | None:
    return [] if _send(rng.choice(house.workers).processes()[:1], signal.SIGTERM) else None


def _stop_worker_then_kill(house: Installation, rng: Random) -> list[Mend] | None:
    worker = rng.choice(house.workers).processes()
    if not _send(worker[:1], signal.SIGTERM):
        return None
    return [(rng.uniform(0.0, 3.0), lambda: void(_send(worker, signal.SIGKILL)))]


def _stop_api(house: Installation, rng: Random) -> list[Mend] | None:
    return [] if _send(rng.choice(house.apis).processes()[:1], signal.SIGTERM) else None


def _freeze(processes: list[psutil.Process], seconds: float) -> list[Mend] | None:
    if not _send(processes, signal.SIGSTOP):
        return None
    return [(seconds, lambda: void(_send(processes, signal.SIGCONT)))]


def _freeze_worker(house: Installation, rng: Random) -> list[Mend] | None:
    # Past the lease: another one takes its job meanwhile, and it wakes up too late.
    return _freeze(rng.choice(house.workers).processes(), LEASE_SECONDS * rng.uniform(1.2, 2.5))


def _freeze_engine(house: Installation, rng: Random) -> list[Mend] | None:
    engines = house.engines()
    return _freeze([rng.choice(engines)], rng.uniform(0.5, 5.0)) if engines else None


def _freeze_api(house: Installation, rng: Random) -> list[Mend] | None:
    return _freeze(rng.choice(house.apis).processes(), rng.uniform(0.5, 8.0))


def _kill_redis(house: Installation, rng: Random) -> list[Mend] | None:
    assert house.redis is not None
    if not house.redis.running:
        return None
    house.redis.kill()
    replaced = rng.random() < 0.5

    def back() -> None:
        assert house.redis is not None
        house.redis.restart()
        if replaced:  # by another one, which knows nothing of what was queued
            house.forget_nudges()

    return [(rng.uniform(0.2, 10.0), back)]


def _kill_postgres(house: Installation, rng: Random) -> list[Mend] | None:
    assert house.postgres is not None
    if not house.postgres.running:
        return None
    house.postgres.kill()
    return [(rng.uniform(0.2, 6.0), house.postgres.restart)]


def _weather(house: Installation, rng: Random, weather: Weather, seconds: float, *, cut: bool = False) -> list[Mend]:
    proxy = house.proxies[rng.choice(sorted(house.proxies))]
    proxy.weather = weather
    if cut:
        proxy.cut()

    def clear() -> None:
        proxy.weather = FAIR

    return [(seconds, clear)]


def _cut(house: Installation, rng: Random) -> list[Mend] | None:
    return _weather(house, rng, Weather(refused=True), rng.uniform(0.0, 5.0), cut=True)


def _drop(house: Installation, rng: Random) -> list[Mend] | None:
    return _weather(house, rng, Weather(stalled=True), LEASE_SECONDS * rng.uniform(0.3, 2.0))


def _delay(house: Installation, rng: Random) -> list[Mend] | None:
    return _weather(house, rng, Weather(delay=rng.uniform(0.02, 0.3)), rng.uniform(2.0, 8.0))


def _fill_disk(house: Installation, rng: Random) -> list[Mend] | None:
    assert house.small_disk is not None
    filler = house.small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return [(rng.uniform(2.0, 8.0), lambda: filler.unlink(missing_ok=True))]


def void(_: object) -> None:
    """For a lambda that must return nothing."""


FAULTS = [
    Fault("SIGKILL engine", 5, _kill_engine, is_kill=True),
    Fault("SIGKILL supervisor", 5, _kill_supervisor, is_kill=True),
    Fault("SIGKILL supervisor and engine", 3, _kill_both, is_kill=True),
    Fault("SIGTERM worker", 1, _stop_worker),
    Fault("SIGTERM worker, then SIGKILL", 1, _stop_worker_then_kill),
    Fault("SIGSTOP worker past its lease", 1, _freeze_worker),
    Fault("SIGSTOP engine", 0.5, _freeze_engine),
    Fault("SIGKILL API", 1, _kill_api),
    Fault("SIGTERM API", 0.5, _stop_api),
    Fault("SIGSTOP API", 0.5, _freeze_api),
    Fault("SIGKILL Redis", 1, _kill_redis, needs="postgresql"),
    Fault("SIGKILL PostgreSQL", 1, _kill_postgres, needs="postgresql"),
    Fault("connections reset and refused", 0.7, _cut, needs="postgresql"),
    Fault("packets dropped", 0.7, _drop, needs="postgresql"),
    Fault("packets delayed", 0.7, _delay, needs="postgresql"),
    Fault("disk full", 0.7, _fill_disk, needs="small disk"),
]


def possible(house: Installation) -> list[Fault]:
    """Those that this installation can suffer."""
    has = {"", "small disk" if house.small_disk is not None else "", "postgresql" if house.postgres is not None else ""}
    return [fault for fault in FAULTS if fault.needs in has]
