"""The fused QLoRA product is the exact NF4 weight, multiplied; every cut of it gives the same function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from graft_kernels.fused_hopper import BLOCK_O, TILES_M, low_rank_parts, owner
from graft_kernels.fused_linear import (
    MAX_RANK,
    FusedConfig,
    fused_backward_dx,
    fused_config,
    fused_forward,
    fused_linear_reference,
    fused_supported,
)
from graft_kernels.launch import INTERPRETED, is_hopper
from graft_kernels.nf4 import NF4Weight, decode

# On a card the kernel refuses fp32, which would leave the tensor cores; the interpreter's bf16 is wrong.
DTYPES = [torch.float16, torch.float32 if INTERPRETED else torch.bfloat16]
# What one rounding of the result, and one of S, may cost.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

SHAPES = {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "o": (4096, 4096)}

VARIANTS = {
    "transposed": FusedConfig(block_m=64, block_o=64, block_r=128),
    "straight": FusedConfig(block_m=32, block_o=128, block_r=64, transposed=False),
    "split": FusedConfig(block_m=64, block_o=128, block_r=64, splits=2),
    "split straight": FusedConfig(block_m=32, block_o=64, block_r=64, splits=3, transposed=False),
    "S before": FusedConfig(block_m=16, block_o=128, block_r=64, inline=False),
    "scales through the L1": FusedConfig(block_m=64, block_o=64, block_r=64, scales_shared=False),
    "S before, straight": FusedConfig(block_m=64, block_o=64, block_r=128, inline=False, transposed=False),
}


# On a card of Hopper's kind; elsewhere they are refused, which is what the tests below then check.
HOPPER = {
    f"{tile_m} tokens, {name}": FusedConfig(hopper=True, block_m=tile_m, programs=programs)
    for tile_m in TILES_M
    for name, programs in (("a tile each", 0), ("few programs", 7), ("many programs", 132))
}


def random_weight(n: int, k: int, *, nested: bool = True, device: str | None = None) -> NF4Weight:
    """Any bytes are a weight. Scales around 0.04, the size of a trained layer's."""
    blocks = n * k // 64
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=device)
    if not nested:
        absmax = torch.rand(blocks, device=device) * 0.05 + 0.01
        return NF4Weight(packed=packed, shape=(n, k), blocksize=64, absmax=absmax)
    return NF4Weight(
        packed=packed,
        shape=(n, k),
        blocksize=64,
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        code2=torch.linspace(-1, 1, 256, device=device),
        absmax2=torch.rand(-(-blocks // 256), device=device) * 0.02 + 0.005,
        offset=torch.tensor(0.037, device=device),
    )


def adapter(n: int, k: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if rank == 0:
        return None, None
    return (torch.randn(rank, k) / k**0.5).to(dtype), torch.randn(n, rank).mul(0.1).to(dtype)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def kernels(device: str) -> bool:
    return INTERPRETED or device == "cuda"


def check(
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    config: FusedConfig | None,
    *,
    nested: bool,
    bias: bool = False,
) -> None:
    """Forward and dX against float64 on the very values the kernels decode."""
    torch.manual_seed(m + rank)
    weight = random_weight(n, k, nested=nested)
    a, b = adapter(n, k, rank, dtype)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bias_n = torch.randn(n).to(dtype) if bias else None
    w = decode(weight, dtype).double()
    y_64, dx_64 = x.double() @ w.t(), dy.double() @ w
    if a is not None and b is not None:
        y_64 += 1.5 * (x.double() @ a.double().t()) @ b.double().t()
        dx_64 += 1.5 * (dy.double() @ b.double()) @ a.double()
    if bias_n is not None:
        y_64 += bias_n.double()
    y = fused_forward(x, weight, a, b, 1.5, bias_n, config=config)
    dx = fused_backward_dx(dy, weight, a, b, 1.5, config=config)
    assert y.dtype == dx.dtype == dtype
    assert distance(y, y_64) < TOLERANCE[dtype]
    assert distance(dx, dx_64) < TOLERANCE[dtype]


def refuses_without_kernels(device: str) -> bool:
    """In a process without kernels the promise is a refusal, and that is what is checked."""
    if kernels(device):
        return False
    weight = random_weight(64, 64)
    assert not fused_supported(torch.randn(1, 64), weight)
    with pytest.raises(ValueError, match=r"no fused kernel for torch\.float32 on cpu"):
        fused_forward(torch.randn(1, 64), weight)
    with pytest.raises(ValueError, match="no fused kernel"):
        fused_backward_dx(torch.randn(1, 64), weight)
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_float64_product(variant: str, dtype: torch.dtype, device: str) -> None:
    if refuses_without_kernels(device):
        return
    check(33, 136, 192, 16, dtype, VARIANTS[variant], nested=True)
    check(7, 72, 192, 3, dtype, VARIANTS[variant], nested=False, bias=True)


def refuses_hopper(device: str, variant: str) -> bool:
    """In a process without such a card the promise is a refusal, and that is what is checked."""
    if refuses_without_kernels(device):
        return True
    x, weight = torch.randn(130, 128).half(), random_weight(64, 128)
    if is_hopper(x.device):
        with pytest.raises(ValueError, match="the Hopper kernel does not take"):
            fused_forward(x[:, :128].repeat(1, 2)[:, 1:129], weight, config=HOPPER[variant])
        return False
    with pytest.raises(ValueError, match="the Hopper kernel does not take"):
        fused_forward(x, weight, config=HOPPER[variant])
    return True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", HOPPER)
def test_on_hopper_every_cut_is_the_float64_product(variant: str, dtype: torch.dtype, device: str) -> None:
    if refuses_hopper(device, variant):
        return
    check(300, 192, 320, 16, dtype, HOPPER[variant], nested=True)
    check(384, 320, 4096, 16, dtype, HOPPER[variant], nested=True)
    check(257, 128, 192, 3, dtype, HOPPER[variant], nested=False, bias=True)
    check(1, 320, 64, 64, dtype, HOPPER[variant], nested=True, bias=True)
    check(512, 64, 4096, 0, dtype, HOPPER[variant], nested=True)
    check(600, 192, 4160, 48, dtype, HOPPER[variant], nested=True)
    check(700, 192, 4096, 64, dtype, HOPPER[variant], nested=True, bias=True)


@pytest.mark.parametrize("variant", HOPPER)
def test_on_hopper_the_weight_is_decoded_to_the_last_bit(variant: str, device: str) -> None:
    if refuses_hopper(device, variant):
        return
    for dtype in (torch.float16, torch.bfloat16):
        for nested in (True, False):
            weight = random_weight(192, 16384 + 192, nested=nested)
            expected = decode(weight, dtype)
            x = torch.eye(expected.shape[1], dtype=dtype)[-700:]
            assert torch.equal(fused_forward(x, weight, config=HOPPER[variant]).t(), expected[:, -700:])
            assert torch.equal(fused_backward_dx(torch.eye(192, dtype=dtype), weight, config=HOPPER[variant]), expected)


@pytest.mark.parametrize("variant", HOPPER)
def test_on_hopper_every_run_gives_the_same_bits(variant: str, device: str) -> None:
    if refuses_hopper(device, variant):
        return
    weight = random_weight(4096, 4096)
    a, b = adapter(4096, 4096, 16, torch.bfloat16)
    x = torch.randn(500, 4096).bfloat16()
    for function in (fused_forward, fused_backward_dx):
        first = function(x, weight, a, b, config=HOPPER[variant])
        assert all(torch.equal(function(x, weight, a, b, config=HOPPER[variant]), first) for _ in range(20))


@pytest.mark.parametrize(("n", "k"), [(192, 320), *SHAPES.values()])
@pytest.mark.parametrize("m", [1, 256, 257, 320, 321, 384, 385, 512, 600, 3000])
def test_on_hopper_programs_share_all_steps_equally_and_know_each_other(m: int, n: int, k: int) -> None:
    """A tile whose programs miscount each other is never finished, or before its last part is there."""
    steps = k // 64
    for tile_m in TILES_M:
        total = -(-m // tile_m) * -(-n // BLOCK_O) * steps
        for programs in (min(wanted, total) for wanted in (2, 7, 96, 128, 132)):
            ends = [i * total // programs for i in range(programs + 1)]
            stretches = list(itertools.pairwise(ends))
            assert {end - begin for begin, end in stretches} <= {total // programs, total // programs + 1}
            owners = [program for program, (begin, end) in enumerate(stretches) for _ in range(begin, end)]
            for begin in range(0, total, steps):
                for step in (begin, begin + steps - 1):
                    assert owner(step, programs, total) == owners[step]


def test_on_hopper_a_tile_has_256_320_or_384_tokens(device: str) -> None:
    if refuses_hopper(device, next(iter(HOPPER))):
        return
    with pytest.raises(ValueError, match=r"block_m is 128, expected one of \(256, 320, 384\)"):
        fused_forward(
            torch.randn(130, 128).half(), random_weight(64, 128), config=FusedConfig(hopper=True, block_m=128)
        )


def test_on_hopper_a_tile_each_is_the_same_product_for_thousands_of_tiles(device: str) -> None:
    if refuses_hopper(device, "256 tokens, a tile each"):
        return
    # 8,192 programs of 64 steps: their product with all steps is beyond an int32.
    weight, dy = random_weight(4096, 16384), torch.randn(16384, 4096).bfloat16()
    dx = fused_backward_dx(dy, weight, config=HOPPER["256 tokens, a tile each"])
    rows = torch.tensor([0, 255, 256, 9000, 16383])
    expected = dy[rows].double() @ decode(weight, torch.bfloat16).double()
    assert distance(dx[rows], expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "size", "rank"), [(1, 64, 1), (130, 1000, 3), (48, 4096, 16), (17, 192, 48), (300, 576, 256)]
)
def test_low_rank_parts_sum_to_the_float64_product(
    m: int, size: int, rank: int, dtype: torch.dtype, device: str
) -> None:
    if refuses_without_kernels(device) or (INTERPRETED and dtype == torch.bfloat16):
        return
    x, down = torch.randn(m, size).to(dtype), torch.randn(rank, size)
    expected = x.double() @ down.to(dtype).double().t()
    for factor in (down, down.t().contiguous().t()):  # as A lies in memory, and as B does
        arrivals = torch.full((132,), 7, dtype=torch.int32)
        parts = low_rank_parts(x, factor, arrivals)
        assert parts.shape[1:] == (m, rank)
        assert distance(parts.double().sum(0), expected) < TOLERANCE[torch.float32]
        assert not arrivals.any()
        assert torch.equal(low_rank_parts(x, factor), parts)


def test_on_hopper_the_rule_takes_its_kernel_from_some_tokens_on() -> None:
    for n, k in SHAPES.values():
        for direction in ("forward", "backward"):
            assert not fused_config(128, n, k, 16, direction, hopper=True).hopper
            assert fused_config(512, n, k, 16, direction, hopper=True).hopper
            assert not fused_config(512, n, k, 16, direction).hopper


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("m", [1, 7, 16, 33, 130])
def test_the_rule_serves_any_number_of_tokens(m: int, nested: bool, device: str) -> None:
    if refuses_without_kernels(device):
        return
    check(m, 136, 192, 16, torch.float16, None, nested=nested)


@pytest.mark.parametrize("rank", [0, 1, 3, 16, 48, 100, MAX_RANK])
@pytest.mark.parametrize("splits", [1, 2])
def test_any_rank_up_to_256(rank: int, splits: int, device: str) -> None:
    if refuses_without_kernels(device):
        return
    config = replace(fused_config(16, 136, 192, rank, "forward"), splits=splits, block_r=64)
    check(16, 136, 192, rank, torch.float16, config, nested=True, bias=True)


@pytest.mark.parametrize(("dtype", "nested"), [(dtype, True) for dtype in DTYPES] + [(torch.float16, False)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weight_is_decoded_to_the_last_bit(variant: str, dtype: torch.dtype, nested: bool, device: str) -> None:
    if refuses_without_kernels(device):
        return
    n, k = 72, 128
    weight = random_weight(n, k, nested=nested)
    expected = decode(weight, dtype)
    # The identity picks single weights out of the sums, and zero times a weight is zero.
    assert torch.equal(fused_forward(torch.eye(k, dtype=dtype), weight, config=VARIANTS[variant]).t(), expected)
    assert torch.equal(fused_backward_dx(torch.eye(n, dtype=dtype), weight, config=VARIANTS[variant]), expected)


def test_second_level_scales_change_inside_a_row(device: str) -> None:
    """64 · 256 elements share a second-level scale; these rows are longer and not a multiple of that."""
    if refuses_without_kernels(device):
        return
    forward = FusedConfig(block_o=16, block_r=1024, splits=3)
    backward = FusedConfig(block_o=1024, block_r=16, transposed=False)
    weight = random_weight(3, 16384 + 192)
    w = decode(weight, torch.float16).double()
    x, dy = torch.randn(2, w.shape[1]).half(), torch.randn(2, 3).half()
    assert distance(fused_forward(x, weight, config=forward), x.double() @ w.t()) < 1e-3
    assert distance(fused_backward_dx(dy, weight, config=backward), dy.double() @ w) < 1e-3


def test_an_adapter_of_another_dtype_is_cast(device: str) -> None:
    if refuses_without_kernels(device):
        return
    weight = random_weight(72, 128)
    a, b = torch.randn(16, 128), torch.randn(72, 16)
    x, dy = torch.randn(5, 128).half(), torch.randn(5, 72).half()
    for config in VARIANTS.values():
        for function, operand in ((fused_forward, x), (fused_backward_dx, dy)):
            expected = function(operand, weight, a.half(), b.half(), 0.5, config=config)
            assert distance(function(operand, weight, a, b, 0.5, config=config), expected.double()) < 1e-3


def test_column_slices_are_read_and_written_in_place(device: str) -> None:
    if refuses_without_kernels(device):
        return
    weight = random_weight(72, 128)
    a, b = adapter(72, 128, 16, torch.float16)
    wide_x, wide_y = torch.randn(9, 300).half(), torch.full((9, 100), 7.0).half()
    x, y = wide_x[:, 64:192], wide_y[:, 8:80]
    for config in (VARIANTS["transposed"], VARIANTS["straight"], VARIANTS["split"]):
        assert fused_forward(x, weight, a, b, config=config, out=y) is y
        assert torch.equal(y, fused_forward(x.contiguous(), weight, a, b, config=config))
        assert (wide_y[:, :8] == 7).all()
        assert (wide_y[:, 80:] == 7).all()
    assert torch.equal(fused_forward(x.t().contiguous().t(), weight, a, b), fused_forward(x, weight, a, b))


def test_every_run_gives_the_same_bits(device: str) -> None:
    if refuses_without_kernels(device):
        return
    n, k, repeats = (72, 192, 1) if INTERPRETED else (4096, 4096, 20)
    weight = random_weight(n, k)
    a, b = adapter(n, k, 16, torch.float16)
    x = torch.randn(17, k).half()
    for config in VARIANTS.values():
        first = fused_forward(x, weight, a, b, config=config)
        assert all(torch.equal(fused_forward(x, weight, a, b, config=config), first) for _ in range(repeats))


def test_no_tokens_give_no_rows(device: str) -> None:
    if refuses_without_kernels(device):
        return
    weight = random_weight(72, 128)
    a, b = adapter(72, 128, 16, torch.float16)
    assert fused_forward(torch.randn(0, 128).half(), weight, a, b).shape == (0, 72)
    assert fused_backward_dx(torch.randn(0, 72).half(), weight, a, b).shape == (0, 128)


def test_the_reference_is_the_definition() -> None:
    weight = random_weight(72, 128)
    a, b = adapter(72, 128, 4, torch.float64)
    x, bias = torch.randn(3, 128, dtype=torch.float64), torch.randn(72, dtype=torch.float64)
    w = decode(weight, torch.float64)
    assert torch.allclose(fused_linear_reference(x, weight, bias=bias), x @ w.t() + bias)
    expected = x @ (w + 0.5 * b @ a).t()
    assert torch.allclose(fused_linear_reference(x, weight, a, b, 0.5), expected)


def test_what_the_kernels_cannot_do_is_not_supported(device: str) -> None:
    x = torch.randn(2, 128).half()
    weight = random_weight(72, 128)
    assert fused_supported(x, weight, 16) == kernels(device)
    assert not fused_supported(x, weight, MAX_RANK + 1)
    assert not fused_supported(x.double(), weight)
    assert INTERPRETED or not fused_supported(x.float(), weight)
    assert not fused_supported(torch.randn(2, 96).half(), random_weight(64, 96))
    coarse = NF4Weight(packed=weight.packed, shape=(72, 128), blocksize=128, absmax=torch.ones(72))
    assert not fused_supported(x, coarse)
    shifted = torch.zeros(72 * 64 + 2, dtype=torch.uint8)[2:]
    assert not fused_supported(x, replace(weight, packed=shifted))


def test_operands_that_do_not_fit_are_refused() -> None:
    weight = random_weight(72, 128)
    x = torch.randn(2, 128).half()
    a, b = torch.randn(4, 128), torch.randn(72, 4)
    with pytest.raises(ValueError, match=r"x has shape \(2, 64\), expected \[M, 128\]"):
        fused_forward(x[:, :64], weight)
    with pytest.raises(ValueError, match=r"dy has shape \(2, 128\), expected \[M, 72\]"):
        fused_backward_dx(x, weight)
    with pytest.raises(ValueError, match="one is None"):
        fused_forward(x, weight, a)
    with pytest.raises(ValueError, match=r"expected A \[r, 128\], B \[72, r\]"):
        fused_forward(x, weight, a, b[:, :3])
    with pytest.raises(ValueError, match=r"bias has shape \(71,\), expected \(72,\)"):
        fused_forward(x, weight, bias=torch.randn(71))
    with pytest.raises(ValueError, match=r"torch.float64, expected fp32, fp16 or bf16"):
        fused_forward(x.double(), weight)
    with pytest.raises(ValueError, match="'up', expected 'forward' or 'backward'"):
        fused_config(1, 64, 64, 0, "up")


def test_a_cut_that_straddles_scales_is_refused(device: str) -> None:
    if refuses_without_kernels(device):
        return
    with pytest.raises(ValueError, match="block along K is 32, expected a multiple of 64"):
        fused_forward(torch.randn(2, 128).half(), random_weight(72, 128), config=FusedConfig(block_r=32))
    with pytest.raises(ValueError, match=r"out is \(2, 71\)"):
        fused_forward(torch.randn(2, 128).half(), random_weight(72, 128), out=torch.empty(2, 71).half())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rule_cuts_every_real_shape_sensibly(shape: str, direction: str) -> None:
    n, k = SHAPES[shape]
    out_size, sum_size = (n, k) if direction == "forward" else (k, n)
    for m in (1, 16, 17, 64, 128, 512, 4096):
        config = fused_config(m, n, k, 16, direction)
        along_k = config.block_r if direction == "forward" else config.block_o
        assert along_k % 64 == 0
        assert config.block_m >= min(m, 64)
        programs = -(-out_size // config.block_o) * -(-m // config.block_m) * config.splits
        assert programs >= 64
        assert sum_size // config.splits >= 1024
    assert not fused_config(16, n, k, MAX_RANK, direction).inline


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel of this file at the sizes of an 8B model."""

    def case(
        m: int, n: int, k: int, rank: int, dtype: torch.dtype, nested: bool, config: FusedConfig | None = None
    ) -> Callable[[], object]:
        def compile_both() -> None:
            with torch.device("meta"):
                weight = random_weight(n, k, nested=nested, device="meta")
                x, dy = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
                a = b = None
                if rank:
                    a, b = torch.empty(rank, k, dtype=dtype), torch.empty(n, rank, dtype=dtype)
                fused_forward(x, weight, a, b, 2.0, config=config)
                fused_backward_dx(dy, weight, a, b, 2.0, config=config)

        return compile_both

    bf16 = torch.bfloat16
    for m in (16, 64, 128, 512):
        yield f"rule, {m} tokens", case(m, 14336, 4096, 16, bf16, True)
    yield "rule, split", case(16, 4096, 4096, 16, bf16, True)
    yield "rank 256", case(64, 4096, 4096, 256, bf16, True)
    yield "no adapter, plain scales, fp16", case(32, 14336, 4096, 0, torch.float16, False)
    yield "odd sizes", case(33, 1000, 4032, 3, bf16, True)
    for name, config in VARIANTS.items():
        yield name, case(128, 4096, 4096, 16, bf16, True, config)
    # Where a card has no such tensor cores, the rule takes the other kernel for the same tokens.
    for m, n, k in ((192, 14336, 4096), (384, 28672, 4096), (320, 6144, 4096), (512, 4096, 4096), (512, 4096, 14336)):
        yield f"rule, {m} tokens, [{n}, {k}]", case(m, n, k, 16, bf16, True)
    yield "rule, 512 tokens, rank 64, plain scales, fp16", case(512, 6144, 4096, 64, torch.float16, False)
