"""How fast every op of this package is on the card at hand, beside plain PyTorch, torch.compile and the peers.

    python -m graft_kernels.bench [op ...] [--out FILE.csv] [--quick] [--no-compile]

Shapes are those of an 8B model: T tokens, H = 4,096, I = 14,336, 32 query and 8 key heads of 128, V = 128,256, NF4
weights, adapters of rank 16, bf16. A line gives the median and the 20th and 80th percentile of the time, with the L2
cache cleared before every call, and the share of what the card can do: the larger of bytes over its copy rate and
floating-point operations over its matmul rate, both measured at the start, divided by the time.

Providers: "graft" and "graft: ..." are this package; "eager" is the same in plain PyTorch, as transformers and PEFT
write it; "torch.compile" is that, compiled; the others are what is installed of Liger, bitsandbytes and Unsloth. A
provider that fails gets a line that says how.

The op "lora_overhead" says what adapters add to a linear layer: the time of the kernel beside it and of its product,
with adapters less without, in percent of the product alone. All that adapters need is counted, but dA and dB.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

H, I, HEADS, KEY_HEADS, D, V, RANK = 4096, 14336, 32, 8, 128, 128256, 16  # noqa: E741
ODD_V = 32001  # classes where a token was added to the vocabulary
TOKENS = (2048, 8192, 16384)
FEW_TOKENS = (16, 64, 128, 256, 272, 320, 384, 512, 640)
DTYPE = torch.bfloat16
DEVICE = "cuda"
EPS = 1e-5
PEERS = ("liger-kernel", "bitsandbytes", "unsloth", "flash-attn")
COLUMNS = (
    *("card", "driver", "torch", "triton", "peers", "commit"),
    *("op", "shape", "dtype", "direction", "provider", "ms", "p20", "p80", "roofline", "overhead", "note"),
)
BASE = "base product"  # what overheads are a part of
CACHE_BYTES = 2**28  # several times any L2 cache

Call = Callable[[], object]
Provider = Callable[[], Call]  # makes what is to be timed; may raise NotInstalled
Function = Callable[..., Any]


class NotInstalled(Exception):
    """A peer is not there: no failure."""


class Case(NamedTuple):
    """One thing to compute, and who computes it."""

    op: str
    shape: str
    direction: str
    providers: dict[str, Provider]
    nbytes: int = 0  # that have to be moved
    flops: int = 0  # that have to be done
    # Of which provider over which, in parts of BASE. Given, empty or not, all are timed in turns.
    overhead: dict[str, str] | None = None
    graphs: bool = True  # in turns; False where a peer waits for the card, which no graph can


class Options(NamedTuple):
    """What of the command line the ops need."""

    compile: bool = True


def draw(*shape: int, grad: bool = False) -> Tensor:
    """Normal numbers in bf16 on the card."""
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE).requires_grad_(grad)


def peer(module: str, name: str) -> Any:
    """A name of a package that need not be installed. By string, because this package depends on none of them."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(package)
    importlib.import_module(package)  # Unsloth's modules want it whole before any of them
    return getattr(importlib.import_module(module), name)


def timed(function: Function, *args: Any, **options: Any) -> Provider:
    """The provider of one call."""
    return lambda: partial(function, *args, **options)


def forward_of(make: Callable[[], Function], *inputs: Tensor) -> Provider:
    """The forward of a function that autograd knows, as in training."""
    return lambda: partial(make(), *_fresh(inputs))


def backward_of(make: Callable[[], Function], *inputs: Tensor) -> Provider:
    """Its backward alone."""

    def provide() -> Call:
        operands = _fresh(inputs)
        result = make()(*operands)
        outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if isinstance(out, Tensor)]
        leaves = [x for x in operands if x.requires_grad]
        douts = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, douts, retain_graph=True)

    return provide


def _fresh(inputs: Sequence[Tensor]) -> list[Tensor]:
    # Operands of their own, because Liger's and Unsloth's backward writes into what the forward kept.
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]


def others_of(
    eager: Function, inputs: Sequence[Tensor], options: Options, **peers: Callable[[], Function]
) -> tuple[dict[str, Provider], dict[str, Provider]]:
    """Forward and backward providers of plain PyTorch, compiled as well unless that is off, and of the peers."""
    makes: dict[str, Callable[[], Function]] = {"eager": lambda: eager}
    if options.compile:
        makes["torch.compile"] = lambda: torch.compile(eager)
    makes |= peers
    return (
        {name: forward_of(make, *inputs) for name, make in makes.items()},
        {name: backward_of(make, *inputs) for name, make in makes.items()},
    )


