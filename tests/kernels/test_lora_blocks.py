"""The blocks' backwards, written by hand, give autograd's gradients of the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import quantize_4bit

from graft_kernels.dropout import dropout_mask
from graft_kernels.launch import INTERPRETED
from graft_kernels.lora_blocks import Norm, lora_mlp, lora_qkv
from graft_kernels.lora_linear import Linear
from graft_kernels.nf4 import NF4Weight, decode

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALE = 1.7


def layer(n: int, k: int, rank: int, dtype: torch.dtype, *, bias: bool = False) -> Linear:
    weight = NF4Weight.from_bitsandbytes(*quantize_4bit(torch.randn(n, k) / k**0.5, quant_type="nf4", blocksize=64))
    frozen_bias = torch.randn(n).to(dtype) if bias else None
    if rank == 0:
        return Linear(weight, bias=frozen_bias)
    lora_a = (torch.randn(rank, k) / k**0.5).to(dtype).requires_grad_()
    lora_b = (torch.randn(n, rank) / rank**0.5).to(dtype).requires_grad_()
    return Linear(weight, lora_a, lora_b, frozen_bias)


def adapters(linears: list[Linear]) -> list[torch.Tensor]:
    return [part for linear in linears for part in (linear.lora_a, linear.lora_b) if part is not None]


def wide(linear: Linear, dtype: torch.dtype) -> Linear:
    """The same layer in float64, its weight decoded as the ops decode it; its adapters are new leaves."""
    parts = [None if part is None else part.detach().double().requires_grad_() for part in linear[1:3]]
    return Linear(decode(linear.weight, dtype).double(), *parts, None if linear.bias is None else linear.bias.double())


def oracle_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    w = norm.weight.double()
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * (1 + w if norm.gemma else w)


def oracle_linear(x: torch.Tensor, linear: Linear, mask: torch.Tensor | None) -> torch.Tensor:
    y = F.linear(x, linear.weight, linear.bias)
    if linear.lora_a is None:
        return y
    return y + SCALE * F.linear(F.linear(x if mask is None else x * mask, linear.lora_a), linear.lora_b)


def masks(tokens: int, widths: list[int], dropout: float) -> list[torch.Tensor | None]:
    """The masks the next block will draw, one for each width, leaving the generator where it was."""
    if dropout == 0.0:
        return [None] * len(widths)
    state = torch.get_rng_state()
    seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
    torch.set_rng_state(state)
    device = torch.empty(0).device
    return [dropout_mask((tokens, k), dropout, seed + i, device, torch.float64) for i, k in enumerate(widths)]


def compare(ours: list[torch.Tensor], theirs: list[torch.Tensor], dtype: torch.dtype) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b)).item()
        assert error < TOLERANCE[dtype], i


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize(
    ("tokens", "rank", "gemma", "bias"), [(1, 3, False, False), (37, 16, True, True), (5, 48, False, True)]
)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_qkv_gives_the_oracles_outputs_and_gradients(
    tokens: int, rank: int, gemma: bool, bias: bool, residual: bool, dropout: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    k, widths = 128, (64, 33, 32)
    norm = Norm((torch.randn(k) / 4 + (0 if gemma else 1)).to(dtype), 1e-5, gemma)
    linears = [layer(n, k, rank, dtype, bias=bias) for n in widths]
    x, r = (torch.randn(tokens, k).to(dtype).requires_grad_() for _ in range(2))
    dy, dz = torch.randn(tokens, sum(widths)).to(dtype), torch.randn(tokens, k).to(dtype)
    inputs = [x, r] if residual else [x]

    (mask,) = masks(tokens, [k], dropout)
    out, z = lora_qkv(x, norm, linears, residual=r if residual else None, scale=SCALE, dropout=dropout, way="columns")
    assert residual or z is x
    ours = torch.autograd.grad(
        (out, z) if residual else out, [*inputs, *adapters(linears)], (dy, dz) if residual else dy
    )

    wide_inputs = [part.detach().double().requires_grad_() for part in inputs]
    wide_linears = [wide(linear, dtype) for linear in linears]
    wide_z = sum(wide_inputs)
    y = oracle_norm(wide_z, norm)
    expected = torch.cat([oracle_linear(y, linear, mask) for linear in wide_linears], dim=-1)
    loss = (expected * dy.double()).sum() + ((wide_z * dz.double()).sum() if residual else 0)
    theirs = torch.autograd.grad(loss, [*wide_inputs, *adapters(wide_linears)])
    compare([out, *ours], [expected, *theirs], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [(1, 3), (37, 16), (4, 0)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_mlp_gives_the_oracles_outputs_and_gradients(
    tokens: int, rank: int, activation: str, dropout: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    h, i = 64, 160
    norm = Norm((1 + torch.randn(h) / 4).to(dtype), 1e-5)
    linears = [layer(i, h, rank, dtype), layer(i, h, rank, dtype, bias=True), layer(h, i, rank, dtype)]
    x, r = (torch.randn(tokens, h).to(dtype).requires_grad_() for _ in range(2))
    dy, dz = torch.randn(tokens, h).to(dtype), torch.randn(tokens, h).to(dtype)

    mask, down_mask = masks(tokens, [h, i], dropout)
    out, z = lora_mlp(x, norm, *linears, residual=r, activation=activation, scale=SCALE, dropout=dropout, way="columns")
    ours = torch.autograd.grad((out, z), [x, r, *adapters(linears)], (dy, dz))

    wide_inputs = [part.detach().double().requires_grad_() for part in (x, r)]
    gate, up, down = wide_linears = [wide(linear, dtype) for linear in linears]
    wide_z = sum(wide_inputs)
    y = oracle_norm(wide_z, norm)
    g = oracle_linear(y, gate, mask)
    act = F.silu(g) if activation == "silu" else F.gelu(g, approximate="none" if activation == "gelu" else "tanh")
    expected = oracle_linear(act * oracle_linear(y, up, mask), down, down_mask)
    loss = (expected * dy.double()).sum() + (wide_z * dz.double()).sum()
    theirs = torch.autograd.grad(loss, [*wide_inputs, *adapters(wide_linears)])
    compare([out, *ours], [expected, *theirs], dtype)


def test_layers_without_an_adapter_stand_beside_layers_with_one() -> None:
    torch.manual_seed(0)
    norm = Norm(torch.ones(64), 1e-5)
    linears = [layer(32, 64, 4, torch.float32), layer(16, 64, 0, torch.float32), layer(48, 64, 8, torch.float32)]
    x = torch.randn(3, 5, 64, requires_grad=True)
    results = []
    for way in ("columns", "reference"):
        out, _ = lora_qkv(x, norm, linears, scale=SCALE, way=way)
        assert out.shape == (3, 5, 96)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *adapters(linears)])])
    compare(results[0], [part.double() for part in results[1]], torch.float32)


def test_a_branch_that_nobody_uses_gets_no_gradient() -> None:
    norm = Norm(torch.ones(64), 1e-5)
    linears = [layer(64, 64, 4, torch.float32) for _ in range(3)]
    x, r = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    _, z = lora_qkv(x, norm, linears, residual=r, way="columns")
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], torch.ones(4, 64))
    out, _ = lora_mlp(x, norm, *linears, residual=r, way="columns")
    assert torch.autograd.grad(out.sum(), r)[0].abs().sum() > 0


def test_a_second_backward_of_the_mlp_is_refused() -> None:
    norm = Norm(torch.ones(64), 1e-5)
    linears = [layer(64, 64, 4, torch.float32) for _ in range(3)]
    x = torch.randn(4, 64, requires_grad=True)
    out, _ = lora_mlp(x, norm, *linears, way="columns")
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        torch.autograd.grad(out.sum(), x)


def test_blocks_that_do_not_fit_are_refused() -> None:
    norm = Norm(torch.ones(64), 1e-5)
    small, wide_layer = layer(32, 64, 4, torch.float32), layer(64, 32, 4, torch.float32)
    x = torch.randn(4, 64)
    for call, message in (
        (lambda: lora_qkv(x, norm, []), "0 layers"),
        (lambda: lora_qkv(x, norm, [small] * 4), "4 layers"),
        (lambda: lora_qkv(x, norm, [small], residual=x[:2]), "the residual is"),
        (lambda: lora_qkv(x, Norm(torch.ones(64, requires_grad=True), 1e-5), [small]), "norm's weight is frozen"),
        (lambda: lora_qkv(x, norm, [small], way="fastest"), "open are"),
        (lambda: lora_qkv(x[:, :32], norm, [small]), "x has 32 features"),
        (lambda: lora_mlp(x, norm, small, small, small), "expected .I, H."),
        (lambda: lora_mlp(x, norm, small, small, wide_layer, dropout=1.0), "0 <= p < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
