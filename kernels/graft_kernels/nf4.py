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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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


def decode(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, bit for bit what `bitsandbytes.functional.dequantize_4bit` gives.

    Plain PyTorch, the definition of correct. It holds an fp32 copy (4 bytes per parameter) and an int32 index (2) while
    it works. For float64 the fp32 result is widened: that is the oracle the other dtypes are rounded from.
    """
    values = _byte_values(weight.device).index_select(0, weight.packed.view(-1).int()).view(-1)
    whole = weight.numel // weight.blocksize * weight.blocksize
    absmax = decode_absmax(weight)
    values[:whole].view(-1, weight.blocksize).mul_(absmax[: whole // weight.blocksize, None])
    if whole < weight.numel:
        values[whole:].mul_(absmax[-1])
    return values[: weight.numel].view(weight.shape).to(dtype)
