"""From a job and the device it is on to a plan: what the planner is told, and what is done with its answer.

On a GPU the budget is what the device has free, with what this process holds already, and the rates are measured on it
once a process. On a CPU there is no plan: the memory is the machine's, and what is recomputed is what was asked for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch

from graft import planner
from graft.planner import Budget, Card, ModelShape, Plan, PlanRefused, Work
from graft.recipe import Recipe
from graft_worker.base_model import BaseModel
from graft_worker.batches import ALIGNMENT, Batching, BatchMode
from graft_worker.decoder import KEEP_ALL, TENSORS, Decoder
from graft_worker.failures import TrainingFailure

# Of what a plan may fill, where what was planned did not fit after all: for the second attempt and the third.
BUDGET_SHARES = (1.0, 0.88, 0.75)


def default_batching(recipe: Recipe, lengths: Sequence[int], mode: BatchMode) -> Batching:
    """How steps are cut where no plan says so."""
    tokens = max(min(planner.CPU_TOKENS, recipe.micro_batch_tokens), max(lengths))
    return Batching(mode=mode, token_budget=-(-tokens // ALIGNMENT) * ALIGNMENT)


def make_plan(base: BaseModel, recipe: Recipe, work: Work, share: float = 1.0) -> Plan:
    """The fastest plan that fits the device, or a share of what is usable of it.

    Raises:
        TrainingFailure: out_of_memory, with what is needed and what would make it fit.
    """
    shape = ModelShape.from_config(base.model.config.to_dict())
    free, _ = torch.cuda.mem_get_info(base.device)
    there_is = free + torch.cuda.memory_reserved(base.device)
    device = planner.usable_bytes(there_is, share)
    budget = Budget(device=device, host=_host_bytes() // 2)
    try:
        return planner.plan_for(recipe, shape, work, budget, card=measured_card(base.device))
    except PlanRefused as refused:
        raise TrainingFailure("out_of_memory", str(refused), needs_bytes=refused.needed) from refused


def follow(decoder: Decoder, plan: Plan, recipe: Recipe) -> None:
    """Let the decoder do as the plan says."""
    decoder.head_chunk_rows = plan.head_chunk_rows
    layers = plan.layers if recipe.gradient_checkpointing else [KEEP_ALL] * len(plan.layers)
    decoder.follow(
        layers,
        resident_layers=plan.resident_layers,
        graph_tokens=planner.GRAPH_TOKENS,
        embedding_on_host=plan.embedding == "host",
        head_on_host=plan.head == "host",
    )
    if decoder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(decoder.device)  # what is measured from here on is what was planned


def follow_without_plan(decoder: Decoder, recipe: Recipe) -> None:
    """On a CPU: everything is kept, or each layer's input only."""
    least = {**dict.fromkeys(TENSORS, "recompute"), "x": "keep"}
    layer = least if recipe.gradient_checkpointing else KEEP_ALL
    decoder.follow([layer] * len(decoder.layers))  # type: ignore[list-item]


def batching_of(plan: Plan, mode: BatchMode) -> Batching:
    """How steps are cut, as the plan of a job's first start says."""
    return Batching(mode=mode, token_budget=-(-plan.micro_batch_tokens // ALIGNMENT) * ALIGNMENT)


# What a product keeps up within a step, of what it reaches in a short burst: 668 of 688 TFLOP/s on an H100.
_LASTING = 0.97


@functools.cache
def measured_card(device: torch.device) -> Card:
    """The rates of the device: products of a decoder's shape, copies on it, and copies to and from the host. 0.3 s."""
    a = torch.randn(8192, 4096, dtype=torch.bfloat16, device=device)
    b = torch.randn(4096, 8192, dtype=torch.bfloat16, device=device)
    flops = 2 * 8192 * 4096 * 8192 / _seconds(lambda: a @ b, device)
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)
    pinned = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    link = pinned.numel() / _seconds(lambda: target[: 64 << 20].copy_(pinned, non_blocking=True), device)
    name = torch.cuda.get_device_name(device)
    return planner.H100.scaled(name, gemm=_LASTING * flops, copy=copy, link=link)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs."""
    times = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[4]


def _host_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        found = [line for line in file if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else 0
