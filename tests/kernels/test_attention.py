"""Every way to compute attention gives the definition's output and gradients, and packed documents stay apart."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graft_kernels import attention as module
from graft_kernels.attention import (
    BACKENDS,
    AttentionPlan,
    AttentionSaved,
    AttentionTensors,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    available_backends,
)

# No kernel of Triton's is in this op: bf16 is as good in an interpreting process as elsewhere.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

DENSE = [  # B, S, Hq, Hk, D
    (2, 37, 4, 4, 64),
    (1, 65, 8, 2, 80),
    (2, 33, 8, 1, 96),
    (1, 70, 32, 1, 128),
    (1, 40, 4, 1, 256),
    (3, 1, 4, 2, 64),
]
PACKED = [  # lengths, Hq, Hk, D
    ([1], 4, 1, 64),
    ([17], 4, 4, 64),
    ([5, 0, 12, 1], 8, 2, 80),
    ([0, 0, 9, 0], 8, 1, 96),
    ([64, 3, 61], 32, 1, 128),
    ([1, 1, 0, 1], 4, 1, 256),
]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def drawn(lead: tuple[int, ...], hq: int, hk: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a gradient of the output."""
    torch.manual_seed(sum(lead) + hq + d)
    q, k, v, dout = (torch.randn(*lead, heads, d, dtype=torch.float32) for heads in (hq, hk, hk, hq))
    return q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lengths: list[int],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> list[Tensor]:
    """Output and gradients for packed rows in float64, one token of one head of one document after another."""
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
    group, rows = q.shape[1] // k.shape[1], []
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            first = start if window is None else max(start, i - window + 1)
            heads = []
            for h in range(q.shape[1]):
                scores = k[first : i + 1, h // group] @ q[i, h] * (q.shape[2] ** -0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores - scores.max())
                heads.append((weights / weights.sum()) @ v[first : i + 1, h // group])
            rows.append(torch.stack(heads))
        start += length
    out = torch.stack(rows)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.cpu().double())]


def agree(ours: list[Tensor], expected: list[Tensor], dtype: torch.dtype, note: str) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        assert a.dtype == dtype, f"{note}: {name}"
        error = torch.linalg.vector_norm(a.cpu().double() - b.view(a.shape))
        norm = torch.linalg.vector_norm(b)
        # A document of one token has dq = dk = 0: then the whole is measured, not the ratio.
        assert error <= TOLERANCES[dtype] * max(norm, 1.0), f"{note}: {name} is off by {error / norm:.2e}"


def computed(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DENSE)
def test_a_dense_batch_agrees_with_the_oracle_on_every_backend(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, s, hq, hk, d = shape
    q, k, v, dout = drawn((b, s), hq, hk, d, dtype)
    expected = oracle(*(x.flatten(0, 1) for x in (q, k, v, dout)), [s] * b)
    for backend in available_backends(q, k):
        agree(computed(q, k, v, dout, backend=backend), expected, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "hq", "hk", "d"), PACKED)
def test_packed_documents_agree_with_the_oracle_on_every_backend(
    lengths: list[int], hq: int, hk: int, d: int, dtype: torch.dtype
) -> None:
    q, k, v, dout = drawn((sum(lengths),), hq, hk, d, dtype)
    expected = oracle(q, k, v, dout, lengths)
    pack = {"cu_seqlens": offsets(lengths), "max_seqlen": max(lengths)}
    for backend in available_backends(q, k, packed=True):
        agree(computed(q, k, v, dout, backend=backend, **pack), expected, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (7, None), (1000, None), (None, 5.0), (9, 2.0)])
