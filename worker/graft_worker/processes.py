"""What a process of the worker does so that nobody is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send us `number` when our parent ends, however it ends (Linux; elsewhere this does nothing).

    The kernel means the thread that started us: start children from a thread that lives as long as its process.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it ended while we were asking
        os.kill(os.getpid(), number)
