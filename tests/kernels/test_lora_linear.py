"""The hand-written backward of `lora_linear` gives autograd's gradients."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch.utils.checkpoint import checkpoint

from graft_kernels.dropout import dropout_mask
from graft_kernels.launch import INTERPRETED
from graft_kernels.lora_linear import (
    Linear,
    extend,
    linear_way,
    linear_ways,
    lora_linear,
    lora_linear_reference,
    weight_columns,
    weight_rows,
)
from graft_kernels.nf4 import NF4Weight, decode

# (leading shape, N, K): one token, sizes that fill no block, blocks that straddle rows (K % 64), and sizes that fit.
SHAPES = [((1,), 8, 16), ((7,), 33, 20), ((2, 5), 64, 48), ((3, 1, 4), 17, 64), ((33,), 80, 128)]
RANKS = [1, 3, 48, 256]
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def nf4(n: int, k: int) -> NF4Weight:
    return NF4Weight.from_bitsandbytes(*quantize_4bit(torch.randn(n, k), quant_type="nf4", compress_statistics=True))


def operands(lead: tuple[int, ...], n: int, k: int, r: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(*lead, k).to(dtype).requires_grad_()
    lora_a = (torch.randn(r, k) / k**0.5).to(dtype).requires_grad_()
    lora_b = (torch.randn(n, r) / r**0.5).to(dtype).requires_grad_()
    return x, lora_a, lora_b


def drawn_mask(x: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    """The mask the next call of `lora_linear` will draw, leaving the generator where it was."""
    state = torch.get_rng_state()
    seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
    torch.set_rng_state(state)
    rows = x.numel() // x.shape[-1]
    return dropout_mask((rows, x.shape[-1]), p, seed, x.device, dtype).view_as(x)


def distance(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """‖ours - oracle‖ / ‖oracle‖; NaN is far away."""
    error = torch.linalg.vector_norm(ours.double() - oracle) / torch.linalg.vector_norm(oracle)
    return float("inf") if error.isnan() else error.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "rank"), list(itertools.product(SHAPES, RANKS)))
def test_every_way_gives_the_result_and_the_gradients_of_the_oracle(
    shape: tuple[tuple[int, ...], int, int], rank: int, dropout: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(rank)
    lead, n, k = shape
    x, lora_a, lora_b = operands(lead, n, k, rank, dtype)
    bias, weight = torch.randn(n).to(dtype), nf4(n, k)
    grad_y = torch.randn(*lead, n).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, lora_a, lora_b)]
    mask = drawn_mask(x, dropout, torch.float64) if dropout else None
    expected = lora_linear_reference(wide[0], decode(weight, dtype).double(), *wide[1:], 1.7, bias.double(), mask)
    theirs = torch.autograd.grad(expected, wide, grad_y.double())

    state = torch.get_rng_state()
    for way in linear_ways(x, weight, rank, dropout):
        torch.set_rng_state(state)
        y = lora_linear(x, weight, lora_a, lora_b, scale=1.7, bias=bias, dropout=dropout, way=way)
        ours = torch.autograd.grad(y, (x, lora_a, lora_b), grad_y)
        assert distance(y, expected) < TOLERANCE[dtype], way
        for name, a, b in zip(("x", "A", "B"), ours, theirs, strict=True):
            assert a.dtype == dtype
            assert distance(a, b) < TOLERANCE[dtype], (way, name)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dense", [True, False])
def test_gradcheck_in_float64(dense: bool, dropout: float) -> None:
    torch.manual_seed(0)
    x, lora_a, lora_b = operands((2, 3), 5, 6, 2, torch.float64)
    weight = torch.randn(5, 6, dtype=torch.float64) if dense else nf4(5, 6)
    bias = torch.randn(5, dtype=torch.float64)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)  # the same mask at every probe
        return lora_linear(inputs[0], weight, inputs[1], inputs[2], scale=0.5, bias=bias, dropout=dropout)

    def reference(*inputs: torch.Tensor) -> torch.Tensor:
        return lora_linear_reference(inputs[0], torch.ones(5, 6, dtype=torch.float64), inputs[1], inputs[2], 0.5, bias)

    assert torch.autograd.gradcheck(function, (x, lora_a, lora_b))
    assert torch.autograd.gradcheck(reference, (x, lora_a, lora_b))


def test_the_way_is_the_one_that_was_measured_to_be_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"fused": [[1, 256], [384, 512]]}
    module = importlib.import_module("graft_kernels.lora_linear")
    weight = nf4(64, 64)
    monkeypatch.setattr(module, "runs_kernels", lambda *tensors: True)
    monkeypatch.setattr(module, "fused_supported", lambda x, weight, rank: rank <= 256)

    def ways(table: dict[str, Any], **options: Any) -> list[str]:
        monkeypatch.setattr(module, "tuned", lambda op, device: table)
        given = {"weight": weight, "rank": 16} | options
        return [linear_way(torch.empty(1, tokens, 64), **given) for tokens in (1, 128, 129, 256, 257, 384, 512, 513)]

    assert ways(measured) == [*["fused"] * 4, "columns", *["fused"] * 2, "columns"]
    assert ways({}) == [*["fused"] * 2, *["columns"] * 6]
    assert ways(measured, dropout=0.1) == ways(measured, rank=300) == ["columns"] * 8
    assert ways(measured, weight=torch.randn(64, 64)) == ["reference"] * 8
    # What is checked in is of that kind.
    for card, ops in json.loads(resources.files("graft_kernels").joinpath("tuned.json").read_text()).items():
        ranges = ops["lora_linear"]["fused"]
        assert ranges == sorted(ranges), card
        assert all(1 <= first <= last for first, last in ranges), card


def test_without_an_adapter_it_is_the_frozen_layer() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    weight, bias = nf4(32, 64), torch.randn(32)
    y = lora_linear(x, weight, bias=bias, dropout=0.5)
    dense = decode(weight, torch.float32)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias))
    grad_y = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad_y)[0], grad_y @ dense)


def test_gradients_come_in_the_adapters_dtype_when_the_arithmetic_is_narrower() -> None:
    torch.manual_seed(0)
    narrow = torch.float16 if INTERPRETED else torch.bfloat16
    x, lora_a, lora_b = operands((16,), 32, 64, 8, torch.float32)
    weight = nf4(32, 64)
    y = lora_linear(x.to(narrow), weight, lora_a, lora_b, scale=2.0)
    assert y.dtype == narrow
    grads = torch.autograd.grad(y.float().square().sum(), (lora_a, lora_b))
    expected = lora_linear_reference(x, decode(weight, torch.float32), lora_a, lora_b, 2.0)
    theirs = torch.autograd.grad(expected.square().sum(), (lora_a, lora_b))
    for a, b in zip(grads, theirs, strict=True):
        assert a.dtype == torch.float32
        assert torch.linalg.vector_norm(a - b) <= 0.04 * torch.linalg.vector_norm(b)


def test_only_the_asked_gradients_are_computed() -> None:
    x, lora_a, lora_b = operands((4,), 8, 16, 2, torch.float32)
    weight = nf4(8, 16)
    lora_linear(x.detach(), weight, lora_a, lora_b).sum().backward()
    assert lora_a.grad is not None
    assert lora_b.grad is not None
    assert x.grad is None
    y = lora_linear(x, weight, lora_a.detach(), lora_b.detach())
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    with torch.no_grad():
        assert not lora_linear(x, weight, lora_a, lora_b).requires_grad


def test_strided_operands_are_as_good_as_contiguous_ones() -> None:
    torch.manual_seed(0)
    x, lora_a, lora_b = operands((6,), 8, 16, 3, torch.float32)
    weight = nf4(8, 16)
    y = lora_linear(x, weight, lora_a, lora_b)
    strided = lora_linear(x.t().contiguous().t(), weight, lora_a.t().contiguous().t(), lora_b.t().contiguous().t())
    grads = [torch.autograd.grad(out.square().sum(), (x, lora_a, lora_b)) for out in (y, strided)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_mask_is_not_kept_between_the_passes() -> None:
    x, lora_a, lora_b = operands((128,), 16, 64, 2, torch.float32)
    weight, kept = nf4(16, 64), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, weight, lora_a, lora_b, dropout=0.5)
    assert sorted(kept) == sorted([x.numel(), 128 * 2, lora_a.numel(), lora_b.numel()])


def test_the_generator_decides_the_mask() -> None:
    x, lora_a, lora_b = operands((8,), 16, 64, 2, torch.float32)
    weight = nf4(16, 64)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(lora_linear(x, weight, lora_a, lora_b, dropout=0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_recomputation_draws_the_same_mask() -> None:
    x, lora_a, lora_b = operands((8,), 16, 64, 2, torch.float32)
    weight = nf4(16, 64)

    def layer(inputs: torch.Tensor) -> torch.Tensor:
        return lora_linear(inputs, weight, lora_a, lora_b, dropout=0.5).square()

    torch.manual_seed(0)
    plain = torch.autograd.grad(layer(x).sum(), (x, lora_a, lora_b))
    torch.manual_seed(0)
    recomputed = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), (x, lora_a, lora_b))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_dropout_keeps_the_expected_value() -> None:
    mask = dropout_mask((400, 400), 0.1, 5, torch.device("cpu"), torch.float32)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert mask.mean().item() == pytest.approx(1.0, abs=5e-3)


def test_a_second_derivative_is_refused() -> None:
    x, lora_a, lora_b = operands((4,), 8, 16, 2, torch.float32)
    y = lora_linear(x, nf4(8, 16), lora_a, lora_b)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operands_that_do_not_fit_are_refused() -> None:
    x, lora_a, lora_b = operands((4,), 8, 16, 2, torch.float32)
    weight = nf4(8, 16)
    for call, message in (
        (lambda: lora_linear(x[:, :15], weight), "x has 15 features"),
        (lambda: lora_linear(x, weight, lora_a), "one is None"),
        (lambda: lora_linear(x, weight, lora_a, lora_b[:, :1]), "expected A"),
        (lambda: lora_linear(x, weight, bias=torch.zeros(7)), "bias has shape"),
        (lambda: lora_linear(x, torch.zeros(8, 16, requires_grad=True)), "frozen"),
        (lambda: lora_linear(x, weight, lora_a, lora_b, dropout=1.0), "expected 0 <= p < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel of this op at real sizes, for the gate that compiles without a card."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def linear(n: int, k: int, r: int) -> Linear:
        blocks = n * k // 64
        weight = NF4Weight(
            packed=meta(n * k // 2, dtype=torch.uint8),
            shape=(n, k),
            blocksize=64,
            absmax=meta(blocks, dtype=torch.uint8),
            code2=meta(256, dtype=torch.float32),
            absmax2=meta(-(-blocks // 256), dtype=torch.float32),
            offset=meta(1, dtype=torch.float32),
        )
        adapter = (meta(r, k, dtype=torch.float32), meta(n, r, dtype=torch.float32))
        return Linear(weight, *(part.requires_grad_() for part in adapter))

    def both(n: int, k: int, r: int, dropout: float) -> Callable[[], object]:
        def run() -> None:
            x = meta(16384, k).requires_grad_()
            layer = linear(n, k, r)
            lora_linear(x, layer.weight, layer.lora_a, layer.lora_b, dropout=dropout, way="columns").sum().backward()

        return run

    for n, k in ((4096, 4096), (28672, 4096), (4096, 14336)):
        for r in (16, 64, 256):
            yield f"columns {n}x{k} rank {r}", both(n, k, r, 0.0)
    yield "columns with dropout", both(4096, 4096, 16, 0.1)
    qkv = [linear(n, 4096, 16) for n in (4096, 1024, 1024)]
    yield "three side by side", lambda: weight_columns(qkv, 2.0, torch.bfloat16)
    yield "three, rows", lambda: weight_rows(qkv, 2.0, torch.bfloat16)
    resident = meta(6144, 4096 + 64)
    yield "three side by side, adapters alone", lambda: weight_columns(qkv, 2.0, torch.bfloat16, resident)
    yield "few tokens", lambda: extend(meta(512, 4096), meta(16, 4096), 64)
