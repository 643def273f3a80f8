"""What is behind a quantized product of an ONNX graph: tensors that must fit together, and the format that they are.

Codes of 2, 4 or 8 bits in blocks; scales of any float type; zero points packed like the codes, or floats; with
act-order the group of each column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from whit.checkpoint.onnx import OnnxFile
from whit.errors import CheckpointError
from whit.export.linears import take_rows
from whit.export.readers.base import SCALE_TYPES
from whit.formats.act_order import ActOrder
from whit.formats.affine import Affine
from whit.formats.numeric import dtype_name
from whit.layouts.affine import middle, signed
from whit.layouts.gptq import plain_groups
from whit.layouts.matmul_nbits import BITS, SMALLEST_BLOCK
from whit.layouts.stream import unpack_stream
from whit.tensor import Format, QuantizedTensor


@dataclass(frozen=True)
class Matrix:
    """The tensors behind one quantized product, by name: `zeros` of bytes or floats, `groups` of act-order."""

    module: str
    shape: tuple[int, int]
    bits: int
    size: int
    codes: str
    scales: str
    zeros: str | None
    groups: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in (self.codes, self.scales, self.zeros, self.groups) if key)


def require(file: OnnxFile, key: str, where: str) -> None:
    """CheckpointError unless there is a stored tensor of that name."""
    if key not in file.entries:
        raise CheckpointError(
            f"{where}: {key or 'a tensor'} is not stored in a type that whit knows; it must be; get the file again"
        )


def checked(file: OnnxFile, matrix: Matrix) -> Matrix:
    """The same, if its tensors are of the types and sizes that its numbers say."""
    (rows, columns), bits, size = matrix.shape, matrix.bits, matrix.size
    if bits not in BITS or size < SMALLEST_BLOCK or size & (size - 1) or rows < 1 or columns < 1:
        raise CheckpointError(
            f"{matrix.module}: {rows} rows, {columns} columns, {bits} bits in blocks of {size}; 2, 4 or 8 bits and a "
            "power of two from 16 it must be; get the file again"
        )
    for key in matrix.keys:
        require(file, key, matrix.module)
    blocks = -(-columns // size)
    _measure(file, matrix.codes, rows * blocks * size * bits // 8, (torch.uint8,))
    _measure(file, matrix.scales, rows * blocks, tuple(SCALE_TYPES))
    if matrix.zeros:
        floats = file.entries[matrix.zeros].spec.dtype.is_floating_point
        count = rows * (blocks if floats else -(-blocks * bits // 8))
        _measure(file, matrix.zeros, count, (torch.uint8, *SCALE_TYPES))
    return matrix


def _measure(file: OnnxFile, key: str, count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    spec = file.entries[key].spec
    if prod(spec.shape) != count or spec.dtype not in dtypes:
        kinds = " or ".join(dtype_name(dtype) for dtype in dtypes)
        raise CheckpointError(
            f"{key}: {spec.dtype} {list(spec.shape)}; its node's numbers want {count} elements of {kinds}; "
            "get the file again"
        )


def format_of(file: OnnxFile, matrix: Matrix) -> tuple[Format | None, str | None]:
    """The format that holds the matrix exactly; None, and why there is none."""
    kind = SCALE_TYPES[file.entries[matrix.scales].spec.dtype]
    zeros, is_float = file[matrix.zeros].float() if matrix.zeros else None, False
    if zeros is not None and matrix.zeros and file.entries[matrix.zeros].spec.dtype != torch.uint8:
        is_float = not torch.equal(zeros, zeros.clamp(0, (1 << matrix.bits) - 1).round())
        if is_float and not torch.equal(zeros.to(torch.float16).float(), zeros):
            return None, "zero points that float16 does not hold, as whit's formats would have them"
    format = Affine(matrix.bits, matrix.size, zeros is None, float_zero=is_float, scale_type=kind)
    if matrix.groups is None or torch.equal(_groups(file, matrix), plain_groups(matrix.shape[1], matrix.size)):
        return format, None
    return (None, "act-order with float zero points") if is_float else (ActOrder(format), None)


def _groups(file: OnnxFile, matrix: Matrix) -> Tensor:
    assert matrix.groups is not None
    columns, found = matrix.shape[1], file[matrix.groups].reshape(-1)[: matrix.shape[1]].to(torch.int32)
    blocks = -(-columns // matrix.size)
    if len(found) != columns or bool(((found < 0) | (found >= blocks)).any()):
        raise CheckpointError(f"{matrix.groups}: groups beyond the {blocks} that there are; get the file again")
    return found


def read_rows(file: OnnxFile, matrix: Matrix, format: Format | None, rows: Tensor) -> QuantizedTensor | Tensor:
    """Some rows in the format, or as floats where there is none."""
    count, columns = matrix.shape
    blocks = -(-columns // matrix.size)
    codes = unpack_stream(file[matrix.codes].reshape(count, -1), columns, matrix.bits, 0)[:, :columns].contiguous()
    scale = file[matrix.scales].reshape(count, blocks)
    zero = file[matrix.zeros] if matrix.zeros else None
    if zero is not None and zero.dtype == torch.uint8:
        zero = unpack_stream(zero.reshape(count, -1), blocks, matrix.bits, 0)
    zero = None if zero is None else zero.reshape(count, blocks).contiguous()
    if format is None:
        group = _groups(file, matrix).long() if matrix.groups else plain_groups(columns, matrix.size).long()
        zeros = torch.full_like(scale, middle(matrix.bits)) if zero is None else zero
        return ((codes.float() - zeros.float()[:, group]) * scale.float()[:, group])[rows]
    if isinstance(format, Affine) and format.float_zero:
        assert zero is not None
        params = {"scale": scale, "zero_point": zero.to(torch.float16)}
        return take_rows(QuantizedTensor(format, matrix.shape, codes, params), rows)
    groups = _groups(file, matrix) if isinstance(format, ActOrder) else None
    value = signed(format, matrix.shape, codes, scale, zero, groups)
    return value if len(rows) == count else _taken(value, rows)


def _taken(value: QuantizedTensor, rows: Tensor) -> QuantizedTensor:
    """Some rows; all share the groups of act-order."""
    found = take_rows(replace(value, params={n: p for n, p in value.params.items() if n != "group"}), rows)
    return replace(found, params={**value.params, **found.params})
