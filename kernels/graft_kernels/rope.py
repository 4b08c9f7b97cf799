"""Rotary position embedding of q and k in one launch, with the per-head RMSNorm before it where a model has one.

Shapes: q [T, N, D], k [T, K, D], any ratio of N to K; cos, sin [P, R/2] fp32 for the P first positions; the rotated
part is the first R <= D of a head, the rest passes unchanged; position m [T]. With w [D], frozen, one for q and one for
k (Qwen3, Gemma 3), x below is the normalised head; without it, x is the head.

    norm        ρ = (mean(q²) + ε)^(-1/2)            x = cast(q·ρ)·w, or with gemma x = q·ρ·(1 + w)
    forward     a = x[: R/2]                         b = x[R/2 : R]
                a' = a·cos m - b·sin m               b' = b·cos m + a·sin m
    backward    da = da'·cos m + db'·sin m           db = db'·cos m - da'·sin m
    norm        u = dx∘w, or dx∘(1 + w)              q̂ = q·ρ
                dq = ρ·(u - q̂·mean(u∘q̂))

Su et al. (arXiv 2104.09864), the halves paired as in Hugging Face's `rotate_half`. All of it is fp32 from the load to
the one rounding at the store, but for Llama's cast; Hugging Face rounds cos, sin, the normalised head and both products
to the model's dtype. Kept for the backward: nothing but the positions without a norm, so that both directions may work
in place. With one, q and k from before it; ρ is computed again, since the backward has whole heads in registers anyway.

Around LoRA's products in the rows form (`rope_qkv_forward_`, `rope_qkv_backward`): the buffer [W ; A] gives x [W ; A]ᵀ
= [y0 | S], and this kernel, which reads y0 next, adds the update; in the backward [dY | dS]·[W ; A] is the whole
gradient of x, and this kernel, which writes dY, writes dS beside it. b [R, ΣN] = (s·B)ᵀ, block-diagonal: the ranks of q
are its first rows, then those of k, of v. Here v [T, K, D] takes part, unrotated; N = (heads + 2K)·D:

    forward     [q | k | v] = y0 + S b               q and k turn, all in place
    backward    dY = [dq | dk | dv]                  dq and dk turned back
                dS = dY bᵀ                           of dY as stored; zeros in the padding to p columns

A position outside the table gives NaN in the rotated part, never a read out of bounds. On the host a range can be
checked without waiting for the device only where the positions lie on the CPU: there `rope` does so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft_kernels.launch import cdiv, launch, next_power_of_2, runs_kernels, tl, triton
from graft_kernels.operands import arithmetic_dtype

# The largest rank of q, k or v that the kernels multiply themselves, by bytes per element; beyond it the library does.
# fp32 products run without tensor cores.
FUSED_RANK = {2: 128, 4: 16}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model stretches its positions, in the words of its config's `rope_parameters`.

    "linear" divides every frequency by `factor`. "llama3" divides only those whose wavelength is above
    original_max_position_embeddings / low_freq_factor, leaves those below
    original_max_position_embeddings / high_freq_factor, and goes linearly from one to the other in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"kind is {self.kind!r}, expected 'linear' or 'llama3'")
        if not self.factor > 0:
            raise ValueError(f"factor is {self.factor}, expected a positive number")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor}, high_freq_factor {self.high_freq_factor}; "
                "expected 0 < low < high"
            )


def rope_frequencies(rotary_dim: int, *, theta: float = 10000.0, scaling: RopeScaling | None = None) -> Tensor:
    """[R/2] fp64 on the CPU: the angle by which each pair turns from one position to the next.

    Raises:
        ValueError: R is not a positive even number, or theta is not positive.
    """
    if rotary_dim < 2 or rotary_dim % 2 != 0:
        raise ValueError(f"the rotary dimension is {rotary_dim}, expected a positive even number")
    if not theta > 0:
        raise ValueError(f"theta is {theta}, expected a positive number")
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    frequencies = theta**-exponent
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2.0 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def rope_table(
    head_dim: int,
    max_positions: int,
    *,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [max_positions, R/2] fp32, on `device` or torch's default. For a partial rotary give R as `head_dim`.

    The angles are fp64: at position 100,000 an fp32 angle, as Hugging Face has it, is off by up to 0.004.

    Raises:
        ValueError: R is not a positive even number, `max_positions` is negative, or theta is not positive.
    """
    if max_positions < 0:
        raise ValueError(f"max_positions is {max_positions}, expected at least 0")
    frequencies = rope_frequencies(head_dim, theta=theta, scaling=scaling)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64, device="cpu"), frequencies)
    device = torch.get_default_device() if device is None else device
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition of correct on [..., T, heads, D], differentiable by autograd."""
    if positions is None:
        positions = torch.arange(q.shape[-3], device=q.device)
    c, s = _angles(cos, sin, positions, arithmetic_dtype(q.dtype))

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        wide = x.to(arithmetic_dtype(x.dtype))
        if weight is not None:
            wide = _norm(wide, weight, eps, gemma, x.dtype)
        return _rotate(wide, c, s).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def _angles(cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each token's row of the tables, for all heads; NaN outside them."""
    outside = (positions < 0) | (positions >= cos.shape[0])
    index = positions.masked_fill(outside, 0).long()

    def rows(table: Tensor) -> Tensor:
        found = table.index_select(0, index.reshape(-1)).view(*index.shape, table.shape[1])
        return found.to(dtype).masked_fill(outside[..., None], math.nan)[..., None, :]

    return rows(cos), rows(sin)


