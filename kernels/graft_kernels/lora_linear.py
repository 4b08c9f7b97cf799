"""A frozen linear layer with a trained low-rank update, and its backward by hand.

Shapes: x [..., K] seen as [M, K]; W [N, K] frozen, dense or NF4; A [r, K]; B [N, r]; bias [N] frozen; s a number;
m [M, K] the dropout mask, 1 with probability 1 - p; x̃ = m ∘ x / (1 - p), or x without dropout.

    forward     S = x̃ Aᵀ                 y = x Wᵀ + s·S Bᵀ + bias
    backward    dS = s·dY B               dx = dY W + m ∘ (dS A) / (1 - p)
                dA = dSᵀ x̃                dB = s·dYᵀ S

Kept for the backward: x, and nothing else of its size. W is decoded again, and the mask is drawn again from a saved
seed. The seed comes from torch's CPU generator: saving that generator makes a resumed run draw the same masks, and
torch's checkpointing, which rewinds it, recomputes with the same mask.

There are three ways to the same result; `linear_way` names the one that is taken.

    reference   plain PyTorch, five products. On a CPU, and in float64.
    fused       one Triton kernel reads NF4 and multiplies, LoRA included (`fused_linear.py`). For few tokens, where
                launches and the weight's bytes are the cost.
    columns     LoRA inside the library's product, for many tokens, in one of two forms that mirror each other:

        columns     forward     [ x | S ]·[ W | s·B ]ᵀ = y         S comes first; the product is complete
                    backward    dY·[ W | s·B ] = [ dY W | dS ]     dS comes out for nothing; then dx += dS A
        rows        forward     x·[ W ; A ]ᵀ = [ y₀ | S ]          S comes out for nothing; then y = y₀ + S·(s·B)ᵀ
                    backward    [ dY | dS ]·[ W ; A ] = dx         dS comes first; the product is complete

The peers' order has three products and two passes over y and dx. Here each direction has one product, 1 to 2 % longer
than W's own, and one small thing before or after it, which the kernel that writes the operand, or reads the result,
can do on its way: the norm, rope or SwiGLU beside it (`lora_blocks.py`). Alone, as in this file's function, the columns
form copies x beside S, and the rows form passes over y once more: the smaller of the two is taken.

q, k and v, or gate and up, stand above each other in one buffer with a block-diagonal B, and share one product:

                  K          R = Σr, padded to p                             K
            ┌───────────┬────────┐                                     ┌───────────┐
            │   W_q     │ sB_q   │   N_q                               │   W_q     │
            │   W_k     │   sB_k │   N_k      beside it A, [R, K]      │   W_k     │    beside it (s·B)ᵀ, [R, N]
            │   W_v     │    sB_v│   N_v                               │   W_v     │
            └───────────┴────────┘                                     │   A       │   p
                                                                       └───────────┘

The arithmetic runs in x's dtype with fp32 accumulation. A and B may have another dtype (fp32 under bf16): they are cast
for the products, and their gradients come back in their own. No autocast state is read; call with autocast off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft_kernels.dropout import dropout as drop
from graft_kernels.dropout import dropout_mask, keep_tile, threshold
from graft_kernels.fused_linear import fused_backward_dx, fused_forward, fused_supported
from graft_kernels.launch import as_rows, cdiv, launch, next_power_of_2, runs_kernels, tl, triton, tuned
from graft_kernels.nf4 import (
    NF4Weight,
    decode,
    decode_arguments,
    decode_part,
    decode_stacked,
    decodes_in_one_launch,
)

_SEED_BOUND = 2**63 - 1
# Beside W: rows then start at multiples of 128 bytes, and on an H100 the product costs 1 to 2 % more than without the
# columns; with 16, whose rows start anywhere, 2 to 3.5 %. Below W: as few rows as can be, for the result has as many
# columns more, and a product of 6,208 columns falls into more waves than one of 6,192 (5.7 % against 0.7 % at 16k).
_COLUMN_UNIT, _ROW_UNIT = 64, 16
MAX_RANK = 256


class Linear(NamedTuple):
    """One frozen linear layer and its adapter, if it has one."""

    weight: NF4Weight | Tensor
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]


# --- reference -------------------------------------------------------------------------------------------------------


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition of correct: dense `weight`, gradients by autograd. `mask` already holds 0 or 1 / (1 - p)."""
    y = F.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    dropped = x if mask is None else x * mask
    return y + scale * F.linear(F.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))


