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

from graft_kernels.adapter_grads import sum_over_tokens
from graft_kernels.dropout import dropout as drop
from graft_kernels.launch import as_rows
from graft_kernels.lora_linear import (
    Columns,
    Linear,
    Rows,
    check_linear,
    draw_seed,
    extend,
    linear_way,
    linear_ways,
    lora_linear,
    low_rank_update,
    padded_rank,
    weight_columns,
)
from graft_kernels.nf4 import NF4Weight
from graft_kernels.rms_norm import (
    add_rms_norm,
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
    rms_norm_forward,
)
from graft_kernels.rope import rope_backward, rope_forward
from graft_kernels.rope_qkv import rope_qkv_backward, rope_qkv_forward_
from graft_kernels.swiglu import Activation, geglu, swiglu, swiglu_backward, swiglu_forward

# S [T, at least R] and B [R, H]: a sum S B that a tensor still lacks; and [T, R], where whoever adds it leaves S
Pending = tuple[Tensor, Tensor, Tensor]


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
    s_TR: Tensor | None  # S


class Gradients(NamedTuple):
    """Where dA of some layers goes, one above the other [R, K], and dB of each [N_i, r_i]; with `add` onto what is
    there. None where there is no adapter."""

    a: Tensor | None
    b: tuple[Tensor | None, ...]
    add: bool = False

    @classmethod
    def empty(cls, linears: Sequence[Linear]) -> Gradients:
        """Buffers in the adapters' dtype, to be overwritten."""
        some = next((linear.lora_a for linear in linears if linear.lora_a is not None), None)
        if some is None:
            return cls(None, (None,) * len(linears))
        b = tuple(None if linear.lora_b is None else torch.empty_like(linear.lora_b) for linear in linears)
        return cls(some.new_empty(sum(linear.rank for linear in linears), some.shape[1]), b)

    def pairs(self, linears: Sequence[Linear]) -> list[tuple[Tensor | None, Tensor | None]]:
        """(dA, dB) of every layer."""
        ranks = [linear.rank for linear in linears]
        parts = [None] * len(ranks) if self.a is None else self.a.split(ranks)
        return [(None, None) if db is None else (da, db) for da, db in zip(parts, self.b, strict=True)]

    def add_b(self, dy_TN: Tensor, s_TR: Tensor, scale: float, linears: Sequence[Linear]) -> None:
        """dB_i = s·dY_iᵀ S_i."""
        outs = [
            s_TR.new_empty(linear.weight.shape[0], 0) if db is None else db
            for linear, db in zip(linears, self.b, strict=True)
        ]
        sum_over_tokens(outs, dy_TN[:, : sum(out.shape[0] for out in outs)], s_TR, add=self.add, factor=scale)

    def add_a(self, ds_TR: Tensor, x_TK: Tensor) -> None:
        """dA = dSᵀ x."""
        if self.a is not None:
            sum_over_tokens((self.a,), x_TK, ds_TR, add=self.add, transposed=True)

    def add_a_of_normed(self, ds_TR: Tensor, z_TH: Tensor, rho_T: Tensor, norm: Norm) -> None:
        """dA = dSᵀ y = (ρ ∘ dS)ᵀ z ∘ w, without y."""
        if self.a is not None:
            by_norm = (rho_T, norm.weight, norm.gemma)
            sum_over_tokens((self.a,), z_TH, ds_TR, add=self.add, transposed=True, norm=by_norm)


Layers = tuple[list[NF4Weight | Tensor], list[Tensor | None]]  # the frozen weights and biases of some linears


