"""The fused product of `fused_linear.py` on Hopper's tensor cores, for some hundred tokens.

Shapes and mathematics are `fused_linear.py`'s: out[m, o] = Σ_R in[m, R]·W[o, R] + S[m, j]·up[o, j] (+ bias[o]), with
W decoded where it is used. S [M, r] is made by a launch before, in parts of the reduction; here the parts are added,
scaled and rounded.

From some 150 tokens on, the product takes longer than the weight's bytes, and what decides is whether decoding happens
beside the tensor cores or before them. So the work is written down warp by warp (in Gluon, Triton's lower level). A
program has three groups of four warps, which meet at barriers in shared memory alone:

    one      starts copies of input and weight (TMA), two to four steps of 64 ahead, and decodes the scales
    two      64 outputs each: start acc += W_i · in_iᵀ on the tensor cores, meanwhile decode their half of W_{i+1}

A step takes as long as the chain of its instructions in each warp, most of which decode: 0.8 us, of which the tensor
cores need 0.6, and with half as many tokens more 1.0. So a tile has 256, 320 or 384 tokens: the sums of what is more
than 256 stand in registers of their own, beside the others. A thread decodes 32 weights of one scale: it multiplies and
rounds the sixteen code values once and looks the bytes of the results up by permutations (`prmt`), four at a time. That
leaves the shared memory to the tensor cores; shuffles, which the smaller kernel uses, share its way. (Each by
measurement on an H200.)

Tiles seldom fill the card: 64 of them leave half of 132 multiprocessors without work, 224 are two rounds, the second of
them with a third of the card idle. So a program may take an equal stretch of all steps of all tiles, wherever tiles
begin and end (stream-K). Where a stretch ends inside a tile, each part of it is left in memory, and the program that
comes last adds them: of two, the other's to its own, and of more all anew, from the first step's to the last's. Which
one comes last depends on the run; the sum does not, since a + b is b + a.

The decoded values are those of `nf4.decode` to the last bit. Gluon has no interpreter, so on a machine without a card
this kernel is compiled and not run.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from graft_kernels.launch import AVAILABLE, cdiv, launch, next_power_of_2, tl, triton
from graft_kernels.nf4 import NF4_CODE, NF4Weight

# Tokens of a program that makes a part of S, and how many of them a card works on well.
_LOW_RANK_BLOCK_M = 16
_PROGRAMS = 128

# A tile of the product: outputs, and tokens; the first 256 of them have one accumulator, the others another one.
BLOCK_O, BLOCK_M = 128, 256
TILES_M = (256, 320, 384)
# Places in shared memory for a step's tile of the input, as many as there is room for, and of the weight.
_IN_PLACES = {256: 4, 320: 3, 384: 3}
_W_PLACES = 4

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
    gl = SimpleNamespace(constexpr=lambda value=None: value)
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


def _decoder(dtype: str) -> str:
    """PTX that decodes a thread's four words of one scale, eight weights each, into pairs of `dtype`.

    All sixteen products of scale and code value are made and rounded first. A byte permutation then looks up four bytes
    at once among eight, by the low three bits of four nibbles, and another one chooses by their fourth bit.
    """
    words, scale = ("$16", "$17", "$18", "$19"), "$20"
    lines = [".reg .f32 c<16>;", ".reg .b32 v<8>, l<4>, h<4>, s, t, p, q, a, b;"]
    for i, code in enumerate(NF4_CODE):
        lines.append(f"mul.rn.f32 c{i}, {scale}, 0f{struct.pack('>f', code).hex().upper()};")
    lines += [f"cvt.rn.{dtype}x2.f32 v{i}, c{2 * i + 1}, c{2 * i};" for i in range(8)]
    for i in range(4):  # the low and the high bytes of four values
        lines.append(f"prmt.b32 l{i}, v{2 * i}, v{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 h{i}, v{2 * i}, v{2 * i + 1}, 0x7531;")
    for place, word in enumerate(words):
        lines += [f"and.b32 s, {word}, 0x77777777;", f"shr.u32 t, {word}, 1;"]
        lines.append("lop3.b32 t, t, 0x44444444, 0x32103210, 0xEA;")  # (t & the one) | the other
        for half in range(2):
            if half:
                lines += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"]
            for table, found in (("l", "a"), ("h", "b")):
                lines.append(f"prmt.b32 p, {table}0, {table}1, s;")
                lines.append(f"prmt.b32 q, {table}2, {table}3, s;")
                lines.append(f"prmt.b32 {found}, p, q, t;")
            # A byte's high nibble is its first weight.
            lines.append(f"prmt.b32 ${8 * half + place}, a, b, 0x4051;")
            lines.append(f"prmt.b32 ${8 * half + 4 + place}, a, b, 0x6273;")
    return "{" + " ".join(lines) + "}"


_BF16_DECODER, _FP16_DECODER = gl.constexpr(_decoder("bf16")), gl.constexpr(_decoder("f16"))


@gluon.jit
def _decoded(words, absmax, dtype: gl.constexpr):  # type: ignore[no-untyped-def]
    """[64, 64] as pairs [64, 32], int32, from words [64, 8] and the rows' scales; a thread has half a row."""
    DECODER: gl.constexpr = _BF16_DECODER if dtype == gl.bfloat16 else _FP16_DECODER
    pairs0, pairs1, pairs2, pairs3 = gl.inline_asm_elementwise(
        DECODER, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,f,f,f,f",
        [words, gl.expand_dims(absmax, 1)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4,
    )  # fmt: skip
    return gl.reshape(gl.join(gl.join(pairs0, pairs2), gl.join(pairs1, pairs3)), (64, 32))


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
def _next(place, phase, PLACES: gl.constexpr):  # type: ignore[no-untyped-def]
    """The place after this one, and the parity of the rounds through all places."""
    place += 1
    wrapped = place == PLACES
    return gl.where(wrapped, 0, place), phase ^ wrapped.to(gl.int32)


@gluon.jit
def _before(place, PLACES: gl.constexpr):  # type: ignore[no-untyped-def]
    """The place before this one. (A variable that kept it would be one and the same for Triton as `place`.)"""
    return gl.where(place == 0, PLACES, place) - 1


@gluon.jit
def _provide_weight(  # type: ignore[no-untyped-def]
    w_desc, w_shared, scales_shared, arrived, freed, place, phase, o0, r, absmax,
    BACKWARD: gl.constexpr, BLOCK_O: gl.constexpr,
):  # fmt: skip
    """A step's bytes of the weight, by halves of the outputs, and its scales."""
    hopper.mbarrier.wait(freed.index(place), phase ^ 1)
    bar = arrived.index(place)
    hopper.mbarrier.expect(bar, 2 * w_desc.block_type.nbytes)
    for half in gl.static_range(2):
        w_place = w_shared.index(place * 2 + half)
        if BACKWARD:
            hopper.tma.async_copy_global_to_shared(w_desc, [r, o0 // 8 + half * (BLOCK_O // 16)], bar, w_place)
        else:
            hopper.tma.async_copy_global_to_shared(w_desc, [o0 + half * (BLOCK_O // 2), r // 8], bar, w_place)
    scales_shared.index(place).store(absmax)
    barrier()
    hopper.mbarrier.arrive(bar)


@gluon.jit
def _provide(  # type: ignore[no-untyped-def]
    in_desc, beside_desc, w_desc, in_shared, beside_shared, w_shared, scales_shared,
    in_arrived, in_freed, w_arrived, w_freed, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr,
    at, end, steps, tiles_m, M, out_size, row_blocks,
    BACKWARD: gl.constexpr, NESTED: gl.constexpr, BLOCK_M: gl.constexpr, BESIDE_M: gl.constexpr, BLOCK_O: gl.constexpr,
    IN_PLACES: gl.constexpr, W_PLACES: gl.constexpr,
):  # fmt: skip
    """The first group: copies the input's tiles and the weight's bytes for all steps, and decodes the scales."""
    offset = gl.load(offset_ptr) if NESTED else 0.0
    # A thread has one scale of a step's tile.
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    in_place, in_phase, w_place, w_phase = 0, 0, 0, 0
    while at < end:
        tile = at // steps
        first = at % steps
        count = gl.minimum(steps - first, end - at)
        o0 = tile // tiles_m * BLOCK_O
        own_m = tile % tiles_m * (BLOCK_M + BESIDE_M)
        # Where tokens are left for less than a tile, it begins before them: rows outside are slow to copy.
        m0 = gl.minimum(own_m, gl.maximum(M - BLOCK_M, 0))
        beside_m0 = gl.minimum(own_m + BLOCK_M, gl.maximum(M - BESIDE_M, 0))
        if BACKWARD:
            block = (first * 64 + thread % 64) * row_blocks + o0 // 64 + thread // 64
            block_step = 64 * row_blocks
            mask = o0 + thread // 64 * 64 < out_size
        else:
            block = (o0 + thread) * row_blocks + first
            block_step = 1
            mask = o0 + thread < out_size
        index0, scale0 = _coded_scales(absmax_ptr, absmax2_ptr, block, mask, NESTED)
        absmax = _decoded_scales(index0, scale0, code2_ptr, offset, NESTED)
        index1, scale1 = _coded_scales(absmax_ptr, absmax2_ptr, block + block_step, mask & (count > 1), NESTED)
        index2, scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block + 2 * block_step, mask & (count > 2), NESTED)
        block += 3 * block_step
        _provide_weight(
            w_desc, w_shared, scales_shared, w_arrived, w_freed, w_place, w_phase, o0, first * 64, absmax,
            BACKWARD, BLOCK_O,
        )  # fmt: skip
        w_place, w_phase = _next(w_place, w_phase, W_PLACES)
        for i in range(count):
            r = (first + i) * 64
            # The weight comes a step ahead of the input, because it has to be decoded.
            absmax = _decoded_scales(index1, scale1, code2_ptr, offset, NESTED)
            index1, scale1 = index2, scale2
            index2, scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block, mask & (i + 3 < count), NESTED)
            block += block_step
            if i + 1 < count:
                _provide_weight(
                    w_desc, w_shared, scales_shared, w_arrived, w_freed, w_place, w_phase, o0, r + 64, absmax,
                    BACKWARD, BLOCK_O,
                )  # fmt: skip
                w_place, w_phase = _next(w_place, w_phase, W_PLACES)
            hopper.mbarrier.wait(in_freed.index(in_place), in_phase ^ 1)
            bar = in_arrived.index(in_place)
            in_bytes: gl.constexpr = in_desc.block_type.nbytes + (beside_desc.block_type.nbytes if BESIDE_M > 0 else 0)
            hopper.mbarrier.expect(bar, in_bytes)
            hopper.tma.async_copy_global_to_shared(in_desc, [m0, r], bar, in_shared.index(in_place))
            if BESIDE_M > 0:
                beside_place = beside_shared.index(in_place)
                hopper.tma.async_copy_global_to_shared(beside_desc, [beside_m0, r], bar, beside_place)
            in_place, in_phase = _next(in_place, in_phase, IN_PLACES)
        at += count


@gluon.jit
def _with_low_rank(  # type: ignore[no-untyped-def]
    acc, dtype: gl.constexpr, scratch, own: gl.constexpr,
    s_ptr, up_ptr, m0, o0, M, out_size, stride_uo, stride_uj, scale,
    RANK: gl.constexpr, S_SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_O: gl.constexpr,
):  # fmt: skip
    """acc + up · Sᵀ, with S added from its parts, scaled and rounded. Sixteen ranks at a time: registers hold little
    beside the sums."""
    WARPS: gl.constexpr = gl.num_warps()
    LOW: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    LOW_SHARED: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    s_shared = scratch.index(own)._reinterpret(dtype, [BLOCK_M, 16], LOW_SHARED)
    up_shared = scratch.index(own + 1)._reinterpret(dtype, [BLOCK_O, 16], LOW_SHARED)
    m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LOW))
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, LOW))
    for j0 in range(0, RANK, 16):
        j = j0 + gl.arange(0, 16, layout=gl.SliceLayout(0, LOW))
        s = gl.zeros((BLOCK_M, 16), gl.float32, LOW)
        # Four parts at a time, for the same reason.
        for first_split in range(0, S_SPLITS, 4):
            for split in gl.static_range(min(4, S_SPLITS)):
                s += gl.load(s_ptr + ((first_split + split) * M + m)[:, None] * RANK + j[None, :],
                             mask=(m < M)[:, None] & (j < RANK)[None, :], other=0.0)  # fmt: skip
        up = gl.load(up_ptr + o.to(gl.int64)[:, None] * stride_uo + j[None, :] * stride_uj,
                     mask=(o < out_size)[:, None] & (j < RANK)[None, :], other=0.0)  # fmt: skip
        barrier()
        s_shared.store((s * scale).to(dtype))
        up_shared.store(up.to(dtype))
        hopper.fence_async_shared()
        barrier()
        acc = hopper.warpgroup_mma(up_shared, s_shared.permute((1, 0)), acc)
    return acc


