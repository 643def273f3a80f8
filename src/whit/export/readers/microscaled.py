"""Small floats with a scale for every 16 or 32 columns: NVFP4, MXFP4 and MXFP8 (OCP Microscaling Formats, 2023).

Codes of 4 bits lie two a byte, the even column in the low nibble: E2M1 with its sign as the highest bit.

    MXFP4: W = e2m1 * 2^(e - 127), e a byte per 32 columns;  MXFP8: the same with bytes of E4M3
    NVFP4: W = e2m1 * scale * s, scale in E4M3 per 16 columns, s one float32 of the matrix, which compressed-tensors
           stores as the divisor 1 / s (`weight_global_scale`) and ModelOpt as it is (`weight_scale_2`)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, shape_of
from whit.formats.ggml import KINDS, Ggml
from whit.tensor import QuantizedTensor

MXFP4 = Ggml("mxfp4")
NVFP4_NOTE = "NVFP4, which no format of whit is"
MXFP8_NOTE = "MXFP8, which no format of whit is"
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def two_codes(packed: Tensor) -> Tensor:
    """uint8 (..., n) to uint8 (..., 2 n): the low nibble of each byte first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def two_floats(packed: Tensor) -> Tensor:
    """uint8 (..., n), two E2M1 numbers each, to float32 (..., 2 n)."""
    doubled = torch.tensor(KINDS["mxfp4"].levels, dtype=torch.float32)
    return (doubled / 2)[two_codes(packed).int()]


def powers(exponents: Tensor) -> Tensor:
    """2^(e - 127) of E8M0 bytes, in float32; what would be NaN (255) as NaN."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.float32)


def mxfp4_linear(checkpoint: Checkpoint, weight: str, scale: str, others: tuple[str, ...] = ()) -> Packed:
    """A matrix in MXFP4: uint8 (N, K / 2) and E8M0 (N, K / 32), which is ggml's type of that name, code for code."""
    rows, half = shape_of(checkpoint, weight, 2, (torch.uint8,))
    columns = 2 * half
    _fits(checkpoint, scale, EXPONENTS, (rows, columns, 32))

    def read() -> QuantizedTensor:
        exponent = finite(checkpoint[scale].view(torch.uint8), scale)
        return QuantizedTensor(MXFP4, (rows, columns), two_codes(checkpoint[weight]), {"exponent": exponent})

    return Packed((weight, scale, *others), (rows, columns), MXFP4, read)


def finite(exponent: Tensor, key: str) -> Tensor:
    """Bytes of E8M0, or CheckpointError where one stands for no number."""
    if bool((exponent == 255).any()):
        raise CheckpointError(f"{key}: holds 255, which is not a scale; all must be; get the file again")
    return exponent


def nvfp4_linear(checkpoint: Checkpoint, keys: tuple[str, str, str], divides: bool, others: tuple[str, ...]) -> Packed:
    """A matrix in NVFP4, from its codes, its scales and the scale of the whole, by which those are divided or not."""
    rows, half = shape_of(checkpoint, keys[0], 2, (torch.uint8,))
    _fits(checkpoint, keys[1], (torch.float8_e4m3fn,), (rows, 2 * half, 16))
    whole = checkpoint.entries.get(keys[2])
    if whole is None or whole.spec.shape not in ((), (1,)):
        raise CheckpointError(
            f"{checkpoint.folder}: {keys[2]} is {'missing' if whole is None else list(whole.spec.shape)}; a matrix in "
            "NVFP4 has one such number; get the file again"
        )

    def read() -> Tensor:
        number, scale = checkpoint[keys[2]].float().reshape(()), checkpoint[keys[1]].float()
        return _scaled(two_floats(checkpoint[keys[0]]), scale / number if divides else scale * number)

    return Packed((*keys, *others), (rows, 2 * half), None, read, NVFP4_NOTE)


def mxfp8_linear(checkpoint: Checkpoint, weight: str, scale: str, others: tuple[str, ...] = ()) -> Packed:
    """A matrix in MXFP8: E4M3 (N, K) and E8M0 (N, K / 32)."""
    rows, columns = shape_of(checkpoint, weight, 2, (torch.float8_e4m3fn,))
    _fits(checkpoint, scale, EXPONENTS, (rows, columns, 32))
    return Packed(
        (weight, scale, *others), (rows, columns), None, partial(_mxfp8, checkpoint, weight, scale), MXFP8_NOTE
    )


def _mxfp8(checkpoint: Checkpoint, weight: str, scale: str) -> Tensor:
    return _scaled(checkpoint[weight].float(), powers(checkpoint[scale].view(torch.uint8)))


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """(N, K) times (N, G), each for K / G columns; in place."""
    weight.view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
    return weight


def _fits(checkpoint: Checkpoint, key: str, dtypes: tuple[torch.dtype, ...], wanted: tuple[int, int, int]) -> None:
    rows, columns, size = wanted
    found = shape_of(checkpoint, key, 2, dtypes)
    if columns % size or found != (rows, columns // size):
        raise CheckpointError(
            f"{checkpoint.folder}: {key} is {list(found)} for {[rows, columns]} in groups of {size}; there must be a "
            "scale for each; get the file again"
        )
