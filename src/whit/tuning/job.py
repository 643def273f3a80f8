"""A run of training before it begins: settings and data checked, every step planned, no weight read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import whit
from whit.checkpoint.files import check_side_files
from whit.checkpoint.hub import HubName, hub_name, resolve_model
from whit.checkpoint.places import check_out
from whit.devices import find_device
from whit.errors import TrainingError
from whit.integrations.loading import load_config, load_tokenizer, maximum_context
from whit.pipeline.job import Options
from whit.training.data import Dataset, read_examples
from whit.training.loop import Work
from whit.training.optimizers import settle_optimizer
from whit.training.packing import derive, plan_evaluation, plan_steps
from whit.training.ranks import Ranks
from whit.training.settings import CONTEXT, Tuning


@dataclass(frozen=True)
class TuningJob:
    """A run before it begins: data read and every step planned, no weight read. `notes` a user should read."""

    model: str
    folder: Path
    out: Path
    tuning: Tuning
    options: Options
    data: Dataset
    held_out: Dataset | None
    work: Work
    notes: tuple[str, ...] = ()
    save_every: int | None = None
    hub: HubName | None = None  # where MODEL came from, if it did

    @cached_property
    def device(self) -> str:
        """Where the model goes: one device a process."""
        place = find_device(self.options.device)
        return f"cuda:{torch.cuda.current_device()}" if place.type == "cuda" and place.index is None else str(place)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for runs that give the same bytes."""
        files = [self.folder] if self.folder.is_file() else sorted(self.folder.glob("*.safetensors"))
        config = self.folder / "config.json"
        parts = [
            whit.__version__, torch.__version__, self.device.partition(":")[0], Ranks.here().size, self.options.seed,
            [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
            sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
            self.tuning.to_json(), self.data.to_json(), self.held_out and self.held_out.to_json(),
        ]  # fmt: skip
        return sha256(json.dumps(parts).encode()).hexdigest()


def prepare_tuning(
    model: str | Path, data: str | Path, out: str | Path, tuning: Tuning, held_out: str | Path | None, options: Options
) -> TuningJob:
    """Check settings and data and plan every step; no weight is read."""
    folder = resolve_model(model, options.trust_remote_code)
    if folder.is_file():
        raise TrainingError(
            f"{model}: is one file; PEFT can find the base again only in a folder; make one with whit convert {model} "
            "FOLDER --export whit"
        )
    check_out(Path(out), folder)
    if tuning.calibrated:  # they go to OUT/base
        check_side_files(folder, options.trust_remote_code)
    Ranks.here().check(tuning.accumulate)
    config = load_config(str(model), trust_remote_code=options.trust_remote_code)
    tuning, notes = _settled(str(model), config, tuning)
    optimizer, note = settle_optimizer(tuning.optimizer, find_device(options.device))
    tuning, notes = replace(tuning, optimizer=optimizer), notes + ((note,) if note is not None else ())
    tokenizer = load_tokenizer(str(model), trust_remote_code=options.trust_remote_code)
    assert tuning.context is not None
    trained = read_examples(Path(data), tokenizer, tuning.context, tuning.too_long)
    scored = None
    if held_out is not None:
        scored = read_examples(Path(held_out), tokenizer, tuning.context, tuning.too_long)
    notes += tuple(_said(d, tuning.context) for d in (trained, scored) if d is not None and d.cut + d.dropped)
    if tuning.calibrated:
        notes += (f"{tuning.method} sees the examples that are trained on; its codes will lie in {Path(out) / 'base'}",)
    if scored is None and tuning.holdout:
        trained, scored = _split(trained, tuning.holdout, options.seed)
    work = _plan(trained, scored, tuning, options.seed, tokenizer)
    name = Path(model).resolve().name if Path(model).exists() else str(model)
    return TuningJob(name, folder, Path(out), tuning, options, trained, scored, work, notes, hub=hub_name(model))


def _settled(model: str, config: Any, tuning: Tuning) -> tuple[Tuning, tuple[str, ...]]:
    """The settings with context and dtype as this model has them."""
    notes: tuple[str, ...] = ()
    if getattr(config, "quantization_config", None) is not None and tuning.format is not None:
        raise TrainingError(f"{model}: quantized already; it is trained on as it is; drop --format {tuning.format}")
    most = maximum_context(config)
    if tuning.context is not None and most is not None and tuning.context > most:
        raise TrainingError(
            f"context {tuning.context}: the model was built for {most} positions; it must not be longer; "
            f"use --context {most}"
        )
    dtype = tuning.dtype
    if dtype == "auto":
        stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = "float32" if stored in ("float32", "float64") else "bfloat16"
        if dtype != stored:
            notes = (f"{model}: stored in {stored}; computed in {dtype}, whose range holds every gradient",)
    return replace(tuning, context=tuning.context or min(CONTEXT, most or CONTEXT), dtype=dtype), notes


def _said(data: Dataset, context: int) -> str:
    return (
        f"{data.name}: of {len(data.examples) + data.dropped} examples {data.cut} are cut to {context} tokens and "
        f"{data.dropped} dropped (longer, or without a response within them)"
    )


def _split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    count = len(data.examples)
    if count < 2:
        raise TrainingError(f"{data.name}: holds one example; one more must be there to hold out; use --holdout 0")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, "holdout"))).tolist()
    held = set(order[: min(max(round(share * count), 1), count - 1)])
    parts = ([e for i, e in enumerate(data.examples) if (i in held) is wanted] for wanted in (False, True))
    rest, scored = (replace(data, examples=tuple(part), cut=0, dropped=0) for part in parts)
    return replace(rest, cut=data.cut, dropped=data.dropped), scored


def _plan(trained: Dataset, scored: Dataset | None, tuning: Tuning, seed: int, tokenizer: Any) -> Work:
    steps = plan_steps([len(e.tokens) for e in trained.examples], tuning.portion, seed)
    held_out = scored.examples if scored is not None else ()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = plan_evaluation([len(e.tokens) for e in held_out], tuning.portion)
    return Work(trained.examples, steps, held_out, rows, int(pad or 0))
