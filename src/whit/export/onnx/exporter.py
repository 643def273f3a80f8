"""A folder that ONNX Runtime and onnxruntime-genai run: model.onnx, the weights beside it, and genai_config.json."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whit.checkpoint.reader import read_json
from whit.checkpoint.writer import Shard
from whit.errors import UnsupportedModelError
from whit.export import decoders
from whit.export.base import Outcome, Parameter, Value
from whit.export.folder import FolderExport, to_json
from whit.export.linears import LinearsExport
from whit.export.onnx.configs import genai_config, rotary_caches, shape_of
from whit.export.onnx.graph import FLOAT, INT64, Decoder
from whit.export.onnx.names import onnx_name
from whit.extras import missing
from whit.formats.affine import Affine
from whit.layouts import Layout
from whit.layouts.affine import as_affine, with_scales
from whit.layouts.matmul_nbits import MatMulNBits
from whit.model.targets import Target
from whit.tensor import Format, TensorSpec

GRAPH, DATA = "model.onnx", "model.onnx.data"
ALIGNMENT = 64
OPSET, IR_VERSION = 21, 10
DTYPES = {torch.float32: FLOAT, torch.uint8: 2, torch.float16: 10, torch.bfloat16: 16}  # TensorProto.DataType

USAGE = """```python
import onnxruntime_genai as og

model = og.Model("PATH")
```

or with onnxruntime alone: `model.onnx` takes `input_ids`, `attention_mask` and `past_key_values.N.key` and `.value`."""


class Onnx(LinearsExport):
    """Llama's family, quantized linears and embeddings as MatMulNBits and GatherBlockQuantized, computed in float32."""

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "ONNX Runtime's MatMulNBits: integers of 2, 4, 8 bits in a decoder's graph"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    fuses: ClassVar[bool] = False
    usage: ClassVar[str] = USAGE

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        super().__init__(model, folder)
        if importlib.util.find_spec("onnx") is None:
            raise UnsupportedModelError(missing("onnx", str(folder)))
        self.folder, self.shape = folder, shape_of(model.config, str(folder))

    @classmethod
    def fitted(cls, format: Format) -> Format:
        """Scales in the type that the graph computes in."""
        affine = as_affine(format)
        return format if affine is None else with_scales(affine, "f32")

    def layout(self, format: Format) -> Layout:
        return MatMulNBits()

    def _why(self, target: Target, format: Format) -> str | None:
        if (reason := super()._why(target, format)) is not None:
            return reason
        assert isinstance(format, Affine)
        wide = with_scales(format, "f32")
        return None if format == wide else f"{format}: the graph computes in float32, and so are scales; use {wide}"

    def pieces(self, target: Target) -> list[tuple[str, Tensor]]:
        name = onnx_name(target.parameter, self.shape.layers).removesuffix(".weight")
        return [(name, torch.arange(target.shape[0]))]

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        codes = tensors[f"weight_Q{format.bits}"]
        return decoders.matmul_nbits(codes, tensors["weight_scales"], tensors.get("weight_zero_points"), format.bits)

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        """Vectors are float32, as the operators want them; kept matrices are what they are."""
        if parameter.format is not None:
            return super().specs(parameter)
        spec = parameter.spec
        dtype = torch.float32 if len(spec.shape) == 1 or spec.dtype not in DTYPES else spec.dtype
        return {onnx_name(parameter.name, self.shape.layers): TensorSpec(spec.shape, dtype)}

    # What is kept lies whole, under one name: as in any folder, and not renamed and cut as in the hub's.

    def verbatim(self, parameter: Parameter) -> bool:
        return FolderExport.verbatim(self, parameter)

    def tensors(self, parameter: Parameter, value: Value) -> Mapping[str, Tensor]:
        kept = parameter.format is None
        return FolderExport.tensors(self, parameter, value) if kept else super().tensors(parameter, value)

    def _restore_kept(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        return FolderExport.restore(self, parameter, tensors)

    def shards(self, parameters: Sequence[Parameter], limit: int) -> tuple[Shard, ...]:
        """The graph, all of it a header, and one file of weights, which begins with the tables of rotary embedding."""
        header, places = bytearray(), {}
        specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self._caches.items()}
        for name, cache in self._caches.items():
            places[name] = len(header)
            header += cache.contiguous().numpy().tobytes()
            header += bytes(-len(header) % ALIGNMENT)
        size, written = len(header), {n: s for p in parameters for n, s in self.specs(p).items()}
        for name, spec in written.items():
            places[name] = size
            size += spec.nbytes + -spec.nbytes % ALIGNMENT
        graph = self._graph({p.name: p for p in parameters}, specs | written, places)
        starts = {name: places[name] for name in written}
        return Shard(GRAPH, graph, {}, {}, len(graph)), Shard(DATA, bytes(header), starts, written, size)

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        path = self.folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        said = genai_config(self.model.config.to_dict(), generation, self.shape, GRAPH)
        return {**super().files(outcome), "genai_config.json": to_json(said)}

    def config(self, outcome: Outcome) -> dict[str, Any]:
        return {}

    @cached_property
    def _caches(self) -> dict[str, Tensor]:
        return rotary_caches(self.model)

    def _graph(
        self, parameters: Mapping[str, Parameter], specs: Mapping[str, TensorSpec], places: Mapping[str, int]
    ) -> bytes:
        onnx = importlib.import_module("onnx")
        decoder = Decoder(onnx, self.shape, parameters)
        if unused := sorted(parameters.keys() - decoder.used):
            raise UnsupportedModelError(
                f"{self.folder}: {unused[0]} and in all {len(unused)} parameters have no place in the graph of an onnx "
                "file; every one must have; choose another --export"
            )
        stored = [_external(onnx, name, spec, places[name]) for name, spec in specs.items()]
        tensors = [*decoder.constants.values(), *stored]
        inputs, outputs = self._ends(onnx)
        graph = onnx.helper.make_graph(decoder.nodes, "main_graph", inputs, outputs, tensors)
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="whit")
        found: bytes = model.SerializeToString(deterministic=True)
        return found

    def _ends(self, onnx: Any) -> tuple[list[Any], list[Any]]:
        """Inputs and outputs of the graph."""
        value, shape = onnx.helper.make_tensor_value_info, self.shape

        def caches(prefix: str, length: str) -> list[Any]:
            sizes = ["batch_size", shape.kv_heads, length, shape.head_width]
            names = [f"{prefix}.{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
            return [value(name, FLOAT, sizes) for name in names]

        inputs = [
            value("input_ids", INT64, ["batch_size", "sequence_length"]),
            value("attention_mask", INT64, ["batch_size", "total_sequence_length"]),
            *caches("past_key_values", "past_sequence_length"),
        ]
        logits = value("logits", FLOAT, ["batch_size", "sequence_length", self.model.config.vocab_size])
        return inputs, [logits, *caches("present", "total_sequence_length")]


def _external(onnx: Any, name: str, spec: TensorSpec, offset: int) -> Any:
    """An initializer whose bytes lie in the file beside the graph."""
    tensor = onnx.TensorProto(name=name, dims=spec.shape, data_type=DTYPES[spec.dtype])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, said in (("location", DATA), ("offset", offset), ("length", spec.nbytes)):
        tensor.external_data.add(key=key, value=str(said))
    return tensor