def _rotate(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = c.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * c - b * s, b * c + a * s, x[..., 2 * half :]), dim=-1)


def _norm(wide: Tensor, weight: Tensor, eps: float, gemma: bool, dtype: torch.dtype) -> Tensor:
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    w = weight.to(wide.dtype)
    return normed * (1.0 + w) if gemma else normed.to(dtype).to(wide.dtype) * w


@triton.jit
def _load_part(x_ptr, first, last, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns first..last of some heads, fp32, zeros outside."""
    col = first + tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None] & (col < last)[None, :]
    return tl.load(x_ptr + head[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_part(x_ptr, value, first, last, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    col = first + tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None] & (col < last)[None, :]
    tl.store(x_ptr + head[:, None] * D + col[None, :], value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(w_ptr, first, last, GEMMA: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    col = first + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + col, mask=col < last, other=0.0).to(tl.float32)
    if GEMMA:
        w += 1.0
    return w[None, :]


@triton.jit
def _forward_heads(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, w_ptr, c, s, eps,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, GEMMA: tl.constexpr,
    COPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one tensor for one token."""
    REST: tl.constexpr = D - 2 * HALF
    for start in tl.range(0, HEADS, BLOCK_N):
        head = start + tl.arange(0, BLOCK_N)
        a = _load_part(x_ptr, 0, HALF, head, HEADS, D, BLOCK_HALF)
        b = _load_part(x_ptr, HALF, 2 * HALF, head, HEADS, D, BLOCK_HALF)
        if REST > 0 and COPY:
            rest = _load_part(x_ptr, 2 * HALF, D, head, HEADS, D, BLOCK_REST)
        if NORM:
            squares = tl.sum(a * a + b * b, axis=1)
            if REST > 0:
                squares += tl.sum(rest * rest, axis=1)
            rho = (1.0 / tl.sqrt(squares / D + eps))[:, None]
            a = a * rho
            b = b * rho
            if not GEMMA:
                a = a.to(x_ptr.dtype.element_ty).to(tl.float32)
                b = b.to(x_ptr.dtype.element_ty).to(tl.float32)
            a = a * _load_weight(w_ptr, 0, HALF, GEMMA, BLOCK_HALF)
            b = b * _load_weight(w_ptr, HALF, 2 * HALF, GEMMA, BLOCK_HALF)
            if REST > 0:
                rest = rest * rho
                if not GEMMA:
                    rest = rest.to(x_ptr.dtype.element_ty).to(tl.float32)
                rest = rest * _load_weight(w_ptr, 2 * HALF, D, GEMMA, BLOCK_REST)
        _store_part(out_ptr, a * c - b * s, 0, HALF, head, HEADS, D, BLOCK_HALF)
        _store_part(out_ptr, b * c + a * s, HALF, 2 * HALF, head, HEADS, D, BLOCK_HALF)
        if REST > 0 and COPY:
            _store_part(out_ptr, rest, 2 * HALF, D, head, HEADS, D, BLOCK_REST)


@triton.jit
def _backward_heads(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, dx_ptr, w_ptr, c, s, eps,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, GEMMA: tl.constexpr,
    COPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one tensor for one token."""
    REST: tl.constexpr = D - 2 * HALF
    for start in tl.range(0, HEADS, BLOCK_N):
        head = start + tl.arange(0, BLOCK_N)
        turned_a = _load_part(dy_ptr, 0, HALF, head, HEADS, D, BLOCK_HALF)
        turned_b = _load_part(dy_ptr, HALF, 2 * HALF, head, HEADS, D, BLOCK_HALF)
        a = turned_a * c + turned_b * s
        b = turned_b * c - turned_a * s
        if REST > 0 and COPY:
            rest = _load_part(dy_ptr, 2 * HALF, D, head, HEADS, D, BLOCK_REST)
        if NORM:
            x_a = _load_part(x_ptr, 0, HALF, head, HEADS, D, BLOCK_HALF)
            x_b = _load_part(x_ptr, HALF, 2 * HALF, head, HEADS, D, BLOCK_HALF)
            a = a * _load_weight(w_ptr, 0, HALF, GEMMA, BLOCK_HALF)
            b = b * _load_weight(w_ptr, HALF, 2 * HALF, GEMMA, BLOCK_HALF)
            squares = tl.sum(x_a * x_a + x_b * x_b, axis=1)
            products = tl.sum(a * x_a + b * x_b, axis=1)
            if REST > 0:
                x_rest = _load_part(x_ptr, 2 * HALF, D, head, HEADS, D, BLOCK_REST)
                rest = rest * _load_weight(w_ptr, 2 * HALF, D, GEMMA, BLOCK_REST)
                squares += tl.sum(x_rest * x_rest, axis=1)
                products += tl.sum(rest * x_rest, axis=1)
            rho = 1.0 / tl.sqrt(squares / D + eps)
            # x̂·mean(u∘x̂) = x·(ρ²·mean(u∘x))
            slope = (products / D * rho * rho)[:, None]
            rho = rho[:, None]
            a = rho * (a - x_a * slope)
            b = rho * (b - x_b * slope)
            if REST > 0:
                rest = rho * (rest - x_rest * slope)
        _store_part(dx_ptr, a, 0, HALF, head, HEADS, D, BLOCK_HALF)
        _store_part(dx_ptr, b, HALF, 2 * HALF, head, HEADS, D, BLOCK_HALF)
        if REST > 0 and COPY:
            _store_part(dx_ptr, rest, 2 * HALF, D, head, HEADS, D, BLOCK_REST)


@triton.jit
def _load_angles(  # type: ignore[no-untyped-def]
    cos_ptr, sin_ptr, positions_ptr, token, max_positions, sequence,
    HAS_POSITIONS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    position = tl.load(positions_ptr + token).to(tl.int64) if HAS_POSITIONS else token % sequence
    col = tl.arange(0, BLOCK_HALF)
    mask = (col < HALF) & (position >= 0) & (position < max_positions)
    c = tl.load(cos_ptr + position * HALF + col, mask=mask, other=float("nan"))
    s = tl.load(sin_ptr + position * HALF + col, mask=mask, other=float("nan"))
    # The columns that fill the block up take part in the norm's sums.
    c = tl.where(col < HALF, c, 0.0)
    s = tl.where(col < HALF, s, 0.0)
    return c[None, :], s[None, :]


@triton.jit
def _rope_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, q_stride, q_out_ptr, q_out_stride, q_weight_ptr, k_ptr, k_stride, k_out_ptr, k_out_stride, k_weight_ptr,
    cos_ptr, sin_ptr, positions_ptr, max_positions, sequence, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, NORM: tl.constexpr, GEMMA: tl.constexpr, COPY: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c, s = _load_angles(
        cos_ptr, sin_ptr, positions_ptr, token, max_positions, sequence, HAS_POSITIONS, HALF, BLOCK_HALF
    )  # fmt: skip
    _forward_heads(
        q_ptr + token * q_stride, q_out_ptr + token * q_out_stride, q_weight_ptr, c, s, eps,
        Q_HEADS, D, HALF, NORM, GEMMA, COPY, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _forward_heads(
        k_ptr + token * k_stride, k_out_ptr + token * k_out_stride, k_weight_ptr, c, s, eps,
        K_HEADS, D, HALF, NORM, GEMMA, COPY, BLOCK_K, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


@triton.jit
def _rope_backward_kernel(  # type: ignore[no-untyped-def]
    dq_ptr, dq_stride, q_ptr, q_stride, q_out_ptr, q_out_stride, q_weight_ptr,
    dk_ptr, dk_stride, k_ptr, k_stride, k_out_ptr, k_out_stride, k_weight_ptr,
    cos_ptr, sin_ptr, positions_ptr, max_positions, sequence, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, NORM: tl.constexpr, GEMMA: tl.constexpr, COPY: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c, s = _load_angles(
        cos_ptr, sin_ptr, positions_ptr, token, max_positions, sequence, HAS_POSITIONS, HALF, BLOCK_HALF
    )  # fmt: skip
    if NORM:
        q_ptr += token * q_stride
        k_ptr += token * k_stride
    _backward_heads(
        dq_ptr + token * dq_stride, q_ptr, q_out_ptr + token * q_out_stride, q_weight_ptr, c, s, eps,
        Q_HEADS, D, HALF, NORM, GEMMA, COPY, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _backward_heads(
        dk_ptr + token * dk_stride, k_ptr, k_out_ptr + token * k_out_stride, k_weight_ptr, c, s, eps,
        K_HEADS, D, HALF, NORM, GEMMA, COPY, BLOCK_K, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


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
    """product + tile·bᵀ, for a group of heads [heads, tokens, R], kept apart until the end."""
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


def _heads_block(heads: int, half_block: int) -> int:
    """How many heads are in registers at once: 2,048 pairs, 16 pairs a thread of 4 warps."""
    return max(1, min(next_power_of_2(heads), 2048 // half_block))


def rope_forward(
    q_TND: Tensor,
    k_TKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_T: Tensor | None = None,
    *,
    sequence: int | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(q', k') without autograd.

    Args:
        q_TND: [T, N, D], each token's N·D numbers contiguous, any stride between tokens (a slice of the fused qkv).
        k_TKD: [T, K, D], likewise.
        cos: [P, R/2] fp32.
        sin: [P, R/2] fp32.
        positions_T: [T] int32 or int64; missing: the token's index modulo `sequence`.
        sequence: the length of a sequence where no positions are given; T when missing.
        q_weight: [D], of the norm before the rotation; with `k_weight` or neither.
        k_weight: [D].
        eps: ε of that norm.
        gemma: that norm is Gemma's, (1 + w) and no cast.
        out: where q' and k' go, shaped and strided like q and k. `out=(q, k)` works in place; with a norm that is
            refused, because the backward needs what came in. Allocated when missing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `out` cannot be written as it is.
    """
    q, k, positions, sequence, q_weight, k_weight = _check(
        q_TND, k_TKD, cos, sin, positions_T, sequence, q_weight, k_weight
    )
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)) if out is None else out
    for name, given, x in (("q", q_out, q), ("k", k_out, k)):
        _check_output(f"out's {name}", given, x)
        if q_weight is not None and _same_memory(given, q_TND if name == "q" else k_TKD):
            raise ValueError("out is the input: with a norm the backward needs q and k as they came in")
    tables = (cos.contiguous(), sin.contiguous())
    if not runs_kernels(q, k, *tables, positions, q_weight, k_weight, q_out, k_out):
        c, s = _angles(*tables, _positions(positions, sequence, q), arithmetic_dtype(q.dtype))
        for x, weight, result in ((q, q_weight, q_out), (k, k_weight, k_out)):
            wide = x.to(arithmetic_dtype(x.dtype))
            if weight is not None:
                wide = _norm(wide, weight, eps, gemma, x.dtype)
            result.copy_(_rotate(wide, c, s))
        return q_out, k_out
    launch(
        _rope_forward_kernel, (q.shape[0],),
        q, q.stride(0), q_out, q_out.stride(0), q_weight, k, k.stride(0), k_out, k_out.stride(0), k_weight,
        *tables, positions, cos.shape[0], sequence, eps,
        **_constants(q, k, cos, positions, q_weight, gemma, _same_memory(q_out, q) and _same_memory(k_out, k)),
    )  # fmt: skip
    return q_out, k_out


