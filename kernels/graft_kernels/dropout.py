"""Dropout whose mask is a function of a seed and a place, so that nobody needs to keep it.

    m[i, j] = 1 if u(seed, i, j) >= p·2^32 else 0            x̃ = m ∘ x / (1 - p)

u is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the key `seed` and the
counter (j // 4, i, 0, 0); its four words belong to four neighbouring columns. The forward and the backward draw the
same mask on every device and with every tile size: the plain PyTorch version below gives the bits of the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft_kernels.launch import cdiv, launch, runs_kernels, tl, triton

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The first word that is kept: p of all words lie below it."""
    return min(int(p * 2**32), _WORD)


def _high_and_low(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The two words of the 64-bit product of a word and a constant, without leaving int64's positive half."""
    low = a * (factor & 0xFFFF)
    middle = a * (factor >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def random_words(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """u(seed, i, j) as int64 [rows, columns] in [0, 2^32)."""
    zero = torch.zeros(rows, cdiv(columns, 4), dtype=torch.int64, device=device)
    c0 = zero + torch.arange(cdiv(columns, 4), device=device)
    c1 = zero + torch.arange(rows, device=device)[:, None]
    c2, c3 = zero, zero
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _high_and_low(c0, _MULTIPLIERS[0])
        high1, low1 = _high_and_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1).view(rows, -1)[:, :columns]


def dropout_mask(shape: tuple[int, int], p: float, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """m / (1 - p), [rows, columns]: 0 with probability p, else 1 / (1 - p)."""
    kept = random_words(*shape, seed, device) >= threshold(p)
    return kept.to(dtype) * (1.0 / (1.0 - p))


@triton.jit
def keep_tile(row, group, seed, threshold, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):  # type: ignore[no-untyped-def]
    """m as [BLOCK_M, 4·BLOCK_G] booleans, for the rows `row` and the columns 4·group .. 4·group + 3."""
    c0 = tl.broadcast_to(group[None, :], (BLOCK_M, BLOCK_G)).to(tl.uint32)
    c1 = tl.broadcast_to(row[:, None], (BLOCK_M, BLOCK_G)).to(tl.uint32)
    zero = tl.zeros((BLOCK_M, BLOCK_G), tl.uint32)
    u0, u1, u2, u3 = tl.philox(seed, c0, c1, zero, zero)
    limit = threshold.to(tl.uint32)
    even = tl.join(u0 >= limit, u2 >= limit)
    odd = tl.join(u1 >= limit, u3 >= limit)
    return tl.reshape(tl.join(even, odd), (BLOCK_M, 4 * BLOCK_G))


@triton.jit(do_not_specialize=["seed", "threshold"])
def _dropout_kernel(  # type: ignore[no-untyped-def]
    x, out, M, K, x_stride, out_stride, seed, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    group = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
    mask = (row < M)[:, None] & (column < K)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    kept = keep_tile(row, group, seed, threshold, BLOCK_M, BLOCK_K // 4)
    value = tl.where(kept, value * keep_scale, 0.0)
    at = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def dropout(x_MK: Tensor, p: float, seed: int) -> Tensor:
    """x̃ [M, K], a new tensor. No autograd."""
    if not runs_kernels(x_MK):
        return x_MK * dropout_mask((x_MK.shape[0], x_MK.shape[1]), p, seed, x_MK.device, x_MK.dtype)
    out = torch.empty(x_MK.shape, dtype=x_MK.dtype, device=x_MK.device)
    M, K = x_MK.shape
    grid = (cdiv(M, 16), cdiv(K, 256))
    args = (x_MK, out, M, K, x_MK.stride(0), out.stride(0), seed, threshold(p), 1.0 / (1.0 - p))
    launch(_dropout_kernel, grid, *args, BLOCK_M=16, BLOCK_K=256, num_warps=4)
    return out
