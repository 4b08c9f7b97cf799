"""Causal self-attention for training: a dense batch, or documents packed one after another.

Shapes: B sequences of S tokens, or T tokens of N packed documents; Hq query heads, Hk key and value heads, Hq = G·Hk
(grouped queries: query head h reads key head h // G); D the head size.

    dense     q [B, S, Hq, D]    k, v [B, S, Hk, D]    out as q
    packed    q [T, Hq, D]       k, v [T, Hk, D]       out as q;    cu_seqlens [N + 1] int32: document n is the rows
              cu_seqlens[n] to cu_seqlens[n + 1], from 0 to T; empty documents are allowed, and padding at the end is
              a document of its own. `max_seqlen` is a number not below the longest document, known on the host.

Token i sees token j of its own sequence or document if j <= i, and with a window W also i - j < W. With
f(x) = c·tanh(x / c) for a softcap c, else f(x) = x:

    forward     Z = s·Q Kᵀ    X = f(Z), -∞ where unseen    L = logsumexp(X) by rows    P = exp(X - L)    O = P V
    backward    dV = Pᵀ dO    dP = dO Vᵀ    δ = rowsum(P ∘ dP)    dX = P ∘ (dP - δ)    dZ = dX ∘ f'(Z)
                f'(Z) = 1 - (X / c)², or 1                dQ = s·dZ K    dK = s·dZᵀ Q    (sums over the group's heads)

Kept for the backward: q, k, v, O and L [.., Hq] in fp32; never P. FlashAttention (arXiv 2205.14135) is this with P made
in tiles. The kernels are not written here: PyTorch carries two good ones and the flash-attn package a third. What is
here is the choice (`available_backends`) and the direct calls, so that a bigger hand-written Function can make them.

    cudnn       dense; the fastest on Hopper and Blackwell data-centre cards. cuDNN builds a plan at each new shape,
                some 150 ms for each direction, so let the lengths come in a few sizes (multiples of 128 say)
    flash       dense; PyTorch's FlashAttention-2, windows too
    varlen      packed; the same kernels, and no plans. `torch.nn.attention.activate_flash_attention_impl` puts
                FlashAttention-3 or -4 under these two names where that package is installed
    flash_attn  dense and packed; the flash-attn package from 2.7 on, where installed. It knows softcaps too
    reference   everything; the formulas above in fp32 (float64 stays), some rows at a time. Exact, and slow on a card

PyTorch's ragged cuDNN attention (`_cudnn_attention_forward` with `cum_seq_q`) is not among them: it builds its plan
anew at every call, and its backward takes the head size for the longest document.

Reproducibility: outputs, dk and dv are the same to the bit from run to run; dq is summed in an order that changes,
unless `deterministic`. That leaves FlashAttention-2, whose backward then takes 1.1 to 1.7 times as long; PyTorch asks
cuDNN for no such order, whatever its switch says, and small batches alone come out the same by chance. The switch is
one for the whole process; it is turned on around the backward call alone and put back, so another thread may meet it
on for that moment.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

__all__ = [
    "BACKENDS",
    "AttentionPlan",
    "AttentionSaved",
    "AttentionTensors",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_reference",
    "available_backends",
]

BACKENDS = ("cudnn", "flash", "varlen", "flash_attn", "reference")

# Scores that the reference path holds at a time, and the rows of a block: its memory, and the one thing to tune in it.
REFERENCE_SCORES = 2**25
REFERENCE_ROWS = (16, 512)


class AttentionPlan(NamedTuple):
    """What the backward has to know besides tensors."""

    backend: str
    scale: float
    longest: int  # tokens that one sequence or document has at most
    window: int | None
    softcap: float | None
    deterministic: bool


class AttentionTensors(NamedTuple):
    """What a backend's forward leaves for its backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    logsumexp: Tensor
    cu_seqlens: Tensor | None
    seed: Tensor | None = None  # of a dropout that is always 0, but the backends' backwards ask for both
    offset: Tensor | None = None


