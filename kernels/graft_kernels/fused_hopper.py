"""The fused product of `fused_linear.py` on Hopper's tensor cores, for some hundred tokens.

Shapes and mathematics are `fused_linear.py`'s: out[m, o] = Σ_R in[m, R]·W[o, R] + S[m, j]·up[o, j] (+ bias[o]), with
W decoded where it is used. S [M, r] is made by a launch before, in parts of the reduction; here the parts are added,
scaled and rounded.

From some 150 tokens on, the product takes longer than the weight's bytes, and what decides is whether decoding happens
beside the tensor cores or before them. `tl.dot` waits for its result in every step, because the decoded operand has one
place in shared memory. Here the order is written down (in Gluon, Triton's lower level):

    step i    tensor cores: acc += W_i · in_iᵀ        the warps: decode W_{i+1}, into another place
              wait for step i - 1, not for i          start copying in_j and the bytes of W_j (TMA) for a later step j

Nothing but copies of the tensor memory accelerator reads weight and input, two to four steps ahead and without a
register; what a thread loads by itself a step ahead comes too late: bytes that took longer than a step were what all
else waited for. Scales are asked for four tiles ahead.

The weight is the left operand: a warpgroup then multiplies 64 outputs with 256 tokens. Forward, its decoded tile stays
in registers, where the tensor cores take it from; a thread decodes exactly those nibbles that are its own in their
layout. Backward, pairs along the reduction lie in different rows of bytes, so the tile goes through shared memory.
The sixteen code values lie in the sixteen lanes of each half of a warp, and a shuffle fetches one: from shared memory
they would take no less of its rate, and two barriers more a step. (Each by measurement on an H100, at 384 and 512
tokens; a step of 64 takes 0.8 us forward and 0.9 us backward, of which the tensor cores need 0.6.)

Tiles seldom fill the card: 64 of them leave half of 132 multiprocessors without work, 448 are four rounds, the last of
them half empty. So a program may take an equal stretch of all steps of all tiles, wherever tiles begin and end
(stream-K). Where a stretch ends inside a tile, each part of it is left in memory, and the program that comes last adds
them: of two, the other's to its own, and of more all anew, from the first step's to the last's. Which one comes last
depends on the run; the sum does not, since a + b is b + a.

Where 128 tokens or fewer are left for the last tile, or 64, it is of so many. Its steps take less time, so what is
shared out equally is not steps but what they cost.

The decoded values are those of `nf4.decode` to the last bit. Gluon has no interpreter, so on a machine without a card
this kernel is compiled and not run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graft_kernels.launch import AVAILABLE, cdiv, launch, next_power_of_2, tl, triton
from graft_kernels.nf4 import NF4Weight, code_by_lane, code_table, looked_up

# Tokens of a program that makes a part of S, and how many of them a card works on well.
_LOW_RANK_BLOCK_M = 16
_PROGRAMS = 128

# A tile of the product: tokens and outputs; and of the reduction, what a program takes at a time and how many tiles of
# 64 have a place in shared memory, forward and backward.
BLOCK_M, BLOCK_O = 256, 128
# A last tile is of no more tokens than are left, in these sizes; its step costs 5, by its time, where one of BLOCK_M
# costs 7.
LAST_M, COST, LAST_COST = (64, 128), 7, 5
STEP = {"forward": 128, "backward": 64}
_STAGES = {"forward": 5, "backward": 4}

if AVAILABLE:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Triton 3.6 calls it otherwise.
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
else:  # the kernel below is then never called, only defined
    from types import SimpleNamespace

    gluon = SimpleNamespace(jit=lambda function=None, **options: function or (lambda kernel: kernel))
    gl = SimpleNamespace(constexpr=object)
    hopper = None


@triton.jit
def _low_rank_parts_kernel(  # type: ignore[no-untyped-def]
    in_ptr, down_ptr, s_ptr, arrivals_ptr, M, sum_size, stride_in, stride_dj, stride_dr, arrivals,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, SPLITS: tl.constexpr, ALONG_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """S in parts [SPLITS, M, RANK], of a stretch of the reduction each; and zeroes where the parts of tiles count."""
    dtype: tl.constexpr = in_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    if COUNTS > 0 and tl.program_id(0) + split == 0:
        count = tl.arange(0, COUNTS)
        tl.store(arrivals_ptr + count, tl.zeros((COUNTS,), tl.int32), mask=count < arrivals)
    j = tl.arange(0, RANK_BLOCK)
    r = tl.arange(0, BLOCK_R)
    stretch = tl.cdiv(sum_size, SPLITS * BLOCK_R) * BLOCK_R
    in_rows = in_ptr + m.to(tl.int64)[:, None] * stride_in
    s = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for r0 in tl.range(split * stretch, tl.minimum((split + 1) * stretch, sum_size), BLOCK_R):
        inside = r < sum_size - r0
        x = tl.load(in_rows + (r0 + r)[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        # Read as it lies in memory, and turned for the product.
        if ALONG_R:
            down = tl.load(down_ptr + j[:, None] * stride_dj + (r0 + r)[None, :].to(tl.int64) * stride_dr,
                           mask=(j < RANK)[:, None] & inside[None, :], other=0.0).to(dtype)  # fmt: skip
            s = tl.dot(x, tl.trans(down), s, input_precision="ieee")
        else:
            down = tl.load(down_ptr + j[None, :] * stride_dj + (r0 + r)[:, None].to(tl.int64) * stride_dr,
                           mask=(j < RANK)[None, :] & inside[:, None], other=0.0).to(dtype)  # fmt: skip
            s = tl.dot(x, down, s, input_precision="ieee")
    tl.store(s_ptr + (split * M + m)[:, None] * RANK + j[None, :], s, mask=(m < M)[:, None] & (j < RANK)[None, :])


@gluon.jit
def _decoded_operand(  # type: ignore[no-untyped-def]
    words, absmax, code_of_lane, shift, rows: gl.constexpr, OPERAND: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """[rows, 64] as the tensor cores' left operand, from words [rows, 8]; a thread takes the byte at `shift`."""
    octets = gl.expand_dims(words, 2) >> shift
    # Bytes rising, high nibble first; `join` keeps both in their thread.
    nibbles = gl.reshape(gl.join(octets >> 4, octets), (rows, 64))
    code = looked_up(code_of_lane, gl.convert_layout(nibbles, OPERAND), True)
    return (code * gl.expand_dims(absmax, 1)).to(dtype)


