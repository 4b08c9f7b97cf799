"""The two blocks of a decoder layer around their LoRA products, each with one hand-written backward.

Shapes: x, residual, z [T, H]; y = norm(z); the linear layers take y. The norm stands inside, because it can write y
into the buffer that has room for S, and the kernel that reads the gradient of y can add dS A to it on the way. SwiGLU
does both for the down projection, and makes S' as it writes h (`lora_linear.py` has the picture).

    lora_qkv    z = x + residual        [y | S] = norm(z), S = y Aᵀ        [q | k | v] = [y | S]·[W | s·B]ᵀ + bias

    lora_mlp    z, [y | S] as above     [g | u] = [y | S]·[W | s·B]ᵀ      [h | S'] = a(g) ∘ u, S' = h A'ᵀ
                                        out = [h | S']·[W' | s·B']ᵀ

    backward of the products with y, from dY = [dq | dk | dv] or [dg | du]:
        dY·[W | s·B] = [dY W | dS]      dz = norm_backward(dY W + dS A)  (+ the gradient of z itself)
        dA = dSᵀ y = (ρ ∘ dS)ᵀ z ∘ w    dB_i = s·dY_iᵀ S_i
    backward of the product with h:
        dout·[W' | s·B'] = [dh | dS']   dg, du, h = swiglu_backward(dh + dS' A', g, u)
        dA' = dS'ᵀ h                    dB' = s·doutᵀ S'

Kept for the backward: z and ρ; for the MLP gate and up as well. y is never rebuilt: dA needs it only under a product,
where ρ and the norm's weight w (1 + w for Gemma) can be taken out; h is rebuilt in the pass that makes dg and du.
With dropout S is made of the dropped y by a kernel of its own, and y is rebuilt for dA.

The raw functions (`norm_linears_forward`, ...) know no autograd, so that a whole-layer Function can be made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft_kernels.dropout import dropout as drop
from graft_kernels.launch import as_rows
from graft_kernels.lora_linear import (
    Columns,
    Linear,
    check_linear,
    draw_seed,
    extend,
    linear_way,
    linear_ways,
    lora_linear,
    low_rank_update,
    padded_rank,
    product,
    weight_columns,
)
from graft_kernels.nf4 import NF4Weight
from graft_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_forward
from graft_kernels.swiglu import Activation, geglu, swiglu, swiglu_backward, swiglu_forward


class Norm(NamedTuple):
    """The RMS norm in front of a block: its frozen weight [H], ε, and whether it is Gemma's (1 + w)."""

    weight: Tensor
    eps: float
    gemma: bool = False


class Lora(NamedTuple):
    """What the adapters of a job have in common. `seed` decides the dropout masks."""

    scale: float
    dropout: float = 0.0
    seed: int = 0


class NormLinearsState(NamedTuple):
    """What `norm_linears_backward` needs."""

    z_TH: Tensor
    rho_T: Tensor
    s_TR: Tensor | None  # s·S


Gradients = list[tuple[Tensor | None, Tensor | None]]
Layers = tuple[list[NF4Weight | Tensor], list[Tensor | None]]  # the frozen weights and biases of some linears


def norm_linears_forward(
    x_TH: Tensor, residual_TH: Tensor | None, norm: Norm, linears: Sequence[Linear], lora: Lora, columns: Columns
) -> tuple[Tensor, NormLinearsState]:
    """All outputs side by side, [T, ΣN]; and what the backward needs, z among it."""
    width, p = x_TH.shape[1], padded_rank(linears)
    arguments: dict[str, Any] = {"gemma": norm.gemma, "residual": residual_TH}
    y_s = torch.empty(x_TH.shape[0], width + p, dtype=x_TH.dtype, device=x_TH.device)
    if p > 0 and lora.dropout == 0.0:
        _, z, rho = rms_norm_forward(x_TH, norm.weight, norm.eps, out=y_s, lora_a=columns.a, **arguments)
    else:
        y, z, rho = rms_norm_forward(x_TH, norm.weight, norm.eps, out=y_s[:, :width], **arguments)
        if p > 0:
            extend(y, columns.a, p, out=y_s, dropout=lora.dropout, seed=lora.seed)
    out = F.linear(y_s, columns.weight, _stacked_bias(linears, x_TH.dtype))
    s = y_s[:, width : width + columns.rank] * lora.scale if p > 0 else None
    return out, NormLinearsState(z, rho, s)


