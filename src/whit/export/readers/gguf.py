"""A .gguf file as a model: the tokenizer through transformers' GGUF support, weights as they lie in the file.

Types that are formats of whit give their codes without quantizing again; the rest (the I-quants below 4 bits, NVFP4)
are decoded by gguf-py. What llama.cpp stores otherwise than transformers is undone: names, the order of q's and k's
rows, Gemma's norms.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from whit.checkpoint.gguf import GgufHeader, GgufTensor
from whit.checkpoint.header import Entry
from whit.checkpoint.parts import read_gguf_parts
from whit.checkpoint.reader import TensorFiles
from whit.errors import CheckpointError, UnsupportedModelError, reason_of
from whit.export.gguf.architectures import ARCHITECTURES, Architecture
from whit.export.gguf.configs import config_of
from whit.export.gguf.metadata import head_width
from whit.export.readers.base import Foreign, Packed
from whit.extras import missing
from whit.formats import parse_format
from whit.formats.ggml import KINDS
from whit.layouts import GGML
from whit.tensor import PackedWeight, QuantizedTensor, TensorSpec

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufCheckpoint(TensorFiles):
    """The attributes of a Checkpoint that sources use. Tensors have the file's own names, quantized ones are bytes."""

    def __init__(self, header: GgufHeader, folder: TemporaryDirectory[str]) -> None:
        super().__init__()
        self.header, self.shards = header, header.paths
        self._temporary = folder  # lives as long as this
        self.folder = next(Path(folder.name).iterdir())
        for tensor in header.tensors.values():
            dtype = DTYPES.get(tensor.type)
            shape = tensor.shape if dtype is not None else (tensor.stop - tensor.start,)
            spec = TensorSpec(shape, dtype or torch.uint8)
            self.entries[tensor.name] = Entry(tensor.path, spec, tensor.start, tensor.stop)


def read_gguf_model(path: Path) -> Foreign:
    """A file as if it were a folder that is not quantized; its small files lie in a folder that goes with it."""
    header = read_gguf_parts(path)
    name = header.metadata.get("general.architecture")
    has_experts = bool(header.metadata.get(f"{name}.expert_count", 0))
    architecture = next((a for a in ARCHITECTURES.values() if (a.name, a.experts) == (name, has_experts)), None)
    if architecture is None:
        known = ", ".join(dict.fromkeys(a.name for a in ARCHITECTURES.values()))
        kind = " with experts" if has_experts else ""
        raise UnsupportedModelError(
            f"{path}: architecture {name!r}{kind}; whit reads {known} from gguf files; convert it"
        )
    folder: TemporaryDirectory[str] = TemporaryDirectory(prefix="whit-")
    config = _small_files(path, header, architecture, Path(folder.name) / path.stem)
    names = {tensor: architecture.parameter_name(tensor) or tensor for tensor in header.tensors}
    checkpoint = GgufCheckpoint(header, folder)
    packed: dict[str, Packed] = {}
    for tensor in header.tensors.values():
        if experts := _experts(checkpoint, tensor, architecture):
            packed |= experts
            continue
        item = _packed(checkpoint, tensor, architecture, config)
        if item is not None:
            packed[names[tensor.name]] = item
        elif names[tensor.name] != tensor.name:
            checkpoint.entries[names[tensor.name]] = checkpoint.entries.pop(tensor.name)
    return Foreign(checkpoint, packed)


def _small_files(path: Path, header: GgufHeader, architecture: Architecture, folder: Path) -> Any:
    """config.json, and the tokenizer's files as transformers makes them of a GGUF file; returns the config."""
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedModelError(missing("gguf", str(path)))
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    config = config_of(header.metadata, architecture, shapes, _frequencies(header), str(path))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = _dtype(header)
    folder.mkdir()
    config.save_pretrained(folder)
    if header.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return config
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).save_pretrained(folder)
    except Exception as error:  # whatever a header that is not what it says leads transformers to
        raise CheckpointError(
            f"{path}: transformers cannot make a tokenizer of it ({reason_of(error)}); it must; use the original model"
        ) from None
    return config