class AttentionSaved(NamedTuple):
    """`tensors` for `save_for_backward`, and `plan` for the context."""

    tensors: AttentionTensors
    plan: AttentionPlan


Gradients = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv


# The definition.


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition of correct: an explicit mask and a softmax in fp32 (float64 stays), gradients by autograd."""
    if cu_seqlens is not None:
        q, k, v = q[None], k[None], v[None]
    work = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    q_BHSD = q.transpose(1, 2).to(work)
    k_BHSD, v_BHSD = (x.transpose(1, 2).to(work).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q_BHSD @ k_BHSD.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(q.shape[1], device=q.device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if cu_seqlens is not None:
        document = _documents(cu_seqlens, position)
        visible = visible & (document[:, None] == document[None, :])
    out = (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v_BHSD).transpose(1, 2).to(q.dtype)
    return out if cu_seqlens is None else out[0]


def _documents(cu_seqlens: Tensor, position: Tensor) -> Tensor:
    """The number of the document that each position lies in."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position.to(cu_seqlens.dtype), right=True)


# The reference path: the same formulas by blocks of rows, on [B, S, H, D] (a pack is one sequence with a mask).


def _blocks(q: Tensor, cu_seqlens: Tensor | None, plan: AttentionPlan) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, which of them a row sees) until every row was met once."""
    batch, length, heads, _ = q.shape
    if not q.numel():
        return
    bounds, document = [0, length], None
    if cu_seqlens is not None and q.device.type == "cpu":
        bounds = cu_seqlens.tolist()
    elif cu_seqlens is not None:
        # Where the documents lie is not asked of the device; a mask says who sees whom, and no row looks further
        # back than the longest document reaches.
        document = _documents(cu_seqlens, torch.arange(length, device=q.device))
    span = max(1, plan.longest if plan.window is None else min(plan.longest, plan.window))
    least, most = REFERENCE_ROWS
    step = max(least, min(most, REFERENCE_SCORES // (batch * heads * span)))
    for start, end in itertools.pairwise(bounds):
        for first in range(start, end, step):
            last, begin = min(first + step, end), max(start, first - span + 1)
            distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(begin, last, device=q.device)
            visible = (distance >= 0) & (distance < span)
            if document is not None:
                visible &= document[first:last, None] == document[begin:last]
            yield slice(first, last), slice(begin, last), visible


def _by_key_head(x_BRHD: Tensor, key_heads: int, work: torch.dtype) -> Tensor:
    """[B, R, G·Hk, D] as [B, Hk, G·R, D]: the heads of a group become rows, so that one product serves them all."""
    batch, rows, heads, size = x_BRHD.shape
    grouped = x_BRHD.to(work).view(batch, rows, key_heads, heads // key_heads, size)
    return grouped.permute(0, 2, 3, 1, 4).reshape(batch, key_heads, heads // key_heads * rows, size)


def _by_query_head(x_BHRD: Tensor, rows: int) -> Tensor:
    """The way back: [B, Hk, G·R, D] as [B, R, G·Hk, D]."""
    batch, key_heads, grouped, size = x_BHRD.shape
    x = x_BHRD.view(batch, key_heads, grouped // rows, rows, size).permute(0, 3, 1, 2, 4)
    return x.reshape(batch, rows, key_heads * (grouped // rows), size)


def _scores(q_BHRD: Tensor, k_BHCD: Tensor, visible: Tensor, plan: AttentionPlan) -> Tensor:
    """X [B, Hk, G·R, C], -∞ where unseen."""
    scores = (q_BHRD @ k_BHCD.transpose(2, 3)).mul_(plan.scale)
    if plan.softcap is not None:
        scores.div_(plan.softcap).tanh_().mul_(plan.softcap)
    rows, columns = visible.shape
    scores.view(*scores.shape[:2], -1, rows, columns).masked_fill_(~visible, -torch.inf)
    return scores


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, plan: AttentionPlan
) -> AttentionTensors:
    given = q, k, v
    if cu_seqlens is not None:
        q, k, v = q[None], k[None], v[None]
    work, key_heads = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(q.shape[:3], dtype=work, device=q.device)
    for rows, columns, visible in _blocks(q, cu_seqlens, plan):
        k_BHCD, v_BHCD = (x[:, columns].transpose(1, 2).to(work) for x in (k, v))
        scores = _scores(_by_key_head(q[:, rows], key_heads, work), k_BHCD, visible, plan)
        lse_BHR1 = scores.logsumexp(-1, keepdim=True)
        o_BHRD = scores.sub_(lse_BHR1).exp_() @ v_BHCD
        out[:, rows] = _by_query_head(o_BHRD, visible.shape[0]).to(q.dtype)
        lse[:, rows] = _by_query_head(lse_BHR1, visible.shape[0])[..., 0]
    if cu_seqlens is not None:
        out, lse = out[0], lse[0]
    return AttentionTensors(*given, out, lse, cu_seqlens)


def _reference_backward(dout: Tensor, saved: AttentionTensors, plan: AttentionPlan) -> Gradients:
    q, k, v, _, lse, cu_seqlens, *_ = saved
    if cu_seqlens is not None:
        dout, q, k, v, lse = (x[None] for x in (dout, q, k, v, lse))
    work, key_heads = lse.dtype, k.shape[2]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device).transpose(1, 2) for x in (k, v))
    for rows, columns, visible in _blocks(q, cu_seqlens, plan):
        q_BHRD, do_BHRD = (_by_key_head(x[:, rows], key_heads, work) for x in (q, dout))
        k_BHCD, v_BHCD = (x[:, columns].transpose(1, 2).to(work) for x in (k, v))
        scores = _scores(q_BHRD, k_BHCD, visible, plan)
        p = (scores - _by_key_head(lse[:, rows, :, None], key_heads, work)).exp_()
        dv[:, :, columns] += p.transpose(2, 3) @ do_BHRD
        dp = do_BHRD @ v_BHCD.transpose(2, 3)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(plan.scale)
        if plan.softcap is not None:
            # Where nothing is seen the score is -∞ and ds is 0: their product must not become NaN.
            ds.mul_(1 - (scores / plan.softcap).clamp_(min=-1.0).square_())
        dq[:, rows] = _by_query_head(ds @ k_BHCD, visible.shape[0]).to(q.dtype)
        dk[:, :, columns] += ds.transpose(2, 3) @ q_BHRD
    dk, dv = dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
    return (dq, dk, dv) if cu_seqlens is None else (dq[0], dk[0], dv[0])


# Which backend.


@functools.cache
def _flash_attn() -> Any:
    """The flash-attn package's module of direct calls, or None."""
    try:
        package = importlib.import_module("flash_attn")
        version = tuple(int(part) for part in package.__version__.split(".")[:2])
        return importlib.import_module("flash_attn.flash_attn_interface") if version >= (2, 7) else None
    except (ImportError, AttributeError, ValueError):
        return None


