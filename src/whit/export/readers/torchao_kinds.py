"""What each of torchao's tensor classes holds. N rows, K columns, before them stacks of experts; G groups of a row.

Int8Tensor                qdata int8 (N, K), scale per block; IntxUnpackedToInt8Tensor: the same of 1 to 8 bits
Int4Tensor                qdata bytes (N, K / 2), the even column in the low half, as two's complement; scale and
                          zero_point (G, N): w = code scale + zero_point
Int4TilePackedTo4dTensor  the tiles of a tensor core, see `untile`; scale_and_zero (G, N, 2), as above
Float8Tensor              qdata E4M3 or E5M2 (N, K), scale per block
MXTensor, NVFP4Tensor     small floats, scale E8M0 (N, K / 32) or E4M3 (N, K / 16) and per_tensor_scale, see
                          `unswizzle`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed
from whit.export.readers.blocks import Blocks, affine_blocks, offset_groups
from whit.export.readers.microscaled import MXFP4, MXFP8_NOTE, NVFP4_NOTE, finite, powers, two_codes, two_floats
from whit.formats.microfloat import Float8
from whit.tensor import QuantizedTensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTES = (torch.int8, torch.uint8)
FP8_NOTE = "FP8 in blocks or in E5M2, which no format of whit is"


@dataclass(frozen=True)
class Stored:
    """A parameter as the file has it: the class's attributes, and its tensors by the class's names for them."""

    checkpoint: Checkpoint
    name: str
    said: Mapping[str, Any]
    keys: Mapping[str, str]

    @property
    def where(self) -> str:
        return f"{self.checkpoint.folder}: {self.name}"

    def read(self, key: str) -> Tensor:
        return self.checkpoint[self.keys[key]]

    def names(self) -> tuple[str, ...]:
        """All its tensors, codes first."""
        return (self.keys["qdata"], *(key for name, key in self.keys.items() if name != "qdata"))

    def spec(self, key: str, *dtypes: torch.dtype, dimensions: int = 0) -> tuple[int, ...]:
        """The shape of a tensor, or CheckpointError where it is of another kind."""
        spec = self.checkpoint.entries[self.keys[key]].spec
        if spec.dtype not in dtypes or (dimensions and len(spec.shape) != dimensions):
            raise CheckpointError(
                f"{self.where}: its {key} is {spec.dtype} {list(spec.shape)}, which its class has not; get the file "
                "again"
            )
        return spec.shape

    def block(self, key: str = "block_size") -> tuple[int, ...]:
        """A list of sizes among the attributes."""
        found = self.said.get(key)
        if not isinstance(found, list) or not found or not all(type(n) is int and n > 0 for n in found):
            raise CheckpointError(f"{self.where}: {key} {str(found)[:60]}; it must be sizes; get the file again")
        return tuple(found)

    def shape(self, last: int, leading: tuple[int, ...]) -> tuple[int, ...]:
        """The original shape among the attributes, which must be what the codes say."""
        found = self.block("shape")
        if found != (*leading, last):
            raise CheckpointError(
                f"{self.where}: shape {list(found)}, and codes for {[*leading, last]}; both must agree"
            )
        return found


def _int8(stored: Stored) -> Packed:
    return _integers(stored, 8)


def _intx(stored: Stored) -> Packed:
    kind = str(stored.said.get("target_dtype"))
    if kind not in {f"int{bits}" for bits in range(1, 9)}:
        raise CheckpointError(f"{stored.where}: codes of {kind[:40]}; they must be int1 to int8; get the file again")
    return _integers(stored, int(kind.removeprefix("int")))


def _integers(stored: Stored, bits: int) -> Packed:
    shape = stored.spec("qdata", torch.int8)
    stored.spec("scale", *SCALE_TYPES)
    said = Blocks(stored.where, stored.names(), shape, stored.block(), bits, -(1 << bits - 1))
    zero = stored.read("zero_point") if "zero_point" in stored.keys else None
    return affine_blocks(said, stored.read("scale"), zero, lambda: stored.read("qdata"))


def _int4(stored: Stored) -> Packed:
    *leading, half = stored.spec("qdata", *BYTES)
    shape, block = stored.shape(2 * half, tuple(leading)), stored.block()
    count = -(-shape[-1] // block[-1])
    params = (*shape[:-2], count, *shape[-2:-1])
    for key in ("scale", "zero_point"):
        if key not in stored.keys or stored.spec(key, *SCALE_TYPES) != params:
            raise CheckpointError(f"{stored.where}: its {key} must be {list(params)}; get the file again")
    scale, offset = (stored.read(key).mT.reshape(-1, count) for key in ("scale", "zero_point"))
    said = Blocks(stored.where, stored.names(), shape, block, 4, 0)
    return offset_groups(said, scale, offset, lambda: two_codes(stored.read("qdata").view(torch.uint8)) ^ 8)


def _tiled(stored: Stored) -> Packed:
    tiles = stored.spec("qdata", torch.int32, dimensions=4)
    shape, block = stored.block("shape"), stored.block()
    rows, columns = 8 * tiles[0], 32 * tiles[3] * tiles[1]
    groups, outs, two = stored.spec("scale_and_zero", *SCALE_TYPES, dimensions=3)
    fits = len(shape) == 2 and rows - 8 < shape[0] <= rows and shape[1] <= columns and tiles[2] == 32
    if not fits or two != 2 or outs != rows or groups != -(-columns // block[-1]):
        raise CheckpointError(
            f"{stored.where}: tiles {list(tiles)} and {[groups, outs, two]} scales for {list(shape)} in groups of "
            f"{block[-1]}; whit reads the tiles of NVIDIA's GPUs, 8 rows each; quantize the original model"
        )
    params = stored.read("scale_and_zero")[: -(-shape[1] // block[-1]), : shape[0]]
    scale, offset = (part.t().contiguous() for part in params.unbind(-1))
    said = Blocks(stored.where, stored.names(), shape, block, 4, 0)
    return offset_groups(said, scale, offset, lambda: untile(stored.read("qdata"))[: shape[0], : shape[1]].contiguous())


def untile(tiles: Tensor) -> Tensor:
    """int32 (n, k, 32, i) to uint8 (8 n, 32 i k): lane t of a tile has row t / 4, a word two runs of 16 columns.

    Of a run it has columns c, c + 1, c + 8, c + 9, c = 2 (t % 4): the even ones of both in the low half of the word.
    """
    n, k, lanes, words = tiles.shape
    halves = torch.stack([(tiles >> 4 * place) & 15 for place in range(8)], dim=-1).to(torch.uint8)
    # place p: column p / 4 + 8 (p % 2) of run (p / 2) % 2, so that its three bits are (odd, run, eighth)
    parts = halves.reshape(n, k, 8, 4, words, 2, 2, 2)
    return parts.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * n, lanes * words * k)


def _float8(stored: Stored) -> Packed:
    shape, names = stored.spec("qdata", *FP8), stored.names()
    stored.spec("scale", *SCALE_TYPES)
    scale = stored.read("scale").float()
    sizes = stored.block() if stored.said.get("block_size") else shape
    said = Blocks(stored.where, names, shape, sizes if scale.numel() > 1 else shape, 8, 0)
    scale = said.of_rows(scale)
    rows = prod(shape[:-1])
    if said.group_size != 0 or stored.checkpoint.entries[names[0]].spec.dtype != FP8[0]:
        return Packed(names, shape, None, lambda: stored.read("qdata").float() * said.spread(scale), FP8_NOTE)
    format = Float8()

    def value() -> QuantizedTensor:
        codes = stored.read("qdata").view(torch.uint8).reshape(rows, -1)
        return QuantizedTensor(format, shape, codes, {"scale": scale.expand(rows, 1).contiguous()})

    return Packed(names, shape, format, value)


def _mx(stored: Stored) -> Packed:
    kind, size = str(stored.said.get("elem_dtype")), stored.said.get("block_size")
    if kind == "float4_e2m1fn_x2" and size == 32:
        *leading, half = stored.spec("qdata", torch.uint8)
        shape = (*leading, 2 * half)
        exponent = _scales(stored, shape, 32, torch.float8_e8m0fnu, torch.uint8)

        def value() -> QuantizedTensor:
            codes = two_codes(stored.read("qdata")).reshape(-1, shape[-1])
            return QuantizedTensor(MXFP4, shape, codes, {"exponent": finite(exponent().view(torch.uint8), stored.name)})

        return Packed(stored.names(), shape, MXFP4, value)
    if kind not in ("float8_e4m3fn", "float8_e5m2") or type(size) is not int or size < 1:
        raise CheckpointError(
            f"{stored.where}: MX of {kind[:40]} in blocks of {str(size)[:40]}; whit reads float8 and, in blocks of 32, "
            "float4; quantize the original model"
        )
    shape = stored.spec("qdata", getattr(torch, kind))
    scales = _scales(stored, shape, size, torch.float8_e8m0fnu, torch.uint8)

    def floats() -> Tensor:
        groups = stored.read("qdata").float().reshape(-1, shape[-1] // size, size)
        return (groups * powers(scales().view(torch.uint8)).unsqueeze(-1)).reshape(shape)

    return Packed(stored.names(), shape, None, floats, MXFP8_NOTE)


def _nvfp4(stored: Stored) -> Packed:
    *leading, half = stored.spec("qdata", torch.uint8)
    shape = (*leading, 2 * half)
    scales = _scales(stored, shape, 16, torch.float8_e4m3fn)
    whole = "per_tensor_scale" in stored.keys
    if whole and prod(stored.spec("per_tensor_scale", torch.float32)) not in (1, prod(shape[:-2])):
        raise CheckpointError(f"{stored.where}: its per_tensor_scale must be one number; get the file again")

    def floats() -> Tensor:
        scale = scales().float()
        if whole:
            number = stored.read("per_tensor_scale").reshape(-1, 1, 1)  # of the whole, or of each expert
            scale = (number * scale.view(len(number), -1, scale.shape[-1])).view(scale.shape)
        groups = two_floats(stored.read("qdata")).reshape(-1, shape[-1] // 16, 16)
        return (groups * scale.unsqueeze(-1)).reshape(shape)

    return Packed(stored.names(), shape, None, floats, NVFP4_NOTE)


def _scales(stored: Stored, shape: tuple[int, ...], size: int, *dtypes: torch.dtype) -> Callable[[], Tensor]:
    """A reader of (rows, K / size) scales, which the file may have in the order of NVIDIA's tensor cores."""
    rows, groups = prod(shape[:-1]), shape[-1] // size
    found, swizzled = prod(stored.spec("scale", *dtypes)), bool(stored.said.get("is_swizzled_scales"))
    wanted = -(-rows // 128) * 128 * (-(-groups // 4) * 4) if swizzled else rows * groups
    if shape[-1] % size or found != wanted or not rows:
        raise CheckpointError(
            f"{stored.where}: {found} scales for {list(shape)} in groups of {size}; there must be {wanted}; get the "
            "file again"
        )
    if not swizzled:
        return lambda: stored.read("scale").reshape(rows, groups)
    return lambda: unswizzle(stored.read("scale"), rows, groups)


def unswizzle(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Scales in tiles of 128 rows and 4 groups to (rows, groups): a tile is 32 runs of (4 rows 32 apart, 4 groups)."""
    tiles = scale.view(torch.uint8).reshape(-(-rows // 128), -(-groups // 4), 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)
    return plain[:rows, :groups].contiguous().view(scale.dtype)


Kind: TypeAlias = Callable[[Stored], Packed]
KINDS: Mapping[str, Kind] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _tiled,
    "Float8Tensor": _float8,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
}
