"""Integers of k bits to a stream of bytes and back, least significant bit first, each row padded to a whole byte."""

from __future__ import annotations

import torch
from torch import Tensor

# Codes of 4, 2 and 1 bits lie whole in a byte. A wider integer per byte spreads them to bytes of their own by a few
# (word | word << shift) & mask over the whole tensor; the mask of one step undoes the next one when packing.
SPREADS: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}

CHUNK = 1 << 22  # codes that are packed at a time


def pack_stream(codes: Tensor, bits: int, code_min: int) -> Tensor:
    """Integers (rows, columns) in [code_min, code_min + 2^bits) to uint8 (rows, ceil(columns * bits / 8))."""
    if bits == 16:
        return codes.contiguous()
    rows, columns = codes.shape
    if (few := max(CHUNK // max(columns, 1), 1)) < rows:  # not several tensors as large as the codes beside them
        stream = codes.new_empty((rows, -(-columns * bits // 8)), dtype=torch.uint8)
        for part, place in zip(torch.split(codes, few), torch.split(stream, few), strict=True):
            place.copy_(pack_stream(part, bits, code_min))
        return stream
    unsigned = codes.view(torch.uint8) - (code_min & 0xFF)  # wraps
    if bits == 8:
        return unsigned
    if missing := -columns % 8:
        unsigned = torch.nn.functional.pad(unsigned, (0, missing))
    stream = _gather(unsigned, bits) if bits in SPREADS else _join(unsigned, bits)
    return stream[:, : -(-columns * bits // 8)].contiguous()


def unpack_stream(stream: Tensor, columns: int, bits: int, code_min: int) -> Tensor:
    """The inverse of `pack_stream`: uint8 (rows, columns), int8 where code_min < 0, int16 for 16 bits."""
    if bits == 16:
        return stream
    if bits < 8:
        stream = stream.contiguous()  # a kernel may hold it in another order of strides
        stream = (_spread(stream, bits) if bits in SPREADS else _split(stream, bits))[:, :columns]
    return (stream + (code_min & 0xFF)).view(torch.int8) if code_min else stream


def _spread(stream: Tensor, bits: int) -> Tensor:
    dtype, steps = SPREADS[bits]
    words = stream.to(dtype)
    for shift, mask in steps:
        words = ((words << shift) | words) & mask
    return words.view(torch.uint8)


def _gather(unsigned: Tensor, bits: int) -> Tensor:
    dtype, steps = SPREADS[bits]
    words = unsigned.contiguous().view(dtype)
    masks = [0xFF, *(mask for _, mask in steps)]
    for index in range(len(steps) - 1, -1, -1):
        words = ((words >> steps[index][0]) | words) & masks[index]
    return words.to(torch.uint8)


def _join(unsigned: Tensor, bits: int) -> Tensor:
    """Eight codes fill `bits` bytes; a byte gathers every code that overlaps it."""
    rows, columns = unsigned.shape
    octets = unsigned.reshape(rows, columns // 8, 8)
    out = torch.zeros(rows, columns // 8, bits, dtype=torch.uint8, device=unsigned.device)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        out[..., first] |= octets[..., i] << shift
        if shift + bits > 8:
            out[..., first + 1] |= octets[..., i] >> (8 - shift)
    return out.reshape(rows, columns // 8 * bits)


def _split(stream: Tensor, bits: int) -> Tensor:
    if missing := -stream.shape[1] % bits:
        stream = torch.nn.functional.pad(stream, (0, missing))
    rows, count = stream.shape[0], stream.shape[1] // bits
    chunks = stream.reshape(rows, count, bits)
    octets = torch.empty(rows, count, 8, dtype=torch.uint8, device=stream.device)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        code = chunks[..., first] >> shift
        if shift + bits > 8:
            code = code | (chunks[..., first + 1] << (8 - shift))
        octets[..., i] = code & ((1 << bits) - 1)
    return octets.reshape(rows, count * 8)
