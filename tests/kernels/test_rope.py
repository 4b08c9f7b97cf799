"""The rotation, with and without the norm before it, against a float64 oracle and Hugging Face's formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from graft_kernels.launch import INTERPRETED
from graft_kernels.rope import (
    RopeScaling,
    rope,
    rope_backward,
    rope_forward,
    rope_frequencies,
    rope_reference,
    rope_table,
)

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# (leading shape, N, K, D, R)
SHAPES = [
    ((1,), 1, 1, 64, 64),
    ((5,), 4, 1, 128, 128),
    ((2, 3), 6, 2, 80, 80),
    ((3,), 3, 3, 96, 96),
    ((2, 1, 2), 2, 1, 256, 256),
    ((3,), 40, 8, 128, 96),
    ((3,), 32, 1, 16, 2),
]
LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What an 8B model runs, and one case of every other path: to be compiled without a card, on meta tensors."""

    def run(
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_dim: int,
        rotary: int,
        *,
        norm: bool = False,
        gemma: bool = False,
        in_place: bool = True,
        positions: bool = True,
    ) -> object:
        new = partial(torch.empty, dtype=dtype, device="meta")
        tokens, (n, k) = 16384, heads
        qkv = new(tokens, n + 2 * k, head_dim)
        q, key = qkv[:, :n], qkv[:, n : n + k]
        tables = (new(131072, rotary // 2, dtype=torch.float32),) * 2
        at = new(tokens, dtype=torch.int32) if positions else None
        weight = new(head_dim) if norm else None
        common: dict[str, Any] = {"sequence": 2048, "q_weight": weight, "k_weight": weight, "gemma": gemma}
        turned = rope_forward(q, key, *tables, at, out=(q, key) if in_place and not norm else None, **common)
        before = (q, key) if norm else (None, None)
        return rope_backward(*turned, *tables, at, q=before[0], k=before[1], out=turned if in_place else None, **common)

    bf16 = torch.bfloat16
    yield "bf16 32:8 128", partial(run, bf16, (32, 8), 128, 128)
    yield "bf16 32:8 128, copied, no positions", partial(run, bf16, (32, 8), 128, 128, in_place=False, positions=False)
    yield "bf16 32:32 80", partial(run, bf16, (32, 32), 80, 80)
    yield "bf16 64:8 128", partial(run, bf16, (64, 8), 128, 128)
    yield "bf16 24:8 128, partial", partial(run, bf16, (24, 8), 128, 96)
    yield "bf16 24:8 128, partial, copied", partial(run, bf16, (24, 8), 128, 96, in_place=False)
    yield "bf16 32:8 128 normed", partial(run, bf16, (32, 8), 128, 128, norm=True)
    yield "bf16 24:8 128 normed, partial", partial(run, bf16, (24, 8), 128, 96, norm=True)
    yield "bf16 16:8 256 Gemma", partial(run, bf16, (16, 8), 256, 256, norm=True, gemma=True)
    yield "fp16 32:8 128", partial(run, torch.float16, (32, 8), 128, 128)
    yield "fp32 32:8 128", partial(run, torch.float32, (32, 8), 128, 128)
    yield "fp32 32:8 128 normed", partial(run, torch.float32, (32, 8), 128, 128, norm=True)


def error(result: Tensor, oracle: Tensor) -> float:
    result, oracle = result.detach().double(), oracle.detach().double()
    return float((result - oracle).norm() / oracle.norm())


def operands(
    lead: tuple[int, ...], n: int, k: int, d: int, dtype: torch.dtype, norm: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """q and k as slices of one fused output, as the model has them."""
    qkv = torch.randn(*lead, n + 2 * k, d, dtype=dtype)
    q, key = qkv[..., :n, :], qkv[..., n : n + k, :]
    weights = [torch.rand(d, dtype=dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    return q.requires_grad_(), key.requires_grad_(), weights[0], weights[1]


@pytest.mark.parametrize("norm", ["no norm", "norm", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "n", "k", "d", "rotary"), SHAPES)
def test_rotation_and_both_gradients_match_the_oracle(
    lead: tuple[int, ...], n: int, k: int, d: int, rotary: int, dtype: torch.dtype, norm: str
) -> None:
    torch.manual_seed(0)
    q, key, q_weight, k_weight = operands(lead, n, k, d, dtype, norm != "no norm")
    cos, sin = rope_table(rotary, 50)
    positions = torch.randint(0, 50, lead)
    grads_out = [torch.randn(*x.shape, dtype=dtype) for x in (q, key)]
    wide = [None if w is None else w.double() for w in (q_weight, k_weight)]
    for at in (positions, positions.flatten()[: lead[-1]].int(), None) if norm == "no norm" else (positions,):
        turned = rope(q, key, cos, sin, at, q_weight=q_weight, k_weight=k_weight, gemma=norm == "gemma")
        grads = torch.autograd.grad(turned, (q, key), grads_out)
        q64, k64 = (x.detach().double().requires_grad_() for x in (q, key))
        oracle = rope_reference(q64, k64, cos, sin, at, q_weight=wide[0], k_weight=wide[1], gemma=norm == "gemma")
        oracle_grads = torch.autograd.grad(oracle, (q64, k64), [g.double() for g in grads_out])
        for result, expected in zip((*turned, *grads), (*oracle, *oracle_grads), strict=True):
            assert result.dtype == dtype
            assert result.shape == expected.shape
            assert error(result, expected) < TOLERANCE[dtype]


def test_rotation_is_hugging_faces() -> None:
    torch.manual_seed(0)
    q, key = torch.randn(2, 6, 4, 32), torch.randn(2, 6, 2, 32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 7, 8]])
    cos, sin = rope_table(24, 16)
    theirs = apply_rotary_pos_emb(
        q, key, *(torch.cat((t, t), dim=-1)[positions.to(t.device)].to(q.device) for t in (cos, sin)), unsqueeze_dim=2
    )
    ours = rope(q, key, cos.to(q.device), sin.to(q.device), positions)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (RopeScaling(kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            LLAMA3,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_frequencies_are_hugging_faces(scaling: RopeScaling, parameters: dict[str, Any]) -> None:
    config = PreTrainedConfig(
        hidden_size=4096,
        num_attention_heads=32,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **parameters},
    )
    with torch.device("cpu"):
        theirs, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    ours = rope_frequencies(128, theta=500000.0, scaling=scaling)
    assert attention_factor == 1.0
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0.0)
    assert not torch.allclose(ours, rope_frequencies(128, theta=500000.0))


def test_table_is_exact_far_out() -> None:
    cos, sin = rope_table(128, 131072, theta=500000.0, scaling=LLAMA3, device="cpu")
    assert cos.shape == sin.shape == (131072, 64)
    assert cos.dtype == sin.dtype == torch.float32
    angle = 131071.0 * rope_frequencies(128, theta=500000.0, scaling=LLAMA3)
    assert torch.equal(cos[-1], angle.cos().float())
    assert torch.equal(sin[-1], angle.sin().float())
    assert torch.equal(cos[0], torch.ones(64, device="cpu"))
    with torch.device("meta"):
        assert rope_table(128, 4)[1].is_meta


def test_an_unscaled_pair_turns_by_one_radian() -> None:
    cos, sin = rope_table(2, 2, device="cpu")
    assert cos[1].item() == pytest.approx(0.5403023)
    assert sin[1].item() == pytest.approx(0.8414710)
    x = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    turned, _ = rope(x, x, cos.to(x.device), sin.to(x.device))
    assert turned.flatten().tolist() == pytest.approx([1.0, 0.0, 0.5403023, 0.8414710])


@pytest.mark.parametrize("rotary", [128, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_works_in_place_on_the_fused_output_and_touches_nothing_else(dtype: torch.dtype, rotary: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(4, 8, 128, dtype=dtype)
    before = qkv.clone()
    cos, sin = rope_table(rotary, 9)
    fresh = rope_forward(before[:, :4], before[:, 4:6], cos, sin)
    turned = rope_forward(qkv[:, :4], qkv[:, 4:6], cos, sin, out=(qkv[:, :4], qkv[:, 4:6]))
    for a, b in zip(turned, fresh, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(qkv, torch.cat((*fresh, before[:, 6:]), dim=1))
    fresh = rope_backward(*(x.clone() for x in turned), cos, sin)
    back = rope_backward(*turned, cos, sin, out=turned)
    assert torch.equal(qkv, torch.cat((*back, before[:, 6:]), dim=1))
    for a, b in zip(back, fresh, strict=True):
        assert torch.equal(a, b)
    # A rotation and its inverse.
    assert error(qkv, before) < TOLERANCE[dtype]


@pytest.mark.parametrize("rotary", [64, 40])
def test_backward_of_the_norm_works_in_place(rotary: int) -> None:
    torch.manual_seed(0)
    (q, dq), (k, dk) = (torch.randn(2, 4, heads, 64) for heads in (4, 2))
    weight, (cos, sin) = torch.rand(64), rope_table(rotary, 9)
    common: dict[str, Any] = {"q": q, "k": k, "q_weight": weight, "k_weight": weight}
    fresh = rope_backward(dq.clone(), dk.clone(), cos, sin, **common)
    back = rope_backward(dq, dk, cos, sin, out=(dq, dk), **common)
    assert back[0] is dq
    assert torch.equal(dq, fresh[0])
    assert torch.equal(dk, fresh[1])


def test_every_sequence_starts_at_zero() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 5, 4, 16), torch.randn(3, 5, 2, 16)
    cos, sin = rope_table(16, 5)
    together = rope(q, k, cos, sin)
    for i in range(3):
        alone = rope(q[i], k[i], cos, sin)
        assert torch.equal(together[0][i], alone[0])
        assert torch.equal(together[1][i], alone[1])
    flat = rope_forward(q.view(15, 4, 16), k.view(15, 2, 16), cos, sin, sequence=5)
    assert torch.equal(flat[0].view_as(q), together[0])


@pytest.mark.parametrize("rotary", [32, 24])
def test_a_position_outside_the_table_gives_nan_and_reads_nothing(rotary: int) -> None:
    q, k = torch.randn(5, 4, 32), torch.randn(5, 2, 32)
    cos, sin = rope_table(rotary, 8)
    positions = torch.tensor([0, 8, 7, -1, 2**40])
    outside = torch.tensor([False, True, False, True, True])
    for turned in (rope_forward(q, k, cos, sin, positions), rope_backward(q, k, cos, sin, positions)):
        for result in turned:
            assert result[outside][..., :rotary].isnan().all()
            assert result[~outside].isfinite().all()
            assert result[..., rotary:].isfinite().all()


@pytest.mark.parametrize("norm", ["no norm", "norm", "gemma"])
def test_gradcheck(norm: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 1, 6, dtype=torch.float64, requires_grad=True)
    weight = None if norm == "no norm" else torch.rand(6, dtype=torch.float64) + 0.5
    cos, sin = (table.double() for table in rope_table(4, 3))
    assert torch.autograd.gradcheck(
        lambda q, k: rope(q, k, cos, sin, q_weight=weight, k_weight=weight, gemma=norm == "gemma"), (q, k)
    )


def test_nothing_but_tables_and_positions_is_kept_without_a_norm() -> None:
    q, k = torch.randn(3, 4, 16, requires_grad=True), torch.randn(3, 2, 16, requires_grad=True)
    cos, sin = rope_table(16, 8)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rope(q, k, cos, sin, torch.arange(3))
        assert sorted(kept) == [(3,), (8, 8), (8, 8)]
        kept.clear()
        rope(q, k, cos, sin, q_weight=torch.ones(16), k_weight=torch.ones(16))
        assert sorted(kept) == [(3, 2, 16), (3, 4, 16), (8, 8), (8, 8), (16,), (16,)]


def test_gradient_reaches_who_asked() -> None:
    q, k = torch.randn(3, 4, 16, requires_grad=True), torch.randn(3, 2, 16, requires_grad=True)
    cos, sin = rope_table(16, 8)
    sum(x.sum() for x in rope(q, k.detach(), cos, sin)).backward()
    assert q.grad is not None
    assert k.grad is None
    # One of the two results goes unused.
    (dk,) = torch.autograd.grad(rope(q, k, cos, sin)[1].sum(), k)
    assert dk.shape == k.shape
    with torch.no_grad():
        assert not rope(q, k, cos, sin)[0].requires_grad


def test_zero_tokens_give_zero_tokens() -> None:
    q, k = torch.randn(0, 4, 16, requires_grad=True), torch.randn(0, 2, 16, requires_grad=True)
    cos, sin = rope_table(16, 8)
    for positions in (None, torch.zeros(0, dtype=torch.int64)):
        turned = rope(q, k, cos, sin, positions)
        grads = torch.autograd.grad(turned[0].sum() + turned[1].sum(), (q, k))
        assert turned[0].shape == grads[0].shape == (0, 4, 16)
        assert turned[1].shape == grads[1].shape == (0, 2, 16)


def test_a_zero_head_is_zero_after_the_norm() -> None:
    q, k, weight = torch.zeros(2, 3, 16), torch.randn(2, 1, 16), torch.ones(16)
    cos, sin = rope_table(16, 8)
    common: dict[str, Any] = {"q_weight": weight, "k_weight": weight}
    turned, _ = rope_forward(q, k, cos, sin, **common)
    assert not turned.any()
    assert rope_backward(torch.ones_like(q), k, cos, sin, q=q, k=k, **common)[0].isfinite().all()


@pytest.mark.parametrize("make", [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT.clone().mT])
def test_strided_operands_are_as_good_as_contiguous_ones(make: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    q, k, weight = torch.randn(3, 4, 16), torch.randn(3, 2, 16), torch.rand(16)
    cos, sin = rope_table(16, 8)
    common: dict[str, Any] = {"q_weight": weight, "k_weight": weight}
    for a, b in (
        (rope(make(q), make(k), cos, sin), rope(q, k, cos, sin)),
        (rope(make(q), make(k), cos.t().clone().t(), sin, **common), rope(q, k, cos, sin, **common)),
        (
            rope_backward(make(q), make(k), cos, sin, q=make(q), k=make(k), **common),
            rope_backward(q, k, cos, sin, q=q, k=k, **common),
        ),
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_outputs_may_be_changed_in_place() -> None:
    q, k = torch.randn(2, 3, 4, 16, requires_grad=True), torch.randn(2, 3, 2, 16, requires_grad=True)
    turned = rope(q, k, *rope_table(16, 8))
    turned[0].mul_(2.0)
    turned[1].mul_(2.0)
    torch.autograd.grad(turned[0].sum() + turned[1].sum(), (q, k))


def test_a_second_derivative_is_refused() -> None:
    q, k = torch.randn(3, 4, 16, requires_grad=True), torch.randn(3, 2, 16)
    (grad,) = torch.autograd.grad(rope(q, k, *rope_table(16, 8))[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operands_that_do_not_fit_are_refused() -> None:
    q, k, w = torch.randn(4, 4, 16), torch.randn(4, 2, 16), torch.ones(16)
    cos, sin = rope_table(16, 8)
    at = torch.arange(4)
    for call, message in (
        (lambda: rope(q[0], k[0], cos, sin), r"expected \[..., T, N, D\]"),
        (lambda: rope(q, k[:3], cos, sin), r"k \(3, 2, 16\)"),
        (lambda: rope(q[:, :0], k, cos, sin), "nothing in a row"),
        (lambda: rope(q, k[..., :8], cos, sin), r"\[T, K, D\]"),
        (lambda: rope(q, k.half(), cos, sin), "expected one floating-point dtype"),
        (lambda: rope(q, k, cos, sin[:7]), "expected the same"),
        (lambda: rope(q, k, *rope_table(18, 8)), "2 <= R <= 16"),
        (lambda: rope(q, k, cos.half(), sin.half()), "expected torch.float32"),
        (lambda: rope(q, k, cos.double(), sin.double()), "expected torch.float32"),
        (lambda: rope(q, k, cos[:3], sin[:3]), "sequences of 4 tokens"),
        (lambda: rope(q, k, cos, sin, at[:3]), r"expected \(4,\)"),
        (lambda: rope(q, k, cos, sin, at.float()), "int32 or int64"),
        (lambda: rope(q, k, cos, sin, at.cpu() + 5), "from 5 to 8, the tables from 0 to 7"),
        (lambda: rope(q, k, cos, sin, at.cpu() - 1), "from -1 to 2"),
        (lambda: rope(q, k, cos, sin, q_weight=w), "one is None"),
        (lambda: rope(q, k, cos, sin, q_weight=w[:8], k_weight=w), "q_weight has shape"),
        (lambda: rope(q, k, cos, sin, q_weight=w, k_weight=w.clone().requires_grad_()), "frozen"),
        (lambda: rope_forward(q, k, cos, sin, sequence=0), "sequence is 0"),
        (lambda: rope_forward(q, k, cos, sin, out=(q[:3], k)), "out's q is"),
        (lambda: rope_forward(q, k, cos, sin, out=(q, k.half())), "out's k is"),
        (lambda: rope_forward(q, k, cos, sin, out=(torch.empty(4, 16, 4).mT, k)), "contiguous rows"),
        (lambda: rope_forward(q, k, cos, sin, out=(q, k), q_weight=w, k_weight=w), "out is the input"),
        (lambda: rope_backward(q, k, cos, sin, q_weight=w, k_weight=w), "needs q and k"),
        (lambda: rope_backward(q, k, cos, sin, q=q[:3], k=k, q_weight=w, k_weight=w), "its gradient"),
        (lambda: rope_table(3, 8), "positive even"),
        (lambda: rope_table(16, -1), "max_positions is -1"),
        (lambda: rope_table(16, 8, theta=0.0), "theta is 0.0"),
        (lambda: RopeScaling(kind="yarn", factor=2.0), "kind is 'yarn'"),  # type: ignore[arg-type]
        (lambda: RopeScaling(kind="linear", factor=0.0), "factor is 0.0"),
        (lambda: RopeScaling(kind="llama3", factor=2.0, low_freq_factor=4.0), "0 < low < high"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
