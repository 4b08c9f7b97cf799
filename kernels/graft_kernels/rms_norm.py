"""RMSNorm, alone or after a residual addition, with LoRA's small products done on the way.

Shapes: x, residual, z [T, H]; w [H] frozen; ρ [T]; y [T, H]. Optional: A [R, H], the stacked adapters of the layers
that read y; a pending update S [T, ≥R], B [R, H] of the layer that wrote x, whose scaled B lies transposed.

    forward     z = x + residual + S B               rounded to x's dtype; z is x when there is nothing to add
                ρ = (mean(z²) + ε)^(-1/2)            fp32
                y = cast(z·ρ)·w                      Llama: z·ρ is rounded to x's dtype, the product is rounded again
                y = z·ρ·(1 + w)                      Gemma: fp32 throughout, one rounding
    backward    g = dy + scale·P A                   P [T, ≥R]: what a GEMM by [W | B] leaves in its last columns
                u = g∘w,  or g∘(1 + w)               x̂ = z·ρ
                dx = dresidual + ρ·(u - x̂·mean(u∘x̂))

The forms of Zhang and Sennrich (arXiv 1910.07467); the gradient is theirs with w constant, and takes both casts for
the identity. Kept for the backward: z and ρ. Hugging Face's `LlamaRMSNorm` ends in `weight * hidden.to(input_dtype)`,
which PyTorch evaluates in fp32 and rounds once: the same two roundings as here, as long as w has x's dtype. With an
fp32 w under a 16-bit x theirs promotes and returns fp32, this rounds to x's dtype.

LoRA's columns: given A, `out` is [T, H + p] and its last p columns become scale·y Aᵀ and zeros, so that one GEMM by
[W | B]ᵀ computes the linear layer with its update. In the backward the same is done for the layer that wrote x: given
its B [R, H], the last p columns become dx Bᵀ, so that one GEMM by [W ; A] computes its input's gradient. Products are
taken of y and dx as stored. y Aᵀ is one more product of the library: made in the kernel it costs the same on an H100,
for the rows then no longer fit the registers. The other small products are made inside the kernels up to the ranks
below; beyond them the library is the better place, and the launchers go there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft_kernels.launch import cdiv, launch, next_power_of_2, runs_kernels, shared_memory, tl, triton
from graft_kernels.operands import (
    arithmetic_dtype,
    low_rank_term,
    operand,
    output,
    output_with_tail,
    row_stride,
    write_tail,
)

# The largest ranks that the kernels multiply themselves: in the backward by bytes per element (fp32 products run
# without tensor cores), and the pending sum of the forward.
FUSED_RANK = {2: 128, 4: 16}
PENDING_RANK = 32
# A row up to this width is held in registers and read once.
REGISTER_WIDTH = 16384
_TILE = 4096


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, gemma: bool = False) -> Tensor:
    """The definition of correct, differentiable by autograd."""
    wide = arithmetic_dtype(x.dtype)
    x_wide, w = x.to(wide), weight.to(wide)
    normed = x_wide * (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed * (1.0 + w)).to(x.dtype) if gemma else (normed.to(x.dtype).to(wide) * w).to(x.dtype)


@triton.jit
def _forward_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_stride, residual_ptr, residual_stride, s_ptr, s_stride, s_out_ptr, b_ptr, w_ptr,
    y_ptr, y_stride, z_ptr, z_stride, rho_ptr, T, H, eps,
    PENDING_RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, KEEP_S: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GEMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: every operand is read once."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_H)
    row_64 = row.to(tl.int64)[:, None]
    mask = (row < T)[:, None] & (col < H)[None, :]
    z = tl.load(x_ptr + row_64 * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + row_64 * residual_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if KEEP_S:
        s_col = tl.arange(0, RANK_BLOCK)[None, :]
        s_mask = (row < T)[:, None] & (s_col < PENDING_RANK)
        whole_s = tl.load(s_ptr + row_64 * s_stride + s_col, mask=s_mask)
    # S B as a sum of outer products: the rows are too few for the tensor cores, and B is read from the L2 cache.
    for r in tl.static_range(PENDING_RANK):
        s = tl.load(s_ptr + row.to(tl.int64) * s_stride + r, mask=row < T, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + r * H + col, mask=col < H, other=0.0).to(tl.float32)
        z += s[:, None] * b[None, :]
    if HAS_RESIDUAL or PENDING_RANK > 0:
        rounded = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + row_64 * z_stride + col[None, :], rounded, mask=mask)
        z = rounded.to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
    rho = 1.0 / tl.sqrt(tl.sum(z * z, axis=1) / H + eps)
    y = z * rho[:, None]
    y = y * (1.0 + w) if GEMMA else y.to(y_ptr.dtype.element_ty).to(tl.float32) * w
    tl.store(y_ptr + row_64 * y_stride + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rho_ptr + row, rho, mask=row < T)
    if KEEP_S:
        # Last: the loads above would wait for a store between them.
        tl.store(s_out_ptr + row_64 * PENDING_RANK + s_col, whole_s, mask=s_mask)


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    acc, tile, c_ptr, start, H,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """acc + tile Cᵀ for BLOCK_H columns of C [RANK, H].

    With GROUPS > 1 the columns are cut into as many slices, each for one warp, and acc is [GROUPS, BLOCK_M, BLOCK_R]:
    so few rows give the warps nothing else to share, and each would read the whole tile.
    """
    r = tl.arange(0, BLOCK_R)
    if GROUPS == 1:
        col = start + tl.arange(0, BLOCK_H)
        c = tl.load(
            c_ptr + r[None, :].to(tl.int64) * H + col[:, None],
            mask=(col < H)[:, None] & (r < RANK)[None, :],
            other=0.0,
        )
        acc = tl.dot(tile, c, acc, input_precision="ieee")
    else:
        group = tl.arange(0, GROUPS)[:, None, None] * (BLOCK_H // GROUPS)
        col = start + group + tl.arange(0, BLOCK_H // GROUPS)[None, :, None]
        c = tl.load(
            c_ptr + r[None, None, :].to(tl.int64) * H + col,
            mask=(col < H) & (r < RANK)[None, None, :],
            other=0.0,
        )
        slices = tl.permute(tl.reshape(tile, (BLOCK_M, GROUPS, BLOCK_H // GROUPS)), (1, 0, 2))
        acc = tl.dot(slices, c, acc, input_precision="ieee")
    return acc


@triton.jit
def _store_tail(  # type: ignore[no-untyped-def]
    tail_ptr, acc, scale, row_ok,
    RANK: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """scale·acc and zeros, TAIL columns."""
    r = tl.arange(0, BLOCK_R)
    product = acc if GROUPS == 1 else tl.sum(acc, axis=0)
    # A row with an infinity has NaN in every column of the product; the padding stays zero all the same.
    product = tl.where((r < RANK)[None, :], product * scale, 0.0)
    tl.store(tail_ptr + r[None, :], product.to(tail_ptr.dtype.element_ty), mask=row_ok & (r < TAIL)[None, :])
    if TAIL > BLOCK_R:
        pad = BLOCK_R + tl.arange(0, BLOCK_TAIL)
        zeros = tl.zeros([BLOCK_M, BLOCK_TAIL], dtype=tail_ptr.dtype.element_ty)
        tl.store(tail_ptr + pad[None, :], zeros, mask=row_ok & (pad < TAIL)[None, :])


@triton.jit
def _forward_chunks_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_stride, residual_ptr, residual_stride, w_ptr, y_ptr, y_stride, z_ptr, z_stride, rho_ptr, T, H, eps,
    HAS_RESIDUAL: tl.constexpr, GEMMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows too wide for the registers, read twice."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_64 = row.to(tl.int64)[:, None]
    row_ok = (row < T)[:, None]
    # One sum per column of the chunk, so that the rows are reduced across the warps once, not once a chunk.
    squares = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    for start in tl.range(0, H, BLOCK_H):
        col = start + tl.arange(0, BLOCK_H)
        mask = row_ok & (col < H)[None, :]
        z = tl.load(x_ptr + row_64 * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            z += tl.load(residual_ptr + row_64 * residual_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
            rounded = z.to(z_ptr.dtype.element_ty)
            tl.store(z_ptr + row_64 * z_stride + col[None, :], rounded, mask=mask)
            z = rounded.to(tl.float32)
        squares += z * z
    rho = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / H + eps)
    tl.store(rho_ptr + row, rho, mask=row < T)
    if HAS_RESIDUAL:
        # A thread may read below what another one wrote above.
        tl.debug_barrier()
    for start in tl.range(0, H, BLOCK_H):
        col = start + tl.arange(0, BLOCK_H)
        mask = row_ok & (col < H)[None, :]
        z = tl.load(z_ptr + row_64 * z_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
        y = z * rho[:, None]
        y = y * (1.0 + w) if GEMMA else y.to(y_ptr.dtype.element_ty).to(tl.float32) * w
        tl.store(y_ptr + row_64 * y_stride + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _again_kernel(  # type: ignore[no-untyped-def]
    z_ptr, z_stride, rho_ptr, w_ptr, y_ptr, y_stride, T, H,
    GEMMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """y from z and ρ, with the forward's operations."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_64 = row.to(tl.int64)[:, None]
    mask = (row < T)[:, None] & (col < H)[None, :]
    z = tl.load(z_ptr + row_64 * z_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    rho = tl.load(rho_ptr + row, mask=row < T, other=0.0)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
    y = z * rho[:, None]
    y = y * (1.0 + w) if GEMMA else y.to(y_ptr.dtype.element_ty).to(tl.float32) * w
    tl.store(y_ptr + row_64 * y_stride + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_rows_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, dy_stride, z_ptr, z_stride, w_ptr, rho_ptr, dresidual_ptr, dresidual_stride, dx_ptr, dx_stride, T, H,
    HAS_DRESIDUAL: tl.constexpr, GEMMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_H)
    row_64 = row.to(tl.int64)[:, None]
    mask = (row < T)[:, None] & (col < H)[None, :]
    u = tl.load(dy_ptr + row_64 * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row_64 * z_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_DRESIDUAL:
        # Loaded here, used last: all three reads are then under way together.
        dresidual = tl.load(dresidual_ptr + row_64 * dresidual_stride + col[None, :], mask=mask, other=0.0)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
    rho = tl.load(rho_ptr + row, mask=row < T, other=0.0)[:, None]
    if GEMMA:
        w += 1.0
    u = u * w
    normed = z * rho
    mean = tl.sum(u * normed, axis=1)[:, None] / H
    dx = rho * (u - normed * mean)
    if HAS_DRESIDUAL:
        dx += dresidual.to(tl.float32)
    tl.store(dx_ptr + row_64 * dx_stride + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_gradient(  # type: ignore[no-untyped-def]
    dy_ptr, dy_stride, p, a_ptr, w_ptr, row_64, row_ok, col, H, scale,
    RANK: tl.constexpr, GEMMA: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """u = (dy + scale·P A)∘w for one chunk of columns."""
    u = tl.load(dy_ptr + row_64 * dy_stride + col[None, :], mask=row_ok & (col < H)[None, :], other=0.0)
    u = u.to(tl.float32)
    if RANK > 0:
        r = tl.arange(0, BLOCK_R)
        a = tl.load(
            a_ptr + r[:, None].to(tl.int64) * H + col[None, :],
            mask=(r < RANK)[:, None] & (col < H)[None, :],
            other=0.0,
        )
        u += scale * tl.dot(p, a, input_precision="ieee")
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
    if GEMMA:
        w += 1.0
    return u * w


@triton.jit
def _backward_chunks_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, dy_stride, p_ptr, p_stride, a_ptr, z_ptr, z_stride, w_ptr, rho_ptr, dresidual_ptr, dresidual_stride,
    b_ptr, dx_ptr, dx_stride, T, H, scale,
    RANK: tl.constexpr, TAIL_RANK: tl.constexpr, TAIL: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, GEMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_TAIL: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_64 = row.to(tl.int64)[:, None]
    row_ok = (row < T)[:, None]
    rho = tl.load(rho_ptr + row, mask=row < T, other=0.0)[:, None]
    r = tl.arange(0, BLOCK_R)
    if RANK > 0:
        p = tl.load(p_ptr + row_64 * p_stride + r[None, :], mask=row_ok & (r < RANK)[None, :], other=0.0)
    else:
        p = 0.0
    products = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    for start in tl.range(0, H, BLOCK_H, num_stages=2):
        col = start + tl.arange(0, BLOCK_H)
        u = _weighted_gradient(
            dy_ptr, dy_stride, p, a_ptr, w_ptr, row_64, row_ok, col, H, scale, RANK, GEMMA, BLOCK_R
        )  # fmt: skip
        z = tl.load(z_ptr + row_64 * z_stride + col[None, :], mask=row_ok & (col < H)[None, :], other=0.0)
        products += u * (z.to(tl.float32) * rho)
    mean = tl.sum(products, axis=1)[:, None] / H
    if GROUPS == 1:
        acc = tl.zeros([BLOCK_M, BLOCK_B], dtype=tl.float32)
    else:
        acc = tl.zeros([GROUPS, BLOCK_M, BLOCK_B], dtype=tl.float32)
    for start in tl.range(0, H, BLOCK_H, num_stages=2):
        col = start + tl.arange(0, BLOCK_H)
        mask = row_ok & (col < H)[None, :]
        u = _weighted_gradient(
            dy_ptr, dy_stride, p, a_ptr, w_ptr, row_64, row_ok, col, H, scale, RANK, GEMMA, BLOCK_R
        )  # fmt: skip
        z = tl.load(z_ptr + row_64 * z_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dx = rho * (u - z * rho * mean)
        if HAS_DRESIDUAL:
            at = dresidual_ptr + row_64 * dresidual_stride + col[None, :]
            dx += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row_64 * dx_stride + col[None, :], rounded, mask=mask)
        if TAIL_RANK > 0:
            acc = _add_product(acc, rounded, b_ptr, start, H, TAIL_RANK, BLOCK_M, BLOCK_H, BLOCK_B, GROUPS)
    if TAIL_RANK > 0:
        tail_ptr = dx_ptr + row_64 * dx_stride + H
        _store_tail(tail_ptr, acc, 1.0, row_ok, TAIL_RANK, TAIL, BLOCK_M, BLOCK_B, BLOCK_TAIL, GROUPS)


def _rows_tile(width: int, pending_rank: int = 0) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_H, num_warps) where whole rows are held in registers.

    A pending sum reads its B once a program, so a program then takes as many rows as its registers hold.
    """
    block_h = max(16, next_power_of_2(width))
    tile_size = 4 * _TILE if pending_rank > 0 else _TILE
    block_m = max(1, min(16, tile_size // block_h))
    tile = block_m * block_h
    return block_m, block_h, 4 if tile <= 2048 else 8


def _chunk_tile(tokens: int, itemsize: int, rank: int, device: torch.device) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_H, num_warps, GROUPS) where rows are walked in chunks; `rank` is the largest of the products.

    The best of a sweep on an H100, H = 4096. More rows a program read A less often, fewer keep every multiprocessor
    busy. The long chunks want more shared memory than smaller cards have.
    """
    if itemsize == 4:
        return 16, 64, 8, 1
    if tokens < 8192 and rank <= 64 and shared_memory(device) >= 200 * 1024:
        return 16, 512, 8, 8
    return (16, 256, 4, 4) if rank <= 32 else (32, 128, 4, 1) if rank <= 64 else (16, 64, 4, 1)


def rms_norm_forward(
    x_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    gemma: bool = False,
    residual: Tensor | None = None,
    pending: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    z_out: Tensor | None = None,
    lora_a: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, ρ) without autograd. z is `x_TH` itself when neither `residual` nor `pending` is added to it.

    Args:
        x_TH: [T, H].
        weight_H: [H].
        eps: ε.
        gemma: y = z·ρ·(1 + w) with one rounding, in place of Llama's cast(z·ρ)·w.
        residual: [T, H], added to x.
        pending: (S [T, at least R], B [R, H]): S B is added to x. S or B carries the scale. A third tensor, [T, R], is
            where S goes, for whoever needs it after the memory of x and S.
        out: where y goes: [T, H], or [T, H + p] with `lora_a`, p >= R a multiple of 16. Allocated when missing, with
            the smallest p. y is all of it, the tail included.
        z_out: where z goes: [T, H]; may be the memory of x or `residual`. Only with one of the two sums.
        lora_a: A [R, H]: the last p columns of `out` become scale·y Aᵀ and p - R columns of zeros.
        scale: of those columns.

    All matrices may have any row stride. ρ is fp32, fp64 for fp64 operands.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an output's last dimension is not contiguous.
    """
    x = operand("x", x_TH, (None, None))
    (tokens, width), dtype, wide = x.shape, x.dtype, arithmetic_dtype(x.dtype)
    weight = operand("weight", weight_H, (width,))
    if residual is not None:
        residual = operand("residual", residual, (tokens, width), dtype)
    s, b = low_rank_term("pending", "S", "B", pending, x)
    if z_out is not None and residual is None and pending is None:
        raise ValueError("z_out is given, but neither residual nor pending: z is x itself")
    y, lora_a = output_with_tail(out, x, "lora_a", lora_a)
    if z_out is not None:
        output("z_out", z_out, (tokens, width), x)
    kernels = runs_kernels(x, weight, residual, s, b, lora_a, y, z_out)
    in_registers = kernels and width <= REGISTER_WIDTH

    s_out = None
    if pending is not None and b is not None and len(pending) == 3:
        s_out = output("pending's copy of S", pending[2], (tokens, b.shape[0]), x)
        if not s_out.is_contiguous():
            raise ValueError("pending's copy of S is not contiguous")
    if s is not None and b is not None and (not in_registers or b.shape[0] > PENDING_RANK):
        # Without a residual this sum is z already.
        if s_out is not None:
            s_out.copy_(s[:, : b.shape[0]])
        x = torch.addmm(x, s[:, : b.shape[0]], b, out=z_out if residual is None else None)
        s, b = None, None
    z = x
    if residual is not None or s is not None:
        z = output("z_out", z_out, (tokens, width), x)
    rho = torch.empty(tokens, dtype=wide, device=x.device)
    if not kernels:
        if residual is not None:
            torch.add(x, residual, out=z)
        z_wide, w = z.to(wide), weight.to(wide)
        torch.rsqrt(z_wide.square().mean(-1) + eps, out=rho)
        normed = z_wide * rho[:, None]
        y[:, :width] = normed * (1.0 + w) if gemma else normed.to(dtype).to(wide) * w
    elif in_registers:
        pending_rank = 0 if b is None else b.shape[0]
        block_m, block_h, num_warps = _rows_tile(width, pending_rank)
        launch(
            _forward_rows_kernel, (cdiv(tokens, block_m),),
            x, x.stride(0), residual, row_stride(residual),
            s, row_stride(s), s_out, b, weight, y, y.stride(0), z, z.stride(0), rho, tokens, width, eps,
            PENDING_RANK=pending_rank, RANK_BLOCK=next_power_of_2(max(1, pending_rank)),
            KEEP_S=pending_rank > 0 and s_out is not None,
            HAS_RESIDUAL=residual is not None, GEMMA=gemma,
            BLOCK_M=block_m, BLOCK_H=block_h, num_warps=num_warps,
        )  # fmt: skip
    else:
        launch(
            _forward_chunks_kernel, (cdiv(tokens, 4),),
            x, x.stride(0), residual, row_stride(residual), weight,
            y, y.stride(0), z, z.stride(0), rho, tokens, width, eps,
            HAS_RESIDUAL=residual is not None, GEMMA=gemma, BLOCK_M=4, BLOCK_H=1024, num_warps=8,
        )  # fmt: skip
    if lora_a is not None:
        write_tail(y, width, lora_a, scale)
    return y, z, rho


def rms_norm_again(
    z_TH: Tensor,
    weight_H: Tensor,
    rho_T: Tensor,
    *,
    gemma: bool = False,
    out: Tensor | None = None,
    lora_a: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The y of an earlier `rms_norm_forward`, to the bit, from the z and ρ that it left.

    Its sum of squares may have been formed in another order, for another choice of kernel; so ρ is not formed again.
    The arguments are as there.

    Raises:
        ValueError: as `rms_norm_forward`.
    """
    z = operand("z", z_TH, (None, None))
    (tokens, width), dtype, wide = z.shape, z.dtype, arithmetic_dtype(z.dtype)
    weight = operand("weight", weight_H, (width,))
    rho = operand("rho", rho_T, (tokens,), wide)
    y, lora_a = output_with_tail(out, z, "lora_a", lora_a)
    if runs_kernels(z, weight, rho, lora_a, y):
        block_h = min(4096, max(16, next_power_of_2(width)))
        block_m = max(1, min(16, _TILE // block_h))
        launch(
            _again_kernel, (cdiv(tokens, block_m), cdiv(width, block_h)),
            z, z.stride(0), rho, weight, y, y.stride(0), tokens, width,
            GEMMA=gemma, BLOCK_M=block_m, BLOCK_H=block_h, num_warps=8,
        )  # fmt: skip
    else:
        w, normed = weight.to(wide), z.to(wide) * rho[:, None]
        y[:, :width] = normed * (1.0 + w) if gemma else normed.to(dtype).to(wide) * w
    if lora_a is not None:
        write_tail(y, width, lora_a, scale)
    return y


def rms_norm_backward(
    dy_TH: Tensor,
    z_TH: Tensor,
    weight_H: Tensor,
    rho_T: Tensor,
    *,
    gemma: bool = False,
    dresidual: Tensor | None = None,
    deferred: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    lora_b: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dx [T, H], the gradient of every summand of z, or with `lora_b` all of [dx | dx Bᵀ | 0], without autograd.

    Args:
        dy_TH: [T, H], the gradient of y; with `deferred` it still lacks the low-rank term.
        z_TH: [T, H], from the forward, as are the weight and ρ.
        weight_H: [H].
        rho_T: [T].
        gemma: as in the forward.
        dresidual: [T, H], the gradient that reached z by other ways; it is added.
        deferred: (P [T, at least R], A [R, H]): scale·P A is added to dy.
        scale: of that term.
        lora_b: B [R, H] of the layer that wrote x: the last p columns of `out` become dx Bᵀ and p - R zeros.
        out: where dx goes, [T, H], or [T, H + p] with `lora_b`, p >= R a multiple of 16; may be the memory of dy or
            `dresidual`. Allocated when missing, with the smallest p.

    All matrices may have any row stride.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the last dimension of `out` is not contiguous.
    """
    dy = operand("dy", dy_TH, (None, None))
    (tokens, width), dtype, wide = dy.shape, dy.dtype, arithmetic_dtype(dy.dtype)
    z = operand("z", z_TH, (tokens, width), dtype)
    weight = operand("weight", weight_H, (width,))
    rho = operand("rho", rho_T, (tokens,), wide)
    if dresidual is not None:
        dresidual = operand("dresidual", dresidual, (tokens, width), dtype)
    p, a = low_rank_term("deferred", "P", "A", deferred, dy)
    dx_tail, lora_b = output_with_tail(out, dy, "lora_b", lora_b)
    dx, tail = dx_tail[:, :width], dx_tail.shape[1] - width
    tail_rank = 0 if lora_b is None else lora_b.shape[0]
    kernels = runs_kernels(dy, z, weight, rho, dresidual, p, a, lora_b, dx)
    fused_rank = FUSED_RANK.get(dtype.itemsize, 0) if kernels else 0
    tail_fused = 0 < tail_rank <= fused_rank

    if p is not None and a is not None and a.shape[0] > fused_rank:
        dy = torch.addmm(dy, p[:, : a.shape[0]], a, alpha=scale)
        p, a = None, None
    rank = 0 if a is None else a.shape[0]
    if not kernels:
        w, normed = weight.to(wide), z.to(wide) * rho[:, None]
        u = dy.to(wide) * (1.0 + w if gemma else w)
        wide_dx = rho[:, None] * (u - normed * (u * normed).mean(-1, keepdim=True))
        dx.copy_(wide_dx if dresidual is None else wide_dx + dresidual)
    elif width <= REGISTER_WIDTH and rank == 0 and not tail_fused:
        block_m, block_h, num_warps = _rows_tile(width)
        launch(
            _backward_rows_kernel, (cdiv(tokens, block_m),),
            dy, dy.stride(0), z, z.stride(0), weight, rho,
            dresidual, row_stride(dresidual), dx, dx.stride(0), tokens, width,
            HAS_DRESIDUAL=dresidual is not None, GEMMA=gemma, BLOCK_M=block_m, BLOCK_H=block_h, num_warps=num_warps,
        )  # fmt: skip
    else:
        block_r = max(16, next_power_of_2(max(1, rank)))
        block_b = max(16, next_power_of_2(tail_rank)) if tail_fused else 16
        block_m, block_h, num_warps, groups = _chunk_tile(tokens, dtype.itemsize, max(block_r, block_b), dy.device)
        launch(
            _backward_chunks_kernel, (cdiv(tokens, block_m),),
            dy, dy.stride(0), p, row_stride(p), a, z, z.stride(0), weight, rho,
            dresidual, row_stride(dresidual), lora_b if tail_fused else None,
            dx, dx.stride(0), tokens, width, scale,
            RANK=rank, TAIL_RANK=tail_rank if tail_fused else 0, TAIL=tail,
            HAS_DRESIDUAL=dresidual is not None, GEMMA=gemma,
            BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_R=block_r, BLOCK_B=block_b,
            BLOCK_TAIL=next_power_of_2(max(1, tail - block_b)), GROUPS=groups, num_warps=num_warps,
        )  # fmt: skip
    if lora_b is not None and not tail_fused:
        write_tail(dx_tail, width, lora_b)
    return dx_tail


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, gemma: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        width = x.shape[-1]
        # Made in their final shape: an output that is a view could not be changed in place by whoever receives it.
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        z = None if residual is None else torch.empty_like(y)
        _, z_TH, rho = rms_norm_forward(
            x.reshape(-1, width),
            weight,
            eps,
            gemma=gemma,
            residual=None if residual is None else residual.reshape(-1, width),
            out=y.view(-1, width),
            z_out=None if z is None else z.view(-1, width),
        )
        ctx.save_for_backward(z_TH if z is None else z, weight, rho)
        ctx.gemma = gemma
        ctx.set_materialize_grads(False)
        return y if z is None else (y, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None = None) -> tuple[Tensor | None, ...]:
        need_x, need_residual = ctx.needs_input_grad[:2]
        grad = grad_z
        if grad_y is not None:
            z, weight, rho = ctx.saved_tensors
            width = grad_y.shape[-1]
            grad = rms_norm_backward(
                grad_y.reshape(-1, width),
                z.view(-1, width),
                weight,
                rho,
                gemma=ctx.gemma,
                dresidual=None if grad_z is None else grad_z.reshape(-1, width),
            ).view(grad_y.shape)
        return grad if need_x else None, grad if need_residual else None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, gemma: bool = False) -> Tensor:
    """y [..., H], the RMSNorm of x's rows, differentiable once in x.

    `gemma` computes x̂·(1 + w) in fp32, without it cast(x̂)·w as Llama does.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the weight wants a gradient (this op computes none).
    """
    _check_frozen(x, weight)
    y: Tensor = _RMSNorm.apply(x, None, weight, eps, gemma)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    """(y, z): z = x + residual and its RMSNorm y, both [..., H], differentiable once in x and the residual.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the weight wants a gradient (this op computes none).
    """
    _check_frozen(x, weight)
    if x.shape != residual.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, the residual {tuple(residual.shape)}")
    result: tuple[Tensor, Tensor] = _RMSNorm.apply(x, residual, weight, eps, gemma)
    return result


def _check_frozen(x: Tensor, weight: Tensor) -> None:
    if weight.requires_grad:
        raise ValueError("the weight is frozen here; a gradient for it was asked for")
    if x.dim() == 0 or weight.shape != x.shape[-1:] or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight {tuple(weight.shape)}; expected [..., H] and [H]")
