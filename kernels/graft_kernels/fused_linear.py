"""A QLoRA linear layer for few tokens: NF4 decoding, the product and both LoRA products in one kernel.

Shapes: x, dy, y, dx are [M, K] or [M, N]; W [N, K] in NF4 with blocks of 64; A [r, K]; B [N, r]; bias [N]; s a number.

    forward     S = x Aᵀ          y  = x Wᵀ + s·S Bᵀ + bias
    backward    dS = s·dy B       dx = dy W + dS A

Both are one shape of work: a reduction with the decoded weight, and a low-rank product that shares its operand. So one
kernel does both; O is the side that comes out (N forward, K backward), R the side that is summed over (K, N):

    out[m, o] = Σ_R in[m, R]·W[o, R] + s·(Σ_R in[m, R]·down[j, R]) · up[o, j]

A weight is decoded where it is used, so it costs 0.516 bytes of memory traffic instead of the 4.5 of "decode, write,
read again". Every tile of M decodes again: this wins as long as M is a few tiles. The decoded values are those of
`graft_kernels.nf4.decode` to the last bit (two roundings, no fused multiply-add: `enable_fp_fusion=False`), products
run in the input's dtype with fp32 sums, s·S and dS are rounded to the input's dtype, and the result is rounded once.

How the kernel is laid out, and why:
  - eight nibbles of a 32-bit word are unpacked with `tl.join`, which keeps the eight in the thread that loaded the
    word: no byte loads, constant shifts, and the weight's own order, so that x needs no permutation;
  - on Hopper, where it was measured, the sixteen code values lie in the lanes of a warp, and a shuffle fetches one
    (`nf4.looked_up`); elsewhere they lie in shared memory (`tl.gather`): any mix of sixteen words is free of bank
    conflicts, and on consumer cards shuffles would spill registers;
  - scales are decoded once per block of 64 and step, from indices that were loaded a step earlier;
  - `transposed` puts the weight on the tensor core's M side (64 wide at least) and the tokens on its N side (16 and
    up); otherwise the tokens are on the M side;
  - `splits` > 1 cuts the reduction to fill the card: partial sums go to fp32 workspaces and a second kernel adds them
    in a fixed order, so that every run gives the same bits. S is then made by programs of its own in the first launch.
Nothing is kept for a backward; this file has no autograd, its caller has.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from graft_kernels.fused_hopper import BLOCK_O, TILES_M, Product, fused_hopper
from graft_kernels.launch import (
    INTERPRETED,
    KERNEL_DTYPES,
    cdiv,
    is_hopper,
    launch,
    next_power_of_2,
    runs_kernels,
    shared_memory,
    tl,
    triton,
)
from graft_kernels.nf4 import NF4Weight, code_by_lane, code_table, decode, looked_up

BLOCKSIZE = 64
MAX_RANK = 256
# Above this rank a copy of S in every program costs more than one library product before the kernel.
MAX_INLINE_RANK = 64
# Rank is walked through in chunks of this many where S is multiplied by the up factor: it bounds the shared memory.
_RANK_CHUNK = 64
_REDUCE_BLOCK_O = 128
# The kernel of `fused_hopper.py`: from how many elements of a weight on it serves up to 256 tokens; and how many
# programs run at a time on the card that it was measured on.
_LARGE_WEIGHT = {"forward": 20_000_000, "backward": 30_000_000}
_MULTIPROCESSORS = 132


@dataclass(frozen=True, kw_only=True)
class FusedConfig:
    """How one fused product is cut. `block_o` counts outputs, `block_r` elements of the reduction.

    Forward needs block_r, backward block_o, as a multiple of 64 (the side along K, where a scale covers 64).
    """

    block_m: int = 16
    block_o: int = 64
    block_r: int = 128
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1
    transposed: bool = True
    inline: bool = True  # S inside the same launch; False: a library product before it
    scales_shared: bool = True  # the second level's 256 values are looked up in shared memory, not through the L1
    max_registers: int | None = None  # per thread: fewer let more programs share a multiprocessor
    hopper: bool = False  # the kernel of `fused_hopper.py`; of all else it takes `block_m`, of TILES_M, and `programs`
    programs: int = 0  # so many share all tiles' steps equally; 0: a program takes a tile


def fused_linear_reference(
    x_MK: Tensor,
    weight: NF4Weight,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition of correct, in x's dtype; the backward's is its derivative."""
    y_MN = torch.nn.functional.linear(x_MK, decode(weight, x_MK.dtype), bias)
    if lora_a is None or lora_b is None:
        return y_MN
    return y_MN + scale * (x_MK @ lora_a.to(x_MK.dtype).t()) @ lora_b.to(x_MK.dtype).t()


