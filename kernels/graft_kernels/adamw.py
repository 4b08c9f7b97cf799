"""AdamW over many small tensors in a handful of launches, with clipping by the global norm and 8-bit states.

For a parameter θ with gradient g, step number t, learning rate η, decay λ and moments m, v:

    N  = √Σ g²  over every parameter             ĝ = g · min(1, max_norm / (N + 1e-6))
    θ ← (1 - ηλ) θ                                m ← m + (1 - β₁)(ĝ - m)        v ← β₂ v + (1 - β₂) ĝ²
    θ ← θ - η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

which is torch.optim.AdamW after torch.nn.utils.clip_grad_norm_ (Decoupled Weight Decay Regularization, arXiv
1711.05101), with one addition: if N is not finite, nothing changes, neither θ nor m, v and t. That is decided on the
device, so no step waits for it; `last_norm` tells afterwards.

A group's tensors are updated by one launch. Its programs find their tensors through tables on the device: the addresses
of θ and g, and for every chunk of CHUNK elements which tensor it belongs to and where in it it starts. The moments of a
group lie in one buffer. Only the gradients' addresses can change from step to step; they are uploaded when they do,
asynchronously, and never after `fix_gradients()`. A missing gradient has the address 0.

For hundreds of tensors the device needs half a millisecond, so what the host does with each of them counts: it asks for
the gradient and what that is, compares addresses, and does nothing else.

8-bit states (arXiv 2110.02861): blocks of 256 elements with an fp32 scale, the block's largest magnitude, and one byte
per element, an index into `dynamic_map`, the map that bitsandbytes.functional.create_dynamic_map defines: signed for m,
unsigned for v. Each value goes to the nearest entry, except that a positive v never becomes 0: such an element could
next be moved by m / ε. Tensors below MIN_8BIT_SIZE elements keep 32-bit states; a group with both kinds takes two
launches.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from graft_kernels.launch import cdiv, launch, runs_kernels, tl, triton

QUANTISATION_BLOCK = 256
MIN_8BIT_SIZE = 4096

# Elements per program: a power of two and a multiple of QUANTISATION_BLOCK. 8 per thread leave room for several
# programs on a multiprocessor, so that one reads the tables while others move data.
CHUNK = 2048
_NUM_WARPS = 8
_NORM_WARPS = 8
_FINISH_BLOCK = 4096  # partial sums that the last reduction reads at a time
_FACTOR_BLOCK = 512  # tensors per program of the kernel that counts steps
_ADDRESS_ALIGNMENT = 16

_GRADIENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# Reference ------------------------------------------------------------------------------------------------------------


@functools.cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 values an 8-bit state can take, rising; each is an exact fp32 value.

    Seven decades from 1e-6 to 1; decade i holds the midpoints of 2^i equal parts of [0.1, 1] and their negatives, or of
    2^(i+1) parts without a sign. So large values have fine steps, and small ones are still told from 0. Then 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        means = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return tuple(sorted(values))


@functools.cache
def _code_and_borders(device: torch.device) -> tuple[Tensor, Tensor]:
    """([2, 256] values, [2, 256] borders) fp32; the signed map first. Entry k is for (border k-1, border k].

    The last border is +inf.
    """
    code = torch.tensor([dynamic_map(True), dynamic_map(False)], dtype=torch.float32, device="cpu")
    borders = torch.full_like(code, math.inf)
    borders[:, :-1] = (code[:, :-1] + code[:, 1:]) / 2
    return _to_device(code, device), _to_device(borders, device)


def quantise_reference(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(indices [n] uint8, absmax [⌈n/256⌉] fp32) of `values` [n]."""
    n = values.numel()
    padded = torch.nn.functional.pad(values.float(), (0, -n % QUANTISATION_BLOCK)).view(-1, QUANTISATION_BLOCK)
    absmax = padded.abs().amax(dim=1)
    borders = _code_and_borders(values.device)[1][0 if signed else 1, :-1].contiguous()
    index = torch.bucketize(padded / torch.where(absmax > 0, absmax, 1.0)[:, None], borders)
    if not signed:
        index = torch.where(padded > 0, index.clamp(min=1), index)
    return index.to(torch.uint8).view(-1)[:n], absmax


