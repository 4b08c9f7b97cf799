"""What this machine has for a job: the device's name, the memory that a plan may fill, and the planner's rates."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graft import planner
from graft_kernels.nf4 import NF4Weight, decode
from graft_worker import planning
from graft_worker.export import device_name


def measured(device: torch.device, weight: NF4Weight | None = None) -> dict[str, Any]:
    """`device`, `device_bytes` (None on a CPU) and `rates`, as `graft.workers.register` takes them. Takes 0.3 s.

    `weight` is what a CPU's decoding is measured on; without one it is left out, and so are all rates.
    """
    if device.type == "cuda":
        card = planning.measured_card(device)
        free, _ = torch.cuda.mem_get_info(device)
        there_is = free + torch.cuda.memory_reserved(device)
        return {
            "device": device_name(device),
            "device_bytes": planner.usable_bytes(there_is),
            "rates": {"gemm": card.product, "copy": card.copy, "link": card.to_host},
        }
    rates = None if weight is None else cpu_rates(weight)
    return {"device": cpu_name(), "device_bytes": None, "rates": rates}


def cpu_rates(weight: NF4Weight) -> dict[str, float]:
    """FLOP/s of a product in fp32; bytes/s of an elementwise op, counted as if in bf16; weights decoded a second."""
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
    """The least of some runs, which others on this machine disturbed the least; for a twentieth of a second at most."""
    run()
    least, until = float("inf"), time.perf_counter() + 0.05
    while (began := time.perf_counter()) < until:
        run()
        least = min(least, time.perf_counter() - began)
    return least
