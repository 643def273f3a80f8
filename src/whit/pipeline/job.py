"""A run before it begins: what a user asked for, checked against the model and planned without reading a weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import whit
from whit.calibration import Calibration, CalibrationTokens
from whit.calibration.storage import INPUT_MEMORY
from whit.checkpoint.files import check_side_files
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.onnx import onnx_graph
from whit.checkpoint.places import check_out
from whit.checkpoint.reader import Checkpoint, read_config
from whit.devices import find_device
from whit.errors import RecipeError
from whit.export import Exporter, exporter_named
from whit.export.foreign import ForeignSource
from whit.export.packed import PackedSource
from whit.export.readers import open_foreign, quant_method
from whit.export.readers.gguf import read_gguf_model
from whit.export.whit import QUANT_METHOD
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.model.graph import Folding, find_blocks, find_foldings
from whit.model.skeleton import load_skeleton
from whit.model.source import ModelSource
from whit.named import require
from whit.pipeline.plan import SHARD_SIZE, Plan, plan_dense, plan_quantization
from whit.pipeline.sources import Coded, Source
from whit.pipeline.usual import with_usual
from whit.randomness import check_seed
from whit.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """How a run is done; of these only the seed and the shard size change a byte of the result.

    `device` is auto, cpu or cuda. `shard_size` is the most bytes of a weight file. `progress` is called with a unit's
    name, the number of units done and their total. `input_memory`: bytes of memory for the inputs of blocks that
    calibration keeps, those of the unquantized model included; what needs more goes to files beside OUT. RecipeError
    where it is negative.
    """

    seed: int = 0
    device: str = "auto"
    restart: bool = False
    trust_remote_code: bool = False
    shard_size: int = SHARD_SIZE
    progress: Callable[[str, int, int], None] | None = None
    input_memory: int = INPUT_MEMORY

    def __post_init__(self) -> None:
        check_seed(self.seed)
        require(self.input_memory, int, "input memory", "it must be a number of bytes")
        if self.input_memory < 0:
            raise RecipeError(f"input memory {self.input_memory}: is not an amount of memory; give 0 or more bytes")


@dataclass(frozen=True)
class Job:
    """One run: from where, by which plan, to where. Empty or None is what does not apply to it.

    - `model`: as the user named it; `recipe`: None where nothing is quantized; `notes`: sentences for the user.
    - `calibration`: the tokens, where the recipe needs them; `importance`: weights (columns,) of a parameter's columns,
      by its name, from an importance matrix.
    - `exact`: parameters whose codes are copied from MODEL as they are; with `requantize`, only where they can be.
      `regridded`: parameters that get new codes and keep the params that they have in MODEL.
    - `training`, `budget`: for the account, how the values were trained and how the recipe was found for a size.
    - `origin`: a hash of what the bytes depend on in addition to MODEL.
    """

    model: str
    source: Source
    plan: Plan
    out: Path
    recipe: Recipe | None
    options: Options
    exporter: Exporter
    calibration: CalibrationTokens | None = None
    notes: tuple[str, ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()
    requantize: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    regridded: frozenset[str] = frozenset()
    origin: str = ""
    budget: Mapping[str, Any] | None = None

    @cached_property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        return find_device(self.options.device)

    @property
    def single(self) -> str | None:
        """The one file that OUT is to be, where it is not a folder."""
        suffix = self.exporter.suffix
        return self.plan.shards[0].name if suffix and self.out.name.endswith(suffix) else None

    @cached_property
    def foldings(self) -> dict[str, tuple[Folding, ...]]:
        """Where a transform's scales fold, by block; UnsupportedModelError where that is not known."""
        return find_foldings(self.source.model)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for runs that give the same bytes: model files, recipe, seed, kind of file, plan and version."""
        folder, checkpoint = self.source.checkpoint.folder, self.source.checkpoint
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.shards]
        config = sha256((folder / "config.json").read_bytes()).hexdigest()
        recipe = self.recipe.to_dict() if self.recipe is not None else None
        plan = sha256(b"".join(shard.header for shard in self.plan.shards)).hexdigest()
        text = self.calibration.sha256 if self.calibration is not None else None
        parts = [
            whit.__version__,
            files,
            config,
            recipe,
            self.options.seed,
            self.exporter.name,
            plan,
            text,
            sorted(self.exact),
        ]
        if self.training:
            parts.append(dict(self.training))
        if self.origin:
            parts.append(self.origin)
        if self.importance:
            parts.append(sha256(b"".join(w.numpy().tobytes() for w in self.importance.values())).hexdigest())
        return sha256(json.dumps(parts).encode()).hexdigest()


def prepare(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None,
    options: Options,
    calibration: Calibration | None = None,
    export: str | None = None,
) -> Job:
    """Check and plan everything without reading a weight.

    `export` names the kind of file: whit's own unless given, bf16 where there is no recipe. A recipe that needs
    statistics and is given no `calibration` uses `whit:text`.
    """
    folder = resolve_model(model, options.trust_remote_code)
    kind = exporter_named(export or ("whit" if recipe is not None else "bf16"))
    check_out(Path(out), folder, kind.suffix)
    source = open_source(folder, options.trust_remote_code)
    folder = source.checkpoint.folder
    check_side_files(folder, options.trust_remote_code)
    exporter = kind(source.model, folder)
    notes: tuple[str, ...] = ()
    if recipe is None:
        plan = plan_dense(source, exporter, options.shard_size)
    else:
        recipe, said = with_usual(recipe, kind, source.model)
        recipe, notes = _fit(recipe, kind)
        notes = (*said, *notes)
        if isinstance(source, Coded) and any(map(source.coded, source.origins)):
            notes = (f"{model}: quantized already, and rounded again here; the original model would lose less", *notes)
        plan = plan_quantization(source, recipe, exporter, options.shard_size)
        notes = (*notes, *_idle(recipe, plan))
    name = Path(model).resolve().name if Path(model).exists() else str(model)
    tokens = calibration_tokens(source, folder, recipe, options, calibration)
    return Job(name, source, plan, Path(out), recipe, options, exporter, tokens, notes)


def _fit(recipe: Recipe, kind: type[Exporter]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe in formats that the file can hold, and a sentence for each that had to change."""
    recipe = kind.whole(recipe)
    rules = [(pattern, kind.fitted(format)) for pattern, format in recipe.rules]
    changes = zip(recipe.rules, rules, strict=True)
    changed = {str(old): str(new) for (_, old), (_, new) in changes if old != new}
    notes = tuple(f"{old}: {kind.name} files hold it as {new}; that is written" for old, new in changed.items())
    return recipe.with_rules(rules, recipe.mix), notes