def norm_linears_backward(
    dy_TN: Tensor,
    dz_TH: Tensor | None,
    state: NormLinearsState,
    norm: Norm,
    linears: Sequence[Linear],
    lora: Lora,
    columns: Columns,
) -> tuple[Tensor, Gradients]:
    """The gradient of x and of the residual (they are one), and (dA, dB) of every layer.

    `dz_TH` is the gradient that reaches z from elsewhere, along the residual stream.
    """
    z, rho, s = state
    width, rank = z.shape[1], columns.rank
    # dY·[W | s·B] = [dY W | dS]
    dy_ds = dy_TN @ columns.weight
    dy, ds = dy_ds[:, :width], dy_ds[:, width : width + rank]
    deferred = None
    if rank > 0 and lora.dropout == 0.0:
        deferred = (dy_ds[:, width:], columns.a)
    elif rank > 0:
        low_rank_update(dy, ds, columns.a, out=dy, dropout=lora.dropout, seed=lora.seed)
    dx = rms_norm_backward(dy, z, norm.weight, rho, gemma=norm.gemma, dresidual=dz_TH, deferred=deferred)
    if rank == 0 or s is None:
        return dx, [(None, None)] * len(linears)
    dtype = next(linear.lora_a.dtype for linear in linears if linear.lora_a is not None)
    if lora.dropout == 0.0:
        # dA = dSᵀ y = (ρ ∘ dS)ᵀ z ∘ w
        w = 1.0 + norm.weight.to(dtype) if norm.gemma else norm.weight
        da = product((ds * rho[:, None]).to(z.dtype).t(), z, dtype).mul_(w)
    else:
        y, _, _ = rms_norm_forward(z, norm.weight, norm.eps, gemma=norm.gemma)
        da = product(ds.t(), drop(y, lora.dropout, lora.seed), dtype)
    return dx, _split_gradients(dy_TN, s, da, linears)


def _split_gradients(dy_TN: Tensor, s_TR: Tensor, da_RK: Tensor, linears: Sequence[Linear]) -> Gradients:
    """dB_i = s·dY_iᵀ S_i, and every layer's rows of dA."""
    gradients: Gradients = []
    n = r = 0
    for linear in linears:
        n_end, r_end = n + linear.weight.shape[0], r + linear.rank
        if linear.lora_b is None:
            gradients.append((None, None))
        else:
            db = product(dy_TN[:, n:n_end].t(), s_TR[:, r:r_end], linear.lora_b.dtype)
            gradients.append((da_RK[r:r_end], db))
        n, r = n_end, r_end
    return gradients