def _frequencies(header: GgufHeader) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies, tensors of their own in the file: Llama 3's, and Phi-3's long and short."""
    found = {}
    for kind, name in (("freqs", "rope_freqs"), ("long", "rope_factors_long"), ("short", "rope_factors_short")):
        tensor = header.tensors.get(f"{name}.weight")
        if tensor is not None and tensor.type == "F32" and tensor.stop > tensor.start:
            with tensor.path.open("rb") as file:
                file.seek(tensor.start)
                data = bytearray(file.read(tensor.stop - tensor.start))
            found[kind] = torch.frombuffer(data, dtype=torch.float32)
    return found


def _dtype(header: GgufHeader) -> torch.dtype:
    """The type of the model that the file was made of: 16 bits, but for a file that has matrices of float32 alone."""
    kinds = [tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1]
    halves = [kind for kind in kinds if kind in ("F16", "BF16")]
    if halves:
        return DTYPES[halves[0]]
    # where others are quantized, one in float32 is the gate of experts
    return DTYPES[kinds[0]] if kinds and all(kind in DTYPES for kind in kinds) else torch.bfloat16


def _packed(checkpoint: GgufCheckpoint, tensor: GgufTensor, architecture: Architecture, config: Any) -> Packed | None:
    """What is behind a tensor; None where transformers has the same bytes."""
    order = _order(tensor, architecture, config)
    kind = tensor.type.lower()
    if kind in KINDS:
        format = parse_format(kind)
        return Packed((tensor.name,), tensor.shape, format, partial(_codes, checkpoint, tensor, order))
    if tensor.type not in DTYPES:
        note = f"{tensor.type} is decoded by gguf-py and is no format of whit"
        return Packed((tensor.name,), tensor.shape, None, partial(_decoded, checkpoint, tensor, order), note)
    offset = architecture.norm_offset if tensor.name.endswith("norm.weight") else 0.0
    turned = architecture.name == "gpt2" and tensor.name.startswith("blk.") and len(tensor.shape) > 1
    if order is None and not offset and not turned:
        return None
    read: Callable[[], Tensor] = partial(_floats, checkpoint, tensor, order, offset)
    dtype = torch.float32 if offset else DTYPES[tensor.type]  # what is exact
    return Packed((tensor.name,), tensor.shape, None, read, "stored otherwise than transformers does", dtype)


def _experts(checkpoint: GgufCheckpoint, tensor: GgufTensor, architecture: Architecture) -> dict[str, Packed]:
    """The matrices of a stack, one by one under the hub's names; none where a tensor is no stack."""
    names = architecture.expert_names(tensor.name, tensor.shape[0])
    if not names or len(tensor.shape) != 3:
        return {}
    shape, kind, found = tensor.shape[1:], tensor.type.lower(), {}
    for number, name in enumerate(names):
        rows = torch.arange(number * shape[0], (number + 1) * shape[0])
        if kind in KINDS:
            read: Callable[[], QuantizedTensor | Tensor] = partial(_codes, checkpoint, tensor, rows)
            found[name] = Packed((tensor.name,), shape, parse_format(kind), read)
        else:
            load = _floats if tensor.type in DTYPES else _decoded
            note = "one of a stack of experts" if tensor.type in DTYPES else f"{tensor.type} is no format of whit"
            args = (checkpoint, tensor, rows, 0.0) if tensor.type in DTYPES else (checkpoint, tensor, rows)
            dtype = DTYPES.get(tensor.type)
            found[name] = Packed((tensor.name,), shape, None, partial(load, *args), note, dtype)
    return found


def _order(tensor: GgufTensor, architecture: Architecture, config: Any) -> Tensor | None:
    """Which row of the file each row of the model is."""
    if not architecture.interleaved or tensor.name.split(".")[-2] not in ("attn_q", "attn_k"):
        return None
    rows = tensor.shape[0]
    return torch.arange(rows).reshape(-1, head_width(config) // 2, 2).transpose(1, 2).reshape(rows)


def _codes(checkpoint: GgufCheckpoint, tensor: GgufTensor, order: Tensor | None) -> QuantizedTensor:
    data = checkpoint[tensor.name].reshape(prod(tensor.shape[:-1]), -1)
    data = data if order is None else data[order]
    shape = (len(data), tensor.shape[-1])
    return GGML.unpack(PackedWeight(GGML.name, parse_format(tensor.type.lower()), shape, {"data": data}))


def _decoded(checkpoint: GgufCheckpoint, tensor: GgufTensor, order: Tensor | None) -> Tensor:
    quants, constants = importlib.import_module("gguf.quants"), importlib.import_module("gguf.constants")
    data = checkpoint[tensor.name].reshape(prod(tensor.shape[:-1]), -1)
    floats = torch.from_numpy(quants.dequantize(data.numpy(), constants.GGMLQuantizationType[tensor.type]))
    return floats if order is None else floats[order]


def _floats(checkpoint: GgufCheckpoint, tensor: GgufTensor, order: Tensor | None, offset: float) -> Tensor:
    floats = checkpoint[tensor.name]
    if offset:
        floats = floats.to(torch.float32) - offset
    if len(tensor.shape) == 3:  # experts below each other
        floats = floats.reshape(-1, tensor.shape[-1])
    return floats if order is None else floats[order]
