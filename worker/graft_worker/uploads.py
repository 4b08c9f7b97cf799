"""Checkpoints on their way from the worker's disk to storage, beside the training."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from graft_worker.engine_process import Message

log = logging.getLogger(__name__)

# Before a checkpoint is given up: a store may be away for a moment.
TRIES = 4
FIRST_PAUSE_SECONDS = 1.0


class Uploads:
    """Stores the checkpoints that the engine has announced, one after another and in their order, in its own thread.

    One that only bounds what can be lost gives way to the next one that already waits behind it.
    """

    def __init__(self, store: Callable[[Message], None], give_up: Callable[[Message, Exception], None]) -> None:
        self._store, self._give_up = store, give_up
        self._waiting: deque[Message] = deque()
        self._changed = threading.Condition()
        self._is_storing = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Message) -> None:
        with self._changed:
            if self._waiting and not self._waiting[-1]["wanted"]:
                shutil.rmtree(self._waiting.pop()["path"], ignore_errors=True)
            self._waiting.append(checkpoint)
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Whether everything has been stored, or given up, within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_storing, timeout)

    def close(self) -> None:
        """Drop what waits. What is on its way comes to its end by itself; a fence keeps it from mattering."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                checkpoint, self._is_storing = self._waiting.popleft(), True
            try:
                self._one(checkpoint)
            finally:
                with self._changed:
                    self._is_storing = False
                    self._changed.notify_all()

    def _one(self, checkpoint: Message) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                self._store(checkpoint)
                break
            except Exception as error:
                if self._is_closed:
                    return
                if attempt == TRIES:
                    log.exception("a checkpoint cannot be stored")
                    self._give_up(checkpoint, error)
                    break
                log.warning("a checkpoint could not be stored, trying again: %s", error)
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        shutil.rmtree(Path(checkpoint["path"]), ignore_errors=True)