def rope_backward(
    dq_TND: Tensor,
    dk_TKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_T: Tensor | None = None,
    *,
    sequence: int | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(dq, dk), the gradients of what `rope_forward` was given, without autograd.

    Args:
        dq_TND: [T, N, D], the gradient of q', strided as q may be.
        dk_TKD: [T, K, D], the gradient of k'.
        cos: as in the forward.
        sin: as in the forward.
        positions_T: as in the forward.
        sequence: as in the forward.
        q: [T, N, D] as it went into the forward; needed with a norm, else not looked at.
        k: [T, K, D], likewise.
        q_weight: as in the forward.
        k_weight: as in the forward.
        eps: as in the forward.
        gemma: as in the forward.
        out: where dq and dk go. `out=(dq_TND, dk_TKD)` works in place, with a norm as well. Allocated when missing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, q and k are missing under a norm, or `out` cannot be written
            as it is.
    """
    dq, dk, positions, sequence, q_weight, k_weight = _check(
        dq_TND, dk_TKD, cos, sin, positions_T, sequence, q_weight, k_weight
    )
    norm = q_weight is not None
    if norm:
        if q is None or k is None:
            raise ValueError("the norm's backward needs q and k as they came into the forward")
        for name, x, like in (("q", q, dq), ("k", k, dk)):
            if x.shape != like.shape or x.dtype != like.dtype:
                raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, its gradient {like.dtype} {tuple(like.shape)}")
        q, k = _rows(q), _rows(k)
    else:
        q, k = None, None
    dq_out, dk_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dq, dk)) if out is None else out
    _check_output("out's dq", dq_out, dq)
    _check_output("out's dk", dk_out, dk)
    tables = (cos.contiguous(), sin.contiguous())
    if not runs_kernels(dq, dk, *tables, positions, q, k, q_weight, k_weight, dq_out, dk_out):
        c, s = _angles(*tables, _positions(positions, sequence, dq), arithmetic_dtype(dq.dtype))
        for dy, before, weight, result in ((dq, q, q_weight, dq_out), (dk, k, k_weight, dk_out)):
            grad = _rotate(dy.to(arithmetic_dtype(dy.dtype)), c, -s)
            if before is not None and weight is not None:
                w, wide = weight.to(grad.dtype), before.to(grad.dtype)
                rho = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
                u, normed = grad * (1.0 + w if gemma else w), wide * rho
                grad = rho * (u - normed * (u * normed).mean(-1, keepdim=True))
            result.copy_(grad)
        return dq_out, dk_out
    launch(
        _rope_backward_kernel, (dq.shape[0],),
        dq, dq.stride(0), q, 0 if q is None else q.stride(0), dq_out, dq_out.stride(0), q_weight,
        dk, dk.stride(0), k, 0 if k is None else k.stride(0), dk_out, dk_out.stride(0), k_weight,
        *tables, positions, cos.shape[0], sequence, eps,
        **_constants(dq, dk, cos, positions, q_weight, gemma, _same_memory(dq_out, dq) and _same_memory(dk_out, dk)),
    )  # fmt: skip
    return dq_out, dk_out


def _constants(
    q: Tensor, k: Tensor, cos: Tensor, positions: Tensor | None, weight: Tensor | None, gemma: bool, in_place: bool
) -> dict[str, Any]:
    half, head_dim = cos.shape[1], q.shape[2]
    half_block = next_power_of_2(half)
    return {
        "Q_HEADS": q.shape[1],
        "K_HEADS": k.shape[1],
        "D": head_dim,
        "HALF": half,
        "HAS_POSITIONS": positions is not None,
        "NORM": weight is not None,
        "GEMMA": gemma,
        # What is not rotated stays where it is when working in place, unless a norm changes it.
        "COPY": weight is not None or not in_place,
        "BLOCK_Q": _heads_block(q.shape[1], half_block),
        "BLOCK_K": _heads_block(k.shape[1], half_block),
        "BLOCK_HALF": half_block,
        "BLOCK_REST": next_power_of_2(max(1, head_dim - 2 * half)),
        "num_warps": 4,
    }


class QKVTile(NamedTuple):
    """How `rope_qkv_forward_` and `rope_qkv_backward` divide their work."""

    tokens: int  # of a program
    heads: int  # of a program; a program that writes a tail takes all of its section
    group: int  # heads in registers at once
    warps: int
    stages: int  # of the loop over the groups


def _forward_tile(tokens: int, rank: int, head_dim: int, itemsize: int) -> QKVTile:
    """More tokens a program read b less often, fewer keep every multiprocessor busy."""
    if itemsize == 4:
        return QKVTile(16, 4, 1, 4, 1)
    return QKVTile(16 if head_dim > 128 or (tokens < 8192 and rank <= 16) else 32, 8, 1, 4, 2)


def _backward_tile(tokens: int, rank: int, itemsize: int) -> QKVTile:
    """As many heads at once as there are warps: each warp multiplies a head of its own."""
    if itemsize == 4:
        return QKVTile(16, 4, 1, 8, 2)
    if rank > 64:
        return QKVTile(16, 8, 1, 4, 2)
    if rank == 0:
        return QKVTile(16, 8, 4, 4, 2)
    return QKVTile(16, 8, 4, 4, 3 if rank <= 16 else 2)


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
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    _tile: QKVTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), [T, heads, D] views of the fused output, which is finished in place, without autograd.

    There is no norm here: working in place would destroy what its backward needs. `rope_forward` has it.

    Args:
        qkv_TN: [T, N + p], N = (num_heads + 2·num_kv_heads)·D: q, k and v side by side; with `b` the first R of
            the last p columns are S = x Aᵀ. Any row stride. Columns from N on are not written.
        num_heads: of q.
        num_kv_heads: of k, as many of v.
        head_dim: D.
        cos: as in `rope_forward`, like all about positions.
        sin: as in `rope_forward`.
        positions_T: as in `rope_forward`.
        sequence: as in `rope_forward`.
        b: [R, N], qkv's dtype, the scale within: S b is added to q, k and v before the rotation, all in fp32 up to the
            rank `FUSED_RANK`; beyond it the sum is rounded once more in between. Without b, v stays as it is.
        ranks: (R_q, R_k, R_v), R together, 0 where there is no adapter: which rows of b are whose. The rest of b is
            taken for zero. Missing: any row may reach anything.
        q_weight: refused.
        k_weight: refused.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the buffer cannot be written as it is, or a norm is wanted.
    """
    if q_weight is not None or k_weight is not None:
        raise ValueError(
            "a norm's backward needs q and k from before it; rope_forward has the norm, this works in place"
        )
    sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    width = sum(sizes)
    if qkv_TN.dim() != 2 or min(num_heads, num_kv_heads, head_dim) < 1 or qkv_TN.shape[1] < width:
        raise ValueError(
            f"qkv has shape {tuple(qkv_TN.shape)}, expected [T, at least ({num_heads} + 2·{num_kv_heads})·{head_dim}]"
        )
    if qkv_TN.stride(1) != 1 or (qkv_TN.shape[0] > 1 and qkv_TN.stride(0) < qkv_TN.shape[1]):
        raise ValueError(f"qkv has strides {qkv_TN.stride()}, expected contiguous rows that do not overlap")
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in qkv_TN[:, :width].split(sizes, dim=1))
    positions, sequence = _check_operands(q, k, cos, sin, positions_T, sequence)
    ranks_3, firsts = _check_ranks(b, ranks, width, q.dtype)
    if b is None:
        rope_forward(q, k, cos, sin, positions, sequence=sequence, out=(q, k))
        return q, k, v
    if qkv_TN.shape[1] < width + b.shape[0]:
        raise ValueError(f"qkv has {qkv_TN.shape[1] - width} columns beside q, k and v; b has {b.shape[0]} rows")
    tables = (cos.contiguous(), sin.contiguous())
    kernels = runs_kernels(qkv_TN, b, *tables, positions)
    if not kernels:
        wide = arithmetic_dtype(q.dtype)
        update = _per_section(qkv_TN[:, width:].to(wide), b.to(wide), sizes, ranks_3, firsts)
        c, s = _angles(*tables, _positions(positions, sequence, q), wide)
        for i, x in enumerate((q, k, v)):
            total = x.to(wide) + update[i].view(x.shape)
            x.copy_(_rotate(total, c, s) if i < 2 else total)
        return q, k, v
    if max(ranks_3) > FUSED_RANK[qkv_TN.element_size()]:
        start = 0
        for size, rank, first in zip(sizes, ranks_3, firsts, strict=True):
            if rank > 0:
                s_TR = qkv_TN[:, width + first : width + first + rank]
                qkv_TN[:, start : start + size].addmm_(s_TR, b[first : first + rank, start : start + size])
            start += size
        rope_forward(q, k, cos, sin, positions, sequence=sequence, out=(q, k))
        return q, k, v
    constants = _qkv_constants(q, k, cos, positions, ranks_3, firsts)
    tile = _tile or _forward_tile(q.shape[0], max(ranks_3), head_dim, q.element_size())
    sections = (num_heads, num_kv_heads, num_kv_heads if ranks_3[2] > 0 else 0)
    tile, options = _tile_options(tile, sections, constants)
    launch(
        _rope_qkv_forward_kernel, (cdiv(q.shape[0], tile.tokens) * sum(cdiv(n, tile.heads) for n in sections),),
        qkv_TN, qkv_TN.stride(0), b.contiguous(), *tables, positions, q.shape[0], cos.shape[0], sequence,
        **constants, **options,
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
    _tile: QKVTile | None = None,
) -> Tensor:
    """[dq | dk | dv | dS | 0] [T, N + p] from the gradients of what `rope_qkv_forward_` returned, without autograd.

    Args:
        dq_TND: [T, num_heads, D], any strides but D's; the same for the two others, each its own.
        dk_TKD: [T, num_kv_heads, D].
        dv_TKD: [T, num_kv_heads, D].
        cos: as in the forward.
        sin: as in the forward.
        positions_T: as in the forward.
        sequence: as in the forward.
        b: [R, N] as in the forward; dS [T, R] is dY bᵀ with dY as stored. Without b there is no dS.
        ranks: as in the forward.
        p: how many columns dS and the zeros after it take. Missing: those `out` has beside N, else R rounded up to a
            multiple of 16.
        out: [T, N + p], any row stride, not the memory of an operand. Allocated when missing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, p is below R, or `out` cannot be written as it is.
    """
    if dv_TKD.shape != dk_TKD.shape or dv_TKD.dtype != dk_TKD.dtype:
        raise ValueError(
            f"dv is {dv_TKD.dtype} {tuple(dv_TKD.shape)}, dk {dk_TKD.dtype} {tuple(dk_TKD.shape)}; expected the same"
        )
    positions, sequence = _check_operands(dq_TND, dk_TKD, cos, sin, positions_T, sequence)
    dq, dk, dv = (x if x.stride(2) == 1 else x.contiguous() for x in (dq_TND, dk_TKD, dv_TKD))
    (tokens, num_heads, head_dim), num_kv_heads = dq.shape, dk.shape[1]
    sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    width = sum(sizes)
    ranks_3, firsts = _check_ranks(b, ranks, width, dq.dtype)
    rank = 0 if b is None else b.shape[0]
    if p is None:
        p = 16 * cdiv(rank, 16) if out is None or out.dim() != 2 else out.shape[1] - width
    if p < rank:
        raise ValueError(f"p is {p}, but b has {rank} rows")
    if out is None:
        out = torch.empty(tokens, width + p, dtype=dq.dtype, device=dq.device)
    elif out.shape != (tokens, width + p) or out.dtype != dq.dtype:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, expected {dq.dtype} {(tokens, width + p)}")
    elif out.stride(1) != 1 or (tokens > 1 and out.stride(0) < width + p):
        raise ValueError(f"out has strides {out.stride()}, expected contiguous rows that do not overlap")
    tables = (cos.contiguous(), sin.contiguous())
    kernels = runs_kernels(dq, dk, dv, b, *tables, positions, out)
    # Ranks that share rows of b have one sum over q, k and v, which no program sees whole.
    fused = kernels and b is not None and ranks is not None and max(ranks_3) <= FUSED_RANK[dq.element_size()]
    if kernels:
        constants = _qkv_constants(dq, dk, cos, positions, ranks_3 if fused else (0, 0, 0), firsts)
        constants |= {"PAD_FIRST": rank, "PAD": p - rank, "BLOCK_PAD": next_power_of_2(max(1, p - rank))}
        fused_rank = max(ranks_3) if fused else 0
        tile = _tile or _backward_tile(tokens, fused_rank, dq.element_size())
        if fused:
            tile = tile._replace(heads=num_heads + num_kv_heads)
        sections = (num_heads, num_kv_heads, num_kv_heads)
        tile, options = _tile_options(tile, sections, constants)
        launch(
            _rope_qkv_backward_kernel, (cdiv(tokens, tile.tokens) * sum(cdiv(n, tile.heads) for n in sections),),
            dq, *dq.stride()[:2], dk, *dk.stride()[:2], dv, *dv.stride()[:2], out, out.stride(0),
            b.contiguous() if fused and b is not None else out, *tables, positions, tokens, cos.shape[0], sequence,
            **constants, **options,
        )  # fmt: skip
    else:
        c, s = _angles(*tables, _positions(positions, sequence, dq), arithmetic_dtype(dq.dtype))
        for x, part in zip((dq, dk, dv), out[:, :width].split(sizes, dim=1), strict=True):
            part.unflatten(1, (-1, head_dim)).copy_(x if x is dv else _rotate(x.to(arithmetic_dtype(x.dtype)), c, -s))
        out[:, width + rank :].zero_()
    if b is not None and not fused:
        start, tail = 0, out[:, width : width + rank]
        if ranks is None:
            torch.mm(out[:, :width], b.t(), out=tail)
        else:
            for size, r, first in zip(sizes, ranks_3, firsts, strict=True):
                if r > 0:
                    dy, rows = out[:, start : start + size], b[first : first + r, start : start + size]
                    torch.mm(dy, rows.t(), out=tail[:, first : first + r])
                start += size
    return out