def norm_linears_forward(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    norm: Norm,
    linears: Sequence[Linear],
    lora: Lora,
    columns: Columns,
    *,
    pending: Pending | None = None,
    rho_T: Tensor | None = None,
) -> tuple[Tensor, NormLinearsState]:
    """All outputs side by side, [T, ΣN]; and what the backward needs, z among it.

    `pending` is what the layer that made x left to add: z = x + residual + S B. With `rho_T`, kept from an earlier
    call, x is z already, and the outputs come out again to the bit.
    """
    width, p = x_TH.shape[1], padded_rank(linears)
    y_s = torch.empty(x_TH.shape[0], width + p, dtype=x_TH.dtype, device=x_TH.device)
    fused = p > 0 and lora.dropout == 0.0
    # With A's zeros the product leaves zeros behind S.
    out, lora_a = (y_s, columns.padded_a) if fused else (y_s[:, :width], None)
    if rho_T is None:
        _, z, rho = rms_norm_forward(
            x_TH, norm.weight, norm.eps, gemma=norm.gemma, residual=residual_TH, pending=pending, out=out, lora_a=lora_a
        )
    else:
        z, rho = x_TH, rho_T
        rms_norm_again(z, norm.weight, rho, gemma=norm.gemma, out=out, lora_a=lora_a)
    if p > 0 and not fused:
        extend(y_s[:, :width], columns.a, p, out=y_s, dropout=lora.dropout, seed=lora.seed)
    result = F.linear(y_s, columns.weight, stacked_bias(linears, x_TH.dtype))
    s = y_s[:, width : width + columns.rank].contiguous() if p > 0 else None
    return result, NormLinearsState(z, rho, s)


def norm_linears_backward(
    dy_TN: Tensor,
    dz_TH: Tensor | None,
    state: NormLinearsState,
    norm: Norm,
    linears: Sequence[Linear],
    lora: Lora,
    columns: Columns,
    into: Gradients,
    *,
    before: Rows | None = None,
    need_dx: bool = True,
) -> Tensor | None:
    """The gradient of x and of the residual (they are one), [T, H], or None; dA and dB go where `into` says.

    `dz_TH` is the gradient that reaches z from elsewhere, along the residual stream. With `before`, the layer that made
    x in the rows form, the result is [dx | dS | 0] with that layer's dS.
    """
    z, rho, s = state
    width, rank = z.shape[1], columns.rank
    # dY·[W | s·B] = [dY W | dS]
    dy_ds = dy_TN @ columns.weight
    dy, ds = dy_ds[:, :width], dy_ds[:, width : width + rank]
    if s is not None:
        into.add_b(dy_TN, s, lora.scale, linears)
        if lora.dropout == 0.0:
            into.add_a_of_normed(ds, z, rho, norm)
        else:
            y = rms_norm_again(z, norm.weight, rho, gemma=norm.gemma)
            into.add_a(ds, drop(y, lora.dropout, lora.seed))
    if not need_dx:
        return None
    deferred = None
    if rank > 0 and lora.dropout == 0.0:
        deferred = (dy_ds[:, width:], columns.a)
    elif rank > 0:
        low_rank_update(dy, ds, columns.a, out=dy, dropout=lora.dropout, seed=lora.seed)
    return _norm_backward(dy, state, norm, dz_TH, deferred, before)


def _norm_backward(
    dy_TH: Tensor,
    state: NormLinearsState,
    norm: Norm,
    dz_TH: Tensor | None,
    deferred: tuple[Tensor, Tensor] | None = None,
    before: Rows | None = None,
) -> Tensor:
    out, lora_b = None, None
    if before is not None and before.rank > 0:
        out = torch.empty(dy_TH.shape[0], before.weight.shape[0], dtype=dy_TH.dtype, device=dy_TH.device)
        lora_b = before.b
    return rms_norm_backward(
        dy_TH, state.z_TH, norm.weight, state.rho_T, gemma=norm.gemma, dresidual=dz_TH, deferred=deferred,
        lora_b=lora_b, out=out,
    )  # fmt: skip


def stacked_bias(linears: Sequence[Linear], dtype: torch.dtype, p: int = 0) -> Tensor | None:
    """The biases one after another, and p zeros; None if no layer has one."""
    if all(linear.bias is None for linear in linears):
        return None
    device = linears[0].weight.device
    parts = [
        torch.zeros(linear.weight.shape[0], dtype=dtype, device=device)
        if linear.bias is None
        else linear.bias.to(dtype)
        for linear in linears
    ]
    if p > 0:
        parts.append(torch.zeros(p, dtype=dtype, device=device))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class MLPState(NamedTuple):
    """What `mlp_backward` needs. `gate_up_TI` is overwritten by it."""

    norm_linears: NormLinearsState
    gate_up_TI: Tensor  # [T, 2I]
    s_TR: Tensor | None  # S' of the down projection


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
    out, s = down_forward(gu, down, lora, down_columns, activation)
    return out, MLPState(inner, gu, s)


