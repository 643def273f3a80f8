"""A model with an adapter in it as a source of parameters, in float32: nothing is rounded before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from whit.activations import Activations
from whit.checkpoint.header import Entry
from whit.errors import CheckpointError
from whit.formats.lowrank import DTYPE, LowRank, side_car
from whit.formats.numeric import widened
from whit.methods.lowrank import Factored, joined
from whit.model.source import Origin
from whit.model.targets import Target, find_targets
from whit.pipeline.sources import Coded, Source
from whit.tensor import Format, QuantizedTensor, TensorSpec, tensor_param
from whit.training.peft_file import Adapter, Delta


class MergedSource:
    """The parameters of `weights` with the adapter's deltas added; `base` is the model that it was trained on.

    Both are the same source, but where the model in full precision is given beside the quantized one.
    CheckpointError where the adapter does not fit the model.
    """

    widens = True  # `read`

    def __init__(self, base: Source, weights: Source, adapter: Adapter) -> None:
        self.base, self.weights = base, weights
        self.model, self.checkpoint = base.model, base.checkpoint
        self.config, self.tied, self.dropped = base.config, base.tied, base.dropped
        self.targets = {target.parameter: target for target in find_targets(base.model)}
        self.deltas = _fitted(adapter, base, self.targets)
        self.whole = _whole(adapter, base)
        self.origins: Mapping[str, Origin] = {name: self._origin(name, origin) for name, origin in base.origins.items()}

    def read(self, name: str) -> Tensor:
        """A parameter as the model with its adapter has it, in float32: so the blocks run too."""
        weight = widened(self.whole[name] if name in self.whole else self._weight(name))
        if name not in self.deltas:
            return weight
        transposed = self.targets[name].transposed
        merged = self.deltas[name].added_to(weight.t() if transposed else weight)
        return merged.t() if transposed else merged

    def entry(self, name: str) -> Entry | None:
        """Where a parameter lies that is the base's own, bytes and all."""
        return None if name in self.deltas or name in self.whole else self.base.entry(name)

    def _weight(self, name: str) -> Tensor:
        """Of parameters that the base keeps as they are, its own."""
        packed = isinstance(self.base, Coded) and self.base.format(name) is not None
        return (self.weights if packed or name in self.deltas else self.base).read(name)

    def _origin(self, name: str, origin: Origin) -> Origin:
        if name in self.whole:
            return replace(origin, spec=TensorSpec(origin.spec.shape, self.whole[name].dtype))
        return origin


class CodedMerge(MergedSource):
    """The same over a quantized base: what the adapter does not reach can be had as its codes.

    With `beside` what it reaches too: the base's codes, and the adapter as a side-car.
    """

    base: Coded

    def __init__(self, base: Coded, weights: Source, adapter: Adapter, beside: bool) -> None:
        super().__init__(base, weights, adapter)
        self.beside = beside
        if beside:
            self._check_products()

    def format(self, name: str) -> Format | None:
        if name in self.whole:
            return None
        stored = self.base.format(name)
        if not self.beside or name not in self.deltas or stored is None:
            return stored
        inner, rank = (stored, 0) if (had := side_car(stored)) is None else (had.base, had.rank)
        return LowRank(inner, rank + len(self.deltas[name].a))

    def quantized(self, name: str) -> QuantizedTensor:
        codes, format = self.base.quantized(name), self.format(name)
        if not self.beside or name not in self.deltas or format is None:
            return codes
        return _with_side_car(codes, self.deltas[name], format)

    def note(self, name: str) -> str | None:
        return self.base.note(name)

    def coded(self, name: str) -> bool:
        return name not in self.whole and self.base.coded(name)

    def input_rounding(self, name: str) -> tuple[Activations, Mapping[str, Tensor]] | None:
        return None if name in self.whole else self.base.input_rounding(name)

    def _check_products(self) -> None:
        for name, delta in self.deltas.items():
            if delta.magnitude is not None:
                raise CheckpointError(
                    f"{name}: DoRA rescales whole rows, and a side-car holds a product only; "
                    "the codes must change too; use --route requantize or bf16"
                )


def _with_side_car(codes: QuantizedTensor, delta: Delta, format: Format) -> QuantizedTensor:
    """The base's codes with the adapter's factors beside them, after those that lie there already."""
    had = side_car(codes.format)
    b, a = _balanced(delta)
    if had is not None:
        b = torch.cat([tensor_param(codes.params, "low_rank_b").to(b.dtype), b], dim=1)
        a = torch.cat([tensor_param(codes.params, "low_rank_a").to(a.dtype), a])
        codes = QuantizedTensor(had.base, codes.shape, codes.codes, had.inner(codes.params))
    return joined(Factored(codes, b.to(DTYPE), a.to(DTYPE), 0.0), format)


def _balanced(delta: Delta) -> tuple[Tensor, Tensor]:
    """The same product, column i of B as long as row i of A."""
    ratio = (delta.a.norm(dim=1) / delta.b.norm(dim=0)).sqrt()
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    return delta.b * ratio, delta.a / ratio[:, None]


def _fitted(adapter: Adapter, base: Source, targets: Mapping[str, Target]) -> dict[str, Delta]:
    """The deltas by parameter, each a linear or an embedding of the model in the adapter's shape."""
    by_holder = {target.holder: target for target in targets.values()}
    where, model = adapter.folder, type(base.model).__name__
    found = {}
    for holder, delta in adapter.deltas.items():
        target = by_holder.get(holder)
        if target is None:
            raise CheckpointError(
                f"{where}: has {holder}, and {model} has no such linear; it must be an adapter of this model; "
                "name the model that it was trained on"
            )
        if target.shape != delta.shape:
            raise CheckpointError(
                f"{where}: {holder} is {list(delta.shape)} there and {list(target.shape)} in the model; "
                "both must agree; name the model that it was trained on"
            )
        if target.parameter in base.tied or target.parameter in base.tied.values():
            raise CheckpointError(
                f"{where}: {holder} shares its weight with another module, which the adapter must not change; "
                "it cannot be merged; keep it beside the model with PEFT"
            )
        found[target.parameter] = delta
    return found


def _whole(adapter: Adapter, base: Source) -> dict[str, Tensor]:
    for name, tensor in adapter.whole.items():
        if name not in base.origins or base.origins[name].spec.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{adapter.folder}: {name} of shape {list(tensor.shape)} is not in {type(base.model).__name__}; "
                "it must be an adapter of this model; name the model that it was trained on"
            )
    return dict(adapter.whole)
