"""The head's product, the cross-entropy and both their gradients in one pass over the trained tokens.

Shapes: h [..., H] seen as [T, H]; W [V, H] frozen, dense or NF4; labels t [T]; z [C, V] the logits of one chunk of C
rows; n the number of trained tokens of the whole accumulation window.

    forward     z = h Wᵀ          z' = c·tanh(z / c) with a softcap c, else z
                m = max z'        O = Σ_{j≠t} exp(z'_j - m)        S = O + exp(z'_t - m)
                loss of a row = log1p(O)               where t holds more than half of the probability; then m = z'_t
                              = (m - z'_t) + log S     elsewhere
                loss = Σ rows / n
    backward    dz' = exp(z' - m) / S;  dz'_t = -O / S     dz = dz'·(1 - (z'/c)²)        dh = dz W / n

O is summed without the label's own term, so a loss of 1e-9 and its gradient of -1e-9 come out with full precision;
lse(z) - z_t and p_t - 1 would give 0 for both once the margin passes 17 nats. (The formulation by the lse of the
others: arXiv 2610.31642, here with one common maximum.)

The head is frozen, so dh can be computed while the chunk's logits exist: z is overwritten by dz in place and multiplied
by W at once. One buffer [C, V] is all that is large. What is kept for the backward is dh [T, H], not yet divided by n;
the backward multiplies it by the incoming gradient over n, on the device.

A head of more than SLAB_ROWS classes is multiplied slab by slab: z in columns, and dh as a sum over the slabs, in fp32
and in one order. So W need not lie on the device as a whole (`Slabs`), and where it lies changes no bit. A last
slab whose size is no multiple of 16 is multiplied as one that is, and what is left (`_pieces`).

Logits are rounded to h's dtype, as the GEMM's output always is: in bf16 they carry 8 bits. dz is rounded the same way
before its product. Everything between the two is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft_kernels.launch import cdiv, is_hopper, launch, next_power_of_2, runs_kernels, tl, triton
from graft_kernels.lora_linear import add_product_, product
from graft_kernels.nf4 import NF4Weight, decode

IGNORED = -100
SLAB_ROWS = 16_896  # of the head, that are multiplied at a time: 66 tiles of 256, whole waves of 132 multiprocessors
_MAX_CHUNK_ROWS = 8192
_CHUNK_BYTES = 2 << 30
_SHORT_ROW = 1 << 17  # bytes of a row of logits, up to which several small programs on a multiprocessor are ahead
_SCALE_BLOCK = 4096
_MULTIPLE = 16  # of classes: with one more the library's products take five times as long, and accesses are of 2 bytes
_ALIGNMENT = 64  # rows of the chunk buffer start at a multiple of so many elements: 16-byte accesses for any V


class CrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns; all three are 0-dim tensors on the device of the hidden states."""

    loss: Tensor  # fp32 (fp64 for fp64 input), differentiable in the hidden states
    num_correct: Tensor  # int64: trained tokens whose label is the first of the largest logits
    num_valid: Tensor  # int64: labels that are not ignore_index


class Slabs(Protocol):
    """A head [V, H] that is brought to the device in slabs of SLAB_ROWS rows, the last one of what is left."""

    @property
    def shape(self) -> Sequence[int]:
        """(V, H)"""

    def slab(self, index: int, then: int | None) -> Tensor:
        """Slab `index`, to be used before the next call; `then` is the one that will be wanted next."""


# Reference ------------------------------------------------------------------------------------------------------------


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    normaliser: float | Tensor | None = None,
    ignore_index: int = IGNORED,
    softcap: float | None = None,
) -> CrossEntropy:
    """The definition of correct: all logits at once, gradients by autograd."""
    labels_T = labels.reshape(-1).to(hidden.device)
    z_TV = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight)
    if z_TV.dtype != torch.float64:
        z_TV = z_TV.float()
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    valid_T = labels_T != ignore_index
    count = valid_T.sum()
    total = F.cross_entropy(z_TV, labels_T, ignore_index=ignore_index, reduction="sum")
    n = torch.as_tensor(count if normaliser is None else normaliser, dtype=total.dtype, device=total.device)
    correct = ((z_TV.argmax(dim=-1) == labels_T) & valid_T).sum()
    return CrossEntropy(torch.where(n == 0, total * 0, total / torch.where(n == 0, 1, n)), correct, count)


