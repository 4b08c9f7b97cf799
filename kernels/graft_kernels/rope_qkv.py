"""RoPE of q and k where they lie, in rows [q | k | v], with the small products of LoRA's rows form done on the way.

Shapes: a buffer [T, N + p], N = (heads + 2·K)·D: q [T, heads, D], k and v [T, K, D] side by side, and p columns beside
them; cos, sin [P, R/2] fp32 for the P first positions; position m [T]. S [T, r] = x Aᵀ; b [r, N] = (s·B)ᵀ,
block-diagonal: the ranks of q are its first rows, then those of k, of v. `turn` rotates the first R <= D numbers of
every head of q and k, [a | b] of R/2 each, and leaves the rest and v (`rope.py` has the source):

    turn        a' = a·cos m - b·sin m               b' = b·cos m + a·sin m
    turn⁻¹      a = a'·cos m + b'·sin m              b = b'·cos m - a'·sin m

    before      x·[W ; A]ᵀ = [y0 | S]                one product leaves both in the buffer
    forward     [q | k | v] = turn(y0 + S b)         in place
    backward    dY = turn⁻¹([dq | dk | dv])
                dS = dY bᵀ                           of dY as stored; then zeros, to p columns
    after       dx = [dY | dS]·[W ; A]               one product, complete

This is the rows form of `lora_linear.py`: who turns y0 reads it next and can add the update; who writes dY can write dS
beside it. [dY | dS] is the gradient of the buffer, as autograd finds it from the reference. Everything is fp32 from the
load to the one rounding at the store. Kept for the backward: nothing but the positions and b.

The products are made inside the kernels up to the rank `FUSED_RANK`; beyond it the library is the better place, and the
launchers go there. There is no norm of the heads: its backward needs q and k from before it, and this works in place;
`rope_forward` has it. A position outside the table gives NaN in what is turned, never a read out of bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft_kernels.launch import cdiv, launch, next_power_of_2, runs_kernels, tl, triton
from graft_kernels.operands import arithmetic_dtype, check_writable, output
from graft_kernels.rope import check_operands, rope_backward, rope_forward, rope_reference, token_positions

# The largest rank of q, k or v that the kernels multiply themselves, by bytes per element; beyond it the library does.
# fp32 products run without tensor cores.
FUSED_RANK = {2: 128, 4: 16}


def rope_qkv_reference(
    qkv_TN: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    positions_T: Tensor | None = None,
    *,
    b: Tensor | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of correct, differentiable by autograd: (q, k, v), each [T, heads, D]."""
    sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    wide = qkv_TN.to(arithmetic_dtype(qkv_TN.dtype))
    y, s = wide[:, : sum(sizes)], wide[:, sum(sizes) :]
    parts = list(y.split(sizes, dim=1))
    if b is not None:
        for i, (columns, rows) in enumerate(_blocks(sizes, *_ranks_of(b, ranks))):
            parts[i] = parts[i] + s[:, rows] @ b[rows, columns].to(wide.dtype)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in parts)
    q, k = rope_reference(q, k, cos, sin, positions_T)
    return q.to(qkv_TN.dtype), k.to(qkv_TN.dtype), v.to(qkv_TN.dtype)


def _ranks_of(b: Tensor, ranks: Sequence[int] | None) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """How many rows of b belong to q, k and v, and the first of each. Without `ranks` all rows belong to all."""
    if ranks is None:
        return (b.shape[0],) * 3, (0, 0, 0)
    r_q, r_k, r_v = ranks
    return (r_q, r_k, r_v), (0, r_q, r_q + r_k)


def _blocks(
    sizes: tuple[int, int, int], ranks: tuple[int, int, int], firsts: tuple[int, int, int]
) -> list[tuple[slice, slice]]:
    """Of q, k and v: their columns, and their rows of b."""
    ends = itertools.accumulate(sizes)
    columns = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [(c, slice(first, first + rank)) for c, first, rank in zip(columns, firsts, ranks, strict=True)]


