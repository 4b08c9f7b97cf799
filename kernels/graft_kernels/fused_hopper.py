"""The fused product of `fused_linear.py` on Hopper's tensor cores, for some hundred tokens.

Shapes and mathematics are `fused_linear.py`'s: out[m, o] = Σ_R in[m, R]·W[o, R] + S[m, j]·up[o, j] (+ bias[o]), with
W decoded where it is used. S [M, r] is made by a launch before, in parts of the reduction; here the parts are added,
scaled and rounded.

From some 150 tokens on, the product takes longer than the weight's bytes, and what decides is whether decoding happens
beside the tensor cores or before them. `tl.dot` waits for its result in every step, because the decoded operand has one
place in shared memory. Here the order is written down (in Gluon, Triton's lower level):

    step i    tensor cores: acc += W_i · in_iᵀ        the warps: decode W_{i+1}, into another place
              wait for step i - 1, not for i          start copying in_{i+2} (TMA), load the bytes of W_{i+2}

Three places for decoded tiles, four for the input: a place is written when the step that read it is known to be done by
all warps, which is the barrier at the head of a step. The weight is the left operand: a warpgroup then multiplies 64
outputs with 256 tokens, and reads least from shared memory, whose rate is what binds here (80 bytes a clock; 96 the
other way round, which took 20 % longer; all on an H100, 512 tokens).

Tiles seldom fill the card: 64 of them leave half of 132 multiprocessors without work, 448 are four rounds, the last of
them half empty. So a program may take an equal stretch of all steps of all tiles, wherever tiles begin and end
(stream-K). Where a stretch ends inside a tile, each part of it is left in memory, and the program that comes last adds
them: of two, the other's to its own, and of more all anew, from the first step's to the last's. Which one comes last
depends on the run; the sum does not, since a + b is b + a.

The decoded values are those of `nf4.decode` to the last bit. Gluon has no interpreter, so on a machine without a card
this kernel is compiled and not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft_kernels.launch import AVAILABLE, cdiv, launch, next_power_of_2, tl, triton

# Tokens of a program that makes a part of S, and how many of them a card works on well.
_LOW_RANK_BLOCK_M = 16
_PROGRAMS = 128

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
def _decoded(  # type: ignore[no-untyped-def]
    words, absmax, table, rows: gl.constexpr, columns: gl.constexpr, RUN: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """[rows, columns] from words [rows, columns/PER, PER/8] and the scales of those runs of PER weights."""
    # Bytes rising, high nibble first; `join` keeps the eight nibbles of a word in their thread.
    halves = gl.join(words, words >> 16)
    quarters = gl.join(halves, halves >> 8)
    nibbles = gl.join(quarters >> 4, quarters) & 15
    PER: gl.constexpr = RUN.size_per_thread[2]
    # The sixteen values lie in shared memory: any mix of sixteen words is free of bank conflicts.
    code = gl.gather(table, gl.reshape(nibbles, (rows * columns,)), 0)
    code = gl.convert_layout(gl.reshape(code, (rows, columns // PER, PER)), RUN, assert_trivial=True)
    w = (code * gl.expand_dims(absmax, 2)).to(dtype)
    return gl.reshape(w, (rows, columns))


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
    in_desc, in_shared, arrived, m0, step, at, inside, STAGES: gl.constexpr, BLOCK_R: gl.constexpr
):  # fmt: skip
    """Start copying the input of a tile's step, as the `at`-th copy of this program, if it is `inside` the part."""
    bar = arrived.index(at % STAGES)
    hopper.mbarrier.expect(bar, in_desc.block_type.nbytes, pred=inside)
    hopper.tma.async_copy_global_to_shared(
        in_desc, [m0, step * BLOCK_R], bar, in_shared.index(at % STAGES), pred=inside
    )