def down_forward(
    gate_up_TI: Tensor, down: Linear, lora: Lora, columns: Columns, activation: Activation = "silu"
) -> tuple[Tensor, Tensor | None]:
    """[h | S']·[W' | s·B']ᵀ [T, H], and S'."""
    width, p = gate_up_TI.shape[1] // 2, padded_rank((down,))
    gate, up = gate_up_TI[:, :width], gate_up_TI[:, width:]
    h_s = torch.empty(gate_up_TI.shape[0], width + p, dtype=gate_up_TI.dtype, device=gate_up_TI.device)
    s = None
    if p > 0 and lora.dropout == 0.0:
        s = gate_up_TI.new_empty(gate_up_TI.shape[0], columns.rank)
        swiglu_forward(gate, up, activation=activation, out=h_s, lora_a=columns.a, product_out=s)
    else:
        h = swiglu_forward(gate, up, activation=activation, out=h_s[:, :width])
        if p > 0:
            extend(h, columns.a, p, out=h_s, dropout=lora.dropout, seed=lora.seed + 1)
            s = h_s[:, width : width + columns.rank].contiguous()
    return F.linear(h_s, columns.weight, stacked_bias((down,), gate_up_TI.dtype)), s


def down_backward(dout_TH: Tensor, columns: Columns) -> Tensor:
    """dout·[W' | s·B'] = [dh | dS']. It needs nothing of the forward, so it can come before that is rebuilt."""
    return dout_TH @ columns.weight


def gate_up_backward_(
    dh_ds: Tensor,
    dout_TH: Tensor,
    gate_up_TI: Tensor,
    s_TR: Tensor | None,
    down: Linear,
    lora: Lora,
    columns: Columns,
    into: Gradients,
    activation: Activation = "silu",
) -> None:
    """From [dh | dS'] to [dg | du], which take the place of [g | u]; dA' and dB' go where `into` says."""
    width, rank = gate_up_TI.shape[1] // 2, columns.rank
    gate, up = gate_up_TI[:, :width], gate_up_TI[:, width:]
    dh, ds = dh_ds[:, :width], dh_ds[:, width : width + rank]
    deferred = None
    if rank > 0 and lora.dropout == 0.0:
        deferred = (dh_ds[:, width:], columns.a)
    elif rank > 0:
        low_rank_update(dh, ds, columns.a, out=dh, dropout=lora.dropout, seed=lora.seed + 1)
    # The rebuilt h takes the place of dh.
    h = dh if rank > 0 else None
    swiglu_backward(dh, gate, up, activation=activation, deferred=deferred, dgate=gate, dup=up, h=h)
    if s_TR is not None and h is not None:
        into.add_a(ds, drop(h, lora.dropout, lora.seed + 1) if lora.dropout else h)
        into.add_b(dout_TH, s_TR, lora.scale, (down,))


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
    into: tuple[Gradients, Gradients],
    activation: Activation = "silu",
) -> Tensor:
    """The gradient of x and of the residual; those of gate and up, and of down, go where `into` says."""
    dh_ds = down_backward(dout_TH, down_columns)
    gate_up_backward_(dh_ds, dout_TH, state.gate_up_TI, state.s_TR, down, lora, down_columns, into[1], activation)
    dx = norm_linears_backward(
        state.gate_up_TI, dz_TH, state.norm_linears, norm, gate_up, lora, gate_up_columns, into[0]
    )
    assert dx is not None
    return dx


# --- the attention projections around rope and attention -------------------------------------------------------------


class Heads(NamedTuple):
    """How the rows of q, k and v fall into heads, and the norm on the heads of q and k where a model has one."""

    q: int
    kv: int
    dim: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    gemma: bool = False


class Positions(NamedTuple):
    """cos, sin [P, R/2], and each token's position: its own, or its place in a row of `sequence` tokens."""

    cos: Tensor
    sin: Tensor
    positions_T: Tensor | None = None
    sequence: int | None = None


