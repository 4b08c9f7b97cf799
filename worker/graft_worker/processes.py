"""What a process of the worker does so that nobody and nothing is left behind, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals, parent: int) -> None:
    """Ask the kernel to send us `number` when the process `parent`, which started us, ends (on Linux only).

    The kernel means the thread that started us: start children from a thread that lives as long as its process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it had ended before we asked
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder, removed at the end; if we are killed before that, by the next process that makes one there.

    Its owner holds a lock on it, which the kernel takes back when the owner ends.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _lock(parent):  # a folder that is made but not locked yet looks like an abandoned one
        for other in parent.iterdir():
            with contextlib.suppress(BlockingIOError), _lock(other, wait=False):
                shutil.rmtree(other, ignore_errors=True)
        folder = parent / name
        folder.mkdir()
        held = contextlib.ExitStack()
        held.enter_context(_lock(folder))
    with held:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
