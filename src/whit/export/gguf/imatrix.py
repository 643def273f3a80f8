"""llama.cpp's importance matrices: for each tensor the mean square of every input column, in both of its file formats.

GGUF: `<tensor>.in_sum2` (matrices, columns) float32 sums of squares, `<tensor>.counts` (matrices, 1) float32 tokens,
general.type "imatrix", imatrix.datasets, .chunk_count, .chunk_size. The older .dat: int32 entries; for each int32
length, name, int32 calls, int32 values, float32 values (the mean times the calls); then int32 calls, int32 length,
data set. The mean square of a column is the diagonal of the hessian divided by the tokens.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whit.checkpoint.gguf import Strings, read_gguf
from whit.errors import CheckpointError
from whit.export.gguf.architectures import Architecture
from whit.export.gguf.header import Info, Value, gguf_shard
from whit.tensor import TensorSpec

SUM, COUNTS = ".in_sum2", ".counts"
F32 = 0


@dataclass(frozen=True)
class Imatrix:
    """`sums` maps llama.cpp's tensor names to (columns,) float32 sums of squares, `counts` to the tokens summed; of a
    stack of experts to (experts, columns) and (experts,).

    `chunks` of `chunk_size` tokens of `dataset` were seen.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, float | Tensor]
    dataset: str = ""
    chunks: int = 0
    chunk_size: int = 512

    def importance(self, architecture: Architecture) -> dict[str, Tensor]:
        """Mean squares (columns,) by the names of transformers' parameters, of stacks (experts, columns).

        An expert that no token reached has the mean of all.
        """
        named = {architecture.parameter_name(n) or architecture.stack_parameter(n): n for n in self.sums}
        return {p: _means(self.sums[n], self.counts[n]) for p, n in named.items() if p is not None}


def _means(sums: Tensor, counts: float | Tensor) -> Tensor:
    if not isinstance(counts, Tensor):
        return sums / max(counts, 1.0)
    pooled = sums.sum(dim=0) / counts.sum().clamp(min=1.0)
    return torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1.0), pooled)


def read_imatrix(path: Path) -> Imatrix:
    """A file of either kind; CheckpointError where it is damaged."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; an importance matrix must be there; check the path") from None
    return _read_gguf(path) if magic == b"GGUF" else _read_dat(path)


def gguf_bytes(imatrix: Imatrix) -> bytes:
    """The newer file format."""
    metadata: dict[str, Value] = {
        "general.type": "imatrix", "imatrix.datasets": [imatrix.dataset], "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }  # fmt: skip
    constants = {}
    for name in sorted(imatrix.sums):
        sums, counts = (
            imatrix.sums[name].reshape(-1, imatrix.sums[name].shape[-1]),
            torch.as_tensor(imatrix.counts[name]).reshape(-1, 1),
        )
        for suffix, value in ((SUM, sums), (COUNTS, counts)):
            shape = tuple(value.shape)
            info = Info(name + suffix, shape, F32, TensorSpec(shape, torch.float32))
            constants[info] = value.to(torch.float32).contiguous().numpy().tobytes()
    return gguf_shard("", metadata, constants, []).header


def dat_bytes(imatrix: Imatrix) -> bytes:
    """The older file format."""
    calls = max(imatrix.chunks, 1)
    parts = [struct.pack("<i", len(imatrix.sums))]
    for name in sorted(imatrix.sums):
        mean = _means(imatrix.sums[name], imatrix.counts[name]).reshape(-1)  # of experts one after another
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", calls, len(mean))]
        parts.append((mean * calls).to(torch.float32).numpy().tobytes())
    dataset = imatrix.dataset.encode()
    return b"".join([*parts, struct.pack("<ii", calls, len(dataset)), dataset])


def _read_gguf(path: Path) -> Imatrix:
    header = read_gguf(path)
    if header.metadata.get("general.type") != "imatrix":
        raise CheckpointError(f"{path}: a GGUF file, but no importance matrix; it must be one; give another file")
    values: dict[str, Tensor] = {}
    with path.open("rb") as file:
        for tensor in header.tensors.values():
            is_matrix = len(tensor.shape) == 2 and tensor.stop > tensor.start
            if tensor.type != "F32" or not is_matrix or not tensor.name.endswith((SUM, COUNTS)):
                raise CheckpointError(
                    f"{path}: {tensor.name!r}, {tensor.type} {list(tensor.shape)}; tensors must be float32 matrices "
                    f"named *{SUM} and *{COUNTS}; get another copy"
                )
            file.seek(tensor.start)
            data = bytearray(file.read(tensor.stop - tensor.start))
            values[tensor.name] = torch.frombuffer(data, dtype=torch.float32).reshape(tensor.shape)
    sums, counts = dict[str, Tensor](), dict[str, float | Tensor]()
    for key in [key for key in values if key.endswith(SUM)]:
        name = key.removesuffix(SUM)
        count = values.get(name + COUNTS)
        if count is None or len(count) != len(values[key]):
            raise CheckpointError(f"{path}: {key} without its {COUNTS}; both must be there; get another copy")
        found = _checked(values[key], path, name)
        one = len(count) == 1
        sums[name], counts[name] = (found[0], float(count.flatten()[0])) if one else (found, count.flatten())
    datasets = header.metadata.get("imatrix.datasets", Strings(b"", array("Q")))
    chunks, size = (header.metadata.get(f"imatrix.chunk_{key}", 0) for key in ("count", "size"))
    if not isinstance(datasets, Strings) or type(chunks) is not int or type(size) is not int:
        raise CheckpointError(
            f"{path}: imatrix.datasets, .chunk_count and .chunk_size are not texts and two counts; they must be; "
            "get another copy"
        )
    return Imatrix(sums, counts, ", ".join(datasets), chunks, size or 512)


def _read_dat(path: Path) -> Imatrix:
    data, position = path.read_bytes(), 0

    def number(what: str) -> int:
        nonlocal position
        if position + 4 > len(data):
            raise CheckpointError(f"{path}: ends before {what}; it must be whole; get another copy")
        (found,) = struct.unpack_from("<i", data, position)
        position += 4
        if not 0 <= found <= len(data):
            raise CheckpointError(f"{path}: {what} is {found} in a file of {len(data)} bytes; get another copy")
        return int(found)

    def take(count: int, what: str) -> bytes:
        nonlocal position
        if position + count > len(data):
            raise CheckpointError(f"{path}: ends within {what}; it must be whole; get another copy")
        position += count
        return data[position - count : position]

    sums, counts = dict[str, Tensor](), dict[str, float | Tensor]()
    for _ in range(number("the number of entries")):
        name = take(number("the length of a name"), "a name").decode("utf-8", errors="replace")
        calls, count = number(f"the calls of {name!r}"), number(f"the values of {name!r}")
        if not count:
            raise CheckpointError(f"{path}: {name!r} has no values; every entry has some; get another copy")
        values = torch.frombuffer(bytearray(take(4 * count, f"the values of {name!r}")), dtype=torch.float32)
        sums[name], counts[name] = _checked(values, path, name), float(max(calls, 1))
    chunks = number("the number of chunks") if position < len(data) else 0
    dataset = (
        take(number("the length of the data set"), "the data set").decode(errors="replace")
        if position < len(data)
        else ""
    )
    return Imatrix(sums, counts, dataset, chunks)


def _checked(values: Tensor, path: Path, name: str) -> Tensor:
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise CheckpointError(f"{path}: {name} holds negative or infinite squares; they must be sums; get another copy")
    return values