def _misfit(
    name: str, q: Tensor, k: Tensor, *, packed: bool, deterministic: bool, window: int | None, softcap: float | None
) -> str:
    """Why backend `name` cannot do this; empty if it can."""
    if name == "reference":
        return ""
    if name not in BACKENDS:
        return f"there is none of this name, expected one of {BACKENDS}"
    if packed != (name == "varlen") and name != "flash_attn":
        return f"it does {'dense batches' if packed else 'packed documents'} only"
    if name == "cudnn" and deterministic:
        return "PyTorch has no backward of it that sums in a fixed order"
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or not q.numel():
        return f"it takes fp16 and bf16 on a CUDA device, not {q.numel()} elements of {q.dtype} on {q.device.type}"
    if softcap is not None and name != "flash_attn":
        return "it knows no softcap"
    if name == "flash_attn":
        if _flash_attn() is None:
            return "the package flash-attn (2.7 or newer) is not installed"
        if torch.cuda.get_device_capability(q.device) < (8, 0) or q.shape[-1] > 256 or q.shape[-1] % 8:
            return "it needs compute capability 8.0 and a head size up to 256, a multiple of 8"
        return ""
    if name == "cudnn" and window is not None:
        return "it knows no window"
    if q.shape[-1] % 8:
        return "it takes head sizes that are a multiple of 8"  # torch's own question assumes that its caller pads
    # torch knows best what its build and this card can do.
    rows = (_kernel_ready(x.detach()) for x in (q, k))
    q_BHSD, k_BHSD = (x[None].transpose(1, 2) if packed else x.transpose(1, 2) for x in rows)
    params = SDPAParams(q_BHSD, k_BHSD, k_BHSD, None, 0.0, True, q.shape[-2] != k.shape[-2])
    can_use = can_use_cudnn_attention if name == "cudnn" else can_use_flash_attention
    return "" if can_use(params, False) else "PyTorch refuses it for this card, head size or setting"