def _check_ranks(
    b: Tensor | None, ranks: Sequence[int] | None, width: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """How many rows of b belong to q, k and v, and the first of each."""
    if b is None:
        if ranks is not None and any(ranks):
            raise ValueError(f"ranks are {tuple(ranks)}, but there is no b")
        return (0, 0, 0), (0, 0, 0)
    if b.dim() != 2 or b.shape[0] == 0 or b.shape[1] != width or b.dtype != dtype:
        raise ValueError(f"b is {b.dtype} {tuple(b.shape)}, expected {dtype} (R, {width})")
    rank = b.shape[0]
    if ranks is None:
        return (rank, rank, rank), (0, 0, 0)
    if len(ranks) != 3 or min(ranks) < 0 or sum(ranks) != rank:
        raise ValueError(f"ranks are {tuple(ranks)}, expected three that make {rank}, the rows of b")
    r_q, r_k, r_v = ranks
    return (r_q, r_k, r_v), (0, r_q, r_q + r_k)


def _per_section(
    s: Tensor, b: Tensor, sizes: tuple[int, int, int], ranks: tuple[int, int, int], firsts: tuple[int, int, int]
) -> list[Tensor]:
    """S b for q, k and v, each from its own rows of b."""
    columns = b.split(sizes, dim=1)
    return [s[:, f : f + r] @ rows[f : f + r] for rows, r, f in zip(columns, ranks, firsts, strict=True)]


def _qkv_constants(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    ranks: tuple[int, int, int],
    firsts: tuple[int, int, int],
) -> dict[str, Any]:
    half, head_dim = cos.shape[1], q.shape[2]
    constants: dict[str, Any] = {
        "Q_HEADS": q.shape[1],
        "K_HEADS": k.shape[1],
        "D": head_dim,
        "HALF": half,
        "HAS_POSITIONS": positions is not None,
        "K_FIRST": firsts[1],
        "V_FIRST": firsts[2],
        "BLOCK_HALF": min(64, max(16, next_power_of_2(half))),
        "BLOCK_REST": min(64, max(16, next_power_of_2(max(1, head_dim - 2 * half)))),
    }
    for name, rank in zip("QKV", ranks, strict=True):
        constants[f"{name}_RANK"] = rank
        constants[f"BLOCK_{name}R"] = max(16, next_power_of_2(max(1, rank)))
    return constants


def _tile_options(
    tile: QKVTile, sections: tuple[int, int, int], constants: dict[str, Any]
) -> tuple[QKVTile, dict[str, Any]]:
    """`tile` cut to the heads there are, and as the kernels' options."""
    group = min(tile.group, next_power_of_2(max(sections)))
    heads = cdiv(min(tile.heads, max(sections)), group) * group
    # A tile with fewer than 8 numbers a thread would be loaded by several warps, while one of them may already store.
    smallest = constants["BLOCK_HALF"]
    if constants["D"] > 2 * constants["HALF"]:
        smallest = min(smallest, constants["BLOCK_REST"])
    warps = max(1, min(tile.warps, group * tile.tokens * smallest // 256))
    options = {"BLOCK_M": tile.tokens, "PER": heads, "GROUP": group, "STAGES": tile.stages, "num_warps": warps}
    return tile._replace(heads=heads, group=group, warps=warps), options


def _positions(positions: Tensor | None, sequence: int, like: Tensor) -> Tensor:
    if positions is None:
        return torch.arange(like.shape[0], device=like.device) % max(1, sequence)
    return positions


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Like `Tensor.is_set_to`, which knows no meta tensors."""
    same_storage = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same_storage and a.storage_offset() == b.storage_offset() and a.stride() == b.stride()


def _rows(x: Tensor) -> Tensor:
    """`x` [T, heads, D] with every token's numbers contiguous."""
    whole = x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
    return x if whole else x.contiguous()


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    sequence: int | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, int, Tensor | None, Tensor | None]:
    positions, sequence = _check_operands(q, k, cos, sin, positions, sequence)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together; one is None")
    if q_weight is not None and k_weight is not None:
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight.shape != (q.shape[2],):
                raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected ({q.shape[2]},)")
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    return _rows(q), _rows(k), positions, sequence, q_weight, k_weight


def _check_operands(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, sequence: int | None
) -> tuple[Tensor | None, int]:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}; expected [T, N, D] and [T, K, D]")
    if min(q.shape[1:]) == 0 or k.shape[1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: nothing in a row")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, k is {k.dtype}; expected one floating-point dtype")
    _check_tables(cos, sin, q.shape[2], q.dtype)
    tokens = q.shape[0]
    if positions is not None:
        if positions.shape != (tokens,) or positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"positions are {positions.dtype} {tuple(positions.shape)}, expected int32 or int64 ({tokens},)"
            )
        positions = positions.contiguous()
    sequence = tokens if sequence is None else sequence
    if positions is None and not min(tokens, sequence) <= cos.shape[0]:
        raise ValueError(f"sequences of {min(tokens, sequence)} tokens, but the tables end at {cos.shape[0]} positions")
    if sequence < 1 and tokens > 0:
        raise ValueError(f"sequence is {sequence}, expected at least 1")
    return positions, sequence