@triton.jit
def _tile_positions(positions_ptr, row, T, sequence, HAS_POSITIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + row, mask=row < T, other=0).to(tl.int64)
    else:
        position = (row % sequence).to(tl.int64)
    return position


@triton.jit
def _tile_angles(  # type: ignore[no-untyped-def]
    cos_ptr, sin_ptr, position, max_positions, first, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns of cos and sin from the first on, [1, tokens, BLOCK], the same for all heads."""
    col = first + tl.arange(0, BLOCK)
    inside = (position >= 0) & (position < max_positions)
    mask = inside[:, None] & (col < HALF)[None, :]
    at = position[:, None] * HALF + col[None, :]
    c = tl.load(cos_ptr + at, mask=mask, other=float("nan"))
    s = tl.load(sin_ptr + at, mask=mask, other=float("nan"))
    # The columns that fill the block up take part in the products.
    c = tl.where((col < HALF)[None, :], c, 0.0)
    s = tl.where((col < HALF)[None, :], s, 0.0)
    return c[None, :, :], s[None, :, :]


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    x_ptr, row_at, row_ok, head, head_stride, first, last, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns first..last of some heads of some tokens, [heads, tokens, BLOCK], zeros outside."""
    col = first + tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None, None] & row_ok[None, :, None] & (col < last)[None, None, :]
    at = row_at[None, :, None] + (head.to(tl.int64) * head_stride)[:, None, None] + col[None, None, :]
    return tl.load(x_ptr + at, mask=mask, other=0.0)


@triton.jit
def _store_tile(  # type: ignore[no-untyped-def]
    x_ptr, value, row_at, row_ok, head, first, last, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    col = first + tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None, None] & row_ok[None, :, None] & (col < last)[None, None, :]
    at = row_at[None, :, None] + (head * D)[:, None, None] + col[None, None, :]
    tl.store(x_ptr + at, value, mask=mask)


