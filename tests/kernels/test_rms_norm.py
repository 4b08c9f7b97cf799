"""RMSNorm, its sums and its low-rank products against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from graft_kernels import rms_norm as module
from graft_kernels.launch import INTERPRETED
from graft_kernels.rms_norm import (
    add_rms_norm,
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
SHAPES = [((), 16), ((1,), 1), ((3,), 4096), ((2, 5), 48), ((37,), 200), ((2, 1, 4), 1000)]
RANKS = [(1, 16), (8, 64), (16, 16), (40, 48), (150, 160)]
EPS = 1e-5


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What an 8B model runs, and one case of every other path: to be compiled without a card, on meta tensors."""

    def run(
        dtype: torch.dtype, tokens: int, width: int, rank: int, *, gemma: bool = False, sums: bool = True, p: int = 0
    ) -> object:
        new = partial(torch.empty, dtype=dtype, device="meta")
        weight, residual = new(width), new(tokens, width) if sums else None
        lora_a = new(rank, width) if rank else None
        pending = (new(tokens, 64), new(p, width)) if p else None
        out = new(tokens, width + -(-rank // 64) * 64)
        common: dict[str, Any] = {"gemma": gemma, "scale": 2.0}
        y, z, rho = rms_norm_forward(
            new(tokens, width), weight, EPS, residual=residual, pending=pending, out=out, lora_a=lora_a, **common
        )
        rms_norm_again(z, weight, rho, out=out, lora_a=lora_a, **common)
        deferred = None if lora_a is None else (y[:, width:], lora_a)
        lora_b = new(16, width) if p else None
        return rms_norm_backward(
            y[:, :width], z, weight, rho, dresidual=residual, deferred=deferred, lora_b=lora_b, **common
        )

    bf16 = torch.bfloat16
    for tokens in (2048, 16384):
        for rank in (0, 16, 48, 96, 128, 192):
            yield f"bf16 [{tokens}, 4096] rank {rank}", partial(run, bf16, tokens, 4096, rank)
    yield "bf16 [16384, 4096] alone", partial(run, bf16, 16384, 4096, 0, sums=False)
    yield "bf16 [16384, 4096] alone, rank 48", partial(run, bf16, 16384, 4096, 48, sums=False)
    yield "bf16 [16384, 4096] pending 16", partial(run, bf16, 16384, 4096, 48, p=16)
    yield "bf16 [16384, 4096] pending 64, not summed", partial(run, bf16, 16384, 4096, 0, sums=False, p=64)
    yield "bf16 [16384, 3840] Gemma", partial(run, bf16, 16384, 3840, 0, gemma=True)
    yield "bf16 [16384, 3840] Gemma, rank 48", partial(run, bf16, 16384, 3840, 48, gemma=True)
    for width in (1024, 8192, 16384, 20480):
        yield f"bf16 [16384, {width}]", partial(run, bf16, 16384, width, 0)
    yield "fp16 [16384, 4096] rank 48", partial(run, torch.float16, 16384, 4096, 48)
    yield "fp32 [16384, 4096]", partial(run, torch.float32, 16384, 4096, 0)
    yield "fp32 [16384, 16384]", partial(run, torch.float32, 16384, 16384, 0)
    yield "fp32 [16384, 4096] rank 16", partial(run, torch.float32, 16384, 4096, 16, p=16)


def error(result: Tensor, oracle: Tensor) -> float:
    result, oracle = result.detach().double(), oracle.detach().double()
    return float((result - oracle).norm() / oracle.norm())


def wider(tensor: Tensor, by: int = 16) -> Tensor:
    """The same matrix as a column slice of a buffer full of NaN."""
    buffer = torch.full((tensor.shape[0], tensor.shape[1] + by), float("nan"), dtype=tensor.dtype)
    buffer[:, : tensor.shape[1]] = tensor
    return buffer[:, : tensor.shape[1]]


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "width"), SHAPES)
def test_norm_and_gradient_match_the_oracle(lead: tuple[int, ...], width: int, dtype: torch.dtype, gemma: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(*lead, width, dtype=dtype, requires_grad=True)
    weight, dy = torch.rand(width, dtype=dtype) + 0.5, torch.randn(*lead, width, dtype=dtype)
    y = rms_norm(x, weight, EPS, gemma=gemma)
    (dx,) = torch.autograd.grad(y, x, dy)
    x64 = x.detach().double().requires_grad_()
    y64 = rms_norm_reference(x64, weight.double(), EPS, gemma=gemma)
    (dx64,) = torch.autograd.grad(y64, x64, dy.double())
    assert y.dtype == dx.dtype == dtype
    assert y.shape == dx.shape == x.shape
    assert error(y, y64) < TOLERANCE[dtype]
    # With one column x̂ is ±1, whatever x: the gradient is a difference of equal numbers, close to 0.
    assert float((dx - dx64).norm()) < TOLERANCE[dtype] * float(
        dx64.norm() if width > 1 else dy.norm() / x.detach().norm()
    )


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "width"), SHAPES)
def test_sum_norm_and_both_gradients_match_the_oracle(
    lead: tuple[int, ...], width: int, dtype: torch.dtype, gemma: bool
) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(*lead, width, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.rand(width, dtype=dtype) + 0.5
    dy, dz = (torch.randn(*lead, width, dtype=dtype) for _ in range(2))
    y, z = add_rms_norm(x, residual, weight, EPS, gemma=gemma)
    grads = torch.autograd.grad((y, z), (x, residual), (dy, dz))
    assert torch.equal(z, x + residual)  # one rounding
    # The norm is of the rounded sum, so the oracle starts there.
    z64 = z.detach().double().requires_grad_()
    y64 = rms_norm_reference(z64, weight.double(), EPS, gemma=gemma)
    (dz64,) = torch.autograd.grad((y64, z64), z64, (dy.double(), dz.double()))
    assert error(y, y64) < TOLERANCE[dtype]
    assert error(grads[0], dz64) < TOLERANCE[dtype]
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounding_is_hugging_faces(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256, dtype=dtype), torch.rand(256, dtype=dtype) + 0.5
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
    llama, gemma = weight * normed.to(dtype), (normed * (1.0 + weight.float())).to(dtype)
    # Sums in another order move a value across a rounding boundary now and then; a cast too many or too few changes
    # a good part of them.
    assert (rms_norm(x, weight, EPS) != llama).float().mean() < 0.01
    assert (rms_norm(x, weight, EPS, gemma=True) != gemma).float().mean() < 0.01
    assert ((normed * weight.float()).to(dtype) != llama).float().mean() > 0.2


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "p"), RANKS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (37, 200), (3, 1000)])
def test_adapter_columns_and_deferred_update_match_the_oracle(
    tokens: int, width: int, rank: int, p: int, dtype: torch.dtype, gemma: bool
) -> None:
    torch.manual_seed(0)
    x, residual, dy, dresidual = (torch.randn(tokens, width, dtype=dtype) for _ in range(4))
    weight, lora_a = torch.rand(width, dtype=dtype) + 0.5, torch.randn(rank, width, dtype=dtype) / width**0.5
    out = torch.full((tokens, width + p), float("nan"), dtype=dtype)
    y, z, rho = rms_norm_forward(
        x, weight, EPS, gemma=gemma, residual=wider(residual), out=out, lora_a=lora_a, scale=1.5
    )
    assert y is out
    z64 = z.double().requires_grad_()
    y64 = rms_norm_reference(z64, weight.double(), EPS, gemma=gemma)
    assert error(y[:, :width], y64) < TOLERANCE[dtype]
    assert error(y[:, width : width + rank], 1.5 * y[:, :width].double() @ lora_a.double().t()) < TOLERANCE[dtype]
    assert not y[:, width + rank :].any()

    # The buffer a GEMM by [W | B] leaves: the gradient without the update, then P, then columns of no meaning.
    p_Tp = torch.randn(tokens, p, dtype=dtype)
    dx = rms_norm_backward(
        dy, z, weight, rho, gemma=gemma, dresidual=wider(dresidual), deferred=(wider(p_Tp), lora_a), scale=1.5
    )
    whole = dy.double() + 1.5 * p_Tp[:, :rank].double() @ lora_a.double()
    (dx64,) = torch.autograd.grad(y64, z64, whole)
    assert error(dx, dx64 + dresidual.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 40, 150])