def qkv_in_rows(lora: Lora, heads: Heads) -> bool:
    """Whether q, k, v take the rows form, where rope adds the update: not with dropout, nor with a norm before rope."""
    return lora.dropout == 0.0 and heads.q_norm is None


def qkv_forward(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    norm: Norm,
    linears: Sequence[Linear],
    lora: Lora,
    weight: Rows | Columns,
    heads: Heads,
    positions: Positions,
    *,
    rho_T: Tensor | None = None,
) -> tuple[Tensor, NormLinearsState]:
    """The buffer that `rotated` takes q, k and v from, [T, ΣN or more]; and what the backward needs.

    `weight` is a `Rows` if `qkv_in_rows`, else a `Columns`. `rho_T` as in `norm_linears_forward`.
    """
    if isinstance(weight, Columns):
        qkv, state = norm_linears_forward(x_TH, residual_TH, norm, linears, lora, weight, rho_T=rho_T)
        if heads.q_norm is None:
            q, k, _ = _split_heads(qkv, heads)
            rope_forward(q, k, *positions[:3], sequence=positions.sequence, out=(q, k))
        return qkv, state
    if rho_T is None:
        y, z, rho = rms_norm_forward(x_TH, norm.weight, norm.eps, gemma=norm.gemma, residual=residual_TH)
    else:
        z, rho = x_TH, rho_T
        y = rms_norm_again(z, norm.weight, rho, gemma=norm.gemma)
    width, rank = weight.b.shape[1], weight.rank
    # y·[W ; A]ᵀ = [y₀ | S]; rope adds S·(s·B)ᵀ
    qkv = F.linear(y, weight.weight, stacked_bias(linears, y.dtype, weight.weight.shape[0] - width))
    s = qkv[:, width : width + rank].contiguous() if rank > 0 else None
    rope_qkv_forward_(
        qkv, heads.q, heads.kv, heads.dim, *positions[:3], sequence=positions.sequence,
        b=weight.b if rank > 0 else None, ranks=_qkv_ranks(linears),
    )  # fmt: skip
    return qkv, NormLinearsState(z, rho, s)


