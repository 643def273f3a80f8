"""GGUF: one file with everything that llama.cpp needs. Types that do not fit a width fall back as llama.cpp's do."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.checkpoint.writer import Shard
from whit.errors import UnsupportedModelError
from whit.export.base import Importance, Outcome, Parameter, Value
from whit.export.gguf.architectures import Architecture, architecture_of
from whit.export.gguf.header import Info, gguf_shard
from whit.export.gguf.header import Value as MetadataValue
from whit.export.gguf.metadata import F32, constants_of, head_width, metadata_of
from whit.export.gguf.tokenizer import tokenizer_metadata
from whit.formats import parse_format
from whit.formats.ggml import KINDS
from whit.formats.ggml.mixes import WHOLE_FILE
from whit.formats.numeric import dtype_name
from whit.layouts import GGML
from whit.model.targets import Target
from whit.recipe import Recipe
from whit.spoken import by_reason
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec, matrix_shape, turned

DTYPES = {torch.float32: F32, torch.float16: 1, torch.bfloat16: 30}
FALL_BACKS = {
    "q2_k": "q4_0", "q3_k": "q4_0", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "tq1_0": "q4_0", "tq2_0": "q4_0",
}  # fmt: skip
# llama.cpp's numbers of what a file is mostly made of.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12, "q4_k": 15,
    "q5_k": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38,
}  # fmt: skip


class Gguf:
    """llama.cpp's file."""

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "llama.cpp's file: ggml's types, with tokenizer and chat template"
    example: ClassVar[str] = "q4_k_m"
    suffix: ClassVar[str] = ".gguf"
    fuses: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.architecture: Architecture = architecture_of(model.config, str(folder))
        self.metadata = metadata_of(model.config, self.architecture, folder)

    @classmethod
    def fitted(cls, format: Format) -> Format:
        return format

    @classmethod
    def whole(cls, recipe: Recipe) -> Recipe:
        """A type for `*` means llama.cpp's file of that type: head and embeddings too, more bits where they help."""
        first = recipe.rules[0] if recipe.rules and not recipe.mix else ("", None)
        mix = WHOLE_FILE.get(str(first[1])) if first[0] == "*" else None
        return recipe if mix is None else recipe.with_rules(recipe.rules[1:], mix)

    def refuses(self, activations: Activations) -> str | None:
        return "llama.cpp quantizes activations as it pleases; leave them out"

    def inputs(self, parameter: Parameter, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert not scales, parameter.name
        return {}

    def adapted(self, target: Target, format: Format) -> tuple[Format | None, str | None]:
        """What llama.cpp falls back to where rows are not made of whole superblocks: format and reason."""
        columns, wanted = target.shape[-1], str(format)
        if format.bits == 16 or wanted not in KINDS or not columns % format.group_size:
            return format, None
        reason = f"{columns} columns are not a multiple of {format.group_size}, which {wanted} needs"
        nearest = FALL_BACKS.get(wanted)
        if nearest is None or columns % KINDS[nearest].group_size:
            return None, f"kept: {reason}"
        return parse_format(nearest), f"{nearest} instead of {wanted}: {reason}"

    def problems(self, formats: Mapping[Target, Format]) -> list[str]:
        reasons = ((target.holder, GGML.refuses(format, target.shape)) for target, format in formats.items())
        end = "a gguf file holds ggml's types; choose one, such as q4_k"
        return by_reason((holder, f"{reason}; {end}") for holder, reason in reasons if reason)

    def weighed(self, by: Importance) -> None:
        """Under llama.cpp's own keys."""
        self.metadata |= {
            "quantize.imatrix.file": by.file, "quantize.imatrix.dataset": by.dataset,
            "quantize.imatrix.entries_count": by.entries, "quantize.imatrix.chunks_count": by.chunks,
        }  # fmt: skip

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        return {info.name: info.spec for info in self._infos(parameter)}

    def verbatim(self, parameter: Parameter) -> bool:
        same = list(self.specs(parameter).values()) == [parameter.spec]
        moved = self._order(parameter) is not None or _is_transposed(parameter) or self._offset(parameter)
        return parameter.format is None and same and not moved

    def tensors(self, parameter: Parameter, value: Value) -> Mapping[str, Tensor]:
        infos = self._infos(parameter)
        if isinstance(value, QuantizedTensor):
            rows = GGML.pack(value).tensors["data"]
        else:
            rows = value.mT if _is_transposed(parameter) else value
            if offset := self._offset(parameter):
                rows = rows.to(torch.float32) + offset
            rows = rows.to(infos[0].spec.dtype)
        order = self._order(parameter)
        if order is None:
            return {infos[0].name: rows.contiguous()}
        parts = rows.reshape(len(order), -1)[order.to(rows.device)].chunk(len(infos))
        return {info.name: part.reshape(info.spec.shape) for info, part in zip(infos, parts, strict=True)}

    def restore(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        rows = self._joined(parameter, tensors)
        if parameter.target is not None and parameter.format is not None:
            data = rows.reshape(matrix_shape(parameter.target.shape)[0], -1)
            return GGML.unpack(PackedWeight(GGML.name, parameter.format, parameter.target.shape, {"data": data}))
        if offset := self._offset(parameter):
            rows = rows - offset
        stored = rows.reshape(_stored_shape(parameter))
        return stored.mT if _is_transposed(parameter) else stored

    def decode(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """By gguf-py, where it is installed."""
        if parameter.format is None or parameter.target is None or importlib.util.find_spec("gguf") is None:
            return None
        quants, constants = importlib.import_module("gguf.quants"), importlib.import_module("gguf.constants")
        number = constants.GGMLQuantizationType(KINDS[str(parameter.format)].number)
        found = {name: torch.from_numpy(quants.dequantize(data.numpy(), number)) for name, data in tensors.items()}
        return self._joined(parameter, found).reshape(parameter.target.shape)

    def shards(self, parameters: Sequence[Parameter], limit: int) -> tuple[Shard, ...]:
        infos = [info for parameter in parameters for info in self._infos(parameter)]
        metadata = {**self.metadata, "general.file_type": _file_type(infos), **self._tokenizer}
        return (gguf_shard("model.gguf", metadata, constants_of(self.model.config), infos),)

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        return {}

    def takes(self, name: str) -> bool:
        return False

    @cached_property
    def _tokenizer(self) -> dict[str, MetadataValue]:
        return tokenizer_metadata(self.folder, self.model.config)

    def _infos(self, parameter: Parameter) -> tuple[Info, ...]:
        """The tensors that a parameter becomes: one, or the halves of a stack of experts."""
        names = self._names(parameter)
        shape = _stored_shape(parameter)
        shape = (shape[0], shape[1] // len(names), shape[2]) if len(names) > 1 else shape
        if parameter.target is not None and parameter.format is not None:
            spec, number = GGML.specs(parameter.format, shape)["data"], KINDS[str(parameter.format)].number
        else:
            spec = TensorSpec(shape, self._kept_dtype(parameter))
            number = DTYPES[spec.dtype]
        return tuple(Info(name, shape, number, spec) for name in names)

    def _joined(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows of all tensors in the model's own order."""
        parts = list(tensors.values())
        order = self._order(parameter)
        if order is None:
            return parts[0]
        rows = torch.cat([part.reshape(len(order) // len(parts), -1) for part in parts])
        rows = rows[order.argsort().to(rows.device)]
        return rows.reshape(-1) if parts[0].dim() == 1 else rows

    def _names(self, parameter: Parameter) -> tuple[str, ...]:
        name = self.architecture.tensor_name(parameter.name)
        names = self.architecture.stack_names(parameter.name) if name is None else (name,)
        if not names:
            raise UnsupportedModelError(
                f"{self.folder}: {parameter.name} in a gguf file; llama.cpp has no such tensor in "
                f"{self.architecture.name} and every parameter must have a name; choose another --export"
            )
        return names

    def _kept_dtype(self, parameter: Parameter) -> torch.dtype:
        """Vectors, tables of positions and gates in float32, as llama.cpp wants them; matrices as they are."""
        name = self._names(parameter)[0]
        is_matrix = len(parameter.spec.shape) > 1 and not ("position_embd" in name or "ffn_gate_inp" in name)
        return parameter.spec.dtype if is_matrix and parameter.spec.dtype in DTYPES else torch.float32

    def _offset(self, parameter: Parameter) -> float:
        return self.architecture.norm_offset if parameter.name.endswith("norm.weight") else 0.0

    def _order(self, parameter: Parameter) -> Tensor | None:
        """The order in which llama.cpp wants the rows of q and k, each head's halves interleaved, and of experts."""
        if (parts := len(self._names(parameter))) > 1:  # (experts, parts, rows): part by part
            experts, rows, _ = parameter.spec.shape
            return torch.arange(experts * rows).reshape(experts, parts, -1).transpose(0, 1).reshape(-1)
        part = parameter.name.split(".")[-2]
        if not self.architecture.interleaved or part not in ("q_proj", "k_proj"):
            return None
        rows = parameter.spec.shape[0]
        width = head_width(self.model.config)
        return torch.arange(rows).reshape(-1, 2, width // 2).transpose(1, 2).reshape(rows)


def _is_transposed(parameter: Parameter) -> bool:
    return parameter.target is not None and parameter.target.transposed


def _stored_shape(parameter: Parameter) -> tuple[int, ...]:
    return turned(parameter.spec.shape) if _is_transposed(parameter) else parameter.spec.shape


def _file_type(infos: Sequence[Info]) -> int:
    """By what most weights are."""
    names = {number: dtype_name(dtype) for dtype, number in DTYPES.items()}
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    known = {n: short[name] for n, name in names.items()} | {kind.number: name for name, kind in KINDS.items()}
    counts: Counter[str] = Counter()
    for info in infos:
        counts[known[info.number]] += int(torch.Size(info.shape).numel())
    return FILE_TYPES[max(counts, key=lambda name: counts[name])] if counts else 0