def dequantise_reference(index: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The fp32 values [n] of `quantise_reference`'s results."""
    scale = absmax.repeat_interleave(QUANTISATION_BLOCK)[: index.numel()]
    return _code_and_borders(index.device)[0][0 if signed else 1].index_select(0, index.int()) * scale


def clip_factor_reference(norm: Tensor, max_norm: float | None) -> Tensor:
    """What gradients are multiplied by, as torch.nn.utils.clip_grad_norm_ has it."""
    return torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)


def adamw_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new (p, m, v) of step number `step` (0-dim) by the formulas above; `g` is already clipped."""
    beta1, beta2 = betas
    step = step.double()
    m = m.lerp(g, 1 - beta1)
    v = (v * beta2).addcmul(g, g, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step).sqrt()).add(eps)
    return p * (1 - lr * weight_decay) - (lr / (1 - beta1**step)) * (m / denominator), m, v


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(pointers, mask):  # type: ignore[no-untyped-def]
    """0 where `mask` is off. A chunk that is full comes without a mask: only so are the accesses 16 bytes wide."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@triton.jit
def _squares(g_ptr, offs, size, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    g = _load(g_ptr + offs, offs < size if MASKED else None).to(tl.float32)
    return tl.sum(g * g, 0)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    chunks_ptr, sizes_ptr, g_addresses_ptr, partial_ptr,
    GRADIENT: tl.constexpr, DIVISOR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Σ g² of one chunk."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    start = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), CHUNK)
    size = tl.load(sizes_ptr + tensor)
    address = tl.load(g_addresses_ptr + tensor)
    if address != 0:
        g_ptr = tl.multiple_of(address.to(tl.pointer_type(GRADIENT)), DIVISOR)
        offs = start + tl.arange(0, CHUNK)
        if start + CHUNK <= size:
            tl.store(partial_ptr + chunk, _squares(g_ptr, offs, size, False))
        else:
            tl.store(partial_ptr + chunk, _squares(g_ptr, offs, size, True))
    else:
        tl.store(partial_ptr + chunk, 0.0)


@triton.jit
def _norm_finish_kernel(partial_ptr, norm_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """√ of the sum of the partial sums, always in the same order: one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offs, mask=offs < n, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, 0)))


@triton.jit
def _factors_kernel(  # type: ignore[no-untyped-def]
    g_addresses_ptr, steps_ptr, factors_ptr, norm_ptr, control_ptr, n, max_norm, lr,
    log_beta1, log_beta1_rest, log_beta2, log_beta2_rest, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the step of every tensor that has a gradient, and work out its bias corrections; decide on the whole step.

    Here and not on the host, because only the device knows whether a step was skipped. 1 - βᵗ in fp32 would lose four
    digits at the first steps; log β comes as two fp32 numbers, which are all that a launch can pass.
    """
    norm = tl.load(norm_ptr)
    applies = (norm < float("inf")).to(tl.float32)  # neither inf nor NaN
    if tl.program_id(0) == 0:
        tl.store(control_ptr, tl.minimum(1.0, max_norm / (norm + 1e-6)))
        tl.store(control_ptr + 1, applies)
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = tl.load(g_addresses_ptr + tensor, mask=tensor < n, other=0) != 0
    step = tl.load(steps_ptr + tensor, mask=tensor < n, other=0.0) + tl.where(present, applies, 0.0)
    tl.store(steps_ptr + tensor, step, mask=tensor < n)
    t = tl.maximum(step, 1.0).to(tl.float64)
    correction1 = 1.0 - tl.exp(t * log_beta1 + t * log_beta1_rest)
    correction2 = 1.0 - tl.exp(t * log_beta2 + t * log_beta2_rest)
    tl.store(factors_ptr + 2 * tensor, lr / correction1.to(tl.float32), mask=tensor < n)
    tl.store(factors_ptr + 2 * tensor + 1, 1.0 / tl.sqrt(correction2.to(tl.float32)), mask=tensor < n)


@triton.jit
def _moved(p, g, m, v, factors_ptr, decay, rate1, beta2, rate2, eps):  # type: ignore[no-untyped-def]
    """The formulas above. `factors_ptr` points to (η / (1 - β₁ᵗ), 1 / √(1 - β₂ᵗ)); rates are 1 - β."""
    m = m + rate1 * (g - m)
    v = beta2 * v + rate2 * g * g
    p = decay * p - tl.load(factors_ptr) * (m / (tl.sqrt(v) * tl.load(factors_ptr + 1) + eps))
    return p, m, v


@triton.jit
def _nearest(x, borders_ptr):  # type: ignore[no-untyped-def]
    """How many of 255 rising borders lie below x, by bisection: 8 look-ups in a table that stays in the L1 cache."""
    index = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        index += tl.where(tl.load(borders_ptr + index + (step - 1)) < x, step, 0)
    return index


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, code_ptr, borders_ptr, factors_ptr, start, size,
    clip, decay, rate1, beta2, rate2, eps, MASKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = start // BLOCK + tl.arange(0, CHUNK // BLOCK)
    offs = start + tl.arange(0, CHUNK // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offs < size if MASKED else None
    block_mask = block * BLOCK < size if MASKED else None
    p = _load(p_ptr + offs, mask)
    g = _load(g_ptr + offs, mask).to(tl.float32) * clip
    m = _load(m_ptr + offs, mask)
    v = _load(v_ptr + offs, mask)
    if m_absmax_ptr is not None:
        m = tl.load(code_ptr + m.to(tl.int32)) * _load(m_absmax_ptr + block, block_mask)[:, None]
        v = tl.load(code_ptr + BLOCK + v.to(tl.int32)) * _load(v_absmax_ptr + block, block_mask)[:, None]
        if MASKED:
            # Beyond the tensor the moments must be 0, whatever value index 0 stands for: they would raise the scale.
            m = tl.where(mask, m, 0.0)
            v = tl.where(mask, v, 0.0)
    p, m, v = _moved(p, g, m, v, factors_ptr, decay, rate1, beta2, rate2, eps)
    tl.store(p_ptr + offs, p, mask=mask)
    if m_absmax_ptr is None:
        tl.store(m_ptr + offs, m, mask=mask)
        tl.store(v_ptr + offs, v, mask=mask)
    else:
        m_absmax = tl.max(tl.abs(m), 1)
        v_absmax = tl.max(v, 1)
        m_index = _nearest(m / tl.where(m_absmax > 0.0, m_absmax, 1.0)[:, None], borders_ptr)
        v_index = _nearest(v / tl.where(v_absmax > 0.0, v_absmax, 1.0)[:, None], borders_ptr + BLOCK)
        v_index = tl.where(v > 0.0, tl.maximum(v_index, 1), v_index)
        tl.store(m_ptr + offs, m_index.to(tl.uint8), mask=mask)
        tl.store(v_ptr + offs, v_index.to(tl.uint8), mask=mask)
        tl.store(m_absmax_ptr + block, m_absmax, mask=block_mask)
        tl.store(v_absmax_ptr + block, v_absmax, mask=block_mask)


@triton.jit
def _update_kernel(  # type: ignore[no-untyped-def]
    chunks_ptr, sizes_ptr, offsets_ptr, p_addresses_ptr, g_addresses_ptr, m_ptr, v_ptr, factors_ptr, control_ptr,
    m_absmax_ptr, v_absmax_ptr, code_ptr, borders_ptr, decay, rate1, beta2, rate2, eps,
    GRADIENT: tl.constexpr, DIVISOR: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor: a whole number of quantisation blocks, except at the tensor's end.

    The moments begin at a multiple of BLOCK elements in their buffers. With 32-bit states there are no scales and no
    map: None.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    start = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), CHUNK)
    applies = tl.load(control_ptr + 1)
    address = tl.load(g_addresses_ptr + tensor)
    if (address != 0) & (applies != 0.0):
        clip = tl.load(control_ptr)
        size = tl.load(sizes_ptr + tensor)
        offset = tl.multiple_of(tl.load(offsets_ptr + tensor), BLOCK)
        g_ptr = tl.multiple_of(address.to(tl.pointer_type(GRADIENT)), DIVISOR)
        p_ptr = tl.multiple_of(tl.load(p_addresses_ptr + tensor).to(tl.pointer_type(tl.float32)), DIVISOR)
        m_ptr += offset
        v_ptr += offset
        factors_ptr += 2 * tensor
        if m_absmax_ptr is not None:
            m_absmax_ptr += offset // BLOCK
            v_absmax_ptr += offset // BLOCK
        if start + CHUNK <= size:
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, code_ptr, borders_ptr, factors_ptr, start, size,
                clip, decay, rate1, beta2, rate2, eps, False, CHUNK, BLOCK,
            )  # fmt: skip
        else:
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, code_ptr, borders_ptr, factors_ptr, start, size,
                clip, decay, rate1, beta2, rate2, eps, True, CHUNK, BLOCK,
            )  # fmt: skip