def rotated(qkv_TN: Tensor, heads: Heads, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, heads, D] from the buffer of `qkv_forward`: views, but for q and k that are normed."""
    q, k, v = _split_heads(qkv_TN, heads)
    if heads.q_norm is not None:
        q, k = rope_forward(
            q, k, *positions[:3], sequence=positions.sequence,
            q_weight=heads.q_norm, k_weight=heads.k_norm, eps=heads.eps, gemma=heads.gemma,
        )  # fmt: skip
    return q, k, v


def qkv_backward(
    dq_TND: Tensor,
    dk_TKD: Tensor,
    dv_TKD: Tensor,
    dz_TH: Tensor | None,
    qkv_TN: Tensor,
    state: NormLinearsState,
    norm: Norm,
    linears: Sequence[Linear],
    lora: Lora,
    weight: Rows | Columns,
    heads: Heads,
    positions: Positions,
    into: Gradients,
    *,
    need_dx: bool = True,
) -> Tensor | None:
    """The gradient of x and of the residual [T, H], or None; dA and dB go where `into` says."""
    if isinstance(weight, Columns):
        q, k, _ = _split_heads(qkv_TN, heads)
        normed: dict[str, Any] = {}
        if heads.q_norm is not None:
            normed = {"q": q, "k": k, "q_weight": heads.q_norm, "k_weight": heads.k_norm}
        dqkv = torch.empty(qkv_TN.shape[0], qkv_TN.shape[1], dtype=qkv_TN.dtype, device=qkv_TN.device)
        dq_out, dk_out, dv_out = _split_heads(dqkv, heads)
        rope_backward(
            dq_TND, dk_TKD, *positions[:3], sequence=positions.sequence, eps=heads.eps, gemma=heads.gemma,
            out=(dq_out, dk_out), **normed,
        )  # fmt: skip
        dv_out.copy_(dv_TKD)
        return norm_linears_backward(dqkv, dz_TH, state, norm, linears, lora, weight, into, need_dx=need_dx)
    z, rho, s = state
    (rank, width), p = weight.b.shape, weight.weight.shape[0] - weight.b.shape[1]
    # [dY | dS], dS = dY·s·B
    dy_ds = rope_qkv_backward(
        dq_TND, dk_TKD, dv_TKD, *positions[:3], sequence=positions.sequence,
        b=weight.b if rank > 0 else None, ranks=_qkv_ranks(linears), p=p,
    )  # fmt: skip
    if s is not None:
        into.add_a_of_normed(dy_ds[:, width : width + rank], z, rho, norm)
        into.add_b(dy_ds[:, :width], s, lora.scale, linears)
    if not need_dx:
        return None
    # [dY | dS]·[W ; A] = dy
    return _norm_backward(dy_ds @ weight.weight, state, norm, dz_TH)


def _split_heads(qkv_TN: Tensor, heads: Heads) -> list[Tensor]:
    sizes = (heads.q * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim)
    return [part.unflatten(1, (-1, heads.dim)) for part in qkv_TN[:, : sum(sizes)].split(sizes, dim=1)]


def _qkv_ranks(linears: Sequence[Linear]) -> tuple[int, ...] | None:
    """None where one layer makes q, k and v together: any of its ranks reaches any of them."""
    return tuple(linear.rank for linear in linears) if len(linears) == 3 else None


def o_forward(
    attention_TK: Tensor, o: Linear, lora: Lora, weight: Rows | Columns
) -> tuple[Tensor, Pending | None, Tensor | None]:
    """(x [T, H], what is pending, S): the norm after it adds x + pending, and only then is S written. A `Columns` where
    there is dropout: nothing is pending."""
    dtype, width, rank = attention_TK.dtype, o.weight.shape[0], o.rank
    if isinstance(weight, Columns):
        x_s = attention_TK
        if rank > 0:
            x_s = extend(attention_TK, weight.a, padded_rank((o,)), dropout=lora.dropout, seed=lora.seed + 2)
        s = x_s[:, attention_TK.shape[1] :][:, :rank].contiguous() if rank > 0 else None
        return F.linear(x_s, weight.weight, stacked_bias((o,), dtype)), None, s
    y_s = F.linear(attention_TK, weight.weight, stacked_bias((o,), dtype, weight.weight.shape[0] - width))
    if rank == 0:
        return y_s, None, None
    s = y_s.new_empty(y_s.shape[0], rank)
    return y_s[:, :width], (y_s[:, width:], weight.b, s), s


def o_backward(
    dy_ds: Tensor,
    attention_TK: Tensor,
    s_TR: Tensor | None,
    o: Linear,
    lora: Lora,
    weight: Rows | Columns,
    into: Gradients,
) -> Tensor:
    """The gradient of the attention's output, from [dy | dS | 0] (rows form) or dy."""
    width, K = o.weight.shape
    dy = dy_ds[:, :width]
    if s_TR is not None:
        into.add_b(dy, s_TR, lora.scale, (o,))
    if isinstance(weight, Rows):
        if s_TR is not None:
            into.add_a(dy_ds[:, width : width + o.rank], attention_TK)
        return dy_ds @ weight.weight
    dx_ds = dy @ weight.weight
    dx, ds = dx_ds[:, :K], dx_ds[:, K : K + o.rank]
    if s_TR is not None:
        into.add_a(ds, drop(attention_TK, lora.dropout, lora.seed + 2))
        low_rank_update(dx, ds, weight.a, out=dx, dropout=lora.dropout, seed=lora.seed + 2)
    return dx


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
        into = Gradients.empty(linears)
        dx = norm_linears_backward(as_rows(dy), rows, state, norm, linears, lora, columns, into)
        assert dx is not None
        dx = dx.view(dy.shape[:-1] + dx.shape[-1:])
        flat = [gradient for pair in into.pairs(linears) for gradient in pair]
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
        into = (Gradients.empty(gate_up), Gradients.empty((down,)))
        dx = mlp_backward(as_rows(dout), rows, state, norm, gate_up, down, lora, *columns, into, activation)
        dx = dx.view(dout.shape)
        flat = [gradient for pair in into[0].pairs(gate_up) + into[1].pairs((down,)) for gradient in pair]
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