def test_pending_update_is_added_before_the_norm(rank: int, dtype: torch.dtype, summed: bool) -> None:
    torch.manual_seed(0)
    tokens, width, lora_a = 19, 200, torch.randn(8, 200, dtype=dtype) / 200**0.5
    x, residual = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype) if summed else None
    s, b = torch.randn(tokens, 160, dtype=dtype), torch.randn(rank, width, dtype=dtype) / rank**0.5
    weight, z_out = torch.rand(width, dtype=dtype) + 0.5, torch.empty(tokens, width, dtype=dtype)
    given, kept = x.clone(), torch.full((tokens, rank), torch.nan, dtype=dtype)
    y, z, rho = rms_norm_forward(x, weight, EPS, residual=residual, pending=(s, b, kept), z_out=z_out, lora_a=lora_a)
    assert torch.equal(kept, s[:, :rank])
    z64 = x.double() + s[:, :rank].double() @ b.double() + (0 if residual is None else residual.double())
    assert z.data_ptr() == z_out.data_ptr()
    assert torch.equal(x, given)
    assert error(z, z64) < TOLERANCE[dtype]
    assert error(rho, (z.double().square().mean(-1) + EPS).rsqrt()) < 1e-6
    assert error(y[:, :width], rms_norm_reference(z.double(), weight.double(), EPS)) < TOLERANCE[dtype]
    assert error(y[:, width : width + 8], y[:, :width].double() @ lora_a.double().t()) < TOLERANCE[dtype]