def available_backends(
    q: Tensor,
    k: Tensor,
    *,
    packed: bool = False,
    deterministic: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> list[str]:
    """Every backend that can do this, the best first; "reference" always is the last. A window counts as one here."""
    order = ["cudnn", "flash", "varlen", "flash_attn", "reference"]
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        order[:2] = ["flash", "cudnn"]
    options: dict[str, Any] = {"packed": packed, "deterministic": deterministic, "window": window, "softcap": softcap}
    return [name for name in order if not _misfit(name, q, k, **options)]


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """torch's process-wide switch at `on`, and back to what it was, whatever happens in between."""
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode("error" if on else "default")
        # With the switch on torch would also fill every new tensor with NaN. All of these are written in full.
        settings.fill_uninitialized_memory = False
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


# The direct calls.


def _kernel_ready(x: Tensor) -> Tensor:
    """x as the kernels want it: rows of whole 16-byte pieces. A column slice of a wider buffer is such, uncopied."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    fine = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides[:-1])
    return x if fine else x.contiguous()


def _check_accumulator(q: Tensor, documents: int | None) -> None:
    """FlashAttention-2 sums dq in fp32 with 32-bit offsets, over whole packs or one sequence at a time."""
    step = 32 if q.shape[-1] <= 128 else 64
    tokens = q.shape[1] if documents is None else q.shape[0] + 128 * documents
    elements = tokens * q.shape[-2] * -(-q.shape[-1] // step) * step
    if elements >= 2**31:
        raise ValueError(
            f"{tokens} tokens x {q.shape[-2]} heads x head size {q.shape[-1]} are {elements} elements of dq; "
            f"FlashAttention-2's backward counts them in 32 bits. Give it fewer tokens at a time"
        )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, plan: AttentionPlan) -> AttentionTensors:
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHSD, k_BHSD, v_BHSD, None, True, 0.0, True, False, scale=plan.scale
    )
    return AttentionTensors(q, k, v, out.transpose(1, 2), lse, cu_seqlens, seed, offset)


def _cudnn_backward(dout: Tensor, saved: AttentionTensors, plan: AttentionPlan) -> Gradients:
    q, k, v, out, lse, _, seed, offset = saved
    do_BHSD, q_BHSD, k_BHSD, v_BHSD, o_BHSD = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    length = plan.longest
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(do_BHSD, q_BHSD, k_BHSD, v_BHSD, o_BHSD, lse, seed, offset),
        *(None, None, None, length, length, 0.0, True),
        scale=plan.scale,
    )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


def _torch_window(plan: AttentionPlan) -> dict[str, int | None]:
    """torch's names: how many tokens are seen to the left besides the own one; -1 is no limit."""
    return {"window_size_left": -1 if plan.window is None else plan.window - 1, "window_size_right": 0}


def _flash_lengths(cu_seqlens: Tensor | None, plan: AttentionPlan) -> tuple[Tensor | None, Tensor | None, int, int]:
    # Not 1: for single queries FlashAttention folds the heads of a group into rows, which counts on there being as
    # many tokens as documents; an empty document breaks that.
    longest = plan.longest if cu_seqlens is None else max(2, plan.longest)
    return cu_seqlens, cu_seqlens, longest, longest


def _torch_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, plan: AttentionPlan
) -> AttentionTensors:
    lengths = _flash_lengths(cu_seqlens, plan)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, plan.window is None, False, scale=plan.scale, **_torch_window(plan)
    )
    return AttentionTensors(q, k, v, out, lse, cu_seqlens, rng, unused)


