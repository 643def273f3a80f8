"""The plan of a run: what becomes of every parameter and where each byte will lie, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import groupby
from math import prod

from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.checkpoint.header import count_parameters
from whit.checkpoint.writer import Shard
from whit.errors import RecipeError
from whit.export.base import Exporter, Parameter, Value
from whit.export.settle import settle
from whit.formats.bands import bands_of, refuse_table
from whit.methods import Method
from whit.model.graph import find_blocks
from whit.model.targets import Target, find_targets, used_directly, vocabulary_tables
from whit.pipeline.sources import Source, floats_dtype
from whit.recipe import Recipe
from whit.recipe.preflight import check_recipe
from whit.spoken import by_reason
from whit.tensor import Format, QuantizedTensor, TensorSpec

SHARD_SIZE = 5_000_000_000  # bytes, as on the hub
USED_DIRECTLY = "a linear whose weight the module around it multiplies by itself"


@dataclass(frozen=True)
class Item(Parameter):
    """One parameter: quantized to `format`, or kept because of `reason`. `written` are the tensors that it becomes.

    `is_copy`: kept, and its bytes go into the file as they are. `method`: the one that a rule names, None for the
    recipe's own.
    """

    reason: str | None
    written: Mapping[str, TensorSpec]
    is_copy: bool
    method: Method | None = field(default=None, kw_only=True)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(spec.nbytes for spec in self.written.values()) / max(prod(self.spec.shape), 1)

    def matrix(self, parameter: Tensor) -> Tensor:
        """A target's parameter as it is quantized: (rows, in_features), experts below each other."""
        assert self.target is not None
        return (parameter.mT if self.target.transposed else parameter).reshape(-1, self.target.shape[-1])

    def parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        assert self.target is not None
        stacked = matrix.reshape(self.target.shape)
        return stacked.mT if self.target.transposed else stacked


@dataclass(frozen=True)
class Unit:
    """Parameters that are finished together: a decoder or encoder block, or what lies between them."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """All units in the order in which they are done, and the files that they fill."""

    units: tuple[Unit, ...]
    shards: tuple[Shard, ...]

    @cached_property
    def items(self) -> tuple[Item, ...]:
        return tuple(item for unit in self.units for item in unit.items)

    @property
    def formats(self) -> dict[str, Format]:
        """Holder to format, of everything quantized."""
        return {i.target.holder: i.format for i in self.items if i.target is not None and i.format is not None}

    @property
    def size_bytes(self) -> int:
        """Exact size of the weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return count_parameters({item.name: item.spec for item in self.items})

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / max(self.parameters, 1)


def floats(item: Item, value: Value) -> Tensor:
    """What a parameter has become as floats, in the running model's own shape."""
    return item.parameter(value.dequantize()) if isinstance(value, QuantizedTensor) else value


def plan_quantization(source: Source, recipe: Recipe, exporter: Exporter, shard_size: int = SHARD_SIZE) -> Plan:
    """The plan of a recipe; RecipeError lists everything in the model and in the file that it does not fit."""
    targets = {target.parameter: target for target in find_targets(source.model)}
    groups = {p: _tied_group(targets, source.tied, p) for p in targets if p in source.origins}
    holders = [target.holder for target in targets.values()]
    settled = settle(recipe, exporter, source.model, groups)
    recipe = settled.recipe
    for how in recipe.all_activations:
        if (problem := exporter.refuses(how)) is not None:
            raise RecipeError(f"activations {how}: {problem}")
    fits = partial(_misfits, source.model, exporter)
    formats = check_recipe(recipe, groups, holders, calibrated=True, fits=fits)
    # static scales are known where calibration runs the model: in its blocks
    static = any(how.needs_stats for how in recipe.all_activations)
    reached = tuple(f"{name}." for name in find_blocks(source.model).names) if static else ()
    others = {name: "a buffer" for name, _ in source.model.named_buffers()}
    others |= {f"{name}.weight": USED_DIRECTLY for name in used_directly(source.model)}
    items = []
    for name, origin in source.origins.items():
        target, format = targets.get(name), formats.get(name)
        reason = settled.reasons.get(name)
        if format is None and reason is None:
            reason = _reason(recipe, name, target, others)
        taken = None if target is None else recipe.activations_for(target.holder, target.kind, format)
        if taken is not None and taken.needs_stats and not name.startswith(reached):
            taken = None
        method = _method(recipe, groups.get(name, ())) if format is not None else None
        spec = origin.spec if format is not None else _kept(source, name)
        items.append(_item(exporter, Parameter(name, spec, target, format, activations=taken), reason, method))
    return _assemble(source.model, items, exporter, shard_size)


