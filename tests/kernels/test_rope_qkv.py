"""The rotation inside the buffer [q | k | v | S] and LoRA's products on its way, against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from graft_kernels import rope_qkv as module
from graft_kernels.launch import INTERPRETED
from graft_kernels.rope import rope_backward, rope_forward, rope_reference, rope_table
from graft_kernels.rope_qkv import rope_qkv_backward, rope_qkv_forward_, rope_qkv_reference

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# (T, heads, kv heads, D, R, ranks, p)
SHAPES = [
    (1, 2, 1, 64, 64, (1, 3, 48), 64),
    (17, 4, 2, 16, 16, (3, 3, 3), 16),
    (5, 5, 1, 128, 128, (16, 16, 16), 64),
    (3, 3, 3, 80, 80, (8, 0, 8), 16),
    (5, 2, 2, 96, 96, (0, 4, 0), 32),
    (3, 2, 1, 256, 256, (16, 1, 7), 32),
    (3, 6, 2, 64, 40, (5, 16, 2), 32),
    (9, 2, 2, 16, 2, (1, 1, 1), 16),
    (4, 2, 1, 32, 32, (150, 1, 2), 160),
]


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What an 8B model runs, and one case of every other path: to be compiled without a card, on meta tensors."""

    def run(
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_dim: int,
        rotary: int,
        rank: int,
        p: int,
        *,
        tokens: int = 16384,
        positions: bool = True,
    ) -> object:
        new = partial(torch.empty, dtype=dtype, device="meta")
        n, k = heads
        width = (n + 2 * k) * head_dim
        tables = (new(131072, rotary // 2, dtype=torch.float32),) * 2
        at = new(tokens, dtype=torch.int32) if positions else None
        common: dict[str, Any] = {"sequence": 2048}
        if rank > 0:
            common |= {"b": new(3 * rank, width), "ranks": (rank, rank, rank)}
        parts = rope_qkv_forward_(new(tokens, width + p), n, k, head_dim, *tables, at, **common)
        return rope_qkv_backward(*parts, *tables, at, p=p, **common)

    bf16 = torch.bfloat16
    for rank in (16, 64):
        for tokens in (2048, 16384):
            yield (
                f"bf16 32:8 128, rank {rank}, {tokens}",
                partial(run, bf16, (32, 8), 128, 128, rank, 4 * rank, tokens=tokens),
            )
    yield "bf16 32:8 128", partial(run, bf16, (32, 8), 128, 128, 0, 0)
    yield "bf16 32:8 128, rank 128", partial(run, bf16, (32, 8), 128, 128, 128, 384)
    yield "bf16 24:8 128, partial", partial(run, bf16, (24, 8), 128, 96, 16, 64)
    yield "bf16 32:32 80, no positions", partial(run, bf16, (32, 32), 80, 80, 16, 48, positions=False)
    yield "bf16 16:8 256, rank 16", partial(run, bf16, (16, 8), 256, 256, 16, 64)
    yield "bf16 16:8 256, rank 64", partial(run, bf16, (16, 8), 256, 256, 64, 192)
    yield "bf16 16:8 256, rank 128", partial(run, bf16, (16, 8), 256, 256, 128, 384)
    yield "fp16 32:8 64", partial(run, torch.float16, (32, 8), 64, 64, 16, 64)
    yield "fp32 32:8 128", partial(run, torch.float32, (32, 8), 128, 128, 16, 64)
    yield "fp32 16:8 256", partial(run, torch.float32, (16, 8), 256, 256, 16, 64)


def error(result: Tensor, oracle: Tensor) -> float:
    result, oracle = result.detach().double(), oracle.detach().double()
    return float((result - oracle).norm() / oracle.norm())


class QKV:
    """The buffer [q | k | v | S] of a product in the rows form, and b, block-diagonal as it is made there."""

    def __init__(self, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
        self.tokens, self.heads, self.kv_heads, self.d, self.rotary, self.ranks, self.p = shape
        self.sizes = (self.heads * self.d, self.kv_heads * self.d, self.kv_heads * self.d)
        self.width, rank = sum(self.sizes), sum(self.ranks)
        # Wider than it has to be, as a slice of something else; what is beyond S is not for anyone to read.
        self.whole = torch.randn(self.tokens, self.width + self.p + 16, dtype=dtype)
        self.qkv = self.whole[:, : self.width + self.p]
        self.qkv[:, self.width + rank :] = float("nan")
        blocks = [torch.randn(r, n) / max(1, r) ** 0.5 for r, n in zip(self.ranks, self.sizes, strict=True)]
        self.b = torch.block_diag(*blocks).to(dtype)
        self.cos, self.sin = rope_table(self.rotary, 50)
        self.positions = torch.randint(0, 50, (self.tokens,))
        self.rank = rank

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return rope_qkv_forward_(self.qkv, self.heads, self.kv_heads, self.d, self.cos, self.sin, *args, **options)

    def parts(self, rows: Tensor) -> list[Tensor]:
        return [x.unflatten(1, (-1, self.d)) for x in rows[:, : self.width].split(self.sizes, dim=1)]

    def gradients(self, dtype: torch.dtype) -> list[Tensor]:
        """As attention's backward gives them: heads outside the tokens, padded rows, contiguous."""
        t, h, k, d = self.tokens, self.heads, self.kv_heads, self.d
        return [
            torch.randn(h, t, d, dtype=dtype).transpose(0, 1),
            torch.randn(t, k * d + 8, dtype=dtype)[:, : k * d].view(t, k, d),
            torch.randn(t, k, d, dtype=dtype),
        ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pending_update_is_added_before_the_rotation(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    before = case.whole.clone()
    s, wide = case.qkv[:, case.width : case.width + case.rank].double(), case.qkv.double()
    q, k, v = case.parts(wide[:, : case.width] + s @ case.b.double())
    oracle = (*rope_reference(q, k, case.cos, case.sin, case.positions), v)
    results = case.forward(case.positions, b=case.b, ranks=case.ranks)
    for result, expected, inside in zip(results, oracle, case.parts(case.qkv), strict=True):
        assert result.dtype == dtype
        assert result.shape == expected.shape
        assert torch.equal(result, inside)
        assert result.data_ptr() == inside.data_ptr()
        assert error(result, expected) < TOLERANCE[dtype]
    assert torch.equal(case.whole[:, case.width :].isnan(), before[:, case.width :].isnan())
    assert torch.equal(case.whole[:, case.width :].nan_to_num(), before[:, case.width :].nan_to_num())
    if case.ranks[2] == 0:
        assert torch.equal(results[2], case.parts(before)[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:8])
def test_without_an_update_the_fused_output_is_rotated_in_place(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    before = case.whole.clone()
    q, k, v = case.parts(before)
    expected = rope_forward(q, k, case.cos, case.sin, sequence=4)
    results = case.forward(sequence=4)
    for a, b in zip(results, (*expected, v), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(case.whole[:, case.width :].nan_to_num(), before[:, case.width :].nan_to_num())
    assert results[0].data_ptr() == case.whole.data_ptr()


@pytest.mark.parametrize("block_diagonal", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_backward_is_the_definitions_gradient_of_the_buffer(dtype: torch.dtype, block_diagonal: bool) -> None:
    torch.manual_seed(0)
    case = QKV((5, 4, 2, 16, 12, (2, 3, 4), 16), dtype)
    b = case.b if block_diagonal else torch.randn_like(case.b)
    options: dict[str, Any] = {"ranks": case.ranks if block_diagonal else None}
    gradients = case.gradients(dtype)
    buffer = case.qkv[:, : case.width + case.rank].double().requires_grad_()
    sizes = (case.heads, case.kv_heads, case.d)
    results = rope_qkv_reference(buffer, *sizes, case.cos, case.sin, case.positions, b=b.double(), **options)
    (expected,) = torch.autograd.grad(results, buffer, [x.double() for x in gradients])
    for a, oracle in zip(case.forward(case.positions, b=b, **options), results, strict=True):
        assert a.dtype == dtype
        assert error(a, oracle) < TOLERANCE[dtype]
    merged = rope_qkv_backward(*gradients, case.cos, case.sin, case.positions, b=b, **options)
    assert error(merged[:, : case.width + case.rank], expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_gradient_and_its_tail_match_the_oracle(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    dq, dk, dv = case.gradients(dtype)
    q, k = (x.double().requires_grad_() for x in (dq, dk))
    turned = rope_reference(q, k, case.cos, case.sin, case.positions)
    oracle = [*torch.autograd.grad(turned, (q, k), (dq.double(), dk.double())), dv.double()]
    whole = torch.full_like(case.whole, 7.0)
    out = whole[:, : case.width + case.p]
    common: dict[str, Any] = {"b": case.b, "ranks": case.ranks}
    result = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, case.positions, out=out, **common)
    assert result is out
    for part, expected in zip(case.parts(out), oracle, strict=True):
        assert error(part, expected) < TOLERANCE[dtype]
    assert torch.equal(case.parts(out)[2], dv)
    tail = out[:, case.width : case.width + case.rank]
    assert error(tail, out[:, : case.width].double() @ case.b.double().t()) < TOLERANCE[dtype]
    assert not out[:, case.width + case.rank :].any()
    assert (whole[:, case.width + case.p :] == 7.0).all()
    fresh = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, case.positions, p=case.p, **common)
    assert torch.equal(fresh, out)
    smallest = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, case.positions, **common)
    assert smallest.shape[1] == case.width + -(-case.rank // 16) * 16
    assert torch.equal(smallest, out[:, : smallest.shape[1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:8])
def test_without_a_tail_merging_is_rope_backward_and_cat(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    dq, dk, dv = case.gradients(dtype)
    at = case.positions.int() if case.heads % 2 else None
    separate = rope_backward(dq, dk, case.cos, case.sin, at, sequence=4)
    expected = torch.cat([x.flatten(1) for x in (*separate, dv)], dim=1)
    merged = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, at, sequence=4)
    assert torch.equal(merged, expected)
    padded = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, at, sequence=4, p=24)
    assert torch.equal(padded, torch.cat((expected, torch.zeros(case.tokens, 24, dtype=dtype)), dim=1))
    # The tail beside it changes nothing.
    tailed = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, at, sequence=4, b=case.b, ranks=case.ranks)
    assert torch.equal(tailed[:, : case.width], expected)


def test_the_tail_is_of_the_gradient_as_it_is_stored() -> None:
    torch.manual_seed(0)
    case = QKV((200, 2, 1, 16, 16, (3, 3, 3), 16), torch.float16)
    tailed = rope_qkv_backward(
        *case.gradients(torch.float16), case.cos, case.sin, sequence=50, b=case.b, ranks=case.ranks
    )
    # One rounding of fp16, 2.1e-4; of the gradient before its rounding it would be two, 2.9e-4.
    oracle = tailed[:, : case.width].double() @ case.b.double().t()
    assert error(tailed[:, case.width : case.width + 6], oracle[:, :6]) < 2.4e-4


@pytest.mark.parametrize("tile", [(16, 2, 2, 4, 2), (32, 4, 4, 8, 1), (16, 3, 1, 4, 3), (16, 99, 8, 8, 2)])
def test_every_division_of_the_work_gives_the_same(tile: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case = QKV((19, 5, 2, 32, 24, (3, 17, 1), 32), torch.float16)
    wide, gradients = QKV((19, 5, 2, 32, 24, (3, 17, 1), 32), torch.float16), case.gradients(torch.float16)
    wide.qkv.copy_(case.qkv)
    common: dict[str, Any] = {"b": case.b, "ranks": case.ranks}
    expected = wide.forward(case.positions, **common)
    merged = rope_qkv_backward(*gradients, case.cos, case.sin, **common)
    for name in ("_forward_tile", "_backward_tile"):
        monkeypatch.setattr(module, name, lambda *args: module._Tile(*tile))
    for a, b in zip(case.forward(case.positions, **common), expected, strict=True):
        assert error(a, b) < 5e-4
    tiled = rope_qkv_backward(*gradients, case.cos, case.sin, **common)
    assert torch.equal(tiled[:, : case.width], merged[:, : case.width])
    assert error(tiled, merged) < 5e-4
    assert torch.equal(rope_qkv_backward(*gradients, case.cos, case.sin), merged[:, : case.width])


def test_without_ranks_any_row_of_b_may_reach_anything() -> None:
    torch.manual_seed(0)
    case = QKV((7, 4, 2, 16, 16, (2, 3, 4), 16), torch.float32)
    dense = torch.randn_like(case.b)
    s, wide = case.qkv[:, case.width : case.width + 9].double(), case.qkv.double()
    q, k, v = case.parts(wide[:, : case.width] + s @ dense.double())
    oracle = (*rope_reference(q, k, case.cos, case.sin), v)
    for result, expected in zip(case.forward(b=dense), oracle, strict=True):
        assert error(result, expected) < 2e-6
    gradients = case.gradients(torch.float32)
    merged = rope_qkv_backward(*gradients, case.cos, case.sin, b=dense, p=16)
    assert torch.equal(merged[:, : case.width], rope_qkv_backward(*gradients, case.cos, case.sin))
    assert error(merged[:, case.width : case.width + 9], merged[:, : case.width].double() @ dense.double().t()) < 2e-6
    assert not merged[:, case.width + 9 :].any()


def test_a_row_with_nan_spoils_its_own_tail_alone() -> None:
    torch.manual_seed(0)
    case = QKV((18, 3, 1, 16, 12, (2, 1, 3), 16), torch.float32)
    gradients = case.gradients(torch.float32)
    case.positions[4] = 50
    gradients[2][7] = float("inf")
    merged = rope_qkv_backward(
        *gradients, case.cos, case.sin, case.positions, b=case.b, ranks=case.ranks, out=torch.ones_like(case.qkv)
    )
    tail = merged[:, case.width :]
    assert tail[4, :3].isnan().all()
    assert tail[4, 3:6].isfinite().all()
    assert tail[7, :3].isfinite().all()
    assert not tail[7, 3:6].isfinite().any()
    assert not tail[:, 6:].any()
    others = torch.arange(18)
    others = others[(others != 4) & (others != 7)]
    assert merged[others].isfinite().all()


def test_zero_tokens_of_a_fused_output_are_zero_tokens() -> None:
    case = QKV((0, 4, 2, 16, 16, (2, 3, 4), 16), torch.float32)
    for options in ({}, {"b": case.b}, {"b": case.b, "ranks": case.ranks}):
        assert [x.shape for x in case.forward(**options)] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
        merged = rope_qkv_backward(*case.gradients(torch.float32), case.cos, case.sin, p=16, **options)
        assert merged.shape == (0, case.width + 16)


def test_a_fused_output_that_does_not_fit_is_refused() -> None:
    case = QKV((4, 4, 2, 16, 16, (2, 3, 4), 16), torch.float32)
    cos, sin, qkv, b = case.cos, case.sin, case.qkv, case.b
    dq, dk, dv = (x.contiguous() for x in case.gradients(torch.float32))

    def forward(rows: Tensor = qkv, **options: Any) -> object:
        return rope_qkv_forward_(rows, 4, 2, 16, cos, sin, **options)

    def backward(dv: Tensor = dv, **options: Any) -> object:
        return rope_qkv_backward(dq, dk, dv, cos, sin, **options)

    for call, message in (
        (lambda: forward(qkv[:, :100]), r"at least \(4 \+ 2·2\)·16"),
        (lambda: forward(qkv[None]), "qkv has shape"),
        (lambda: forward(qkv.t().contiguous().t()), "contiguous rows"),
        (lambda: forward(qkv[:1].expand(4, -1)), "that do not overlap"),
        (lambda: forward(qkv[:, : case.width + 8], b=b), "8 columns beside q, k and v; b has 9 rows"),
        (lambda: forward(b=b.half()), r"expected torch.float32 \(r, 128\)"),
        (lambda: forward(b=b[:, 1:]), r"expected torch.float32 \(r, 128\)"),
        (lambda: forward(b=b[:0]), r"expected torch.float32 \(r, 128\)"),
        (lambda: forward(b=b, ranks=(2, 3, 5)), "three that make 9"),
        (lambda: forward(b=b, ranks=(9, 3, -3)), "three that make 9"),
        (lambda: forward(b=b, ranks=(5, 4)), "three that make 9"),
        (lambda: forward(ranks=(2, 3, 4)), "there is no b"),
        (lambda: forward(positions_T=torch.arange(3)), r"int64 \(4,\)"),
        (lambda: rope_qkv_forward_(qkv, 4, 2, 16, cos[:3], sin[:3]), "sequences of 4 tokens"),
        (lambda: backward(dv[:, :1]), "expected the same"),
        (lambda: backward(dv.half()), "expected the same"),
        (lambda: backward(b=b, ranks=(9, 0)), "three that make 9"),
        (lambda: backward(b=b, p=8), "p is 8, but b has 9 rows"),
        (lambda: backward(out=qkv[:, :100]), "p is -28"),
        (lambda: backward(out=qkv, p=32), "out is"),
        (lambda: backward(out=qkv.half()), "out is"),
        (lambda: backward(out=qkv.t().contiguous().t()), "out has strides"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
