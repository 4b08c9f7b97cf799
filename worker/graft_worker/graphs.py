"""Micro-batches replayed as CUDA graphs: for few tokens the host's launches cost more than the computation.

A shape that is met for the first time is run as it is, which builds all its kernels; the second time its launches are
recorded, and from then on replayed on the memory of that recording, into which the batch is copied. The same kernels
run on the same operands, so the bits are the same. All graphs share one pool of memory, since they run in turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from graft_worker.batches import MicroBatch

# Each graph costs half a second once, some memory for its launches, and none for its tensors beyond the largest's.
_MOST_GRAPHS = 32
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

    Everything else that `run` reads must stay where it is: weights, adapters, gradients.
    """

    def __init__(self, run: Callable[[MicroBatch, Tensor], Losses], most_tokens: int) -> None:
        self._run = run
        self._most_tokens = most_tokens
        self._recorded: OrderedDict[tuple[object, ...], _Recorded | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: MicroBatch, x: Tensor) -> Losses:
        if batch.labels.shape[0] > self._most_tokens:
            return self._run(batch, x)
        batch = _rounded(batch)
        key = (batch.shape, batch.max_seqlen, batch.head_rows, *(_size(part) for part in _tensors(batch)))
        if key not in self._recorded:
            self._recorded[key] = None
            return self._run(batch, x)
        recorded = self._recorded[key] or self._record(batch, x)
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

    def _record(self, batch: MicroBatch, x: Tensor) -> _Recorded:
        own = replace(
            batch,
            input_ids=batch.input_ids.clone(),
            labels=batch.labels.clone(),
            positions=batch.positions.clone(),
            cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.clone(),
        )
        own_x = x.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            losses = self._run(own, own_x)
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
