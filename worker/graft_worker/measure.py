"""What this machine has for a job: the device's name, the memory that a plan may fill, and the planner's rates.

    python -m graft_worker.measure PARENT_PID      # a CPU's, in a process that is gone afterwards, as one line of JSON

A worker with a GPU has its engine measure it. Without one an idle worker holds no engine, and asks this instead.
"""

from __future__ import annotations

import json
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graft import planner
from graft_kernels.adamw import _update_kernel
from graft_kernels.launch import is_built
from graft_kernels.nf4 import NF4Weight, decode
from graft_worker.processes import die_with_parent


def measured(device: torch.device) -> dict[str, Any]:
    """`device`, `device_bytes` (None on a CPU) and `rates`, as `graft.workers.register` takes them. In 0.3 to 0.6 s."""
    if device.type == "cuda":
        # They import what a CPU is measured without.
        from graft_worker import planning
        from graft_worker.export import device_name

        card = planning.measured_card(device)
        free, _ = torch.cuda.mem_get_info(device)
        there_is = free + torch.cuda.memory_reserved(device)
        return {
            "device": device_name(device),
            "device_bytes": planner.usable_bytes(there_is),
            "rates": {
                "gemm": card.product,
                "copy": card.copy,
                "link": card.to_host,
                "built": float(is_built(_update_kernel)),  # of the optimizer, which every job runs
            },
        }
    return {"device": cpu_name(), "device_bytes": None, "rates": cpu_rates()}


def cpu_rates() -> dict[str, float]:
    """FLOP/s of a product in fp32; bytes/s of an elementwise op, counted as if in bf16; weights decoded a second."""
    # Freed, it teaches malloc to keep pieces of this size at hand, as in a process that has trained for a while.
    torch.empty(28 << 20, dtype=torch.uint8).fill_(0)
    weight = NF4Weight(
        packed=torch.randint(0, 256, (1 << 19,), dtype=torch.uint8),
        shape=(1024, 1024),
        blocksize=64,
        absmax=torch.randint(0, 256, (1 << 14,), dtype=torch.uint8),
        code2=torch.rand(256),
        absmax2=torch.rand(1 << 6),
        offset=torch.rand(()),
    )
    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    x = torch.randn(1 << 20)
    out = torch.empty_like(x)
    return {
        "gemm": 2 * 256 * 1024 * 1024 / _seconds(lambda: a @ b),
        "copy": 2 * 2 * x.numel() / _seconds(lambda: torch.mul(x, 0.5, out=out)),
        "decode": weight.shape[0] * weight.shape[1] / _seconds(lambda: decode(weight, torch.float32)),
    }


def cpu_name() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"CPU ({platform.machine()})"


def _seconds(run: Callable[[], object]) -> float:
    """The median over a fifth of a second: what else runs on this machine will disturb a job as well, but not what
    happens to start beside this."""
    run()
    taken, until = [], time.perf_counter() + 0.2
    while (began := time.perf_counter()) < until:
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Print what the CPU has. Ends with its parent."""
    die_with_parent(signal.SIGKILL, int(sys.argv[1]))
    print(json.dumps(measured(torch.device("cpu"))))


if __name__ == "__main__":
    main()