@gluon.jit
def _decoded_tile(  # type: ignore[no-untyped-def]
    words, absmax, code_of_lane, rows: gl.constexpr, columns: gl.constexpr, RUN: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """[rows, columns] from words [rows, columns/8] and the scales of the runs that a thread decodes."""
    PER: gl.constexpr = RUN.size_per_thread[2]
    words = gl.reshape(words, (rows, columns // PER, PER // 8))
    halves = gl.join(words, words >> 16)
    quarters = gl.join(halves, halves >> 8)
    nibbles = gl.reshape(gl.join(quarters >> 4, quarters), (rows, columns // PER, PER))
    code = looked_up(code_of_lane, gl.convert_layout(nibbles, RUN, assert_trivial=True), True)
    return gl.reshape((code * gl.expand_dims(absmax, 2)).to(dtype), (rows, columns))


@gluon.jit
def _coded_scales(absmax_ptr, absmax2_ptr, block, mask, NESTED: gl.constexpr):  # type: ignore[no-untyped-def]
    """What the scales of `block` are made of."""
    index = gl.load(absmax_ptr + block, mask=mask, other=0)
    scale2 = 0.0
    if NESTED:
        scale2 = gl.load(absmax2_ptr + (block >> 8), mask=mask, other=0.0)
    return index, scale2


@gluon.jit
def _decoded_scales(index, scale2, code2_ptr, offset, NESTED: gl.constexpr):  # type: ignore[no-untyped-def]
    absmax = index
    if NESTED:
        # Two statements, two roundings.
        scaled = gl.load(code2_ptr + index.to(gl.int32)) * scale2
        absmax = scaled + offset
    return absmax


@gluon.jit
def _scales(  # type: ignore[no-untyped-def]
    absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask, NESTED: gl.constexpr
):  # fmt: skip
    index, scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block, mask, NESTED)
    return _decoded_scales(index, scale2, code2_ptr, offset, NESTED)


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    in_desc, w_desc, in_shared, w_shared, arrived, m0, o0, step, at, inside,
    BACKWARD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying a tile's input and its weight's bytes, as the `at`-th copy of this program, if it is `inside`."""
    place = at % STAGES
    bar = arrived.index(place)
    hopper.mbarrier.expect(bar, in_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=inside)
    hopper.tma.async_copy_global_to_shared(in_desc, [m0, step * 64], bar, in_shared.index(place), pred=inside)
    if BACKWARD:
        hopper.tma.async_copy_global_to_shared(w_desc, [step * 64, o0 // 8], bar, w_shared.index(place), pred=inside)
    else:
        hopper.tma.async_copy_global_to_shared(w_desc, [o0, step * 8], bar, w_shared.index(place), pred=inside)


@gluon.jit
def _arrival(arrived, at, inside, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the `at`-th copy, if it is `inside`."""
    hopper.mbarrier.wait(arrived.index(at % STAGES), (at // STAGES) & 1, pred=inside)


@gluon.jit
def _multiplied_from_registers(  # type: ignore[no-untyped-def]
    acc, in_desc, w_desc, in_shared, w_shared, arrived, absmax_ptr, code2_ptr, absmax2_ptr, code_of_lane, offset,
    m0, o0, first, count, done, out_size, sum_size, row_blocks,
    NESTED: gl.constexpr, MMA: gl.constexpr, BLOCK_O: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc + W · inᵀ over `count` steps of 128 from `first` on, W [O, R] lying along the reduction.

    The weight's tile goes from the decoder's registers to the tensor cores: a thread decodes the bytes whose place in
    the operand is its own. Two tiles of 64 take turns.
    """
    dtype: gl.constexpr = in_desc.dtype
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # Of a row's 64 weights a thread has one byte of each of eight words; four threads load the same words.
    BYTES: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1, 0], [0, 2, 0], [0, 4, 0], [8, 0, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[BLOCK_O, 8, 4],
    )
    WORDS: gl.constexpr = gl.SliceLayout(2, BYTES)
    shift = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, BYTES))) * 8
    shift = gl.expand_dims(gl.expand_dims(shift, 0), 1)
    row = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, OPERAND))
    block = row * row_blocks + first * 2
    mask = row < out_size
    # Tiles of 64: those that are copied, and those that there are. The last step may have only one.
    copies = 2 * count
    tiles = gl.minimum(copies, sum_size // 64 - 2 * first)

    for stage in gl.static_range(STAGES - 1):
        _fetch(
            in_desc, w_desc, in_shared, w_shared, arrived, m0, o0, 2 * first + stage, done + stage, stage < copies,
            False, STAGES,
        )  # fmt: skip
    absmax0 = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask, NESTED)
    absmax = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block + 1, mask & (tiles > 1), NESTED)
    index2, scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block + 2, mask & (tiles > 2), NESTED)
    index3, scale3 = _coded_scales(absmax_ptr, absmax2_ptr, block + 3, mask & (tiles > 3), NESTED)
    block += 4
    _arrival(arrived, done, True, STAGES)
    words = w_shared.index(done % STAGES).load(WORDS)
    w0 = _decoded_operand(words, absmax0, code_of_lane, shift, BLOCK_O, OPERAND, dtype)
    w1 = gl.zeros((BLOCK_O, 64), dtype, OPERAND)
    for i in range(count):
        for half in gl.static_range(2):
            tile = 2 * i + half
            here = done + tile
            in_tile = in_shared.index(here % STAGES).permute((1, 0))
            if half == 0:
                acc = hopper.warpgroup_mma(w0, in_tile, acc, is_async=True)
                acc, w1 = hopper.warpgroup_mma_wait(num_outstanding=1, deps=[acc, w1])
            else:
                acc = hopper.warpgroup_mma(w1, in_tile, acc, is_async=True)
                acc, w0 = hopper.warpgroup_mma_wait(num_outstanding=1, deps=[acc, w0])
            # All warps are done with the tile before this one: its place is free, and so are its registers.
            barrier()
            later = tile + STAGES - 1
            _fetch(
                in_desc, w_desc, in_shared, w_shared, arrived, m0, o0, 2 * first + later, done + later, later < copies,
                False, STAGES,
            )  # fmt: skip
            index4, scale4 = _coded_scales(absmax_ptr, absmax2_ptr, block, mask & (tile + 4 < tiles), NESTED)
            later_absmax = _decoded_scales(index2, scale2, code2_ptr, offset, NESTED)
            _arrival(arrived, here + 1, tile + 1 < copies, STAGES)
            words = w_shared.index((here + 1) % STAGES).load(WORDS)
            if half == 0:
                w1 = _decoded_operand(words, absmax, code_of_lane, shift, BLOCK_O, OPERAND, dtype)
            else:
                w0 = _decoded_operand(words, absmax, code_of_lane, shift, BLOCK_O, OPERAND, dtype)
            absmax, index2, scale2 = later_absmax, index3, scale3
            index3, scale3 = index4, scale4
            block += 1
    acc, w1 = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc, w1])
    return acc


@gluon.jit
def _multiplied_from_shared(  # type: ignore[no-untyped-def]
    acc, in_desc, w_desc, in_shared, w_shared, tiles_shared, arrived, absmax_ptr, code2_ptr, absmax2_ptr, code_of_lane,
    offset, m0, o0, first, count, done, out_size, row_blocks,
    NESTED: gl.constexpr, BLOCK_O: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc + Wᵀ · inᵀ over `count` steps of 64 from `first` on, W [R, O] lying along the outputs.

    The operand's pairs along the reduction lie in different rows, so the tile goes through shared memory: three places
    for it, and a step's is written while the step before is multiplied.
    """
    dtype: gl.constexpr = in_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    PER: gl.constexpr = 64 * BLOCK_O // (32 * WARPS)
    RUNS: gl.constexpr = BLOCK_O // PER
    # A thread decodes a run of PER weights: some words, one scale.
    RUN: gl.constexpr = gl.BlockedLayout([1, 1, PER], [32 // RUNS, RUNS, 1], [WARPS, 1, 1], [2, 1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([1, PER // 8], [32 // RUNS, RUNS], [WARPS, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, RUN))) + first * 64
    run = gl.arange(0, RUNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, RUN)))
    block = row[:, None] * row_blocks + (o0 // 64 + run * PER // 64)[None, :]
    block_step = 64 * row_blocks
    mask = ((o0 + run * PER) < out_size)[None, :] & (row >= 0)[:, None]

    for stage in gl.static_range(STAGES - 2):
        _fetch(
            in_desc, w_desc, in_shared, w_shared, arrived, m0, o0, first + stage, done + stage, stage < count,
            True, STAGES,
        )  # fmt: skip
    absmax0 = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask, NESTED)
    absmax = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block + block_step, mask & (count > 1), NESTED)
    index2, scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block + 2 * block_step, mask & (count > 2), NESTED)
    index3, scale3 = _coded_scales(absmax_ptr, absmax2_ptr, block + 3 * block_step, mask & (count > 3), NESTED)
    block += 4 * block_step
    _arrival(arrived, done, True, STAGES)
    words = w_shared.index(done % STAGES).load(WORDS)
    tiles_shared.index(done % 3).store(_decoded_tile(words, absmax0, code_of_lane, 64, BLOCK_O, RUN, dtype))
    for i in range(count):
        here = done + i
        hopper.fence_async_shared()
        barrier()
        w_tile = tiles_shared.index(here % 3).permute((1, 0))
        acc = hopper.warpgroup_mma(w_tile, in_shared.index(here % STAGES).permute((1, 0)), acc, is_async=True)
        # While that runs: the next step's tile, and copies into the place of the step before the last, which is done.
        index4, scale4 = _coded_scales(absmax_ptr, absmax2_ptr, block, mask & (i + 4 < count), NESTED)
        later_absmax = _decoded_scales(index2, scale2, code2_ptr, offset, NESTED)
        later = i + STAGES - 2
        _fetch(
            in_desc, w_desc, in_shared, w_shared, arrived, m0, o0, first + later, done + later, later < count,
            True, STAGES,
        )  # fmt: skip
        _arrival(arrived, here + 1, i + 1 < count, STAGES)
        words = w_shared.index((here + 1) % STAGES).load(WORDS)
        tiles_shared.index((here + 1) % 3).store(_decoded_tile(words, absmax, code_of_lane, 64, BLOCK_O, RUN, dtype))
        absmax, index2, scale2 = later_absmax, index3, scale3
        index3, scale3 = index4, scale4
        block += block_step
        acc = hopper.warpgroup_mma_wait(num_outstanding=1, deps=[acc])
    return hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc])


def cost_before(step, steps, tiles_m, COST: gl.constexpr, LAST_COST: gl.constexpr):  # type: ignore[no-untyped-def]
    """What all steps before `step` cost, where `steps` make a tile and the last of `tiles_m` tiles is a cheaper one."""
    dear = (tiles_m - 1) * steps
    rest = step % (tiles_m * steps)
    whole = step // (tiles_m * steps) * (dear * COST + steps * LAST_COST)
    return whole + min(rest, dear) * COST + max(rest - dear, 0) * LAST_COST


def step_at(cost, steps, tiles_m, COST: gl.constexpr, LAST_COST: gl.constexpr):  # type: ignore[no-untyped-def]
    """The step that is under way when `cost` has been spent."""
    dear = (tiles_m - 1) * steps
    rest = cost % (dear * COST + steps * LAST_COST)
    whole = cost // (dear * COST + steps * LAST_COST) * (tiles_m * steps)
    return whole + min(rest // COST, dear) + max(rest - dear * COST, 0) // LAST_COST


def payer(cost, programs, total):  # type: ignore[no-untyped-def]
    """Which of `programs`, with equal shares of `total`, spends the last of `cost`."""
    return (cost * programs - 1) // total


# The host shares out by the same three.
_cost_before, _step_at, _payer = gluon.jit(cost_before), gluon.jit(step_at), gluon.jit(payer)


@gluon.jit
def _part_of_tile(  # type: ignore[no-untyped-def]
    in_desc, w_desc, in_shared, w_shared, tiles_shared, arrived,
    absmax_ptr, code2_ptr, absmax2_ptr, code_of_lane, offset, s_ptr, up_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr,
    own_m, tile, first, count, done, tiles_m, steps, total,
    M, out_size, sum_size, stride_out, row_blocks, stride_uo, stride_uj, scale,
    RANK: gl.constexpr, S_SPLITS: gl.constexpr, BACKWARD: gl.constexpr,
    NESTED: gl.constexpr, HAS_BIAS: gl.constexpr, CUT: gl.constexpr,
    TILE_M: gl.constexpr, PART_M: gl.constexpr, BLOCK_O: gl.constexpr, STAGES: gl.constexpr,
    COST: gl.constexpr, LAST_COST: gl.constexpr,
):  # fmt: skip
    """`count` steps of a tile of TILE_M tokens from `first` on, and the tile itself, if that was all it wanted."""
    dtype: gl.constexpr = in_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    # A warp takes 16 outputs, a warpgroup 64.
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_M, 16])
    o0 = tile // tiles_m * BLOCK_O
    # Where tokens are left for less than a tile, it begins before them: rows outside are slow to copy.
    m0 = gl.minimum(own_m, gl.maximum(M - TILE_M, 0))
    # All warps are done with what the part before left in shared memory.
    hopper.fence_async_shared()
    barrier()
    acc = gl.zeros((BLOCK_O, TILE_M), gl.float32, MMA)
    if BACKWARD:
        acc = _multiplied_from_shared(
            acc, in_desc, w_desc, in_shared, w_shared, tiles_shared, arrived, absmax_ptr, code2_ptr, absmax2_ptr,
            code_of_lane, offset, m0, o0, first, count, done, out_size, row_blocks,
            NESTED, BLOCK_O, STAGES,
        )  # fmt: skip
    else:
        acc = _multiplied_from_registers(
            acc, in_desc, w_desc, in_shared, w_shared, arrived, absmax_ptr, code2_ptr, absmax2_ptr, code_of_lane,
            offset, m0, o0, first, count, done, out_size, sum_size, row_blocks,
            NESTED, MMA, BLOCK_O, STAGES,
        )  # fmt: skip

    # out += S · upᵀ, in the same accumulators, by the part that ends the tile
    if RANK > 0 and first + count == steps:
        # Sixteen ranks at a time: registers hold little beside the sums.
        LOW: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
        LOW_SHARED: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
        lm = m0 + gl.arange(0, TILE_M, layout=gl.SliceLayout(1, LOW))
        lo = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, LOW))
        for j0 in range(0, RANK, 16):
            lj = j0 + gl.arange(0, 16, layout=gl.SliceLayout(0, LOW))
            s = gl.zeros((TILE_M, 16), gl.float32, LOW)
            # Four parts at a time, for the same reason.
            for first_split in range(0, S_SPLITS, 4):
                for split in gl.static_range(min(4, S_SPLITS)):
                    s += gl.load(s_ptr + ((first_split + split) * M + lm)[:, None] * RANK + lj[None, :],
                                 mask=(lm < M)[:, None] & (lj < RANK)[None, :], other=0.0)  # fmt: skip
            up = gl.load(up_ptr + lo.to(gl.int64)[:, None] * stride_uo + lj[None, :] * stride_uj,
                         mask=(lo < out_size)[:, None] & (lj < RANK)[None, :], other=0.0)  # fmt: skip
            s_shared = gl.allocate_shared_memory(dtype, [TILE_M, 16], LOW_SHARED, (s * scale).to(dtype))
            up_shared = gl.allocate_shared_memory(dtype, [BLOCK_O, 16], LOW_SHARED, up.to(dtype))
            hopper.fence_async_shared()
            barrier()
            acc = hopper.warpgroup_mma(up_shared, s_shared.permute((1, 0)), acc)

    complete = count == steps
    if CUT:  # noqa: SIM102 (a constant: without it, what follows is not compiled)
        if count < steps:
            # A part. The programs that share the tile are those with its first and its last step, and all between.
            programs = gl.num_programs(0).to(gl.int64)
            until_first = _cost_before(tile * steps + 1, steps, tiles_m, COST, LAST_COST)
            until_last = _cost_before(tile * steps + steps, steps, tiles_m, COST, LAST_COST)
            first_program = _payer(until_first, programs, total).to(gl.int32)
            last_program = _payer(until_last, programs, total).to(gl.int32)
            parts = last_program - first_program + 1
            cell_o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, MMA))
            cell_m = gl.arange(0, TILE_M, layout=gl.SliceLayout(0, MMA))
            cell_ptrs = parts_ptr + cell_o[:, None] * TILE_M + cell_m[None, :]
            # A program has two places: for the part it begins with, and for the one that begins a tile.
            place = gl.program_id(0) * 2 + (first == 0).to(gl.int32)
            gl.store(cell_ptrs + place.to(gl.int64) * (BLOCK_O * PART_M), acc)
            barrier()
            before = gl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel", scope="gpu")
            complete = before == parts - 1
            if complete:
                if parts == 2:
                    place = first_program * 2 + gl.where(first == 0, 2, 1)
                    acc += gl.load(cell_ptrs + place.to(gl.int64) * (BLOCK_O * PART_M), cache_modifier=".cg")
                else:
                    place = first_program * 2 + 1
                    acc = gl.load(cell_ptrs + place.to(gl.int64) * (BLOCK_O * PART_M), cache_modifier=".cg")
                    for part in range(1, parts):
                        place = (first_program + part) * 2
                        acc += gl.load(cell_ptrs + place.to(gl.int64) * (BLOCK_O * PART_M), cache_modifier=".cg")
    if complete:
        if HAS_BIAS:
            bo = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, MMA))
            acc += gl.load(bias_ptr + bo, mask=bo < out_size, other=0.0).to(gl.float32)[:, None]
        # Turned by way of shared memory, so that neighbouring threads write neighbouring outputs: in the places of
        # the input, which nobody reads any more.
        TURNED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_O, BLOCK_O // 8], [WARPS, 1], [1, 0])
        turned = in_shared.index(0)._reinterpret(dtype, [TILE_M, BLOCK_O], TURNED)
        barrier()
        turned.store(gl.permute(acc.to(dtype), (1, 0)))
        barrier()
        m = m0 + gl.arange(0, TILE_M, layout=gl.SliceLayout(1, OUT))
        o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, OUT))
        out_ptrs = out_ptr + m.to(gl.int64)[:, None] * stride_out + o[None, :]
        gl.store(out_ptrs, turned.load(OUT), mask=((m >= own_m) & (m < M))[:, None] & (o < out_size)[None, :])