def _idle(recipe: Recipe, plan: Plan) -> tuple[str, ...]:
    """A sentence where a recipe that should quantize comes to nothing in this model and kind of file."""
    if plan.formats or not (recipe.mix or any(format.bits < 16 for _, format in recipe.rules)):
        return ()
    reasons = [str(i.reason) for i in plan.items if i.target is not None and not i.target.kept_by_default]
    return (f"nothing is quantized: {reasons[0].removeprefix('kept: ') if reasons else 'there are no linears'}",)


def calibration_tokens(
    source: Source, folder: Path, recipe: Recipe | None, options: Options, calibration: Calibration | None
) -> CalibrationTokens | None:
    """The calibration text as tokens, where the recipe needs it."""
    if recipe is not None and recipe.transform is not None:
        find_foldings(source.model)
    if recipe is None or not recipe.needs_text:
        if calibration is not None and recipe is not None:
            raise RecipeError(
                f"calibration: {recipe.title} uses no data; one that does must be chosen; use gptq, or drop it"
            )
        return None
    if recipe.needs_stats:
        find_blocks(source.model)
    text = calibration or Calibration(seed=options.seed)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=options.trust_remote_code)
    return text.tokens(tokenizer, maximum_context(source.model.config))


def open_source(folder: Path, trust_remote_code: bool = False) -> Source:
    """The parameters of a model folder: plain, or quantized by whit or another program; or those of a .gguf file."""
    if folder.is_file():
        gguf = read_gguf_model(folder)
        return ForeignSource(load_skeleton(gguf.folder), gguf)
    config, is_graph = read_config(folder), onnx_graph(folder) is not None
    model, method = load_skeleton(folder, trust_remote_code), quant_method(config)
    if is_graph or method not in (None, QUANT_METHOD):
        return ForeignSource(model, open_foreign(folder, config))
    checkpoint = Checkpoint(folder)
    if method is None:
        return ModelSource(model, checkpoint)
    return PackedSource(model, checkpoint, config["quantization_config"])
