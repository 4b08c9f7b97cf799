"""Micro-batches replayed as CUDA graphs: for few tokens the host's launches cost more than the computation.

A shape that is met for the first time is run as it is, which builds all its kernels; the second time its launches are
recorded, and from then on replayed on the memory of that recording, into which the batch is copied. The same kernels
run on the same operands, so the bits are the same. All graphs share one pool of memory, since they run in turn.

What is not replayed needs memory beside that pool. Where there is none for a new shape, the recordings are given up
before it is run, and after a few times recording altogether: slower, and never out of memory for a graph's sake.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from graft_worker.batches import MicroBatch

log = logging.getLogger(__name__)

# Each graph costs half a second once, some memory for its launches, and none for its tensors beyond the largest's.
_MOST_GRAPHS = 32
# So often the recordings are given up for want of memory before there are no more.
_MOST_RETREATS = 4
# cu_seqlens of a pack is filled with empty documents to a multiple of this, its longest rounded up to that.
_DOCUMENTS, _LONGEST = 16, 256


class Losses(NamedTuple):
    """Of one micro-batch, on its device and not waited for: the sum of the token losses (fp32), and how many of the
    labels were the likeliest token (int64)."""

    loss: Tensor
    num_correct: Tensor


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: MicroBatch
    x: Tensor
    losses: Losses


class Graphs:
    """`run` on a batch and its embedded tokens x [T, H], for up to `most_tokens`, with as little of the host as can be.

    Everything else that `run` reads must stay where it is: weights, adapters, gradients. `forget` undoes what a
    recording that failed has left behind.
    """

    def __init__(
        self, run: Callable[[MicroBatch, Tensor], Losses], most_tokens: int, forget: Callable[[], None]
    ) -> None:
        self._run = run
        self._most_tokens = most_tokens
        self._forget = forget
        self._retreats = 0
        self._pool_bytes = 0
        self._recorded: OrderedDict[tuple[object, ...], _Recorded | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: MicroBatch, x: Tensor) -> Losses:
        if batch.labels.shape[0] > self._most_tokens:
            self._make_room(x.device)
            return self._run(batch, x)
        batch = _rounded(batch)
        key = (batch.shape, batch.max_seqlen, batch.head_rows, *(_size(part) for part in _tensors(batch)))
        if key not in self._recorded:
            self._make_room(x.device)
            self._recorded[key] = None
            return self._run(batch, x)
        recorded = self._recorded[key] or self._record(batch, x)
        if recorded is None:
            return self._run(batch, x)
        self._recorded[key] = recorded
        self._recorded.move_to_end(key)
        while len(self._recorded) > _MOST_GRAPHS:
            self._recorded.popitem(last=False)
        for source, target in zip(_tensors(batch), _tensors(recorded.batch), strict=True):
            if source is not None and target is not None:
                target.copy_(source, non_blocking=True)
        recorded.x.copy_(x)
        recorded.graph.replay()
        return Losses(*(part.clone() for part in recorded.losses))

    def _make_room(self, device: torch.device) -> None:
        """Before a run beside the recordings: give them up if that may not fit."""
        if not any(self._recorded.values()):
            return
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        idle = max(0, reserved - allocated - self._pool_bytes)
        # At most so much more than now was ever in use, by a larger batch or by this one.
        if torch.cuda.max_memory_allocated(device) - allocated <= min(free, share * total - reserved) + idle:
            return
        self._retreats += 1
        self._recorded.clear()
        self._pool_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()
        if self._retreats == _MOST_RETREATS:
            log.info("memory is too short for CUDA graphs of changing shapes; steps are no longer recorded")
            self._most_tokens = 0

    def _record(self, batch: MicroBatch, x: Tensor) -> _Recorded | None:
        own = replace(
            batch,
            input_ids=batch.input_ids.clone(),
            labels=batch.labels.clone(),
            positions=batch.positions.clone(),
            cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.clone(),
        )
        own_x = x.clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(x.device)
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                losses = self._run(own, own_x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Nothing has been computed yet: a recording only notes what is to be done.
            log.warning("a step could not be recorded as a CUDA graph and is launched each time: %s", error)
            self._most_tokens = 0
            self._recorded.clear()
            self._forget()
            return None
        self._pool_bytes += max(0, torch.cuda.memory_reserved(x.device) - before)
        return _Recorded(graph, own, own_x, losses)


def _tensors(batch: MicroBatch) -> tuple[Tensor | None, ...]:
    return batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens


def _size(part: Tensor | None) -> int:
    return 0 if part is None else part.numel()


def _rounded(batch: MicroBatch) -> MicroBatch:
    """A pack as one of few shapes: empty documents at its end, and a longest document that is a round number."""
    if batch.cu_seqlens is None or batch.max_seqlen is None:
        return batch
    more = -batch.cu_seqlens.numel() % _DOCUMENTS
    last = batch.cu_seqlens[-1:].expand(more)
    longest = min(batch.labels.shape[0], -(-batch.max_seqlen // _LONGEST) * _LONGEST)
    return replace(batch, cu_seqlens=torch.cat((batch.cu_seqlens, last)), max_seqlen=longest)