def test_windows_and_softcaps_agree_with_the_oracle_on_every_backend(
    window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    lengths, extra = [30, 0, 1, 26], {"window": window, "softcap": softcap, "scale": 0.3}
    q, k, v, dout = drawn((sum(lengths),), 4, 2, 64, dtype)
    pack = {"cu_seqlens": offsets(lengths), "max_seqlen": max(lengths)}
    expected = oracle(q, k, v, dout, lengths, window, softcap, 0.3)
    for backend in available_backends(q, k, packed=True, window=window, softcap=softcap):
        agree(computed(q, k, v, dout, backend=backend, **pack, **extra), expected, dtype, backend)
    q, k, v, dout = (x.view(3, 19, *x.shape[1:]) for x in (q, k, v, dout))
    expected = oracle(*(x.flatten(0, 1) for x in (q, k, v, dout)), [19] * 3, window, softcap, 0.3)
    for backend in available_backends(q, k, window=window, softcap=softcap):
        agree(computed(q, k, v, dout, backend=backend, **extra), expected, dtype, backend)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, 3.0)])
def test_the_definition_agrees_with_the_oracle(window: int | None, softcap: float | None) -> None:
    lengths = [5, 0, 8]
    q, k, v, dout = drawn((13,), 4, 2, 8, torch.float64)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = {"window": window, "softcap": softcap}
    for cu_seqlens, lead, given in ((offsets(lengths), (13,), lengths), (None, (1, 13), [13])):
        out = attention_reference(*(x.view(*lead, *x.shape[1:]) for x in (q, k, v)), cu_seqlens, **options)
        ours = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.view_as(out))]
        agree(ours, oracle(q, k, v, dout, given, window, softcap), torch.float64, "definition")


@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 2]])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (None, 1.5)])
def test_gradcheck_in_float64(lengths: list[int] | None, window: int | None, softcap: float | None) -> None:
    q, k, v, _ = drawn((6,) if lengths else (1, 6), 4, 2, 3, torch.float64)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    pack = {"cu_seqlens": offsets(lengths), "max_seqlen": 3} if lengths else {}
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, window=window, softcap=softcap, **pack), (q, k, v)
    )


def test_small_blocks_change_nothing_but_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks smaller than a document and than the window, so that every border between blocks is crossed.
    lengths = [41, 0, 23]
    q, k, v, dout = drawn((64,), 4, 2, 16, torch.float64)
    monkeypatch.setattr(module, "REFERENCE_ROWS", (5, 5))
    for window, softcap in ((None, None), (3, None), (11, 2.0)):
        pack = {"cu_seqlens": offsets(lengths), "max_seqlen": 50, "window": window, "softcap": softcap}
        agree(computed(q, k, v, dout, **pack), oracle(q, k, v, dout, lengths, window, softcap), torch.float64, "blocks")


def test_no_document_learns_of_another() -> None:
    lengths = [40, 50, 30]
    q, k, v, dout = drawn((120,), 8, 2, 64, torch.bfloat16)
    others = drawn((40,), 8, 2, 64, torch.bfloat16)
    pack = {"cu_seqlens": offsets(lengths), "max_seqlen": 50, "deterministic": True}
    for backend in available_backends(q, k, packed=True, deterministic=True):
        before = computed(q, k, v, dout, backend=backend, **pack)
        changed = [torch.cat((other * 3, x[40:])) for x, other in zip((q, k, v, dout), others, strict=True)]
        after = computed(*changed, backend=backend, **pack)
        for name, a, b in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
            assert torch.equal(a[40:], b[40:]), f"{backend}: {name}"
            assert not torch.equal(a[:40], b[:40]), f"{backend}: {name}"


def test_what_is_not_a_number_stays_in_its_document(device: str) -> None:
    lengths = [40, 50]
    q, k, v, dout = drawn((90,), 4, 2, 64, torch.float16)
    pack = {"cu_seqlens": offsets(lengths), "max_seqlen": 50}
    for x in (q, k, v):
        x[3] = torch.nan
    for backend in available_backends(q, k, packed=True):
        if backend == "reference" and device != "cpu":
            continue  # there a mask separates the documents, and 0 times NaN is NaN
        for result in computed(q, k, v, dout, backend=backend, **pack):
            assert result[:40].isnan().any(), backend
            assert not result[40:].isnan().any(), backend


