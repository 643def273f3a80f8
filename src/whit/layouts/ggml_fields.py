"""The fields of ggml's blocks of bytes, as data: a block is its fields in order, for `group_size` columns of a row.

Values are unsigned integers: codes less the smallest code, sub-scales with their bias. A field either holds a float16
(`Half`), or bit planes of some values (`Planes`): runs of `width` values whose bits are laid over each other, the
first lowest. Two fields are cut another way: the 12 bytes of sixteen 6-bit numbers of Q4_K and Q5_K, and the base-3
digits of TQ1_0. Facts from ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Values = Mapping[str, Tensor]  # name to uint8 (blocks, count)


class Field(Protocol):
    """Some bytes of a block. `unpack` gives the part of the values that the bytes hold; parts are added up."""

    @property
    def size(self) -> int: ...
    def pack(self, values: Values) -> Tensor: ...
    def unpack(self, data: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Bytes:
    """A param whose bytes lie as they are: a float16, or an exponent."""

    name: str
    size: int = 2

    def pack(self, values: Values) -> Tensor:
        return values[self.name]

    def unpack(self, data: Tensor) -> dict[str, Tensor]:
        return {self.name: data}


@dataclass(frozen=True)
class Planes:
    """Bits [first, first + bits) of the values `names` (one after the other).

    Of every `count` runs of `width` values, byte i holds value i of each run, `bits` bits each, the first run lowest.
    `flip` is added to each byte without carry (signed bytes: 128).
    """

    names: tuple[str, ...]
    first: int
    bits: int
    repeats: int
    count: int
    width: int
    flip: int = 0

    @property
    def size(self) -> int:
        return self.repeats * self.width

    def pack(self, values: Values) -> Tensor:
        joined = torch.cat([values[name] for name in self.names], dim=1)
        runs = ((joined >> self.first) & ((1 << self.bits) - 1)).reshape(-1, self.repeats, self.count, self.width)
        out = runs[:, :, 0].clone()
        for i in range(1, self.count):
            out |= runs[:, :, i] << (i * self.bits)
        return out.reshape(-1, self.size) ^ self.flip

    def unpack(self, data: Tensor) -> dict[str, Tensor]:
        planes = (data ^ self.flip).reshape(-1, self.repeats, 1, self.width)
        shifts = torch.arange(0, self.bits * self.count, self.bits, dtype=torch.uint8, device=data.device)
        runs = ((planes >> shifts[:, None]) & ((1 << self.bits) - 1)) << self.first
        parts = runs.reshape(len(data), -1).chunk(len(self.names), dim=1)
        return dict(zip(self.names, parts, strict=True))


@dataclass(frozen=True)
class SixBitPairs:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes (Q4_K, Q5_K).

    Bytes 0-3: scales 0-3 and above them the top two bits of scales 4-7; bytes 4-7: the same of the minima; bytes
    8-11: the low four bits of scales 4-7 and above them those of minima 4-7.
    """

    size: int = 12

    def pack(self, values: Values) -> Tensor:
        scale, least = values["scale"], values["min"]
        return torch.cat(
            [
                scale[:, :4] | (scale[:, 4:] >> 4 << 6),
                least[:, :4] | (least[:, 4:] >> 4 << 6),
                (scale[:, 4:] & 15) | ((least[:, 4:] & 15) << 4),
            ],
            dim=1,
        )

    def unpack(self, data: Tensor) -> dict[str, Tensor]:
        scale, least, low = data[:, :4], data[:, 4:8], data[:, 8:]
        return {
            "scale": torch.cat([scale & 63, (low & 15) | (scale >> 6 << 4)], dim=1),
            "min": torch.cat([least & 63, (low >> 4) | (least >> 6 << 4)], dim=1),
        }


@dataclass(frozen=True)
class Trits:
    """Codes from `start` on, `count` runs of `width`, as base-3 digits of a byte, the first run highest (TQ1_0).

    The byte is ceil(256 v / 243) with v of five digits, so that v's digits come out of multiplications alone.
    """

    start: int
    count: int
    width: int

    @property
    def size(self) -> int:
        return self.width

    def pack(self, values: Values) -> Tensor:
        stop = self.start + self.count * self.width
        digits = values["codes"][:, self.start : stop].reshape(-1, self.count, self.width).to(torch.int32)
        powers = torch.tensor([81, 27, 9, 3, 1][: self.count], dtype=torch.int32, device=digits.device)
        number = (digits * powers[:, None]).sum(dim=1)
        return ((number * 256 + 242) // 243).to(torch.uint8)

    def unpack(self, data: Tensor) -> dict[str, Tensor]:
        powers = torch.tensor([1, 3, 9, 27, 81][: self.count], dtype=torch.uint8, device=data.device)
        shifted = data[:, None] * powers[:, None]  # wraps: the digits before are gone
        digits = ((shifted.to(torch.int32) * 3) >> 8).to(torch.uint8).reshape(len(data), -1)
        codes = torch.zeros(len(data), 256, dtype=torch.uint8, device=data.device)
        codes[:, self.start : self.start + digits.shape[1]] = digits
        return {"codes": codes}


def _codes(bits: int, repeats: int, count: int, width: int, first: int = 0) -> Planes:
    return Planes(("codes",), first, bits, repeats, count, width)


D, DMIN, M = Bytes("d"), Bytes("dmin"), Bytes("m")
HALVES = _codes(4, 1, 2, 16)  # byte j: element j low, element j + 16 high
FIFTH = _codes(1, 4, 8, 1, first=4)  # bit j: the fifth bit of element j
PAIRS = _codes(2, 2, 4, 32)  # per 128 elements: 32 bytes, the first 32 elements lowest

FIELDS: dict[str, tuple[Field, ...]] = {
    "q4_0": (D, HALVES),
    "q4_1": (D, M, HALVES),
    "q5_0": (D, FIFTH, HALVES),
    "q5_1": (D, M, FIFTH, HALVES),
    "q8_0": (D, Planes(("codes",), 0, 8, 1, 1, 32, flip=128)),
    "q2_k": (Planes(("scale", "min"), 0, 4, 1, 2, 16), PAIRS, D, DMIN),
    "q3_k": (
        _codes(1, 1, 8, 32, first=2), PAIRS,
        Planes(("scale",), 0, 4, 1, 2, 8), Planes(("scale",), 4, 2, 1, 4, 4), D,
    ),
    "q4_k": (D, DMIN, SixBitPairs(), _codes(4, 4, 2, 32)),
    "q5_k": (D, DMIN, SixBitPairs(), _codes(1, 1, 8, 32, first=4), _codes(4, 4, 2, 32)),
    "q6_k": (_codes(4, 2, 2, 64), _codes(2, 2, 4, 32, first=4), Planes(("scale",), 0, 8, 1, 1, 16, flip=128), D),
    "iq4_nl": (D, HALVES),
    "iq4_xs": (
        D, Planes(("scale",), 4, 2, 2, 4, 1), Planes(("scale",), 0, 4, 4, 2, 1), _codes(4, 8, 2, 16),
    ),
    "tq1_0": (Trits(0, 5, 32), Trits(160, 5, 16), Trits(240, 4, 4), D),
    "tq2_0": (PAIRS, D),
    "mxfp4": (Bytes("exponent", 1), HALVES),
}  # fmt: skip