@triton.jit
def _load_pending(  # type: ignore[no-untyped-def]
    y_ptr, row_at, row_ok, s, b_ptr, head, first, last,
    HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y0 + S b of a tile, fp32."""
    y = _load_tile(y_ptr, row_at, row_ok, head, D, first, last, HEADS, BLOCK).to(tl.float32)
    if RANK > 0:
        r, col = tl.arange(0, BLOCK_R), first + tl.arange(0, BLOCK)
        mask = (head < HEADS)[:, None, None] & (r < RANK)[None, :, None] & (col < last)[None, None, :]
        at = (head * D)[:, None, None] + (r * N)[None, :, None] + col[None, None, :]
        b = tl.load(b_ptr + at, mask=mask, other=0.0)
        if GROUP == 1:
            update = tl.dot(s, tl.reshape(b, (BLOCK_R, BLOCK)), input_precision="ieee")
            y += tl.reshape(update, (1, BLOCK_M, BLOCK))
        else:
            # A product for each head: every warp has its own, where one product over them would have each read all.
            each = tl.broadcast_to(s[None, :, :], (GROUP, BLOCK_M, BLOCK_R))
            y += tl.dot(each, b, input_precision="ieee")
    return y


@triton.jit
def _forward_section(  # type: ignore[no-untyped-def]
    y_ptr, row_at, row_ok, s_ptr, b_ptr, cos_ptr, sin_ptr, position, max_positions, part,
    ROTATE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    PER: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PER heads of q, of k or of v, GROUP at a time."""
    begin, end = part * PER, tl.minimum(part * PER + PER, HEADS)
    r = tl.arange(0, BLOCK_R)
    pending = 0.0
    if RANK > 0:
        pending = tl.load(
            s_ptr + row_at[:, None] + r[None, :], mask=row_ok[:, None] & (r < RANK)[None, :], other=0.0
        )  # fmt: skip
    for first in tl.static_range(0, HALF, BLOCK_HALF):
        if ROTATE:
            c, s = _tile_angles(cos_ptr, sin_ptr, position, max_positions, first, HALF, BLOCK_HALF)
        for start in tl.range(begin, end, GROUP, num_stages=STAGES):
            head = start + tl.arange(0, GROUP)
            a = _load_pending(
                y_ptr, row_at, row_ok, pending, b_ptr, head, first, HALF,
                HEADS, D, N, RANK, BLOCK_R, BLOCK_HALF, BLOCK_M, GROUP,
            )  # fmt: skip
            b = _load_pending(
                y_ptr, row_at, row_ok, pending, b_ptr, head, HALF + first, 2 * HALF,
                HEADS, D, N, RANK, BLOCK_R, BLOCK_HALF, BLOCK_M, GROUP,
            )  # fmt: skip
            if ROTATE:
                turned_a = (a * c - b * s).to(y_ptr.dtype.element_ty)
                turned_b = (b * c + a * s).to(y_ptr.dtype.element_ty)
            else:
                turned_a = a.to(y_ptr.dtype.element_ty)
                turned_b = b.to(y_ptr.dtype.element_ty)
            _store_tile(y_ptr, turned_a, row_at, row_ok, head, first, HALF, HEADS, D, BLOCK_HALF)
            _store_tile(y_ptr, turned_b, row_at, row_ok, head, HALF + first, 2 * HALF, HEADS, D, BLOCK_HALF)
    if RANK > 0:
        for first in tl.static_range(2 * HALF, D, BLOCK_REST):
            for start in tl.range(begin, end, GROUP, num_stages=STAGES):
                head = start + tl.arange(0, GROUP)
                rest = _load_pending(
                    y_ptr, row_at, row_ok, pending, b_ptr, head, first, D,
                    HEADS, D, N, RANK, BLOCK_R, BLOCK_REST, BLOCK_M, GROUP,
                )  # fmt: skip
                rest = rest.to(y_ptr.dtype.element_ty)
                _store_tile(y_ptr, rest, row_at, row_ok, head, first, D, HEADS, D, BLOCK_REST)


@triton.jit
def _rope_qkv_forward_kernel(  # type: ignore[no-untyped-def]
    y_ptr, y_stride, b_ptr, cos_ptr, sin_ptr, positions_ptr, T, max_positions, sequence,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    Q_RANK: tl.constexpr, K_RANK: tl.constexpr, V_RANK: tl.constexpr, K_FIRST: tl.constexpr, V_FIRST: tl.constexpr,
    BLOCK_QR: tl.constexpr, BLOCK_KR: tl.constexpr, BLOCK_VR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    PER: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (Q_HEADS + 2 * K_HEADS) * D
    Q_PARTS: tl.constexpr = (Q_HEADS + PER - 1) // PER
    K_PARTS: tl.constexpr = (K_HEADS + PER - 1) // PER
    blocks = tl.cdiv(T, BLOCK_M)
    part = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_at = row.to(tl.int64) * y_stride
    row_ok = row < T
    position = _tile_positions(positions_ptr, row, T, sequence, HAS_POSITIONS)
    if part < Q_PARTS:
        _forward_section(
            y_ptr, row_at, row_ok, y_ptr + N, b_ptr, cos_ptr, sin_ptr, position, max_positions, part,
            True, Q_HEADS, D, N, HALF, Q_RANK, BLOCK_QR, BLOCK_M, BLOCK_HALF, BLOCK_REST, PER, GROUP, STAGES,
        )  # fmt: skip
    elif part < Q_PARTS + K_PARTS:
        _forward_section(
            y_ptr + Q_HEADS * D, row_at, row_ok, y_ptr + N + K_FIRST, b_ptr + K_FIRST * N + Q_HEADS * D,
            cos_ptr, sin_ptr, position, max_positions, part - Q_PARTS,
            True, K_HEADS, D, N, HALF, K_RANK, BLOCK_KR, BLOCK_M, BLOCK_HALF, BLOCK_REST, PER, GROUP, STAGES,
        )  # fmt: skip
    else:
        _forward_section(
            y_ptr + (Q_HEADS + K_HEADS) * D, row_at, row_ok, y_ptr + N + V_FIRST,
            b_ptr + V_FIRST * N + (Q_HEADS + K_HEADS) * D,
            cos_ptr, sin_ptr, position, max_positions, part - Q_PARTS - K_PARTS,
            False, K_HEADS, D, N, HALF, V_RANK, BLOCK_VR, BLOCK_M, BLOCK_HALF, BLOCK_REST, PER, GROUP, STAGES,
        )  # fmt: skip


@triton.jit
def _add_tail(  # type: ignore[no-untyped-def]
    product, tile, b_ptr, head, first, last,
    HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """product + tile·bᵀ, for a group of heads [heads, tokens, r], kept apart until the end."""
    r, col = tl.arange(0, BLOCK_R), first + tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None, None] & (col < last)[None, :, None] & (r < RANK)[None, None, :]
    at = (head * D)[:, None, None] + col[None, :, None] + (r * N)[None, None, :]
    b = tl.load(b_ptr + at, mask=mask, other=0.0)
    if GROUP == 1:
        product = tl.dot(
            tl.reshape(tile, (BLOCK_M, BLOCK)), tl.reshape(b, (BLOCK, BLOCK_R)), product, input_precision="ieee"
        )  # fmt: skip
    else:
        product = tl.dot(tile, b, product, input_precision="ieee")
    return product


@triton.jit
def _backward_section(  # type: ignore[no-untyped-def]
    dy_ptr, dy_stride, head_stride, out_ptr, tail_ptr, out_stride, row, row_ok, b_ptr,
    cos_ptr, sin_ptr, position, max_positions, part,
    ROTATE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    PER: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PER heads of dq, of dk or of dv, GROUP at a time; with a rank PER is all of them."""
    begin, end = part * PER, tl.minimum(part * PER + PER, HEADS)
    dy_at = row.to(tl.int64) * dy_stride
    out_at = row.to(tl.int64) * out_stride
    if GROUP == 1:
        product = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    else:
        product = tl.zeros((GROUP, BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in tl.static_range(0, HALF, BLOCK_HALF):
        if ROTATE:
            c, s = _tile_angles(cos_ptr, sin_ptr, position, max_positions, first, HALF, BLOCK_HALF)
        for start in tl.range(begin, end, GROUP, num_stages=STAGES):
            head = start + tl.arange(0, GROUP)
            a = _load_tile(dy_ptr, dy_at, row_ok, head, head_stride, first, HALF, HEADS, BLOCK_HALF)
            b = _load_tile(dy_ptr, dy_at, row_ok, head, head_stride, HALF + first, 2 * HALF, HEADS, BLOCK_HALF)
            if ROTATE:
                turned_a = a.to(tl.float32)
                turned_b = b.to(tl.float32)
                a = (turned_a * c + turned_b * s).to(out_ptr.dtype.element_ty)
                b = (turned_b * c - turned_a * s).to(out_ptr.dtype.element_ty)
            _store_tile(out_ptr, a, out_at, row_ok, head, first, HALF, HEADS, D, BLOCK_HALF)
            _store_tile(out_ptr, b, out_at, row_ok, head, HALF + first, 2 * HALF, HEADS, D, BLOCK_HALF)
            if RANK > 0:
                product = _add_tail(
                    product, a, b_ptr, head, first, HALF, HEADS, D, N, RANK, BLOCK_R, BLOCK_HALF, BLOCK_M, GROUP
                )  # fmt: skip
                product = _add_tail(
                    product, b, b_ptr, head, HALF + first, 2 * HALF,
                    HEADS, D, N, RANK, BLOCK_R, BLOCK_HALF, BLOCK_M, GROUP,
                )  # fmt: skip
    for first in tl.static_range(2 * HALF, D, BLOCK_REST):
        for start in tl.range(begin, end, GROUP, num_stages=STAGES):
            head = start + tl.arange(0, GROUP)
            rest = _load_tile(dy_ptr, dy_at, row_ok, head, head_stride, first, D, HEADS, BLOCK_REST)
            _store_tile(out_ptr, rest, out_at, row_ok, head, first, D, HEADS, D, BLOCK_REST)
            if RANK > 0:
                product = _add_tail(
                    product, rest, b_ptr, head, first, D, HEADS, D, N, RANK, BLOCK_R, BLOCK_REST, BLOCK_M, GROUP
                )  # fmt: skip
    if RANK > 0:
        if GROUP > 1:
            product = tl.sum(product, axis=0)
        r = tl.arange(0, BLOCK_R)
        at = out_at[:, None] + r[None, :]
        mask = row_ok[:, None] & (r < RANK)[None, :]
        tl.store(tail_ptr + at, product.to(tail_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_qkv_backward_kernel(  # type: ignore[no-untyped-def]
    dq_ptr, dq_stride, dq_head_stride, dk_ptr, dk_stride, dk_head_stride, dv_ptr, dv_stride, dv_head_stride,
    out_ptr, out_stride, b_ptr, cos_ptr, sin_ptr, positions_ptr, T, max_positions, sequence,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    Q_RANK: tl.constexpr, K_RANK: tl.constexpr, V_RANK: tl.constexpr, K_FIRST: tl.constexpr, V_FIRST: tl.constexpr,
    PAD_FIRST: tl.constexpr, PAD: tl.constexpr,
    BLOCK_QR: tl.constexpr, BLOCK_KR: tl.constexpr, BLOCK_VR: tl.constexpr, BLOCK_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    PER: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (Q_HEADS + 2 * K_HEADS) * D
    Q_PARTS: tl.constexpr = (Q_HEADS + PER - 1) // PER
    K_PARTS: tl.constexpr = (K_HEADS + PER - 1) // PER
    # Part by part, not block by block: the long ones, those of q, are begun first.
    blocks = tl.cdiv(T, BLOCK_M)
    part = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < T
    position = _tile_positions(positions_ptr, row, T, sequence, HAS_POSITIONS)
    if part < Q_PARTS:
        _backward_section(
            dq_ptr, dq_stride, dq_head_stride, out_ptr, out_ptr + N, out_stride, row, row_ok, b_ptr,
            cos_ptr, sin_ptr, position, max_positions, part,
            True, Q_HEADS, D, N, HALF, Q_RANK, BLOCK_QR, BLOCK_M, BLOCK_HALF, BLOCK_REST, PER, GROUP, STAGES,
        )  # fmt: skip
    elif part < Q_PARTS + K_PARTS:
        _backward_section(
            dk_ptr, dk_stride, dk_head_stride, out_ptr + Q_HEADS * D, out_ptr + N + K_FIRST, out_stride,
            row, row_ok, b_ptr + K_FIRST * N + Q_HEADS * D,
            cos_ptr, sin_ptr, position, max_positions, part - Q_PARTS,
            True, K_HEADS, D, N, HALF, K_RANK, BLOCK_KR, BLOCK_M, BLOCK_HALF, BLOCK_REST, PER, GROUP, STAGES,
        )  # fmt: skip
    else:
        _backward_section(
            dv_ptr, dv_stride, dv_head_stride, out_ptr + (Q_HEADS + K_HEADS) * D, out_ptr + N + V_FIRST, out_stride,
            row, row_ok, b_ptr + V_FIRST * N + (Q_HEADS + K_HEADS) * D,
            cos_ptr, sin_ptr, position, max_positions, part - Q_PARTS - K_PARTS,
            False, K_HEADS, D, N, HALF, V_RANK, BLOCK_VR, BLOCK_M, BLOCK_HALF, BLOCK_REST, PER, GROUP, STAGES,
        )  # fmt: skip
        if PAD > 0 and part == Q_PARTS + K_PARTS:
            pad = tl.arange(0, BLOCK_PAD)
            at = (row.to(tl.int64) * out_stride)[:, None] + (N + PAD_FIRST + pad)[None, :]
            zeros = tl.zeros((BLOCK_M, BLOCK_PAD), dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, zeros, mask=row_ok[:, None] & (pad < PAD)[None, :])


class _Tile(NamedTuple):
    """How the work is divided."""

    tokens: int  # of a program
    heads: int  # of a program; a program that writes a tail takes all of its section
    group: int  # heads in registers at once
    warps: int
    stages: int  # of the loop over the groups


def _forward_tile(rank: int, head_dim: int, itemsize: int) -> _Tile:
    """More tokens a program read b less often, fewer keep every multiprocessor busy."""
    if itemsize == 4:
        return _Tile(16, 4, 1, 4, 1)
    return _Tile(16 if rank <= 16 or head_dim > 128 else 32, 8, 1, 4, 2)


def _backward_tile(rank: int, itemsize: int) -> _Tile:
    """As many heads at once as there are warps: each warp multiplies a head of its own.

    One head of 64 tokens at a time is up to a third faster on an H100 for ranks above 16; other cards spill with it.
    """
    if itemsize == 4:
        return _Tile(16, 4, 1, 8, 2)
    if rank > 64:
        return _Tile(16, 8, 1, 4, 2)
    return _Tile(16, 8, 4, 4, 3 if 0 < rank <= 16 else 2)


def _launch_options(
    tile: _Tile,
    sections: tuple[int, int, int],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    ranks: tuple[int, int, int],
    firsts: tuple[int, int, int],
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and what the kernels are specialised by. `sections` is how many heads of q, k and v are gone over."""
    tokens, _, head_dim = q.shape
    half = cos.shape[1]
    block_half = min(64, max(16, next_power_of_2(half)))
    block_rest = min(64, max(16, next_power_of_2(max(1, head_dim - 2 * half))))
    # No more heads than there are.
    group = min(tile.group, next_power_of_2(max(sections)))
    heads = cdiv(min(tile.heads, max(sections)), group) * group
    # A tile with fewer than 8 numbers a thread would be loaded by several warps, while one of them may already store.
    smallest = block_half if head_dim == 2 * half else min(block_half, block_rest)
    options: dict[str, Any] = {
        "Q_HEADS": q.shape[1],
        "K_HEADS": k.shape[1],
        "D": head_dim,
        "HALF": half,
        "HAS_POSITIONS": positions is not None,
        "K_FIRST": firsts[1],
        "V_FIRST": firsts[2],
        "BLOCK_M": tile.tokens,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
        "PER": heads,
        "GROUP": group,
        "STAGES": tile.stages,
        "num_warps": max(1, min(tile.warps, group * tile.tokens * smallest // 256)),
    }
    for name, rank in zip("QKV", ranks, strict=True):
        options[f"{name}_RANK"] = rank
        options[f"BLOCK_{name}R"] = max(16, next_power_of_2(max(1, rank)))
    return (cdiv(tokens, tile.tokens) * sum(cdiv(n, heads) for n in sections),), options


def rope_qkv_forward_(
    qkv_TN: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    positions_T: Tensor | None = None,
    *,
    sequence: int | None = None,
    b: Tensor | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), [T, heads, D] views of the buffer, which is finished in place, without autograd.

    Args:
        qkv_TN: [T, N + p]: q, k and v side by side; with `b` the first r of the last p columns are S = x Aᵀ. Any row
            stride. Columns from N on are not written.
        num_heads: of q.
        num_kv_heads: of k, as many of v.
        head_dim: D.
        cos: as in `rope_forward`, like all about positions.
        sin: as in `rope_forward`.
        positions_T: as in `rope_forward`.
        sequence: as in `rope_forward`.
        b: [r, N], qkv's dtype, the scale within: S b is added to q, k and v before the rotation, all in fp32 up to the
            rank `FUSED_RANK`; beyond it the sum is rounded once more in between. Without b, v stays as it is.
        ranks: (r_q, r_k, r_v), r together, 0 where there is no adapter: which rows of b are whose. The rest of b is
            taken for zero. Missing: any row may reach anything.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the buffer cannot be written as it is.
    """
    sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    width = sum(sizes)
    if qkv_TN.dim() != 2 or min(num_heads, num_kv_heads, head_dim) < 1 or qkv_TN.shape[1] < width:
        raise ValueError(
            f"qkv has shape {tuple(qkv_TN.shape)}, expected [T, at least ({num_heads} + 2·{num_kv_heads})·{head_dim}]"
        )
    check_writable("qkv", qkv_TN)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in qkv_TN[:, :width].split(sizes, dim=1))
    positions, sequence = check_operands(q, k, cos, sin, positions_T, sequence)
    _check_ranks(b, ranks, width, q.dtype)
    if b is None:
        rope_forward(q, k, cos, sin, positions, sequence=sequence, out=(q, k))
        return q, k, v
    if qkv_TN.shape[1] < width + b.shape[0]:
        raise ValueError(f"qkv has {qkv_TN.shape[1] - width} columns beside q, k and v; b has {b.shape[0]} rows")
    ranks_3, firsts = _ranks_of(b, ranks)
    tables = (cos.contiguous(), sin.contiguous())
    if not runs_kernels(qkv_TN, b, *tables, positions):
        at = token_positions(positions, sequence, q)
        results = rope_qkv_reference(qkv_TN, num_heads, num_kv_heads, head_dim, cos, sin, at, b=b, ranks=ranks)
        return q.copy_(results[0]), k.copy_(results[1]), v.copy_(results[2])
    if max(ranks_3) > FUSED_RANK[qkv_TN.element_size()]:
        for columns, rows in _blocks(sizes, ranks_3, firsts):
            if rows.start < rows.stop:
                qkv_TN[:, columns].addmm_(qkv_TN[:, width:][:, rows], b[rows, columns])
        rope_forward(q, k, cos, sin, positions, sequence=sequence, out=(q, k))
        return q, k, v
    tile = _forward_tile(max(ranks_3), head_dim, q.element_size())
    sections = (num_heads, num_kv_heads, num_kv_heads if ranks_3[2] > 0 else 0)
    grid, options = _launch_options(tile, sections, q, k, cos, positions, ranks_3, firsts)
    launch(
        _rope_qkv_forward_kernel, grid,
        qkv_TN, qkv_TN.stride(0), b.contiguous(), *tables, positions, q.shape[0], cos.shape[0], sequence, **options,
    )  # fmt: skip
    return q, k, v


def rope_qkv_backward(
    dq_TND: Tensor,
    dk_TKD: Tensor,
    dv_TKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_T: Tensor | None = None,
    *,
    sequence: int | None = None,
    b: Tensor | None = None,
    ranks: Sequence[int] | None = None,
    p: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[dY | dS | 0] [T, N + p] from the gradients of what `rope_qkv_forward_` returned, without autograd.

    Args:
        dq_TND: [T, num_heads, D], any strides but D's; the same for the two others, each its own.
        dk_TKD: [T, num_kv_heads, D].
        dv_TKD: [T, num_kv_heads, D].
        cos: as in the forward.
        sin: as in the forward.
        positions_T: as in the forward.
        sequence: as in the forward.
        b: [r, N] as in the forward; dS [T, r] is dY bᵀ with dY as stored. Without b there is no dS.
        ranks: as in the forward.
        p: how many columns dS and the zeros after it take. Missing: those `out` has beside N, else r rounded up to a
            multiple of 16.
        out: [T, N + p], any row stride, not the memory of an operand. Allocated when missing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, p is below r, or `out` cannot be written as it is.
    """
    if dv_TKD.shape != dk_TKD.shape or dv_TKD.dtype != dk_TKD.dtype:
        raise ValueError(
            f"dv is {dv_TKD.dtype} {tuple(dv_TKD.shape)}, dk {dk_TKD.dtype} {tuple(dk_TKD.shape)}; expected the same"
        )
    positions, sequence = check_operands(dq_TND, dk_TKD, cos, sin, positions_T, sequence)
    dq, dk, dv = (x if x.stride(2) == 1 else x.contiguous() for x in (dq_TND, dk_TKD, dv_TKD))
    (tokens, num_heads, head_dim), num_kv_heads = dq.shape, dk.shape[1]
    sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    width = sum(sizes)
    _check_ranks(b, ranks, width, dq.dtype)
    rank = 0 if b is None else b.shape[0]
    if p is None:
        p = 16 * cdiv(rank, 16) if out is None or out.dim() != 2 else out.shape[1] - width
    if p < rank:
        raise ValueError(f"p is {p}, but b has {rank} rows")
    out = output("out", out, (tokens, width + p), dq)
    ranks_3, firsts = ((0, 0, 0), (0, 0, 0)) if b is None else _ranks_of(b, ranks)
    tables = (cos.contiguous(), sin.contiguous())
    kernels = runs_kernels(dq, dk, dv, b, *tables, positions, out)
    # Ranks that share rows of b have one sum over q, k and v, which no program sees whole.
    fused = kernels and b is not None and ranks is not None and max(ranks_3) <= FUSED_RANK[dq.element_size()]
    if kernels:
        fused_ranks = ranks_3 if fused else (0, 0, 0)
        tile = _backward_tile(max(fused_ranks), dq.element_size())
        if fused:
            tile = tile._replace(heads=num_heads + num_kv_heads)
        sections = (num_heads, num_kv_heads, num_kv_heads)
        grid, options = _launch_options(tile, sections, dq, dk, cos, positions, fused_ranks, firsts)
        launch(
            _rope_qkv_backward_kernel, grid,
            dq, *dq.stride()[:2], dk, *dk.stride()[:2], dv, *dv.stride()[:2], out, out.stride(0),
            b.contiguous() if fused and b is not None else out, *tables, positions, tokens, cos.shape[0], sequence,
            PAD_FIRST=rank, PAD=p - rank, BLOCK_PAD=next_power_of_2(max(1, p - rank)), **options,
        )  # fmt: skip
    else:
        q_part, k_part, v_part = (part.unflatten(1, (-1, head_dim)) for part in out[:, :width].split(sizes, dim=1))
        rope_backward(dq, dk, cos, sin, positions, sequence=sequence, out=(q_part, k_part))
        v_part.copy_(dv)
        out[:, width + rank :].zero_()
    if b is not None and not fused:
        dy, tail = out[:, :width], out[:, width : width + rank]
        if ranks is None:
            torch.mm(dy, b.t(), out=tail)
        else:
            for columns, rows in _blocks(sizes, ranks_3, firsts):
                if rows.start < rows.stop:
                    torch.mm(dy[:, columns], b[rows, columns].t(), out=tail[:, rows])
    return out


def _check_ranks(b: Tensor | None, ranks: Sequence[int] | None, width: int, dtype: torch.dtype) -> None:
    if b is None:
        if ranks is not None and any(ranks):
            raise ValueError(f"ranks are {tuple(ranks)}, but there is no b")
        return
    if b.dim() != 2 or b.shape[0] == 0 or b.shape[1] != width or b.dtype != dtype:
        raise ValueError(f"b is {b.dtype} {tuple(b.shape)}, expected {dtype} (r, {width})")
    if ranks is not None and (len(ranks) != 3 or min(ranks) < 0 or sum(ranks) != b.shape[0]):
        raise ValueError(f"ranks are {tuple(ranks)}, expected three that make {b.shape[0]}, the rows of b")
