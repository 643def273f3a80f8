"""What a model takes in each format, part by part, and what fits into a given memory.

Weights come from the same plan that `whit quantize` writes by, so they are exact to the byte; the rest is computed
from the shape (see `cache`, `activations`, `training`) and from what the libraries themselves were measured to take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from whit.errors import RecipeError
from whit.export.dense import Dense, Float16, Float32
from whit.export.whit import Whit
from whit.formats import parse_format
from whit.memory.activations import (
    Widths,
    logits_bytes,
    prefill_bytes,
    training_bytes,
    turned_bytes,
    widths,
    workspace_bytes,
)
from whit.memory.cache import DENSE, CacheLayer, cache_bytes, cache_layers, check_precision
from whit.memory.subject import Subject
from whit.memory.training import adapter_bytes, full_bytes
from whit.model.targets import Target, find_targets
from whit.pipeline.plan import plan_dense, plan_quantization
from whit.recipe import Recipe
from whit.tensor import Format

Training = Literal["full", "lora", "qlora"]
# Bytes of a process that has imported torch, transformers and whit and built a model's code; on a GPU, those of the
# driver's context and the libraries' handles. Measured by benchmarks/memory_peak.py.
OVERHEAD = {"cpu": 430_000_000, "cuda": 600_000_000}
# What training adds to it: a tokenizer and the data, PEFT, and what a first pass leaves in the heap.
TRAINER = {"cpu": 180_000_000, "cuda": 0}
RUN = ("fp32", "bf16", "int8", "int6-g64", "nf4-dq", "int4-g128", "int3-g64", "int2-g32")
LADDER = ("bf16", "int8", "int6-g64", "int5-g64", "nf4-dq", "int4-g64", "int3-g64", "int2-g32")  # best first
TRAINED = {"full": ("fp32", "bf16"), "lora": ("bf16", "int8", "nf4-dq"), "qlora": ("nf4-dq", "int4-g64")}
DENSE_FILES = {file.dtype: file for file in (Dense, Float16, Float32)}
TEXTBOOK = (("FP32", 32), ("FP16", 16), ("INT8", 8), ("INT4", 4))
FAR = 1 << 24  # tokens: a search for the longest context ends here
PROMPT = 64  # rows that every kernel takes for a prompt


@dataclass(frozen=True)
class Situation:
    """What is done with the model: `batch` texts of `context` tokens each (prompt and answer), or training.

    - `cache_format`: the SPEC of keys and values; auto: the model's own type. `device`: cpu or cuda.
    - `train`: full, lora or qlora, with adapters of `rank` on the linears `targets`; None: generation.
    - `rules`: pairs (glob, format), as in a recipe.
    """

    context: int
    batch: int = 1
    cache_format: str = "auto"
    device: str = "cpu"
    train: Training | None = None
    rank: int = 16
    targets: tuple[str, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Need:
    """The bytes that a format takes, by part. `checkpointing`: for training, whether the backward pass computes blocks
    again.
    """

    format: str
    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    optimizer_bytes: int
    overhead_bytes: int
    bits_per_weight: float
    checkpointing: bool | None = None

    @property
    def total_bytes(self) -> int:
        parts = (self.weights_bytes, self.kv_cache_bytes, self.activations_bytes, self.optimizer_bytes)
        return sum(parts) + self.overhead_bytes

    def to_json(self) -> dict[str, Any]:
        """All fields and the total."""
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Fit:
    """A format that fits: its need at the asked context, and the longest context that fits, in tokens."""

    need: Need
    longest_context: int

    def to_json(self) -> dict[str, Any]:
        """The need with the longest context beside it."""
        return {**self.need.to_json(), "longest_context": self.longest_context}


@dataclass(frozen=True)
class Weights:
    """What a format makes of a model's weights: bytes of the files, and the formats of what is packed."""

    format: str
    size_bytes: int
    bits_per_weight: float
    packed: Mapping[Target, Format] = field(default_factory=dict)