@pytest.mark.parametrize("deferred_rank", [0, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "p"), [(1, 16), (16, 64), (40, 48), (150, 160)])
def test_the_gradient_is_multiplied_by_b_on_the_way(rank: int, p: int, dtype: torch.dtype, deferred_rank: int) -> None:
    torch.manual_seed(0)
    tokens, width = 19, 200
    x, dy, dresidual = (torch.randn(tokens, width, dtype=dtype) for _ in range(3))
    lora_b, weight = torch.randn(rank, width, dtype=dtype) / width**0.5, torch.rand(width, dtype=dtype) + 0.5
    deferred = None
    if deferred_rank:
        deferred = torch.randn(tokens, deferred_rank, dtype=dtype), torch.randn(deferred_rank, width, dtype=dtype) / 8
    _, z, rho = rms_norm_forward(x, weight, EPS)
    expected = rms_norm_backward(dy, z, weight, rho, dresidual=dresidual, deferred=deferred)
    out = torch.full((tokens, width + p), 7.0, dtype=dtype)
    dx = rms_norm_backward(dy, z, weight, rho, dresidual=dresidual, deferred=deferred, lora_b=lora_b, out=out)
    assert dx.data_ptr() == out.data_ptr()
    assert error(dx[:, :width], expected.double()) < TOLERANCE[dtype]
    assert error(dx[:, width : width + rank], dx[:, :width].double() @ lora_b.double().t()) < TOLERANCE[dtype]
    assert not dx[:, width + rank :].any()
    smallest = rms_norm_backward(dy, z, weight, rho, dresidual=dresidual, deferred=deferred, lora_b=lora_b)
    assert smallest.shape[1] == width + -(-rank // 16) * 16
    with pytest.raises(ValueError, match="with an adapter of rank"):
        rms_norm_backward(dy, z, weight, rho, lora_b=lora_b, out=out[:, : width + p - 8])


@pytest.mark.parametrize("summed", [False, True])
def test_a_row_too_wide_for_registers_is_walked(monkeypatch: pytest.MonkeyPatch, summed: bool) -> None:
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(5, 700) for _ in range(3))
    weight = torch.rand(700) + 0.5
    results = []
    for limit in (16384, 512):
        monkeypatch.setattr(module, "REGISTER_WIDTH", limit)
        y, z, rho = rms_norm_forward(x, weight, EPS, residual=residual if summed else None)
        dx = rms_norm_backward(dy, z, weight, rho, dresidual=residual if summed else None)
        results.append((y, z, rho, dx))
    for in_registers, walked in zip(*results, strict=True):
        torch.testing.assert_close(walked, in_registers, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 1000, 4096, 20000])
def test_y_comes_out_again_to_the_bit(width: int, dtype: torch.dtype, gemma: bool) -> None:
    x, residual, s = (torch.randn(5, n).to(dtype) for n in (width, width, 16))
    b, a, weight = (torch.randn(n, width).to(dtype) / 8 for n in (3, 5, 1))
    y, z, rho = rms_norm_forward(x, weight[0], EPS, gemma=gemma, residual=residual, pending=(s, b), lora_a=a, scale=0.5)
    assert torch.equal(rms_norm_again(z, weight[0], rho, gemma=gemma, lora_a=a, scale=0.5), y)
    out = torch.full((5, width + 4), torch.nan, dtype=dtype)
    again = rms_norm_again(z, weight[0], rho, gemma=gemma, out=out[:, :width])
    assert torch.equal(again, y[:, :width])
    assert out[:, width:].isnan().all()