# One function per op, for T tokens. The package's modules are imported inside, so that one op can be timed alone.


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers has it for Llama."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def eager_residual_norm_product(
    x: Tensor, residual: Tensor, weight: Tensor, lora_a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer does around the norm."""
    z = x + residual
    y = eager_rms_norm(z, weight)
    return y, z, F.linear(y, lora_a)


def rms_norm(tokens: int, options: Options) -> Iterator[Case]:
    """The norm alone, and with the residual and the adapter's product that a layer wants of it."""
    from graft_kernels.rms_norm import rms_norm_backward, rms_norm_forward

    def liger() -> Function:
        function = peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
        return lambda x, weight: function.apply(x, weight, EPS)

    def unsloth() -> Function:
        function = peer("unsloth.kernels.rms_layernorm", "Fast_RMS_Layernorm")
        return lambda x, weight: function.apply(x, weight, EPS, False)

    x, weight, residual, lora_a, dy = draw(tokens, H), draw(H), draw(tokens, H), draw(RANK, H), draw(tokens, H)
    inputs = (x.clone().requires_grad_(), weight)
    forward, backward = others_of(eager_rms_norm, inputs, options, liger=liger, unsloth=unsloth)
    _, z, rho = rms_norm_forward(x, weight, EPS)
    shape, size = f"{tokens}x{H}", tokens * H * DTYPE.itemsize
    yield Case("rms_norm", shape, "forward", {"graft": timed(rms_norm_forward, x, weight, EPS)} | forward, 2 * size)
    ours = {"graft": timed(rms_norm_backward, dy, z, weight, rho)}
    yield Case("rms_norm", shape, "backward", ours | backward, 3 * size)
    forward, _ = others_of(eager_residual_norm_product, (x, residual, weight, lora_a), options)
    fused = timed(
        rms_norm_forward, x, weight, EPS, residual=residual, z_out=torch.empty_like(x), lora_a=lora_a, scale=2.0
    )
    yield Case("rms_norm", f"{shape} + residual, rank {RANK}", "forward", {"graft": fused} | forward, 4 * size)


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up."""
    return F.silu(gate) * up


def swiglu(tokens: int, options: Options) -> Iterator[Case]:
    """silu(gate)·up; the backward can rebuild it beside, and Unsloth's always does."""
    from graft_kernels.swiglu import swiglu_backward, swiglu_forward

    def liger() -> Function:
        function = peer("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
        return lambda gate, up: function.apply(gate, up)

    gate, up, dh = draw(tokens, I), draw(tokens, I), draw(tokens, I)
    inputs = (gate.clone().requires_grad_(), up.clone().requires_grad_())
    forward, backward = others_of(eager_swiglu, inputs, options, liger=liger)
    forward["unsloth"] = lambda: partial(peer("unsloth.kernels.swiglu", "swiglu_fg_kernel"), gate[None], up[None])
    backward["unsloth: h too"] = lambda: partial(
        peer("unsloth.kernels.swiglu", "swiglu_DWf_DW_dfg_kernel"), dh.clone(), gate.clone(), up.clone()
    )
    shape, size = f"{tokens}x{I}", tokens * I * DTYPE.itemsize
    yield Case("swiglu", shape, "forward", {"graft": timed(swiglu_forward, gate, up)} | forward, 3 * size)
    outputs = {"dgate": torch.empty_like(gate), "dup": torch.empty_like(gate)}
    ours = {
        "graft": timed(swiglu_backward, dh, gate, up, **outputs),
        "graft: h too": timed(swiglu_backward, dh, gate, up, **outputs, h=torch.empty_like(gate)),
    }
    yield Case("swiglu", shape, "backward", ours | backward, 5 * size)


def adapter_grads(tokens: int, options: Options) -> Iterator[Case]:
    """dB of gate and up, from a gradient [T, 2I]; dA of q, k and v, of a normed input [T, H]."""
    from graft_kernels.adapter_grads import sum_over_tokens
    from graft_kernels.lora_linear import product

    del options
    dy, s, z, ds = (draw(tokens, size) for size in (2 * I, 2 * RANK, H, 3 * RANK))
    rho, w = torch.rand(tokens, device=DEVICE), draw(H)
    db = [torch.zeros(I, RANK, device=DEVICE) for _ in range(2)]
    da = torch.zeros(3 * RANK, H, device=DEVICE)

    def eager_b() -> None:
        for i, out in enumerate(db):
            dy_i, s_i = dy[:, i * I : (i + 1) * I], s[:, i * RANK : (i + 1) * RANK]
            out.add_(product(dy_i.t(), s_i, torch.float32))

    def eager_a() -> None:
        da.addcmul_(product((ds * rho[:, None]).to(z.dtype).t(), z, torch.float32), w)

    ours_b = timed(sum_over_tokens, db, dy, s, add=True)
    ours_a = timed(sum_over_tokens, [da], z, ds, add=True, transposed=True, norm=(rho, w, False))
    size = tokens * DTYPE.itemsize
    shape = f"{tokens}x{2 * I} rank {RANK}"
    yield Case("adapter_grads", shape, "dB", {"graft": ours_b, "eager": timed(eager_b)}, size * (2 * I + 2 * RANK))
    shape = f"{tokens}x{H} rank {3 * RANK}"
    yield Case("adapter_grads", shape, "dA", {"graft": ours_a, "eager": timed(eager_a)}, size * (H + 3 * RANK))


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers has it."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def rope(tokens: int, options: Options) -> Iterator[Case]:
    """The rotation of q and k."""
    from graft_kernels.rope import rope_backward, rope_forward, rope_table

    def liger() -> Function:
        function = peer("liger_kernel.ops.rope", "LigerRopeFunction")

        def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            q_BHSD, k_BHSD = (x[None].transpose(1, 2) for x in (q, k))
            return function.apply(q_BHSD, k_BHSD, cos[:, 0][None], sin[:, 0][None])

        return call

    q, k = draw(tokens, HEADS, D), draw(tokens, KEY_HEADS, D)
    positions = torch.arange(tokens, device=DEVICE, dtype=torch.int32)
    table = rope_table(D, tokens, theta=500000.0, device=DEVICE)
    cos, sin = (torch.cat((x, x), dim=-1)[:, None].to(DTYPE) for x in table)
    inputs = (q.clone().requires_grad_(), k.clone().requires_grad_(), cos, sin)
    forward, backward = others_of(eager_rope, inputs, options, liger=liger)
    shape, size = f"{tokens}x({HEADS}+{KEY_HEADS})x{D}", tokens * (HEADS + KEY_HEADS) * D * DTYPE.itemsize
    for direction, function, others in (("forward", rope_forward, forward), ("backward", rope_backward, backward)):
        ours = {
            "graft": timed(function, q, k, *table, positions),
            "graft: in place": timed(function, q, k, *table, positions, out=(q, k)),
        }
        yield Case("rope", shape, direction, ours | others, 2 * size)


def eager_rope_qkv(qkv_s: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The adapters' update added, q and k rotated."""
    rank, width = b.shape
    y = qkv_s[:, :width] + qkv_s[:, width : width + rank] @ b
    q, k, v = (part.unflatten(1, (-1, D)) for part in y.split([HEADS * D, KEY_HEADS * D, KEY_HEADS * D], dim=1))
    return *eager_rope(q, k, cos, sin), v


def rope_qkv(tokens: int, options: Options) -> Iterator[Case]:
    """The rotation of q and k in rows [q | k | v | S], with the adapters' update of all three."""
    from graft_kernels.rope import rope_table
    from graft_kernels.rope_qkv import rope_qkv_backward, rope_qkv_forward_

    sizes, ranks = (HEADS * D, KEY_HEADS * D, KEY_HEADS * D), (RANK, RANK, RANK)
    b = torch.block_diag(*(draw(RANK, size) * 0.02 for size in sizes))
    width, p = sum(sizes), 64 * -(-sum(ranks) // 64)
    qkv_s = draw(tokens, width + p)
    positions = torch.arange(tokens, device=DEVICE, dtype=torch.int32)
    table = rope_table(D, tokens, theta=500000.0, device=DEVICE)
    cos, sin = (torch.cat((x, x), dim=-1)[:, None].to(DTYPE) for x in table)
    forward, backward = others_of(eager_rope_qkv, (qkv_s.clone().requires_grad_(), b, cos, sin), options)
    # In place, again and again: the rotation keeps the numbers' size, the small update hardly adds to it.
    ours = timed(rope_qkv_forward_, qkv_s, HEADS, KEY_HEADS, D, *table, positions, b=b * 1e-3, ranks=ranks)
    shape, nbytes = f"{tokens}x({HEADS}+2*{KEY_HEADS})x{D} rank {RANK}", 2 * tokens * (width + p // 2) * DTYPE.itemsize
    yield Case("rope_qkv", shape, "forward", {"graft": ours} | forward, nbytes)
    gradients = (draw(tokens, heads, D) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    ours = timed(rope_qkv_backward, *gradients, *table, positions, b=b, ranks=ranks, p=p)
    yield Case("rope_qkv", shape, "backward", {"graft": ours} | backward, nbytes)


def eager_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at a time, in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def cross_entropy(tokens: int, options: Options) -> Iterator[Case]:
    """The head's product and the loss, with the gradient of the hidden states; also of an odd number of classes."""
    for classes in (V, ODD_V):
        yield _cross_entropy_case(tokens, classes, options)


def _cross_entropy_case(tokens: int, classes: int, options: Options) -> Case:
    from graft_kernels.cross_entropy import linear_cross_entropy

    hidden, weight = draw(tokens, H, grad=True), draw(classes, H) * 0.02
    labels = torch.randint(classes, (tokens,), device=DEVICE)

    def liger() -> Function:
        function = peer("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")

        def call(*arguments: Tensor) -> Any:
            result = function.apply(*arguments)
            return result[0] if isinstance(result, tuple) else result

        return call

    def both(make: Callable[[], Function]) -> Provider:
        def provide() -> Call:
            function = make()
            return lambda: torch.autograd.grad(function(hidden, weight, labels), hidden)

        return provide

    def products() -> Call:
        logits, dhidden = draw(tokens, classes), torch.empty_like(hidden)

        def call() -> None:
            torch.mm(hidden.detach(), weight.t(), out=logits)
            torch.mm(logits, weight, out=dhidden)

        return call

    providers = {"graft": both(lambda: lambda *arguments: linear_cross_entropy(*arguments).loss)}
    providers["its two products alone"] = products
    providers["eager"] = both(lambda: eager_cross_entropy)
    if options.compile:
        providers["torch.compile"] = both(lambda: torch.compile(eager_cross_entropy))
    providers["liger"] = both(liger)
    shape, flops = f"{tokens}x{H}x{classes}", 4 * tokens * H * classes
    return Case("cross_entropy", shape, "forward+backward", providers, flops=flops, overhead={}, graphs=False)


def adamw(tokens: int, options: Options) -> Iterator[Case]:
    """Clip and step for the adapters of all seven linears in 32 layers: 448 tensors, 42 M parameters."""
    from graft_kernels.adamw import AdamW

    sizes = [(H, H), (KEY_HEADS * D, H), (KEY_HEADS * D, H), (H, H), (I, H), (I, H), (H, I)] * 32
    count = sum(RANK * (n + k) for n, k in sizes)

    def parameters() -> list[Tensor]:
        made = []
        for shape in (shape for n, k in sizes for shape in ((RANK, k), (n, RANK))):
            parameter = torch.randn(shape, device=DEVICE, requires_grad=True)
            parameter.grad = torch.randn_like(parameter)
            made.append(parameter)
        return made

    def ours(bits: int) -> Provider:
        return lambda: partial(AdamW(parameters(), state_bits=bits).step, max_norm=1.0)

    def other(make: Callable[[list[Tensor]], Any]) -> Provider:
        def provide() -> Call:
            held = parameters()
            optimizer = make(held)

            def call() -> None:
                torch.nn.utils.clip_grad_norm_(held, 1.0)
                optimizer.step()

            return call

        return provide

    full = {
        "graft": ours(32),
        "torch fused": other(lambda held: torch.optim.AdamW(held, fused=True)),
        "eager": other(lambda held: torch.optim.AdamW(held, foreach=True)),
    }
    shape = f"{count} in {2 * len(sizes)} tensors"
    # Gradients are read twice (for the norm, for the update); parameters and states once, and written.
    yield Case("adamw", f"{shape}, fp32 states", "clip+step", full, 32 * count)
    small = {
        "graft": ours(8),
        "bitsandbytes": other(lambda held: peer("bitsandbytes.optim", "AdamW8bit")(held, lr=1e-3)),
        "bitsandbytes: paged": other(lambda held: peer("bitsandbytes.optim", "PagedAdamW8bit")(held, lr=1e-3)),
    }
    yield Case("adamw", f"{shape}, 8-bit states", "clip+step", small, 20 * count)


def random_nf4(n: int, k: int) -> Any:
    """A weight of random bytes with sane scales."""
    from graft_kernels.nf4 import NF4Weight

    def bytes_of(count: int) -> Tensor:
        return torch.randint(256, (count,), device=DEVICE, dtype=torch.uint8)

    return NF4Weight(
        packed=bytes_of(n * k // 2),
        shape=(n, k),
        blocksize=64,
        absmax=bytes_of(n * k // 64),
        code2=torch.rand(256, device=DEVICE) * 0.02,
        absmax2=torch.ones(-(-n * k // 64 // 256), device=DEVICE),
        offset=torch.tensor(0.02, device=DEVICE),
    )


def nf4(tokens: int, options: Options) -> Iterator[Case]:
    """Decoding with double quantisation: one weight, and all seven of a layer in a row, as a step decodes them."""
    from graft_kernels.nf4 import decode_reference, decode_stacked

    def case(name: str, *stacks: Sequence[tuple[int, int]]) -> Case:
        ours = [([random_nf4(n, k) for n, k in stack], draw(sum(n for n, _ in stack), stack[0][1])) for stack in stacks]
        shapes = [shape for stack in stacks for shape in stack]

        def all_of(function: Function, operands: Sequence[Sequence[Any]]) -> Call:
            return lambda: [function(*each) for each in operands]

        def quantised() -> list[Any]:
            quantize = peer("bitsandbytes.functional", "quantize_4bit")
            return [quantize(draw(n, k), quant_type="nf4", compress_statistics=True) for n, k in shapes]

        def of_bitsandbytes() -> Call:
            held, outs = quantised(), [draw(n, k) for n, k in shapes]
            function = peer("bitsandbytes.functional", "dequantize_4bit")
            operands = [(*both, out) for both, out in zip(held, outs, strict=True)]
            return all_of(lambda packed, state, out: function(packed, state, out=out), operands)

        providers: dict[str, Provider] = {
            "graft": lambda: all_of(decode_stacked, [(weights, DTYPE, out) for weights, out in ours]),
            "eager": lambda: all_of(decode_reference, [(weight, DTYPE) for weights, _ in ours for weight in weights]),
            "bitsandbytes": of_bitsandbytes,
            "unsloth": lambda: all_of(peer("unsloth.kernels.utils", "fast_dequantize"), quantised()),
        }
        nbytes = sum(out.nbytes + sum(weight.nbytes for weight in weights) for weights, out in ours)
        return Case("nf4", name, "decode", providers, nbytes, overhead={})

    del tokens, options
    for n, k in ((I, H), (H, I), (H, H), (KEY_HEADS * D, H)):
        yield case(f"{n}x{k}", [(n, k)])
    qkv = [(heads * D, H) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    yield case("a layer's seven weights", qkv, [(HEADS * D, H)], [(I, H), (I, H)], [(H, I)])


def eager_lora(x: Tensor, lora_a: Tensor, lora_b: Tensor, weight: Any) -> Tensor:
    """PEFT's order: decode, product, two skinny products, sum. The decoding is ours, so that the rest is compared."""
    from graft_kernels.nf4 import decode

    return F.linear(x, decode(weight, DTYPE)) + 2.0 * F.linear(F.linear(x, lora_a), lora_b)


def lora_linear(tokens: int, options: Options) -> Iterator[Case]:
    """One NF4 linear layer with its adapter, decoding included."""
    from graft_kernels.lora_linear import linear_ways
    from graft_kernels.lora_linear import lora_linear as ours

    for n, k in ((I, H), (H, I)):
        weight, x = random_nf4(n, k), draw(tokens, k, grad=True)
        inputs = (x, draw(RANK, k, grad=True), draw(n, RANK, grad=True))
        makes: dict[str, Callable[[], Function]] = {
            f"graft: {way}": partial(partial, _in_order, partial(ours, scale=2.0, way=way), weight)
            for way in linear_ways(x, weight, RANK, 0.0)
        }
        forward, backward = others_of(
            partial(eager_lora, weight=weight),
            inputs,
            options,
            bitsandbytes=partial(_lora_on_bitsandbytes, n, k),
            unsloth=partial(_lora_of_unsloth, n, k),
        )
        shape, flops = f"{tokens}x{n}x{k} rank {RANK}", 2 * tokens * n * k
        for direction, provider, others in (("forward", forward_of, forward), ("backward", backward_of, backward)):
            providers = {name: provider(make, *inputs) for name, make in makes.items()} | others
            yield Case("lora_linear", shape, direction, providers, flops=flops)


def quantised_by_bitsandbytes(n: int, k: int) -> tuple[Tensor, Any]:
    """A weight as the peers hold it: its bytes and their QuantState, doubly quantised."""
    quantize = peer("bitsandbytes.functional", "quantize_4bit")
    packed, state = quantize(draw(n, k) * 0.02, quant_type="nf4", compress_statistics=True)
    return packed, state


def _lora_on_bitsandbytes(n: int, k: int) -> Function:
    """PEFT's order on bitsandbytes' product."""
    packed, state = quantised_by_bitsandbytes(n, k)
    product = peer("bitsandbytes", "matmul_4bit")
    return lambda x, a, b: product(x, packed.t(), quant_state=state) + 2.0 * F.linear(F.linear(x, a), b)


def _lora_of_unsloth(n: int, k: int) -> Function:
    function = peer("unsloth.kernels.fast_lora", "LoRA_W")
    packed, state = quantised_by_bitsandbytes(n, k)
    return lambda x, a, b: function.apply(x[None], packed, state, a, b, 2.0)


def _in_order(function: Function, weight: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Any:
    return function(x, weight, lora_a, lora_b)


def eager_product(x: Tensor, weight: Any, first: Tensor, second: Tensor, transposed: bool) -> Tensor:
    """Decode, product, and the low-rank update added inside a product."""
    from graft_kernels.nf4 import decode

    dense = decode(weight, DTYPE)
    return (x @ (dense.t() if transposed else dense)).addmm_(x @ first, second, alpha=2.0)


def fused_linear(tokens: int, options: Options) -> Iterator[Case]:
    """The same in one launch, for few tokens, where the weight's bytes are what costs."""
    from graft_kernels.fused_linear import fused_backward_dx, fused_forward

    for n, k in (((HEADS + 2 * KEY_HEADS) * D, H), (H, H), (2 * I, H), (H, I)):
        weight, x, dy, a, b = random_nf4(n, k), draw(tokens, k), draw(tokens, n), draw(RANK, k), draw(n, RANK)
        forward: dict[str, Provider] = {
            "graft": timed(fused_forward, x, weight, a, b, 2.0),
            "eager": timed(eager_product, x, weight, a.t(), b.t(), True),
            "bitsandbytes": partial(_call_without_gradients, partial(_lora_on_bitsandbytes, n, k), x, a, b),
            "unsloth": partial(_call_without_gradients, partial(_lora_of_unsloth, n, k), x, a, b),
        }
        backward = {
            "graft": timed(fused_backward_dx, dy, weight, a, b, 2.0),
            "eager": timed(eager_product, dy, weight, b, a, False),
        }
        shape, nbytes, flops = f"{tokens}x{n}x{k} rank {RANK}", weight.nbytes + x.nbytes + dy.nbytes, 2 * tokens * n * k
        yield Case("fused_linear", shape, "forward", forward, nbytes, flops, overhead={})
        yield Case("fused_linear", shape, "backward dx", backward, nbytes, flops, overhead={})


def _call_without_gradients(make: Callable[[], Function], *inputs: Tensor) -> Call:
    function = make()

    def call() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return call


def _mlp_of_unsloth(norm: Tensor) -> Function:
    """The MLP block as Unsloth computes it."""
    function = peer("unsloth.kernels.fast_lora", "LoRA_MLP")
    elementwise = [peer("unsloth.kernels.swiglu", name) for name in ("swiglu_fg_kernel", "swiglu_DWf_DW_dfg_kernel")]
    rms_norm = peer("unsloth.kernels.rms_layernorm", "Fast_RMS_Layernorm")
    weights = [quantised_by_bitsandbytes(n, k) for n, k in ((I, H), (I, H), (H, I))]

    def call(x: Tensor, *ab: Tensor) -> Any:
        parts = [part for i, held in enumerate(weights) for part in (*held, ab[2 * i], ab[2 * i + 1], 2.0)]
        return function.apply(rms_norm.apply(x[None], norm, EPS, False), *parts, *elementwise, False)

    return call


def _mlp_on_bitsandbytes(norm: Tensor) -> Function:
    """The MLP block in PEFT's order on bitsandbytes' products."""
    gate, up, down = (_lora_on_bitsandbytes(n, k) for n, k in ((I, H), (I, H), (H, I)))

    def call(x: Tensor, *ab: Tensor) -> Tensor:
        y = eager_rms_norm(x, norm)
        return down(eager_swiglu(gate(y, *ab[:2]), up(y, *ab[2:4])), *ab[4:])  # type: ignore[no-any-return]

    return call


def lora_blocks(tokens: int, options: Options) -> Iterator[Case]:
    """A layer's MLP block with its norm: decoding, three linear layers with adapters, SwiGLU."""
    from graft_kernels.lora_blocks import Gradients, Lora, Norm, mlp_backward, mlp_forward
    from graft_kernels.lora_linear import Linear, weight_columns

    sizes = ((I, H), (I, H), (H, I))
    weights = [random_nf4(n, k) for n, k in sizes]
    adapters = [part for n, k in sizes for part in (draw(RANK, k) * 0.02, draw(n, RANK) * 0.02)]
    x, dout, norm, lora = draw(tokens, H), draw(tokens, H), Norm(draw(H), EPS), Lora(2.0)
    linears = [Linear(weights[i], adapters[2 * i], adapters[2 * i + 1]) for i in range(3)]
    gate_up, down = linears[:2], linears[2]

    def decoded() -> tuple[Any, Any]:
        return weight_columns(gate_up, lora.scale, DTYPE), weight_columns([down], lora.scale, DTYPE)

    def forward() -> Any:
        return mlp_forward(x, None, norm, gate_up, down, lora, *decoded())

    def backward() -> Call:
        _, state = forward()
        into = Gradients.empty(gate_up), Gradients.empty([down])
        return lambda: mlp_backward(dout, None, state, norm, gate_up, down, lora, *decoded(), into)

    def eager(x: Tensor, *ab: Tensor) -> Tensor:
        y = eager_rms_norm(x, norm.weight)
        gate, up = (eager_lora(y, ab[2 * i], ab[2 * i + 1], weights[i]) for i in (0, 1))
        return eager_lora(eager_swiglu(gate, up), ab[4], ab[5], weights[2])

    inputs = [part.clone().requires_grad_() for part in (x, *adapters)]
    shape, flops = f"MLP {tokens}x{H}x{I} rank {RANK}", 6 * tokens * H * I
    of_bitsandbytes, of_unsloth = partial(_mlp_on_bitsandbytes, norm.weight), partial(_mlp_of_unsloth, norm.weight)
    forwards, backwards = others_of(eager, inputs, options, bitsandbytes=of_bitsandbytes, unsloth=of_unsloth)
    yield Case("lora_blocks", shape, "forward", {"graft": timed(forward)} | forwards, flops=flops)
    yield Case("lora_blocks", shape, "backward", {"graft": backward} | backwards, flops=flops)


def lora_overhead(tokens: int, options: Options) -> Iterator[Case]:
    """What the adapters cost the four products of a layer, as `lora_blocks` takes them."""
    for layer in (_qkv_overhead, _o_overhead, _gate_up_overhead, _down_overhead):
        yield from layer(tokens)


def _qkv_overhead(tokens: int) -> Iterator[Case]:
    from graft_kernels import lora_blocks as blocks
    from graft_kernels.lora_linear import weight_rows
    from graft_kernels.rope import rope_table

    lora, norm, heads = blocks.Lora(2.0), blocks.Norm(draw(H), EPS), blocks.Heads(HEADS, KEY_HEADS, D)
    table = rope_table(D, tokens, theta=500000.0, device=DEVICE)
    positions = blocks.Positions(*table, torch.arange(tokens, device=DEVICE, dtype=torch.int32))
    x, residual, dz, rho = draw(tokens, H), draw(tokens, H), draw(tokens, H), torch.rand(tokens, device=DEVICE)
    dq, dk, dv = (draw(tokens, count, D) for count in (HEADS, KEY_HEADS, KEY_HEADS))

    def forward(linears: list[Any]) -> Call:
        rows = weight_rows(linears, lora.scale, DTYPE)
        return lambda: blocks.qkv_forward(x, residual, norm, linears, lora, rows, heads, positions)

    def backward(linears: list[Any]) -> Call:
        rows, nowhere = weight_rows(linears, lora.scale, DTYPE), blocks.Gradients(None, (None,) * 3)
        state, qkv = blocks.NormLinearsState(x, rho, None), draw(1, 1)  # q and k are read only where they are normed
        return lambda: blocks.qkv_backward(
            dq, dk, dv, dz, qkv, state, norm, linears, lora, rows, heads, positions, nowhere
        )

    sizes = [(heads.q * D, H), (heads.kv * D, H), (heads.kv * D, H)]
    yield from _overhead_cases("q,k,v", tokens, sizes, forward, backward)


def _o_overhead(tokens: int) -> Iterator[Case]:
    from graft_kernels.lora_blocks import Gradients, Lora, o_backward, o_forward
    from graft_kernels.lora_linear import weight_rows
    from graft_kernels.rms_norm import rms_norm_backward, rms_norm_forward

    lora, weight = Lora(2.0), draw(H)
    attention, residual, z, dy = (draw(tokens, size) for size in (HEADS * D, H, H, H))
    # The norm beside has the adapters of gate and up to think of as well, with and without those of o.
    next_a, next_ds, rho = draw(2 * RANK, H) * 0.02, draw(tokens, 64), torch.rand(tokens, device=DEVICE)
    y = torch.empty(tokens, H + 64, dtype=DTYPE, device=DEVICE)

    def forward(linears: list[Any]) -> Call:
        rows = weight_rows(linears, lora.scale, DTYPE)

        def call() -> object:
            x, pending, _ = o_forward(attention, linears[0], lora, rows)
            return rms_norm_forward(x, weight, EPS, residual=residual, pending=pending, out=y, lora_a=next_a)

        return call

    def backward(linears: list[Any]) -> Call:
        rows, nowhere = weight_rows(linears, lora.scale, DTYPE), Gradients(None, (None,))
        dx = torch.empty(tokens, rows.weight.shape[0], dtype=DTYPE, device=DEVICE)
        lora_b = rows.b if rows.rank else None

        def call() -> object:
            rms_norm_backward(
                dy, z, weight, rho, dresidual=residual, deferred=(next_ds, next_a), lora_b=lora_b, out=dx
            )  # fmt: skip
            return o_backward(dx, attention, None, linears[0], lora, rows, nowhere)

        return call

    yield from _overhead_cases("o", tokens, [(H, HEADS * D)], forward, backward)


def _gate_up_overhead(tokens: int) -> Iterator[Case]:
    from graft_kernels import lora_blocks as blocks
    from graft_kernels.lora_linear import weight_columns

    lora, norm, rho = blocks.Lora(2.0), blocks.Norm(draw(H), EPS), torch.rand(tokens, device=DEVICE)
    x, residual, dz, dy = (draw(tokens, size) for size in (H, H, H, 2 * I))

    def forward(linears: list[Any]) -> Call:
        columns = weight_columns(linears, lora.scale, DTYPE)
        return lambda: blocks.norm_linears_forward(x, residual, norm, linears, lora, columns)

    def backward(linears: list[Any]) -> Call:
        columns, nowhere = weight_columns(linears, lora.scale, DTYPE), blocks.Gradients(None, (None, None))
        state = blocks.NormLinearsState(x, rho, None)
        return lambda: blocks.norm_linears_backward(dy, dz, state, norm, linears, lora, columns, nowhere)

    yield from _overhead_cases("gate,up", tokens, [(I, H), (I, H)], forward, backward)


def _down_overhead(tokens: int) -> Iterator[Case]:
    from graft_kernels.lora_blocks import Lora, down_backward, down_forward
    from graft_kernels.lora_linear import weight_columns
    from graft_kernels.swiglu import swiglu_backward

    lora, gate_up, dout = Lora(2.0), draw(tokens, 2 * I), draw(tokens, H)
    gate, up = gate_up[:, :I], gate_up[:, I:]
    # As `gate_up_backward_` has it, but not in place: that would be other numbers every time.
    into = torch.empty_like(gate_up)

    def forward(linears: list[Any]) -> Call:
        columns = weight_columns(linears, lora.scale, DTYPE)
        return lambda: down_forward(gate_up, linears[0], lora, columns)

    def backward(linears: list[Any]) -> Call:
        columns = weight_columns(linears, lora.scale, DTYPE)

        def call() -> object:
            dh_ds = down_backward(dout, columns)
            dh, deferred = dh_ds[:, :I], (dh_ds[:, I:], columns.a) if columns.rank else None
            # h for dA, on both sides.
            return swiglu_backward(dh, gate, up, deferred=deferred, dgate=into[:, :I], dup=into[:, I:], h=dh)

        return call

    yield from _overhead_cases("down", tokens, [(H, I)], forward, backward)


def _overhead_cases(
    name: str,
    tokens: int,
    sizes: Sequence[tuple[int, int]],
    forward: Callable[[list[Any]], Call],
    backward: Callable[[list[Any]], Call],
) -> Iterator[Case]:
    """Both directions of layers [n, k] with the same input: the product alone, `forward` and `backward` of layers with
    and without adapters, and the peers' order: the product, then two skinny products per layer."""
    from graft_kernels.lora_linear import Linear

    n, k = sum(size for size, _ in sizes), sizes[0][1]
    x, dy, weight = draw(tokens, k), draw(tokens, n), draw(n, k) * 0.02
    parts = weight.split([size for size, _ in sizes])
    bare = [Linear(part) for part in parts]
    adapted = [Linear(part, draw(RANK, k) * 0.02, draw(len(part), RANK) * 0.02) for part in parts]

    def peers_forward() -> Tensor:
        y = F.linear(x, weight)
        for y_part, linear in zip(y.split([len(part) for part in parts], dim=1), adapted, strict=True):
            assert linear.lora_a is not None
            assert linear.lora_b is not None
            y_part.addmm_(x @ linear.lora_a.t(), linear.lora_b.t(), alpha=2.0)
        return y

    def peers_backward() -> Tensor:
        dx = dy @ weight
        for dy_part, linear in zip(dy.split([len(part) for part in parts], dim=1), adapted, strict=True):
            assert linear.lora_a is not None
            assert linear.lora_b is not None
            dx.addmm_(dy_part @ linear.lora_b, linear.lora_a, alpha=2.0)
        return dx

    product = {"forward": timed(F.linear, x, weight), "backward dx": timed(torch.mm, dy, weight)}
    eager = {"forward": peers_forward, "backward dx": peers_backward}
    for direction, make in (("forward", forward), ("backward dx", backward)):
        providers: dict[str, Provider] = {
            BASE: product[direction],
            "graft: no adapters": partial(make, bare),
            "graft": partial(make, adapted),
            "eager": timed(eager[direction]),
        }
        over = {"graft": "graft: no adapters", "eager": BASE}
        shape = f"{name} {tokens}x{n}x{k} rank {RANK}"
        yield Case("lora_overhead", shape, direction, providers, flops=2 * tokens * n * k, overhead=over)


def dropout(tokens: int, options: Options) -> Iterator[Case]:
    """Dropping inputs of an adapter, the mask drawn from a seed."""
    from graft_kernels.dropout import dropout as ours

    x = draw(tokens, H)
    providers = {"graft": timed(ours, x, 0.1, 7), "eager": timed(F.dropout, x, 0.1)}
    yield Case("dropout", f"{tokens}x{H}", "forward", providers, 2 * x.nbytes)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice."""
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True, enable_gqa=True)


def attention(tokens: int, options: Options) -> Iterator[Case]:
    """Causal attention: sequences of 2,048, one sequence, and packed documents of 256 and 1,024 on average."""
    q, k, v = draw(tokens, HEADS, D), draw(tokens, KEY_HEADS, D), draw(tokens, KEY_HEADS, D)
    for length in sorted({min(2048, tokens), tokens}):
        dense = [x.unflatten(0, (-1, length)) for x in (q, k, v)]
        yield from _attention_cases(f"{tokens // length}x{length}", tokens * length // 2, dense, {})
    for mean in (256, 1024):
        # Documents of three sizes around the mean; what remains is the last.
        lengths = [mean // 2, mean, 3 * mean // 2] * (tokens // (3 * mean))
        lengths += [tokens - sum(lengths)] * (sum(lengths) < tokens)
        offsets = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(DEVICE, torch.int32)
        pack = {"cu_seqlens": offsets, "max_seqlen": max(lengths)}
        pairs = sum(length * length for length in lengths) // 2
        yield from _attention_cases(f"{tokens} in {len(lengths)} documents", pairs, [q, k, v], pack)


def _attention_cases(shape: str, pairs: int, operands: list[Tensor], pack: dict[str, Any]) -> Iterator[Case]:
    from graft_kernels.attention import attention_backward, attention_forward, available_backends

    def ours_backward(deterministic: bool, backend: str) -> Provider:
        def provide() -> Call:
            out, saved = attention_forward(*operands, deterministic=deterministic, backend=backend, **pack)
            return partial(attention_backward, torch.randn_like(out), saved)

        return provide

    forward: dict[str, Provider] = {}
    backward: dict[str, Provider] = {}
    for deterministic in (False, True):
        backends = available_backends(operands[0], operands[1], packed=bool(pack), deterministic=deterministic)
        for backend in backends[:-1]:  # not the reference: its definition is not what anyone waits for
            name = f"graft: {backend}"
            forward[name] = timed(attention_forward, *operands, backend=backend, **pack)
            backward[f"{name}, deterministic" if deterministic else name] = ours_backward(deterministic, backend)
    if not pack:
        inputs = [x.clone().requires_grad_() for x in operands]
        forward["eager"] = forward_of(lambda: eager_attention, *inputs)
        backward["eager"] = backward_of(lambda: eager_attention, *inputs)
    shape, flops = f"{shape}x{HEADS}/{KEY_HEADS}x{D}", 4 * pairs * HEADS * D
    yield Case("attention", shape, "forward", forward, flops=flops)
    yield Case("attention", shape, "backward", backward, flops=flops * 5 // 2)


OPS: dict[str, Callable[[int, Options], Iterator[Case]]] = {
    "nf4": nf4,
    "lora_linear": lora_linear,
    "fused_linear": fused_linear,
    "lora_blocks": lora_blocks,
    "lora_overhead": lora_overhead,
    "adapter_grads": adapter_grads,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "rope": rope,
    "rope_qkv": rope_qkv,
    "attention": attention,
    "cross_entropy": cross_entropy,
    "dropout": dropout,
    "adamw": adamw,
}


def token_sizes(op: str, quick: bool) -> tuple[int, ...]:
    """For how many tokens an op is timed; once, where it does not depend on them."""
    if op in ("nf4", "adamw"):
        return (0,)
    sizes = FEW_TOKENS if op == "fused_linear" else TOKENS
    return sizes[:1] if quick else sizes


def cases(op: str, quick: bool, options: Options) -> Iterator[Case]:
    """All of an op."""
    for tokens in token_sizes(op, quick):
        yield from OPS[op](tokens, options)


# Timing, the same for all.


def milliseconds(call: Call, quick: bool) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, with a cold L2 cache."""
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=10 if quick else 50, rep=30 if quick else 200, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def captured(call: Call) -> Call:
    """The call, which has run once, as a graph: some kernels take less time than their launches take the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> Call:
        graph.replay()
        return call  # it holds what the graph reads and writes

    return replay


def in_turns(calls: dict[str, Call], quick: bool, lead: int) -> dict[str, tuple[float, float, float]]:
    """As `milliseconds`, for all of `calls` in rounds: times to be held against each other have seen the same clocks.

    Before each the card fills the L2 cache `lead` times, of some 0.1 ms each, in which the host launches it: even where
    the one before has waited for the card.
    """
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=DEVICE)
    names, times = list(calls), {name: list[float]() for name in calls}
    for turn in range(8 if quick else 25):
        events = []
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(lead):
                cache.zero_()
            start.record()
            calls[name]()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            times[name].append(start.elapsed_time(end))
    found = {}
    for name, series in times.items():
        series.sort()
        found[name] = series[len(series) // 2], series[len(series) // 5], series[len(series) * 4 // 5]
    return found


def ceilings(quick: bool) -> tuple[float, float]:
    """What this card copies (bytes read and written per ms) and multiplies (bf16 operations per ms)."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / milliseconds(partial(target.copy_, source), quick)[0]
    multiplied = 2 * 8192 * H * I / milliseconds(partial(F.linear, draw(8192, H), draw(I, H)), quick)[0]
    return copied, multiplied


def said_by(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    return "unknown"


def facts() -> dict[str, str]:
    """What has to be known to compare a line with another one."""
    installed = []
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed.append(f"{name} {importlib.metadata.version(name)}")
    return {
        "card": torch.cuda.get_device_name(),
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "peers": ", ".join(installed),
        "commit": said_by("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }


def measure(case: Case, rates: tuple[float, float], quick: bool) -> Iterator[dict[str, Any]]:
    """One row per provider that is installed; one that fails has a note in place of its times."""
    timed_ones = _one_by_one(case, quick) if case.overhead is None else _together(case, quick)
    least = max(case.nbytes / rates[0], case.flops / rates[1])
    medians: dict[str, float] = {}
    for name, times in timed_ones:
        row: dict[str, Any] = {
            "op": case.op,
            "shape": case.shape,
            "dtype": str(DTYPE).removeprefix("torch."),
            "direction": case.direction,
            "provider": name,
        }
        if isinstance(times, str):
            yield row | {"note": times}
            continue
        medians[name] = times[0]
        row |= {key: round(value, 5) for key, value in zip(("ms", "p20", "p80"), times, strict=True)}
        row["roofline"] = round(least / times[0], 4)
        over = (case.overhead or {}).get(name)
        if over in medians and BASE in medians:
            row["overhead"] = round((medians[name] - medians[over]) / medians[BASE], 4)
        yield row


Times = tuple[float, float, float] | str  # or how it failed


def _one_by_one(case: Case, quick: bool) -> Iterator[tuple[str, Times]]:
    for name, prepare in case.providers.items():
        try:
            times: Times = milliseconds(prepare(), quick)
        except NotInstalled:
            continue
        except Exception as error:  # a peer's mistake, or ours, must not cost the others their figures
            times = _failure(error)
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        yield name, times


def _together(case: Case, quick: bool) -> list[tuple[str, Times]]:
    calls: dict[str, Call] = {}
    found: dict[str, Times] = {}
    for name, prepare in case.providers.items():
        try:
            call = prepare()
            call()
            calls[name] = captured(call) if case.graphs else call
        except NotInstalled:
            continue
        except Exception as error:
            found[name] = _failure(error)
    found |= in_turns(calls, quick, lead=4 if case.graphs else 40)
    calls.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return [(name, found[name]) for name in case.providers if name in found]


def _failure(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}" + (f": {said[0]}" if said else "")


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    if "note" in row:
        return f"    {row['provider']:32s} {row['note']}"
    spread = f"({row['p20']:.4f} to {row['p80']:.4f})"
    text = f"    {row['provider']:32s} {row['ms']:10.4f} ms {spread:22s} {row['roofline']:7.1%}"
    return text + (f"  adds {row['overhead']:+.1%}" if "overhead" in row else "")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m graft_kernels.bench",
        description="Times the ops of graft_kernels beside plain PyTorch, torch.compile and installed peers.",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"all without one, or some of: {', '.join(OPS)}")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the lines there as well")
    parser.add_argument("--quick", action="store_true", help="the smallest size only, fewer repetitions")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parsed = parser.parse_args(arguments)
    if unknown := sorted(set(parsed.ops) - set(OPS)):
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(OPS)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 where there is nothing to measure on, or 1 if an op of this package failed."""
    parsed = parse(arguments)
    if not torch.cuda.is_available():
        print("graft_kernels.bench needs a CUDA card, and torch finds none.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    # Or a compiled backward, whose buffers it gives away, can run only once.
    setattr(importlib.import_module("torch._functorch.config"), "donated_buffer", False)  # noqa: B010
    rates, known = ceilings(parsed.quick), facts()
    print(" · ".join(f"{name} {value}" for name, value in known.items()))
    print(f"copies {rates[0] / 1e9:.2f} TB/s (read + write), multiplies {rates[1] / 1e9:.0f} TFLOP/s in bf16\n")
    missing = []
    with contextlib.ExitStack() as stack:
        writer = None
        if parsed.out is not None:
            writer = csv.DictWriter(stack.enter_context(parsed.out.open("w", newline="")), COLUMNS)
            writer.writeheader()
        for op in parsed.ops or OPS:
            try:
                for case in cases(op, parsed.quick, Options(parsed.compile)):
                    print(f"{case.op} {case.shape} {case.direction}")
                    ours = False
                    for row in measure(case, rates, parsed.quick):
                        ours |= row["provider"].startswith("graft") and "note" not in row
                        print(line(row), flush=True)
                        if writer is not None:
                            writer.writerow(known | row)
                    if not ours:
                        missing.append(f"{case.op} {case.shape} {case.direction}")
            except Exception as error:  # one op's mistake must not cost the others their figures
                missing.append(f"{op}: {type(error).__name__} {error}")
    if missing:
        print("graft is missing from: " + "; ".join(missing), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
