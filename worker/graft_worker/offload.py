"""Tensors on their way to host memory and back, beside the computation.

One stream copies out, one copies in; both directions together cost a GEMM that runs meanwhile nothing that could be
measured. Memory on the host is pinned, taken at the first use of a name and used again ever after. Nothing here waits
on the host: the streams wait for each other. So a run that offloads can be recorded as a CUDA graph: each copy becomes
a branch that leaves the computation's stream and comes back to it.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from graft_kernels import cross_entropy

Key = tuple[int, str]
# How many tensors may be on their way out before the computation waits for the first: each holds memory on the device.
_ON_THE_WAY = 2


class _Sent(NamedTuple):
    buffers: tuple[Tensor | None, ...]
    like: tuple[Tensor | None, ...]  # shapes and dtypes, on the meta device


class HostStore:
    """Groups of tensors by key. On a device that is no GPU the copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._pinned: dict[tuple[Key, int], Tensor] = {}
        self._sent: dict[Key, _Sent] = {}
        self._back: dict[Key, tuple[tuple[Tensor | None, ...], torch.cuda.Event | None]] = {}
        self._on_the_way: deque[tuple[torch.cuda.Event, tuple[Tensor | None, ...]]] = deque()
        self._outgrown: list[Tensor] = []  # a graph that was recorded with them writes to them still
        if self._cuda:
            self._out = torch.cuda.Stream(device)
            self._in = torch.cuda.Stream(device)

    @property
    def nbytes(self) -> int:
        """Host memory that is held."""
        return sum(part.nbytes for part in self._pinned.values())

    def forget(self) -> None:
        """Let go of what is on its way or has arrived, after a run that did not come to its end."""
        self._on_the_way.clear()
        self._sent.clear()
        self._back.clear()

    def send(self, key: Key, tensors: tuple[Tensor | None, ...]) -> None:
        """Copy `tensors` out. The caller lets go of them; they live until the copy is done."""
        buffers = tuple(None if part is None else self._host_buffer((key, i), part) for i, part in enumerate(tensors))
        like = tuple(None if part is None else torch.empty_like(part, device="meta") for part in tensors)
        self._sent[key] = _Sent(buffers, like)
        if not self._cuda:
            _copy(tensors, buffers)
            return
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            _copy(tensors, buffers)
        event = torch.cuda.Event()
        event.record(self._out)
        self._on_the_way.append((event, tensors))
        while len(self._on_the_way) > _ON_THE_WAY:
            self._let_go()

    def turn(self) -> None:
        """Nothing more is sent: let the computation wait for what is on its way, and its memory go."""
        while self._on_the_way:
            self._let_go()

    def _let_go(self) -> None:
        # The memory goes back to the computation's stream, which must not write to it before the copy has read it.
        event, _ = self._on_the_way.popleft()
        torch.cuda.current_stream(self._device).wait_event(event)

    def fetch(self, key: Key) -> None:
        """Begin to copy back what was sent under `key`, if anything was."""
        sent = self._sent.pop(key, None)
        if sent is None:
            return
        tensors = tuple(
            None
            if part is None
            else torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=self._device)
            for part in sent.like
        )
        if not self._cuda:
            _copy(sent.buffers, tensors)
            self._back[key] = tensors, None
            return
        # The new memory may still be in use by what the computation was told to do before.
        self._in.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._in):
            _copy(sent.buffers, tensors)
        event = torch.cuda.Event()
        event.record(self._in)
        self._back[key] = tensors, event

    def take(self, key: Key) -> tuple[Tensor, ...] | None:
        """What `fetch` brought, once; None if nothing was sent."""
        found = self._back.pop(key, None)
        if found is None:
            return None
        tensors, event = found
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return tensors  # type: ignore[return-value]

    def slabs_of(self, matrix: Tensor) -> HostSlabs:
        """A matrix that lies on the host (pinned, for a GPU), to be read in slabs."""
        return HostSlabs(matrix, self._device, self._in if self._cuda else None)

    def _host_buffer(self, place: tuple[Key, int], like: Tensor) -> Tensor:
        held = self._pinned.get(place)
        size = like.untyped_storage().nbytes() if not like.is_contiguous() else like.nbytes
        if held is None or held.nbytes < like.nbytes:
            if held is not None:
                self._outgrown.append(held)
            held = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
            self._pinned[place] = held
        return held[: like.nbytes].view(like.dtype).view(like.shape)


class HostSlabs:
    """`graft_kernels.cross_entropy.Slabs` of a matrix on the host: two buffers, one in use while the other is filled.

    The buffers are the computation's memory, and go back to it with this object: make one for each pass.
    """

    def __init__(self, matrix_VH: Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.shape = matrix_VH.shape
        self._parts = matrix_VH.split(cross_entropy.SLAB_ROWS)
        self._device, self._stream = device, stream
        self._buffers: list[Tensor] = []
        self._holds: list[int | None] = [None, None]
        self._last = 1  # the buffer that was used last

    def slab(self, index: int, then: int | None) -> Tensor:
        """Slab `index`, on the device; `then` is being brought meanwhile."""
        if not self._buffers:
            size = (2 if len(self._parts) > 1 else 1, *self._parts[0].shape)
            self._buffers = list(torch.empty(size, dtype=self._parts[0].dtype, device=self._device))
        place = self._holds.index(index) if index in self._holds else self._fetch(index, 1 - self._last)
        self._last = place
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if then is not None and then not in self._holds:
            self._fetch(then, 1 - place)
        return self._buffers[place][: len(self._parts[index])]

    def _fetch(self, index: int, place: int) -> int:
        place = place % len(self._buffers)
        target = self._buffers[place][: len(self._parts[index])]
        if self._stream is None:
            target.copy_(self._parts[index])
        else:
            # What the computation has been told to do so far may still read the buffer.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                target.copy_(self._parts[index], non_blocking=True)
        self._holds[place] = index
        return place


def _copy(sources: tuple[Tensor | None, ...], targets: tuple[Tensor | None, ...]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source is not None and target is not None:
            target.copy_(source, non_blocking=True)
