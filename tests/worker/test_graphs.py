"""What is replayed, what is not, and what happens where memory is short. A card's recording is stood in for by a list
of calls: which kernels it holds is CUDA's business, and is tested with the decoder on a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graft_worker.batches import MicroBatch, pack
from graft_worker.data import IGNORED, Row
from graft_worker.graphs import Graphs, Losses


class Card:
    """torch.cuda as `Graphs` uses it, with so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total, self.reserved, self.allocated, self.most = 1000, 100, 100, 300
        self.refuses: Exception | None = None
        self.recording = False
        card = self

        class CUDAGraph:
            def __init__(self) -> None:
                self.replays = 0

            def replay(self) -> None:
                self.replays += 1

        class Graph:
            def __init__(self, graph: CUDAGraph, pool: Any) -> None:
                pass

            def __enter__(self) -> None:
                card.recording = True
                card.reserved += 200

            def __exit__(self, *_: Any) -> None:
                card.recording = False
                if card.refuses is not None:
                    raise card.refuses

        for name, stand_in in (
            ("CUDAGraph", CUDAGraph),
            ("graph", Graph),
            ("graph_pool_handle", object),
            ("empty_cache", lambda: None),
            ("memory_reserved", lambda _: card.reserved),
            ("memory_allocated", lambda _: card.allocated),
            ("max_memory_allocated", lambda _: card.most),
            ("mem_get_info", lambda _: (card.total - card.reserved, card.total)),
            ("get_per_process_memory_fraction", lambda _: 1.0),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def batch_of(tokens: int) -> MicroBatch:
    ids = torch.arange(tokens).int()
    return pack([Row(1, ids, torch.full_like(ids, IGNORED), 0)], 8, 0)


def counted(card: Card, forgotten: list[int], most_tokens: int = 64) -> tuple[Graphs, list[str], Callable[[int], Any]]:
    calls: list[str] = []

    def run(batch: MicroBatch, x: torch.Tensor) -> Losses:
        calls.append("recorded" if card.recording else "run")
        return Losses(x.sum(), torch.zeros(()))

    graphs = Graphs(run, most_tokens, lambda: forgotten.append(1))
    return graphs, calls, lambda tokens: graphs(batch_of(tokens), torch.ones(tokens, 2))


def test_a_shape_is_run_then_recorded_then_replayed(card: Card) -> None:
    _, calls, step = counted(card, [])
    for _ in range(4):
        step(16)
    assert calls == ["run", "recorded"]
    step(32)
    assert calls == ["run", "recorded", "run"]
    for _ in range(2):
        step(128)  # too long
    assert calls[3:] == ["run", "run"]


def test_what_cannot_be_recorded_is_run_each_time_and_said(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    forgotten: list[int] = []
    _, calls, step = counted(card, forgotten)
    card.refuses = RuntimeError("operation not permitted when stream is capturing")
    for _ in range(4):
        step(16)
    assert calls == ["run", "recorded", "run", "run", "run"]
    assert forgotten == [1]
    assert "could not be recorded" in caplog.text


def test_memory_that_ends_while_recording_is_no_reason_to_go_on(card: Card) -> None:
    _, _, step = counted(card, [])
    card.refuses = torch.OutOfMemoryError("CUDA out of memory.")
    step(16)
    with pytest.raises(torch.OutOfMemoryError):
        step(16)


def test_recordings_are_given_up_where_a_new_shape_may_not_fit_beside_them(card: Card) -> None:
    graphs, calls, step = counted(card, [])
    for _ in range(2):
        step(16)
    step(24)  # 200 more than now were once in use, and 700 are free
    assert any(graphs._recorded.values())
    card.total = 400  # 100 are free
    step(32)
    assert not any(graphs._recorded.values())
    # Recorded again; and after the fourth time not any more.
    for tokens in (40, 48, 56):
        card.total, card.reserved = 10_000, 100
        step(tokens)
        step(tokens)
        assert any(graphs._recorded.values())
        card.total = card.reserved + 100
        step(tokens - 24)
        assert not any(graphs._recorded.values())
    calls.clear()
    card.total = 10_000
    for _ in range(3):
        step(16)
    assert calls == ["run", "run", "run"]
