"""The fused head and loss: what it computes, to what precision, and what it leaves undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from graft_kernels import cross_entropy
from graft_kernels.cross_entropy import (
    cross_entropy_rows_,
    default_chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_forward,
    linear_cross_entropy_reference,
    scaled,
)
from graft_kernels.launch import INTERPRETED
from graft_kernels.nf4 import NF4Weight, decode

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# Relative L2 against fp64: fp32 is arithmetic; the others round logits and their gradients once each.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
VOCABULARIES = [1, 2, 33, 1000, 8193, 20259]


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel of cross_entropy.py at the sizes of real models, on meta tensors."""

    def case(T: int, H: int, V: int, dtype: torch.dtype, softcap: float | None, gradient: bool) -> Callable[[], object]:
        def run() -> None:
            hidden = torch.empty(T, H, dtype=dtype, device="meta", requires_grad=gradient)
            weight = torch.empty(V, H, dtype=dtype, device="meta")
            labels = torch.empty(T, dtype=torch.int64, device="meta")
            found = linear_cross_entropy(hidden, weight, labels, softcap=softcap, num_valid=T // 2)
            if gradient:
                found.loss.backward()

        return run

    yield "Llama-3.1-8B bf16", case(8192, 4096, 128256, torch.bfloat16, None, True)
    yield "Llama-3.1-8B bf16, evaluation", case(8192, 4096, 128256, torch.bfloat16, None, False)
    yield "Gemma-2 bf16 with softcap", case(4096, 3584, 256000, torch.bfloat16, 30.0, True)
    yield "GPT-2 fp16, odd vocabulary", case(1024, 768, 50257, torch.float16, None, True)
    yield "small fp32", case(64, 128, 1000, torch.float32, None, True)
    yield "Llama-3.1-8B fp32 with softcap", case(512, 4096, 128256, torch.float32, 30.0, True)


def operands(
    lead: tuple[int, ...], H: int, V: int, dtype: torch.dtype = torch.float32, ignored: float = 0.4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    hidden = torch.randn(*lead, H).to(dtype)
    weight = (torch.randn(V, H) * (3 / H**0.5)).to(dtype)
    labels = torch.randint(0, V, lead)
    labels[torch.rand(lead) < ignored] = -100
    return hidden.requires_grad_(), weight, labels


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient of hidden) in fp64."""
    wide = hidden.detach().double().requires_grad_()
    loss = linear_cross_entropy_reference(wide, weight.double(), labels, **options).loss
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    distance = torch.linalg.vector_norm(found.double() - expected.double()).item()
    assert distance <= tolerance * torch.linalg.vector_norm(expected.double()).item() + 1e-30


def count_matrix_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the left operands of every torch.mm from here on."""
    shapes: list[tuple[int, ...]] = []
    mm = torch.mm

    def counted(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(a.shape))
        return mm(a, b, **options)

    monkeypatch.setattr(cross_entropy.torch, "mm", counted)
    return shapes


# What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_loss_and_gradient_agree_with_float64(V: int, dtype: torch.dtype, softcap: float | None) -> None:
    hidden, weight, labels = operands((3, 5), 24, V, dtype)
    labels[0, 0] = V - 1
    found = linear_cross_entropy(hidden, weight, labels, softcap=softcap)
    loss, grad = oracle(hidden, weight, labels, softcap=softcap)
    assert found.loss.dtype == torch.float32
    assert found.loss.shape == ()
    close(found.loss, loss, TOLERANCES[dtype])
    found.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    close(hidden.grad, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_float64(softcap: float | None) -> None:
    hidden, weight, labels = operands((2, 4), 6, 9, torch.float64)

    def function(h: Tensor) -> Tensor:
        return linear_cross_entropy(h, weight, labels, softcap=softcap, chunk_rows=3, normaliser=7.0).loss

    assert torch.autograd.gradcheck(function, (hidden,))


@pytest.mark.parametrize("margin", [10.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize("label", [0, 700, 999])
def test_a_loss_near_zero_and_its_gradient_keep_their_precision(label: int, margin: float) -> None:
    """At a margin of 20 nats fp32's lse(z) - z_t and p_t - 1 are both 0 or off by 100 %."""
    torch.manual_seed(0)
    logits = torch.randn(1, 1000)
    logits[0, label] = margin
    labels = torch.tensor([label])
    wide = logits.double()
    others = wide.clone()
    others[0, label] = -math.inf
    ratio = torch.exp(others.logsumexp(1) - wide[0, label])
    loss, correct = cross_entropy_rows_(logits, labels)
    close(loss, torch.log1p(ratio), 1e-5)
    close(logits[0, label], -(ratio / (1 + ratio))[0], 1e-5)
    assert abs(logits.double().sum().item()) <= 1e-5 * ratio.item()
    assert correct.tolist() == [1]


def test_losses_on_both_sides_of_one_half_agree_with_float64() -> None:
    z = torch.linspace(-12, 12, 97)
    logits = torch.stack((z, torch.zeros_like(z)), dim=1)
    loss, _ = cross_entropy_rows_(logits, torch.zeros(97, dtype=torch.int64))
    expected = torch.nn.functional.softplus(-z.double(), threshold=1000)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-6, atol=0)
    torch.testing.assert_close(logits[:, 0].double(), -torch.sigmoid(-z.double()), rtol=5e-6, atol=0)


def test_logits_far_from_zero_neither_overflow_nor_lose_the_loss() -> None:
    torch.manual_seed(0)
    base = torch.randn(4, 50) * 3
    labels = torch.tensor([0, 7, 49, 20])
    for shift in (-30000.0, 30000.0):
        logits = base + shift
        expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
        loss, _ = cross_entropy_rows_(logits, labels)
        close(loss, expected, 1e-5)
    logits = torch.full((1, 50), -math.inf)
    logits[0, 3] = 1.0
    loss, _ = cross_entropy_rows_(logits, torch.tensor([3]))
    assert loss.tolist() == [0.0]
    assert not logits.any()


@pytest.mark.parametrize("V", [5, 1000, 20000])
def test_a_token_is_correct_if_its_label_is_the_first_of_the_largest(V: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 3, (12, V)).float()  # ties everywhere
    logits[3], logits[4, -1] = 0.0, 9.0
    guess = logits.argmax(dim=1)
    second = (logits == logits.amax(dim=1, keepdim=True)).long().cumsum(1).eq(2).long().argmax(dim=1)
    for labels, expected in ((guess, 1), (torch.where(second == guess, (guess + 1) % V, second), 0)):
        _, correct = cross_entropy_rows_(logits.clone(), labels, gradient=False)
        assert correct.tolist() == [expected] * 12


def test_the_hits_are_those_of_argmax_over_the_valid_tokens() -> None:
    hidden, weight, labels = operands((40,), 16, 33)
    with torch.no_grad():
        guess = (hidden @ weight.t()).argmax(dim=-1)
    labels[::2] = guess[::2]
    labels[::8] = -100
    found = linear_cross_entropy(hidden, weight, labels, chunk_rows=7)
    assert found.num_correct.dtype == found.num_valid.dtype == torch.int64
    assert found.num_correct.item() == ((guess == labels) & (labels != -100)).sum().item()
    assert found.num_valid.item() == (labels != -100).sum().item()
    assert not found.num_correct.requires_grad


def test_a_softcap_bounds_what_a_large_logit_can_do() -> None:
    logits = torch.tensor([[100.0, -100.0, 0.01, 3.0, -0.2]])
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(4 * torch.tanh(wide / 4), torch.tensor([3]))
    expected.backward()
    loss, _ = cross_entropy_rows_(logits, torch.tensor([3]), softcap=4.0)
    assert wide.grad is not None
    close(loss[0], expected.detach(), 1e-6)
    torch.testing.assert_close(logits.double(), wide.grad, rtol=5e-6, atol=1e-9)


# Which tokens count ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("normaliser", [None, 0.0, 5.0])
def test_with_every_label_ignored_loss_and_gradient_are_zero(normaliser: float | None, hint: bool) -> None:
    hidden, weight, labels = operands((2, 3), 8, 33, ignored=2.0)
    found = linear_cross_entropy(hidden, weight, labels, normaliser=normaliser, num_valid=0 if hint else None)
    assert (found.loss.item(), found.num_correct.item(), found.num_valid.item()) == (0.0, 0, 0)
    found.loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_window_without_tokens_divides_by_a_zero_on_the_device() -> None:
    hidden, weight, labels = operands((3,), 8, 33, ignored=2.0)
    loss = linear_cross_entropy(hidden, weight, labels, normaliser=torch.zeros((), dtype=torch.int64)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 1, 9])
def test_no_tokens_one_token_and_one_valid_token_work(T: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = operands((T,), 8, 33, dtype, ignored=2.0)
    if T:
        labels[T // 2] = 32
    found = linear_cross_entropy(hidden, weight, labels)
    found.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert found.num_valid.item() == min(T, 1)
    if T:
        loss, grad = oracle(hidden, weight, labels)
        close(found.loss, loss, TOLERANCES[dtype])
        close(hidden.grad, grad, TOLERANCES[dtype])
    else:
        assert found.loss.item() == 0.0


def test_padding_may_hold_anything() -> None:
    hidden, weight, labels = operands((6,), 8, 33)
    labels[2] = -100
    with torch.no_grad():
        hidden[2] = math.nan
    rows = linear_cross_entropy_forward(hidden, weight, labels, num_valid=int((labels != -100).sum()))
    assert rows[0].isfinite()
    assert rows[3] is not None
    assert rows[3].isfinite().all()
    # Without compaction the row is computed, and its result thrown away.
    assert linear_cross_entropy_forward(hidden, weight, labels)[0].item() == pytest.approx(rows[0].item(), rel=1e-6)


def test_a_class_can_be_the_ignored_index() -> None:
    hidden, weight, labels = operands((20,), 8, 4, ignored=0.0)
    found = linear_cross_entropy(hidden, weight, labels, ignore_index=2)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, ignore_index=2)
    close(found.loss.detach(), expected.detach(), 1e-6)
    assert found.num_valid.item() == (labels != 2).sum().item()


def test_two_calls_of_one_window_add_up_to_one_call() -> None:
    hidden, weight, labels = operands((10, 4), 16, 100)
    n = int((labels != -100).sum())
    whole = linear_cross_entropy(hidden, weight, labels).loss
    (expected,) = torch.autograd.grad(whole, hidden)
    for normaliser in (n, float(n), torch.tensor(n), torch.tensor(float(n))):
        parts = [
            linear_cross_entropy(hidden[rows], weight, labels[rows], normaliser=normaliser).loss
            for rows in (slice(0, 3), slice(3, 10))
        ]
        total = parts[0] + parts[1]
        close(total.detach(), whole.detach(), 1e-6)
        close(torch.autograd.grad(total, hidden)[0], expected, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_count_from_the_host_changes_the_work_and_not_the_result(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels = operands((4, 16), 16, 96, dtype, ignored=0.7)
    n = int((labels != -100).sum())
    shapes = count_matrix_products(monkeypatch)
    flat = hidden.detach().view(-1, 16)
    full = linear_cross_entropy_forward(flat, weight, labels.view(-1), chunk_rows=8)
    assert sum(shape[0] for shape in shapes) == 2 * 64
    shapes.clear()
    for bound in (n, n + 5):
        hinted = linear_cross_entropy_forward(flat, weight, labels.view(-1), chunk_rows=8, num_valid=bound)
        assert sum(shape[0] for shape in shapes) == 2 * bound
        shapes.clear()
        close(hinted[0], full[0], 1e-6)
        assert torch.equal(hinted[1], full[1])
        assert torch.equal(hinted[2], full[2])
        assert hinted[3] is not None
        assert full[3] is not None
        close(hinted[3], full[3], TOLERANCES[dtype])
        assert not hinted[3][labels.view(-1) == -100].any()


def test_a_count_that_is_too_low_is_seen_in_the_loss() -> None:
    hidden, weight, labels = operands((16,), 8, 33, ignored=0.0)
    assert linear_cross_entropy_forward(hidden, weight, labels, num_valid=15)[0].isnan()


def test_a_label_that_is_no_class_makes_its_row_nan_and_no_other() -> None:
    for label in (33, -1, -101, 2**40):
        logits = torch.randn(3, 33)
        labels = torch.tensor([1, label, 2])
        loss, correct = cross_entropy_rows_(logits, labels)
        assert loss.isnan().tolist() == [False, True, False]
        assert logits.isnan().all(dim=1).tolist() == [False, True, False]
        assert not logits[::2].isnan().any()
        assert correct[1] == 0


# How it computes ------------------------------------------------------------------------------------------------------


def test_the_chunk_does_not_change_the_result() -> None:
    hidden, weight, labels = operands((50,), 32, 257)
    results = []
    for chunk_rows in (1, 7, 16, 50, 1000, None):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows).loss
        results.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
    for loss, grad in results[1:]:
        close(loss, results[0][0], 1e-6)
        close(grad, results[0][1], 1e-6)


def test_two_runs_give_the_same_bits() -> None:
    hidden, weight, labels = operands((30,), 32, 1000)
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=8).loss
        runs.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_default_chunk_is_large_even_and_bounded() -> None:
    assert default_chunk_rows(8192, 128256, 2) == 8192
    assert default_chunk_rows(8193, 128256, 2) == 4352  # two like chunks, not 8192 and 1
    assert default_chunk_rows(100000, 262144, 2) * 262144 * 2 <= 2 << 30
    assert default_chunk_rows(100000, 32000, 2) <= 8192
    assert default_chunk_rows(10, 10**9, 4) == 256
    for rows in (0, 1, 255, 256, 257, 5000, 20000):
        assert default_chunk_rows(rows, 128256, 2) % 256 == 0


def test_an_nf4_head_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, dense, labels = operands((12,), 64, 130)
    weight = NF4Weight.from_bitsandbytes(*quantize_4bit(dense, quant_type="nf4", compress_statistics=True))
    calls = []

    def counted(w: NF4Weight, dtype: torch.dtype) -> Tensor:
        calls.append(dtype)
        return decode(w, dtype)

    monkeypatch.setattr(cross_entropy, "decode", counted)
    found = linear_cross_entropy(hidden, weight, labels, chunk_rows=5).loss
    found.backward()
    assert calls == [torch.float32]
    loss, grad = oracle(hidden, decode(weight, torch.float32), labels)
    close(found, loss, 5e-6)
    assert hidden.grad is not None
    close(hidden.grad, grad, 5e-6)


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = operands((12,), 16, 33)
    trained = linear_cross_entropy(hidden, weight, labels)
    shapes = count_matrix_products(monkeypatch)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels)
    detached = linear_cross_entropy(hidden.detach(), weight, labels)
    assert all(shape[1] == 16 for shape in shapes)
    for found in (evaluated, detached):
        assert not found.loss.requires_grad
        assert torch.equal(found.loss, trained.loss)
        assert torch.equal(found.num_correct, trained.num_correct)
    logits = torch.randn(4, 33)
    before = logits.clone()
    cross_entropy_rows_(logits, torch.arange(4), gradient=False)
    assert torch.equal(logits, before)


def test_only_the_gradient_is_kept_for_the_backward() -> None:
    hidden, weight, labels = operands((12,), 16, 1000)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, labels)
    assert max(kept) == hidden.numel() * 4
    assert len(kept) == 2


def test_the_backward_scales_by_the_gradient_that_comes_in_as_often_as_asked() -> None:
    hidden, weight, labels = operands((6,), 8, 33, torch.float16)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (scaled_by_8,) = torch.autograd.grad(loss * 8, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(once, again)
    close(scaled_by_8, once * 8, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_is_not_rounded_to_the_gradients_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(33, 129).to(dtype)
    factor = torch.tensor(1 / 4099)
    out = torch.empty_like(x)
    assert torch.equal(scaled(x, factor, out), (x.float() * factor).to(dtype))
    assert torch.equal(scaled(x, factor), out)


def test_strided_operands_are_as_good_as_contiguous_ones() -> None:
    hidden, weight, labels = operands((10,), 16, 33)
    wide = torch.zeros(10, 40)
    wide[:, 8:24] = hidden.detach()
    views = (wide[:, 8:24], hidden.detach().t().contiguous().t())
    loss = linear_cross_entropy(hidden, weight, labels).loss
    (grad,) = torch.autograd.grad(loss, hidden)
    for view in views:
        view = view.detach().requires_grad_()
        found = linear_cross_entropy(view, weight.t().contiguous().t(), labels).loss
        close(found.detach(), loss.detach(), 1e-6)
        close(torch.autograd.grad(found, view)[0], grad, 1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("padding", "touched"), [(0, 33), (14, 33), (15, 48), (260, 48)])
def test_rows_may_be_slices_of_wider_ones(padding: int, touched: int, softcap: float | None) -> None:
    """Of which no more is read or written than the padding allows, whatever is there."""
    torch.manual_seed(0)
    wide = torch.randn(5, 300)
    wide[:, 40::2] = torch.nan
    wide[:, 41::2] = torch.inf
    untouched = wide.clone()
    labels = torch.tensor([0, 32, -100, 5, 33])
    alone = wide[:, 7:40].clone()
    expected = cross_entropy_rows_(alone, labels, softcap=softcap)
    loss, correct = torch.empty(5), torch.empty(5, dtype=torch.int32)
    rows = wide[:, 7:40]
    found = cross_entropy_rows_(rows, labels, softcap=softcap, loss=loss, correct=correct, padding=padding)
    assert found[0] is loss
    assert torch.equal(loss.isnan(), torch.tensor([False, False, False, False, True]))
    assert torch.equal(loss[:4], expected[0][:4])
    assert torch.equal(correct, expected[1])
    assert torch.equal(rows[:4], alone[:4])
    assert rows[4].isnan().all()
    for beside in (slice(0, 7), slice(7 + touched, 300)):
        assert torch.equal(wide[:, beside].nan_to_num(), untouched[:, beside].nan_to_num())


@pytest.mark.parametrize("size", [10, 3 * 128, 1000], ids=["too small", "just enough", "ample"])
def test_logits_in_borrowed_memory_are_the_same_logits(size: int) -> None:
    hidden, weight, labels = operands((7,), 8, 100)
    expected = linear_cross_entropy_forward(hidden, weight, labels, chunk_rows=3)
    found = linear_cross_entropy_forward(hidden, weight, labels, chunk_rows=3, workspace=torch.full((size,), torch.nan))
    assert all(map(torch.equal, found, expected))


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, labels = operands((4,), 8, 16)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operands_that_do_not_fit_are_refused() -> None:
    hidden, weight, labels = operands((4,), 8, 16, ignored=0.0)
    on_the_host = labels.cpu()
    for call, message in (
        (lambda: linear_cross_entropy(hidden[:, :7], weight, labels), r"the head takes \[..., 8\]"),
        (lambda: linear_cross_entropy(hidden.long(), weight, labels), "expected floating point"),
        (lambda: linear_cross_entropy(hidden, weight.clone().requires_grad_(), labels), "frozen"),
        (lambda: linear_cross_entropy(hidden, weight.to("meta"), labels), "bring them to one device"),
        (lambda: linear_cross_entropy(hidden, weight, labels.to("meta")), "the labels on meta"),
        (lambda: linear_cross_entropy(hidden, weight, labels[:3]), r"labels have shape \(3,\), expected \(4,\)"),
        (lambda: linear_cross_entropy(hidden, weight, labels.int()), "expected torch.int64"),
        (lambda: linear_cross_entropy(hidden, weight, on_the_host + 16), "a label is .*, expected 0 to 15"),
        (lambda: linear_cross_entropy(hidden, weight, on_the_host - 17), "a label is -"),
        (lambda: linear_cross_entropy(hidden, weight, on_the_host, num_valid=3), "but 4 labels are valid"),
        (lambda: linear_cross_entropy(hidden, weight, labels, num_valid=5), "expected 0 to 4"),
        (lambda: linear_cross_entropy(hidden, weight, labels, chunk_rows=0), "expected at least 1"),
        (lambda: linear_cross_entropy(hidden, weight, labels, softcap=0.0), "expected a positive number"),
        (lambda: linear_cross_entropy(hidden, weight, labels, normaliser=-1.0), "expected a number of tokens"),
        (lambda: linear_cross_entropy(hidden, weight, labels, normaliser=torch.ones(1)), "not 0-dimensional"),
        (lambda: cross_entropy_rows_(torch.zeros(16, 4).t(), labels), "expected 1 in the last dimension"),
        (lambda: cross_entropy_rows_(torch.zeros(4, 16), labels[:2]), "labels have shape"),
        (lambda: cross_entropy_rows_(torch.zeros(4, 0), labels), "0 classes"),
        (lambda: cross_entropy_rows_(torch.zeros(4, 16), labels, softcap=-1.0), "softcap is -1.0"),
        (lambda: cross_entropy_rows_(torch.zeros(4, 16), labels, loss=torch.zeros(3)), r"loss is .* expected contig"),
        (lambda: cross_entropy_rows_(torch.zeros(64), labels), r"expected a floating-point \[C, V\]"),
        (lambda: cross_entropy_rows_(torch.zeros(4, 16), labels, padding=1), "padding is 1, but rows of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("num_valid", [None, 24])
def test_a_head_in_slabs_is_the_same_head_to_the_bit_wherever_it_lies(
    num_valid: int | None, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "SLAB_ROWS", 128)
    hidden, weight, labels = operands((40,), 24, 300, ignored=0.5)
    asked: list[tuple[int, int | None]] = []

    class Brought:
        shape = weight.shape

        def slab(self, index: int, then: int | None) -> Tensor:
            asked.append((index, then))
            return weight.split(128)[index].clone()

    options: dict[str, Any] = {"chunk_rows": 32, "num_valid": num_valid, "gradient": gradient}
    expected = linear_cross_entropy_forward(hidden.detach(), weight, labels, **options)
    found = linear_cross_entropy_forward(hidden.detach(), Brought(), labels, **options)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    # Up, and for the gradient down again: what was used last is at hand when the direction turns.
    one = [0, 1, 2, 2, 1, 0] if gradient else [0, 1, 2]
    order = one * (2 if num_valid is None else 1)
    assert [index for index, _ in asked] == order
    assert [then for _, then in asked] == [*order[1:], None]
    if gradient:
        loss, dhidden = oracle(hidden, weight, labels, normaliser=1.0)
        close(found[0], loss, 1e-6)
        assert found[3] is not None
        close(found[3], dhidden, 5e-6)
