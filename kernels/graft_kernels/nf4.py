"""NF4: a frozen weight in 4.127 bits per parameter, and its exact decoding.

A weight W [N, K] is flattened row-major into n = N·K elements and cut into blocks of `blocksize` (64). Each element is
an index into 16 fixed values, each block has one scale:

    packed   [⌈n/2⌉]      uint8    byte i holds element 2i in its high nibble, element 2i+1 in its low nibble
    absmax   [B]          fp32     B = ⌈n/blocksize⌉; or, with double quantisation,
    absmax   [B]          uint8    indices into code2
    code2    [256]        fp32     the second level's values, as the checkpoint carries them
    absmax2  [⌈B/256⌉]    fp32     the second level's scales
    offset   []           fp32     the mean that was subtracted before the scales were quantised

Decoding rounds twice and never fuses a multiply with an add, which is what bitsandbytes does and what makes the result
the same to the last bit (a fused multiply-add changes 5 % of the scales):

    a = fp32(fp32(code2[absmax[b]] · absmax2[b // 256]) + offset)         b = flat index // blocksize
    w = round_to_nearest_even(fp32(code[nibble] · a))                     to the dtype asked for

The format and its code table are those of QLoRA (arXiv 2305.14314) as bitsandbytes stores them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graft_kernels.launch import INTERPRETED, cdiv, launch, runs_kernels, tl, triton

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SECOND_LEVEL_BLOCKSIZE = 256

# The 16 quantiles of a standard normal, scaled to [-1, 1]; each literal is the exact fp32 value.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class NF4Weight:
    """A frozen weight [N, K] in NF4. Shapes and meanings are in the module's docstring.

    Raises:
        ValueError: a tensor has the wrong dtype, size or device, or half of the second level is missing. Checked here
            once, so that no kernel ever reads past the end of a scale.
    """

    packed: Tensor
    shape: tuple[int, int]
    blocksize: int
    absmax: Tensor
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize is {self.blocksize}, expected one of {BLOCKSIZES}")
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape is {tuple(self.shape)}, expected two positive sizes (N, K)")
        num_bytes, num_blocks = (self.numel + 1) // 2, self.num_blocks
        _check("packed", self.packed, torch.uint8, num_bytes, self.device)
        second_level = (self.code2, self.absmax2, self.offset)
        if self.code2 is None and self.absmax2 is None and self.offset is None:
            if self.absmax.dtype == torch.uint8:
                raise ValueError("absmax is uint8 (double quantisation), but code2, absmax2 and offset are missing")
            _check("absmax", self.absmax, torch.float32, num_blocks, self.device)
            return
        if self.code2 is None or self.absmax2 is None or self.offset is None:
            names = ("code2", "absmax2", "offset")
            missing = ", ".join(name for name, part in zip(names, second_level, strict=True) if part is None)
            raise ValueError(f"double quantisation needs code2, absmax2 and offset; missing: {missing}")
        num_blocks2 = -(-num_blocks // SECOND_LEVEL_BLOCKSIZE)
        _check("absmax", self.absmax, torch.uint8, num_blocks, self.device)
        _check("code2", self.code2, torch.float32, 256, self.device)
        _check("absmax2", self.absmax2, torch.float32, num_blocks2, self.device)
        _check("offset", self.offset, torch.float32, 1, self.device)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def num_blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes this weight occupies, scales included."""
        parts = (self.packed, self.absmax, self.code2, self.absmax2, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device."""

        def move(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            code2=move(self.code2),
            absmax2=move(self.absmax2),
            offset=move(self.offset),
        )

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, state: Any) -> NF4Weight:
        """From `bitsandbytes.functional.quantize_4bit`'s two results; nothing is copied but the one-number offset.

        `packed` may be a view through another storage dtype (`quant_storage`): the bytes are what counts.

        Raises:
            ValueError: the state is not NF4, or is not for a matrix, or its second level has an unusual block size.
        """
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type is {state.quant_type!r}, expected 'nf4'")
        if state.shape is None or len(state.shape) != 2:
            raise ValueError(f"the quantised tensor has shape {state.shape}, expected a matrix [N, K]")
        flat = packed.detach().contiguous().view(-1).view(torch.uint8)
        shape = (int(state.shape[0]), int(state.shape[1]))
        if state.state2 is None:
            return cls(packed=flat, shape=shape, blocksize=state.blocksize, absmax=state.absmax)
        if state.state2.blocksize != SECOND_LEVEL_BLOCKSIZE:
            raise ValueError(f"the second level's blocksize is {state.state2.blocksize}, expected 256")
        if state.offset is None:
            raise ValueError("double quantisation needs an offset; the quantisation state has none")
        return cls(
            packed=flat,
            shape=shape,
            blocksize=state.blocksize,
            absmax=state.absmax,
            code2=state.state2.code,
            absmax2=state.state2.absmax,
            offset=torch.as_tensor(state.offset, dtype=torch.float32, device=flat.device).reshape(()),
        )


def _check(name: str, part: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if part.dtype != dtype:
        raise ValueError(f"{name} is {part.dtype}, expected {dtype}")
    if part.numel() != numel:
        raise ValueError(f"{name} has {part.numel()} elements, expected {numel}")
    if part.device != device:
        raise ValueError(f"{name} is on {part.device}, the packed weight on {device}")


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """The 16 values, [16] fp32, on `device`."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@functools.cache
def _byte_values(device: torch.device) -> Tensor:
    """[256, 2] fp32: the two values of every byte, high nibble first. One gather then decodes two elements."""
    code = torch.tensor(NF4_CODE, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1).to(device)


def decode_absmax(weight: NF4Weight) -> Tensor:
    """The scale of every block, [B] fp32."""
    if weight.code2 is None or weight.absmax2 is None or weight.offset is None:
        return weight.absmax
    scale2 = weight.absmax2.repeat_interleave(SECOND_LEVEL_BLOCKSIZE)[: weight.num_blocks]
    # Two statements, two roundings. addcmul would be free to contract them into one.
    absmax = weight.code2.index_select(0, weight.absmax.view(-1).int()).mul_(scale2)
    return absmax.add_(weight.offset)


def decode_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The definition of correct: W [N, K] in `dtype`. It holds an fp32 copy and an int32 index while it works."""
    values = _byte_values(weight.device).index_select(0, weight.packed.view(-1).int()).view(-1)
    whole = weight.numel // weight.blocksize * weight.blocksize
    absmax = decode_absmax(weight)
    values[:whole].view(-1, weight.blocksize).mul_(absmax[: whole // weight.blocksize, None])
    if whole < weight.numel:
        values[whole:].mul_(absmax[-1])
    return values[: weight.numel].view(weight.shape).to(dtype)


@triton.jit
def _scales_of(stored, code2, absmax2, offset, block, mask, NESTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 scales of the blocks `block`, of which absmax holds `stored`.

    a = code2[absmax[b]] · absmax2[b // 256] + offset, rounded twice: whoever calls it is launched with
    enable_fp_fusion=False, or the multiply and the add become one.
    """
    a = stored
    if NESTED:
        a = tl.load(code2 + stored.to(tl.int32)) * tl.load(absmax2 + block // 256, mask=mask, other=0.0)
        a += tl.load(offset)
    return a


@triton.jit
def code_by_lane(code, any_number, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `looked_up` takes: with LANES the value that this lane keeps, to Triton a scalar, and another in each."""
    if LANES:
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [any_number], tl.int32, is_pure=True, pack=1)
        code = tl.load(code + (lane & 15))
    return code


@triton.jit
def looked_up(code, nibbles, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code values of the low four bits of `nibbles`.

    With LANES by a shuffle within 16 lanes, which ignores higher bits: 10 % faster to decode than by loads, although
    all the sixteen lie in one line of the L1 cache. The interpreter has no lanes.
    """
    if LANES:
        values = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x100f, 0xffffffff;", "=f,f,r", [code, nibbles], tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        values = tl.load(code + (nibbles & 15))
    return values


@triton.jit
def _decode_tiles(  # type: ignore[no-untyped-def]
    packed, code, absmax, code2, absmax2, offset, out, first_block, num_blocks, blocks_per_row, out_stride,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # Bytes and scales of all tiles are asked for before the first store, past which the compiler moves no load: with a
    # tile at a time too few bytes are under way to keep the memory busy.
    half = tl.arange(0, BLOCKSIZE // 2)
    packed_bytes, stored = (), ()
    for tile in tl.static_range(TILES):
        block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS)
        mask = block < num_blocks
        byte_at = block.to(tl.int64)[:, None] * (BLOCKSIZE // 2) + half[None, :]
        packed_bytes += (tl.load(packed + byte_at, mask=mask[:, None], other=0),)  # type: ignore[assignment]
        stored += (tl.load(absmax + block, mask=mask, other=0),)  # type: ignore[assignment]
    for tile in tl.static_range(TILES):
        block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS)
        mask = block < num_blocks
        byte = packed_bytes[tile].to(tl.int32)  # type: ignore[var-annotated]
        a = _scales_of(stored[tile], code2, absmax2, offset, block, mask, NESTED)[:, None]
        high = looked_up(code, byte >> 4, LANES) * a
        low = looked_up(code, byte, LANES) * a
        values = tl.reshape(tl.join(high, low), (BLOCKS, BLOCKSIZE))
        row = block // blocks_per_row
        start = row.to(tl.int64) * out_stride + (block - row * blocks_per_row) * BLOCKSIZE
        at = start[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
        # The product that follows reads it from the L2 cache, as far as it is there yet; the bytes are not read again.
        tl.store(out + at, values.to(out.dtype.element_ty), mask=mask[:, None], eviction_policy="evict_last")


@triton.jit
def decode_part(  # type: ignore[no-untyped-def]
    program,
    packed0, absmax0, code2_0, absmax2_0, offset0,
    packed1, absmax1, code2_1, absmax2_1, offset1,
    packed2, absmax_2, code2_2, absmax2_2, offset2,
    code, out, num_blocks0, num_blocks1, num_blocks2, programs0, programs1, start1, start2,
    blocks_per_row, out_stride,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """What one program decodes of one to three weights, rows of one buffer; `decode_arguments` makes the arguments.

    Whole blocks, none of which straddles two rows (K % blocksize == 0): TILES tiles of BLOCKS blocks.
    """
    code = code_by_lane(code, num_blocks0, LANES)
    if program < programs0:
        _decode_tiles(packed0, code, absmax0, code2_0, absmax2_0, offset0, out,
                      program * TILES * BLOCKS, num_blocks0,
                      blocks_per_row, out_stride, NESTED, BLOCKSIZE, BLOCKS, TILES, LANES)  # fmt: skip
    elif program < programs0 + programs1:
        _decode_tiles(packed1, code, absmax1, code2_1, absmax2_1, offset1, out + start1,
                      (program - programs0) * TILES * BLOCKS, num_blocks1,
                      blocks_per_row, out_stride, NESTED, BLOCKSIZE, BLOCKS, TILES, LANES)  # fmt: skip
    else:
        _decode_tiles(packed2, code, absmax_2, code2_2, absmax2_2, offset2, out + start2,
                      (program - programs0 - programs1) * TILES * BLOCKS, num_blocks2,
                      blocks_per_row, out_stride, NESTED, BLOCKSIZE, BLOCKS, TILES, LANES)  # fmt: skip


@triton.jit(do_not_specialize=["programs0", "programs1", "blocks_per_row"])
def _decode_blocks_kernel(  # type: ignore[no-untyped-def]
    packed0, absmax0, code2_0, absmax2_0, offset0,
    packed1, absmax1, code2_1, absmax2_1, offset1,
    packed2, absmax_2, code2_2, absmax2_2, offset2,
    code, out, num_blocks0, num_blocks1, num_blocks2, programs0, programs1, start1, start2,
    blocks_per_row, out_stride,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    decode_part(
        tl.program_id(0),
        packed0, absmax0, code2_0, absmax2_0, offset0,
        packed1, absmax1, code2_1, absmax2_1, offset1,
        packed2, absmax_2, code2_2, absmax2_2, offset2,
        code, out, num_blocks0, num_blocks1, num_blocks2, programs0, programs1, start1, start2,
        blocks_per_row, out_stride, NESTED, BLOCKSIZE, BLOCKS, TILES, LANES,
    )  # fmt: skip


@triton.jit
def _decode_elements_kernel(  # type: ignore[no-untyped-def]
    packed, code, absmax, code2, absmax2, offset, out,
    numel, K, out_stride,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Any shape, element by element: rows may end inside a block, and inside a byte."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = flat < numel
    byte = tl.load(packed + flat // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(flat % 2 == 0, byte >> 4, byte & 15)
    block = flat // BLOCKSIZE
    a = _scales_of(tl.load(absmax + block, mask=mask, other=0), code2, absmax2, offset, block, mask, NESTED)
    value = tl.load(code + nibble) * a
    row = flat // K
    tl.store(out + row * out_stride + (flat - row * K), value.to(out.dtype.element_ty), mask=mask)


def _scales(weight: NF4Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax, code2, absmax2, offset; absmax in place of those that a plain weight does not have (never read)."""
    if weight.code2 is None or weight.absmax2 is None or weight.offset is None:
        return (weight.absmax,) * 4
    return weight.absmax, weight.code2, weight.absmax2, weight.offset


def decodes_in_one_launch(weights: Sequence[NF4Weight]) -> bool:
    """Up to three weights of one width and format, in whole blocks."""
    first = weights[0]
    alike = all(w.blocksize == first.blocksize and (w.code2 is None) == (first.code2 is None) for w in weights)
    return first.shape[1] % first.blocksize == 0 and alike and len(weights) <= 3


def decode_arguments(weights: Sequence[NF4Weight], out: Tensor) -> tuple[int, list[Any], dict[str, Any]]:
    """How many programs decode them, and the arguments and options of `decode_part`. The options are a launch's too."""
    first = weights[0]
    K, blocksize, nested = first.shape[1], first.blocksize, first.code2 is not None
    # Tiles of 2,048 elements (16 a thread), two a program: the best of a sweep on an H200.
    blocks, tiles = max(2048 // blocksize, 1), 2
    padded = [*weights, *[first] * (3 - len(weights))]
    num_blocks = [weight.num_blocks if i < len(weights) else 0 for i, weight in enumerate(padded)]
    programs = [cdiv(count, blocks * tiles) for count in num_blocks]
    start1 = first.shape[0] * out.stride(0)
    start2 = start1 + padded[1].shape[0] * out.stride(0)
    arguments: list[Any] = [operand for weight in padded for operand in (weight.packed, *_scales(weight))]
    arguments += [code_table(first.device), out, *num_blocks, programs[0], programs[1], start1, start2]
    arguments += [K // blocksize, out.stride(0)]
    options = {"NESTED": nested, "BLOCKSIZE": blocksize, "BLOCKS": blocks, "TILES": tiles, "LANES": not INTERPRETED}
    return sum(programs), arguments, {**options, "num_warps": 4, "enable_fp_fusion": False}


def _decode_forward(weights: Sequence[NF4Weight], out: Tensor) -> None:
    """One launch for weights that allow it; else one for each."""
    if decodes_in_one_launch(weights):
        programs, arguments, options = decode_arguments(weights, out)
        launch(_decode_blocks_kernel, (programs,), *arguments, **options)
        return
    row = 0
    for weight in weights:
        rows = out[row : row + weight.shape[0]]
        if len(weights) > 1:
            _decode_forward((weight,), rows)
        else:
            launch(
                _decode_elements_kernel, (cdiv(weight.numel, 1024),),
                weight.packed, code_table(weight.device), *_scales(weight), rows,
                weight.numel, weight.shape[1], rows.stride(0),
                NESTED=weight.code2 is not None, BLOCKSIZE=weight.blocksize, BLOCK=1024,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        row += weight.shape[0]


def decode_stacked(weights: Sequence[NF4Weight], dtype: torch.dtype, out: Tensor) -> Tensor:
    """Weights with the same K, one above the other: `out` [ΣN, K], as `decode` writes it. Up to three in one launch.

    Raises:
        ValueError: as `decode`, or the weights differ in K.
    """
    K = weights[0].shape[1]
    if any(weight.shape[1] != K for weight in weights):
        raise ValueError(f"weights of widths {[weight.shape[1] for weight in weights]} cannot be stacked")
    _check_out(out, (sum(weight.shape[0] for weight in weights), K), dtype)
    if runs_kernels(out, *(weight.packed for weight in weights)):
        _decode_forward(weights, out)
    else:
        row = 0
        for weight in weights:
            out[row : row + weight.shape[0]].copy_(decode_reference(weight, dtype))
            row += weight.shape[0]
    return out


def _check_out(out: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, expected {shape} {dtype}")
    if out.stride(1) != 1:
        raise ValueError("the elements of a row of out must lie side by side (stride 1)")


def decode(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """W [N, K] in `dtype`, bit for bit what `bitsandbytes.functional.dequantize_4bit` gives, in one launch.

    `out`, if given, is a [N, K] tensor of that dtype to write into. Its rows may lie apart (a column slice of a wider
    buffer), so that LoRA's columns can stand beside the weights. For float64 the fp32 result is widened: that is the
    oracle the other dtypes are rounded from.

    Raises:
        ValueError: `out` has another shape or dtype, or lies on another device, or its rows are not contiguous.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return decode_stacked((weight,), dtype, out)
