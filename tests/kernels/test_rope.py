"""The rotation, with and without the norm before it, against a float64 oracle and Hugging Face's formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from graft_kernels.launch import INTERPRETED
from graft_kernels.rope import (
    QKVTile,
    RopeScaling,
    rope,
    rope_backward,
    rope_forward,
    rope_frequencies,
    rope_qkv_backward,
    rope_qkv_forward_,
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

    def case(
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_dim: int,
        rotary: int,
        *,
        norm: bool = False,
        gemma: bool = False,
        in_place: bool = True,
        positions: bool = True,
    ) -> Callable[[], object]:
        tokens, (n, k) = 16384, heads

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def run() -> object:
            qkv = new(tokens, (n + 2 * k) * head_dim).view(tokens, n + 2 * k, head_dim)
            q, key = qkv[:, :n], qkv[:, n : n + k]
            tables = (new(131072, rotary // 2, dtype=torch.float32),) * 2
            at = new(tokens, dtype=torch.int32) if positions else None
            weight = new(head_dim) if norm else None
            common: dict[str, Any] = {"sequence": 2048, "q_weight": weight, "k_weight": weight, "gemma": gemma}
            turned = rope_forward(q, key, *tables, at, out=(q, key) if in_place and not norm else None, **common)
            before = (q, key) if norm else (None, None)
            return rope_backward(
                *turned, *tables, at, q=before[0], k=before[1], out=turned if in_place else None, **common
            )

        return run

    def fused(
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_dim: int,
        rotary: int,
        rank: int,
        p: int,
        *,
        tokens: int = 16384,
        positions: bool = True,
    ) -> Callable[[], object]:
        n, k = heads

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def run() -> object:
            width = (n + 2 * k) * head_dim
            tables = (new(131072, rotary // 2, dtype=torch.float32),) * 2
            at = new(tokens, dtype=torch.int32) if positions else None
            common: dict[str, Any] = {"sequence": 2048}
            if rank > 0:
                common |= {"b": new(3 * rank, width), "ranks": (rank, rank, rank)}
            q, key, v = rope_qkv_forward_(new(tokens, width + p), n, k, head_dim, *tables, at, **common)
            return rope_qkv_backward(q, key, v, *tables, at, p=p, **common)

        return run

    bf16 = torch.bfloat16
    for rank in (16, 64):
        for tokens in (2048, 16384):
            yield (
                f"bf16 32:8 128, fused, rank {rank}, {tokens}",
                fused(bf16, (32, 8), 128, 128, rank, 4 * rank, tokens=tokens),
            )
    yield "bf16 32:8 128, fused", fused(bf16, (32, 8), 128, 128, 0, 0)
    yield "bf16 32:8 128, fused, rank 128", fused(bf16, (32, 8), 128, 128, 128, 384)
    yield "bf16 24:8 128, fused, partial", fused(bf16, (24, 8), 128, 96, 16, 64)
    yield "bf16 32:32 80, fused, no positions", fused(bf16, (32, 32), 80, 80, 16, 48, positions=False)
    yield "bf16 16:8 256, fused, rank 16", fused(bf16, (16, 8), 256, 256, 16, 64)
    yield "bf16 16:8 256, fused, rank 64", fused(bf16, (16, 8), 256, 256, 64, 192)
    yield "bf16 16:8 256, fused, rank 128", fused(bf16, (16, 8), 256, 256, 128, 384)
    yield "fp16 32:8 64, fused", fused(torch.float16, (32, 8), 64, 64, 16, 64)
    yield "fp32 32:8 128, fused", fused(torch.float32, (32, 8), 128, 128, 16, 64)
    yield "fp32 16:8 256, fused", fused(torch.float32, (16, 8), 256, 256, 16, 64)
    yield "bf16 32:8 128", case(bf16, (32, 8), 128, 128)
    yield "bf16 32:8 128, copied, no positions", case(bf16, (32, 8), 128, 128, in_place=False, positions=False)
    yield "bf16 32:32 80", case(bf16, (32, 32), 80, 80)
    yield "bf16 64:8 128", case(bf16, (64, 8), 128, 128)
    yield "bf16 24:8 128, partial", case(bf16, (24, 8), 128, 96)
    yield "bf16 24:8 128, partial, copied", case(bf16, (24, 8), 128, 96, in_place=False)
    yield "bf16 32:8 128 normed", case(bf16, (32, 8), 128, 128, norm=True)
    yield "bf16 24:8 128 normed, partial", case(bf16, (24, 8), 128, 96, norm=True)
    yield "bf16 16:8 256 Gemma", case(bf16, (16, 8), 256, 256, norm=True, gemma=True)
    yield "fp16 32:8 128", case(torch.float16, (32, 8), 128, 128)
    yield "fp32 32:8 128", case(torch.float32, (32, 8), 128, 128)
    yield "fp32 32:8 128 normed", case(torch.float32, (32, 8), 128, 128, norm=True)


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


# (T, heads, kv heads, D, R, ranks, p)
QKV_SHAPES = [
    (1, 2, 1, 64, 64, (1, 3, 48), 64),
    (17, 4, 2, 16, 16, (3, 3, 3), 16),
    (5, 5, 1, 128, 128, (16, 16, 16), 64),
    (3, 3, 3, 80, 80, (8, 0, 8), 16),
    (5, 2, 2, 96, 96, (0, 4, 0), 32),
    (3, 2, 1, 256, 256, (16, 1, 7), 32),
    (3, 6, 2, 64, 40, (5, 16, 2), 32),
    (9, 2, 2, 16, 2, (1, 1, 1), 16),
    (4, 2, 1, 32, 32, (150, 1, 2), 160),
]


class QKV:
    """The buffer [q | k | v | S] of a product in the rows form, and b, block-diagonal as it is made there."""

    def __init__(self, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
        self.tokens, self.heads, self.kv_heads, self.d, self.rotary, self.ranks, self.p = shape
        self.sizes = (self.heads * self.d, self.kv_heads * self.d, self.kv_heads * self.d)
        self.width, rank = sum(self.sizes), sum(self.ranks)
        # Wider than it has to be, as a slice of something else; what is beyond S is not for anyone to read.
        self.whole = torch.randn(self.tokens, self.width + self.p + 16, dtype=dtype)
        self.qkv = self.whole[:, : self.width + self.p]
        self.qkv[:, self.width + rank :] = float("nan")
        blocks = [torch.randn(r, n) / max(1, r) ** 0.5 for r, n in zip(self.ranks, self.sizes, strict=True)]
        self.b = torch.block_diag(*blocks).to(dtype)
        self.cos, self.sin = rope_table(self.rotary, 50)
        self.positions = torch.randint(0, 50, (self.tokens,))
        self.rank = rank

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return rope_qkv_forward_(self.qkv, self.heads, self.kv_heads, self.d, self.cos, self.sin, *args, **options)

    def parts(self, rows: Tensor) -> list[Tensor]:
        return [x.unflatten(1, (-1, self.d)) for x in rows[:, : self.width].split(self.sizes, dim=1)]

    def gradients(self, dtype: torch.dtype) -> list[Tensor]:
        """As attention's backward gives them: heads outside the tokens, padded rows, contiguous."""
        t, h, k, d = self.tokens, self.heads, self.kv_heads, self.d
        return [
            torch.randn(h, t, d, dtype=dtype).transpose(0, 1),
            torch.randn(t, k * d + 8, dtype=dtype)[:, : k * d].view(t, k, d),
            torch.randn(t, k, d, dtype=dtype),
        ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", QKV_SHAPES)
def test_the_pending_update_is_added_before_the_rotation(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    before = case.whole.clone()
    s, wide = case.qkv[:, case.width : case.width + case.rank].double(), case.qkv.double()
    q, k, v = case.parts(wide[:, : case.width] + s @ case.b.double())
    oracle = (*rope_reference(q, k, case.cos, case.sin, case.positions), v)
    results = case.forward(case.positions, b=case.b, ranks=case.ranks)
    for result, expected, inside in zip(results, oracle, case.parts(case.qkv), strict=True):
        assert result.dtype == dtype
        assert result.shape == expected.shape
        assert torch.equal(result, inside)
        assert result.data_ptr() == inside.data_ptr()
        assert error(result, expected) < TOLERANCE[dtype]
    assert torch.equal(case.whole[:, case.width :].isnan(), before[:, case.width :].isnan())
    assert torch.equal(case.whole[:, case.width :].nan_to_num(), before[:, case.width :].nan_to_num())
    if case.ranks[2] == 0:
        assert torch.equal(results[2], case.parts(before)[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", QKV_SHAPES[1:8])
def test_without_an_update_the_fused_output_is_rotated_in_place(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    before = case.whole.clone()
    q, k, v = case.parts(before)
    expected = rope_forward(q, k, case.cos, case.sin, sequence=4)
    results = case.forward(sequence=4)
    for a, b in zip(results, (*expected, v), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(case.whole[:, case.width :].nan_to_num(), before[:, case.width :].nan_to_num())
    assert results[0].data_ptr() == case.whole.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", QKV_SHAPES)
def test_the_merged_gradient_and_its_tail_match_the_oracle(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    dq, dk, dv = case.gradients(dtype)
    q, k = (x.double().requires_grad_() for x in (dq, dk))
    turned = rope_reference(q, k, case.cos, case.sin, case.positions)
    oracle = [*torch.autograd.grad(turned, (q, k), (dq.double(), dk.double())), dv.double()]
    whole = torch.full_like(case.whole, 7.0)
    out = whole[:, : case.width + case.p]
    common: dict[str, Any] = {"b": case.b, "ranks": case.ranks}
    result = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, case.positions, out=out, **common)
    assert result is out
    for part, expected in zip(case.parts(out), oracle, strict=True):
        assert error(part, expected) < TOLERANCE[dtype]
    assert torch.equal(case.parts(out)[2], dv)
    tail = out[:, case.width : case.width + case.rank]
    assert error(tail, out[:, : case.width].double() @ case.b.double().t()) < TOLERANCE[dtype]
    assert not out[:, case.width + case.rank :].any()
    assert (whole[:, case.width + case.p :] == 7.0).all()
    fresh = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, case.positions, p=case.p, **common)
    assert torch.equal(fresh, out)
    smallest = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, case.positions, **common)
    assert smallest.shape[1] == case.width + -(-case.rank // 16) * 16
    assert torch.equal(smallest, out[:, : smallest.shape[1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", QKV_SHAPES[:8])
def test_without_a_tail_merging_is_rope_backward_and_cat(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = QKV(shape, dtype)
    dq, dk, dv = case.gradients(dtype)
    at = case.positions.int() if case.heads % 2 else None
    separate = rope_backward(dq, dk, case.cos, case.sin, at, sequence=4)
    expected = torch.cat([x.flatten(1) for x in (*separate, dv)], dim=1)
    merged = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, at, sequence=4)
    assert torch.equal(merged, expected)
    padded = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, at, sequence=4, p=24)
    assert torch.equal(padded, torch.cat((expected, torch.zeros(case.tokens, 24, dtype=dtype)), dim=1))
    # The tail beside it changes nothing.
    tailed = rope_qkv_backward(dq, dk, dv, case.cos, case.sin, at, sequence=4, b=case.b, ranks=case.ranks)
    assert torch.equal(tailed[:, : case.width], expected)


def test_the_tail_is_of_the_gradient_as_it_is_stored() -> None:
    torch.manual_seed(0)
    case = QKV((200, 2, 1, 16, 16, (3, 3, 3), 16), torch.float16)
    tailed = rope_qkv_backward(
        *case.gradients(torch.float16), case.cos, case.sin, sequence=50, b=case.b, ranks=case.ranks
    )
    # One rounding of fp16, 2.1e-4; of the gradient before its rounding it would be two, 2.9e-4.
    oracle = tailed[:, : case.width].double() @ case.b.double().t()
    assert error(tailed[:, case.width : case.width + 6], oracle[:, :6]) < 2.4e-4


TILES = [QKVTile(16, 2, 2, 4, 2), QKVTile(32, 4, 4, 8, 1), QKVTile(16, 3, 1, 4, 3), QKVTile(16, 99, 8, 8, 2)]


@pytest.mark.parametrize("tile", TILES)
def test_every_division_of_the_work_gives_the_same(tile: QKVTile) -> None:
    torch.manual_seed(0)
    case = QKV((19, 5, 2, 32, 24, (3, 17, 1), 32), torch.float16)
    wide, gradients = QKV((19, 5, 2, 32, 24, (3, 17, 1), 32), torch.float16), case.gradients(torch.float16)
    wide.qkv.copy_(case.qkv)
    common: dict[str, Any] = {"b": case.b, "ranks": case.ranks}
    expected = wide.forward(case.positions, **common)
    for a, b in zip(case.forward(case.positions, _tile=tile, **common), expected, strict=True):
        assert error(a, b) < 5e-4
    merged = rope_qkv_backward(*gradients, case.cos, case.sin, **common)
    tiled = rope_qkv_backward(*gradients, case.cos, case.sin, _tile=tile, **common)
    assert torch.equal(tiled[:, : case.width], merged[:, : case.width])
    assert error(tiled, merged) < 5e-4
    assert torch.equal(rope_qkv_backward(*gradients, case.cos, case.sin, _tile=tile), merged[:, : case.width])


def test_without_ranks_any_row_of_b_may_reach_anything() -> None:
    torch.manual_seed(0)
    case = QKV((7, 4, 2, 16, 16, (2, 3, 4), 16), torch.float32)
    dense = torch.randn_like(case.b)
    s, wide = case.qkv[:, case.width : case.width + 9].double(), case.qkv.double()
    q, k, v = case.parts(wide[:, : case.width] + s @ dense.double())
    oracle = (*rope_reference(q, k, case.cos, case.sin), v)
    for result, expected in zip(case.forward(b=dense), oracle, strict=True):
        assert error(result, expected) < 2e-6
    gradients = case.gradients(torch.float32)
    merged = rope_qkv_backward(*gradients, case.cos, case.sin, b=dense, p=16)
    assert torch.equal(merged[:, : case.width], rope_qkv_backward(*gradients, case.cos, case.sin))
    assert error(merged[:, case.width : case.width + 9], merged[:, : case.width].double() @ dense.double().t()) < 2e-6
    assert not merged[:, case.width + 9 :].any()


def test_a_row_with_nan_spoils_its_own_tail_alone() -> None:
    torch.manual_seed(0)
    case = QKV((18, 3, 1, 16, 12, (2, 1, 3), 16), torch.float32)
    gradients = case.gradients(torch.float32)
    case.positions[4] = 50
    gradients[2][7] = float("inf")
    merged = rope_qkv_backward(
        *gradients, case.cos, case.sin, case.positions, b=case.b, ranks=case.ranks, out=torch.ones_like(case.qkv)
    )
    tail = merged[:, case.width :]
    assert tail[4, :3].isnan().all()
    assert tail[4, 3:6].isfinite().all()
    assert tail[7, :3].isfinite().all()
    assert not tail[7, 3:6].isfinite().any()
    assert not tail[:, 6:].any()
    others = torch.arange(18)
    others = others[(others != 4) & (others != 7)]
    assert merged[others].isfinite().all()


def test_zero_tokens_of_a_fused_output_are_zero_tokens() -> None:
    case = QKV((0, 4, 2, 16, 16, (2, 3, 4), 16), torch.float32)
    for options in ({}, {"b": case.b}, {"b": case.b, "ranks": case.ranks}):
        assert [x.shape for x in case.forward(**options)] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
        merged = rope_qkv_backward(*case.gradients(torch.float32), case.cos, case.sin, p=16, **options)
        assert merged.shape == (0, case.width + 16)


def test_the_fused_output_in_fp64_stays_fp64() -> None:
    torch.manual_seed(0)
    case = QKV((5, 4, 2, 16, 16, (2, 3, 4), 16), torch.float64)
    rows, rank = case.qkv.clone(), case.rank
    q, k, v = case.parts(rows[:, : case.width] + rows[:, case.width : case.width + rank] @ case.b)
    expected = (*rope_reference(q, k, case.cos, case.sin), v)
    for a, b in zip(case.forward(b=case.b, ranks=case.ranks), expected, strict=True):
        assert error(a, b) < 1e-14
    merged = rope_qkv_backward(*case.gradients(torch.float64), case.cos, case.sin, b=case.b, ranks=case.ranks)
    assert error(merged[:, case.width : case.width + rank], merged[:, : case.width] @ case.b.t()) < 1e-14


def test_a_fused_output_that_does_not_fit_is_refused() -> None:
    case = QKV((4, 4, 2, 16, 16, (2, 3, 4), 16), torch.float32)
    cos, sin, qkv, b, w = case.cos, case.sin, case.qkv, case.b, torch.ones(16)
    dq, dk, dv = (x.contiguous() for x in case.gradients(torch.float32))

    def forward(rows: Tensor = qkv, **options: Any) -> object:
        return rope_qkv_forward_(rows, 4, 2, 16, cos, sin, **options)

    def backward(dv: Tensor = dv, **options: Any) -> object:
        return rope_qkv_backward(dq, dk, dv, cos, sin, **options)

    for call, message in (
        (lambda: forward(q_weight=w, k_weight=w), "rope_forward has the norm"),
        (lambda: forward(k_weight=w), "rope_forward has the norm"),
        (lambda: forward(qkv[:, :100]), r"at least \(4 \+ 2·2\)·16"),
        (lambda: forward(qkv[None]), "qkv has shape"),
        (lambda: forward(qkv.t().contiguous().t()), "contiguous rows"),
        (lambda: forward(qkv[:1].expand(4, -1)), "that do not overlap"),
        (lambda: forward(qkv[:, : case.width + 8], b=b), "8 columns beside q, k and v; b has 9 rows"),
        (lambda: forward(b=b.half()), r"expected torch.float32 \(R, 128\)"),
        (lambda: forward(b=b[:, 1:]), r"expected torch.float32 \(R, 128\)"),
        (lambda: forward(b=b[:0]), r"expected torch.float32 \(R, 128\)"),
        (lambda: forward(b=b, ranks=(2, 3, 5)), "three that make 9"),
        (lambda: forward(b=b, ranks=(9, 3, -3)), "three that make 9"),
        (lambda: forward(b=b, ranks=(5, 4)), "three that make 9"),
        (lambda: forward(ranks=(2, 3, 4)), "there is no b"),
        (lambda: forward(positions_T=torch.arange(3)), r"int64 \(4,\)"),
        (lambda: rope_qkv_forward_(qkv, 4, 2, 16, cos[:3], sin[:3]), "sequences of 4 tokens"),
        (lambda: backward(dv[:, :1]), "expected the same"),
        (lambda: backward(dv.half()), "expected the same"),
        (lambda: backward(b=b, ranks=(9, 0)), "three that make 9"),
        (lambda: backward(b=b, p=8), "p is 8, but b has 9 rows"),
        (lambda: backward(out=qkv[:, :100]), "p is -28"),
        (lambda: backward(out=qkv, p=32), "out is"),
        (lambda: backward(out=qkv.half()), "out is"),
        (lambda: backward(out=qkv.t().contiguous().t()), "out has strides"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
