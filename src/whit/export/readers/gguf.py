"""A .gguf file as a model: its config, its tokenizer (through transformers' GGUF support), the names of its weights.

Weights are read as they are in the file (`gguf_weights`). Types that are formats of whit give their codes without
quantizing again; the rest (the I-quants below 4 bits, NVFP4) are decoded by gguf-py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from whit.checkpoint.gguf import GgufHeader
from whit.checkpoint.parts import read_gguf_parts
from whit.errors import CheckpointError, UnsupportedModelError, reason_of
from whit.export.gguf.architectures import ARCHITECTURES, Architecture
from whit.export.gguf.configs import config_of
from whit.export.gguf.restored import byte_level_tokenizer
from whit.export.readers.base import Foreign
from whit.export.readers.gguf_weights import DTYPES, GgufCheckpoint, experts_of, packed_of, stacks_of
from whit.extras import missing

GPT_OSS = "gpt-oss"


def read_gguf_model(path: Path) -> Foreign:
    """A file as if it were a folder that is not quantized; its small files lie in a folder that goes with it."""
    header = read_gguf_parts(path)
    architecture = _architecture(path, header)
    folder: TemporaryDirectory[str] = TemporaryDirectory(prefix="whit-")
    config = _small_files(path, header, Path(folder.name) / path.stem)
    names = {tensor: architecture.parameter_name(tensor) or tensor for tensor in header.tensors}
    checkpoint = GgufCheckpoint(header, folder)
    packed = stacks_of(checkpoint, architecture)
    for tensor in header.tensors.values():
        if architecture.woven and architecture.stack_parameter(tensor.name) is not None:
            continue
        if experts := experts_of(checkpoint, tensor, architecture):
            packed |= experts
            continue
        item = packed_of(checkpoint, tensor, architecture, config)
        if item is not None:
            packed[names[tensor.name]] = item
        elif names[tensor.name] != tensor.name:
            checkpoint.entries[names[tensor.name]] = checkpoint.entries.pop(tensor.name)
    return Foreign(checkpoint, packed)


def _small_files(path: Path, header: GgufHeader, folder: Path) -> Any:
    """config.json, and the tokenizer's files as transformers makes them of a GGUF file; returns the config."""
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedModelError(missing("gguf", str(path)))
    config = gguf_config(path)
    folder.mkdir()
    config.save_pretrained(folder)
    if header.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return config
    gguf_tokenizer(path, header).save_pretrained(folder)
    return config


def gguf_tokenizer(path: Path, header: GgufHeader | None = None) -> Any:
    """The tokenizer of a file, as transformers makes it. Of gpt-oss it is made here: transformers takes the length of a
    name for the factor of its rotary embedding, and stops."""
    header = header or read_gguf_parts(path)
    if header.metadata.get("general.architecture") == GPT_OSS:
        return byte_level_tokenizer(header.metadata, str(path))
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # whatever a header that is not what it says leads transformers to
        raise CheckpointError(
            f"{path}: transformers cannot make a tokenizer of it ({reason_of(error)}); it must; use the original model"
        ) from None


def gguf_config(path: Path) -> Any:
    """The transformers config that a file describes; UnsupportedModelError for an architecture that whit has not."""
    header = read_gguf_parts(path)
    architecture = _architecture(path, header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    config = config_of(header.metadata, architecture, shapes, _frequencies(header), str(path))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = _dtype(header)
    return config


def _architecture(path: Path, header: GgufHeader) -> Architecture:
    name = header.metadata.get("general.architecture")
    has_experts = bool(header.metadata.get(f"{name}.expert_count", 0))
    found = next((a for a in ARCHITECTURES.values() if (a.name, a.experts) == (name, has_experts)), None)
    if found is None:
        known = ", ".join(dict.fromkeys(a.name for a in ARCHITECTURES.values()))
        kind = " with experts" if has_experts else ""
        raise UnsupportedModelError(
            f"{path}: architecture {name!r}{kind}; whit reads {known} from gguf files; convert it"
        )
    return found


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