@gluon.jit
def _fused_hopper_kernel(  # type: ignore[no-untyped-def]
    in_desc, words_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, s_ptr, up_ptr, bias_ptr, out_ptr,
    parts_ptr, arrivals_ptr,
    M, out_size, sum_size, stride_out, row_words, row_blocks, stride_uo, stride_uj, scale,
    RANK: gl.constexpr, S_SPLITS: gl.constexpr, BACKWARD: gl.constexpr,
    NESTED: gl.constexpr, HAS_BIAS: gl.constexpr, CUT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = in_desc.dtype
    ROWS: gl.constexpr = BLOCK_R if BACKWARD else BLOCK_O
    COLUMNS: gl.constexpr = BLOCK_O if BACKWARD else BLOCK_R
    WARPS: gl.constexpr = gl.num_warps()
    PER: gl.constexpr = ROWS * COLUMNS // (32 * WARPS)
    RUNS: gl.constexpr = COLUMNS // PER
    # A warpgroup takes 64 outputs; where there are no more, two share the tokens.
    DOWN: gl.constexpr = BLOCK_O // 16
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [DOWN, WARPS // DOWN], [16, BLOCK_M * DOWN // WARPS, 16])
    # A thread decodes a run of PER weights: some words, one scale.
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, PER // 8], [32 // RUNS, RUNS, 1], [WARPS, 1, 1], [2, 1, 0])
    RUN: gl.constexpr = gl.BlockedLayout([1, 1, PER], [32 // RUNS, RUNS, 1], [WARPS, 1, 1], [2, 1, 0])

    in_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_R], in_desc.layout)
    w_shared = gl.allocate_shared_memory(dtype, [3, ROWS, COLUMNS], gl.NVMMASharedLayout(128, 16, 2))
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(arrived.index(stage), count=1)
    hopper.fence_async_shared()
    offset = gl.load(offset_ptr) if NESTED else 0.0
    table = gl.load(code_ptr + gl.arange(0, 16, layout=gl.BlockedLayout([1], [32], [WARPS], [0])))

    # This program's stretch of all steps.
    tiles_m = gl.cdiv(M, BLOCK_M)
    steps = gl.cdiv(sum_size, BLOCK_R)
    total = tiles_m * gl.cdiv(out_size, BLOCK_O) * steps
    programs = gl.num_programs(0)
    at = gl.program_id(0) * total // programs
    end = (gl.program_id(0) + 1) * total // programs
    done = 0  # steps so far, over all parts: which place in shared memory comes next
    while at < end:
        # The next part: `count` steps of a tile from `first` on. The tiles of M are neighbours: they decode the same
        # weights, which the L2 then reads once.
        tile = at // steps
        first = at % steps
        count = gl.minimum(steps - first, end - at)
        m0 = tile % tiles_m * BLOCK_M
        o0 = tile // tiles_m * BLOCK_O

        # Where this part of the weight's bytes and of their scales begins.
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
        run = gl.arange(0, RUNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
        word = gl.arange(0, PER // 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))
        srow = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RUN)))
        srun = gl.arange(0, RUNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, RUN)))
        if BACKWARD:
            row += first * BLOCK_R
            srow += first * BLOCK_R
            column_word = o0 // 8
            block = srow[:, None] * row_blocks + (o0 // 64 + srun * PER // 64)[None, :]
            word_step = BLOCK_R * row_words
            block_step = BLOCK_R * row_blocks
            w_inside = ((o0 + run * PER) < out_size)[None, :] & (row >= 0)[:, None]
            s_inside = ((o0 + srun * PER) < out_size)[None, :] & (srow >= 0)[:, None]
        else:
            row += o0
            srow += o0
            column_word = first * (BLOCK_R // 8)
            block = srow[:, None] * row_blocks + (first * (BLOCK_R // 64) + srun * PER // 64)[None, :]
            word_step = BLOCK_R // 8
            block_step = BLOCK_R // 64
            w_inside = (row < out_size)[:, None] & (run >= 0)[None, :]
            s_inside = (srow < out_size)[:, None] & (srun >= 0)[None, :]
        run_at = row.to(gl.int64)[:, None] * row_words + (run * (PER // 8))[None, :]
        word_ptrs = words_ptr + column_word + gl.expand_dims(run_at, 2) + word[None, None, :]
        w_mask = gl.expand_dims(w_inside, 2) & (word >= 0)[None, None, :]

        # Before the first step: the input of two steps is under way, one tile is decoded, the next one's bytes are
        # here. All warps are done with what the part before left in these places.
        barrier()
        for stage in gl.static_range(STAGES - 2):
            _fetch(in_desc, in_shared, arrived, m0, first + stage, done + stage, stage < count, STAGES, BLOCK_R)
        words = gl.load(word_ptrs, mask=w_mask, other=0)
        absmax = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, s_inside, NESTED)
        w_shared.index(done % 3).store(_decoded(words, absmax, table, ROWS, COLUMNS, RUN, dtype))
        more = count > 1
        words = gl.load(word_ptrs + word_step, mask=w_mask & more, other=0)
        absmax = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block + block_step, s_inside & more, NESTED)
        more = count > 2
        index, scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block + 2 * block_step, s_inside & more, NESTED)
        word_ptrs += word_step
        block += 2 * block_step

        acc = gl.zeros((BLOCK_O, BLOCK_M), gl.float32, MMA)
        for i in range(count):
            here = done + i
            hopper.mbarrier.wait(arrived.index(here % STAGES), (here // STAGES) & 1)
            hopper.fence_async_shared()
            barrier()
            w_tile = w_shared.index(here % 3)
            if BACKWARD:
                w_tile = w_tile.permute((1, 0))
            acc = hopper.warpgroup_mma(w_tile, in_shared.index(here % STAGES).permute((1, 0)), acc, is_async=True)
            # While that runs: the input of a later step, the bytes of the one after the next, and the next one's tile.
            later = i + STAGES - 2
            _fetch(in_desc, in_shared, arrived, m0, first + later, done + later, later < count, STAGES, BLOCK_R)
            word_ptrs += word_step
            block += block_step
            later_words = gl.load(word_ptrs, mask=w_mask & (i + 2 < count), other=0)
            later_index, later_scale2 = _coded_scales(
                absmax_ptr, absmax2_ptr, block, s_inside & (i + 3 < count), NESTED
            )
            later_absmax = _decoded_scales(index, scale2, code2_ptr, offset, NESTED)
            w_shared.index((here + 1) % 3).store(_decoded(words, absmax, table, ROWS, COLUMNS, RUN, dtype))
            words, absmax, index, scale2 = later_words, later_absmax, later_index, later_scale2
            acc = hopper.warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        done += count
        at += count

        # out += S · upᵀ, in the same accumulators, by the part that ends the tile
        if RANK > 0 and first + count == steps:
            # Sixteen ranks at a time: registers hold little beside the sums.
            LOW: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
            LOW_SHARED: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
            lm = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LOW))
            lo = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, LOW))
            for j0 in range(0, RANK, 16):
                lj = j0 + gl.arange(0, 16, layout=gl.SliceLayout(0, LOW))
                s = gl.zeros((BLOCK_M, 16), gl.float32, LOW)
                for split in gl.static_range(S_SPLITS):
                    s += gl.load(s_ptr + (split * M + lm)[:, None] * RANK + lj[None, :],
                                 mask=(lm < M)[:, None] & (lj < RANK)[None, :], other=0.0)  # fmt: skip
                up = gl.load(up_ptr + lo.to(gl.int64)[:, None] * stride_uo + lj[None, :] * stride_uj,
                             mask=(lo < out_size)[:, None] & (lj < RANK)[None, :], other=0.0)  # fmt: skip
                s_shared = gl.allocate_shared_memory(dtype, [BLOCK_M, 16], LOW_SHARED, (s * scale).to(dtype))
                up_shared = gl.allocate_shared_memory(dtype, [BLOCK_O, 16], LOW_SHARED, up.to(dtype))
                hopper.fence_async_shared()
                barrier()
                acc = hopper.warpgroup_mma(up_shared, s_shared.permute((1, 0)), acc)

        complete = count == steps
        if CUT:  # noqa: SIM102 (a constant: without it, what follows is not compiled)
            if count < steps:
                # A part. The programs that share the tile are those with its first and its last step, and all between.
                begin = tile * steps
                first_program = ((begin + 1) * programs - 1) // total
                parts = ((begin + steps) * programs - 1) // total - first_program + 1
                cell_o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, MMA))
                cell_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
                cell_ptrs = parts_ptr + cell_o[:, None] * BLOCK_M + cell_m[None, :]
                # A program has two places: for the part it begins with, and for the one that begins a tile.
                place = gl.program_id(0) * 2 + (first == 0).to(gl.int32)
                gl.store(cell_ptrs + place.to(gl.int64) * (BLOCK_O * BLOCK_M), acc)
                barrier()
                before = gl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel", scope="gpu")
                complete = before == parts - 1
                if complete:
                    if parts == 2:
                        place = first_program * 2 + gl.where(first == 0, 2, 1)
                        acc += gl.load(cell_ptrs + place.to(gl.int64) * (BLOCK_O * BLOCK_M), cache_modifier=".cg")
                    else:
                        place = first_program * 2 + 1
                        acc = gl.load(cell_ptrs + place.to(gl.int64) * (BLOCK_O * BLOCK_M), cache_modifier=".cg")
                        for part in range(1, parts):
                            place = (first_program + part) * 2
                            acc += gl.load(cell_ptrs + place.to(gl.int64) * (BLOCK_O * BLOCK_M), cache_modifier=".cg")
        if complete:
            if HAS_BIAS:
                bo = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, MMA))
                acc += gl.load(bias_ptr + bo, mask=bo < out_size, other=0.0).to(gl.float32)[:, None]
            # Turned by way of shared memory, so that neighbouring threads write neighbouring outputs.
            OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_O, BLOCK_O // 8], [WARPS, 1], [1, 0])
            m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
            o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, OUT))
            out = gl.convert_layout(gl.permute(acc.to(out_ptr.dtype.element_ty), (1, 0)), OUT)
            out_ptrs = out_ptr + m.to(gl.int64)[:, None] * stride_out + o[None, :]
            gl.store(out_ptrs, out, mask=(m < M)[:, None] & (o < out_size)[None, :])


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


def input_tiles(in_: Tensor, block_m: int, block_r: int) -> Any:
    """The input [M, R] as the tensor memory accelerator copies it: tiles [block_m, block_r], zeros outside."""
    return TensorDescriptor.from_tensor(in_, [block_m, block_r], gl.NVMMASharedLayout(128, 16, 2))
