"""The graph of an ONNX file and where its initializers lie, read with suspicion.

The protobuf is parsed by the package onnx; whatever it says of places and sizes is held against the files: external
data must be a file of the model's own folder and hold all bytes of its tensor, other data must be just as long as its
shape. Nothing is allocated by a number in the file that its bytes do not back.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.header import Entry
from whit.checkpoint.reader import TensorFiles
from whit.errors import CheckpointError, UnsupportedModelError
from whit.extras import missing
from whit.tensor import TensorSpec

DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16,
    11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
MAX_BYTES = (1 << 31) - 1  # of a protobuf message
MAX_DIMENSIONS, MAX_ELEMENTS = 8, 1 << 62


@dataclass(frozen=True)
class Node:
    """An operator. Of the attributes only numbers, strings and small tensors' bytes are kept."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def integer(self, name: str, default: int = 0) -> int:
        """An attribute that is an integer."""
        found = self.attributes.get(name, default)
        return found if isinstance(found, int) else default


class OnnxFile(TensorFiles):
    """Initializers by name, and the `nodes`. What lies in the graph itself has an entry without a place: 0 to 0."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.folder = path, path.parent
        self._inline: dict[str, Callable[[], Tensor]] = {}
        graph = _parsed(path).graph
        for tensor in graph.initializer:
            if tensor.name in self.entries:
                raise CheckpointError(f"{path}: {tensor.name!r} is there twice; names must be unique; get another copy")
            if tensor.data_type in DTYPES:  # others are named where they are wanted
                self._add(tensor)
        self.nodes = tuple(_node(node) for node in graph.node)
        self.shards = tuple(dict.fromkeys([path, *(entry.path for entry in self.entries.values())]))

    def __getitem__(self, name: str) -> Tensor:
        return self._inline[name]() if name in self._inline else super().__getitem__(name)

    def _add(self, tensor: Any) -> None:
        where, shape = f"{self.path}: {tensor.name!r}", tuple(tensor.dims)
        if len(shape) > MAX_DIMENSIONS or any(n < 0 for n in shape) or prod(n or 1 for n in shape) >= MAX_ELEMENTS:
            raise CheckpointError(f"{where} is {list(shape)[:9]}; no tensor can be; get another copy")
        spec = TensorSpec(shape, DTYPES[tensor.data_type])
        if tensor.data_location == 1:
            self.entries[tensor.name] = self._external(tensor, spec, where)
            return
        if tensor.HasField("raw_data") and len(tensor.raw_data) != spec.nbytes:
            raise CheckpointError(
                f"{where} is {spec.dtype} {list(shape)} and has {len(tensor.raw_data)} bytes; it must have "
                f"{spec.nbytes}; get another copy"
            )
        self.entries[tensor.name] = Entry(self.path, spec, 0, 0)
        self._inline[tensor.name] = partial(_inline, tensor, spec, where)

    def _external(self, tensor: Any, spec: TensorSpec, where: str) -> Entry:
        """A tensor in a file beside the graph."""
        said = {pair.key: pair.value for pair in tensor.external_data}
        name = said.get("location", "")
        path = self.folder / name
        home = self.folder.resolve()
        homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
        parts = Path(name).parts
        inside = bool(parts) and ".." not in parts and not Path(name).is_absolute() and "\0" not in name
        if not inside or not any(path.resolve().is_relative_to(place) for place in homes) or not path.is_file():
            raise CheckpointError(
                f"{where} lies in the file {name!r}; it must be one in the model's folder; get the whole model"
            )
        offset, length = said.get("offset", "0"), said.get("length", str(spec.nbytes))
        size = path.stat().st_size
        numbers = offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()
        if not numbers or len(offset) > 20 or int(length[:20]) != spec.nbytes or int(offset) + spec.nbytes > size:
            raise CheckpointError(
                f"{where}, {spec.dtype} {list(spec.shape)}, takes {length[:20]} bytes from {offset[:20]} on of {name}, "
                f"which has {size}; all {spec.nbytes} must be there; download it again"
            )
        return Entry(path, spec, int(offset), int(offset) + spec.nbytes)


def onnx_graph(folder: Path) -> Path | None:
    """The .onnx file of a model folder; None where the folder has safetensors, or no such file."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    found = sorted(folder.glob("*.onnx"))
    if len(found) < 2 or (folder / "model.onnx") in found:
        return folder / "model.onnx" if len(found) > 1 else next(iter(found), None)
    names = ", ".join(path.name for path in found)
    raise CheckpointError(f"{folder}: {names}; a model folder must hold one graph, or model.onnx; remove the others")


def _parsed(path: Path) -> Any:
    if importlib.util.find_spec("onnx") is None:
        raise UnsupportedModelError(missing("onnx", str(path)))
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes; a graph has at most {MAX_BYTES}; get another copy")
    onnx, message = importlib.import_module("onnx"), importlib.import_module("google.protobuf.message")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (message.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a model of ONNX ({error}); it must be whole; download it again") from None
    if not model.graph.node:
        raise CheckpointError(f"{path}: a graph without nodes; a model has some; get another copy")
    return model


def _node(node: Any) -> Node:
    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type == 1:
            attributes[attribute.name] = attribute.f
        elif attribute.type == 2:
            attributes[attribute.name] = attribute.i
        elif attribute.type == 4:
            attributes[attribute.name] = attribute.t.raw_data or bytes(n & 255 for n in attribute.t.int32_data[:1])
        elif attribute.type == 7:
            attributes[attribute.name] = tuple(attribute.ints)
    return Node(node.op_type, node.name, tuple(node.input), tuple(node.output), attributes)


def _inline(tensor: Any, spec: TensorSpec, where: str) -> Tensor:
    """Data in the graph: bytes, or protobuf's own numbers."""
    if tensor.HasField("raw_data"):
        data = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8) if tensor.raw_data else torch.empty(0)
        return data.view(spec.dtype).reshape(spec.shape) if spec.nbytes else data.to(spec.dtype).reshape(spec.shape)
    try:
        if spec.dtype == torch.bfloat16:
            words = torch.tensor(list(tensor.int32_data), dtype=torch.int32).to(torch.int16)
            return words.view(spec.dtype).reshape(spec.shape)
        return torch.from_numpy(importlib.import_module("onnx.numpy_helper").to_array(tensor).copy()).reshape(
            spec.shape
        )
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where} has other data than its shape says ({error}); get another copy") from None