class Planner:
    """Answers for one subject in one situation; what does not depend on the format is computed once."""

    def __init__(self, subject: Subject, situation: Situation) -> None:
        self.subject, self.situation = subject, situation
        self.notes: list[str] = list(subject.notes)
        self._workspaces: dict[str, int] = {}
        check_precision(situation.cache_format, self.layers)

    @cached_property
    def widths(self) -> Widths:
        return widths(self.subject.config, self.subject.model)

    @cached_property
    def layers(self) -> tuple[CacheLayer, ...]:
        """The layers that cache: none where nothing is generated, twice as many where there is an encoder too."""
        if not self.subject.model.can_generate():
            return ()
        layers, notes = cache_layers(self.subject.config)
        self.notes += notes
        return layers * (2 if self.subject.model.config.is_encoder_decoder else 1)

    def weights(self, spec: str) -> Weights:
        """The weights in a format; RecipeError where it does not fit the model."""
        source = self.subject.source
        if spec in DENSE and not self.situation.rules:
            plan = plan_dense(source, DENSE_FILES[DENSE[spec]](source.model, Path()))
            return Weights(spec, plan.size_bytes, plan.bits_per_weight)
        recipe = Recipe(None, [("*", spec), *self.situation.rules])
        plan = plan_quantization(source, recipe, Whit(source.model, Path()))
        packed = {i.target: i.format for i in plan.items if i.target is not None and i.format is not None}
        return Weights(str(parse_format(spec)), plan.size_bytes, plan.bits_per_weight, packed)

    def stored(self) -> Weights | None:
        """The weights as they lie in the folder, where they are quantized already."""
        size = self.subject.stored_bytes
        return None if size is None else Weights("as stored", size, 8 * size / max(self.subject.parameters, 1))

    def need(self, weights: Weights, context: int | None = None, checkpointing: bool | None = None) -> Need:
        """Every part for one format; `context` replaces the situation's."""
        s, tokens = self.situation, context or self.situation.context
        compute = DENSE.get(weights.format, self.subject.dtype)
        cache = 0
        if s.train is None:
            cache = cache_bytes(self.layers, tokens, s.batch, s.cache_format, compute)
            activations = prefill_bytes(self.widths, tokens, s.batch, compute)
        else:
            activations = training_bytes(self.widths, tokens, s.batch, compute, bool(checkpointing))
        activations += self._workspace(weights, compute)
        overhead = OVERHEAD[s.device] + (0 if s.train is None else TRAINER[s.device])
        held = weights.size_bytes + turned_bytes(weights.packed, s.device)
        return Need(
            weights.format, held, cache, activations, self._optimizer(compute), overhead,
            weights.bits_per_weight, checkpointing,
        )  # fmt: skip

    def _workspace(self, weights: Weights, dtype: torch.dtype) -> int:
        if weights.format not in self._workspaces:
            self._workspaces[weights.format] = workspace_bytes(weights.packed, PROMPT, dtype, self.situation.device)
        return self._workspaces[weights.format]

    def _optimizer(self, dtype: torch.dtype) -> int:
        s = self.situation
        if s.train is None:
            return 0
        if s.train == "full":
            return full_bytes(self.subject.parameters, dtype)
        return adapter_bytes(find_targets(self.subject.model), s.targets, s.rank)

    def rows(self, specs: Sequence[str]) -> list[Need]:
        """A row for each format, two in training (with checkpointing and without); by default the usual formats."""
        return [need for weights in self._weights(specs) for need in self._needs(weights)]

    def _needs(self, weights: Weights) -> Iterator[Need]:
        for checkpointing in (None,) if self.situation.train is None else (True, False):
            yield self.need(weights, checkpointing=checkpointing)

    def _weights(self, specs: Sequence[str], usual: Sequence[str] = RUN) -> list[Weights]:
        """The formats asked for; of the usual ones, those that fit the model, with a note on the others."""
        train = self.situation.train
        if specs:
            for spec in specs:
                self._check_trainable(spec)
            return [self.weights(spec) for spec in specs]
        stored = self.stored() if train is None else None
        found = [] if stored is None else [stored]
        for spec in usual if train is None else TRAINED[train]:
            try:
                found.append(self.weights(spec))
            except RecipeError as error:
                self.notes.append(f"{spec} is left out: {str(error).splitlines()[0]}")
        return found

    def _check_trainable(self, spec: str) -> None:
        dense = spec in DENSE
        if self.situation.train == "full" and not dense:
            raise RecipeError(f"train full: {spec} is packed; every weight must be a float; use fp32, bf16 or lora")
        if self.situation.train == "qlora" and dense:
            raise RecipeError(f"train qlora: {spec} is not quantized; its base must be; use nf4-dq, or --train lora")

    def fits(self, budget: int, specs: Sequence[str]) -> list[Fit]:
        """The formats that fit into `budget` bytes at the asked context, best first, each with its longest context."""
        found = []
        checkpointing = None if self.situation.train is None else True
        for weights in self._weights(specs, LADDER):
            need = self.need(weights, checkpointing=checkpointing)
            if need.total_bytes <= budget:
                found.append(Fit(need, self._longest(weights, budget, checkpointing)))
        return sorted(found, key=lambda fit: -fit.need.bits_per_weight) if specs else found

    def _longest(self, weights: Weights, budget: int, checkpointing: bool | None) -> int:
        """By bisection: memory grows with the context."""
        low, high = self.situation.context, getattr(self.subject.config, "max_position_embeddings", None) or FAR
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.need(weights, middle, checkpointing).total_bytes <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def textbook(self) -> list[dict[str, Any]]:
        """Parameters x bits / 8, with the number of parameters that the model's name says: weights alone."""
        n = self.subject.nominal
        return [{"format": name, "bits": bits, "weights_bytes": round(n * bits / 8)} for name, bits in TEXTBOOK]

    def scoring_bytes(self) -> int:
        """What scoring every position adds: the logits of the whole prompt."""
        s = self.situation
        return logits_bytes(self.widths, s.context, s.batch, self.subject.dtype)