def test_results_land_in_the_given_memory_and_nowhere_else() -> None:
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(9, 48) for _ in range(3))
    weight, lora_a, p_Tp = torch.rand(48) + 0.5, torch.randn(8, 48), torch.randn(9, 16)
    for adapter in (None, lora_a):
        width = 48 if adapter is None else 64
        buffer, sums, grads = (torch.full((11, 80), 7.0) for _ in range(3))
        y, z, rho = rms_norm_forward(
            x, weight, EPS, residual=residual, out=buffer[1:10, :width], z_out=sums[1:10, 16:64], lora_a=adapter
        )
        deferred = None if adapter is None else (p_Tp, adapter)
        dx = rms_norm_backward(dy, z, weight, rho, deferred=deferred, out=grads[1:10, 3:51])
        fresh_y, fresh_z, _ = rms_norm_forward(x, weight, EPS, residual=residual, lora_a=adapter)
        assert torch.equal(y, fresh_y)
        assert torch.equal(z, fresh_z)
        assert torch.equal(dx, rms_norm_backward(dy, fresh_z, weight, rho, deferred=deferred))
        for memory, first, last in ((buffer, 0, width), (sums, 16, 64), (grads, 3, 51)):
            memory[1:10, first:last] = 7.0
            assert (memory == 7.0).all()


def test_gradient_may_overwrite_its_operand_and_the_sum_its_summand() -> None:
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(9, 200) for _ in range(3))
    weight, lora_a, p_Tp = torch.rand(200) + 0.5, torch.randn(8, 200), torch.randn(9, 16)
    y, z, rho = rms_norm_forward(x, weight, EPS, residual=residual)
    stream = residual.clone()
    y_in_place, z_in_place, _ = rms_norm_forward(x, weight, EPS, residual=stream, z_out=stream)
    assert torch.equal(y_in_place, y)
    assert torch.equal(z_in_place, z)
    for deferred in (None, (p_Tp, lora_a)):
        dx = rms_norm_backward(dy, z, weight, rho, dresidual=residual, deferred=deferred)
        memory, stream = dy.clone(), residual.clone()
        assert torch.equal(
            rms_norm_backward(memory, z, weight, rho, dresidual=residual, deferred=deferred, out=memory), dx
        )
        assert torch.equal(rms_norm_backward(dy, z, weight, rho, dresidual=stream, deferred=deferred, out=stream), dx)


@pytest.mark.parametrize("gemma", [False, True])
def test_gradcheck(gemma: bool) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(6, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS, gemma=gemma), (x,))
    assert torch.autograd.gradcheck(lambda x, r: add_rms_norm(x, r, weight, EPS, gemma=gemma), (x, residual))


def test_gradient_reaches_who_asked_from_either_output() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16), torch.rand(16)
    for use in (lambda y, z: y, lambda y, z: z, lambda y, z: y + z):
        x64, r64 = x.detach().double().requires_grad_(), residual.double()
        oracle = use(rms_norm_reference(x64 + r64, weight.double(), EPS), x64 + r64).square().sum()
        (expected,) = torch.autograd.grad(oracle, x64)
        (dx,) = torch.autograd.grad(use(*add_rms_norm(x, residual, weight, EPS)).square().sum(), x)
        assert error(dx, expected) < 1e-6
    with torch.no_grad():
        assert not rms_norm(x, weight, EPS).requires_grad
    leaf = residual.clone().requires_grad_()
    add_rms_norm(x.detach(), leaf, weight, EPS)[0].sum().backward()
    assert leaf.grad is not None
    assert x.grad is None


def test_zero_tokens_give_zero_tokens() -> None:
    x, weight = torch.randn(0, 48, requires_grad=True), torch.ones(48)
    y, z = add_rms_norm(x, x, weight, EPS)
    (y.sum() + z.sum() + rms_norm(x, weight, EPS).sum()).backward()
    assert y.shape == z.shape == (0, 48)
    assert x.grad is not None
    buffer, _, rho = rms_norm_forward(x.detach(), weight, EPS, lora_a=torch.randn(3, 48))
    assert buffer.shape == (0, 64)
    deferred = (buffer[:, 48:], torch.randn(3, 48))
    assert rms_norm_backward(x.detach(), x.detach(), weight, rho, deferred=deferred).shape == (0, 48)


def test_zero_row_gives_zeros_and_an_infinite_one_stays_alone() -> None:
    x, weight = torch.randn(20, 48), torch.ones(48)
    x[1], x[2, 5] = 0.0, float("inf")
    buffer, z, rho = rms_norm_forward(x, weight, EPS, lora_a=torch.randn(3, 48))
    dx = rms_norm_backward(torch.ones(20, 48), z, weight, rho)
    assert not buffer[1].any()
    assert not buffer[2].isfinite().all()
    assert not buffer[:, 51:].any()
    others = torch.arange(20) != 2
    assert buffer[others].isfinite().all()
    assert dx[others].isfinite().all()


