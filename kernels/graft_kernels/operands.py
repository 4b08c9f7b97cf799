"""What the ops on matrices [T, width] share: a look at what they were given, and LoRA's columns beside a result.

A matrix has rows anywhere and the elements of a row side by side. An input that is not so is copied; an output must be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft_kernels.launch import cdiv


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the arithmetic runs in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` with a contiguous last dimension, after a look at its shape (None: any size) and dtype.

    Raises:
        ValueError: another shape or dtype, or nothing in a row.
    """
    given = tuple(tensor.shape)
    if len(given) != len(shape) or any(want not in (None, size) for size, want in zip(given, shape, strict=True)):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {given}, expected ({expected})")
    if not tensor.is_floating_point() or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype or 'a floating-point dtype'}")
    if len(given) == 2 and given[1] == 0:
        raise ValueError(f"{name} has shape {given}: nothing in a row")
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def output(name: str, given: Tensor | None, shape: tuple[int, int], like: Tensor) -> Tensor:
    """`given`, checked, or a new matrix. An output is never copied, so its rows must be fit to be written.

    Raises:
        ValueError: another shape or dtype, or rows that are not contiguous or overlap.
    """
    if given is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if tuple(given.shape) != shape or given.dtype != like.dtype:
        raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, expected {like.dtype} {shape}")
    if given.stride(1) != 1 or (shape[0] > 1 and given.stride(0) < shape[1]):
        raise ValueError(f"{name} has strides {given.stride()}, expected contiguous rows that do not overlap")
    return given


def tail_columns(rank: int, width: int, out: Tensor | None) -> int:
    """p: how many columns stand behind the first `width` of `out`, or the fewest that hold the rank without one.

    Raises:
        ValueError: too few, or no multiple of 16.
    """
    tail = 16 * cdiv(rank, 16) if out is None else out.shape[-1] - width
    if tail < rank or tail % 16 != 0:
        raise ValueError(
            f"out has {width + tail} columns; with an adapter of rank {rank} it needs {width} + p, "
            "p >= rank a multiple of 16"
        )
    return tail


def write_tail(rows: Tensor, width: int, factor_RK: Tensor, scale: float = 1.0) -> None:
    """The columns behind `width` become scale·(those before it)·factorᵀ and zeros: one product of the library."""
    end = width + factor_RK.shape[0]
    product = rows[:, width:end]
    if scale == 1.0:
        torch.mm(rows[:, :width], factor_RK.t(), out=product)
    else:
        torch.addmm(product, rows[:, :width], factor_RK.t(), beta=0, alpha=scale, out=product)
    if end < rows.shape[1]:
        rows[:, end:].zero_()
