"""One installation under fire: API processes and workers that are started again when they end, as systemd would."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Self

import psutil
import redis

from graft.db import Database

from ..processes import KEY, Command
from ..services import PostgresServer, RedisServer
from .proxy import FAIR, Proxy

LEASE_SECONDS = 4.0
SMALL_DISK_BYTES = 48 * 2**20

SETTINGS = {
    "GRAFT_API_KEY": KEY,
    "GRAFT_LEASE_SECONDS": str(LEASE_SECONDS),
    "GRAFT_HEARTBEAT_SECONDS": "1",
    "GRAFT_POLL_SECONDS": "0.5",
    # A job is to outlive everything that is done to it here: no number of losses fails it.
    "GRAFT_MAX_RECOVERIES": "1000000",
}


class Part:
    """A command that is to run all the time."""

    def __init__(self, name: str, folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self._folder, self._arguments, self._environment = folder, arguments, environment
        self._ended: list[Command] = []
        self._again_at: float | None = None
        self.command = self._start()

    def _start(self) -> Command:
        return Command(self._folder, self._arguments, self._environment)

    @property
    def is_alive(self) -> bool:
        return self.command.process.poll() is None

    def tend(self, pause: float) -> None:
        """Start it again if it has ended, `pause` seconds after that was seen."""
        if self.is_alive:
            self.command.processes()
            return
        if self._again_at is None:
            self._again_at = time.monotonic() + pause
        elif time.monotonic() >= self._again_at:
            self._ended.append(self.command)
            self.command, self._again_at = self._start(), None

    def processes(self) -> list[psutil.Process]:
        return self.command.processes()

    def logs(self) -> Iterator[Path]:
        for command in (*self._ended, self.command):
            yield command.log_file

    def left_over(self) -> list[psutil.Process]:
        """What still runs of commands that have ended."""
        return [process for command in self._ended for process in command.left_over(0)]

    def close(self) -> None:
        for command in (*self._ended, self.command):
            command.close()


class Installation:
    """API processes and workers over SQLite, or over PostgreSQL and Redis behind proxies.

    `direct` is the database as nobody else sees it: past the proxies.
    """

    def __init__(self, kind: str, folder: Path, rng: Random, *, apis: int = 2, workers: int = 2) -> None:
        self.kind, self.folder = kind, folder
        self._rng = rng
        self._count = (apis, workers)
        self._stack = ExitStack()
        self.postgres: PostgresServer | None = None
        self.redis: RedisServer | None = None
        self.proxies: dict[str, Proxy] = {}
        self.small_disk: Path | None = None
        self.small_disk_missing = ""

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        environment = {**SETTINGS, "GRAFT_WEIGHT_CACHE_DIR": str(self.folder / "weights")}
        if self.kind == "postgresql":
            self.postgres = self._stack.enter_context(PostgresServer())
            self.redis = self._stack.enter_context(RedisServer())
            direct = self.postgres.create_database("graft")
            self.proxies = {
                "postgres": self._stack.enter_context(Proxy(self.postgres.folder / ".s.PGSQL.5432")),
                "redis": self._stack.enter_context(Proxy(self.redis.port)),
            }
            port = self.proxies["postgres"].port
            environment["GRAFT_DATABASE_URL"] = f"postgresql+psycopg://postgres@127.0.0.1:{port}/graft"
            environment["GRAFT_BROKER_URL"] = f"redis://127.0.0.1:{self.proxies['redis'].port}/0"
        else:
            direct = f"sqlite:///{self.folder / 'graft.db'}"
            environment["GRAFT_DATABASE_URL"] = direct
        self.direct = Database(direct)
        self._stack.callback(self.direct.dispose)
        self.direct.migrate()
        self.small_disk = self._mount_small_disk()

        num_apis, num_workers = self._count
        ports = _free_ports(num_apis)
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.apis = [
            self._part(f"api{index}", ["serve", "--workers", "0", "--port", str(port)], environment, None)
            for index, port in enumerate(ports)
        ]
        self.workers = [
            # The first worker's scratch space is the disk that will be full.
            self._part(f"worker{index}", ["worker"], environment, self.small_disk if index == 0 else None)
            for index in range(num_workers)
        ]

    def _part(self, name: str, arguments: list[str], environment: dict[str, str], data: Path | None) -> Part:
        folder = self.folder / name
        part = Part(name, folder, [*arguments, "--data-dir", str(data or folder)], environment)
        self._stack.callback(part.close)
        return part

    def _mount_small_disk(self) -> Path | None:
        """A file system of a few MB; None, with the reason noted, where this process may not make one."""
        point = self.folder / "small-disk"
        point.mkdir()
        options = f"size={SMALL_DISK_BYTES},mode=700"
        done = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "graft-chaos", str(point)], capture_output=True, text=True
            )
            if shutil.which("mount") and os.geteuid() == 0
            else None
        )
        if done is None or done.returncode != 0:
            self.small_disk_missing = "only root may mount" if done is None else done.stderr.strip()
            return None
        self._stack.callback(subprocess.run, ["umount", "--lazy", str(point)], check=False)
        return point

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[Part]:
        return [*self.apis, *self.workers]

    def engines(self) -> list[psutil.Process]:
        return [engine for worker in self.workers for engine in worker.command.engines()]

    def tend(self) -> None:
        """To be called often: starts what has ended."""
        for part in self.parts:
            part.tend(self._rng.uniform(0.2, 1.0))

    # -- mending ------------------------------------------------------------------------------------------------

    def mend(self) -> None:
        """Everything runs, nothing is frozen, the network is good, the disk has room."""
        for server in (self.postgres, self.redis):
            if server is not None and not server.running:
                server.restart()
        for proxy in self.proxies.values():
            proxy.weather = FAIR
        if self.small_disk is not None:
            (self.small_disk / "filler").unlink(missing_ok=True)
        for part in self.parts:
            for process in part.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
        self.tend()

    def forget_nudges(self) -> None:
        """Redis is there again, and empty."""
        assert self.redis is not None
        with redis.Redis.from_url(self.redis.url) as client:
            client.flushall()


def _free_ports(count: int) -> list[int]:
    """Below the range from which the kernel gives ports to clients: a killed server finds its own free again."""
    found: list[int] = []
    rng = Random()
    while len(found) < count:
        port = rng.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found
