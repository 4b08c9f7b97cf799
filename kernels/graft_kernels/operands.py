"""What the ops on rows [T, ...] share: a look at what they were given, and LoRA's columns beside a result.

Rows lie anywhere, the elements of a row side by side. An input that is not so is copied; an output must be.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def output(name: str, given: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`given`, checked, or a new tensor. An output is never copied, so its rows must be fit to be written.

    Raises:
        ValueError: another shape or dtype, or rows that are not contiguous or overlap.
    """
    if given is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if given.shape != shape or given.dtype != like.dtype:
        raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, expected {like.dtype} {tuple(shape)}")
    check_writable(name, given)
    return given


def check_writable(name: str, tensor: Tensor) -> None:
    """Rows that are contiguous, and apart.

    Raises:
        ValueError: they are not.
    """
    width, contiguous = 1, True
    for size, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1], strict=True):
        contiguous = contiguous and (stride == width or size == 1)
        width *= size
    if not contiguous or (tensor.shape[0] > 1 and tensor.stride(0) < width):
        raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous rows that do not overlap")


def row_stride(tensor: Tensor | None) -> int:
    """From row to row; 0 for an operand that there is not."""
    return 0 if tensor is None else tensor.stride(0)


def low_rank_term(
    name: str, left: str, right: str, given: Sequence[Tensor] | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The factors [T, at least R], [R, width] of a product that is added to `like`, checked; (None, None) without.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if given is None:
        return None, None
    tokens, width = like.shape
    right_RK = operand(f"{name}'s {right}", given[1], (None, width), like.dtype).contiguous()
    left_TR = operand(f"{name}'s {left}", given[0], (tokens, None), like.dtype)
    if left_TR.shape[1] < right_RK.shape[0]:
        raise ValueError(f"{name}'s {left} has {left_TR.shape[1]} columns, {right} has {right_RK.shape[0]} rows")
    return left_TR, right_RK


def output_with_tail(
    given: Tensor | None, like: Tensor, name: str, factor_RK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(out [T, width + p], the factor, checked): a result shaped as `like`, and p columns for what `write_tail` writes.

    Without a factor p is 0; without `given` it is the smallest that will do.

    Raises:
        ValueError: shapes or dtypes do not fit; or p is too small, or no multiple of 16.
    """
    tokens, width = like.shape
    if factor_RK is None:
        return output("out", given, (tokens, width), like), None
    factor_RK = operand(name, factor_RK, (None, width), like.dtype).contiguous()
    rank = factor_RK.shape[0]
    tail = 16 * cdiv(rank, 16) if given is None else given.shape[-1] - width
    if tail < rank or tail % 16 != 0:
        raise ValueError(
            f"out has {width + tail} columns; with an adapter of rank {rank} it needs {width} + p, "
            "p >= rank a multiple of 16"
        )
    return output("out", given, (tokens, width + tail), like), factor_RK


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
