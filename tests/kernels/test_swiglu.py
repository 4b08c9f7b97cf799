"""SwiGLU and GEGLU and their low-rank products against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from graft_kernels.launch import INTERPRETED
from graft_kernels.swiglu import _tail_tile, geglu, swiglu, swiglu_backward, swiglu_forward, swiglu_reference

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ACTIVATIONS: list[Any] = ["silu", "gelu", "gelu_tanh"]
PUBLIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "gelu": lambda gate, up: geglu(gate, up, approximate="none"),
    "gelu_tanh": geglu,
}
SHAPES = [((), 16), ((1,), 1), ((1,), 2500), ((2, 5), 48), ((37,), 200), ((2, 1, 4), 1000)]
RANKS = [(1, 16), (8, 64), (16, 16), (40, 48), (150, 160)]


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What an 8B model runs, and one case of every other path: to be compiled without a card, on meta tensors."""

    def run(
        dtype: torch.dtype, tokens: int, width: int, rank: int, *, activation: Any = "silu", rebuild: bool = True
    ) -> object:
        new = partial(torch.empty, dtype=dtype, device="meta")
        gate, up = new(tokens, 2 * width).split(width, dim=1)
        lora_a, out = new(rank, width) if rank else None, new(tokens, width + -(-rank // 64) * 64)
        product = new(tokens, rank) if rank else None
        h = swiglu_forward(gate, up, activation=activation, out=out, lora_a=lora_a, scale=2.0, product_out=product)
        deferred = None if lora_a is None else (h[:, width:], lora_a)
        buffer = new(tokens, width) if rebuild else None
        return swiglu_backward(
            h[:, :width], gate, up, activation=activation, deferred=deferred, dgate=gate, dup=up, h=buffer
        )

    bf16 = torch.bfloat16
    for tokens in (2048, 16384):
        for rank in (0, 16, 64, 128, 256):
            yield f"bf16 [{tokens}, 14336] rank {rank}", partial(run, bf16, tokens, 14336, rank)
    yield "bf16 [16384, 14336] h not rebuilt", partial(run, bf16, 16384, 14336, 16, rebuild=False)
    for activation in ("gelu", "gelu_tanh"):
        yield f"bf16 [16384, 15360] {activation}", partial(run, bf16, 16384, 15360, 16, activation=activation)
        yield f"bf16 [16384, 15360] {activation}, plain", partial(run, bf16, 16384, 15360, 0, activation=activation)
    yield "fp16 [16384, 14336] rank 16", partial(run, torch.float16, 16384, 14336, 16)
    yield "fp32 [16384, 14336]", partial(run, torch.float32, 16384, 14336, 0)
    yield "fp32 [16384, 14336] rank 16", partial(run, torch.float32, 16384, 14336, 16)
    yield "fp32 [16384, 14336] rank 64", partial(run, torch.float32, 16384, 14336, 64)


def error(result: Tensor, oracle: Tensor) -> float:
    result, oracle = result.detach().double(), oracle.detach().double()
    return float((result - oracle).norm() / oracle.norm())


def product_error(result: Tensor, h: Tensor, a: Tensor) -> float:
    """Of h aᵀ, in parts of what sums of such terms are in the mean: a single sum may come out near 0."""
    distance = (result.detach().double() - h @ a.t()).norm()
    return float(distance / (h.square() @ a.square().t()).sum().sqrt())


def wider(tensor: Tensor, by: int = 16) -> Tensor:
    """The same matrix as a column slice of a buffer full of NaN."""
    buffer = torch.full((tensor.shape[0], tensor.shape[1] + by), float("nan"), dtype=tensor.dtype)
    buffer[:, : tensor.shape[1]] = tensor
    return buffer[:, : tensor.shape[1]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "width"), SHAPES)
def test_product_and_both_gradients_match_the_oracle(
    lead: tuple[int, ...], width: int, dtype: torch.dtype, activation: Any
) -> None:
    torch.manual_seed(0)
    merged = (3 * torch.randn(*lead, 2 * width)).to(dtype).requires_grad_()
    gate, up = merged[..., :width], merged[..., width:]
    dh = torch.randn(*lead, width, dtype=dtype)
    h = PUBLIC[activation](gate, up)
    grads = torch.autograd.grad(h, (gate, up), dh)
    gate64, up64 = (tensor.detach().double().requires_grad_() for tensor in (gate, up))
    h64 = swiglu_reference(gate64, up64, activation)
    oracle = torch.autograd.grad(h64, (gate64, up64), dh.double())
    assert h.dtype == dtype
    assert h.shape == gate.shape
    for result, expected in zip((h, *grads), (h64, *oracle), strict=True):
        assert error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "p"), RANKS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (37, 200), (3, 1000)])