def _stacked_bias(linears: Sequence[Linear], dtype: torch.dtype) -> Tensor | None:
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    parts = [
        torch.zeros(linear.weight.shape[0], dtype=dtype, device=linear.weight.device)
        if bias is None
        else bias.to(dtype)
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class MLPState(NamedTuple):
    """What `mlp_backward` needs. `gate_up_TI` is overwritten by it."""

    norm_linears: NormLinearsState
    gate_up_TI: Tensor  # [T, 2I]
    s_TR: Tensor | None  # s·S' of the down projection


def mlp_forward(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    norm: Norm,
    gate_up: Sequence[Linear],
    down: Linear,
    lora: Lora,
    gate_up_columns: Columns,
    down_columns: Columns,
    activation: Activation = "silu",
) -> tuple[Tensor, MLPState]:
    """out [T, H], without the residual; and what the backward needs."""
    gu, inner = norm_linears_forward(x_TH, residual_TH, norm, gate_up, lora, gate_up_columns)
    width, p = gu.shape[1] // 2, padded_rank((down,))
    gate, up = gu[:, :width], gu[:, width:]
    h_s = torch.empty(gu.shape[0], width + p, dtype=gu.dtype, device=gu.device)
    if p > 0 and lora.dropout == 0.0:
        swiglu_forward(gate, up, activation=activation, out=h_s, lora_a=down_columns.a)
    else:
        h = swiglu_forward(gate, up, activation=activation, out=h_s[:, :width])
        if p > 0:
            extend(h, down_columns.a, p, out=h_s, dropout=lora.dropout, seed=lora.seed + 1)
    out = F.linear(h_s, down_columns.weight, _stacked_bias((down,), gu.dtype))
    s = h_s[:, width : width + down_columns.rank] * lora.scale if p > 0 else None
    return out, MLPState(inner, gu, s)


def mlp_backward(
    dout_TH: Tensor,
    dz_TH: Tensor | None,
    state: MLPState,
    norm: Norm,
    gate_up: Sequence[Linear],
    down: Linear,
    lora: Lora,
    gate_up_columns: Columns,
    down_columns: Columns,
    activation: Activation = "silu",
) -> tuple[Tensor, Gradients]:
    """The gradient of x and of the residual, and (dA, dB) of gate, up and down."""
    gu, s = state.gate_up_TI, state.s_TR
    width, rank = gu.shape[1] // 2, down_columns.rank
    gate, up = gu[:, :width], gu[:, width:]
    # dout·[W' | s·B'] = [dh | dS']
    dh_ds = dout_TH @ down_columns.weight
    dh, ds = dh_ds[:, :width], dh_ds[:, width : width + rank]
    deferred = None
    if rank > 0 and lora.dropout == 0.0:
        deferred = (dh_ds[:, width:], down_columns.a)
    elif rank > 0:
        low_rank_update(dh, ds, down_columns.a, out=dh, dropout=lora.dropout, seed=lora.seed + 1)
    # dg and du take the place of g and u, and the rebuilt h that of dh.
    h = dh if rank > 0 else None
    swiglu_backward(dh, gate, up, activation=activation, deferred=deferred, dgate=gate, dup=up, h=h)
    down_gradients: Gradients = [(None, None)]
    if s is not None and h is not None and down.lora_a is not None:
        dropped = drop(h, lora.dropout, lora.seed + 1) if lora.dropout else h
        down_gradients = _split_gradients(dout_TH, s, product(ds.t(), dropped, down.lora_a.dtype), (down,))
    dx, gradients = norm_linears_backward(gu, dz_TH, state.norm_linears, norm, gate_up, lora, gate_up_columns)
    return dx, gradients + down_gradients


# --- autograd --------------------------------------------------------------------------------------------------------


def _linears(layers: Layers, adapters: Sequence[Tensor | None]) -> list[Linear]:
    pairs = zip(adapters[0::2], adapters[1::2], strict=True)
    return [Linear(w, a, b, bias) for w, bias, (a, b) in zip(*layers, pairs, strict=True)]


class _LoraQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, norm: Norm, layers: Layers, lora: Lora, *adapters: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        linears = _linears(layers, adapters)
        columns = weight_columns(linears, lora.scale, x.dtype)
        rows = None if residual is None else as_rows(residual)
        out, state = norm_linears_forward(as_rows(x), rows, norm, linears, lora, columns)
        ctx.save_for_backward(*state, *adapters)
        ctx.statics = norm, layers, lora
        ctx.set_materialize_grads(False)
        out = out.view(*x.shape[:-1], -1)
        return out if residual is None else (out, state.z_TH.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Any, ...]:
        if dy is None:
            return dz, dz, None, None, None, *[None] * (len(ctx.saved_tensors) - 3)
        norm, layers, lora = ctx.statics
        state, adapters = NormLinearsState(*ctx.saved_tensors[:3]), ctx.saved_tensors[3:]
        linears = _linears(layers, adapters)
        columns = weight_columns(linears, lora.scale, dy.dtype)
        rows = None if dz is None else as_rows(dz)
        dx, gradients = norm_linears_backward(as_rows(dy), rows, state, norm, linears, lora, columns)
        dx = dx.view(dy.shape[:-1] + dx.shape[-1:])
        flat = [gradient for pair in gradients for gradient in pair]
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None, *flat


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        layers: Layers,
        lora: Lora,
        activation: Activation,
        *adapters: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        *gate_up, down = _linears(layers, adapters)
        columns = (weight_columns(gate_up, lora.scale, x.dtype), weight_columns((down,), lora.scale, x.dtype))
        rows = None if residual is None else as_rows(residual)
        out, state = mlp_forward(as_rows(x), rows, norm, gate_up, down, lora, *columns, activation)
        ctx.save_for_backward(*state.norm_linears, state.gate_up_TI, state.s_TR, *adapters)
        ctx.statics = norm, layers, lora, activation
        ctx.consumed = False
        ctx.set_materialize_grads(False)
        out = out.view(x.shape)
        return out if residual is None else (out, state.norm_linears.z_TH.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dz: Tensor | None = None) -> tuple[Any, ...]:
        if dout is None:
            return dz, dz, None, None, None, None, *[None] * (len(ctx.saved_tensors) - 5)
        if ctx.consumed:
            raise RuntimeError("lora_mlp's backward overwrites what it kept: it runs once, retain_graph cannot help")
        ctx.consumed = True
        norm, layers, lora, activation = ctx.statics
        state = MLPState(NormLinearsState(*ctx.saved_tensors[:3]), *ctx.saved_tensors[3:5])
        *gate_up, down = _linears(layers, ctx.saved_tensors[5:])
        columns = (weight_columns(gate_up, lora.scale, dout.dtype), weight_columns((down,), lora.scale, dout.dtype))
        rows = None if dz is None else as_rows(dz)
        dx, gradients = mlp_backward(as_rows(dout), rows, state, norm, gate_up, down, lora, *columns, activation)
        dx = dx.view(dout.shape)
        flat = [gradient for pair in gradients for gradient in pair]
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None, None, *flat


# --- public ----------------------------------------------------------------------------------------------------------


def lora_qkv(
    x: Tensor,
    norm: Norm,
    linears: Sequence[Linear],
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    way: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(the outputs side by side [..., ΣN], z): one to three LoRA layers of norm(z), z = x + residual.

    Differentiable once in x, residual and the adapters. z is x itself without a residual. `way` is `lora_linear`'s: for
    few tokens, and on a CPU, the layers run one by one.

    Raises:
        ValueError: as `lora_linear`; no layer or more than three; or x and the residual differ in shape or dtype.
    """
    if not 1 <= len(linears) <= 3:
        raise ValueError(f"{len(linears)} layers were given, expected 1 to 3")
    way = _check_block(x, residual, norm, linears, dropout, way)
    lora = Lora(scale, dropout, draw_seed(dropout))
    if way != "columns":
        y, z = _norm(x, residual, norm)
        return torch.cat([_one(y, linear, lora, way) for linear in linears], dim=-1), z
    out = _LoraQKV.apply(x, residual, norm, _frozen(linears), lora, *_adapters(linears))
    return (out, x) if residual is None else out


def lora_mlp(
    x: Tensor,
    norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
    *,
    residual: Tensor | None = None,
    activation: Activation = "silu",
    scale: float = 1.0,
    dropout: float = 0.0,
    way: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(down(a(gate(y)) ∘ up(y)) [..., H], z): the MLP block of norm(z), z = x + residual. z is not added to the result.

    Differentiable once in x, residual and the adapters, and its backward can run once: it overwrites gate and up.

    Raises:
        ValueError: as `lora_qkv`, or gate, up and down do not fit each other.
    """
    if gate.weight.shape != up.weight.shape or down.weight.shape != gate.weight.shape[::-1]:
        shapes = ", ".join(str(tuple(linear.weight.shape)) for linear in (gate, up, down))
        raise ValueError(f"gate, up and down are {shapes}; expected [I, H], [I, H], [H, I]")
    way = _check_block(x, residual, norm, (gate, up), dropout, way)
    check_linear(x.new_empty(0, down.weight.shape[1]), *down, dropout)
    lora = Lora(scale, dropout, draw_seed(dropout))
    if way != "columns":
        y, z = _norm(x, residual, norm)
        g, u = _one(y, gate, lora, way), _one(y, up, lora, way)
        h = swiglu(g, u) if activation == "silu" else geglu(g, u, "none" if activation == "gelu" else "tanh")
        return _one(h, down, lora, way), z
    linears = (gate, up, down)
    out = _LoraMLP.apply(x, residual, norm, _frozen(linears), lora, activation, *_adapters(linears))
    return (out, x) if residual is None else out


def _check_block(
    x: Tensor, residual: Tensor | None, norm: Norm, linears: Sequence[Linear], dropout: float, way: str | None
) -> str:
    for linear in linears:
        check_linear(x, *linear, dropout)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual is {tuple(residual.shape)} {residual.dtype}, expected x's {tuple(x.shape)} {x.dtype}"
        )
    if norm.weight.requires_grad:
        raise ValueError("the norm's weight is frozen here; a gradient for it was asked for")
    rank = max(linear.rank for linear in linears)
    ways = linear_ways(x, linears[0].weight, rank, dropout)
    if way is None:
        return linear_way(x, linears[0].weight, rank, dropout)
    if way not in ways:
        raise ValueError(f"the way {way!r} is not open to these operands on {x.device}; open are {', '.join(ways)}")
    return way


def _norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm(x, norm.weight, norm.eps, gemma=norm.gemma), x
    return add_rms_norm(x, residual, norm.weight, norm.eps, gemma=norm.gemma)


def _one(y: Tensor, linear: Linear, lora: Lora, way: str) -> Tensor:
    dropout = lora.dropout if linear.rank else 0.0
    return lora_linear(
        y, linear.weight, linear.lora_a, linear.lora_b, scale=lora.scale, bias=linear.bias, dropout=dropout, way=way
    )


def _frozen(linears: Sequence[Linear]) -> Layers:
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def _adapters(linears: Sequence[Linear]) -> list[Tensor | None]:
    return [part for linear in linears for part in (linear.lora_a, linear.lora_b)]
