"""The supervisor's end of the engine: the child process and the two pipes to it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

Message = dict[str, Any]


class EngineLost(Exception):
    """The engine ended without a word."""


class EngineProcess:
    """The child and the two pipes to it. Started with the first job, kept for its warm base model.

    `device` is what the engine has measured, once it has; `holds` the base model in its memory.
    """

    def __init__(self) -> None:
        self.device: Message | None = None
        self.holds: str | None = None
        self.measured = threading.Event()  # or ended before that
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graft_worker.engine", str(theirs_in), str(theirs_out), str(os.getpid())],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # its own process group, so that it can be killed with all it started
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._commands = os.fdopen(ours_out, "w", encoding="utf-8", buffering=1)
        self._messages = os.fdopen(ours_in, "r", encoding="utf-8")
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="engine-messages", daemon=True).start()

    def _listen(self) -> None:
        # Half a line comes from an engine that was killed while it wrote.
        with self._messages, contextlib.suppress(ValueError):
            for line in self._messages:
                message = json.loads(line)
                if message["kind"] == "device":  # of no job
                    self.device = message
                    self.measured.set()
                else:
                    self._inbox.put(message)
        self._inbox.put(None)
        self.measured.set()

    def send(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; `receive` says so
            self._commands.write(json.dumps({"kind": kind, **fields}) + "\n")

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None if there was none in time. Raises EngineLost when there will be none."""
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            raise EngineLost(f"the engine ended ({self._ending()})")
        return message

    def _ending(self) -> str:
        code = self._process.wait(timeout=10)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the whole process group, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # a command that it did not live to read
            self._commands.close()
