"""A frozen linear layer with a trained low-rank update, and its backward by hand.

Shapes: x [..., K] seen as [M, K]; W [N, K] frozen, dense or NF4; A [r, K]; B [N, r]; bias [N] frozen; s a number;
m [M, K] the dropout mask, 1 with probability 1 - p; x̃ = (m ∘ x) / (1 - p), or x without dropout.

    forward     S = x̃ Aᵀ                 y = x Wᵀ + s·S Bᵀ + bias
    backward    dS = s·dY B               dx = dY W + m ∘ (dS A) / (1 - p)
                dA = dSᵀ x̃                dB = s·dYᵀ S

Kept for the backward: x and S [M, r]. W is decoded again, and the mask is drawn again from a saved seed, so neither
costs memory between the passes. The seed comes from torch's CPU generator: saving that generator makes a resumed run
draw the same masks, and torch's checkpointing, which rewinds it, recomputes with the same mask.

The arithmetic runs in x's dtype. A and B may have another one (fp32 under bf16): they are cast for the products, and
their gradients come back in their own dtype. The function reads no autocast state; call it with autocast off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft_kernels.nf4 import NF4Weight, decode

_SEED_BOUND = 2**63 - 1


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition of correct: dense `weight`, gradients by autograd. `mask` already holds 0 or 1 / (1 - p)."""
    y = F.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    dropped = x if mask is None else x * mask
    return y + scale * F.linear(F.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))


def dropout_mask(shape: torch.Size, p: float, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 with probability p, else 1 / (1 - p); a function of its arguments alone."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device, dtype=dtype).bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def _dense(weight: NF4Weight | Tensor, dtype: torch.dtype) -> Tensor:
    return decode(weight, dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        weight: NF4Weight | Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN = F.linear(x_MK, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
        s_Mr = None
        if lora_a is not None and lora_b is not None:
            dropped_MK = x_MK
            if dropout > 0.0:
                dropped_MK = x_MK * dropout_mask(x_MK.shape, dropout, seed, x.device, x.dtype)
            s_Mr = dropped_MK @ lora_a.to(x.dtype).t()
            # The update is added inside the product, in the accumulator's precision, and rounded once.
            y_MN.addmm_(s_Mr, lora_b.to(x.dtype).t(), alpha=scale)
        # Without an adapter the backward needs W alone, and x may be freed.
        ctx.save_for_backward(None if lora_a is None else x_MK, s_Mr, lora_a, lora_b)
        ctx.weight, ctx.scale, ctx.dropout, ctx.seed = weight, scale, dropout, seed
        return y_MN.view(*x.shape[:-1], y_MN.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, s_Mr, lora_a, lora_b = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        dy_MN = grad_y.reshape(-1, grad_y.shape[-1])
        dtype = dy_MN.dtype
        grad_x = grad_a = grad_b = None

        # W first and then released: the dense copy and the products below need not share the peak.
        if need_x:
            grad_x = dy_MN @ _dense(ctx.weight, dtype)
        if lora_a is not None:
            mask_MK = None
            if ctx.dropout > 0.0:
                mask_MK = dropout_mask(x_MK.shape, ctx.dropout, ctx.seed, x_MK.device, dtype)
            if need_b:
                grad_b = (dy_MN.t() @ s_Mr).mul_(ctx.scale).to(lora_b.dtype)
            if need_x or need_a:
                ds_Mr = (dy_MN @ lora_b.to(dtype)).mul_(ctx.scale)
                if need_a:
                    grad_a = (ds_Mr.t() @ (x_MK if mask_MK is None else x_MK * mask_MK)).to(lora_a.dtype)
                if grad_x is not None and mask_MK is None:
                    grad_x.addmm_(ds_Mr, lora_a.to(dtype))
                elif grad_x is not None:
                    grad_x.add_((ds_Mr @ lora_a.to(dtype)).mul_(mask_MK))
        if grad_x is not None:
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
        return grad_x, grad_a, grad_b, None, None, None, None, None


def lora_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """y [..., N] = x Wᵀ + scale·(drop(x) Aᵀ) Bᵀ + bias, differentiable once in x, A and B.

    Without `lora_a` and `lora_b` it is the frozen linear layer alone. Give `dropout` 0 outside training.

    Raises:
        ValueError: shapes do not fit, one of A and B is missing, the weight or the bias wants a gradient (this layer
            computes none), or `dropout` is outside [0, 1).
    """
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {in_features}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b come together; one is None")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, in_features) or lora_b.shape != (out_features, rank):
            raise ValueError(
                f"the adapter is A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}; "
                f"expected A [r, {in_features}], B [{out_features}, r]"
            )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
    if (isinstance(weight, Tensor) and weight.requires_grad) or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are frozen here; a gradient for them was asked for")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected 0 <= p < 1")
    seed = int(torch.randint(_SEED_BOUND, (), device="cpu").item()) if dropout > 0.0 and lora_a is not None else 0
    y: Tensor = _LoraLinear.apply(x, lora_a, lora_b, weight, bias, scale, dropout, seed)
    return y
