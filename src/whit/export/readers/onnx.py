"""A folder with an ONNX graph as a model: MatMulNBits as whit's codes, all else under the names of transformers.

Read are the graphs that whit writes and those of onnxruntime-genai's model builder: q, k and v apart or in one product,
names as its quantizers give them, weights of plain products turned over or not, scales of any float type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.header import Entry
from whit.checkpoint.onnx import Node, OnnxFile
from whit.checkpoint.reader import TensorFiles, read_json
from whit.errors import CheckpointError
from whit.export.onnx.names import EMBEDDING, HEAD, node_module, parameter_name
from whit.export.readers.base import Foreign, Packed, sentences
from whit.export.readers.matmul_nbits import Matrix, checked, format_of, read_rows, require
from whit.layouts.matmul_nbits import BITS
from whit.tensor import TensorSpec

QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
TABLES = re.compile(r"(cos|sin)_cache.*|/model/constants/.*")  # what a graph has and no checkpoint of transformers


class Shown(TensorFiles):
    """An OnnxFile under the names of transformers, with what is behind quantized weights under its own."""

    def __init__(self, file: OnnxFile) -> None:
        super().__init__()
        self.file, self.folder, self.shards = file, file.folder, file.shards
        self._reads: dict[str, Callable[[], Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def show(self, name: str, key: str) -> None:
        """A tensor as it lies."""
        self.entries[name], self._reads[name] = self.file.entries[key], partial(self.file.__getitem__, key)

    def rename(self, name: str, old: str) -> None:
        """A tensor by another name instead."""
        self.entries[name], self._reads[name] = self.entries.pop(old), self._reads.pop(old)

    def derive(self, name: str, spec: TensorSpec, read: Callable[[], Tensor]) -> None:
        """A tensor that is made of others."""
        self.entries[name], self._reads[name] = Entry(self.file.path, spec, 0, 0), read


def read_onnx_model(path: Path) -> Foreign:
    """The graph's folder as if it were not quantized. CheckpointError where graph, weights and config.json disagree."""
    folder = path.parent
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json beside {path.name}; whit builds the model by it; copy the original model's"
        )
    file, config = OnnxFile(path), read_json(folder / "config.json")
    with sentences(str(folder)):
        packed: dict[str, Packed] = {}
        for node in file.nodes:
            if node.op in QUANTIZED:
                packed |= packed_matrices(file, node, config)
        shown = _kept(file, config, {key for item in packed.values() for key in item.keys})
        if HEAD in packed and (EMBEDDING not in packed or packed[EMBEDDING].keys[0] == packed[HEAD].keys[0]):
            tied = packed.pop(HEAD)
            packed[HEAD if EMBEDDING in shown else EMBEDDING] = tied
        if HEAD in shown and EMBEDDING not in {*shown, *packed}:
            shown.rename(EMBEDDING, HEAD)
    return Foreign(shown, packed)


def packed_matrices(file: OnnxFile, node: Node, config: Mapping[str, Any]) -> dict[str, Packed]:
    """The weights that a node of QUANTIZED multiplies or looks up: q, k and v, where it has all three."""
    matrix = _product(file, node) if node.op == "MatMulNBits" else _table(file, node)
    format, note = format_of(file, matrix)
    return {
        f"{module}.weight": Packed(
            matrix.keys, (len(rows), matrix.shape[1]), format, partial(read_rows, file, matrix, format, rows), note
        )
        for module, rows in _split(matrix.module, matrix.shape[0], config)
    }