def test_adapter_columns_and_deferred_update_match_the_oracle(
    tokens: int, width: int, rank: int, p: int, dtype: torch.dtype, activation: Any
) -> None:
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(tokens, width, dtype=dtype) for _ in range(3))
    lora_a, p_Tp = torch.randn(rank, width, dtype=dtype) / width**0.5, torch.randn(tokens, p, dtype=dtype)
    out = torch.full((tokens, width + p), float("nan"), dtype=dtype)
    gate, up = wider(gate), wider(up)
    h = swiglu_forward(gate, up, activation=activation, out=out, lora_a=lora_a, scale=1.5)
    gate64, up64 = (tensor.double().requires_grad_() for tensor in (gate, up))
    h64 = swiglu_reference(gate64, up64, activation)
    assert h is out
    assert error(h[:, :width], h64) < TOLERANCE[dtype]
    columns = h[:, width : width + rank]
    assert product_error(columns, 1.5 * h[:, :width].double(), lora_a.double()) < TOLERANCE[dtype]
    assert not h[:, width + rank :].any()

    # The buffer a GEMM by [W | B] leaves: the gradient without the update, then P, then columns of no meaning.
    rebuilt = torch.empty(tokens, width, dtype=dtype)
    dgate, dup, returned = swiglu_backward(
        dh, gate, up, activation=activation, deferred=(wider(p_Tp), lora_a), scale=1.5, h=rebuilt
    )
    whole = dh.double() + 1.5 * p_Tp[:, :rank].double() @ lora_a.double()
    oracle = torch.autograd.grad(h64, (gate64, up64), whole)
    assert returned is rebuilt
    assert torch.equal(rebuilt, h[:, :width])
    for result, expected in zip((dgate, dup), oracle, strict=True):
        assert error(result, expected) < TOLERANCE[dtype]


