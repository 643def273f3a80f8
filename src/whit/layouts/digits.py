"""Digits of a small base, as many to a byte as fit: five of base 3, which is 1.6 bits each.

A byte is sum_i digit_i base^i, the first code in the lowest place; each row is padded with digit 0 to a whole byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.errors import CheckpointError


def digits_per_byte(base: int) -> int:
    """The largest n with base^n <= 256."""
    count = 0
    while base ** (count + 1) <= 256:
        count += 1
    return count


def pack_digits(codes: Tensor, base: int, code_min: int) -> Tensor:
    """Integers (rows, columns) in [code_min, code_min + base) to uint8 (rows, ceil(columns / digits_per_byte))."""
    count = digits_per_byte(base)
    digits = (codes.to(torch.int16) - code_min).to(torch.uint8)
    digits = torch.nn.functional.pad(digits, (0, -codes.shape[1] % count)).reshape(len(codes), -1, count)
    packed = digits[..., count - 1].clone()
    for i in range(count - 2, -1, -1):
        packed = packed * base + digits[..., i]
    return packed.contiguous()


def check_digits(packed: Tensor, base: int) -> None:
    """CheckpointError where a byte (uint8) is base^n or more, which is no n digits."""
    most = base ** digits_per_byte(base) - 1
    worst = int(packed.max()) if packed.numel() else 0
    if worst > most:
        raise CheckpointError(
            f"codes of base {base}: a byte is {worst}; it must be at most {most}; fetch the file again"
        )


def unpack_digits(packed: Tensor, columns: int, base: int, code_min: int) -> Tensor:
    """The inverse of `pack_digits`: uint8 (rows, columns), int8 where code_min < 0.

    CheckpointError for bytes of base^n and more, which are not digits; on a GPU, which asking would hold up, they are
    read modulo base^n.
    """
    if packed.device.type == "cpu":
        check_digits(packed, base)
    places = []
    for _ in range(digits_per_byte(base)):
        places.append(packed % base)
        packed = packed // base
    digits = torch.stack(places, dim=-1).reshape(len(packed), -1)[:, :columns]
    return (digits.to(torch.int8) + code_min) if code_min else digits.contiguous()