def _split(module: str, rows: int, config: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """(module, its rows) of a product, which may be q, k and v below each other."""
    holder, dot, last = module.rpartition(".")
    if last != "qkv_proj":
        return [(module, torch.arange(rows))]
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    few = int(config.get("num_key_value_heads") or heads)
    if rows != (heads + 2 * few) * width:
        raise CheckpointError(
            f"{module}: {rows} rows, and config.json's heads make {(heads + 2 * few) * width}; they must agree; "
            "correct it"
        )
    parts = torch.split(torch.arange(rows), [heads * width, few * width, few * width])
    return [(f"{holder}{dot}{name}_proj", part) for name, part in zip("qkv", parts, strict=True)]


def _product(file: OnnxFile, node: Node) -> Matrix:
    codes, scales, zeros, groups = (*node.inputs[1:5], *[""] * 4)[:4]
    if node.integer("weight_prepacked"):
        raise CheckpointError(
            f"{node.name}: packed for one GPU's kernels, which no other program reads; export the model without that"
        )
    shape = node.integer("N"), node.integer("K")
    bits, size = node.integer("bits", 4), node.integer("block_size")
    module, behind = node_module(node.name), (codes, scales, zeros or None, groups or None)
    return checked(file, Matrix(module, shape, bits, size, *behind))


def _table(file: OnnxFile, node: Node) -> Matrix:
    """An embedding. Its codes may lie in another shape, and zero points in the middle may come from a constant."""
    makers = {output: maker for maker in file.nodes for output in maker.outputs}
    maker = makers.get(node.inputs[0])
    codes = maker.inputs[0] if maker is not None and maker.op == "Reshape" else node.inputs[0]
    bits = node.integer("bits", 4)
    zeros = node.inputs[3] or None if len(node.inputs) > 3 else None
    constant = makers.get(zeros or "")
    middles = bytes([sum(1 << (shift + bits - 1) for shift in range(0, 8, bits))]) if bits in BITS else b""
    if constant is not None and constant.op == "ConstantOfShape" and constant.attributes.get("value") == middles:
        zeros = None  # as where there are none
    require(file, codes, node.name)
    require(file, node.inputs[2], node.name)
    rows = file.entries[node.inputs[2]].spec.shape[0]
    columns = prod(file.entries[codes].spec.shape) * 8 // bits // max(rows, 1)
    module = EMBEDDING.removesuffix(".weight")
    matrix = Matrix(module, (rows, columns), bits, node.integer("block_size", 128), codes, node.inputs[2], zeros)
    return checked(file, matrix)


def _kept(file: OnnxFile, config: Mapping[str, Any], taken: set[str]) -> Shown:
    """Everything that is not quantized, but for what the graph alone needs."""
    shown, used = Shown(file), set(taken)
    for key in taken:
        shown.show(key, key)
    for module, root, turned in _plain_products(file):
        if root not in used and root != EMBEDDING:
            used.add(root)
            _show_parts(shown, f"{module}.weight", root, turned, config)
    for node in file.nodes:
        if node.op == "MatMulNBits" and len(node.inputs) > 5 and node.inputs[5] in file.entries:
            used.add(node.inputs[5])
            _show_parts(shown, f"{node_module(node.name)}.bias", node.inputs[5], True, config)
    for key in file.entries:
        name = parameter_name(key)
        if key not in used and not TABLES.fullmatch(key) and file.entries[key].spec.dtype.is_floating_point:
            _show_parts(shown, name, key, True, config)
    return shown


def _plain_products(file: OnnxFile) -> Iterator[tuple[str, str, bool]]:
    """(module, stored weight, whether it is (out, in)) of each product with a weight that is not quantized."""
    makers = {output: node for node in file.nodes for output in node.outputs}
    for node in file.nodes:
        if node.op != "MatMul":
            continue
        root, turned = node.inputs[1], False
        while (maker := makers.get(root)) is not None and maker.op in ("Cast", "Transpose"):
            root, turned = maker.inputs[0], turned != (maker.op == "Transpose")
        if root in file.entries and len(file.entries[root].spec.shape) == 2:
            yield node_module(node.name), root, turned


def _show_parts(shown: Shown, name: str, key: str, turned: bool, config: Mapping[str, Any]) -> None:
    """A kept tensor, or the three that it is; a weight that is (in, out) is turned over."""
    spec = shown.file.entries[key].spec
    shape = spec.shape if turned else spec.shape[::-1]
    module, _, kind = name.rpartition(".")
    parts = _split(module, shape[0], config) if shape else [(module, torch.arange(0))]
    if turned and len(parts) == 1:
        shown.show(name, key)
        return
    for part, rows in parts:
        read = partial(_rows, shown.file, key, turned, rows)
        shown.derive(f"{part}.{kind}", TensorSpec((len(rows), *shape[1:]), spec.dtype), read)


def _rows(file: OnnxFile, key: str, turned: bool, rows: Tensor) -> Tensor:
    whole = file[key]
    return (whole if turned else whole.t())[rows].contiguous()
