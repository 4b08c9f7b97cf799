"""Every token is learnt once an epoch, wherever its row lies in a micro-batch, and no row sees another."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from graft.supervision import Limits
from graft_kernels.attention import attention
from graft_kernels.cross_entropy import linear_cross_entropy
from graft_kernels.rope import rope, rope_table
from graft_worker.batches import (
    ALIGNMENT,
    Batching,
    MicroBatch,
    compose,
    compose_padded,
    epoch_order,
    pack,
    pad,
    rows_of_step,
)
from graft_worker.data import IGNORED, Row, encode_file

from .tiny import conversation

PAD, VOCABULARY = 7, 96
quick = settings(max_examples=150, deadline=None, database=None)
some_lengths = st.lists(st.integers(1, 60), max_size=40)


def chat_lengths(count: int, seed: int) -> list[int]:
    """Log-normal with median 250, cut at 2048: what conversations look like."""
    rng = random.Random(seed)
    return [max(8, min(2048, round(rng.lognormvariate(math.log(250), 0.9)))) for _ in range(count)]


def make_rows(lengths: Sequence[int], seed: int = 0) -> list[Row]:
    """Rows as the encoder makes them, with every second token learnt or so; the last has no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for line, length in enumerate(lengths, start=1):
        input_ids = torch.randint(VOCABULARY, (length,), dtype=torch.int32, generator=generator)
        labels = torch.full_like(input_ids, IGNORED)
        learnt = torch.rand(length - 1, generator=generator) < 0.5
        labels[:-1] = torch.where(learnt, input_ids[1:], IGNORED)
        rows.append(Row(line, input_ids, labels, int(learnt.sum())))
    return rows


def documents(batch: MicroBatch) -> list[slice]:
    """Where in the T tokens the documents lie: of a pack all of them, padding included; of a dense batch its rows."""
    if batch.cu_seqlens is not None:
        bounds = batch.cu_seqlens.tolist()
    else:
        bounds = list(range(0, len(batch.input_ids) + 1, batch.shape[1]))
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


# Order ----------------------------------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    torch.manual_seed(123)
    assert epoch_order(50, 1, 0) == orders[0]


def test_every_row_comes_once_an_epoch() -> None:
    rows = make_rows([5] * 10)
    order = epoch_order(10, 3, 0)
    steps = [rows_of_step(rows, order, step, 4) for step in range(3)]
    assert [len(step) for step in steps] == [4, 4, 2]
    assert [row.line for step in steps for row in step] == [index + 1 for index in order]


# Composition ----------------------------------------------------------------------------------------------------------