@pytest.mark.parametrize("make", [lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(6, 48), wider])
def test_strided_operands_are_as_good_as_contiguous_ones(make: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    weight = torch.rand(48)
    strided = make(torch.randn(6, 48))
    dense = strided.contiguous()
    y, z, rho = rms_norm_forward(dense, weight, EPS, residual=dense)
    assert torch.equal(rms_norm_forward(strided, weight, EPS, residual=strided)[0], y)
    dx = rms_norm_backward(dense, z, weight, rho)
    assert torch.equal(rms_norm_backward(strided, z, weight, rho), dx)


def test_two_runs_agree_to_the_bit() -> None:
    torch.manual_seed(0)
    x, weight, lora_a = torch.randn(40, 200, dtype=torch.float16), torch.rand(200), torch.randn(8, 200).half()
    first, second = (rms_norm_forward(x, weight, EPS, lora_a=lora_a) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_outputs_may_be_changed_in_place() -> None:
    x, weight = torch.randn(2, 3, 16, requires_grad=True), torch.ones(16)
    y, z = add_rms_norm(x, x, weight, EPS)
    y.mul_(2.0)
    torch.autograd.grad(y.sum(), x)
    # z is kept for the backward, and autograd notices.
    y, z = add_rms_norm(x, x, weight, EPS)
    z.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, torch.ones(16), EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight, rho, a = torch.randn(4, 16), torch.ones(16), torch.ones(4), torch.randn(3, 16)
    for call, message in (
        (lambda: rms_norm(x, torch.ones(15), EPS), r"the weight \(15,\)"),
        (lambda: rms_norm(x, weight.clone().requires_grad_(), EPS), "frozen"),
        (lambda: rms_norm(x[:, :0], weight[:0], EPS), "expected"),
        (lambda: rms_norm(x.int(), weight, EPS), "floating-point"),
        (lambda: add_rms_norm(x, x[:1], weight, EPS), r"the residual \(1, 16\)"),
        (lambda: add_rms_norm(x, x.half(), weight, EPS), "residual is torch.float16"),
        (lambda: rms_norm_forward(x[0], weight, EPS), r"expected \(any, any\)"),
        (lambda: rms_norm_forward(x, weight, EPS, out=x[:, :15]), r"expected torch.float32 \(4, 16\)"),
        (lambda: rms_norm_forward(x, weight, EPS, out=torch.empty(16, 4).t()), "contiguous rows"),
        (lambda: rms_norm_forward(x, weight, EPS, out=torch.empty(16).expand(4, 16)), "do not overlap"),
        (lambda: rms_norm_forward(x, weight, EPS, z_out=x), "z is x itself"),
        (lambda: rms_norm_forward(x, weight, EPS, lora_a=a[:, :15]), r"expected \(any, 16\)"),
        (lambda: rms_norm_forward(x, weight, EPS, lora_a=a.half()), "lora_a is torch.float16"),
        (lambda: rms_norm_forward(x, weight, EPS, lora_a=a, out=torch.empty(4, 19)), "multiple of 16"),
        (lambda: rms_norm_forward(x, weight, EPS, lora_a=a, out=torch.empty(4, 16)), "multiple of 16"),
        (lambda: rms_norm_forward(x, weight, EPS, pending=(x[:, :2], a)), "S has 2 columns, B has 3 rows"),
        (lambda: rms_norm_forward(x, weight, EPS, pending=(x[:3], a)), r"expected \(4, any\)"),
        (lambda: rms_norm_forward(x, weight, EPS, pending=(x[:, :3], a, x[:, :2])), r"expected torch.float32 \(4, 3\)"),
        (lambda: rms_norm_forward(x, weight, EPS, pending=(x[:, :3], a, x[:, 3:6])), "copy of S is not contiguous"),
        (lambda: rms_norm_backward(x, x[:3], weight, rho), "z has shape"),
        (lambda: rms_norm_backward(x, x, weight, rho[:3]), "rho has shape"),
        (lambda: rms_norm_backward(x, x, weight, rho, dresidual=x[:, 1:]), "dresidual has shape"),
        (lambda: rms_norm_backward(x, x, weight, rho, deferred=(x[:, :2], a)), "P has 2 columns, A has 3"),
        (lambda: rms_norm_backward(x, x, weight, rho, out=x.half()), "expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