def _torch_flash_backward(dout: Tensor, saved: AttentionTensors, plan: AttentionPlan) -> Gradients:
    q, k, v, out, lse, cu_seqlens, rng, unused = saved
    lengths = _flash_lengths(cu_seqlens, plan)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(dout, q, k, v, out, lse, *lengths, 0.0, plan.window is None, rng, unused),
        scale=plan.scale,
        **_torch_window(plan),
    )
    return dq, dk, dv


def _flash_attn_options(cu_seqlens: Tensor | None, plan: AttentionPlan) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": plan.scale,
        "causal": True,
        "softcap": 0.0 if plan.softcap is None else plan.softcap,
        "alibi_slopes": None,
        **_torch_window(plan),
    }
    if cu_seqlens is not None:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        options |= dict(zip(names, _flash_lengths(cu_seqlens, plan), strict=True))
    return options


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, plan: AttentionPlan
) -> AttentionTensors:
    package = _flash_attn()
    call = package._flash_attn_forward if cu_seqlens is None else package._flash_attn_varlen_forward
    out, lse, _, rng = call(q, k, v, return_softmax=False, **_flash_attn_options(cu_seqlens, plan))
    return AttentionTensors(q, k, v, out, lse, cu_seqlens, rng)


def _flash_attn_backward(dout: Tensor, saved: AttentionTensors, plan: AttentionPlan) -> Gradients:
    q, k, v, out, lse, cu_seqlens, rng, _ = saved
    package = _flash_attn()
    call = package._flash_attn_backward if cu_seqlens is None else package._flash_attn_varlen_backward
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    options = _flash_attn_options(cu_seqlens, plan)
    call(dout, q, k, v, out, lse, dq, dk, dv, deterministic=plan.deterministic, rng_state=rng, **options)
    return dq, dk, dv


_Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionPlan], AttentionTensors]
_Backward = Callable[[Tensor, AttentionTensors, AttentionPlan], Gradients]
_CALLS: dict[str, tuple[_Forward, _Backward]] = {
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "flash": (_torch_flash_forward, _torch_flash_backward),
    "varlen": (_torch_flash_forward, _torch_flash_backward),
    "flash_attn": (_flash_attn_forward, _flash_attn_backward),
    "reference": (_reference_forward, _reference_backward),
}


