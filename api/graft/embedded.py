"""The workers that `graft serve` starts itself: processes that are started again when they die, and stop with it."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from graft.errors import ConfigurationError
from graft.settings import Settings

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
HEALTHY_SECONDS = 60.0


def require_worker_package() -> None:
    """Raises ConfigurationError if this installation is the light one."""
    if importlib.util.find_spec("graft_worker") is None or importlib.util.find_spec("torch") is None:
        raise ConfigurationError(
            "The worker's packages are not installed. Run `pip install 'graft-server[worker]'`, or start the API alone "
            "with `graft serve --workers 0` and workers elsewhere."
        )


class EmbeddedWorkers:
    """`count` processes of `python -m graft_worker`."""

    def __init__(self, count: int, settings: Settings) -> None:
        self._count = count
        self._settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="embedded-workers", daemon=True)

    def start(self) -> None:
        if self._count == 0:
            return
        require_worker_package()
        self._processes = [self._spawn() for _ in range(self._count)]
        self._thread.start()

    def _spawn(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "GRAFT_DATA_DIR": str(self._settings.data_dir),
            "GRAFT_DATABASE_URL": self._settings.database,
        }
        # Embedded workers ask the database themselves, also when there is a broker for others.
        environment.pop("GRAFT_BROKER_URL", None)
        # Several engines on the CPU would otherwise each take all cores, and wait for one another.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._count)))
        # A session of its own: Ctrl-C reaches only this process, which then asks the workers to save and stop.
        command = [sys.executable, "-m", "graft_worker", "--embedded", str(os.getpid())]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def _watch(self) -> None:
        pauses = [1.0] * self._count
        began = [time.monotonic()] * self._count
        due = [0.0] * self._count
        while not self._stopping.wait(CHECK_SECONDS):
            for index, process in enumerate(self._processes):
                if process.poll() is None:
                    continue
                if due[index] == 0.0:
                    if time.monotonic() - began[index] > HEALTHY_SECONDS:
                        pauses[index] = 1.0
                    log.warning(
                        "worker %d ended (%s), starting it again in %.0f s",
                        process.pid,
                        _ending(process),
                        pauses[index],
                    )
                    due[index] = time.monotonic() + pauses[index]
                    pauses[index] = min(pauses[index] * 2, LONGEST_PAUSE_SECONDS)
                elif time.monotonic() >= due[index]:
                    self._processes[index] = self._spawn()
                    began[index], due[index] = time.monotonic(), 0.0

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """SIGTERM, time to save a checkpoint, then SIGKILL. `hurry` is asked all along, and ends the waiting."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._settings.grace_seconds + 5
        while any(process.poll() is None for process in self._processes):
            if hurry() or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for process in self._processes:
            if process.poll() is None:
                log.warning("worker %d is killed; its job resumes from the last checkpoint", process.pid)
                process.kill()
                process.wait()


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
