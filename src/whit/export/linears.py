"""What the exports for other programs share: packed linears under the names of the hub, one layout per format.

A stack of experts is cut into the matrices that the hub's checkpoints have. Embeddings stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from whit.export.base import Outcome, Parameter, Value
from whit.export.folder import FolderExport, short_name
from whit.layouts import Layout
from whit.model.names import stored_rows, stored_tensors
from whit.model.targets import Target, find_targets
from whit.spoken import by_reason
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec, matrix_shape

CARD = """---
library_name: transformers
tags: [{tag}, quantized]
---

# {name}, quantized by whit to {formats}, as a {tag} checkpoint

{usage}

{bits_per_weight:.3f} bits per weight, {size_bytes:,} bytes. `whit.json` says what became of every parameter.
"""


class LinearsExport(FolderExport):
    """Subclasses say which layout holds a format, and what config.json says of it."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts")
    fuses: ClassVar[bool] = True
    reads_back: ClassVar[bool] = True
    usage: ClassVar[str]

    def layout(self, format: Format) -> Layout:
        """The layout that a format lies in, the nearest one where none can hold it."""
        raise NotImplementedError

    def conflicts(self, formats: Mapping[Target, Format]) -> list[str]:
        """Sentences about formats that cannot stand in one file together."""
        return []

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        """The float32 matrix that the tensors of one linear stand for, by the format's description alone."""
        raise NotImplementedError

    def problems(self, formats: Mapping[Target, Format]) -> list[str]:
        if not formats:
            return [f"nothing is quantized; {self.name} files hold quantized linears; add --format or a rule"]
        found = ((target.holder, reason) for target, format in formats.items() if (reason := self._why(target, format)))
        return [*by_reason(found), *self.conflicts(formats)]

    def _why(self, target: Target, format: Format) -> str | None:
        if target.kind not in self.kinds:
            what = {"embedding": "an embedding", "experts": "a stack of experts", "conv1d": "a Conv1D"}[target.kind]
            return f"{what} in {format}; {self.name} files hold quantized linears; keep it in 16 bits with a rule =bf16"
        columns = target.shape[-1]
        if format.group_size and columns % format.group_size:
            return None  # said already
        if target.kind == "experts" and self._is_whole(target):
            what = f"a stack of experts in {format}, which checkpoints hold whole"
            return f"{what}; {self.name} files hold linears; keep it in 16 bits with a rule =bf16, or use --export whit"
        shapes = {(len(rows), columns) for _, rows in self.pieces(target)}
        reasons = (self.layout(format).refuses(format, shape) for shape in shapes)
        return next((f"{format}: {reason}" for reason in reasons if reason), None)

    def _is_whole(self, target: Target) -> bool:
        """Whether a checkpoint of transformers holds a stack as one tensor, in which no reader looks for linears."""
        return target.transposed or any(len(rows) > target.shape[1] for _, rows in self.pieces(target))

    def pieces(self, target: Target) -> list[tuple[str, Tensor]]:
        """(module in the file, rows of the target) of the linears that a target becomes."""
        shape = target.shape if target.kind == "experts" else (target.shape[0], 1)
        rows = stored_rows(self.model, target.parameter, shape)
        return [(key.removesuffix(".weight"), index) for key, index in rows.items()]

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        if parameter.target is None or parameter.format is None:
            empty = torch.empty(parameter.spec.shape, dtype=parameter.spec.dtype, device="meta")
            stored = stored_tensors(self.model, parameter.name, empty)
            return {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in stored.items()}
        specs: dict[str, TensorSpec] = {}
        for module, rows in self.pieces(parameter.target):
            shape = (len(rows), parameter.target.shape[-1])
            specs |= {f"{module}.{key}": s for key, s in self.linear_specs(parameter, shape).items()}
        return specs

    def linear_specs(self, parameter: Parameter, shape: tuple[int, int]) -> Mapping[str, TensorSpec]:
        """The tensors of one linear, without the module's name."""
        assert parameter.format is not None
        return self.layout(parameter.format).specs(parameter.format, shape)

    def linear_tensors(self, parameter: Parameter, quantized: QuantizedTensor) -> Mapping[str, Tensor]:
        """The tensors themselves."""
        return self.layout(quantized.format).pack(quantized).tensors

    def linear_restored(self, parameter: Parameter, packed: PackedWeight) -> QuantizedTensor:
        """The inverse of `linear_tensors`."""
        return self.layout(packed.format).unpack(packed)

    def verbatim(self, parameter: Parameter) -> bool:
        shape = parameter.spec.shape
        rows = list(stored_rows(self.model, parameter.name, shape).values()) if shape else [torch.arange(1)]
        plain = len(rows) == 1 and torch.equal(rows[0], torch.arange(len(rows[0])))
        return plain and super().verbatim(parameter)

    def tensors(self, parameter: Parameter, value: Value) -> Mapping[str, Tensor]:
        if parameter.target is None or not isinstance(value, QuantizedTensor):
            assert isinstance(value, Tensor)
            return stored_tensors(self.model, parameter.name, value.to(parameter.spec.dtype))
        tensors: dict[str, Tensor] = {}
        for module, rows in self.pieces(parameter.target):
            piece = value if value.shape == (len(rows), value.shape[-1]) else take_rows(value, rows)
            tensors |= {f"{module}.{key}": t for key, t in self.linear_tensors(parameter, piece).items()}
        return tensors

    def restore(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        target, format = parameter.target, parameter.format
        if target is None or format is None:
            return self._restore_kept(parameter, tensors)
        parts = []
        for module, rows in self.pieces(target):
            plain = _inside(tensors, module)
            shape = (len(rows), target.shape[-1])
            layout = self.layout(format).name
            parts.append((rows, self.linear_restored(parameter, PackedWeight(layout, format, shape, plain))))
        return parts[0][1] if len(parts) == 1 else put_rows(parts, target.shape)

    def _restore_kept(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        shape = parameter.spec.shape
        rows = stored_rows(self.model, parameter.name, shape)
        if len(rows) == 1 and len(shape) < 2:
            return next(iter(tensors.values()))
        whole = torch.empty(matrix_shape(shape), dtype=parameter.spec.dtype)
        for key, index in rows.items():
            whole[index] = tensors[key].reshape(len(index), -1)
        return whole.reshape(shape)

    def decode(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor | None:
        assert parameter.target is not None
        assert parameter.format is not None
        whole = torch.empty(matrix_shape(parameter.target.shape))
        for module, rows in self.pieces(parameter.target):
            shape = (len(rows), whole.shape[1])
            whole[rows] = self.decode_linear(_inside(tensors, module), parameter.format, shape)
        return whole.reshape(parameter.target.shape)

    def kept_linears(self, outcome: Outcome) -> list[str]:
        """Names of matrices that are not quantized, as the running model and as the hub name them; no embeddings."""
        quantized = outcome.formats
        names: dict[str, None] = {}
        for target in find_targets(self.model):
            if target.kind in ("linear", "conv1d") and target.holder not in quantized:
                names |= dict.fromkeys([target.holder, *(module for module, _ in self.pieces(target))])
        for p in outcome.parameters:  # routers of experts are not nn.Linear here, and are one for others
            if p.format is None and p.target is None and len(p.spec.shape) == 2 and p.name.endswith(".weight"):
                stored = [p.name, *stored_rows(self.model, p.name, p.spec.shape)]
                names |= dict.fromkeys(name.removesuffix(".weight") for name in stored)
        return list(names)

    def card(self, outcome: Outcome) -> str:
        formats = ", ".join(sorted({str(format) for format in outcome.formats.values()}))
        return CARD.format(
            tag=self.name, name=short_name(outcome.model), formats=formats, usage=self.usage,
            bits_per_weight=outcome.bits_per_weight, size_bytes=outcome.size_bytes,
        )  # fmt: skip


def take_rows(value: QuantizedTensor, rows: Tensor) -> QuantizedTensor:
    """Some rows of a quantized tensor whose params belong to rows."""
    params: dict[str, Tensor | QuantizedTensor] = {}
    for name, param in value.params.items():
        assert isinstance(param, Tensor), f"{value.format}: {name} spans rows"
        params[name] = param[rows]
    return QuantizedTensor(value.format, (len(rows), value.shape[-1]), value.codes[rows], params)


def put_rows(parts: list[tuple[Tensor, QuantizedTensor]], shape: tuple[int, ...]) -> QuantizedTensor:
    """The inverse of `take_rows` for rows that together are all."""
    order = torch.argsort(torch.cat([rows for rows, _ in parts]))
    first = parts[0][1]
    params: dict[str, Tensor | QuantizedTensor] = {}
    for name in first.params:
        pieces = [piece.params[name] for _, piece in parts]
        params[name] = torch.cat([piece for piece in pieces if isinstance(piece, Tensor)])[order]
    return QuantizedTensor(first.format, shape, torch.cat([piece.codes for _, piece in parts])[order], params)


def _inside(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    prefix = f"{module}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def one_format(kind: str, formats: Iterable[Format]) -> list[str]:
    """The sentence for files that can hold one format only."""
    names = sorted({str(format) for format in formats})
    if len(names) < 2:
        return []
    return [
        f"rules: {' and '.join(names)} in one file; {kind} holds one format; give all the same, or keep some in bf16"
    ]