# The launchers.


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, window: int | None
) -> None:
    dims = 4 if cu_seqlens is None else 3
    if q.dim() != dims or k.dim() != dims or k.shape != v.shape:
        expected = "[B, S, H, D]" if cu_seqlens is None else "[T, H, D] with cu_seqlens"
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}; expected {expected}, k and v alike")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in more than their heads")
    if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{q.shape[-2]} query heads do not divide among {k.shape[-2]} key heads")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one floating-point dtype")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v lie on {q.device}, {k.device}, {v.device}; bring them to one device")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1: a token sees itself")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen goes with cu_seqlens; a dense batch has its length in its shape")
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        given = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens is {given}, expected int32 [N + 1] for N >= 1 documents")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens lies on {cu_seqlens.device}, q on {q.device}")
    if max_seqlen is None or max_seqlen < (1 if q.shape[0] else 0):
        raise ValueError(f"max_seqlen is {max_seqlen}; a pack needs the length of its longest document")
    if cu_seqlens.device.type == "cpu":  # on a card it would have to be waited for
        offsets = cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(offsets)]
        if offsets[0] != 0 or offsets[-1] != q.shape[0] or min(lengths) < 0:
            raise ValueError(f"cu_seqlens runs from {offsets[0]} to {offsets[-1]}; expected 0 to {q.shape[0]}, rising")
        if max(lengths) > max_seqlen:
            raise ValueError(f"max_seqlen is {max_seqlen}, but a document has {max(lengths)} tokens")


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, AttentionSaved]:
    """out, and what `attention_backward` needs. No autograd: q, k, v count as plain tensors.

    The arguments are those of `attention`.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, window)
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap is {softcap}, expected a positive number or None")
    packed = cu_seqlens is not None
    longest = q.shape[1] if max_seqlen is None else max_seqlen
    if window is not None and window >= longest:
        window = None  # nothing lies outside it
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    q, k, v = q.detach(), k.detach(), v.detach()
    options: dict[str, Any] = {"packed": packed, "deterministic": deterministic, "window": window, "softcap": softcap}
    if backend is None:
        backend = available_backends(q, k, **options)[0]
    elif misfit := _misfit(backend, q, k, **options):
        raise ValueError(f"backend {backend!r}: {misfit}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    plan = AttentionPlan(backend, scale, longest, window, softcap, deterministic)
    if backend not in ("reference", "cudnn"):
        _check_accumulator(q, None if cu_seqlens is None else cu_seqlens.numel() - 1)
    if backend != "reference":
        q, k, v = _kernel_ready(q), _kernel_ready(k), _kernel_ready(v)
    forward, _ = _CALLS[backend]
    tensors = forward(q, k, v, cu_seqlens, plan)
    return tensors.out, AttentionSaved(tensors, plan)


def attention_backward(dout: Tensor, saved: AttentionSaved) -> Gradients:
    """dq, dk, dv for `dout`, which has the shape of out."""
    tensors, plan = saved
    out = tensors.out
    if dout.shape != out.shape or dout.dtype != out.dtype:
        raise ValueError(f"dout is {dout.dtype} {tuple(dout.shape)}, but the output was {out.dtype} {tuple(out.shape)}")
    _, backward = _CALLS[plan.backend]
    if plan.backend == "reference":
        return backward(dout, tensors, plan)
    # A caller that rebuilt q, k and v may bring them as they came into the forward.
    q, k, v = (_kernel_ready(x) for x in tensors[:3])
    tensors = tensors._replace(q=q, k=k, v=v)
    # cuDNN's plans are found again by the layout of q, k, v alone, so dout always comes in the same one.
    dout = _kernel_ready(dout.contiguous())
    with _deterministic(True) if plan.deterministic else contextlib.nullcontext():
        return backward(dout, tensors, plan)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out, saved = attention_forward(q, k, v, **options)
        ctx.save_for_backward(*saved.tensors)
        ctx.plan = saved.plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads = attention_backward(dout, AttentionSaved(AttentionTensors(*ctx.saved_tensors), ctx.plan))
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)), None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention, differentiable once in q, k and v. Shapes and meanings are in the module's docstring.

    Args:
        q: [B, S, Hq, D], or [T, Hq, D] with `cu_seqlens`. Column slices of a wider buffer are taken as they are.
        k: the same with Hk heads, Hq a multiple of Hk.
        v: as k.
        cu_seqlens: where the packed documents begin and end. Its values are checked on the CPU only: on a card that
            would mean waiting for it, and wrong ones read outside the tensors.
        max_seqlen: the length of the longest packed document, or a bound for it.
        scale: of the scores; None is D^-1/2.
        backend: one of `BACKENDS` by name; None is the first of `available_backends`.
        deterministic: dq the same to the bit from run to run; implied by torch's own switch.
        window: how many tokens one sees, itself included; None is all before it.
        softcap: c of c·tanh(x / c) on the scores; None is no cap.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, heads do not divide, the named backend cannot do this, or
            the tokens are too many for FlashAttention-2's backward.
    """
    options = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "scale": scale,
        "backend": backend,
        "deterministic": deterministic,
        "window": window,
        "softcap": softcap,
    }
    out: Tensor = _Attention.apply(q, k, v, options)
    return out