def _dense(weight: NF4Weight | Tensor, dtype: torch.dtype) -> Tensor:
    return decode(weight, dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in `dtype`. On a card the library writes fp32 from its fp32 accumulator, without rounding in between."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product_(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sums + a·b in place. On a card the library adds its fp32 accumulator to fp32 sums, in the same pass over them."""
    if a.is_cuda and a.dtype != sums.dtype == torch.float32:
        return torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    return sums.add_(product(a, b, sums.dtype))


# --- kernels: forward ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold"])
def _extend_kernel(  # type: ignore[no-untyped-def]
    x, a, out, M, K, R, P, x_stride, a_stride, out_stride, seed, threshold, keep_scale,
    COPY: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """[x | x̃ Aᵀ | 0] for BLOCK_M rows, in one pass over x."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_at = row.to(tl.int64)[:, None]
    r = tl.arange(0, BLOCK_R)
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (row < M)[:, None] & (k < K)[None, :]
        value = tl.load(x + row_at * x_stride + k[None, :], mask=mask, other=0.0)
        if COPY:
            tl.store(out + row_at * out_stride + k[None, :], value, mask=mask)
        if DROPOUT:
            group = start // 4 + tl.arange(0, BLOCK_K // 4)
            kept = keep_tile(row, group, seed, threshold, BLOCK_M, BLOCK_K // 4)
            value = tl.where(kept, value.to(tl.float32) * keep_scale, 0.0).to(value.dtype)
        # S = x̃ Aᵀ
        a_at = a + r[None, :] * a_stride + k[:, None]
        a_tile = tl.load(a_at, mask=(r < R)[None, :] & (k < K)[:, None], other=0.0)
        s = tl.dot(value, a_tile, s, input_precision="ieee")
    out_at = out + row_at * out_stride + K + r[None, :]
    tl.store(out_at, s.to(out.dtype.element_ty), mask=(row < M)[:, None] & (r < P)[None, :])
    if BLOCK_P > BLOCK_R:
        pad = tl.arange(0, BLOCK_P)[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_P), out.dtype.element_ty)
        tl.store(out + row_at * out_stride + K + pad, zeros, mask=(row < M)[:, None] & (pad >= BLOCK_R) & (pad < P))


@triton.jit
def _place_adapters(  # type: ignore[no-untyped-def]
    program, a0, b0, a1, b1, a2, b2, a_out, b_out,
    N0, N1, N2, R0, R1, R2, K, scale, a_stride, a_rows, b_n_stride, b_p_stride, b_columns, b_programs,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s·B of all, block-diagonal, and A of all, one above the other; zero where nothing stands.

    The tiles are small, so that the decoding beside this keeps as many programs on a multiprocessor as it has alone.
    """
    if program < b_programs:
        n = program * BLOCK_N + tl.arange(0, BLOCK_N)
        n1 = n - N0
        n2 = n1 - N1
        for first in tl.range(0, b_columns, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            p1 = p - R0
            p2 = p1 - R1
            mask0 = (n < N0)[:, None] & (p < R0)[None, :]
            mask1 = ((n1 >= 0) & (n1 < N1))[:, None] & ((p1 >= 0) & (p1 < R1))[None, :]
            mask2 = ((n2 >= 0) & (n2 < N2))[:, None] & ((p2 >= 0) & (p2 < R2))[None, :]
            b = tl.load(b0 + n[:, None] * R0 + p[None, :], mask=mask0, other=0.0).to(tl.float32)
            b += tl.load(b1 + n1[:, None] * R1 + p1[None, :], mask=mask1, other=0.0).to(tl.float32)
            b += tl.load(b2 + n2[:, None] * R2 + p2[None, :], mask=mask2, other=0.0).to(tl.float32)
            b_at = b_out + n.to(tl.int64)[:, None] * b_n_stride + p.to(tl.int64)[None, :] * b_p_stride
            mask = (n < N0 + N1 + N2)[:, None] & (p < b_columns)[None, :]
            tl.store(b_at, (b * scale).to(b_out.dtype.element_ty), mask=mask)
    else:
        k = (program - b_programs) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (k < K)[None, :]
        for first in tl.range(0, a_rows, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            r1 = r - R0
            r2 = r1 - R1
            mask1 = ((r1 >= 0) & (r1 < R1))[:, None] & inside
            mask2 = ((r2 >= 0) & (r2 < R2))[:, None] & inside
            a = tl.load(a0 + r[:, None] * K + k[None, :], mask=(r < R0)[:, None] & inside, other=0.0).to(tl.float32)
            a += tl.load(a1 + r1[:, None] * K + k[None, :], mask=mask1, other=0.0).to(tl.float32)
            a += tl.load(a2 + r2[:, None] * K + k[None, :], mask=mask2, other=0.0).to(tl.float32)
            a_at = a_out + r.to(tl.int64)[:, None] * a_stride + k[None, :]
            tl.store(a_at, a.to(a_out.dtype.element_ty), mask=(r < a_rows)[:, None] & inside)


@triton.jit(do_not_specialize=["b_programs"])
def _adapter_kernel(  # type: ignore[no-untyped-def]
    a0, b0, a1, b1, a2, b2, a_out, b_out,
    N0, N1, N2, R0, R1, R2, K, scale, a_stride, a_rows, b_n_stride, b_p_stride, b_columns, b_programs,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _place_adapters(
        tl.program_id(0), a0, b0, a1, b1, a2, b2, a_out, b_out,
        N0, N1, N2, R0, R1, R2, K, scale, a_stride, a_rows, b_n_stride, b_p_stride, b_columns, b_programs,
        BLOCK_N, BLOCK_P, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs0", "programs1", "blocks_per_row", "adapter_programs", "b_programs"])
def _weight_and_adapters_kernel(  # type: ignore[no-untyped-def]
    packed0, absmax0, code2_0, absmax2_0, offset0,
    packed1, absmax1, code2_1, absmax2_1, offset1,
    packed2, absmax_2, code2_2, absmax2_2, offset2,
    code, out, num_blocks0, num_blocks1, num_blocks2, programs0, programs1, start1, start2,
    blocks_per_row, out_stride, adapter_programs,
    a0, b0, a1, b1, a2, b2, a_out, b_out,
    N0, N1, N2, R0, R1, R2, K, scale, a_stride, a_rows, b_n_stride, b_p_stride, b_columns, b_programs,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The adapters, by the first programs, whose loops are then hidden behind the others; those decode the weights."""
    program = tl.program_id(0)
    if program < adapter_programs:
        _place_adapters(
            program, a0, b0, a1, b1, a2, b2, a_out, b_out,
            N0, N1, N2, R0, R1, R2, K, scale, a_stride, a_rows, b_n_stride, b_p_stride, b_columns, b_programs,
            BLOCK_N, BLOCK_P, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        decode_part(
            program - adapter_programs,
            packed0, absmax0, code2_0, absmax2_0, offset0,
            packed1, absmax1, code2_1, absmax2_1, offset1,
            packed2, absmax_2, code2_2, absmax2_2, offset2,
            code, out, num_blocks0, num_blocks1, num_blocks2, programs0, programs1, start1, start2,
            blocks_per_row, out_stride, NESTED, BLOCKSIZE, BLOCKS, TILES, LANES,
        )  # fmt: skip


# --- kernels: backward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold"])
def _low_rank_update_kernel(  # type: ignore[no-untyped-def]
    x, ds, a, out, M, K, R, x_stride, ds_stride, a_stride, out_stride, seed, threshold, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x + m ∘ (dS A) / (1 - p); `out` may be x."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_at = row.to(tl.int64)[:, None]
    update = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        ds_mask = (row < M)[:, None] & (r < R)[None, :]
        ds_tile = tl.load(ds + row_at * ds_stride + r[None, :], mask=ds_mask, other=0.0)
        a_tile = tl.load(a + r[:, None] * a_stride + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        update = tl.dot(ds_tile, a_tile, update, input_precision="ieee")
    if DROPOUT:
        group = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
        kept = keep_tile(row, group, seed, threshold, BLOCK_M, BLOCK_K // 4)
        update = tl.where(kept, update * keep_scale, 0.0)
    mask = (row < M)[:, None] & (k < K)[None, :]
    value = tl.load(x + row_at * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32) + update
    tl.store(out + row_at * out_stride + k[None, :], value.to(out.dtype.element_ty), mask=mask)


# --- launchers -------------------------------------------------------------------------------------------------------


def padded_rank(linears: Sequence[Linear]) -> int:
    """p: how many columns the adapters of these layers take together beside W, or 0 without any."""
    return cdiv(sum(linear.rank for linear in linears), _COLUMN_UNIT) * _COLUMN_UNIT


class Columns(NamedTuple):
    """[W | s·B] [N, K + p] of one to three layers with the same input, and their A, in the compute dtype."""

    weight: Tensor
    padded_a: Tensor  # A [R, K] and zeros, [p, K]
    rank: int  # R, the ranks together

    @property
    def a(self) -> Tensor:
        """A [R, K]."""
        return self.padded_a[: self.rank]


class Rows(NamedTuple):
    """[W ; A] [N + p, K] of one to three layers with the same input, and their s·B transposed, [R, N]."""

    weight: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """R, the ranks together."""
        return self.b.shape[0]


def weight_columns(
    linears: Sequence[Linear],
    scale: float,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    *,
    buffer: Tensor | None = None,
) -> Columns:
    """The buffers of the columns form, in one launch, which decodes and places the adapters beside it.

    With `weight`, a buffer that this function has made before, only the adapters are written anew. `buffer` is flat
    memory of at least `weight_size` elements to make it in.
    """
    N, K, p, rank = _sizes(linears)
    made = _buffer((N, K + p), linears, dtype, buffer) if weight is None else weight
    a = torch.empty(p, K, dtype=dtype, device=made.device)
    _fill(linears, scale, made[:, :K] if weight is None else None, a, made[:, K:])
    return Columns(made, a, rank)


def weight_rows(
    linears: Sequence[Linear],
    scale: float,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    *,
    buffer: Tensor | None = None,
) -> Rows:
    """The buffers of the rows form, as `weight_columns` makes those of the columns form."""
    N, K, _, rank = _sizes(linears)
    p = cdiv(rank, _ROW_UNIT) * _ROW_UNIT
    made = _buffer((N + p, K), linears, dtype, buffer) if weight is None else weight
    b = torch.empty(rank, N, dtype=dtype, device=made.device)
    _fill(linears, scale, made[:N] if weight is None else None, made[N:], b.t())
    return Rows(made, b)


def weight_size(linears: Sequence[Linear]) -> int:
    """Elements of the buffer that `weight_columns` or `weight_rows` makes, whichever is larger."""
    N, K, p, rank = _sizes(linears)
    return max(N * (K + p), (N + cdiv(rank, _ROW_UNIT) * _ROW_UNIT) * K)


def _buffer(shape: tuple[int, int], linears: Sequence[Linear], dtype: torch.dtype, memory: Tensor | None) -> Tensor:
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=linears[0].weight.device)
    return memory[: shape[0] * shape[1]].view(shape)


def _sizes(linears: Sequence[Linear]) -> tuple[int, int, int, int]:
    """N, K, p, R."""
    rank = sum(linear.rank for linear in linears)
    return sum(linear.weight.shape[0] for linear in linears), linears[0].weight.shape[1], padded_rank(linears), rank


def _fill(linears: Sequence[Linear], scale: float, weight: Tensor | None, a: Tensor, b: Tensor) -> None:
    """W of all into weight [N, K], if there is one, A of all into a [R or p, K], s·B of all into b [N, R or p] of any
    strides; zeros in what is left of a and b."""
    placed = sum(linear.rank for linear in linears) > 0
    packed = [linear.weight for linear in linears if isinstance(linear.weight, NF4Weight)]
    kernels = runs_kernels(a, b)
    if weight is not None and len(packed) < len(linears):
        for rows, linear in zip(_row_blocks(weight, linears), linears, strict=True):
            rows.copy_(_dense(linear.weight, weight.dtype))
    elif weight is not None and not (placed and kernels and decodes_in_one_launch(packed)):
        decode_stacked(packed, weight.dtype, weight)
    elif weight is not None:
        runs_kernels(weight, *(part.packed for part in packed))  # refuses operands on several devices
        decode_programs, decode_args, options = decode_arguments(packed, weight)
        programs, args, blocks = _adapter_arguments(linears, scale, a, b)
        launch(
            _weight_and_adapters_kernel, (programs + decode_programs,),
            *decode_args, programs, *args, **options, **blocks,
        )  # fmt: skip
        return
    if placed and kernels:
        programs, args, blocks = _adapter_arguments(linears, scale, a, b)
        launch(_adapter_kernel, (programs,), *args, **blocks, num_warps=4)
    elif placed:
        a.zero_()
        b.zero_()
        start = 0
        for rows, linear in zip(_row_blocks(b, linears), linears, strict=True):
            if linear.lora_a is not None and linear.lora_b is not None:
                end = start + linear.rank
                a[start:end].copy_(linear.lora_a.detach())
                rows[:, start:end].copy_(linear.lora_b.detach() * scale)
                start = end


def _row_blocks(rows: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    blocks: tuple[Tensor, ...] = rows.split([linear.weight.shape[0] for linear in linears])
    return blocks


def _adapter_arguments(
    linears: Sequence[Linear], scale: float, a: Tensor, b: Tensor
) -> tuple[int, list[Any], dict[str, Any]]:
    """How many programs place the adapters, and the arguments and options of the kernel's `_place_adapters`."""
    sizes, ranks = [0, 0, 0], [0, 0, 0]
    given: list[tuple[Tensor, Tensor] | None] = [None] * 3
    for i, linear in enumerate(linears):
        sizes[i], ranks[i] = linear.weight.shape[0], linear.rank
        if linear.lora_a is not None and linear.lora_b is not None:
            given[i] = linear.lora_a.detach().contiguous(), linear.lora_b.detach().contiguous()
    # Where the rank is 0 nothing is read. A tensor of the others' dtype, so that all layers have one compiled kernel.
    unread = next((pair for pair in given if pair is not None), (a, a))
    operands = [operand for pair in given for operand in (pair or unread)]
    blocks = {"BLOCK_N": 16, "BLOCK_P": 32, "BLOCK_R": 8, "BLOCK_K": 64}
    b_programs = cdiv(sum(sizes), blocks["BLOCK_N"])
    strides = a.stride(0), a.shape[0], b.stride(0), b.stride(1), b.shape[1]
    arguments = [*operands, a, b, *sizes, *ranks, a.shape[1], scale, *strides, b_programs]
    return b_programs + cdiv(a.shape[1], blocks["BLOCK_K"]), arguments, blocks


def extend(
    x_MK: Tensor, a_RK: Tensor, p: int, *, out: Tensor | None = None, dropout: float = 0.0, seed: int = 0
) -> Tensor:
    """[x | x̃ Aᵀ | 0], the buffer [M, K + p]. With `out`, whose first K columns are x, only its columns are written."""
    M, K = x_MK.shape
    R = a_RK.shape[0]
    copy = out is None
    if out is None:
        out = torch.empty(M, K + p, dtype=x_MK.dtype, device=x_MK.device)
    if R > 128 or not runs_kernels(x_MK, a_RK, out):
        # More columns than one program's registers hold; the library's product is at its best here.
        if copy:
            out[:, :K].copy_(x_MK)
        torch.mm(drop(x_MK, dropout, seed) if dropout else x_MK, a_RK.t(), out=out[:, K : K + R])
        out[:, K + R :].zero_()
        return out
    block_m, block_k, stages = (16, 256, 4) if M <= 4096 else (32, 128, 4)
    if R > 16 or x_MK.dtype == torch.float32:
        block_m, block_k, stages = 16, 64, 3  # what smaller cards' shared memory holds
    args = (
        x_MK,
        a_RK,
        out,
        M,
        K,
        R,
        p,
        x_MK.stride(0),
        a_RK.stride(0),
        out.stride(0),
        seed,
        threshold(dropout),
        1 / (1 - dropout),
    )
    launch(
        _extend_kernel, (cdiv(M, block_m),), *args,
        COPY=copy, DROPOUT=dropout > 0.0, BLOCK_M=block_m, BLOCK_K=block_k,
        BLOCK_R=max(16, next_power_of_2(R)), BLOCK_P=next_power_of_2(p),
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


def low_rank_update(
    x_MK: Tensor, s_MR: Tensor, c_RK: Tensor, *, out: Tensor | None = None, dropout: float = 0.0, seed: int = 0
) -> Tensor:
    """x + m ∘ (S C) / (1 - p): dx with C = A, or y with S and C = s·Bᵀ. `out` [M, K] may be x itself."""
    M, K = x_MK.shape
    R = c_RK.shape[0]
    if out is None:
        out = torch.empty(M, K, dtype=x_MK.dtype, device=x_MK.device)
    if not runs_kernels(x_MK, s_MR, c_RK, out):
        update = s_MR @ c_RK
        if dropout > 0.0:
            update *= dropout_mask((M, K), dropout, seed, update.device, update.dtype)
        return torch.add(x_MK, update, out=out)
    block_m, block_k, block_r = 64, 128, min(64, max(16, next_power_of_2(R)))
    launch(
        _low_rank_update_kernel, (cdiv(M, block_m), cdiv(K, block_k)),
        x_MK, s_MR, c_RK, out, M, K, R, x_MK.stride(0), s_MR.stride(0), c_RK.stride(0), out.stride(0),
        seed, threshold(dropout), 1 / (1 - dropout),
        DROPOUT=dropout > 0.0, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=8,
    )  # fmt: skip
    return out


# --- autograd --------------------------------------------------------------------------------------------------------


def _forward(
    x_MK: Tensor, linear: Linear, scale: float, dropout: float, seed: int, way: str
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and s·S [M, r] where it was at hand."""
    weight, lora_a, lora_b, bias = linear
    dtype = x_MK.dtype
    if way == "fused":
        assert isinstance(weight, NF4Weight)
        return fused_forward(x_MK, weight, lora_a, lora_b, scale, bias), None
    bias = None if bias is None else bias.to(dtype)
    if lora_a is None or lora_b is None:
        return F.linear(x_MK, _dense(weight, dtype), bias), None
    N, K = weight.shape
    if way == "columns" and N <= K and dropout == 0.0 and bias is None:
        rows = weight_rows((linear,), scale, dtype)
        # x·[W ; A]ᵀ = [y₀ | S]; then y = y₀ + S·(s·B)ᵀ
        y_s = x_MK @ rows.weight.t()
        s_Mr = y_s[:, N : N + linear.rank]
        return low_rank_update(y_s[:, :N], s_Mr, rows.b), s_Mr * scale
    if way == "columns":
        columns = weight_columns((linear,), scale, dtype)
        x_s = extend(x_MK, columns.a, padded_rank((linear,)), dropout=dropout, seed=seed)
        # [x | S]·[W | s·B]ᵀ
        y_MN = F.linear(x_s, columns.weight, bias)
        return y_MN, x_s[:, K : K + linear.rank] * scale
    y_MN = F.linear(x_MK, _dense(weight, dtype), bias)
    s_Mr = (drop(x_MK, dropout, seed) if dropout else x_MK) @ lora_a.to(dtype).t()
    # y += s·S Bᵀ inside the product, in the accumulator's precision, and rounded once
    y_MN.addmm_(s_Mr, lora_b.to(dtype).t(), alpha=scale)
    return y_MN, s_Mr * scale


def _backward(
    dy_MN: Tensor, x_MK: Tensor, s_Mr: Tensor | None, linear: Linear, scale: float, dropout: float, seed: int, way: str,
    need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    weight, lora_a, lora_b, _ = linear
    dtype, r = dy_MN.dtype, linear.rank
    K = weight.shape[1]
    if lora_a is None or lora_b is None:
        if not need_x:
            return None, None, None
        if way == "fused":
            assert isinstance(weight, NF4Weight)
            return fused_backward_dx(dy_MN, weight), None, None
        return dy_MN @ _dense(weight, dtype), None, None

    dropped_MK = x_MK
    if dropout > 0.0 and (need_a or s_Mr is None):
        dropped_MK = drop(x_MK, dropout, seed)
    if s_Mr is None and need_b:
        s_Mr = (dropped_MK @ lora_a.to(dtype).t()) * scale
    # dB = s·dYᵀ S
    grad_b = product(dy_MN.t(), s_Mr, lora_b.dtype) if need_b and s_Mr is not None else None

    grad_x: Tensor | None = None
    ds_Mr: Tensor | None = None
    if need_x and way == "columns":
        columns = weight_columns((linear,), scale, dtype)
        # dY·[W | s·B] = [dY W | dS]; then dx = dY W + m ∘ (dS A) / (1 - p)
        dx_ds = dy_MN @ columns.weight
        grad_x, ds_Mr = dx_ds[:, :K], dx_ds[:, K : K + r]
        low_rank_update(grad_x, ds_Mr, columns.a, out=grad_x, dropout=dropout, seed=seed)
    elif need_x or need_a:
        ds_Mr = (dy_MN @ lora_b.to(dtype)) * scale
        if need_x and way == "fused":
            assert isinstance(weight, NF4Weight)
            grad_x = fused_backward_dx(dy_MN, weight, lora_a, lora_b, scale)
        elif need_x:
            grad_x = dy_MN @ _dense(weight, dtype)
            if dropout > 0.0:
                shape = (x_MK.shape[0], K)
                grad_x.add_((ds_Mr @ lora_a.to(dtype)) * dropout_mask(shape, dropout, seed, x_MK.device, dtype))
            else:
                grad_x.addmm_(ds_Mr, lora_a.to(dtype))
    # dA = dSᵀ x̃
    grad_a = product(ds_Mr.t(), dropped_MK, lora_a.dtype) if need_a and ds_Mr is not None else None
    return grad_x, grad_a, grad_b


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        weight: NF4Weight | Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float,
        seed: int,
        way: str,
    ) -> Tensor:
        x_MK = as_rows(x)
        linear = Linear(weight, lora_a, lora_b, bias)
        y_MN, s_Mr = _forward(x_MK, linear, scale, dropout, seed, way)
        # Without an adapter the backward needs W alone, and x may be freed.
        ctx.save_for_backward(None if lora_a is None else x_MK, s_Mr, lora_a, lora_b)
        ctx.weight, ctx.arguments = weight, (scale, dropout, seed, way)
        return y_MN.view(*x.shape[:-1], y_MN.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, s_Mr, lora_a, lora_b = ctx.saved_tensors
        dy_MN = as_rows(grad_y)
        linear = Linear(ctx.weight, lora_a, lora_b)
        grad_x, grad_a, grad_b = _backward(dy_MN, x_MK, s_Mr, linear, *ctx.arguments, *ctx.needs_input_grad[:3])
        if grad_x is not None:
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
        return grad_x, grad_a, grad_b, None, None, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------


def linear_ways(x: Tensor, weight: NF4Weight | Tensor, rank: int, dropout: float) -> tuple[str, ...]:
    """The ways that are open to these operands; the reference always is."""
    if not isinstance(weight, NF4Weight):
        return ("reference",)
    if dropout == 0.0 and fused_supported(x, weight, rank):
        return ("reference", "columns", "fused")
    return ("reference", "columns")


def linear_way(x: Tensor, weight: NF4Weight | Tensor, rank: int, dropout: float = 0.0) -> str:
    """Which way `lora_linear` takes for x [..., K]: "reference", "fused" or "columns".

    On a card, NF4 weights take the fused kernel for the numbers of tokens for which it was measured to be ahead on this
    card (`tuned.json`: from the first to the last of each range; up to 128 on a card nobody has measured), and the
    extra columns otherwise. A dense weight lies in no buffer with room for columns beside it and takes the library's
    products as they are.
    """
    if not isinstance(weight, NF4Weight) or not runs_kernels(x, weight.packed):
        return "reference"
    ways = linear_ways(x, weight, rank, dropout)
    tokens = x.numel() // x.shape[-1]
    ranges = tuned("lora_linear", x.device).get("fused", [[0, 128]])
    if "fused" in ways and any(first <= tokens <= last for first, last in ranges):
        return "fused"
    return "columns"


def check_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> None:
    """Raises ValueError with what does not fit."""
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {in_features}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b come together; one is None")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, in_features) or lora_b.shape != (out_features, rank):
            raise ValueError(
                f"the adapter is A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}; "
                f"expected A [r, {in_features}], B [{out_features}, r]"
            )
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"the rank is {rank}, expected 1 to {MAX_RANK}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
    if (isinstance(weight, Tensor) and weight.requires_grad) or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are frozen here; a gradient for them was asked for")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected 0 <= p < 1")


def draw_seed(dropout: float) -> int:
    """A new seed for a dropout mask, or 0 where nothing is dropped."""
    return int(torch.randint(_SEED_BOUND, (), device="cpu").item()) if dropout > 0.0 else 0


def lora_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    way: str | None = None,
) -> Tensor:
    """y [..., N] = x Wᵀ + scale·(drop(x) Aᵀ) Bᵀ + bias, differentiable once in x, A and B.

    Without `lora_a` and `lora_b` it is the frozen linear layer alone. Give `dropout` 0 outside training. `way`
    overrides the choice of `linear_way`.

    Raises:
        ValueError: shapes do not fit, one of A and B is missing, the rank is not 1 to 256, the weight or the bias wants
            a gradient (this layer computes none), `dropout` is outside [0, 1), or these operands cannot go that `way`.
    """
    check_linear(x, weight, lora_a, lora_b, bias, dropout)
    rank = 0 if lora_a is None else lora_a.shape[0]
    if way is None:
        way = linear_way(x, weight, rank, dropout)
    elif way not in linear_ways(x, weight, rank, dropout):
        raise ValueError(f"the way {way!r} is not open to these operands on {x.device}")
    seed = draw_seed(dropout) if rank else 0
    y: Tensor = _LoraLinear.apply(x, lora_a, lora_b, weight, bias, scale, dropout, seed, way)
    return y