@gluon.jit
def _with_other_parts(  # type: ignore[no-untyped-def]
    acc, cell_ptrs, first_program, parts, first, PLACE: gl.constexpr
):  # fmt: skip
    """The sum of a tile's parts: of two, the other's and `acc`; of more, from the first step's to the last's."""
    if parts == 2:
        place = first_program * 2 + gl.where(first == 0, 2, 1)
        acc += gl.load(cell_ptrs + place.to(gl.int64) * PLACE, cache_modifier=".cg")
    else:
        place = first_program * 2 + 1
        acc = gl.load(cell_ptrs + place.to(gl.int64) * PLACE, cache_modifier=".cg")
        for part in range(1, parts):
            place = (first_program + part) * 2
            acc += gl.load(cell_ptrs + place.to(gl.int64) * PLACE, cache_modifier=".cg")
    return acc


@gluon.jit
def _write(  # type: ignore[no-untyped-def]
    acc, dtype: gl.constexpr, scratch, own: gl.constexpr, bias_ptr, out_ptr, m0, own_m, o0, M, out_size, stride_out,
    HAS_BIAS: gl.constexpr, MMA: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_O: gl.constexpr,
):  # fmt: skip
    """out[m, o] = acc[o, m] + bias[o] for the tokens from `own_m` on."""
    if HAS_BIAS:
        bo = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, MMA))
        acc += gl.load(bias_ptr + bo, mask=bo < out_size, other=0.0).to(gl.float32)[:, None]
    # Turned by way of shared memory, so that neighbouring threads write neighbouring outputs.
    TURNED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_O, BLOCK_O // 8], [gl.num_warps(), 1], [1, 0])
    turned = scratch.index(own)._reinterpret(dtype, [BLOCK_M, BLOCK_O], TURNED)
    barrier()
    turned.store(gl.permute(acc.to(dtype), (1, 0)))
    barrier()
    m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, OUT))
    out_ptrs = out_ptr + m.to(gl.int64)[:, None] * stride_out + o[None, :]
    gl.store(out_ptrs, turned.load(OUT), mask=((m >= own_m) & (m < M))[:, None] & (o < out_size)[None, :])