@gluon.jit
def _fused_hopper_kernel(  # type: ignore[no-untyped-def]
    in_desc, last_desc, w_desc, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, s_ptr, up_ptr, bias_ptr,
    out_ptr, parts_ptr, arrivals_ptr,
    M, out_size, sum_size, stride_out, row_blocks, stride_uo, stride_uj, scale,
    RANK: gl.constexpr, S_SPLITS: gl.constexpr, BACKWARD: gl.constexpr,
    NESTED: gl.constexpr, HAS_BIAS: gl.constexpr, CUT: gl.constexpr,
    BLOCK_M: gl.constexpr, LAST_M: gl.constexpr, BLOCK_O: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    COST: gl.constexpr, LAST_COST: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = in_desc.dtype
    in_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 64], in_desc.layout)
    last_shared = in_shared._reinterpret(dtype, [STAGES, LAST_M, 64], in_desc.layout)
    ROWS: gl.constexpr = 64 if BACKWARD else BLOCK_O
    COLUMNS: gl.constexpr = BLOCK_O if BACKWARD else 64
    w_shared = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, COLUMNS // 8], w_desc.layout)
    tiles_shared = None
    if BACKWARD:
        tiles_shared = gl.allocate_shared_memory(dtype, [3, 64, BLOCK_O], gl.NVMMASharedLayout(128, 16, 2))
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(arrived.index(stage), count=1)
    hopper.fence_async_shared()
    offset = gl.load(offset_ptr) if NESTED else 0.0
    code_of_lane = code_by_lane(code_ptr, M, True)

    # This program's stretch of all steps, which costs as much as any other's.
    tiles_m = gl.cdiv(M, BLOCK_M)
    steps = gl.cdiv(sum_size, STEP)
    total = _cost_before(tiles_m * gl.cdiv(out_size, BLOCK_O) * steps, steps, tiles_m, COST, LAST_COST)
    programs = gl.num_programs(0)
    if CUT:
        paid = gl.program_id(0).to(gl.int64) * total
        at = _step_at((paid // programs).to(gl.int32), steps, tiles_m, COST, LAST_COST)
        end = _step_at(((paid + total) // programs).to(gl.int32), steps, tiles_m, COST, LAST_COST)
    else:
        at = gl.program_id(0) * steps
        end = at + steps
    done = 0  # tiles of the input so far, over all parts: which place in shared memory comes next
    while at < end:
        # The next part: `count` steps of a tile from `first` on. The tiles of M are neighbours: they decode the same
        # weights, which the L2 then reads once.
        tile = at // steps
        first = at % steps
        count = gl.minimum(steps - first, end - at)
        own_m = tile % tiles_m * BLOCK_M
        if LAST_M < BLOCK_M and tile % tiles_m == tiles_m - 1:
            _part_of_tile(
                last_desc, w_desc, last_shared, w_shared, tiles_shared, arrived,
                absmax_ptr, code2_ptr, absmax2_ptr, code_of_lane, offset, s_ptr, up_ptr, bias_ptr, out_ptr, parts_ptr,
                arrivals_ptr, own_m, tile, first, count, done, tiles_m, steps, total,
                M, out_size, sum_size, stride_out, row_blocks, stride_uo, stride_uj, scale,
                RANK, S_SPLITS, BACKWARD, NESTED, HAS_BIAS, CUT, LAST_M, BLOCK_M, BLOCK_O, STAGES, COST, LAST_COST,
            )  # fmt: skip
        else:
            _part_of_tile(
                in_desc, w_desc, in_shared, w_shared, tiles_shared, arrived,
                absmax_ptr, code2_ptr, absmax2_ptr, code_of_lane, offset, s_ptr, up_ptr, bias_ptr, out_ptr, parts_ptr,
                arrivals_ptr, own_m, tile, first, count, done, tiles_m, steps, total,
                M, out_size, sum_size, stride_out, row_blocks, stride_uo, stride_uj, scale,
                RANK, S_SPLITS, BACKWARD, NESTED, HAS_BIAS, CUT, BLOCK_M, BLOCK_M, BLOCK_O, STAGES, COST, LAST_COST,
            )  # fmt: skip
        done += count * (STEP // 64)
        at += count


def low_rank_parts(in_: Tensor, down_jR: Tensor, arrivals: Tensor | None = None) -> Tensor:
    """Parts [splits, M, r], fp32, whose sum is S = in · downᵀ, unscaled, of in [M, R] and down [r, R] of any strides.

    `arrivals`, int32, is filled with zeros in the same launch.
    """
    m, sum_size = in_.shape
    rank = down_jR.shape[0]
    splits = min(8, next_power_of_2(cdiv(_PROGRAMS, cdiv(m, _LOW_RANK_BLOCK_M))))
    parts = in_.new_empty(splits, m, rank, dtype=torch.float32)
    counts = 0 if arrivals is None else arrivals.numel()
    launch(
        _low_rank_parts_kernel,
        (cdiv(m, _LOW_RANK_BLOCK_M), splits),
        in_, down_jR, parts, arrivals, m, sum_size, in_.stride(0), *down_jR.stride(), counts,
        RANK=rank, RANK_BLOCK=max(16, next_power_of_2(rank)), SPLITS=splits, ALONG_R=down_jR.stride(1) == 1,
        BLOCK_M=_LOW_RANK_BLOCK_M, BLOCK_R=128 if rank <= 64 else 64,
        COUNTS=next_power_of_2(counts) if counts else 0, num_warps=4, num_stages=4,
    )  # fmt: skip
    return parts


class Tiles(NamedTuple):
    """How a product is cut into tiles, and what a step in them costs."""

    tiles_m: int
    last_m: int  # tokens of the last tile
    costs: tuple[int, int]  # of a step in a tile, and in the last one
    steps: int  # of each
    total: int  # what all steps of all tiles cost


def tiles_of(m: int, out_size: int, sum_size: int, direction: str) -> Tiles:
    """For M tokens and a weight of which `out_size` rows or columns come out and `sum_size` are summed over."""
    tiles_m, steps = cdiv(m, BLOCK_M), cdiv(sum_size, STEP[direction])
    left = m - (tiles_m - 1) * BLOCK_M
    last_m = next((size for size in LAST_M if left <= size < m), BLOCK_M)
    costs = (1, 1) if last_m == BLOCK_M else (COST, LAST_COST)
    total = cost_before(tiles_m * cdiv(out_size, BLOCK_O) * steps, steps, tiles_m, *costs)
    return Tiles(tiles_m, last_m, costs, steps, total)


class Product(NamedTuple):
    """What either direction is to the kernels: O is the side that comes out, R the one that is summed over."""

    in_MR: Tensor
    weight: NF4Weight
    down_jR: Tensor | None
    up_Oj: Tensor | None
    scale: float
    bias: Tensor | None
    out_MO: Tensor
    backward: bool


def fused_hopper(product: Product, programs: int) -> None:
    """The product in two launches, one of them for S. `programs` share all tiles' steps; with 0, each takes a tile.

    The operands have been checked by the caller; the input's rows begin at multiples of 16 bytes.
    """
    in_, weight, down_jR, up_Oj, scale, bias, out, backward = product
    (m, sum_size), out_size, (n, k) = in_.shape, out.shape[1], weight.shape
    direction = "backward" if backward else "forward"
    tiles = tiles_of(m, out_size, sum_size, direction)
    rank, parts, arrivals, s = 0, None, None, None
    stride_up: tuple[int, ...] = (0, 0)
    if programs:
        programs = min(programs, tiles.total // tiles.costs[0])  # none is left without a step
        parts = in_.new_empty(programs, 2, BLOCK_O, BLOCK_M, dtype=torch.float32)
        # Zeros, which the launch that makes S writes, if there is one.
        arrivals = (in_.new_zeros if down_jR is None else in_.new_empty)(programs, dtype=torch.int32)
    if down_jR is not None and up_Oj is not None:
        rank, stride_up = down_jR.shape[0], up_Oj.stride()
        s = low_rank_parts(in_, down_jR, arrivals)
    # Tiles of the tensor memory accelerator: zeros outside.
    in_layout = gl.NVMMASharedLayout(128, 16, 2)
    in_tiles = last_tiles = TensorDescriptor.from_tensor(in_, [BLOCK_M, 64], in_layout)
    if tiles.last_m < BLOCK_M:
        last_tiles = TensorDescriptor.from_tensor(in_, [tiles.last_m, 64], in_layout)
    rows, columns = (64, BLOCK_O) if backward else (BLOCK_O, 64)
    words_NK = weight.packed.view(n, k // 2).view(torch.int32)
    w_tiles = TensorDescriptor.from_tensor(words_NK, [rows, columns // 8], gl.NVMMASharedLayout(columns // 2, 32, 2))
    launch(
        _fused_hopper_kernel,
        (programs or tiles.tiles_m * cdiv(out_size, BLOCK_O),),
        in_tiles, last_tiles, w_tiles,
        weight.absmax, code_table(in_.device), weight.code2, weight.absmax2, weight.offset,
        s, up_Oj, bias, out, parts, arrivals,
        m, out_size, sum_size, out.stride(0), k // 64, *stride_up, float(scale),
        RANK=rank, S_SPLITS=0 if s is None else s.shape[0], BACKWARD=backward,
        NESTED=weight.code2 is not None, HAS_BIAS=bias is not None, CUT=programs > 0,
        BLOCK_M=BLOCK_M, LAST_M=tiles.last_m, BLOCK_O=BLOCK_O, STEP=STEP[direction], STAGES=_STAGES[direction],
        COST=tiles.costs[0], LAST_COST=tiles.costs[1],
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