def test_a_pack_equals_its_documents_one_by_one() -> None:
    lengths = [33, 1, 0, 60]
    q, k, v, dout = drawn((94,), 8, 2, 64, torch.float16)
    pack = {"cu_seqlens": offsets(lengths), "max_seqlen": 60}
    for backend in available_backends(q, k, packed=True):
        together = computed(q, k, v, dout, backend=backend, **pack)
        bounds = itertools.pairwise(offsets(lengths).tolist())
        alone = [computed(*(x[None, a:b] for x in (q, k, v, dout)), backend=None) for a, b in bounds if a < b]
        agree(
            together, [torch.cat(parts, dim=1).double().cpu() for parts in zip(*alone, strict=True)], q.dtype, backend
        )


def test_a_longer_max_seqlen_than_needed_is_only_a_bound() -> None:
    q, k, v, dout = drawn((20,), 4, 2, 64, torch.float16)
    expected = oracle(q, k, v, dout, [12, 8])
    for backend in available_backends(q, k, packed=True):
        ours = computed(q, k, v, dout, backend=backend, cu_seqlens=offsets([12, 8]), max_seqlen=4096)
        agree(ours, expected, q.dtype, backend)


def test_deterministic_means_the_same_to_the_bit(device: str) -> None:
    size = 1024 if device == "cuda" else 48
    lengths = [size // 2, size // 4 + 3, 0, size // 4 - 3]
    # Small batches come out the same from backends that promise nothing.
    long = 8 * size
    for lead, pack in (
        ((2, size), {}),
        ((1, long), {}),
        ((size,), {"cu_seqlens": offsets(lengths), "max_seqlen": size // 2}),
    ):
        for d, window in ((64, None), (128, None), (256, None), (128, 16)):
            q, k, v, dout = drawn(lead, 8, 2, d, torch.bfloat16)
            for backend in available_backends(q, k, packed=bool(pack), deterministic=True, window=window):
                options = {"backend": backend, "window": window, **pack}
                # First without: a plan kept from that call must not be taken for the others.
                computed(q, k, v, dout, **options)
                first, *rest = (computed(q, k, v, dout, deterministic=True, **options) for _ in range(3))
                for other in rest:
                    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), (backend, d, window)


def switches() -> tuple[int, bool]:
    settings: Any = torch.utils.deterministic
    return torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory


def test_the_deterministic_switch_is_put_back_even_after_an_exception(device: str) -> None:
    q, k, v, dout = drawn((6,), 4, 2, 64, torch.float16)
    before = switches()
    computed(q, k, v, dout, cu_seqlens=offsets([2, 4]), max_seqlen=4, deterministic=True)
    assert switches() == before
    with module._deterministic(True):
        assert switches() == (2, False)
    assert switches() == before
    q, k, v, dout = (x.cpu() for x in (q, k, v, dout))
    plan = AttentionPlan("varlen", 1.0, 6, None, None, deterministic=True)
    tensors = AttentionTensors(q, k, v, q, torch.zeros(4, 6, device="cpu"), offsets([6]).cpu())
    with pytest.raises((NotImplementedError, RuntimeError)):  # there is no such kernel on the CPU
        attention_backward(dout, AttentionSaved(tensors, plan))
    assert switches() == before


def test_torchs_own_switch_implies_deterministic() -> None:
    q, k, v, _ = drawn((1, 6), 4, 2, 64, torch.float16)
    assert not attention_forward(q, k, v)[1].plan.deterministic
    with module._deterministic(True):
        assert attention_forward(q, k, v)[1].plan.deterministic


def chosen(q: Tensor, k: Tensor, **options: Any) -> str:
    return available_backends(q, k, **options)[0]


def test_the_choice_is_visible(device: str) -> None:
    dense, packed = torch.zeros(1, 8, 4, 64, dtype=torch.bfloat16), torch.zeros(8, 4, 64, dtype=torch.bfloat16)
    choices = {
        "dense": chosen(dense, dense),
        "dense, deterministic": chosen(dense, dense, deterministic=True),
        "packed": chosen(packed, packed, packed=True),
        "float64": chosen(dense.double(), dense.double()),
        "float32": chosen(dense.float(), dense.float()),
        "odd size": chosen(dense[..., :63], dense[..., :63]),
        "none": chosen(dense[:0], dense[:0]),
    }
    on_a_card = device == "cuda"
    hopper = on_a_card and torch.cuda.get_device_capability()[0] in (9, 10)
    expected = {
        "dense": "cudnn" if hopper else "flash" if on_a_card else "reference",
        "dense, deterministic": "flash" if on_a_card else "reference",
        "packed": "varlen" if on_a_card else "reference",
        "float64": "reference",
        "float32": "reference",
        "odd size": "reference",
        "none": "reference",
    }
    for case, backend in expected.items():
        assert choices[case] == backend, case
    assert chosen(dense, dense, window=4) == ("flash" if on_a_card else "reference")
    assert chosen(dense, dense, softcap=4.0) in ("flash_attn", "reference")
    assert attention_forward(dense, dense, dense)[1].plan.backend == choices["dense"]
    assert set(choices.values()) <= set(BACKENDS)


def test_a_backend_that_cannot_is_refused_with_the_reason() -> None:
    q, packed = torch.zeros(1, 8, 4, 64, device="cpu"), torch.zeros(8, 4, 64, device="cpu")
    pack = {"cu_seqlens": offsets([8]).cpu(), "max_seqlen": 8}
    for call, message in (
        (lambda: attention(q, q, q, backend="cudnn"), "'cudnn': it takes fp16 and bf16 on a CUDA device"),
        (
            lambda: attention(q, q, q, backend="cudnn", deterministic=True),
            "'cudnn': PyTorch has no backward of it that",
        ),
        (lambda: attention(q, q, q, backend="varlen"), "'varlen': it does packed documents only"),
        (lambda: attention(packed, packed, packed, backend="cudnn", **pack), "'cudnn': it does dense batches only"),
        (lambda: attention(packed, packed, packed, backend="flash", **pack), "'flash': it does dense batches only"),
        (lambda: attention(q, q, q, backend="xformers"), "none of this name"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_direct_calls_fit_the_schemas_of_this_torch() -> None:
    # On the meta device every argument is bound and every shape computed; only the arithmetic is missing.
    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    for window in (None, 5):
        plan = AttentionPlan("flash", 0.1, 16, window, None, deterministic=False)
        for q, k, cu in (
            (meta(2, 16, 8, 64), meta(2, 16, 2, 64), None),
            (meta(40, 8, 64), meta(40, 2, 64), cu_seqlens),
        ):
            saved = module._torch_flash_forward(q, k, k, cu, plan)
            grads = module._torch_flash_backward(saved.out, saved, plan)
            assert saved.out.shape == q.shape
            assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    q, k = meta(2, 16, 8, 64), meta(2, 16, 2, 64)
    saved = module._cudnn_forward(q, k, k, None, plan)
    grads = module._cudnn_backward(saved.out, saved, plan)
    assert saved.out.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


def flash_attn_like() -> Any:
    """The flash-attn package's four calls with its parameter names, computed by the definition."""

    def compute(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, options: dict[str, Any]) -> Tensor:
        assert options["window_size_right"] == 0
        assert options["causal"] is True
        assert (options["dropout_p"], options["alibi_slopes"]) == (0.0, None)
        window = None if options["window_size_left"] == -1 else options["window_size_left"] + 1
        softcap = options["softcap"] or None
        return attention_reference(q, k, v, cu, scale=options["softmax_scale"], window=window, softcap=softcap)

    names = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

    def forward(expected: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        assert set(options) == {*expected, "return_softmax"}
        return compute(q, k, v, options.get("cu_seqlens_q"), options), q.new_zeros(1), None, None

    def backward(expected: tuple[str, ...], tensors: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        assert set(options) == {*expected, "deterministic", "rng_state"}
        dout, q, k, v, _, _, *grads = tensors
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            out = compute(q, k, v, options.get("cu_seqlens_q"), options)
            for into, grad in zip(grads, torch.autograd.grad(out, (q, k, v), dout), strict=True):
                into.copy_(grad)

    return SimpleNamespace(
        _flash_attn_forward=lambda q, k, v, **o: forward(names, q, k, v, o),
        _flash_attn_varlen_forward=lambda q, k, v, **o: forward((*names, *lengths), q, k, v, o),
        _flash_attn_backward=lambda *tensors, **o: backward(names, tensors, o),
        _flash_attn_varlen_backward=lambda *tensors, **o: backward((*names, *lengths), tensors, o),
    )


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, 3.0)])
def test_the_flash_attn_package_is_called_by_its_names(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_flash_attn", flash_attn_like)
    monkeypatch.setattr(module, "_misfit", lambda name, *args, **options: "" if name == "flash_attn" else "no")
    q, k, v, dout = drawn((14,), 4, 2, 16, torch.float32)
    options = {"window": window, "softcap": softcap, "deterministic": True}
    ours = computed(q, k, v, dout, cu_seqlens=offsets([9, 5]), max_seqlen=9, **options)
    agree(ours, oracle(q, k, v, dout, [9, 5], window, softcap), q.dtype, "packed")
    ours = computed(q[None], k[None], v[None], dout[None], **options)
    agree(ours, oracle(q, k, v, dout, [14], window, softcap), q.dtype, "dense")


def test_more_tokens_than_flash_attention_can_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_misfit", lambda *args, **options: "")

    def call(tokens: int, heads: int, d: int, backend: str) -> object:
        q = torch.empty(1, tokens, heads, d, dtype=torch.bfloat16, device="meta")
        if backend == "varlen":
            cu_seqlens = torch.empty(2, dtype=torch.int32, device="meta")
            return attention_forward(q[0], q[0], q[0], cu_seqlens=cu_seqlens, max_seqlen=tokens, backend=backend)
        return attention_forward(q, q, q, backend=backend)

    for tokens, heads, d, backend in (
        (2**19, 32, 128, "flash"),
        (2**19 - 128, 32, 128, "varlen"),  # 128 rows more for each document
        (2**19, 32, 100, "varlen"),  # counted as 128
        (2**19, 16, 200, "varlen"),  # counted as 256
    ):
        with pytest.raises(ValueError, match="counts them in 32 bits"):
            call(tokens, heads, d, backend)
        call(tokens - 129, heads, d, backend)
    call(2**19, 32, 128, "cudnn")


def test_strided_operands_are_as_good_as_contiguous_ones() -> None:
    hq, hk, d = 4, 2, 64
    for dtype in (torch.float32, torch.float16):
        qkv = torch.randn(2, 21, (hq + 2 * hk) * d, dtype=dtype)
        q, k, v = (x.unflatten(-1, (-1, d)) for x in qkv.split([hq * d, hk * d, hk * d], dim=-1))
        dout = torch.randn(2, 21, hq, d, dtype=dtype)
        for backend in available_backends(q, k):
            deterministic = backend in available_backends(q, k, deterministic=True)
            options = {"backend": backend, "deterministic": deterministic}
            plain = computed(*(x.contiguous() for x in (q, k, v, dout)), **options)
            out, saved = attention_forward(q, k, v, **options)
            assert saved.tensors[0].data_ptr() == q.data_ptr(), "a column slice is taken as it is"
            agree([out, *attention_backward(dout, saved)], [x.cpu().double() for x in plain], dtype, backend)
            turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]  # the last dimension strided
            out, saved = attention_forward(*turned, **options)
            spread = dout.transpose(1, 2).contiguous().transpose(1, 2)
            agree([out, *attention_backward(spread, saved)], [x.cpu().double() for x in plain], dtype, backend)


def test_a_gradient_that_is_one_number_spread_out_is_taken() -> None:
    q, k, v, _ = drawn((2, 9), 4, 2, 64, torch.float16)
    expected = oracle(*(x.flatten(0, 1) for x in (q, k, v, torch.ones_like(q))), [9, 9])
    for backend in available_backends(q, k):
        agree(computed(q, k, v, torch.ones(()).to(q).expand_as(q), backend=backend), expected, q.dtype, backend)


@pytest.mark.parametrize("lead", [(0, 5), (2, 0), (0,)])
def test_no_tokens_no_output(lead: tuple[int, ...]) -> None:
    pack = {"cu_seqlens": offsets([0, 0]), "max_seqlen": 0} if len(lead) == 1 else {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k = torch.zeros(*lead, 4, 64, dtype=dtype), torch.zeros(*lead, 2, 64, dtype=dtype)
        shapes = [x.shape for x in computed(q, k, k, q, **pack)]
        assert shapes == [q.shape, q.shape, k.shape, k.shape]


def test_large_scores_do_not_overflow() -> None:
    q, k, v, dout = drawn((20,), 4, 2, 64, torch.float32)
    pack = {"cu_seqlens": offsets([20]), "max_seqlen": 20}
    expected = oracle(q * 300, k, v, dout, [20])
    out, *grads = computed(q * 300, k, v, dout, **pack)
    assert torch.linalg.vector_norm(out.cpu().double() - expected[0]) <= 1e-4 * torch.linalg.vector_norm(expected[0])
    assert all(grad.isfinite().all() for grad in grads)


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    q, k, v, _ = drawn((1, 256), 4, 2, 16, torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(q, k, v)
    assert sum(kept) == 2 * q.numel() + 2 * k.numel() + 256 * 4


def test_only_the_asked_gradients_come() -> None:
    q, k, v, dout = drawn((1, 9), 4, 2, 16, torch.float32)
    k.requires_grad_()
    out = attention(q, k, v)
    out.backward(dout)
    assert k.grad is not None
    assert q.grad is None
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


def test_a_second_derivative_is_refused() -> None:
    q, k, v, _ = drawn((1, 5), 4, 2, 8, torch.float32)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operands_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(2, 6, 4, 8, device="cpu"), torch.zeros(2, 6, 2, 8, device="cpu")
    p, cu = torch.zeros(6, 4, 8, device="cpu"), offsets([2, 4]).cpu()

    def packed(cu_seqlens: Tensor, max_seqlen: int | None = 4) -> Tensor:
        return attention(p, p, p, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)

    for call, message in (
        (lambda: attention(q[:, :, :3], k, k), "3 query heads do not divide among 2 key heads"),
        (lambda: attention(k, q, q), "2 query heads do not divide among 4"),
        (lambda: attention(q, k, q), "k and v alike"),
        (lambda: attention(q[0], k[0], k[0]), r"expected \[B, S, H, D\]"),
        (lambda: attention(q, k, k, cu_seqlens=cu, max_seqlen=4), "with cu_seqlens"),
        (lambda: attention(q, k[:, :5], k[:, :5]), "more than their heads"),
        (lambda: attention(q, k[..., :7], k[..., :7]), "more than their heads"),
        (lambda: attention(q, k.half(), k.half()), "one floating-point dtype"),
        (lambda: attention(q.int(), k.int(), k.int()), "one floating-point dtype"),
        (lambda: attention(q, k.to("meta"), k.to("meta")), "one device"),
        (lambda: attention(q, k, k, window=0), "window is 0"),
        (lambda: attention(q, k, k, softcap=0.0), "softcap is 0.0"),
        (lambda: attention(q, k, k, max_seqlen=6), "max_seqlen goes with cu_seqlens"),
        (lambda: packed(cu.long()), "expected int32"),
        (lambda: packed(cu[:1]), "expected int32"),
        (lambda: packed(cu.to("meta")), "cu_seqlens lies on meta"),
        (lambda: packed(cu, None), "max_seqlen is None"),
        (lambda: packed(cu, 0), "max_seqlen is 0"),
        (lambda: packed(cu, 3), "a document has 4 tokens"),
        (lambda: packed(offsets([2, 3]).cpu()), "expected 0 to 6"),
        (lambda: packed(offsets([5, -1, 2]).cpu(), 6), "rising"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    out, saved = attention_forward(q, k, k)
    with pytest.raises(ValueError, match="but the output was"):
        attention_backward(out[:1], saved)