def owner(step, programs, total):  # type: ignore[no-untyped-def]
    """Which of `programs` makes `step` of a `total`: program i makes those from i·total // programs on."""
    return ((step + 1) * programs - 1) // total


_owner = gluon.jit(owner)


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    half: gl.constexpr, in_shared, beside_shared, w_shared, scales, scratch,
    in_arrived, in_freed, w_arrived, w_freed, s_ptr, up_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr,
    at, end, steps, tiles_m, total, M, out_size, stride_out, stride_uo, stride_uj, scale,
    RANK: gl.constexpr, S_SPLITS: gl.constexpr, BACKWARD: gl.constexpr, HAS_BIAS: gl.constexpr, CUT: gl.constexpr,
    BLOCK_M: gl.constexpr, BESIDE_M: gl.constexpr, BLOCK_O: gl.constexpr,
    IN_PLACES: gl.constexpr, W_PLACES: gl.constexpr,
):  # fmt: skip
    """One of the other two: decodes and multiplies its half of the outputs of all steps' tiles."""
    dtype: gl.constexpr = in_shared.dtype
    HALF_O: gl.constexpr = BLOCK_O // 2
    TILE_M: gl.constexpr = BLOCK_M + BESIDE_M
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    MMA_BESIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(BESIDE_M, 64), 16])
    # Two threads decode a row: four words each.
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [4, 1], [1, 0])
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    own: gl.constexpr = half * 4  # the first of this half's places in `scratch`
    programs = gl.num_programs(0)
    in_place, in_phase, w_place, w_phase = 0, 0, 0, 0
    while at < end:
        # The next part: `count` steps of a tile from `first` on. The tiles of M are neighbours: they decode the same
        # weights, which the L2 then reads once.
        tile = at // steps
        first = at % steps
        count = gl.minimum(steps - first, end - at)
        o0 = tile // tiles_m * BLOCK_O + half * HALF_O
        own_m = tile % tiles_m * TILE_M
        own_beside = own_m + BLOCK_M
        m0 = gl.minimum(own_m, gl.maximum(M - BLOCK_M, 0))
        beside_m0 = gl.minimum(own_beside, gl.maximum(M - BESIDE_M, 0))
        # All warps are done with what the part before left in shared memory.
        barrier()
        acc = gl.zeros((HALF_O, BLOCK_M), gl.float32, MMA)
        beside = acc
        if BESIDE_M > 0:
            beside = gl.zeros((HALF_O, BESIDE_M), gl.float32, MMA_BESIDE)
        # out = S · upᵀ, in the same accumulators, while the first bytes of the tile are on their way
        if RANK > 0 and first == 0:
            acc = _with_low_rank(
                acc, dtype, scratch, own, s_ptr, up_ptr, m0, o0, M, out_size, stride_uo, stride_uj, scale,
                RANK, S_SPLITS, BLOCK_M, HALF_O,
            )  # fmt: skip
            if BESIDE_M > 0:
                beside = _with_low_rank(
                    beside, dtype, scratch, own, s_ptr, up_ptr, beside_m0, o0, M, out_size, stride_uo, stride_uj, scale,
                    RANK, S_SPLITS, BESIDE_M, HALF_O,
                )  # fmt: skip

        hopper.mbarrier.wait(w_arrived.index(w_place), w_phase)
        absmax = scales.index(w_place * 2 + half).load(gl.SliceLayout(1, WORDS))
        words = w_shared.index(w_place * 2 + half).load(WORDS)
        pairs = _decoded(words, absmax, dtype)
        barrier()
        hopper.mbarrier.arrive(w_freed.index(w_place))
        w_place, w_phase = _next(w_place, w_phase, W_PLACES)
        scratch.index(own).store(pairs)
        for i in range(count):
            hopper.fence_async_shared()
            barrier()
            w_tile = scratch.index(own + (i & 1))._reinterpret(dtype, [64, 64], OPERAND)
            if BACKWARD:
                w_tile = w_tile.permute((1, 0))
            hopper.mbarrier.wait(in_arrived.index(in_place), in_phase)
            acc = hopper.warpgroup_mma(w_tile, in_shared.index(in_place).permute((1, 0)), acc, is_async=True)
            if BESIDE_M > 0:
                in_beside = beside_shared.index(in_place).permute((1, 0))
                beside = hopper.warpgroup_mma(w_tile, in_beside, beside, is_async=True)
            # While that runs: the next step's tile.
            hopper.mbarrier.wait(w_arrived.index(w_place), w_phase, pred=i + 1 < count)
            absmax = scales.index(w_place * 2 + half).load(gl.SliceLayout(1, WORDS))
            words = w_shared.index(w_place * 2 + half).load(WORDS)
            pairs = _decoded(words, absmax, dtype)
            if BESIDE_M > 0:
                acc, beside = hopper.warpgroup_mma_wait(num_outstanding=2, deps=[acc, beside])
            else:
                acc = hopper.warpgroup_mma_wait(num_outstanding=1, deps=[acc])
            barrier()
            hopper.mbarrier.arrive(in_freed.index(_before(in_place, IN_PLACES)), pred=i > 0)
            hopper.mbarrier.arrive(w_freed.index(w_place), pred=i + 1 < count)
            # The next place, unless nothing came there.
            later_place, later_phase = _next(w_place, w_phase, W_PLACES)
            w_place = gl.where(i + 1 < count, later_place, w_place)
            w_phase = gl.where(i + 1 < count, later_phase, w_phase)
            scratch.index(own + ((i + 1) & 1)).store(pairs)
            in_place, in_phase = _next(in_place, in_phase, IN_PLACES)
        if BESIDE_M > 0:
            acc, beside = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc, beside])
        else:
            acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        hopper.mbarrier.arrive(in_freed.index(_before(in_place, IN_PLACES)))
        at += count

        complete = count == steps
        if CUT:  # noqa: SIM102 (a constant: without it, what follows is not compiled)
            if count < steps:
                # A part. The programs that share the tile are those with its first and its last step, and all between.
                begin = (tile * steps).to(gl.int64)
                first_program = _owner(begin, programs, total).to(gl.int32)
                parts = _owner(begin + steps - 1, programs, total).to(gl.int32) - first_program + 1
                PLACE: gl.constexpr = BLOCK_O * TILE_M
                cell_o = half * HALF_O + gl.arange(0, HALF_O, layout=gl.SliceLayout(1, MMA))
                cell_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
                cell_ptrs = parts_ptr + cell_o[:, None] * TILE_M + cell_m[None, :]
                # A program has two places: for the part it begins with, and for the one that begins a tile.
                place = gl.program_id(0) * 2 + (first == 0).to(gl.int32)
                gl.store(cell_ptrs + place.to(gl.int64) * PLACE, acc)
                if BESIDE_M > 0:
                    beside_o = half * HALF_O + gl.arange(0, HALF_O, layout=gl.SliceLayout(1, MMA_BESIDE))
                    beside_m = BLOCK_M + gl.arange(0, BESIDE_M, layout=gl.SliceLayout(0, MMA_BESIDE))
                    beside_ptrs = parts_ptr + beside_o[:, None] * TILE_M + beside_m[None, :]
                    gl.store(beside_ptrs + place.to(gl.int64) * PLACE, beside)
                barrier()
                arrived = gl.atomic_add(arrivals_ptr + first_program * 2 + half, 1, sem="acq_rel", scope="gpu")
                complete = arrived == parts - 1
                if complete:
                    acc = _with_other_parts(acc, cell_ptrs, first_program, parts, first, PLACE)
                    if BESIDE_M > 0:
                        beside = _with_other_parts(beside, beside_ptrs, first_program, parts, first, PLACE)
        if complete:
            _write(acc, dtype, scratch, own, bias_ptr, out_ptr, m0, own_m, o0, M, out_size, stride_out,
                   HAS_BIAS, MMA, BLOCK_M, HALF_O)  # fmt: skip
            if BESIDE_M > 0:
                _write(beside, dtype, scratch, own, bias_ptr, out_ptr, beside_m0, own_beside, o0, M, out_size,
                       stride_out, HAS_BIAS, MMA_BESIDE, BESIDE_M, HALF_O)  # fmt: skip


