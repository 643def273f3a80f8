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
from whit.layouts import GGML
from whit.model.targets import Target
from whit.recipe import Recipe
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec

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
        found = []
        for target, format in formats.items():
            if reason := GGML.refuses(format, target.shape):
                found.append(f"{target.holder}: {reason}; a gguf file holds ggml's types; choose one, such as q4_k")
        return found

    def weighed(self, by: Importance) -> None:
        """Under llama.cpp's own keys."""
        self.metadata |= {
            "quantize.imatrix.file": by.file, "quantize.imatrix.dataset": by.dataset,
            "quantize.imatrix.entries_count": by.entries, "quantize.imatrix.chunks_count": by.chunks,
        }  # fmt: skip

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        name = self._name(parameter)
        if parameter.target is not None and parameter.format is not None:
            return {name: GGML.specs(parameter.format, parameter.target.shape)["data"]}
        shape = _stored_shape(parameter)
        return {name: TensorSpec(shape, self._kept_dtype(parameter))}

    def verbatim(self, parameter: Parameter) -> bool:
        same = list(self.specs(parameter).values()) == [parameter.spec]
        moved = self._order(parameter) is not None or _is_transposed(parameter) or self._offset(parameter)
        return parameter.format is None and same and not moved

    def tensors(self, parameter: Parameter, value: Value) -> Mapping[str, Tensor]:
        ((name, spec),) = self.specs(parameter).items()
        if isinstance(value, QuantizedTensor):
            rows = GGML.pack(value).tensors["data"]
        else:
            rows = value.t() if _is_transposed(parameter) else value
            if offset := self._offset(parameter):
                rows = rows.to(torch.float32) + offset
            rows = rows.to(spec.dtype)
        order = self._order(parameter)
        return {name: rows.contiguous() if order is None else rows[order.to(rows.device)]}

    def restore(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        (rows,) = tensors.values()
        order = self._order(parameter)
        if order is not None:
            rows = rows[order.argsort().to(rows.device)]
        if parameter.target is not None and parameter.format is not None:
            return GGML.unpack(PackedWeight(GGML.name, parameter.format, parameter.target.shape, {"data": rows}))
        if offset := self._offset(parameter):
            rows = rows - offset
        return rows.t() if _is_transposed(parameter) else rows

    def decode(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """By gguf-py, where it is installed."""
        if parameter.format is None or parameter.target is None or importlib.util.find_spec("gguf") is None:
            return None
        quants, constants = importlib.import_module("gguf.quants"), importlib.import_module("gguf.constants")
        (data,) = tensors.values()
        number = constants.GGMLQuantizationType(KINDS[str(parameter.format)].number)
        found = torch.from_numpy(quants.dequantize(data.numpy(), number))
        order = self._order(parameter)
        return found if order is None else found[order.argsort()]

    def shards(self, parameters: Sequence[Parameter], limit: int) -> tuple[Shard, ...]:
        infos = []
        for parameter in parameters:
            ((name, spec),) = self.specs(parameter).items()
            quantized = parameter.format is not None and parameter.target is not None
            number = KINDS[str(parameter.format)].number if quantized else DTYPES[spec.dtype]
            infos.append(Info(name, _stored_shape(parameter), number, spec))
        metadata = {**self.metadata, "general.file_type": _file_type(infos), **self._tokenizer}
        return (gguf_shard("model.gguf", metadata, constants_of(self.model.config), infos),)

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        return {}

    def takes(self, name: str) -> bool:
        return False

    @cached_property
    def _tokenizer(self) -> dict[str, MetadataValue]:
        return tokenizer_metadata(self.folder, self.model.config)

    def _name(self, parameter: Parameter) -> str:
        name = self.architecture.tensor_name(parameter.name)
        if name is None:
            raise UnsupportedModelError(
                f"{self.folder}: {parameter.name} in a gguf file; llama.cpp has no such tensor in "
                f"{self.architecture.name} and every parameter must have a name; choose another --export"
            )
        return name

    def _kept_dtype(self, parameter: Parameter) -> torch.dtype:
        """Vectors and tables of positions in float32, as llama.cpp wants them; matrices as they are."""
        is_matrix = len(parameter.spec.shape) > 1 and not self._name(parameter).startswith("position_embd")
        return parameter.spec.dtype if is_matrix and parameter.spec.dtype in DTYPES else torch.float32

    def _offset(self, parameter: Parameter) -> float:
        return self.architecture.norm_offset if parameter.name.endswith("norm.weight") else 0.0

    def _order(self, parameter: Parameter) -> Tensor | None:
        """The order in which llama.cpp wants the rows of q and k: each head's halves interleaved."""
        part = parameter.name.split(".")[-2]
        if not self.architecture.interleaved or part not in ("q_proj", "k_proj"):
            return None
        rows = parameter.spec.shape[0]
        width = head_width(self.model.config)
        return torch.arange(rows).reshape(-1, 2, width // 2).transpose(1, 2).reshape(rows)


def _is_transposed(parameter: Parameter) -> bool:
    return parameter.target is not None and parameter.target.transposed


def _stored_shape(parameter: Parameter) -> tuple[int, ...]:
    return parameter.spec.shape[::-1] if _is_transposed(parameter) else parameter.spec.shape


def _file_type(infos: Sequence[Info]) -> int:
    """By what most weights are."""
    names = {number: str(dtype).removeprefix("torch.") for dtype, number in DTYPES.items()}
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    known = {n: short[name] for n, name in names.items()} | {kind.number: name for name, kind in KINDS.items()}
    counts: Counter[str] = Counter()
    for info in infos:
        counts[known[info.number]] += int(torch.Size(info.shape).numel())
    return FILE_TYPES[max(counts, key=lambda name: counts[name])] if counts else 0
