"""Checkpoints that other programs quantized. A new kind is one file and one row in READERS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whit.checkpoint.onnx import onnx_graph
from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.autoround import read_autoround
from whit.export.readers.awq import read_awq
from whit.export.readers.base import Foreign, Packed, Reader, sentences
from whit.export.readers.bitnet import read_bitnet
from whit.export.readers.bitsandbytes import read_bitsandbytes
from whit.export.readers.compressed_tensors import read_compressed_tensors
from whit.export.readers.eetq import read_eetq
from whit.export.readers.fbgemm import read_fbgemm
from whit.export.readers.fp8 import read_fp8
from whit.export.readers.gptq import read_gptq
from whit.export.readers.hqq import read_hqq
from whit.export.readers.inputs import inputs_of
from whit.export.readers.mlx import read_mlx
from whit.export.readers.modelopt import read_modelopt
from whit.export.readers.mxfp4 import read_mxfp4
from whit.export.readers.onnx import read_onnx_model
from whit.export.readers.quanto import read_quanto
from whit.export.readers.refused import REFUSED
from whit.export.readers.torchao import read_torchao

READERS: tuple[tuple[str, Reader], ...] = (
    ("gptq", read_gptq),
    ("awq", read_awq),
    ("bitsandbytes", read_bitsandbytes),
    ("compressed-tensors", read_compressed_tensors),
    ("mlx", read_mlx),
    ("hqq", read_hqq),
    ("bitnet", read_bitnet),
    ("fp8", read_fp8),
    ("auto-round", read_autoround),
    ("intel/auto-round", read_autoround),
    ("modelopt", read_modelopt),
    ("mxfp4", read_mxfp4),
    ("torchao", read_torchao),
    ("quanto", read_quanto),
    ("eetq", read_eetq),
    ("fbgemm_fp8", read_fbgemm),
)


def quant_method(config: Mapping[str, Any]) -> str | None:
    """How config.json says that a model is quantized; None where it says nothing."""
    found = config.get("quantization_config") or config.get("quantization")
    if not found:
        return None
    if not isinstance(found, dict):
        return str(found)
    return str(found.get("quant_method", "mlx" if "group_size" in found and "bits" in found else "unknown"))


def open_foreign(folder: Path, config: Mapping[str, Any]) -> Foreign:
    """The checkpoint of a folder that another program quantized: safetensors by its config.json, or a graph of ONNX."""
    graph = onnx_graph(folder)
    return read_onnx_model(graph) if graph is not None else read_foreign(config, Checkpoint(folder))


def read_foreign(config: Mapping[str, Any], checkpoint: Checkpoint) -> Foreign:
    """A foreign checkpoint as if it were not quantized. CheckpointError where it is of no known kind, or damaged."""
    method = quant_method(config)
    found = config.get("quantization_config") or config.get("quantization")
    for name, reader in READERS:
        if name == method and isinstance(found, dict):
            with sentences(str(checkpoint.folder)):
                packed = reader(found, checkpoint)
            if not packed:
                raise CheckpointError(
                    f"{checkpoint.folder}: config.json says quantized by {method}, and no tensor is; "
                    "both must agree; correct config.json"
                )
            return Foreign(checkpoint, packed)
    if method in REFUSED:
        raise CheckpointError(
            f"{checkpoint.folder}: quantized by {method}, which whit does not read: {REFUSED[method]}"
        )
    known = ", ".join(["whit", *(name for name, _ in READERS if "/" not in name)])
    raise CheckpointError(f"{checkpoint.folder}: quantized by {method}; whit reads {known}; use the original model")


__all__ = ["READERS", "Foreign", "Packed", "Reader", "inputs_of", "open_foreign", "quant_method", "read_foreign"]
