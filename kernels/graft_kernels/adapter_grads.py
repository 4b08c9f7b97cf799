"""The gradients of LoRA's factors: tall matrices multiplied over their tokens, several products in one launch.

Shapes: T tokens; X [T, N] an output's gradient dY, or an input; D [T, R] of few columns, S or dS; ρ [T]; w [N].

    forward     G = f·Xᵀ D                  [N, R], or transposed [R, N]; with `add` it is added to what is there
    normed      G = f·w ∘ Xᵀ (ρ ∘ D)        for X = z of an RMS norm and y = z·ρ∘w its output: this is f·yᵀ D

    dB_i = s·dY_iᵀ S_i      of up to three layers side by side in dY, their S side by side in S: one launch
    dA   = dSᵀ x            of all of them, one above the other

The library splits such products over the tokens, for want of other parallelism, and adds the parts in a second launch.
Here a program walks all tokens for a few columns of X, which it reads once; the sum over the tokens is formed in one
order, in fp32, and is the same from run to run. D is rounded once more after ρ, to X's dtype, as the operand of a
product. There is no backward: these are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft_kernels.launch import cdiv, launch, next_power_of_2, runs_kernels, tl, triton
from graft_kernels.operands import arithmetic_dtype

# The most columns of D that a program multiplies; beyond, the library's product has work enough.
MOST_COLUMNS = 64
# (columns of X, tokens at a time, warps, stages) of a program, by bytes per element; twice the warps for more than 32
# columns of D, whose sums fill the registers otherwise. The best of a sweep on an H100.
_TILE = {2: (64, 128, 4, 4), 4: (32, 32, 4, 2)}


def sum_over_tokens_reference(
    x_TN: Tensor, d_TR: Tensor, factor: float = 1.0, rho_T: Tensor | None = None, w_N: Tensor | None = None
) -> Tensor:
    """The definition of correct: G [N, R] in fp32 (fp64 for fp64 operands)."""
    wide = arithmetic_dtype(x_TN.dtype)
    d = d_TR if rho_T is None else (d_TR.to(wide) * rho_T[:, None]).to(x_TN.dtype)
    g_NR = x_TN.to(wide).t() @ d.to(wide) * factor
    return g_NR if w_N is None else g_NR * w_N.to(wide)[:, None]


@triton.jit(do_not_specialize=["programs0", "programs1"])
def _sum_over_tokens_kernel(  # type: ignore[no-untyped-def]
    x, d, rho, w, out0, out1, out2, T, N0, N1, N2, programs0, programs1, x_stride, d_stride,
    out_n0, out_n1, out_n2, out_r, factor, w_shift,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, NORMED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One to three products side by side: the columns N_i of x go with the columns R_i of d."""
    program = tl.program_id(0)
    if program < programs0:
        first, size, x_first, d_first, rank, out, out_n = program, N0, 0, 0, R0, out0, out_n0
    elif program < programs0 + programs1:
        first, size, x_first, d_first, rank, out, out_n = program - programs0, N1, N0, R0, R1, out1, out_n1
    else:
        first, size, x_first, d_first, rank, out, out_n = (
            program - programs0 - programs1, N2, N0 + N1, R0 + R1, R2, out2, out_n2
        )  # fmt: skip
    n = first * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    n_ok, r_ok = n < size, r < rank
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in tl.range(0, T, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        t_64 = t.to(tl.int64)[:, None]
        x_tile = tl.load(
            x + t_64 * x_stride + x_first + n[None, :], mask=(t < T)[:, None] & n_ok[None, :], other=0.0
        )  # fmt: skip
        d_tile = tl.load(
            d + t_64 * d_stride + d_first + r[None, :], mask=(t < T)[:, None] & r_ok[None, :], other=0.0
        )  # fmt: skip
        if NORMED:
            scale = tl.load(rho + t, mask=t < T, other=0.0)[:, None]
            d_tile = (d_tile.to(tl.float32) * scale).to(x_tile.dtype)
        total = tl.dot(tl.trans(x_tile), d_tile, total, input_precision="ieee")
    total = total * factor
    if NORMED:
        total = total * (tl.load(w + n, mask=n_ok, other=0.0).to(tl.float32) + w_shift)[:, None]
    at = out + n.to(tl.int64)[:, None] * out_n + r.to(tl.int64)[None, :] * out_r
    mask = n_ok[:, None] & r_ok[None, :]
    if ADD:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total, mask=mask)


