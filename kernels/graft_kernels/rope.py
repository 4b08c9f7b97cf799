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

A position outside the table gives NaN in the rotated part, never a read out of bounds. On the host a range can be
checked without waiting for the device only where the positions lie on the CPU: there `rope` does so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft_kernels.launch import launch, next_power_of_2, runs_kernels, tl, triton
from graft_kernels.operands import arithmetic_dtype, output, row_stride


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
    q_out, k_out = (None, None) if out is None else out
    q_out, k_out = output("out's q", q_out, q.shape, q), output("out's k", k_out, k.shape, k)
    if q_weight is not None and (_same_memory(q_out, q_TND) or _same_memory(k_out, k_TKD)):
        raise ValueError("out is the input: with a norm the backward needs q and k as they came in")
    tables = (cos.contiguous(), sin.contiguous())
    if not runs_kernels(q, k, *tables, positions, q_weight, k_weight, q_out, k_out):
        positions = token_positions(positions, sequence, q)
        turned = rope_reference(q, k, cos, sin, positions, q_weight=q_weight, k_weight=k_weight, eps=eps, gemma=gemma)
        return q_out.copy_(turned[0]), k_out.copy_(turned[1])
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
    dq_out, dk_out = (None, None) if out is None else out
    dq_out, dk_out = output("out's dq", dq_out, dq.shape, dq), output("out's dk", dk_out, dk.shape, dk)
    tables = (cos.contiguous(), sin.contiguous())
    if not runs_kernels(dq, dk, *tables, positions, q, k, q_weight, k_weight, dq_out, dk_out):
        c, s = _angles(*tables, token_positions(positions, sequence, dq), arithmetic_dtype(dq.dtype))
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
        dq, dq.stride(0), q, row_stride(q), dq_out, dq_out.stride(0), q_weight,
        dk, dk.stride(0), k, row_stride(k), dk_out, dk_out.stride(0), k_weight,
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


def token_positions(positions: Tensor | None, sequence: int, like: Tensor) -> Tensor:
    """[T]: the given positions, or each token's index modulo `sequence`."""
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
    positions, sequence = check_operands(q, k, cos, sin, positions, sequence)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together; one is None")
    if q_weight is not None and k_weight is not None:
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight.shape != (q.shape[2],):
                raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected ({q.shape[2]},)")
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    return _rows(q), _rows(k), positions, sequence, q_weight, k_weight


def check_operands(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, sequence: int | None
) -> tuple[Tensor | None, int]:
    """(contiguous positions or None, the length of a sequence), after a look at everything.

    Raises:
        ValueError: shapes or dtypes do not fit, or the tables end too early.
    """
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