@triton.jit
def _unpack(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nibbles of all words in the low bits of [ROWS, COLUMNS], in memory order: bytes rising, high nibble first."""
    halves = tl.join(words, words >> 16)
    quarters = tl.join(halves, halves >> 8)
    nibbles = tl.join(quarters >> 4, quarters)
    return tl.reshape(nibbles, (ROWS, COLUMNS))


@triton.jit
def _low_rank(  # type: ignore[no-untyped-def]
    acc, s, up_ptr, o, m, out_size, M, stride_uo, stride_uj, s_ptr, stride_s,
    RANK: tl.constexpr, CHUNK: tl.constexpr, GIVEN: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + S · upᵀ, with S (scaled and rounded) from registers or from memory. Summed in place: a second tile of
    acc's size would not fit the registers."""
    for j0 in tl.static_range(0, RANK, CHUNK):
        j = j0 + tl.arange(0, CHUNK)
        if TRANSPOSED:
            up = tl.load(up_ptr + o[:, None].to(tl.int64) * stride_uo + j[None, :] * stride_uj,
                         mask=(o < out_size)[:, None] & (j < RANK)[None, :], other=0.0).to(DTYPE)  # fmt: skip
            if GIVEN:
                s = tl.load(s_ptr + m[None, :] * stride_s + j[:, None],
                            mask=(m < M)[None, :] & (j < RANK)[:, None], other=0.0)  # fmt: skip
            acc = tl.dot(up, s, acc, input_precision="ieee")
        else:
            up = tl.load(up_ptr + o[None, :].to(tl.int64) * stride_uo + j[:, None] * stride_uj,
                         mask=(o < out_size)[None, :] & (j < RANK)[:, None], other=0.0).to(DTYPE)  # fmt: skip
            if GIVEN:
                s = tl.load(s_ptr + m[:, None] * stride_s + j[None, :],
                            mask=(m < M)[:, None] & (j < RANK)[None, :], other=0.0)  # fmt: skip
            acc = tl.dot(s, up, acc, input_precision="ieee")
    return acc


@triton.jit
def _fused_linear_kernel(  # type: ignore[no-untyped-def]
    in_ptr, words_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, down_ptr, up_ptr, s_ptr, bias_ptr,
    out_ptr, s_out_ptr,
    M, N, K, stride_in, stride_out, stride_dj, stride_dr, stride_uo, stride_uj, stride_s, scale, steps_per_split,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, CHUNK: tl.constexpr, INLINE: tl.constexpr, BACKWARD: tl.constexpr,
    NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, EVEN_O: tl.constexpr, EVEN_R: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, SCALES_SHARED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = in_ptr.dtype.element_ty
    # The tiles of M are neighbours in the grid: they decode the same weights, which the L2 then reads once.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_o = tl.program_id(1)
    split = tl.program_id(2)
    o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    if BACKWARD:
        out_size = K
        sum_size = N
    else:
        out_size = N
        sum_size = K
    begin = split * steps_per_split * BLOCK_R
    end = tl.minimum(sum_size, begin + steps_per_split * BLOCK_R)
    if TRANSPOSED:
        in_ptrs = in_ptr + m[None, :] * stride_in + r[:, None]
        m_mask = (m < M)[None, :]
    else:
        in_ptrs = in_ptr + m[:, None] * stride_in + r[None, :]
        m_mask = (m < M)[:, None]
    if SPLITS > 1 and RANK > 0:
        # The last programs along O have no weight to decode: they make this split's share of S, a chunk of ranks each.
        chunk = pid_o - tl.num_programs(1) + (RANK + CHUNK - 1) // CHUNK
        if chunk >= 0:
            i = chunk * CHUNK + tl.arange(0, CHUNK)
            share = tl.zeros((BLOCK_M, CHUNK), tl.float32)
            for r0 in tl.range(begin, end, BLOCK_R, num_stages=STAGES):
                r_mask = r < end - r0
                x = tl.load(in_ptr + m[:, None] * stride_in + (r0 + r)[None, :],
                            mask=(m < M)[:, None] & r_mask[None, :], other=0.0)  # fmt: skip
                down = tl.load(down_ptr + i[None, :] * stride_dj + (r0 + r)[:, None].to(tl.int64) * stride_dr,
                               mask=(i < RANK)[None, :] & r_mask[:, None], other=0.0)  # fmt: skip
                share = tl.dot(x, down.to(dtype), share, input_precision="ieee")
            s_out_ptrs = s_out_ptr + (split * M + m)[:, None] * RANK + i[None, :]
            tl.store(s_out_ptrs, share, mask=(m < M)[:, None] & (i < RANK)[None, :])
            return
    j = tl.arange(0, RANK_BLOCK)

    # The weight's tile is [ROWS, COLUMNS] in memory order, whichever of the two sides is summed over.
    ROWS: tl.constexpr = BLOCK_R if BACKWARD else BLOCK_O
    COLUMNS: tl.constexpr = BLOCK_O if BACKWARD else BLOCK_R
    BLOCKS: tl.constexpr = COLUMNS // 64
    if BACKWARD:
        row = begin + tl.arange(0, ROWS)
        column0 = pid_o * COLUMNS
        word_step = BLOCK_R * (K // 8)
        scale_step = BLOCK_R * (K // 64)
    else:
        row = pid_o * ROWS + tl.arange(0, ROWS)
        column0 = begin
        word_step = BLOCK_R // 8
        scale_step = BLOCK_R // 64
    word_column = column0 // 8 + tl.arange(0, COLUMNS // 8)
    block_column = column0 // 64 + tl.arange(0, BLOCKS)
    words_ptrs = words_ptr + row[:, None] * (K // 8) + word_column[None, :]
    block = row[:, None] * (K // 64) + block_column[None, :]

    codes = code_by_lane(code_ptr, M, LANES) if LANES else tl.load(code_ptr + tl.arange(0, 16))
    if NESTED:
        table2 = tl.load(code2_ptr + tl.arange(0, 256))
        offset = tl.load(offset_ptr)
        next_mask = (row < N)[:, None] & (block_column < K // 64)[None, :]
        index2 = tl.load(absmax_ptr + block, mask=next_mask, other=0)
        scale2 = tl.load(absmax2_ptr + (block >> 8), mask=next_mask, other=0.0)

    if TRANSPOSED:
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        s = tl.zeros((RANK_BLOCK, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        s = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)

    for r0 in tl.range(begin, end, BLOCK_R, num_stages=STAGES):
        r_left = sum_size - r0
        if BACKWARD:
            row_mask = (tl.arange(0, ROWS) < r_left)[:, None]
            word_mask = (word_column < K // 8)[None, :]
            block_mask = (block_column < K // 64)[None, :]
        else:
            row_mask = (row < N)[:, None]
            word_mask = (tl.arange(0, COLUMNS // 8) < r_left // 8)[None, :]
            block_mask = (tl.arange(0, BLOCKS) < r_left // 64)[None, :]
        words = tl.load(words_ptrs) if EVEN_O and EVEN_R else tl.load(words_ptrs, mask=row_mask & word_mask, other=0)
        if EVEN_R:
            x = tl.load(in_ptrs + r0, mask=m_mask, other=0.0)
        elif TRANSPOSED:
            x = tl.load(in_ptrs + r0, mask=m_mask & (r < r_left)[:, None], other=0.0)
        else:
            x = tl.load(in_ptrs + r0, mask=m_mask & (r < r_left)[None, :], other=0.0)

        if NESTED:
            # Two statements, two roundings.
            if SCALES_SHARED:
                flat = tl.reshape(index2, (ROWS * BLOCKS,)).to(tl.int32)
                scaled = tl.reshape(tl.gather(table2, flat, 0), (ROWS, BLOCKS)) * scale2
            else:
                scaled = tl.load(code2_ptr + index2.to(tl.int32)) * scale2
            absmax = scaled + offset
            block += scale_step
            if BACKWARD:
                next_mask = (tl.arange(0, ROWS) < r_left - BLOCK_R)[:, None] & block_mask
            else:
                next_mask = row_mask & (tl.arange(0, BLOCKS) < (r_left - BLOCK_R) // 64)[None, :]
            index2 = tl.load(absmax_ptr + block, mask=next_mask, other=0)
            scale2 = tl.load(absmax2_ptr + (block >> 8), mask=next_mask, other=0.0)
        else:
            absmax = tl.load(absmax_ptr + block, mask=row_mask & block_mask, other=0.0)
            block += scale_step

        code = _unpack(words, ROWS, COLUMNS)
        code = looked_up(codes, code, LANES) if LANES else tl.gather(codes, tl.reshape(code & 15, (ROWS * COLUMNS,)), 0)
        w = tl.reshape(tl.reshape(code, (ROWS, BLOCKS, 64)) * absmax[:, :, None], (ROWS, COLUMNS)).to(dtype)
        if BACKWARD == TRANSPOSED:
            w = tl.trans(w)
        acc = tl.dot(w, x, acc, input_precision="ieee") if TRANSPOSED else tl.dot(x, w, acc, input_precision="ieee")

        if RANK > 0 and INLINE and SPLITS == 1:
            if TRANSPOSED:
                down = tl.load(down_ptr + j[:, None] * stride_dj + (r0 + r)[None, :].to(tl.int64) * stride_dr,
                               mask=(j < RANK)[:, None] & (r < r_left)[None, :], other=0.0)  # fmt: skip
                s = tl.dot(down.to(dtype), x, s, input_precision="ieee")
            else:
                down = tl.load(down_ptr + j[None, :] * stride_dj + (r0 + r)[:, None].to(tl.int64) * stride_dr,
                               mask=(j < RANK)[None, :] & (r < r_left)[:, None], other=0.0)  # fmt: skip
                s = tl.dot(x, down.to(dtype), s, input_precision="ieee")
        words_ptrs += word_step

    if SPLITS > 1:
        out_ptr += split.to(tl.int64) * M * out_size
    elif RANK > 0:
        low = (s * scale).to(dtype)
        acc = _low_rank(acc, low, up_ptr, o, m, out_size, M, stride_uo, stride_uj, s_ptr, stride_s,
                        RANK, RANK_BLOCK if INLINE else CHUNK, not INLINE, TRANSPOSED, dtype)  # fmt: skip
    if HAS_BIAS and SPLITS == 1:
        bias = tl.load(bias_ptr + o, mask=o < out_size, other=0.0).to(tl.float32)
        if TRANSPOSED:
            acc += bias[:, None]
        else:
            acc += bias[None, :]
    if TRANSPOSED:
        acc = tl.trans(acc)
    out_mask = (m < M)[:, None] & (o < out_size)[None, :]
    tl.store(out_ptr + m[:, None] * stride_out + o[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _fused_reduce_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, s_ptr, up_ptr, bias_ptr, out_ptr, M, out_size, stride_out, stride_uo, stride_uj, scale,
    RANK: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    out_mask = (m < M)[:, None] & (o < out_size)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + (split * M + m)[:, None] * out_size + o[None, :], mask=out_mask, other=0.0)
    for j0 in tl.static_range(0, RANK, CHUNK):
        j = j0 + tl.arange(0, CHUNK)
        s = tl.zeros((BLOCK_M, CHUNK), tl.float32)
        s_mask = (m < M)[:, None] & (j < RANK)[None, :]
        for split in tl.static_range(SPLITS):
            s += tl.load(s_ptr + (split * M + m)[:, None] * RANK + j[None, :], mask=s_mask, other=0.0)
        up = tl.load(up_ptr + o[None, :].to(tl.int64) * stride_uo + j[:, None] * stride_uj,
                     mask=(o < out_size)[None, :] & (j < RANK)[:, None], other=0.0).to(dtype)  # fmt: skip
        acc = tl.dot((s * scale).to(dtype), up, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o, mask=o < out_size, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + m[:, None] * stride_out + o[None, :], acc.to(dtype), mask=out_mask)


def fused_config(
    m: int, n: int, k: int, rank: int, direction: str, *, wide: bool = True, hopper: bool = False
) -> FusedConfig:
    """The cut for M tokens and a weight [N, K]; `direction` is "forward" or "backward".

    From sweeps on an H100 over the four linear shapes of an 8B model, rank 16. Small tiles want several programs on a
    multiprocessor, which hide each other's waits; tiles of 256 tokens fill one each. Not `wide`: without those, which
    spill registers on cards other than the H100's kind. `hopper`: on a card of that kind, with operands that the kernel
    of `fused_hopper.py` takes: it is ahead from 129 tokens on; for small weights, whose tiles are too few to fill the
    card, from 257 on.
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction is {direction!r}, expected 'forward' or 'backward'")
    out_size, sum_size = (n, k) if direction == "forward" else (k, n)
    if hopper and m > 128 and (m > 256 or n * k >= _LARGE_WEIGHT[direction]):
        return _hopper_config(m, out_size, sum_size)
    inline = rank <= MAX_INLINE_RANK
    block_m = min(256, max(16, next_power_of_2(max(m, 1))))
    if sum_size % 64 != 0:
        block_m = min(block_m, 32)  # masks along the reduction cost registers
    if block_m == 256 and (rank > 16 or not wide):
        block_m = 128  # a wider S would not fit beside the sums
    narrow = block_m <= 64 or (block_m == 128 and direction == "forward" and m <= 128)
    block_o, num_warps, wanted = (64, 4, 512) if narrow else (128, 8, 132)
    block_r = 128 if block_m <= 64 and sum_size % 128 == 0 else 64
    programs = cdiv(out_size, block_o) * cdiv(max(m, 1), block_m)
    splits = 1
    while splits < 8 and programs * splits < wanted and sum_size // (splits * 2) >= 1024:
        splits *= 2
    stages, registers = 3, None
    if hopper and 32 < m <= 128 and rank <= 16 and out_size % block_o == 0:
        # Room for one program more on a multiprocessor: 7 to 16 %, the spilling of some registers included.
        registers = 128
        stages = 2 if block_m == 64 else {"forward": 3, "backward": 4}[direction]
    return FusedConfig(
        block_m=block_m,
        block_o=block_o,
        block_r=block_r,
        num_warps=num_warps,
        num_stages=stages,
        splits=splits,
        inline=inline,
        max_registers=registers,
    )


@functools.cache
def _hopper_config(m: int, out_size: int, sum_size: int) -> FusedConfig:
    """The cut whose time is predicted to be least, in microseconds.

    From a sweep on an H200: of a step of 64, by the tokens of a tile; of leaving and adding a tile's parts, the more
    programs share it the longer; and of waiting for each other, where tiles begin at different places in the programs'
    stretches.
    """
    steps = sum_size // 64
    cuts = {}
    for tile_m, step_us in zip(TILES_M, (0.8, 1.0, 1.1), strict=True):
        tiles = cdiv(m, tile_m) * cdiv(out_size, BLOCK_O)
        total = tiles * steps
        cuts[tile_m, 0] = step_us * steps * cdiv(tiles, _MULTIPROCESSORS)
        for programs in (_MULTIPROCESSORS, 128, 96, 64):
            if programs > total:
                continue
            ends = [i * total // programs for i in range(programs + 1)]
            touched = (range(begin // steps, (end - 1) // steps + 1) for begin, end in itertools.pairwise(ends))
            sharing = max(Counter(itertools.chain.from_iterable(touched)).values())
            cuts[tile_m, programs] = step_us * total / programs + 8.0 + 4.0 * max(sharing - 2, 0) * tile_m / 256
            if programs % tiles and tiles % programs:
                cuts[tile_m, programs] += 20.0
    tile_m, programs = min(cuts, key=lambda cut: cuts[cut])
    return FusedConfig(hopper=True, block_m=tile_m, programs=programs)


def _hopper_takes(in_: Tensor, sum_size: int) -> bool:
    """Whether the kernel of `fused_hopper.py` takes this input [M, R]: it copies tiles that begin at 16 bytes, and sums
    over whole steps of 64."""
    return (
        is_hopper(in_.device)
        and in_.dtype in (torch.float16, torch.bfloat16)
        and sum_size % 64 == 0
        and in_.stride(0) % 8 == 0
        and in_.data_ptr() % 16 == 0
    )


def fused_supported(x: Tensor, weight: NF4Weight, rank: int = 0) -> bool:
    """Whether the fused kernels take these operands; if not, the caller decodes and multiplies.

    They want blocks of 64 that never straddle two rows, 16-byte aligned bytes, 16-bit inputs (fp32 would leave the
    tensor cores; the interpreter does not mind) and a rank up to 256.
    """
    return (
        runs_kernels(x, weight.packed)
        and (INTERPRETED or x.dtype in (torch.float16, torch.bfloat16))
        and weight.blocksize == BLOCKSIZE
        and weight.shape[1] % BLOCKSIZE == 0
        and weight.packed.is_contiguous()
        and weight.packed.storage_offset() % 16 == 0
        and weight.numel < 2**34
        and 0 <= rank <= MAX_RANK
    )


def _fused(
    direction: str,
    in_: Tensor,
    weight: NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    bias: Tensor | None,
    config: FusedConfig | None,
    out: Tensor | None,
) -> Tensor:
    backward = direction == "backward"
    n, k = weight.shape
    out_size, sum_size = (k, n) if backward else (n, k)
    name = "dy" if backward else "x"
    if in_.ndim != 2 or in_.shape[1] != sum_size:
        raise ValueError(f"{name} has shape {tuple(in_.shape)}, expected [M, {sum_size}] for a weight [{n}, {k}]")
    if in_.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name} is {in_.dtype}, expected fp32, fp16 or bf16")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b come together; one is None")
    rank = 0
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, k) or lora_b.shape != (n, rank):
            raise ValueError(
                f"the adapter is A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}; expected A [r, {k}], B [{n}, r]"
            )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({n},)")
    if not fused_supported(in_, weight, rank):
        raise ValueError(
            f"no fused kernel for {in_.dtype} on {in_.device}, a weight {tuple(weight.shape)} in blocks of "
            f"{weight.blocksize} and rank {rank}; ask fused_supported() first"
        )
    m = in_.shape[0]
    if out is None:
        out = in_.new_empty(m, out_size)
    elif out.shape != (m, out_size) or out.dtype != in_.dtype or out.stride(-1) != 1:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}, expected {(m, out_size)} {in_.dtype}, rows contiguous"
        )
    if in_.stride(-1) != 1:
        in_ = in_.contiguous()
    if m == 0:
        return out

    hopper = _hopper_takes(in_, sum_size)
    cut = config
    if cut is None:
        wide = shared_memory(in_.device) >= 200 * 1024
        cut = fused_config(m, n, k, rank, direction, wide=wide, hopper=hopper)
    elif cut.hopper and not hopper:
        raise ValueError(
            f"the Hopper kernel does not take {in_.dtype} with row stride {in_.stride(0)} on {in_.device} and a sum "
            f"over {sum_size}"
        )
    if cut.hopper and cut.block_m not in TILES_M:
        raise ValueError(f"the Hopper kernel's block_m is {cut.block_m}, expected one of {TILES_M}")
    along_k = cut.block_o if backward else cut.block_r
    if along_k % BLOCKSIZE != 0:
        raise ValueError(f"the block along K is {along_k}, expected a multiple of {BLOCKSIZE}")
    down_jR, up_Oj = lora_a, lora_b
    if backward and lora_a is not None and lora_b is not None:
        down_jR, up_Oj = lora_b.t(), lora_a.t()
    product = Product(in_, weight, down_jR, up_Oj, scale, bias, out, backward)
    if cut.hopper:
        fused_hopper(product, cut.block_m, cut.programs)
    else:
        _launch(cut, product)
    return out


def _launch(cut: FusedConfig, product: Product) -> None:
    in_, weight, down_jR, up_Oj, scale, bias, out, backward = product
    (m, sum_size), out_size, (n, k) = in_.shape, out.shape[1], weight.shape
    steps = cdiv(sum_size, cut.block_r)
    steps_per_split = cdiv(steps, cut.splits)
    splits = cdiv(steps, steps_per_split)  # no split is left without work
    inline = cut.inline or splits > 1
    rank, s, s_partial, stride_s = 0, None, None, 0
    stride_down: tuple[int, ...] = (0, 0)
    stride_up: tuple[int, ...] = (0, 0)
    if down_jR is not None and up_Oj is not None:
        rank, stride_down, stride_up = down_jR.shape[0], down_jR.stride(), up_Oj.stride()
        if splits > 1:
            s_partial = in_.new_empty(splits, m, rank, dtype=torch.float32)
        elif not inline:
            s = torch.addmm(in_.new_empty(1), in_, down_jR.t().to(in_.dtype), beta=0, alpha=scale)
            stride_s = s.stride(0)
    rank_block = max(16, next_power_of_2(max(rank, 1)))
    target = out if splits == 1 else in_.new_empty(splits, m, out_size, dtype=torch.float32)
    chunk = min(_RANK_CHUNK, rank_block)
    extra = cdiv(rank, chunk) if splits > 1 else 0
    launch(
        _fused_linear_kernel,
        (cdiv(m, cut.block_m), cdiv(out_size, cut.block_o) + extra, splits),
        in_, _words(weight), weight.absmax, code_table(in_.device), weight.code2, weight.absmax2, weight.offset,
        down_jR, up_Oj, s, bias, target, s_partial,
        m, n, k, in_.stride(0), target.stride(-2), *stride_down, *stride_up, stride_s,
        float(scale), steps_per_split,
        RANK=rank, RANK_BLOCK=rank_block if inline and splits == 1 else 16, CHUNK=chunk, INLINE=inline,
        BACKWARD=backward,
        NESTED=weight.code2 is not None, HAS_BIAS=bias is not None, SPLITS=splits, EVEN_O=out_size % cut.block_o == 0,
        EVEN_R=sum_size % cut.block_r == 0, TRANSPOSED=cut.transposed, BLOCK_M=cut.block_m, BLOCK_O=cut.block_o,
        BLOCK_R=cut.block_r, STAGES=cut.num_stages, SCALES_SHARED=cut.scales_shared, LANES=is_hopper(in_.device),
        num_warps=cut.num_warps, num_stages=cut.num_stages, maxnreg=cut.max_registers, enable_fp_fusion=False,
    )  # fmt: skip
    if splits > 1:
        block_m = 16
        launch(
            _fused_reduce_kernel,
            (cdiv(m, block_m), cdiv(out_size, _REDUCE_BLOCK_O)),
            target, s_partial, up_Oj, bias, out, m, out_size, out.stride(0), *stride_up, float(scale),
            RANK=rank, CHUNK=chunk, SPLITS=splits, HAS_BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_O=_REDUCE_BLOCK_O, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _words(weight: NF4Weight) -> Tensor:
    return weight.packed.view(-1).view(torch.int32)


def fused_forward(
    x_MK: Tensor,
    weight: NF4Weight,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    config: FusedConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] = x Wᵀ + scale·(x Aᵀ) Bᵀ + bias, in x's dtype; A and B may have another one and are cast.

    One launch; one more where the reduction is split, and one where S comes first: for ranks above 64, and on Hopper.

    Raises:
        ValueError: shapes do not fit, one of A and B is missing, or `fused_supported` says no.
    """
    return _fused("forward", x_MK, weight, lora_a, lora_b, scale, bias, config, out)


def fused_backward_dx(
    dy_MN: Tensor,
    weight: NF4Weight,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    *,
    config: FusedConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dx [M, K] = dy W + scale·(dy B) A, in dy's dtype; A and B may have another one and are cast.

    Launches and errors are those of `fused_forward`.
    """
    return _fused("backward", dy_MN, weight, lora_a, lora_b, scale, None, config, out)