# Launchers ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Part:
    """The tensors of one parameter group whose states have one width: their states, and the tables of the kernels."""

    parameters: list[Tensor]
    bits: int
    offsets: list[int]  # where each tensor's moments begin in the buffers
    m: Tensor  # [total] in the parameters' dtype, or uint8
    v: Tensor
    m_absmax: Tensor | None  # [total / 256] fp32 with 8 bits
    v_absmax: Tensor | None
    steps: Tensor  # [n] fp32
    factors: Tensor  # [n, 2] fp32
    control: Tensor  # [2] fp32: what gradients are multiplied by, and 1 if the step is to be taken
    num_chunks: int = 0
    # On the device, int64: [num_chunks, 2] index of the tensor, first element; sizes, offsets [n]; addresses [n] of the
    # parameters, of the gradients. The last two are renewed when they are no longer `known`.
    layout: tuple[Tensor, Tensor, Tensor] | None = None
    addresses: tuple[Tensor, Tensor] | None = None
    known: list[int] = field(default_factory=list)
    aligned: bool = True
    gradients: list[Tensor | None] = field(default_factory=list)  # of this step
    gradient_dtype: torch.dtype = torch.float32
    unseen: set[int] = field(default_factory=set)  # parameters that never had a gradient, hence no state to show

    @classmethod
    def make(cls, parameters: list[Tensor], bits: int) -> _Part:
        device, dtype, n = parameters[0].device, parameters[0].dtype, len(parameters)
        offsets, total = [], 0
        for p in parameters:
            offsets.append(total)
            total += cdiv(p.numel(), QUANTISATION_BLOCK) * QUANTISATION_BLOCK
        state_dtype = dtype if bits == 32 else torch.uint8
        # The signed map holds 0 in its middle. All scales are 0 at first, so that every index stands for 0.
        m, v = (torch.zeros(total, dtype=state_dtype, device=device) for _ in range(2))
        m_absmax = v_absmax = None
        if bits == 8:
            m_absmax, v_absmax = (
                torch.zeros(total // QUANTISATION_BLOCK, dtype=torch.float32, device=device) for _ in range(2)
            )
        steps = torch.zeros(n, dtype=torch.float32, device=device)
        factors, control = (torch.zeros(2 * k, dtype=torch.float32, device=device) for k in (n, 1))
        return cls(parameters, bits, offsets, m, v, m_absmax, v_absmax, steps, factors, control, unseen=set(range(n)))

    def state_of(self, index: int) -> dict[str, Tensor]:
        """Views of the buffers, under the names that torch.optim.AdamW uses."""
        p, start = self.parameters[index], self.offsets[index]
        end = start + p.numel()
        state = {
            "step": self.steps[index],
            "exp_avg": self.m[start:end].view(p.shape),
            "exp_avg_sq": self.v[start:end].view(p.shape),
        }
        if self.m_absmax is not None and self.v_absmax is not None:
            blocks = slice(start // QUANTISATION_BLOCK, cdiv(end, QUANTISATION_BLOCK))
            state["exp_avg_absmax"], state["exp_avg_sq_absmax"] = self.m_absmax[blocks], self.v_absmax[blocks]
        return state

    def take_gradients(self) -> bool:
        """Read every parameter's `.grad`; whether there is one."""
        self.gradients = [p.grad for p in self.parameters]
        present = [g for g in self.gradients if g is not None]
        if not present:
            return False
        dtypes, layouts = {g.dtype for g in present}, {g.layout for g in present}
        if not dtypes.issubset(_GRADIENT_DTYPES) or layouts != {torch.strided}:
            kinds = ", ".join(sorted({f"{g.dtype} {g.layout}" for g in present}))
            raise ValueError(f"the gradients are {kinds}; expected dense floating point")
        self.gradient_dtype = dtypes.pop() if len(dtypes) == 1 else self.parameters[0].dtype
        if dtypes or not all(map(Tensor.is_contiguous, present)):
            # Mixed dtypes, or another order of the dimensions than the parameter's: a copy for this step.
            dtype = self.gradient_dtype
            self.gradients = [None if g is None else g.to(dtype).contiguous() for g in self.gradients]
        return True

    def upload_tables(self) -> None:
        """Put on the device what it does not hold yet. Copies from pinned memory, in the stream's order: no waiting."""
        device, n = self.m.device, len(self.parameters)
        padded = cdiv(n, 16) * 16  # both rows of a table begin on a 16-byte boundary
        if self.layout is None:
            sizes = torch.tensor([p.numel() for p in self.parameters], dtype=torch.int64, device="cpu")
            counts = (sizes + CHUNK - 1) // CHUNK
            index = torch.arange(n, device="cpu").repeat_interleave(counts)
            number = torch.arange(index.numel(), device="cpu") - (counts.cumsum(0) - counts)[index]
            self.num_chunks = index.numel()
            chunks = _to_device(torch.stack((index, number * CHUNK), dim=1), device)
            table = torch.zeros(2, padded, dtype=torch.int64, device="cpu")
            table[0, :n], table[1, :n] = sizes, torch.tensor(self.offsets, dtype=torch.int64, device="cpu")
            table = _to_device(table, device)
            self.layout = chunks, table[0], table[1]
        addresses = list(map(Tensor.data_ptr, self.parameters))
        # An empty gradient has the address 0 too; it is there all the same, and nobody reads it.
        addresses += [0 if g is None else g.data_ptr() or _ADDRESS_ALIGNMENT for g in self.gradients]
        if self.addresses is None or addresses != self.known:
            table = torch.zeros(2, padded, dtype=torch.int64, device="cpu")
            table[:, :n] = torch.tensor(addresses, dtype=torch.int64, device="cpu").view(2, n)
            table = _to_device(table, device)
            self.addresses, self.known = (table[0], table[1]), addresses
            self.aligned = all(address % _ADDRESS_ALIGNMENT == 0 for address in addresses)

    @property
    def divisor(self) -> int:
        """16 if every tensor begins on a 16-byte boundary, else what any address of their dtypes is divisible by."""
        return _ADDRESS_ALIGNMENT if self.aligned else self.gradient_dtype.itemsize


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # The pinned copy may be let go at once: torch's host allocator keeps it until the device has read it.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _triton_dtype(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _norm_of(parts: list[_Part], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The global norm of the gradients: one launch per part and one to finish; the order of the sums is fixed."""
    if not parts:
        return torch.zeros((), dtype=dtype, device=device)
    if not runs_kernels(parts[0].parameters[0]):
        squares = [g.to(dtype).square().sum() for part in parts for g in part.gradients if g is not None]
        return torch.stack(squares).sum().sqrt()
    norm = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty(sum(part.num_chunks for part in parts), dtype=torch.float32, device=device)
    start = 0
    for part in parts:
        assert part.layout is not None
        assert part.addresses is not None
        chunks, sizes, _ = part.layout
        launch(
            _norm_kernel,
            (part.num_chunks,),
            chunks,
            sizes,
            part.addresses[1],
            partial[start : start + part.num_chunks],
            GRADIENT=_triton_dtype(part.gradient_dtype),
            DIVISOR=part.divisor,
            CHUNK=CHUNK,
            num_warps=_NORM_WARPS,
        )
        start += part.num_chunks
    launch(_norm_finish_kernel, (1,), partial, norm, start, BLOCK=_FINISH_BLOCK, num_warps=8)
    return norm


def _update_part(part: _Part, group: dict[str, Any], norm: Tensor, max_norm: float | None) -> None:
    """Two launches: the small one counts the steps, the other moves the parameters."""
    lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    assert part.layout is not None
    assert part.addresses is not None
    n = len(part.parameters)
    launch(
        _factors_kernel,
        (cdiv(n, _FACTOR_BLOCK),),
        part.addresses[1],
        part.steps,
        part.factors,
        norm,
        part.control,
        n,
        math.inf if max_norm is None else float(max_norm),
        float(lr),
        *_log_in_two(beta1),
        *_log_in_two(beta2),
        BLOCK=_FACTOR_BLOCK,
        num_warps=4,
    )
    eight_bit = (None,) * 4 if part.bits == 32 else (part.m_absmax, part.v_absmax, *_code_and_borders(part.m.device))
    launch(
        _update_kernel,
        (part.num_chunks,),
        *part.layout,
        *part.addresses,
        part.m,
        part.v,
        part.factors,
        part.control,
        *eight_bit,
        1.0 - lr * weight_decay,
        1.0 - beta1,
        float(beta2),
        1.0 - beta2,
        float(eps),
        GRADIENT=_triton_dtype(part.gradient_dtype),
        DIVISOR=part.divisor,
        CHUNK=CHUNK,
        BLOCK=QUANTISATION_BLOCK,
        num_warps=_NUM_WARPS,
    )


def _update_part_reference(part: _Part, group: dict[str, Any], norm: Tensor, max_norm: float | None) -> None:
    """The same in plain PyTorch, for every device and for fp64."""
    applies = norm.isfinite()
    clip = clip_factor_reference(norm, max_norm)
    numbers = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    for index, (p, g) in enumerate(zip(part.parameters, part.gradients, strict=True)):
        if g is None:
            continue
        state = part.state_of(index)
        step, stored = state["step"], [state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)]
        if part.bits == 8:
            stored += [state["exp_avg_absmax"], state["exp_avg_sq_absmax"]]
            m = dequantise_reference(stored[0], stored[2], signed=True).to(p.dtype)
            v = dequantise_reference(stored[1], stored[3], signed=False).to(p.dtype)
        else:
            m, v = stored
        flat = p.detach().view(-1)
        p_new, m, v = adamw_reference(flat, g.view(-1).to(p.dtype) * clip, m, v, step + 1, **numbers)
        new = [m, v]
        if part.bits == 8:
            (m_index, m_absmax), (v_index, v_absmax) = quantise_reference(m, True), quantise_reference(v, False)
            new = [m_index, v_index, m_absmax, v_absmax]
        step.add_(applies)
        for old, changed in zip((flat, *stored), (p_new, *new), strict=True):
            old.copy_(torch.where(applies, changed, old))


def _log_in_two(beta: float) -> tuple[float, float]:
    """log β as an fp32 number and what is missing to fp64."""
    if beta == 0:
        return -math.inf, 0.0
    whole = math.log(beta)
    head = struct.unpack("f", struct.pack("f", whole))[0]
    return head, whole - head


# The optimizer --------------------------------------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for one device's fp32 parameters, without a launch or a wait per tensor.

    `step(max_norm=...)` clips as torch.nn.utils.clip_grad_norm_ does, and is skipped on the device when the norm of the
    gradients is not finite. `lr` and the other numbers of a group may change before every step. Gradients may be fp32,
    fp16 or bf16. With `state_bits=32` state dicts are exchangeable with torch.optim.AdamW's; with 8, `exp_avg` and
    `exp_avg_sq` are uint8 and their scales `exp_avg_absmax` and `exp_avg_sq_absmax` stand beside them.

    States are views of common buffers: read them, do not replace them (`load_state_dict` does it right).

    Raises:
        ValueError: a number is out of range, or a parameter is not contiguous, neither fp32 nor fp64 (which takes the
            reference), or of another dtype or device than the first.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
    ) -> None:
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits is {state_bits}, expected 8 or 32")
        self.state_bits = state_bits
        self.last_norm: Tensor | None = None
        self._parts: list[list[_Part]] = []
        self._fixed: tuple[Tensor, list[Tensor]] | None = None
        self._read: tuple[Tensor, list[tuple[dict[str, Any], _Part]]] | None = None  # by grad_norm(), for the next step
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._read = None
        try:
            _check_group(self.param_groups[-1], self.param_groups[0]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None, *, max_norm: float | None = None, norm: Tensor | None = None) -> None: ...
    @overload
    def step(
        self, closure: Callable[[], float], *, max_norm: float | None = None, norm: Tensor | None = None
    ) -> float: ...
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        max_norm: float | None = None,
        norm: Tensor | None = None,
    ) -> float | None:
        """One update from the parameters' `.grad`; a parameter without one is left alone, and its step not counted.

        `norm` is what `grad_norm()` returned for these very gradients, to spare reading them and their addresses again:
        in between they may change in place, and none may be replaced. Without `max_norm` nothing is clipped; a norm
        that is not finite skips the step all the same.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"max_norm is {max_norm}, expected a number that is not negative, or None")
        for group in self.param_groups:
            _check_numbers(group)
        first = self.param_groups[0]["params"][0]
        if norm is not None and (norm.shape != () or norm.dtype != first.dtype or norm.device != first.device):
            raise ValueError(
                f"norm is {norm.dtype} {tuple(norm.shape)} on {norm.device}, expected what grad_norm() returned"
            )
        read_norm, parts = self._read or (None, [])
        self._read = None
        if norm is None or norm is not read_norm:
            parts = self._collect()
        self.last_norm = self._norm(parts) if norm is None else norm
        for group, part in parts:
            if runs_kernels(part.parameters[0]):
                _update_part(part, group, self.last_norm, max_norm)
            else:
                _update_part_reference(part, group, self.last_norm, max_norm)
            part.gradients = []
        return loss

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients together: 0-dim, fp32 (fp64 for fp64 parameters), on their device."""
        parts = self._collect()
        norm = self._norm(parts)
        self._read = norm, parts
        return norm

    @torch.no_grad()
    def fix_gradients(self) -> None:
        """Give every parameter a `.grad` inside one buffer, and keep it there.

        From now on backward passes add into that buffer, `zero_grad` clears it in one launch (whatever `set_to_none`
        says), and no address ever has to be uploaded again. Gradients that exist are kept. The price is the buffer
        itself, and that the first backward pass of a step adds to zeros instead of handing its result over.
        """
        if self._fixed is not None:
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        starts, total = [], 0
        for p in parameters:
            starts.append(total)
            total += cdiv(p.numel(), 64) * 64
        buffer = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
        views = []
        for p, start in zip(parameters, starts, strict=True):
            view = buffer[start : start + p.numel()].view(p.shape)
            if p.grad is not None:
                view.copy_(p.grad)
            p.grad = view
            views.append(view)
        self._fixed = buffer, views

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._fixed is None:
            super().zero_grad(set_to_none)
            return
        buffer, views = self._fixed
        buffer.zero_()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p, view in zip(parameters, views, strict=False):
            if p.grad is not view:
                p.grad = view
        for p in parameters[len(views) :]:  # of a group that was added later
            p.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this class, or of torch.optim.AdamW if `state_bits` is 32.

        Raises:
            ValueError: it is of other parameters, of another width, or of a variant that is not AdamW's plain one.
        """
        self._check_saved(state_dict)
        super().load_state_dict(state_dict)
        self._build()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state_bits": self.state_bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The states are loose tensors now; `_build` gathers them.
        self._parts, self._read = [], None
        self.__dict__.setdefault("last_norm", None)
        self.__dict__.setdefault("_fixed", None)

    # Inside

    def _bits(self, p: Tensor) -> int:
        return 8 if self.state_bits == 8 and p.numel() >= MIN_8BIT_SIZE else 32

    @torch.no_grad()
    def _build(self) -> None:
        """Buffers for the groups that have none yet, with what `self.state` holds for them."""
        for group in self.param_groups[len(self._parts) :]:
            parts = []
            for bits in (32, 8):
                parameters = [p for p in group["params"] if self._bits(p) == bits]
                if not parameters:
                    continue
                part = _Part.make(parameters, bits)
                for index, p in enumerate(parameters):
                    if not (found := self.state.get(p)):
                        continue
                    views = part.state_of(index)
                    for name, view in views.items():
                        view.copy_(torch.as_tensor(found[name]))
                    self.state[p] = views
                    part.unseen.discard(index)
                parts.append(part)
            self._parts.append(parts)

    def _collect(self) -> list[tuple[dict[str, Any], _Part]]:
        """The parts with a gradient, each ready to be launched on."""
        self._build()
        found = []
        for group, parts in zip(self.param_groups, self._parts, strict=True):
            for part in parts:
                if not part.take_gradients():
                    continue
                for index in sorted(part.unseen):
                    if part.gradients[index] is not None:
                        self.state[part.parameters[index]] = part.state_of(index)
                        part.unseen.discard(index)
                if runs_kernels(part.parameters[0]):
                    part.upload_tables()
                found.append((group, part))
        return found

    def _norm(self, parts: list[tuple[dict[str, Any], _Part]]) -> Tensor:
        p: Tensor = self.param_groups[0]["params"][0]
        return _norm_of([part for _, part in parts], p.device, p.dtype)

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        for group in groups:
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError("the saved optimizer used amsgrad or maximize; there is no such thing here")
        saved = [key for group in groups for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, parameters, strict=False):  # torch compares the numbers, group by group
            state = state_dict["state"].get(key)
            if not state:
                continue
            bits = 8 if "exp_avg_absmax" in state else 32
            if bits != self._bits(p):
                raise ValueError(f"the saved state of a parameter has {bits} bits, expected {self._bits(p)}")
            blocks = (cdiv(p.numel(), QUANTISATION_BLOCK),)
            shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if bits == 8:
                shapes |= {"exp_avg_absmax": torch.Size(blocks), "exp_avg_sq_absmax": torch.Size(blocks)}
            if state.keys() != shapes.keys():
                raise ValueError(f"the saved state of a parameter holds {sorted(state)}, expected {sorted(shapes)}")
            for name, shape in shapes.items():
                if (given := torch.as_tensor(state[name]).shape) != shape:
                    raise ValueError(f"the saved {name} has shape {tuple(given)}, expected {tuple(shape)}")


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_group(group: dict[str, Any], first_of_all: list[Tensor]) -> None:
    _check_numbers(group)
    for p in group["params"]:
        first = first_of_all[0]
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a parameter is {p.dtype}, expected fp32")
        if p.dtype != first.dtype or p.device != first.device:
            raise ValueError(
                f"a parameter is {p.dtype} on {p.device}, the first is {first.dtype} on {first.device}; "
                "expected one dtype and one device"
            )
        if not p.is_contiguous():
            raise ValueError(f"a parameter has shape {tuple(p.shape)} and strides {p.stride()}, expected contiguous")


def _check_numbers(group: dict[str, Any]) -> None:
    """Numbers of the host: a tensor would have to be waited for."""
    named = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
    named |= {f"betas[{i}]": beta for i, beta in enumerate(group["betas"])}
    for name, value in named.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{name} is a tensor, expected a number")
        if not 0 <= value < (1 if name.startswith("betas") else math.inf):
            raise ValueError(f"{name} is {value}, out of range")
