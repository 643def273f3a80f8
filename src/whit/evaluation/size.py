"""The size of a model on disk and its bits per weight: every byte of the weight files, every logical parameter.

bits_per_weight = 8 * bytes of the weight files / parameters,   embeddings and heads included
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from whit.checkpoint.choice import parts_of
from whit.checkpoint.reader import find_shards
from whit.errors import CheckpointError


@dataclass(frozen=True)
class Size:
    """Bytes of the weight files, and the logical parameters that they stand for."""

    size_bytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.size_bytes / self.parameters


def measure_size(path: Path, config: Any) -> Size:
    """Measure the model in the folder (or .gguf file) `path` whose transformers configuration is `config`.

    The parameters are counted from whit.json, else from the safetensors headers; a checkpoint that another library
    quantized stores packed integers, so its parameters are counted from the architecture.
    Raises CheckpointError where there is no weight file.
    """
    files = weight_files(path)
    size_bytes = sum(file.stat().st_size for file in files)
    parameters = _from_account(path / "whit.json")
    if parameters is None:
        packed = getattr(config, "quantization_config", None) is not None
        plain = all(file.suffix == ".safetensors" for file in files) and not packed
        parameters = sum(map(_elements, files)) if plain else _from_architecture(config)
    if parameters <= 0:
        raise CheckpointError(f"{path}: the weight files hold no parameter; a model must; fetch or write it again")
    return Size(size_bytes, parameters)


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: those that a model folder is loaded from, not what else lies in it."""
    if path.is_file():
        parts = [path.with_name(name) for name in parts_of(path.name)]  # of a .gguf file that was cut
        return parts if all(part.is_file() for part in parts) else [path]
    if any(path.glob("*.safetensors")):
        return list(find_shards(path))
    for pattern in ("*.gguf", "*.onnx*"):
        if found := sorted(path.glob(pattern)):
            return found
    raise CheckpointError(f"{path}: no weight file (*.safetensors); a model folder must hold one; check the path")


def _from_account(account: Path) -> int | None:
    """Logical parameters by whit's own account: the bits and the bytes that it wrote."""
    if not account.is_file():
        return None
    try:
        said = json.loads(account.read_text(encoding="utf-8"))
        return round(8 * int(said["size_bytes"]) / float(said["bits_per_weight"]))
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{account}: lacks size_bytes or bits_per_weight; quantize the model again") from error


def _elements(file: Path) -> int:
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: no safetensors header can be read ({error}); fetch it again") from error
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def _from_architecture(config: Any) -> int:
    """Parameters of an empty model of this configuration; tied ones count once."""
    import transformers

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    named = getattr(transformers, next(iter(getattr(plain, "architectures", None) or ()), ""), None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(plain) if named is None else named(plain)
    return sum(parameter.numel() for parameter in model.parameters())