def sum_over_tokens(
    outs: Sequence[Tensor],
    x_TN: Tensor,
    d_TR: Tensor,
    *,
    add: bool = False,
    factor: float = 1.0,
    transposed: bool = False,
    norm: tuple[Tensor, Tensor, bool] | None = None,
) -> None:
    """G of one to three products into `outs`, each [N_i, R_i] or, `transposed`, [R_i, N_i].

    Args:
        outs: contiguous, fp32 or x's dtype; the N_i are the columns of x one after another, the R_i those of d. A
            product that nobody wants has no R_i, and its place an empty tensor [N_i, 0].
        x_TN: [T, ΣN], any row stride.
        d_TR: [T, at least ΣR], any row stride, x's dtype.
        add: to what `outs` hold.
        factor: f.
        transposed: G is stored as [R, N]; for one product.
        norm: (ρ [T], w [N], whether w counts as 1 + w): the normed form, for one product.

    Raises:
        ValueError: shapes do not fit, or more than three products, or several where one is asked for.
    """
    sizes = [tuple(out.shape[::-1] if transposed else out.shape) for out in outs]
    columns, ranks = sum(n for n, _ in sizes), sum(r for _, r in sizes)
    if not 1 <= len(outs) <= 3 or (len(outs) > 1 and (transposed or norm is not None)):
        raise ValueError(f"{len(outs)} products, expected one, or up to three plain ones")
    if x_TN.shape[0] != d_TR.shape[0] or x_TN.shape[1] != columns or d_TR.shape[1] < ranks:
        raise ValueError(f"x is {tuple(x_TN.shape)} and d {tuple(d_TR.shape)}; the results are {sizes}")
    rho, w, gemma = (None, None, False) if norm is None else norm
    largest = max(r for _, r in sizes)
    fits = largest <= MOST_COLUMNS and x_TN.stride(1) == 1 and d_TR.stride(1) == 1
    fits = fits and all(out.dtype == torch.float32 and out.is_contiguous() for out in outs)
    if not (fits and runs_kernels(x_TN, d_TR, rho, w, *outs)):
        _by_the_library(outs, sizes, x_TN, d_TR, add, factor, transposed, norm)
        return
    block_n, block_t, num_warps, stages = _TILE[x_TN.element_size()]
    block_r = max(16, next_power_of_2(largest))
    padded = [*zip(outs, sizes, strict=True), *[(outs[0], (0, 0))] * (3 - len(outs))]
    programs = [cdiv(n, block_n) if r > 0 else 0 for _, (n, r) in padded]
    strides = [1 if transposed else r for _, (_, r) in padded]
    launch(
        _sum_over_tokens_kernel, (sum(programs),),
        x_TN, d_TR, rho, w, *(out for out, _ in padded), x_TN.shape[0], *(n for _, (n, _) in padded),
        programs[0], programs[1], x_TN.stride(0), d_TR.stride(0), *strides, sizes[0][0] if transposed else 1,
        factor, 1.0 if gemma else 0.0,
        **{f"R{i}": r for i, (_, (_, r)) in enumerate(padded)}, NORMED=norm is not None, ADD=add,
        BLOCK_N=block_n, BLOCK_T=block_t, BLOCK_R=block_r, STAGES=stages,
        num_warps=num_warps if block_r <= 32 else 2 * num_warps,
    )  # fmt: skip


def _by_the_library(
    outs: Sequence[Tensor],
    sizes: Sequence[tuple[int, ...]],
    x_TN: Tensor,
    d_TR: Tensor,
    add: bool,
    factor: float,
    transposed: bool,
    norm: tuple[Tensor, Tensor, bool] | None,
) -> None:
    """As the kernel, a product of the library for each."""
    n = r = 0
    if norm is not None:
        d_TR = (d_TR * norm[0][:, None]).to(x_TN.dtype)
    for out, (columns, rank) in zip(outs, sizes, strict=True):
        x, d = x_TN[:, n : n + columns], d_TR[:, r : r + rank]
        n, r = n + columns, r + rank
        if rank == 0:
            continue
        a, b = (d.t(), x) if transposed else (x.t(), d)
        if norm is None:
            _product_into(out, a, b, add, factor)
            continue
        made = torch.empty_like(out)
        _product_into(made, a, b, False, factor)
        w = norm[1].to(out.dtype) + (1.0 if norm[2] else 0.0)
        made *= w if transposed else w[:, None]
        out.copy_(out + made if add else made)


def _product_into(out: Tensor, a: Tensor, b: Tensor, add: bool, factor: float) -> None:
    """On a card the library writes fp32 from its fp32 accumulator, without rounding in between."""
    beta = 1 if add else 0
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.addmm(out, a, b, torch.float32, beta=beta, alpha=factor, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=factor, out=out)
