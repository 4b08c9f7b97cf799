"""Sums over tokens against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from graft_kernels.adapter_grads import MOST_COLUMNS, sum_over_tokens, sum_over_tokens_reference
from graft_kernels.launch import INTERPRETED

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
NORMED = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What an 8B model runs: dB of q, k and v, of o, of gate and up; dA of a normed input and of a plain one."""

    def run(dtype: torch.dtype, sizes: list[tuple[int, int]], transposed: bool = False, normed: bool = False) -> None:
        new = partial(torch.empty, device="meta")
        columns, ranks = sum(n for n, _ in sizes), sum(r for _, r in sizes)
        outs = [new(*((r, n) if transposed else (n, r))) for n, r in sizes]
        norm = (new(8192), new(columns, dtype=dtype), False) if normed else None
        x, d = new(8192, columns + 64, dtype=dtype)[:, :columns], new(8192, ranks + 16, dtype=dtype)
        sum_over_tokens(outs, x, d, add=True, factor=2.0, transposed=transposed, norm=norm)

    bf16 = torch.bfloat16
    yield "dB of q, k, v", partial(run, bf16, [(4096, 16), (1024, 16), (1024, 16)])
    yield "dB of q, k, v, rank 64", partial(run, bf16, [(4096, 64), (1024, 64), (1024, 64)])
    yield "dB of gate, up", partial(run, bf16, [(14336, 16), (14336, 16)])
    yield "dB of o", partial(run, bf16, [(4096, 16)])
    yield "dA of q, k, v", partial(run, bf16, [(4096, 48)], True, True)
    yield "dA of down", partial(run, bf16, [(14336, 16)], True)
    yield "fp32 dA of gate, up", partial(run, torch.float32, [(4096, 32)], True, True)


def error(result: Tensor, oracle: Tensor) -> float:
    return ((result.double() - oracle.double()).norm() / oracle.double().norm()).item()


def operands(tokens: int, columns: int, ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slices of wider buffers."""
    x, d = torch.randn(tokens, columns + 8).to(dtype), torch.randn(tokens, ranks + 16).to(dtype)
    return x[:, :columns], d[:, 8 : 8 + ranks]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (1, [(1, 1)]),
        (5, [(40, 16), (8, 3), (17, 1)]),
        (130, [(33, 48)]),
        (260, [(64, 16), (64, 16)]),
        (70, [(20, 0), (30, 8)]),
        (40, [(24, MOST_COLUMNS + 1)]),
    ],
)
def test_products_side_by_side_match_the_oracle(
    tokens: int, sizes: list[tuple[int, int]], dtype: torch.dtype, add: bool
) -> None:
    x, d = operands(tokens, sum(n for n, _ in sizes), sum(r for _, r in sizes), dtype)
    outs = [torch.randn(n, r) for n, r in sizes]
    before = [out.clone() if add else torch.zeros_like(out) for out in outs]
    sum_over_tokens(outs, x, d, add=add, factor=0.5)
    n = r = 0
    for out, old, (columns, rank) in zip(outs, before, sizes, strict=True):
        oracle = sum_over_tokens_reference(x[:, n : n + columns].double(), d[:, r : r + rank].double(), 0.5)
        n, r = n + columns, r + rank
        if rank > 0:
            assert error(out, oracle + old) < TOLERANCE[dtype]


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns", "rank"), [(1, 16, 1), (37, 100, 48), (129, 40, 3), (9, 20, 200)])
def test_the_normed_sum_is_that_of_the_norms_output(
    tokens: int, columns: int, rank: int, dtype: torch.dtype, gemma: bool
) -> None:
    z, d = operands(tokens, columns, rank, dtype)
    rho, w = torch.rand(tokens) + 0.5, torch.randn(columns).to(dtype)
    out = torch.randn(rank, columns)
    old = out.clone()
    sum_over_tokens((out,), z, d, add=True, factor=2.0, transposed=True, norm=(rho, w, gemma))
    shown = w.double() + gemma
    oracle = 2.0 * d.double().t() @ (z.double() * rho.double()[:, None] * shown) + old.double()
    assert error(out, oracle) < NORMED[dtype]


def test_no_tokens_give_zeros_or_what_was_there() -> None:
    x, d = operands(0, 24, 4, torch.float32)
    out = torch.full((24, 4), torch.nan)
    sum_over_tokens((out,), x, d)
    assert not out.any()
    out.fill_(3.0)
    sum_over_tokens((out,), x, d, add=True)
    assert (out == 3.0).all()


def test_two_runs_agree_to_the_bit() -> None:
    x, d = operands(300, 48, 16, torch.float16)
    outs = [torch.empty(48, 16) for _ in range(2)]
    for out in outs:
        sum_over_tokens((out,), x, d)
    assert torch.equal(*outs)


def test_float64_stays_exact() -> None:
    x, d = (torch.randn(30, n, dtype=torch.float64) for n in (20, 6))
    out = torch.empty(6, 20, dtype=torch.float64)
    sum_over_tokens((out,), x, d, transposed=True)
    assert error(out, d.t() @ x) < 1e-15


def test_operands_that_do_not_fit_are_refused() -> None:
    x, d = operands(8, 24, 4, torch.float32)
    for outs, options in (
        ([torch.empty(20, 4)], {}),
        ([torch.empty(24, 5)], {}),
        ([torch.empty(24, 4)], {"transposed": True}),
    ):
        with pytest.raises(ValueError, match="the results are"):
            sum_over_tokens(outs, x, d, **options)
    with pytest.raises(ValueError, match="2 products, expected one"):
        sum_over_tokens([torch.empty(4, 12)] * 2, x, d, transposed=True)
    with pytest.raises(ValueError, match="4 products"):
        sum_over_tokens([torch.empty(6, 1)] * 4, x, d)