# 4600 columns: chunks that the splits share unevenly, the last one cut short, and for some ranks a split without any.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "p"), [(1, 16), (16, 64), (33, 48), (64, 64), (128, 256)])
def test_adapter_columns_are_whole_when_programs_share_a_row(rank: int, p: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, width = 67, 4600
    assert _tail_tile(tokens, width, rank, dtype.itemsize, 232_448).splits > 1
    gate, up = (wider(torch.randn(tokens, width, dtype=dtype)) for _ in range(2))
    lora_a = torch.randn(rank, width, dtype=dtype) / width**0.5
    out = torch.full((tokens, width + p), float("nan"), dtype=dtype)
    h = swiglu_forward(gate, up, out=out, lora_a=lora_a, scale=1.5)
    assert error(h[:, :width], swiglu_reference(gate.double(), up.double())) < TOLERANCE[dtype]
    assert error(h[:, width : width + rank], 1.5 * h[:, :width].double() @ lora_a.double().t()) < TOLERANCE[dtype]
    assert not h[:, width + rank :].any()
    product = torch.empty(tokens, rank, dtype=dtype)
    again = swiglu_forward(gate, up, out=torch.empty_like(out), lora_a=lora_a, scale=1.5, product_out=product)
    assert torch.equal(h, again)
    assert torch.equal(product, h[:, width : width + rank])


@pytest.mark.parametrize("tokens", [1, 100, 2048, 8192, 16384, 2**20])
@pytest.mark.parametrize(("rank", "itemsize"), [(1, 2), (16, 2), (64, 2), (128, 2), (16, 4)])
def test_splits_of_a_row_are_few_and_never_outnumber_its_chunks(tokens: int, rank: int, itemsize: int) -> None:
    for width in (1, 8192, 11008, 14336, 28672):
        tile = _tail_tile(tokens, width, rank, itemsize, 232_448)
        chunks = -(-width // tile.block_k)
        assert tile.splits in (1, 2, 4, 8, 16)
        assert tile.splits <= chunks


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_ends_of_the_activation_are_finite_and_right(activation: Any) -> None:
    far = [-1e4, -300.0, -88.0, -20.0, -5.0, -1e-3, -0.0, 0.0, 1e-3, 5.0, 20.0, 88.0, 300.0, 1e4]
    gate = torch.tensor([far], requires_grad=True)
    up = torch.ones_like(gate).requires_grad_()
    h = PUBLIC[activation](gate, up)
    grads = torch.autograd.grad(h.sum(), (gate, up))
    gate64, up64 = (tensor.detach().double().requires_grad_() for tensor in (gate, up))
    h64 = swiglu_reference(gate64, up64, activation)
    oracle = torch.autograd.grad(h64.sum(), (gate64, up64))
    for result, expected in zip((h, *grads), (h64, *oracle), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_may_overwrite_the_operands(dtype: torch.dtype, rank: int) -> None:
    torch.manual_seed(0)
    tokens, width = 70, 1100
    merged, dh = torch.randn(tokens, 2 * width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)
    gate, up = merged[:, :width], merged[:, width:]
    deferred = (torch.randn(tokens, 16, dtype=dtype), torch.randn(rank, width, dtype=dtype)) if rank else None
    fresh = swiglu_backward(dh, gate, up, deferred=deferred, h=torch.empty(tokens, width, dtype=dtype))
    in_place = swiglu_backward(dh, gate, up, deferred=deferred, dgate=gate, dup=up, h=dh)
    assert in_place[0] is gate
    assert in_place[1] is up
    assert in_place[2] is dh
    for a, b in zip(in_place, fresh, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert torch.equal(merged, torch.cat((fresh[0], fresh[1]), dim=1))


def test_results_land_in_the_given_memory_and_nowhere_else() -> None:
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(9, 48) for _ in range(3))
    lora_a, p_Tp = torch.randn(8, 48), torch.randn(9, 16)
    for adapter in (None, lora_a):
        width = 48 if adapter is None else 64
        deferred = None if adapter is None else (p_Tp, adapter)
        buffers = [torch.full((11, 80), 7.0) for _ in range(4)]
        h = swiglu_forward(gate, up, out=buffers[0][1:10, :width], lora_a=adapter)
        grads = swiglu_backward(
            dh,
            gate,
            up,
            deferred=deferred,
            dgate=buffers[1][1:10, 3:51],
            dup=buffers[2][1:10, 16:64],
            h=buffers[3][1:10, :48],
        )
        assert torch.equal(h, swiglu_forward(gate, up, lora_a=adapter))
        dgate, dup, nothing = swiglu_backward(dh, gate, up, deferred=deferred)
        assert nothing is None
        assert torch.equal(grads[0], dgate)
        assert torch.equal(grads[1], dup)
        for memory, first, last in zip(buffers, (0, 3, 16, 0), (width, 51, 64, 48), strict=True):
            memory[1:10, first:last] = 7.0
            assert (memory == 7.0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: Any) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(PUBLIC[activation], (gate, up))


def test_gradient_reaches_who_asked() -> None:
    gate, up = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    swiglu(gate, up.detach()).sum().backward()
    assert gate.grad is not None
    assert up.grad is None
    geglu(gate.detach(), up).sum().backward()
    assert up.grad is not None
    with torch.no_grad():
        assert not swiglu(gate, up).requires_grad


def test_zero_tokens_give_zero_tokens() -> None:
    gate = torch.randn(0, 48, requires_grad=True)
    swiglu(gate, gate).sum().backward()
    assert gate.grad is not None
    assert gate.grad.shape == (0, 48)
    buffer = swiglu_forward(gate.detach(), gate.detach(), lora_a=torch.randn(3, 48))
    assert buffer.shape == (0, 64)
    deferred = (buffer[:, 48:], torch.randn(3, 48))
    assert swiglu_backward(gate.detach(), gate.detach(), gate.detach(), deferred=deferred)[0].shape == (0, 48)


def test_an_infinite_row_stays_alone() -> None:
    gate, up = torch.randn(20, 48), torch.randn(20, 48)
    gate[2, 5] = float("inf")
    h = swiglu_forward(gate, up, lora_a=torch.randn(3, 48))
    assert not h[2, :51].isfinite().all()
    assert not h[:, 51:].any()
    assert h[torch.arange(20) != 2].isfinite().all()


@pytest.mark.parametrize("make", [lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(6, 48), wider])
def test_strided_operands_are_as_good_as_contiguous_ones(make: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    strided = make(torch.randn(6, 48))
    dense = strided.contiguous()
    # PyTorch's own sigmoid on the CPU takes another path for strided memory, one unit in the last place away.
    torch.testing.assert_close(swiglu_forward(strided, strided), swiglu_forward(dense, dense))
    a, b = swiglu_backward(strided, strided, strided), swiglu_backward(dense, dense, dense)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])
    leaf = strided.detach().requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(leaf, leaf).sum(), leaf)
    assert grad.shape == leaf.shape


def test_two_runs_agree_to_the_bit() -> None:
    torch.manual_seed(0)
    gate, up, lora_a = torch.randn(40, 200).half(), torch.randn(40, 200).half(), torch.randn(8, 200).half()
    assert torch.equal(swiglu_forward(gate, up, lora_a=lora_a), swiglu_forward(gate, up, lora_a=lora_a))


def test_the_output_may_be_changed_in_place() -> None:
    gate = torch.randn(2, 3, 16, requires_grad=True)
    h = swiglu(gate, gate)
    h.mul_(2.0)
    torch.autograd.grad(h.sum(), gate)


def test_a_second_derivative_is_refused() -> None:
    gate = torch.randn(4, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(gate, gate.detach()).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operands_that_do_not_fit_are_refused() -> None:
    x, a = torch.randn(4, 16), torch.randn(3, 16)
    for call, message in (
        (lambda: swiglu(x, x[:3]), r"up \(3, 16\)"),
        (lambda: swiglu(x[:, :0], x[:, :0]), "I >= 1"),
        (lambda: swiglu(x, x.half()), "up is torch.float16"),
        (lambda: swiglu(x.int(), x.int()), "floating-point"),
        (lambda: geglu(x, x, approximate="sigmoid"), "expected 'tanh' or 'none'"),  # type: ignore[arg-type]
        (lambda: swiglu_forward(x, x, activation="relu"), "activation is 'relu'"),  # type: ignore[arg-type]
        (lambda: swiglu_backward(x, x, x, activation="relu"), "activation is 'relu'"),  # type: ignore[arg-type]
        (lambda: swiglu_forward(x[0], x[0]), r"expected \(any, any\)"),
        (lambda: swiglu_forward(x, x[:, 1:]), "up has shape"),
        (lambda: swiglu_forward(x, x, out=x[:, :15]), r"expected torch.float32 \(4, 16\)"),
        (lambda: swiglu_forward(x, x, out=torch.empty(16, 4).t()), "contiguous rows"),
        (lambda: swiglu_forward(x, x, out=torch.empty(16).expand(4, 16)), "do not overlap"),
        (lambda: swiglu_forward(x, x, lora_a=a[:, :15]), r"expected \(any, 16\)"),
        (lambda: swiglu_forward(x, x, lora_a=a.half()), "lora_a is torch.float16"),
        (lambda: swiglu_forward(x, x, lora_a=a, out=torch.empty(4, 19)), "multiple of 16"),
        (lambda: swiglu_forward(x, x, lora_a=a, out=torch.empty(4, 16)), "multiple of 16"),
        (lambda: swiglu_backward(x, x[:3], x), "gate has shape"),
        (lambda: swiglu_backward(x, x, x, deferred=(x[:, :2], a)), "P has 2 columns, A has 3"),
        (lambda: swiglu_backward(x, x, x, deferred=(x[:3], a)), r"expected \(4, any\)"),
        (lambda: swiglu_backward(x, x, x, dgate=x[:, :8]), "dgate is"),
        (lambda: swiglu_backward(x, x, x, dup=x.half()), "dup is"),
        (lambda: swiglu_backward(x, x, x, h=x[:3]), "h is"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