def _rows_reference_(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The rows' losses and hits by the formulas above, and dz in place of z."""
    V = logits_CV.shape[1]
    z_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    if softcap is not None:
        z_CV = softcap * torch.tanh(z_CV / softcap)
    valid_C = labels_C != ignore_index
    outside_C = valid_C & ((labels_C < 0) | (labels_C >= V))
    label_C1 = labels_C.clamp(0, V - 1)[:, None]
    z_label_C = z_CV.gather(1, label_C1).squeeze(1)
    m_C = z_CV.amax(dim=1)
    e_CV = torch.exp(z_CV - m_C[:, None])
    others_C = e_CV.scatter(1, label_C1, 0.0).sum(dim=1)
    total_C = others_C + torch.exp(z_label_C - m_C)
    sure_C = (z_label_C == m_C) & (others_C < 1)
    loss_C = torch.where(sure_C, torch.log1p(others_C), (m_C - z_label_C) + torch.log(total_C))
    loss_C = torch.where(valid_C, loss_C.masked_fill(outside_C, torch.nan), 0.0)
    correct_C = (z_CV.argmax(dim=1) == labels_C) & valid_C
    if gradient:
        d_CV = (e_CV / total_C[:, None]).scatter(1, label_C1, (-others_C / total_C)[:, None])
        if softcap is not None:
            d_CV = d_CV * (1 - (z_CV / softcap) ** 2)
        d_CV = torch.where(valid_C[:, None], d_CV.masked_fill(outside_C[:, None], torch.nan), 0.0)
        logits_CV.copy_(d_CV)
    return loss_C, correct_C.to(torch.int32)


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(y):  # type: ignore[no-untyped-def]
    """tanh without libdevice: by exp, and by its series where 1 - exp(-2|y|) would lose digits."""
    e = tl.exp(-2.0 * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    y2 = y * y
    # Through y⁹; at |y| = 0.25 the next term is 9e-9 of y.
    near = y * (1.0 + y2 * (-1.0 / 3.0 + y2 * (2.0 / 15.0 + y2 * (-17.0 / 315.0 + y2 * (62.0 / 2835.0)))))
    return tl.where(tl.abs(y) < 0.25, near, tl.where(y < 0.0, -far, far))


@triton.jit
def _log1p_of_share(u):  # type: ignore[no-untyped-def]
    """log(1 + u) for 0 <= u <= 1 to fp32 precision: the card's logarithm is exact to 2^-22 absolute only, near 1.

    log(1 + u) = 2 artanh(s) with s = u / (2 + u) <= 1/3, by its series through s¹⁷.
    """
    s = u / (2.0 + u)
    q = s * s
    tail = 1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0 + q * (1.0 / 17.0)))
    tail = 1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * tail)))
    return 2.0 * s * (1.0 + q * tail)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, labels_ptr, loss_ptr, correct_ptr, V, accessed, stride_row, ignore_index, softcap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program per row, which it reads from left to right, and then back: what was read last is in the L2 cache yet.

    BLOCK columns at a time, of which a thread holds WIDTH side by side (one access). It keeps the largest of all that
    it has seen and the sum relative to that: no exchange between threads until the row has been read. Each block is
    asked for before the one in front of it is worked on, so that the memory never waits for the arithmetic.

    PADDED: the first `accessed` columns of a row are read and written, a multiple of 16 above V: only then does the
    compiler know that an access lies within the row as a whole, and makes one of it.
    """
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    label = tl.load(labels_ptr + row)
    places = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    ignored = label == ignore_index
    outside = (label < 0) | (label >= V)
    if ignored | outside:
        # A label that is no class must be seen: its row turns the loss and the gradient into NaN.
        value = tl.where(ignored, 0.0, float("nan"))
        tl.store(loss_ptr + row, value)
        tl.store(correct_ptr + row, 0)
        if GRADIENT:
            for start in tl.range(0, V, BLOCK):
                cols = start + places
                filling = tl.full((BLOCK // WIDTH, WIDTH), 0.0, tl.float32) + value
                tl.store(row_ptr + cols, filling.to(logits_ptr.dtype.element_ty), mask=cols < accessed)
    else:
        following = tl.load(row_ptr + places, mask=places < accessed, other=-float("inf"))
        label_col = label.to(tl.int32)
        z_label = tl.load(row_ptr + label_col).to(tl.float32)
        if CAPPED:
            z_label = softcap * _tanh(z_label / softcap)
        # Not -inf: a thread that has seen nothing must not compute -inf - -inf.
        m_lane = tl.full((BLOCK // WIDTH,), -3.0e38, tl.float32)
        sum_lane = tl.full((BLOCK // WIDTH,), 0.0, tl.float32)
        m_left = -float("inf")  # the largest to the left of the label
        for start in tl.range(0, V, BLOCK, num_stages=1):
            z = following.to(tl.float32)
            cols = start + places
            following = tl.load(row_ptr + BLOCK + cols, mask=cols < accessed - BLOCK, other=-float("inf"))
            if PADDED:
                z = tl.where(cols < V, z, -float("inf"))
            if CAPPED:
                z = tl.where(cols < V, softcap * _tanh(z / softcap), -float("inf"))
            if (label_col >= start) & (label_col < start + BLOCK):
                left = tl.where(cols < label_col, z, -float("inf"))
                m_left = tl.max(tl.maximum(m_lane, tl.max(left, 1)), 0)
                z = tl.where(cols == label_col, -float("inf"), z)
            m = tl.maximum(m_lane, tl.max(z, 1))
            sum_lane = sum_lane * tl.exp(m_lane - m) + tl.sum(tl.exp(z - m[:, None]), 1)
            m_lane = m
        last = (V - 1) // BLOCK * BLOCK
        if GRADIENT:
            following = tl.load(row_ptr + last + places, mask=places < accessed - last, other=-float("inf"))
        m_others = tl.max(m_lane, 0)
        m = tl.maximum(m_others, z_label)
        others = tl.sum(sum_lane * tl.exp(m_lane - m), 0)
        total = others + tl.exp(z_label - m)
        sure = (z_label >= m_others) & (others < 1.0)
        loss = tl.where(sure, _log1p_of_share(tl.minimum(others, 1.0)), (m - z_label) + tl.log(total))
        # Among equal logits the first is the guess, as torch.argmax has it.
        correct = (z_label > m_others) | ((z_label == m_others) & (z_label > m_left))
        tl.store(loss_ptr + row, loss)
        tl.store(correct_ptr + row, correct.to(tl.int32))
        if GRADIENT:
            scale = 1.0 / total
            d_label = -others * scale
            for done in tl.range(0, V, BLOCK, num_stages=1):
                z = following.to(tl.float32)
                start = last - done
                cols = start + places
                following = tl.load(row_ptr - BLOCK + cols, mask=cols >= BLOCK, other=-float("inf"))
                if PADDED:
                    z = tl.where(cols < V, z, -float("inf"))
                if CAPPED:
                    t = _tanh(z / softcap)
                    z = softcap * t
                d = tl.exp(z - m) * scale
                if (label_col >= start) & (label_col < start + BLOCK):
                    d = tl.where(cols == label_col, d_label, d)
                if CAPPED:
                    d *= 1.0 - t * t
                # It is wanted again only when all rows have passed; the rows that are being read shall stay.
                tl.store(
                    row_ptr + cols,
                    d.to(logits_ptr.dtype.element_ty),
                    mask=cols < accessed,
                    eviction_policy="evict_first",
                )


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = factor·x with an fp32 factor from the device; torch would round a 0-dim factor to x's dtype first."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (x * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty), mask=offs < n)


# Launchers ------------------------------------------------------------------------------------------------------------


def _row_block(accessed: int, itemsize: int, hopper: bool) -> tuple[int, int, int]:
    """(columns per block, columns side by side, warps): every access of a thread is one of 16 bytes.

    A row is read twice, so no more rows may be in flight than the L2 cache holds: one per multiprocessor, by a program
    with all of its threads, and several of smaller programs where rows are short. With 64 registers a thread can have
    two accesses under way (elsewhere than on Hopper that was not measured). Where `accessed` is no multiple of 16 the
    compiler makes eight accesses of one, which take more registers.
    """
    width = 16 // itemsize
    short = accessed * itemsize <= _SHORT_ROW and accessed % 16 == 0
    warps, accesses = (16, 1) if short else (32, 2 if hopper and accessed % 16 == 0 else 1)
    block = min(max(next_power_of_2(accessed), 128), 32 * warps * width * accesses)
    return block, width, max(1, min(block // (32 * width), warps))


def cross_entropy_rows_(
    logits_CV: Tensor,
    labels_C: Tensor,
    *,
    ignore_index: int = IGNORED,
    softcap: float | None = None,
    gradient: bool = True,
    loss: Tensor | None = None,
    correct: Tensor | None = None,
    padding: int = 0,
) -> tuple[Tensor, Tensor]:
    """(losses [C] fp32, hits [C] int32) of rows of logits; with `gradient`, dz is written over the logits.

    Nothing is normalised. An ignored row has loss 0 and gradient 0; a row whose label is no class (and not
    `ignore_index`) has loss NaN and gradient NaN: finding that out on the host would mean waiting for the device.
    Rows may be slices of wider ones (stride(0) > V), of which `padding` columns beside the logits may be overwritten:
    with as many as V lacks to a multiple of 16 the rows are passed faster. `loss` and `correct` are buffers to write
    to. fp64 logits give fp64 losses.

    Raises:
        ValueError: a shape, a dtype or a stride does not fit.
    """
    if logits_CV.dim() != 2 or not logits_CV.is_floating_point():
        raise ValueError(f"logits are {logits_CV.dtype} {tuple(logits_CV.shape)}, expected a floating-point [C, V]")
    C, V = logits_CV.shape
    _check_labels(labels_C, (C,))
    if V < 1 or V >= 1 << 30:
        raise ValueError(f"the logits have {V} classes, expected 1 to 2^30 - 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, expected a positive number or None")
    if not 0 <= padding <= max(logits_CV.stride(0) - V, 0):
        raise ValueError(f"padding is {padding}, but rows of {V} logits are {logits_CV.stride(0)} numbers apart")
    if logits_CV.stride(1) != 1 and V > 1:
        raise ValueError(f"logits have strides {logits_CV.stride()}, expected 1 in the last dimension: they change")
    kernels = runs_kernels(logits_CV, labels_C)
    loss_dtype = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    loss = _buffer("loss", loss, C, loss_dtype, logits_CV.device)
    correct = _buffer("correct", correct, C, torch.int32, logits_CV.device)
    if not kernels:
        loss_C, correct_C = _rows_reference_(logits_CV, labels_C, ignore_index, softcap, gradient)
        return loss.copy_(loss_C), correct.copy_(correct_C)
    rounded_up = cdiv(V, _MULTIPLE) * _MULTIPLE
    accessed = rounded_up if rounded_up <= V + padding else V
    block, width, num_warps = _row_block(accessed, logits_CV.element_size(), is_hopper(logits_CV.device))
    launch(
        _rows_kernel,
        (C,),
        logits_CV,
        labels_C.contiguous(),
        loss,
        correct,
        V,
        accessed,
        logits_CV.stride(0),
        ignore_index,
        1.0 if softcap is None else float(softcap),
        CAPPED=softcap is not None,
        GRADIENT=gradient,
        PADDED=accessed > V,
        BLOCK=block,
        WIDTH=width,
        num_warps=num_warps,
    )
    return loss, correct


def scaled(x: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """factor·x rounded once, for a 0-dim fp32 `factor` on x's device. x is contiguous."""
    if not runs_kernels(x, factor):
        wide = torch.promote_types(x.dtype, factor.dtype)
        product = (x.to(wide) * factor.to(wide)).to(x.dtype)
        return product if out is None else out.copy_(product)
    out = torch.empty_like(x) if out is None else out
    grid = (cdiv(x.numel(), _SCALE_BLOCK),)
    launch(_scale_kernel, grid, x, factor, out, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8)
    return out