@gluon.jit
def _fused_hopper_kernel(  # type: ignore[no-untyped-def]
    in_desc, beside_desc, w_desc, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, s_ptr, up_ptr, bias_ptr,
    out_ptr, parts_ptr, arrivals_ptr,
    M, out_size, sum_size, stride_out, row_blocks, stride_uo, stride_uj, scale,
    RANK: gl.constexpr, S_SPLITS: gl.constexpr, BACKWARD: gl.constexpr,
    NESTED: gl.constexpr, HAS_BIAS: gl.constexpr, CUT: gl.constexpr,
    BLOCK_M: gl.constexpr, BESIDE_M: gl.constexpr, BLOCK_O: gl.constexpr,
    IN_PLACES: gl.constexpr, W_PLACES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = in_desc.dtype
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    in_shared = gl.allocate_shared_memory(dtype, [IN_PLACES, BLOCK_M, 64], in_desc.layout)
    beside_shared = in_shared
    if BESIDE_M > 0:
        beside_shared = gl.allocate_shared_memory(dtype, [IN_PLACES, BESIDE_M, 64], beside_desc.layout)
    w_shared = gl.allocate_shared_memory(gl.int32, [W_PLACES * 2, 64, 8], w_desc.layout)
    scales_shared = gl.allocate_shared_memory(gl.float32, [W_PLACES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    scales = scales_shared._reinterpret(gl.float32, [W_PLACES * 2, 64], scales_shared.type.layout)
    # Four places for each half: two of them for decoded tiles, and all for what is turned before it is written.
    scratch = gl.allocate_shared_memory(gl.int32, [8, 64, 32], gl.NVMMASharedLayout(128, 32, 2))
    in_arrived = gl.allocate_shared_memory(gl.int64, [IN_PLACES, 1], BARRIER)
    in_freed = gl.allocate_shared_memory(gl.int64, [IN_PLACES, 1], BARRIER)
    w_arrived = gl.allocate_shared_memory(gl.int64, [W_PLACES, 1], BARRIER)
    w_freed = gl.allocate_shared_memory(gl.int64, [W_PLACES, 1], BARRIER)
    for place in gl.static_range(IN_PLACES):
        hopper.mbarrier.init(in_arrived.index(place), count=1)
        hopper.mbarrier.init(in_freed.index(place), count=2)
    for place in gl.static_range(W_PLACES):
        hopper.mbarrier.init(w_arrived.index(place), count=2)  # by the copies, and by who wrote the scales
        hopper.mbarrier.init(w_freed.index(place), count=2)
    hopper.fence_async_shared()

    # This program's stretch of all steps.
    tiles_m = gl.cdiv(M, BLOCK_M + BESIDE_M)
    steps = sum_size // 64
    total = tiles_m * gl.cdiv(out_size, BLOCK_O) * steps
    programs = gl.num_programs(0)
    if CUT:
        at = (gl.program_id(0).to(gl.int64) * total // programs).to(gl.int32)
        end = ((gl.program_id(0).to(gl.int64) + 1) * total // programs).to(gl.int32)
    else:
        at = gl.program_id(0) * steps
        end = at + steps
    gl.warp_specialize(
        [
            (_multiply, (
                0, in_shared, beside_shared, w_shared, scales, scratch, in_arrived, in_freed, w_arrived, w_freed,
                s_ptr, up_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr, at, end, steps, tiles_m, total,
                M, out_size, stride_out, stride_uo, stride_uj, scale,
                RANK, S_SPLITS, BACKWARD, HAS_BIAS, CUT, BLOCK_M, BESIDE_M, BLOCK_O, IN_PLACES, W_PLACES,
            )),
            (_multiply, (
                1, in_shared, beside_shared, w_shared, scales, scratch, in_arrived, in_freed, w_arrived, w_freed,
                s_ptr, up_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr, at, end, steps, tiles_m, total,
                M, out_size, stride_out, stride_uo, stride_uj, scale,
                RANK, S_SPLITS, BACKWARD, HAS_BIAS, CUT, BLOCK_M, BESIDE_M, BLOCK_O, IN_PLACES, W_PLACES,
            )),
            (_provide, (
                in_desc, beside_desc, w_desc, in_shared, beside_shared, w_shared, scales_shared,
                in_arrived, in_freed, w_arrived, w_freed, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr,
                at, end, steps, tiles_m, M, out_size, row_blocks,
                BACKWARD, NESTED, BLOCK_M, BESIDE_M, BLOCK_O, IN_PLACES, W_PLACES,
            )),
        ],
        # Warps, and registers of a thread; the first in the list has the rest of 65,536: 224 too.
        [4, 4], [224, 56],
    )  # fmt: skip


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


def fused_hopper(product: Product, tile_m: int, programs: int) -> None:
    """The product in two launches, one of them for S, in tiles of `tile_m` tokens, one of TILES_M.

    `programs` share all tiles' steps; with 0, each takes a tile. The operands have been checked by the caller; the
    input's rows begin at multiples of 16 bytes.
    """
    in_, weight, down_jR, up_Oj, scale, bias, out, backward = product
    (m, sum_size), out_size, (n, k) = in_.shape, out.shape[1], weight.shape
    tiles = cdiv(m, tile_m) * cdiv(out_size, BLOCK_O)
    rank, parts, arrivals, s = 0, None, None, None
    stride_up: tuple[int, ...] = (0, 0)
    if programs:
        programs = min(programs, tiles * (sum_size // 64))  # none is left without a step
        parts = in_.new_empty(programs, 2, BLOCK_O, tile_m, dtype=torch.float32)
        # Zeros, which the launch that makes S writes, if there is one.
        arrivals = (in_.new_zeros if down_jR is None else in_.new_empty)(programs, 2, dtype=torch.int32)
    if down_jR is not None and up_Oj is not None:
        rank, stride_up = down_jR.shape[0], up_Oj.stride()
        s = low_rank_parts(in_, down_jR, arrivals)
    # Tiles of the tensor memory accelerator: zeros outside.
    in_layout = gl.NVMMASharedLayout(128, 16, 2)
    in_tiles = beside_tiles = TensorDescriptor.from_tensor(in_, [BLOCK_M, 64], in_layout)
    if tile_m > BLOCK_M:
        beside_tiles = TensorDescriptor.from_tensor(in_, [tile_m - BLOCK_M, 64], in_layout)
    words_NK = weight.packed.view(n, k // 2).view(torch.int32)
    w_tiles = TensorDescriptor.from_tensor(words_NK, [64, 8], gl.NVMMASharedLayout(32, 32, 2))
    launch(
        _fused_hopper_kernel,
        (programs or tiles,),
        in_tiles, beside_tiles, w_tiles, weight.absmax, weight.code2, weight.absmax2, weight.offset,
        s, up_Oj, bias, out, parts, arrivals,
        m, out_size, sum_size, out.stride(0), k // 64, *stride_up, float(scale),
        RANK=rank, S_SPLITS=0 if s is None else s.shape[0], BACKWARD=backward,
        NESTED=weight.code2 is not None, HAS_BIAS=bias is not None, CUT=programs > 0,
        BLOCK_M=BLOCK_M, BESIDE_M=tile_m - BLOCK_M, BLOCK_O=BLOCK_O,
        IN_PLACES=_IN_PLACES[tile_m], W_PLACES=_W_PLACES,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
