"""How a file names a quantized model. A new kind of file is one class in one file, and one name in EXPORTERS."""

from __future__ import annotations

from pathlib import Path

from whit.errors import RecipeError
from whit.export.awq import AWQ
from whit.export.base import Exporter, Outcome, Parameter, Value
from whit.export.bitsandbytes import BitsAndBytes
from whit.export.compressed_tensors import CompressedTensors, CompressedTensorsInt8
from whit.export.dense import Dense, Float16, Float32
from whit.export.gguf import Gguf
from whit.export.gptq import GPTQ, GPTQv2
from whit.export.hqq import HQQFile
from whit.export.mlx import MLX
from whit.export.onnx import Onnx
from whit.export.whit import Whit
from whit.named import one_of

EXPORTERS: tuple[type[Exporter], ...] = (
    Whit, Dense, Float16, Float32, Gguf, GPTQ, GPTQv2, AWQ, BitsAndBytes, CompressedTensors, CompressedTensorsInt8, MLX,
    HQQFile, Onnx,
)  # fmt: skip


def exporter_named(name: str) -> type[Exporter]:
    """The exporter of that name; RecipeError names the nearest right one."""
    for exporter in EXPORTERS:
        if exporter.name == name:
            return exporter
    raise RecipeError(f"export {name!r}: not known; {one_of(name, [exporter.name for exporter in EXPORTERS])}")


def kind_of(out: str | Path) -> str | None:
    """The kind of file that OUT's own name asks for; None where it may be any folder."""
    name = Path(out).name
    return next((kind.name for kind in EXPORTERS if kind.suffix and name.endswith(kind.suffix)), None)


__all__ = ["EXPORTERS", "Exporter", "Outcome", "Parameter", "Value", "exporter_named", "kind_of"]