def best_fit_by_search(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The rule, word by word: each row, the longest first, into the fullest micro-batch that has room."""
    batches: list[list[int]] = []
    used: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [number for number, tokens in enumerate(used) if tokens + lengths[index] <= budget]
        if fitting:
            number = max(fitting, key=lambda n: (used[n], -n))
        else:
            number = len(batches)
            batches.append([])
            used.append(0)
        batches[number].append(index)
        used[number] += lengths[index]
    return sorted(sorted(batch) for batch in batches)


@quick
@given(lengths=some_lengths, budget=st.integers(1, 100))
def test_composition_is_best_fit_and_holds_every_row_once(lengths: list[int], budget: int) -> None:
    batches = compose(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert [list(batch) for batch in batches] == best_fit_by_search(lengths, budget)
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= budget
    # No two of them would have fitted into one.
    tokens = sorted(sum(lengths[index] for index in batch) for batch in batches)
    assert len(tokens) < 2 or tokens[0] + tokens[1] > budget


@quick
@given(lengths=some_lengths, budget=st.integers(1, 100), alignment=st.sampled_from([1, 4, 16]))
def test_padded_composition_counts_the_padding(lengths: list[int], budget: int, alignment: int) -> None:
    batches = compose_padded(lengths, budget, alignment)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert list(batches) == sorted(batches)
    for batch in batches:
        longest = math.ceil(max(lengths[index] for index in batch) / alignment) * alignment
        assert list(batch) == sorted(batch)
        assert len(batch) == 1 or len(batch) * longest <= budget


def test_a_row_above_the_budget_is_alone() -> None:
    assert compose([5, 200, 5, 100, 101], 100) == ((0, 2), (1,), (3,), (4,))
    assert compose_padded([5, 200, 5, 100, 101], 100) == ((0, 2), (1,), (3,), (4,))
    batching = Batching(mode="packed", token_budget=128, alignment=32)
    sizes = [len(batch.input_ids) for batch in batching.micro_batches(make_rows([5, 200, 5, 100]), PAD)]
    assert sizes == [128, 224]
    assert batching.largest(200) == 224
    assert batching.largest(100) == 128


def test_chat_data_fills_its_micro_batches() -> None:
    for count, least in ((256, 0.95), (10_000, 0.99)):
        lengths = chat_lengths(count, seed=1)
        batches = compose(lengths, 8192)
        fill = sum(lengths) / (len(batches) * 8192)
        print(f"{count} rows: {len(batches)} micro-batches of 8192, {fill:.4f} full")
        assert fill >= least
    # A step is too small to fill its last one, but it has as few as there can be, and hardly any padding.
    fewest = taken = tokens = computed = 0
    for step in range(64):
        lengths = chat_lengths(16, seed=step)
        batches = compose(lengths, 8192)
        fewest, taken = fewest + math.ceil(sum(lengths) / 8192), taken + len(batches)
        tokens += sum(lengths)
        computed += sum(math.ceil(sum(lengths[i] for i in batch) / ALIGNMENT) * ALIGNMENT for batch in batches)
    print(f"64 steps of 16 rows: {taken} micro-batches, {fewest} at least; padding {1 - tokens / computed:.4f}")
    assert taken <= 1.02 * fewest
    assert tokens >= 0.99 * computed


def test_composing_a_large_epoch_takes_no_time_to_speak_of() -> None:
    lengths = chat_lengths(100_000, seed=2)
    started = time.process_time()
    compose(lengths, 8192)
    seconds = time.process_time() - started
    print(f"100,000 rows composed in {seconds:.2f} s")
    assert seconds < 5  # measured: 0.3


COMPOSITION = (
    "import hashlib, random; from graft_worker.batches import compose, compose_padded; rng = random.Random(7);"
    "lengths = [rng.randint(1, 700) for _ in range(2000)];"
    "found = (compose(lengths, 2048), compose_padded(lengths, 2048, 64));"
    "digest = hashlib.sha256(repr(found).encode()).hexdigest()"
)


def test_composition_is_the_same_in_every_process_and_version() -> None:
    # A job composed by this version may be resumed by a later one: the rule is part of the checkpoint's format.
    expected = "551a92e0d7af5166f72727251c58139840733d9b0e1455f9152e5ca2a083b029"
    here: dict[str, Any] = {}
    exec(COMPOSITION, here)
    assert here["digest"] == expected
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    there = subprocess.run(
        [sys.executable, "-c", COMPOSITION + "; print(digest)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert there.stdout.strip() == expected


def test_batching_survives_json_and_refuses_what_it_cannot_do() -> None:
    batching = Batching(mode="packed", token_budget=8192)
    assert Batching(**json.loads(json.dumps(dataclasses.asdict(batching)))) == batching
    refused: list[tuple[dict[str, Any], str]] = [
        ({"mode": "loose", "token_budget": 64}, "mode is 'loose'"),
        ({"mode": "packed", "token_budget": 100}, "multiple of the alignment 64"),
        ({"mode": "packed", "token_budget": 0}, "token budget is 0"),
        ({"mode": "padded", "token_budget": 64, "alignment": 0}, "alignment 0"),
    ]
    for fields, message in refused:
        with pytest.raises(ValueError, match=message):
            Batching(**fields)
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        compose([3, 0], 10)
    with pytest.raises(ValueError, match="token budget is 0"):
        compose([3], 0)
    assert list(batching.micro_batches([], PAD)) == []


# Tensors --------------------------------------------------------------------------------------------------------------


@quick
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    alignment=st.sampled_from([1, 8, 64]),
    budget=st.integers(1, 3),
    mode=st.sampled_from(["packed", "padded"]),
    seed=st.integers(0, 9),
)
def test_every_token_and_label_is_there_once_and_nothing_else(
    lengths: list[int], alignment: int, budget: int, mode: Any, seed: int
) -> None:
    rows = make_rows(lengths, seed)
    batching = Batching(mode=mode, token_budget=64 * budget, alignment=alignment)
    batches = list(batching.micro_batches(rows, PAD))
    met: list[int] = []
    for batch, indices in zip(batches, batching.compose(lengths), strict=True):
        size = math.prod(batch.shape)
        assert batch.input_ids.shape == batch.labels.shape == batch.positions.shape == (size,)
        assert (batch.input_ids.dtype, batch.labels.dtype, batch.positions.dtype) == (
            torch.int64,
            torch.int64,
            torch.int32,
        )
        assert size <= batching.largest(max(lengths))
        assert batch.shape[-1] % alignment == 0
        spans = documents(batch)
        if batch.cu_seqlens is not None:
            assert batch.cu_seqlens.dtype == torch.int32
            assert batch.max_seqlen == max(span.stop - span.start for span in spans)
            assert batch.shape == (size,)
            assert (spans[0].start, spans[-1].stop) == (0, size)
            assert len(spans) - len(indices) == (size > batch.num_tokens)  # one more where there is padding
            assert size - batch.num_tokens < alignment
        else:
            assert batch.max_seqlen is None
            assert len(spans) == len(indices)
        covered = torch.zeros(size, dtype=torch.bool)
        for index, span in zip(indices, spans, strict=False):
            row = rows[index]
            place = slice(span.start, span.start + len(row.input_ids))
            assert torch.equal(batch.input_ids[place].int(), row.input_ids)
            assert torch.equal(batch.labels[place].int(), row.labels)
            assert batch.positions[place].tolist() == list(range(len(row.input_ids)))
            covered[place] = True
        padding = ~covered
        assert (batch.input_ids[padding] == PAD).all()
        assert (batch.labels[padding] == IGNORED).all()
        assert (batch.positions[padding] == 0).all()
        assert batch.num_tokens == int(covered.sum())
        assert batch.num_trained == int((batch.labels != IGNORED).sum())
        met += indices
    assert sorted(met) == list(range(len(rows)))
    assert sum(batch.num_trained for batch in batches) == sum(row.num_trained for row in rows)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_no_label_crosses_into_the_next_conversation(
    mode: Any, tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl([conversation(index) for index in range(12)])
    # Everything is learnt, so that a label that crossed would show.
    some_are_cut = Limits(max_without_end=1)
    rows = encode_file(path, tokenizer, max_seq_length=40, train_on_inputs=True, limits=some_are_cut).rows
    for batch in Batching(mode=mode, token_budget=256).micro_batches(rows, PAD):
        found = []
        for span in documents(batch):
            input_ids, labels = batch.input_ids[span], batch.labels[span]
            places = (labels != IGNORED).nonzero().view(-1)
            assert len(places) == 0 or places[-1] + 1 < len(input_ids)
            assert torch.equal(labels[places], input_ids[places + 1])
            found.append(len(places))
        assert sum(found) == batch.num_trained == batch.num_tokens - sum(map(bool, found))


def test_an_evaluation_is_cut_by_the_same_rule_as_a_step() -> None:
    rows = make_rows(chat_lengths(60, seed=3))
    for mode in ("packed", "padded"):
        batching = Batching(mode=mode, token_budget=4096)
        first, second = (list(batching.micro_batches(rows, PAD)) for _ in range(2))
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
        assert sum(batch.num_trained for batch in first) == sum(row.num_trained for row in rows)


def test_a_dense_batch_has_the_mask_that_transformers_wants() -> None:
    batch = pad(make_rows([3, 1, 8]), 4, PAD)
    assert batch.shape == (3, 8)
    assert batch.attention_mask.tolist() == [[1] * length + [0] * (8 - length) for length in (3, 1, 8)]
    with pytest.raises(ValueError, match="packed"):
        _ = pack(make_rows([3]), 4, PAD).attention_mask


def test_a_micro_batch_moves_with_all_it_holds(device: str) -> None:
    for collate in (pack, pad):
        batch = collate(make_rows([5, 9, 3]), 8, PAD)
        moved = batch.to(torch.device(device))
        for field in dataclasses.fields(MicroBatch):
            ours, theirs = getattr(batch, field.name), getattr(moved, field.name)
            if field.name == "host_ids":
                assert torch.equal(theirs, batch.input_ids)
            elif isinstance(ours, Tensor):
                assert theirs.device.type == torch.device(device).type
                assert torch.equal(ours, theirs.cpu())
            else:
                assert ours == theirs


# A model --------------------------------------------------------------------------------------------------------------


class TinyModel:
    """One attention layer and a head, in fp32, run on micro-batches by the kernels' own calls."""

    HEADS, KEY_HEADS, SIZE = 4, 2, 16

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        width = (self.HEADS + 2 * self.KEY_HEADS) * self.SIZE
        self.embedding, self.qkv, self.head = (
            (torch.randn(*shape, generator=generator) / 8).to(device).requires_grad_()
            for shape in ((VOCABULARY, 64), (width, 64), (VOCABULARY, 64))
        )
        self.tables = rope_table(self.SIZE, 64, theta=100.0, device=device)
        self.device = torch.device(device)

    def embedded(self, batch: MicroBatch) -> Tensor:
        """[T, H] before attention."""
        return self.embedding[batch.input_ids.to(self.device)]

    def hidden(self, batch: MicroBatch, x: Tensor) -> Tensor:
        """[T, H] before the head."""
        batch = batch.to(self.device)
        q, k, v = (
            part.unflatten(-1, (-1, self.SIZE))
            for part in (x @ self.qkv.T).split([heads * self.SIZE for heads in (4, 2, 2)], dim=-1)
        )
        q, k = rope(q, k, *self.tables, batch.positions)
        heads = (part.reshape(*batch.shape, *part.shape[1:]) for part in (q, k, v))
        out = attention(*heads, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        return x + out.reshape(x.shape)

    def losses(self, batch: MicroBatch, x: Tensor) -> Tensor:
        """[T], 0 where there is no label."""
        labels = batch.labels.to(self.device)
        return F.cross_entropy(self.hidden(batch, x) @ self.head.T, labels, ignore_index=IGNORED, reduction="none")

    def step(self, batches: Sequence[MicroBatch]) -> tuple[float, list[Tensor]]:
        """(loss, gradients of all weights), normalised by the trained tokens of all `batches`."""
        num_trained = sum(batch.num_trained for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            total = total + self.losses(batch, self.embedded(batch)).sum() / num_trained
        gradients = torch.autograd.grad(total, (self.embedding, self.qkv, self.head))
        return float(total.detach()), list(gradients)


LENGTHS = [13, 40, 2, 27, 33, 8, 1, 19]


def test_packed_padded_and_one_by_one_teach_the_same(device: str) -> None:
    model, rows = TinyModel(device), make_rows(LENGTHS)
    alone = [pack([row], 1, PAD) for row in rows]
    loss, gradients = model.step(alone)
    assert loss > 1
    for batching in (
        Batching(mode="packed", token_budget=64),
        Batching(mode="packed", token_budget=48, alignment=16),
        Batching(mode="packed", token_budget=1024, alignment=1),
        Batching(mode="padded", token_budget=128, alignment=32),
    ):
        found, theirs = model.step(list(batching.micro_batches(rows, PAD)))
        errors = [
            float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a))
            for a, b in zip(gradients, theirs, strict=True)
        ]
        print(f"{batching}: loss off by {abs(found / loss - 1):.1e}, gradients by {max(errors):.1e}")
        assert abs(found / loss - 1) <= 1e-6
        assert max(errors) <= 2e-6


def test_a_document_in_a_pack_is_computed_as_it_is_alone(device: str) -> None:
    model, rows = TinyModel(device), make_rows(LENGTHS)
    with torch.no_grad():
        batch = pack(rows, 64, PAD)
        together = model.hidden(batch, model.embedded(batch))
        for row, span in zip(rows, documents(batch), strict=False):
            single = pack([row], 1, PAD)
            alone = model.hidden(single, model.embedded(single))
            error = torch.linalg.vector_norm(together[span] - alone) / torch.linalg.vector_norm(alone)
            assert error <= 1e-6


@pytest.mark.parametrize("collate", [pack, pad])
def test_changing_one_document_changes_no_bit_of_another(collate: Callable[..., MicroBatch], device: str) -> None:
    model, rows = TinyModel(device), make_rows(LENGTHS)
    changed = [make_rows(LENGTHS[:1], seed=5)[0], *rows[1:]]
    results = []
    for batch in (collate(rows, 64, PAD), collate(changed, 64, PAD)):
        x = model.embedded(batch).detach().requires_grad_()
        losses = model.losses(batch, x)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), x)))
    one, *others = documents(batch)
    for before, after in zip(*results, strict=True):
        assert not torch.equal(before[one], after[one])
        for span, row in zip(others, rows[1:], strict=False):
            assert torch.equal(before[span], after[span])
            assert bool(before[span].any()) == bool(row.num_trained)


def test_padding_teaches_nothing(device: str) -> None:
    model, rows = TinyModel(device), make_rows(LENGTHS)
    for collate in (pack, pad):
        results = [model.step([collate(rows, 64, token)]) for token in (PAD, 11)]
        assert results[0][0] == results[1][0]
        for a, b in zip(results[0][1], results[1][1], strict=True):
            assert torch.equal(a, b)


def test_the_counted_labels_are_those_the_loss_counts() -> None:
    batch = pack(make_rows(LENGTHS), 64, PAD)
    hidden, head = torch.randn(len(batch.labels), 16), torch.randn(VOCABULARY, 16)
    linear_cross_entropy(hidden, head, batch.labels, num_valid=batch.num_trained)
    with pytest.raises(ValueError, match="num_valid"):
        linear_cross_entropy(hidden, head, batch.labels, num_valid=batch.num_trained + 1)


def test_positions_stay_within_a_context_that_is_no_multiple_of_the_alignment() -> None:
    for collate in (pack, pad):
        assert int(collate(make_rows([50, 37]), 64, PAD).positions.max()) == 49
