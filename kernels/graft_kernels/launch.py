"""Which tensors take the Triton kernels, and how one is launched.

Every op of this package has a plain PyTorch reference and kernels. `runs_kernels` decides between them, the same way
for all: kernels for CUDA tensors in fp32, fp16 or bf16, the reference for everything else. Two special modes serve the
tests on a machine without a card:

    TRITON_INTERPRET=1 in the environment   kernels run on CPU tensors through Triton's interpreter (fp32 and fp16 only:
                                            the interpreter's bf16 arithmetic is silently wrong)
    with compile_only("sm_90") as compiled  kernels called with tensors on the meta device are compiled for that card
                                            and not launched; `compiled` collects their binaries

Triton compiles a kernel for every combination of integers that are divisible by 16. Of those whose divisibility makes
no better code (numbers of programs, of blocks a row) a kernel says `do_not_specialize`, or other shapes build it again.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the kernels below are never called, only defined
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=object)
    AVAILABLE = INTERPRETED = False
else:
    AVAILABLE = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)

__all__ = [
    "INTERPRETED",
    "Compiled",
    "as_rows",
    "cdiv",
    "compile_only",
    "is_built",
    "is_hopper",
    "launch",
    "next_power_of_2",
    "runs_kernels",
    "shared_memory",
    "tl",
    "triton",
    "tuned",
]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_120": 120}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_120": 101_376}  # bytes a program may take


class Compiled(NamedTuple):
    """One kernel, compiled for a card that is not there."""

    name: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    shared: int  # bytes
    cubin: bytes


_compiled: list[Compiled] | None = None
_card_compiled_for: str | None = None


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉ for positive numbers."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as a matrix [M, K] whose rows lie anywhere and whose elements in a row lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def runs_kernels(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors is to run its kernels; False means the reference.

    Raises:
        ValueError: the tensors lie on different devices.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    for tensor in given[1:]:
        if tensor.device != device:
            raise ValueError(f"the operands lie on {device} and {tensor.device}; bring them to one device")
    if not AVAILABLE or any(tensor.is_floating_point() and tensor.dtype not in KERNEL_DTYPES for tensor in given):
        return False
    if device.type == "cpu":
        return INTERPRETED
    return device.type == "cuda" or (device.type == "meta" and _compiled is not None)


def is_built(kernel: Any) -> bool:
    """Whether this machine has compiled the kernel before, in whatever version: Triton keeps binaries on the disk."""
    return AVAILABLE and any(Path(triton.knobs.cache.dir).glob(f"*/{kernel.fn.__name__}.cubin"))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)` on the device of the first tensor among the arguments.

    An empty grid launches nothing, so that zero tokens need no case of their own in the ops.
    """
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    elif device.type == "meta":
        assert _compiled is not None, "runs_kernels() lets no meta tensor through outside compile_only()"
        _record(kernel, grid, args, options, _compiled)
    else:
        kernel[grid](*args, **options)


def _record(kernel: Any, grid: tuple[int, ...], args: Any, options: Any, compiled: list[Compiled]) -> None:
    result = kernel.warmup(*args, grid=grid, **options)
    names = list(kernel.arg_names)
    constants = {names[path[0]]: value for path, value in result.src.constants.items() if len(path) == 1}
    compiled.append(
        Compiled(
            name=kernel.fn.__name__,
            constants=constants,
            num_warps=result.metadata.num_warps,
            num_stages=result.metadata.num_stages,
            shared=result.metadata.shared,
            cubin=result.asm["cubin"],
        )
    )


@contextlib.contextmanager
def compile_only(card: str) -> Iterator[list[Compiled]]:
    """Compile for `card` ("sm_80", "sm_90", "sm_120") what is launched on meta tensors, without a card.

    The launchers themselves run, so block sizes, warps and the specialisation of every argument are the real ones. Not
    for a process that also launches on a card, nor for one that interprets.

    Raises:
        ValueError: an unknown card.
        RuntimeError: this process interprets its kernels; Triton cannot do both.
    """
    global _compiled, _card_compiled_for
    if card not in CAPABILITIES:
        raise ValueError(f"card is {card!r}, expected one of {sorted(CAPABILITIES)}")
    if INTERPRETED or not AVAILABLE:
        raise RuntimeError("this process cannot compile kernels: Triton interprets here, or is missing")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget("cuda", CAPABILITIES[card], 32)
    previous, driver._active = (
        driver._active,
        SimpleNamespace(
            # A number per card: Triton keeps what it has compiled by device.
            get_current_device=lambda: CAPABILITIES[card],
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        ),
    )
    _compiled, _card_compiled_for = [], card
    try:
        yield _compiled
    finally:
        _compiled, _card_compiled_for, driver._active = None, None, previous


@functools.cache
def _shared_memory_of(index: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type == "cuda":
        return _shared_memory_of(device.index or 0)
    return SHARED_MEMORY[_card_compiled_for or "sm_90"]


def is_hopper(device: torch.device) -> bool:
    """Whether the card has Hopper's tensor cores (compute capability 9): H100, H200, GH200."""
    if device.type == "cuda":
        return _capability(device)[0] == 9
    return device.type == "meta" and _card_compiled_for == "sm_90"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    text = resources.files("graft_kernels").joinpath("tuned.json").read_text()
    tables: dict[str, dict[str, Any]] = json.loads(text)
    return tables


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def tuned(op: str, device: torch.device) -> dict[str, Any]:
    """What was measured for `op` on this card (`tuned.json`), or {} for a card that nobody has measured.

    The file's keys are the card's name as the driver gives it, then the op.
    """
    if device.type != "cuda":
        return {}
    values: dict[str, Any] = _tables().get(_card(device), {}).get(op, {})
    return values
