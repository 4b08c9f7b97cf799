"""The fused product of `fused_linear.py` on Hopper's tensor cores, for some hundred tokens.

Shapes and mathematics are `fused_linear.py`'s: out[m, o] = Σ_R in[m, R]·W[o, R] + S[m, j]·up[o, j] (+ bias[o]), with
W decoded where it is used and S [M, r], scaled and rounded, given.

From some 150 tokens on, the product takes longer than the weight's bytes, and what decides is whether decoding happens
beside the tensor cores or before them. `tl.dot` waits for its result in every step, because the decoded operand has one
place in shared memory. Here the order is written down (in Gluon, Triton's lower level):

    step i    tensor cores: acc += W_i · in_iᵀ        the warps: decode W_{i+1}, into another place
              wait for step i - 1, not for i          start copying in_{i+2} (TMA), load the bytes of W_{i+2}

Three places for decoded tiles, four for the input: a place is written when the step that read it is known to be done by
all warps, which is the barrier at the head of a step. The weight is the left operand: a warpgroup then multiplies 64
outputs with 256 tokens, and reads least from shared memory, whose rate is what binds here (80 bytes a clock; 96 the
other way round, which took 20 % longer; all on an H100, 512 tokens).

The decoded values are those of `nf4.decode` to the last bit. Gluon has no interpreter, so on a machine without a card
this kernel is compiled and not run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft_kernels.launch import AVAILABLE

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
    in_desc, in_shared, arrived, m0, first, step, count, STAGES: gl.constexpr, BLOCK_R: gl.constexpr
):  # fmt: skip
    """Start copying the input of a step, if there is such a step."""
    bar = arrived.index(step % STAGES)
    inside = step < count
    hopper.mbarrier.expect(bar, in_desc.block_type.nbytes, pred=inside)
    hopper.tma.async_copy_global_to_shared(
        in_desc, [m0, (first + step) * BLOCK_R], bar, in_shared.index(step % STAGES), pred=inside
    )


@gluon.jit
def _fused_hopper_kernel(  # type: ignore[no-untyped-def]
    in_desc, words_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, s_ptr, up_ptr, bias_ptr, out_ptr,
    M, out_size, sum_size, stride_out, row_words, row_blocks, stride_s, stride_uo, stride_uj,
    steps_per_split,
    RANK: gl.constexpr, RANK_BLOCK: gl.constexpr, BACKWARD: gl.constexpr, NESTED: gl.constexpr, HAS_BIAS: gl.constexpr,
    SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
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

    # The tiles of M are neighbours in the grid: they decode the same weights, which the L2 then reads once.
    m0 = gl.program_id(0) * BLOCK_M
    o0 = gl.program_id(1) * BLOCK_O
    split = gl.program_id(2)
    steps = gl.cdiv(sum_size, BLOCK_R)
    first = split * steps_per_split
    count = gl.minimum(steps - first, steps_per_split)

    in_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_R], in_desc.layout)
    w_shared = gl.allocate_shared_memory(dtype, [3, ROWS, COLUMNS], gl.NVMMASharedLayout(128, 16, 2))
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(arrived.index(stage), count=1)
    hopper.fence_async_shared()
    barrier()

    # Where this program's part of the weight's bytes and of their scales begins.
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
    at = gl.expand_dims(row.to(gl.int64)[:, None] * row_words + (run * (PER // 8))[None, :], 2) + word[None, None, :]
    word_ptrs = words_ptr + column_word + at
    w_mask = gl.expand_dims(w_inside, 2) & (word >= 0)[None, None, :]
    offset = gl.load(offset_ptr) if NESTED else 0.0
    table = gl.load(code_ptr + gl.arange(0, 16, layout=gl.BlockedLayout([1], [32], [WARPS], [0])))

    # Before the first step: the input of two steps is under way, one tile is decoded, the bytes of the next are here.
    for stage in gl.static_range(STAGES - 2):
        _fetch(in_desc, in_shared, arrived, m0, first, stage, count, STAGES, BLOCK_R)
    words = gl.load(word_ptrs, mask=w_mask, other=0)
    absmax = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, s_inside, NESTED)
    w_shared.index(0).store(_decoded(words, absmax, table, ROWS, COLUMNS, RUN, dtype))
    more = count > 1
    words = gl.load(word_ptrs + word_step, mask=w_mask & more, other=0)
    absmax = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block + block_step, s_inside & more, NESTED)
    more = count > 2
    index, scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block + 2 * block_step, s_inside & more, NESTED)
    word_ptrs += word_step
    block += 2 * block_step

    acc = gl.zeros((BLOCK_O, BLOCK_M), gl.float32, MMA)
    for i in range(count):
        hopper.mbarrier.wait(arrived.index(i % STAGES), (i // STAGES) & 1)
        hopper.fence_async_shared()
        barrier()
        w_tile = w_shared.index(i % 3)
        if BACKWARD:
            w_tile = w_tile.permute((1, 0))
        acc = hopper.warpgroup_mma(w_tile, in_shared.index(i % STAGES).permute((1, 0)), acc, is_async=True)
        # While that runs: the input of a later step, the bytes of the one after the next, and the next one's tile.
        _fetch(in_desc, in_shared, arrived, m0, first, i + STAGES - 2, count, STAGES, BLOCK_R)
        word_ptrs += word_step
        block += block_step
        later_words = gl.load(word_ptrs, mask=w_mask & (i + 2 < count), other=0)
        later_index, later_scale2 = _coded_scales(absmax_ptr, absmax2_ptr, block, s_inside & (i + 3 < count), NESTED)
        later_absmax = _decoded_scales(index, scale2, code2_ptr, offset, NESTED)
        w_shared.index((i + 1) % 3).store(_decoded(words, absmax, table, ROWS, COLUMNS, RUN, dtype))
        words, absmax, index, scale2 = later_words, later_absmax, later_index, later_scale2
        acc = hopper.warpgroup_mma_wait(num_outstanding=1, deps=[acc])
    acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc])

    # out += S · upᵀ, in the same accumulators (of one part, where the reduction is cut)
    if RANK > 0 and split == 0:
        LOW: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // RANK_BLOCK, RANK_BLOCK // 8], [WARPS, 1], [1, 0])
        LOW_SHARED: gl.constexpr = gl.NVMMASharedLayout(2 * RANK_BLOCK, 16, 2)
        lm = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LOW))
        lo = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, LOW))
        lj = gl.arange(0, RANK_BLOCK, layout=gl.SliceLayout(0, LOW))
        s = gl.load(s_ptr + lm.to(gl.int64)[:, None] * stride_s + lj[None, :],
                    mask=(lm < M)[:, None] & (lj < RANK)[None, :], other=0.0)  # fmt: skip
        up = gl.load(up_ptr + lo.to(gl.int64)[:, None] * stride_uo + lj[None, :] * stride_uj,
                     mask=(lo < out_size)[:, None] & (lj < RANK)[None, :], other=0.0)  # fmt: skip
        s_shared = gl.allocate_shared_memory(dtype, [BLOCK_M, RANK_BLOCK], LOW_SHARED, s.to(dtype))
        up_shared = gl.allocate_shared_memory(dtype, [BLOCK_O, RANK_BLOCK], LOW_SHARED, up.to(dtype))
        hopper.fence_async_shared()
        barrier()
        acc = hopper.warpgroup_mma(up_shared, s_shared.permute((1, 0)), acc)

    if HAS_BIAS and SPLITS == 1:
        bo = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, MMA))
        acc += gl.load(bias_ptr + bo, mask=bo < out_size, other=0.0).to(gl.float32)[:, None]
    # Turned by way of shared memory, so that neighbouring threads write neighbouring outputs.
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_O, BLOCK_O // 8], [WARPS, 1], [1, 0])
    m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, OUT))
    if SPLITS > 1:
        out_ptr += split.to(gl.int64) * M * out_size
    out = gl.convert_layout(gl.permute(acc.to(out_ptr.dtype.element_ty), (1, 0)), OUT)
    out_ptrs = out_ptr + m.to(gl.int64)[:, None] * stride_out + o[None, :]
    gl.store(out_ptrs, out, mask=(m < M)[:, None] & (o < out_size)[None, :])


def input_tiles(in_: Tensor, block_m: int, block_r: int) -> Any:
    """The input [M, R] as the tensor memory accelerator copies it: tiles [block_m, block_r], zeros outside."""
    return TensorDescriptor.from_tensor(in_, [block_m, block_r], gl.NVMMASharedLayout(128, 16, 2))