def _kept(source: Source, name: str) -> TensorSpec:
    """What a parameter is kept as."""
    return TensorSpec(source.origins[name].spec.shape, floats_dtype(source, name))


def _misfits(model: PreTrainedModel, exporter: Exporter, formats: Mapping[Target, Format]) -> list[str]:
    """What the file cannot hold, and tables of something else than the vocabulary in bands.

    A plan that quantizes nothing is a beginning, whose formats a budget chooses; to run it is another matter.
    """
    if not formats:
        return []
    banded = [target for target, format in formats.items() if bands_of(format) is not None]
    tables = vocabulary_tables(model) if banded else {}
    refused = {t: why for t in banded if (why := refuse_table(formats[t], t.shape, tables.get(t.holder)))}
    said = by_reason((t.holder, f"{formats[t]} for {why}") for t, why in refused.items())
    return [*said, *exporter.problems(formats)]


def plan_dense(source: Source, exporter: Exporter, shard_size: int = SHARD_SIZE) -> Plan:
    """The plan that quantizes nothing."""
    targets = {target.parameter: target for target in find_targets(source.model)}
    items = [
        _item(exporter, Parameter(name, origin.spec, targets.get(name), None), "exported without quantization")
        for name, origin in source.origins.items()
    ]
    return _assemble(source.model, items, exporter, shard_size)


def _method(recipe: Recipe, targets: tuple[Target, ...]) -> Method | None:
    """The method that a rule names for one of the targets that share a parameter, None where it is the recipe's own."""
    named = [method for target in targets if (method := recipe.method_for(target.holder)) is not None]
    return named[0] if named and named[0] != recipe.method else None


def _item(exporter: Exporter, parameter: Parameter, reason: str | None, method: Method | None = None) -> Item:
    written = exporter.specs(parameter)
    is_copy = parameter.format is None and exporter.verbatim(parameter)
    named = (parameter.name, parameter.spec, parameter.target, parameter.format)
    return Item(*named, reason, written, is_copy, activations=parameter.activations, method=method)


def _tied_group(targets: Mapping[str, Target], tied: Mapping[str, str], parameter: str) -> tuple[Target, ...]:
    """The targets that share one stored parameter, its owner first."""
    partners = [name for name, owner in tied.items() if owner == parameter and name in targets]
    return tuple(targets[name] for name in (parameter, *partners))


def _of_shape(target: Target) -> str:
    rows, columns = target.shape[-2:]
    return f"{rows} x {columns}"


def _reason(recipe: Recipe, name: str, target: Target | None, others: Mapping[str, str]) -> str:
    """Why a parameter is kept; `others`: why some are no targets."""
    if target is None:
        return others.get(name, "not the matrix of a linear or an embedding")
    if any(fnmatchcase(target.holder, pattern) and format.bits == 16 for pattern, format in recipe.rules):
        return "a rule keeps it"
    if target.kept_by_default:
        kinds = {
            "the gate of experts": target.is_gate,
            "an output head": target.is_head,
            "an embedding": target.kind == "embedding",
        }
        kind = next((kind for kind, holds in kinds.items() if holds), f"a linear of only {_of_shape(target)}")
        return f"{kind}; only a rule that names it quantizes it"
    return "no rule matches"


def _assemble(model: nn.Module, items: Iterable[Item], exporter: Exporter, shard_size: int) -> Plan:
    units = tuple(_units(model, items))
    return Plan(units, exporter.shards([item for unit in units for item in unit.items], shard_size))


def _units(model: nn.Module, items: Iterable[Item]) -> Iterator[Unit]:
    """Items cut by outermost ModuleList index; what lies between blocks is named after its first parameter."""
    lists = [re.escape(name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    block = re.compile(rf"(?:{'|'.join(lists)})\.\d+(?=\.)") if lists else re.compile(r"(?!)")

    def key(item: Item) -> str:
        found = block.match(item.name)
        return found[0] if found else ""

    for name, members in groupby(items, key):
        unit = tuple(members)
        yield Unit(name or unit[0].name, unit)