def _check_tables(cos: Tensor, sin: Tensor, head_dim: int, dtype: torch.dtype) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape or not 1 <= cos.shape[1] <= head_dim // 2:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            f"expected the same [positions, R/2] with 2 <= R <= {head_dim}"
        )
    # fp64 tables only under fp64 operands: under any other they would turn the kernels off.
    if any(table.dtype not in (torch.float32, arithmetic_dtype(dtype)) for table in (cos, sin)):
        raise ValueError(f"cos is {cos.dtype}, sin is {sin.dtype}, expected torch.float32")


def _check_output(name: str, given: Tensor, like: Tensor) -> None:
    if given.shape != like.shape or given.dtype != like.dtype:
        raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, expected {like.dtype} {tuple(like.shape)}")
    tokens, heads, head_dim = given.shape
    whole = given.stride(2) == 1 and (heads == 1 or given.stride(1) == head_dim)
    if not whole or (tokens > 1 and given.stride(0) < heads * head_dim):
        raise ValueError(f"{name} has strides {given.stride()}, expected contiguous rows that do not overlap")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        gemma: bool,
    ) -> tuple[Tensor, Tensor]:
        sequence = q.shape[-3]
        q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
        rope_forward(
            _flat(q),
            _flat(k),
            cos,
            sin,
            positions,
            sequence=sequence,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
            gemma=gemma,
            out=(_flat(q_out), _flat(k_out)),
        )
        kept = (None, None) if q_weight is None else (q, k)
        ctx.save_for_backward(cos, sin, positions, q_weight, k_weight, *kept)
        ctx.sequence, ctx.eps, ctx.gemma = sequence, eps, gemma
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions, q_weight, k_weight, q, k = ctx.saved_tensors
        dq, dk = rope_backward(
            _flat(grad_q),
            _flat(grad_k),
            cos,
            sin,
            positions,
            sequence=ctx.sequence,
            q=None if q is None else _flat(q),
            k=None if k is None else _flat(k),
            q_weight=q_weight,
            k_weight=k_weight,
            eps=ctx.eps,
            gemma=ctx.gemma,
        )
        need_q, need_k = ctx.needs_input_grad[:2]
        rest = (None,) * 7
        return dq.view(grad_q.shape) if need_q else None, dk.view(grad_k.shape) if need_k else None, *rest


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """(q', k'), rotated, and normalised per head before if weights are given; differentiable once in q and k.

    Args:
        q: [..., T, N, D].
        k: [..., T, K, D].
        cos: [P, R/2] fp32, from `rope_table`.
        sin: [P, R/2] fp32.
        positions: [..., T] or [T], int32 or int64; missing: 0 to T - 1 in every sequence. On the CPU they are checked
            against the table; on a device, one that is outside gives NaN.
        q_weight: [D] of the norm, frozen; with `k_weight` or neither.
        k_weight: [D].
        eps: ε of that norm.
        gemma: that norm is Gemma's.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a position on the CPU is outside the table, or a weight wants
            a gradient (this op computes none).
    """
    if q.dim() < 3 or k.dim() < 3 or q.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}; expected [..., T, N, D], [..., T, K, D]")
    if any(weight is not None and weight.requires_grad for weight in (q_weight, k_weight)):
        raise ValueError("the norm's weights are frozen here; a gradient for them was asked for")
    if min(q.shape[-2:]) == 0 or min(k.shape[-2:]) == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: nothing in a row")
    if positions is not None:
        lead = q.shape[:-2]
        if positions.shape not in (lead, lead[-1:]):
            raise ValueError(f"positions have shape {tuple(positions.shape)}, expected {tuple(lead)} or {(lead[-1],)}")
        if positions.device.type == "cpu" and positions.numel() > 0:
            low, high = (int(bound) for bound in torch.aminmax(positions))
            if low < 0 or high >= cos.shape[0]:
                raise ValueError(f"positions go from {low} to {high}, the tables from 0 to {cos.shape[0] - 1}")
        positions = positions.expand(lead).reshape(-1).to(q.device, non_blocking=True)
    result: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin, positions, q_weight, k_weight, eps, gemma)
    return result