def default_chunk_rows(rows: int, V: int, itemsize: int) -> int:
    """A multiple of 256 up to _MAX_CHUNK_ROWS whose logits fit _CHUNK_BYTES, and that leaves no small last chunk."""
    most = max(256, min(_MAX_CHUNK_ROWS, _CHUNK_BYTES // (V * itemsize) // 256 * 256))
    num_chunks = max(1, cdiv(rows, most))
    return cdiv(max(1, cdiv(rows, num_chunks)), 256) * 256


def _pieces(rows: int) -> list[slice]:
    """The rows of a slab as they are multiplied: those beyond a multiple of _MULTIPLE on their own."""
    whole = rows - rows % _MULTIPLE
    return [some for some in (slice(0, whole), slice(whole, rows)) if some.start < some.stop]


class _Whole:
    """A head that lies on the device."""

    def __init__(self, weight_VH: Tensor) -> None:
        self.shape = weight_VH.shape
        self._parts = weight_VH.split(SLAB_ROWS)

    def slab(self, index: int, then: int | None) -> Tensor:
        part: Tensor = self._parts[index]
        return part


@torch.no_grad()
def linear_cross_entropy_forward(
    hidden_TH: Tensor,
    weight_VH: Tensor | Slabs,
    labels_T: Tensor,
    *,
    ignore_index: int = IGNORED,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    num_valid: int | None = None,
    gradient: bool = True,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(sum of the losses, hits, valid labels, dh [T, H] of that sum or None), all on the device, none normalised.

    With `num_valid`, a bound from the host on the number of valid labels, the valid rows are brought together first and
    only they are computed; without it every row is. A bound that was too low makes the loss NaN. `workspace` is flat
    memory in the hidden states' dtype that holds the logits if a chunk of them fits.
    """
    T, H = hidden_TH.shape
    V = weight_VH.shape[0]
    head = _Whole(weight_VH) if isinstance(weight_VH, Tensor) else weight_VH
    device, dtype = hidden_TH.device, hidden_TH.dtype
    valid_T = labels_T != ignore_index
    count = valid_T.sum()
    rows = T if num_valid is None else num_valid
    order = None
    if rows < T:
        # The valid rows first, each group in its order. A prefix sum gives every row its place without a look at it.
        valid_before_T = valid_T.cumsum(0)
        place_T = torch.where(valid_T, valid_before_T - 1, count + torch.arange(T, device=device) - valid_before_T)
        order = torch.empty_like(place_T).scatter_(0, place_T, torch.arange(T, device=device))[:rows]
        labels_T = labels_T.index_select(0, order)

    chunk = min(default_chunk_rows(rows, V, dtype.itemsize) if chunk_rows is None else chunk_rows, rows)
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    loss_T = torch.empty(rows, dtype=loss_dtype, device=device)
    correct_T = torch.empty(rows, dtype=torch.int32, device=device)
    shape = (chunk, cdiv(V, _ALIGNMENT) * _ALIGNMENT)
    if workspace is not None and workspace.numel() >= shape[0] * shape[1]:
        buffer_CV = workspace[: shape[0] * shape[1]].view(shape)[:, :V]
    else:
        buffer_CV = torch.empty(shape, dtype=dtype, device=device)[:, :V]
    grad_TH = None
    if gradient:
        grad_TH = torch.empty(T, H, dtype=dtype, device=device) if order is None else hidden_TH.new_zeros(T, H)
    starts = range(0, rows, max(chunk, 1))
    # There and back again: the slab that the logits end with is the one that their gradient begins with.
    up = list(range(cdiv(V, SLAB_ROWS)))
    wanted = iter([*(up + up[::-1] * gradient) * len(starts), None][1:])
    for start in starts:
        end = min(start + chunk, rows)
        index = None if order is None else order[start:end]
        hidden_CH = hidden_TH[start:end] if index is None else hidden_TH.index_select(0, index)
        logits_CV = buffer_CV[: end - start]
        parts_CV = logits_CV.split(SLAB_ROWS, dim=1)
        for place, part_CV in enumerate(parts_CV):
            slab_VH = head.slab(place, next(wanted))
            for some in _pieces(part_CV.shape[1]):
                torch.mm(hidden_CH, slab_VH[some].t(), out=part_CV[:, some])
        cross_entropy_rows_(
            logits_CV,
            labels_T[start:end],
            ignore_index=ignore_index,
            softcap=softcap,
            gradient=gradient,
            loss=loss_T[start:end],
            correct=correct_T[start:end],
            padding=shape[1] - V,
        )
        if grad_TH is None:
            continue
        if len(up) == 1 and index is None:
            torch.mm(logits_CV, head.slab(0, next(wanted)), out=grad_TH[start:end])
        elif len(up) == 1 and index is not None:
            grad_TH.index_copy_(0, index, torch.mm(logits_CV, head.slab(0, next(wanted))))
        else:
            part_CV, slab_VH = parts_CV[-1], head.slab(up[-1], next(wanted))
            first, *rest = _pieces(part_CV.shape[1])
            sums_CH = product(part_CV[:, first], slab_VH[first], loss_dtype)
            for some in rest:
                add_product_(sums_CH, part_CV[:, some], slab_VH[some])
            for place in reversed(up[:-1]):
                add_product_(sums_CH, parts_CV[place], head.slab(place, next(wanted)))
            if index is None:
                grad_TH[start:end] = sums_CH
            else:
                grad_TH.index_copy_(0, index, sums_CH.to(dtype))
    total = loss_T.sum()
    if order is not None:
        total = torch.where(count > rows, torch.nan, total)
    return total, correct_T.sum(dtype=torch.int64), count, grad_TH


# Autograd -------------------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: NF4Weight | Tensor,
        labels: Tensor,
        normaliser: float | Tensor | None,
        ignore_index: int,
        softcap: float | None,
        chunk_rows: int | None,
        num_valid: int | None,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, num_correct, count, grad_TH = linear_cross_entropy_forward(
            hidden.reshape(-1, hidden.shape[-1]),
            decode(weight, hidden.dtype) if isinstance(weight, NF4Weight) else weight.to(hidden.dtype),
            labels,
            ignore_index=ignore_index,
            softcap=softcap,
            chunk_rows=chunk_rows,
            num_valid=num_valid,
            gradient=gradient,
        )
        if isinstance(normaliser, float):
            n = torch.full((), normaliser, dtype=total.dtype, device=total.device)
        else:
            n = (count if normaliser is None else normaliser).to(total.dtype)
        # n = 0 is a window without trained tokens; whether it is, only the device may know.
        loss = torch.where(n == 0, total * 0, total / n)
        ctx.shape = hidden.shape
        ctx.save_for_backward(grad_TH, n)
        ctx.mark_non_differentiable(num_correct, count)
        return loss, num_correct, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_TH, n = ctx.saved_tensors
        # Into a new tensor: with retain_graph a second backward finds the saved one as it was.
        grad_hidden = scaled(grad_TH, torch.where(n == 0, torch.zeros_like(n), grad_loss / n))
        return (grad_hidden.view(ctx.shape), *(None,) * 8)


def linear_cross_entropy(
    hidden: Tensor,
    weight: NF4Weight | Tensor,
    labels: Tensor,
    *,
    normaliser: float | Tensor | None = None,
    ignore_index: int = IGNORED,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    num_valid: int | None = None,
) -> CrossEntropy:
    """Cross-entropy of the frozen head `weight` [V, H] on `hidden` [..., H], summed and divided by `normaliser`.

    `labels` [...] are int64 and already shifted: position i holds what hidden state i is to predict. `normaliser` is
    the number of trained tokens of the whole accumulation window, so that the losses and gradients of its calls add up
    to those of one call; without it, the valid labels of this call are counted on the device. With a normaliser of 0
    loss and gradient are 0.

    `num_valid`, the number of labels that are not `ignore_index`, known on the host, saves the arithmetic of the
    others; where it is less than the truth the loss is NaN. Labels on the CPU are counted and checked here. Labels on
    the device are not looked at: one that is no class makes the loss NaN, and the gradient of its position.

    `chunk_rows` bounds the rows whose logits exist at a time; it does not change what is computed. The gradient is
    computed here, not in the backward, and only if `hidden` needs one.

    Raises:
        ValueError: shapes or dtypes do not fit, the head wants a gradient (none is computed), a label on the CPU is no
            class or does not agree with `num_valid`, or a number is out of range.
    """
    V, H = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != H:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, the head takes [..., {H}]")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, expected floating point")
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("the head is frozen here; a gradient for weight was asked for")
    if weight.device != hidden.device:
        raise ValueError(f"hidden lies on {hidden.device}, the head on {weight.device}; bring them to one device")
    _check_labels(labels, tuple(hidden.shape[:-1]))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, expected a positive number or None")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
    if num_valid is not None and not 0 <= num_valid <= labels.numel():
        raise ValueError(f"num_valid is {num_valid}, expected 0 to {labels.numel()}, the number of labels")
    if isinstance(normaliser, Tensor):
        if normaliser.dim() != 0 or normaliser.requires_grad:
            raise ValueError("normaliser is a tensor that is not 0-dimensional, or wants a gradient")
        normaliser = normaliser.to(hidden.device, non_blocking=True)
    elif normaliser is not None:
        normaliser = float(normaliser)
        if not 0 <= normaliser < float("inf"):
            raise ValueError(f"normaliser is {normaliser}, expected a number of tokens")
    labels_T = labels.reshape(-1)
    if labels.device.type == "cpu":
        num_valid = _count_on_the_host(labels_T, V, ignore_index, num_valid)
        if hidden.device.type == "cuda":
            labels_T = labels_T.pin_memory().to(hidden.device, non_blocking=True)
        else:
            labels_T = labels_T.to(hidden.device)
    elif labels.device != hidden.device:
        raise ValueError(f"hidden lies on {hidden.device}, the labels on {labels.device}; expected there or on the CPU")
    gradient = hidden.requires_grad and torch.is_grad_enabled()
    # Without a gradient nothing may be kept, and under no_grad autograd keeps nothing.
    return CrossEntropy(
        *_LinearCrossEntropy.apply(
            hidden if gradient else hidden.detach(),
            weight,
            labels_T,
            normaliser,
            ignore_index,
            softcap,
            chunk_rows,
            num_valid,
            gradient,
        )
    )


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_labels(labels: Tensor, shape: tuple[int, ...]) -> None:
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}, expected torch.int64")
    if tuple(labels.shape) != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {shape}")


def _count_on_the_host(labels_T: Tensor, V: int, ignore_index: int, num_valid: int | None) -> int:
    given_T = labels_T[labels_T != ignore_index]
    outside_T = given_T[(given_T < 0) | (given_T >= V)]
    if outside_T.numel():
        found = int(outside_T[0])
        raise ValueError(f"a label is {found}, expected 0 to {V - 1} or ignore_index {ignore_index}")
    if num_valid is not None and num_valid != given_T.numel():
        raise ValueError(f"num_valid is {num_valid}, but {given_T.numel()} labels are valid")
    return given_T.numel()


def _buffer(name: str, given: Tensor | None, C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if given is None:
        return torch.empty(C, dtype=dtype, device=device)
    if given.shape != (C,) or given.dtype != dtype or given.device != device or not given.is_contiguous():
        raise ValueError(
            f"{name} is {given.dtype} {tuple(given.shape)} on {given.device}, "
            f"expected contiguous {dtype} ({C},) on {device}"
        )
    return given
