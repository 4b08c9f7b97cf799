"""SwiGLU and GEGLU, with the low-rank products of the layers around them done on the way.

Shapes: gate g, up u, h [T, I], g and u usually the two halves of one [T, 2I]. Optional: A [R, I], the adapter of the
layer that reads h. (The kernels call the width K: linters take a lone I for a 1.)

    forward     h = a(g)∘u
    backward    dh = dh + scale·P A                  P [T, ≥R]: what a GEMM by [W | B] leaves in its last columns
                dg = dh∘u∘a'(g)                      du = dh∘a(g)

    silu        a = g·σ(g)                           a' = σ(g)·(1 + g·(1 - σ(g)))
    gelu        a = g·Φ(g), Φ by erf                 a' = Φ(g) + g·φ(g), φ = exp(-g²/2) / √(2π)
    gelu_tanh   a = g·(1 + tanh t)/2 = g·σ(2t)       a' = σ(2t)·(1 + g·(1 - σ(2t))·2t')
                t = √(2/π)·(g + 0.044715·g³)         t' = √(2/π)·(1 + 3·0.044715·g²)

The gated units are Shazeer's (arXiv 2002.05202), gelu is Hendrycks and Gimpel's (arXiv 1606.08415) with its tanh
approximation; (1 + tanh t)/2 = σ(2t) spares a tanh and, far to the left, the cancellation in 1 + tanh t. Everything is
fp32 and rounded once, at the store: Hugging Face's modules round a(g) as well. Kept for the backward: g and u. h is
rebuilt in the backward's own pass when a buffer is given for it (the adapter's gradient dA = dSᵀ h needs it).

LoRA's columns: given A, `out` is [T, I + p] and its last p columns become scale·h Aᵀ and zeros, so that one GEMM by
[W | B]ᵀ computes the linear layer with its update. The product is taken of h as stored, within the kernel up to the
rank `FUSED_RANK`; beyond it cuBLAS is the better place, and the launcher goes there.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
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

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

# The largest rank that the forward multiplies itself, by bytes per element. fp32 products run without tensor cores.
FUSED_RANK = {2: 128, 4: 16}
# The columns are split until there are this many programs, or this many splits.
_PROGRAMS = 4096
_SPLITS = 16

_SQRT_2_OVER_PI = 0.7978845608028654
_ONE_OVER_SQRT_2 = 0.7071067811865476
_ONE_OVER_SQRT_2_PI = 0.3989422804014327
_CUBIC = 0.044715


def swiglu_reference(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """The definition of correct, differentiable by autograd."""
    wide = arithmetic_dtype(gate.dtype)
    g, u = gate.to(wide), up.to(wide)
    if activation == "silu":
        return (F.silu(g) * u).to(gate.dtype)
    return (F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none") * u).to(gate.dtype)


def _activate_reference(g: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """a(g) and a'(g)."""
    if activation == "silu":
        s = g.sigmoid()
        return g * s, s * (1.0 + g * (1.0 - s))
    if activation == "gelu":
        cdf = 0.5 * (1.0 + (g * _ONE_OVER_SQRT_2).erf())
        return g * cdf, cdf + g * (-0.5 * g * g).exp() * _ONE_OVER_SQRT_2_PI
    s = (2.0 * _SQRT_2_OVER_PI * (g + _CUBIC * g * g * g)).sigmoid()
    slope = 2.0 * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * g * g)
    return g * s, s * (1.0 + g * (1.0 - s) * slope)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a(g) and a'(g)."""
    if ACTIVATION == 1:
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = s + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        if ACTIVATION == 0:
            s = tl.sigmoid(g)
            inner = g * (1.0 - s)
        else:
            s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
            inner = g * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
        slope = s * (1.0 + inner)
    return g * s, slope


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, gate_stride, up_ptr, up_stride, h_ptr, h_stride, T, K,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row_64 = row.to(tl.int64)[:, None]
    mask = (row < T)[:, None] & (col < K)[None, :]
    g = tl.load(gate_ptr + row_64 * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row_64 * up_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    a, _ = _activate(g, ACTIVATION)
    tl.store(h_ptr + row_64 * h_stride + col[None, :], (a * u).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _computed_once(x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """x. The store of h and the product want it in different layouts, and rather than convert it the compiler would
    load and activate everything once for each: exponentials and registers twice. It does not do that past a sum."""
    return tl.sum(tl.join(x, tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)), axis=2)


@triton.jit(do_not_specialize=["splits"])
def _forward_with_product_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, gate_stride, up_ptr, up_stride, h_ptr, h_stride, a_ptr, partial_ptr, T, K, splits,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h, and what one split of the columns adds to h Aᵀ: partial [splits, T, R]."""
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * BLOCK_M + tl.arange(0, BLOCK_M)
    row_64 = row.to(tl.int64)[:, None]
    row_ok = (row < T)[:, None]
    r = tl.arange(0, BLOCK_R)
    if GROUPS == 1:
        product = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    else:
        product = tl.zeros([GROUPS, BLOCK_M, BLOCK_R], dtype=tl.float32)
    span = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    first = split * span
    for start in tl.range(first, tl.minimum(first + span, K), BLOCK_K, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK_K)
        mask = row_ok & (col < K)[None, :]
        g = tl.load(gate_ptr + row_64 * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + row_64 * up_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        a, _ = _activate(g, ACTIVATION)
        h = _computed_once(a * u, BLOCK_M, BLOCK_K).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row_64 * h_stride + col[None, :], h, mask=mask)
        if GROUPS == 1:
            lora_a = tl.load(
                a_ptr + r[None, :] * K + col[:, None], mask=(r < RANK)[None, :] & (col < K)[:, None], other=0.0
            )
            product = tl.dot(h, lora_a, product, input_precision="ieee")
        else:
            # A product this narrow is spread over the warps along its rows and columns, and each warp then reads all of
            # an operand. As a batch each multiplies the columns of its own group.
            group = tl.arange(0, GROUPS)[:, None, None] * (BLOCK_K // GROUPS)
            grouped = start + group + tl.arange(0, BLOCK_K // GROUPS)[None, :, None]
            lora_a = tl.load(
                a_ptr + r[None, None, :] * K + grouped, mask=(r < RANK)[None, None, :] & (grouped < K), other=0.0
            )
            tile = tl.permute(tl.reshape(h, (BLOCK_M, GROUPS, BLOCK_K // GROUPS)), (1, 0, 2))
            product = tl.dot(tile, lora_a, product, input_precision="ieee")
    if GROUPS > 1:
        product = tl.sum(product, axis=0)
    at = partial_ptr + (row_64 + split * T) * RANK + r[None, :]
    tl.store(at, product, mask=row_ok & (r < RANK)[None, :])


@triton.jit
def _add_products_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, h_ptr, h_stride, product_ptr, T, K, scale,
    RANK: tl.constexpr, TAIL: tl.constexpr, SPLITS: tl.constexpr, COPIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """The last TAIL columns of [h | scale·h Aᵀ | 0]: the splits are added one after another."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_64 = row.to(tl.int64)[:, None]
    row_ok = (row < T)[:, None]
    r = tl.arange(0, BLOCK_TAIL)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_TAIL], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (row_64 + split * T) * RANK + r, mask=row_ok & (r < RANK), other=0.0)
    tail = tl.where(r < RANK, total * scale, 0.0).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row_64 * h_stride + K + r, tail, mask=row_ok & (r < TAIL))
    if COPIES:
        tl.store(product_ptr + row_64 * RANK + r, tail, mask=row_ok & (r < RANK))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dh_ptr, dh_stride, p_ptr, p_stride, a_ptr, gate_ptr, gate_stride, up_ptr, up_stride,
    dgate_ptr, dgate_stride, dup_ptr, dup_stride, h_ptr, h_stride, T, K, scale,
    RANK: tl.constexpr, WRITES_H: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row_64 = row.to(tl.int64)[:, None]
    row_ok, col_ok = (row < T)[:, None], (col < K)[None, :]
    mask = row_ok & col_ok
    g = tl.load(gate_ptr + row_64 * gate_stride + col[None, :], mask=mask, other=0.0)
    u = tl.load(up_ptr + row_64 * up_stride + col[None, :], mask=mask, other=0.0)
    dh = tl.load(dh_ptr + row_64 * dh_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        update = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for start in tl.range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            p = tl.load(p_ptr + row_64 * p_stride + r[None, :], mask=row_ok & (r < RANK)[None, :], other=0.0)
            a = tl.load(
                a_ptr + r[:, None].to(tl.int64) * K + col[None, :], mask=(r < RANK)[:, None] & col_ok, other=0.0
            )
            update = tl.dot(p, a, update, input_precision="ieee")
        dh += scale * update
    g = g.to(tl.float32)
    u = u.to(tl.float32)
    a, slope = _activate(g, ACTIVATION)
    dup = (dh * a).to(dup_ptr.dtype.element_ty)
    dgate = (dh * u * slope).to(dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row_64 * dgate_stride + col[None, :], dgate, mask=mask)
    tl.store(dup_ptr + row_64 * dup_stride + col[None, :], dup, mask=mask)
    if WRITES_H:
        tl.store(h_ptr + row_64 * h_stride + col[None, :], (a * u).to(h_ptr.dtype.element_ty), mask=mask)


def _elementwise_tile(width: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_K, num_warps) without products: 16 elements a thread, two 16-byte accesses of 16-bit numbers."""
    block_k = max(16, min(1024, next_power_of_2(width)))
    return max(1, min(16, 4096 // block_k)), block_k, 8


class _TailTile(NamedTuple):
    """How `_forward_with_product` runs: its tile, the batch of its products, and how many programs share a row."""

    block_m: int
    block_k: int
    groups: int
    splits: int
    stages: int
    num_warps: int


def _tail_tile(tokens: int, width: int, rank: int, itemsize: int, shared: int) -> _TailTile:
    """A wide tile of few rows spreads a narrow product over the warps as a batch; with more columns in the product A's
    own traffic counts, and more rows a program read it less often.

    More splits of the columns keep every multiprocessor busy to the end. They are a power of two (each number of them
    is a kernel of its own), and each gets four chunks or more, so that filling the pipeline stays a small part.

    The best of a sweep on an H100, I = 14336: at rank 16 the product then costs nothing beside the plain kernel. Cards
    with less `shared` memory for a program (bytes) get smaller pipelines.
    """
    if itemsize == 4:
        block_m, block_k, groups, stages, num_warps = 16, 64, 1, 2, 8
    elif rank <= 32:
        block_m, block_k, groups, stages, num_warps = 16, 512, 8, 3 if shared >= 200 * 1024 else 2, 8
    elif shared >= 200 * 1024:
        block_m, block_k, groups, stages, num_warps = 32, 128, 4, 3, 4
    else:
        block_m, block_k, groups, stages, num_warps = 64, 64, 1, 3, 8
    splits, row_blocks, chunks = 1, cdiv(tokens, block_m), cdiv(width, block_k)
    while splits < _SPLITS and splits * row_blocks < _PROGRAMS and 8 * splits <= chunks:
        splits *= 2
    return _TailTile(block_m, block_k, groups, splits, stages, num_warps)


def _deferred_tile(itemsize: int, rank: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_K, BLOCK_R, num_warps) of the backward with a product; sizes as for the forward."""
    if itemsize == 4:
        return 16, 64, 16, 8
    block_r = max(16, min(64, next_power_of_2(rank)))
    if rank <= 32:
        return 64, 32, block_r, 4
    return (16, 128, block_r, 4) if rank <= 64 else (64, 64, block_r, 8)


def swiglu_forward(
    gate_TI: Tensor,
    up_TI: Tensor,
    *,
    activation: Activation = "silu",
    out: Tensor | None = None,
    lora_a: Tensor | None = None,
    scale: float = 1.0,
    product_out: Tensor | None = None,
) -> Tensor:
    """h = a(g)∘u [T, I], or with `lora_a` all of [h | scale·h Aᵀ | 0], without autograd.

    Args:
        gate_TI: [T, I].
        up_TI: [T, I].
        activation: "silu", "gelu" or "gelu_tanh".
        out: where h goes: [T, I], or [T, I + p] with `lora_a`, p >= R a multiple of 16. Allocated when missing, with
            the smallest p. Without `lora_a` it may be the memory of gate or up.
        lora_a: A [R, I]: the last p columns of `out` become scale·h Aᵀ and p - R columns of zeros.
        scale: of those columns.
        product_out: where scale·h Aᵀ goes as well, [T, R] contiguous, for a backward that needs nothing else of `out`.

    All other matrices may have any row stride.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the activation is unknown, or an output's memory is not as it
            must be.
    """
    _check_activation(activation)
    gate = operand("gate", gate_TI, (None, None))
    (tokens, width), dtype = gate.shape, gate.dtype
    up = operand("up", up_TI, (tokens, width), dtype)
    h, lora_a = output_with_tail(out, gate, "lora_a", lora_a)
    rank, tail = 0 if lora_a is None else lora_a.shape[0], h.shape[1] - width
    if product_out is not None:
        output("product_out", product_out, (tokens, rank), gate)
        if not product_out.is_contiguous():
            raise ValueError(f"product_out has strides {product_out.stride()}, expected one contiguous piece")
    kernels = runs_kernels(gate, up, lora_a, h, product_out)
    fused = kernels and 0 < rank <= FUSED_RANK.get(dtype.itemsize, 0)
    if not kernels:
        # The backward's formula, so that the h it rebuilds is this one to the bit.
        h[:, :width] = _activate_reference(gate.to(arithmetic_dtype(dtype)), activation)[0] * up
    elif fused:
        tile = _tail_tile(tokens, width, rank, dtype.itemsize, shared_memory(h.device))
        partial = torch.empty(tile.splits, tokens, rank, dtype=torch.float32, device=h.device)
        launch(
            _forward_with_product_kernel, (cdiv(tokens, tile.block_m) * tile.splits,),
            gate, gate.stride(0), up, up.stride(0), h, h.stride(0), lora_a, partial, tokens, width, tile.splits,
            RANK=rank, ACTIVATION=ACTIVATIONS[activation], BLOCK_M=tile.block_m, BLOCK_K=tile.block_k,
            BLOCK_R=max(16, next_power_of_2(rank)), GROUPS=tile.groups, STAGES=tile.stages, num_warps=tile.num_warps,
        )  # fmt: skip
        block_tail = next_power_of_2(tail)
        block_m = max(1, 512 // block_tail)
        launch(
            _add_products_kernel, (cdiv(tokens, block_m),),
            partial, h, h.stride(0), product_out, tokens, width, scale,
            RANK=rank, TAIL=tail, SPLITS=tile.splits, COPIES=product_out is not None,
            BLOCK_M=block_m, BLOCK_TAIL=block_tail, num_warps=4,
        )  # fmt: skip
    else:
        block_m, block_k, num_warps = _elementwise_tile(width)
        launch(
            _forward_kernel, (cdiv(tokens, block_m) * cdiv(width, block_k),),
            gate, gate.stride(0), up, up.stride(0), h, h.stride(0), tokens, width,
            ACTIVATION=ACTIVATIONS[activation], BLOCK_M=block_m, BLOCK_K=block_k, num_warps=num_warps,
        )  # fmt: skip
    if lora_a is not None and not fused:
        write_tail(h, width, lora_a, scale)
        if product_out is not None:
            product_out.copy_(h[:, width : width + rank])
    return h


def swiglu_backward(
    dh_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    *,
    activation: Activation = "silu",
    deferred: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dgate, dup, h), without autograd; h is None unless a buffer is given for it.

    Args:
        dh_TI: [T, I], the gradient of h; with `deferred` it still lacks the low-rank term.
        gate_TI: [T, I].
        up_TI: [T, I].
        activation: as in the forward.
        deferred: (P [T, at least R], A [R, I]): scale·P A is added to dh.
        scale: of that term.
        dgate: where that gradient goes, [T, I]. Allocated when missing.
        dup: where that gradient goes, [T, I]. Allocated when missing.
        h: where the rebuilt h goes, [T, I].

    All matrices may have any row stride. Each of the three outputs may be exactly the memory of one of the three
    inputs: an element is read before it is written, by the same program.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the activation is unknown, or the last dimension of an output
            is not contiguous.
    """
    _check_activation(activation)
    dh = operand("dh", dh_TI, (None, None))
    (tokens, width), dtype = dh.shape, dh.dtype
    gate = operand("gate", gate_TI, (tokens, width), dtype)
    up = operand("up", up_TI, (tokens, width), dtype)
    p, a = low_rank_term("deferred", "P", "A", deferred, dh)
    dgate = output("dgate", dgate, (tokens, width), dh)
    dup = output("dup", dup, (tokens, width), dh)
    if h is not None:
        output("h", h, (tokens, width), dh)
    rank = 0 if a is None else a.shape[0]
    if not runs_kernels(dh, gate, up, p, a, dgate, dup, h):
        wide = arithmetic_dtype(dtype)
        g, u, wide_dh = gate.to(wide), up.to(wide), dh.to(wide)
        if p is not None and a is not None:
            wide_dh = torch.addmm(wide_dh, p[:, :rank].to(wide), a.to(wide), alpha=scale)
        activated, slope = _activate_reference(g, activation)
        # Everything is computed before anything is written: an output may be an input.
        results = (wide_dh * u * slope, wide_dh * activated, activated * u)
        dgate.copy_(results[0])
        dup.copy_(results[1])
        if h is not None:
            h.copy_(results[2])
        return dgate, dup, h
    block_r = 16
    block_m, block_k, num_warps = _elementwise_tile(width)
    if rank > 0:
        block_m, block_k, block_r, num_warps = _deferred_tile(dtype.itemsize, rank)
    launch(
        _backward_kernel, (cdiv(tokens, block_m) * cdiv(width, block_k),),
        dh, dh.stride(0), p, row_stride(p), a, gate, gate.stride(0), up, up.stride(0),
        dgate, dgate.stride(0), dup, dup.stride(0), h, row_stride(h), tokens, width, scale,
        RANK=rank, WRITES_H=h is not None, ACTIVATION=ACTIVATIONS[activation],
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=num_warps,
    )  # fmt: skip
    return dgate, dup, h


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {sorted(ACTIVATIONS)}")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        width = gate.shape[-1]
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        swiglu_forward(gate.reshape(-1, width), up.reshape(-1, width), activation=activation, out=h.view(-1, width))
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        width = gate.shape[-1]
        dgate, dup, _ = swiglu_backward(
            grad_h.reshape(-1, width), gate.reshape(-1, width), up.reshape(-1, width), activation=ctx.activation
        )
        need_gate, need_up, _ = ctx.needs_input_grad
        return dgate.view(gate.shape) if need_gate else None, dup.view(up.shape) if need_up else None, None


def _gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if gate.shape != up.shape or gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}, up {tuple(up.shape)}; expected the same [..., I], I >= 1"
        )
    h: Tensor = _SwiGLU.apply(gate, up, activation)
    return h


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)∘up [..., I], differentiable once in both.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """gelu(gate)∘up [..., I], by the tanh formula or exactly, differentiable once in both.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `approximate` is neither.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate is {approximate!r}, expected 'tanh' or 'none'")
    return _gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")
