"""Recipes for a range of sizes, for `whit compare --sweep 2:8`: each layer is measured once and serves all of them.

OUT_DIR/sweep holds what was measured (and is not measured again), a recipe for every size, and layers.md and .png: the
format that each matrix has at each size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from whit.allocation import Budgeted, Group, free_formats, ladder_of, measured, solve
from whit.calibration import Calibration
from whit.checkpoint.files import write_whole
from whit.errors import RecipeError
from whit.formats import parse_format
from whit.formats.bands import bands_of
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.pipeline.job import Job, Options, prepare
from whit.recipe import Recipe
from whit.report.kept import keep, recall
from whit.tensor import Format

FOLDER = "sweep"
STEP = 0.5  # bits per weight
MOST = 100  # sizes


@dataclass(frozen=True)
class Sweep:
    """From `low` to `high` bits per weight of the whole model, `step` apart."""

    low: float
    high: float
    step: float = STEP

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """`2:8` or `2:8:0.25`; RecipeError for anything else."""
        try:
            numbers = [float(part) for part in text.split(":")]
            found = cls(*numbers) if len(numbers) in (2, 3) else None
        except ValueError:
            found = None
        if found is None or not (0 < found.low <= found.high and found.step > 0 and len(found.sizes) <= MOST):
            raise RecipeError(f"--sweep {text}: sizes are LOW:HIGH or LOW:HIGH:STEP in bits per weight; write 2:8")
        return found

    @property
    def sizes(self) -> tuple[float, ...]:
        count = min(int((self.high - self.low) / self.step + 1e-9), MOST) + 1
        return tuple(round(self.low + i * self.step, 6) for i in range(count))


def sweep(
    model: str, out: Path, span: Sweep, method: str, calibration: Calibration, options: Options,
    say: Callable[[str], None],
) -> tuple[Path, ...]:  # fmt: skip
    """The files of recipes, smallest size first; a size that no choice of formats meets is left out and said."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    start = Recipe(method, [("*", "bf16")])
    job = prepare(model, folder / "none", start, options, calibration if start.needs_text else None)
    groups = _groups(job, calibration, folder, say)
    found: dict[float, Budgeted] = {}
    for bits in span.sizes:
        try:
            found[bits] = solve(job, groups, int(bits * job.plan.parameters / 8))
        except RecipeError as error:
            say(f"{bits:g} bits per weight: left out: {error}")
    job.source.checkpoint.close()
    formats = {bits: {i.name: str(i.format or "bf16") for i in b.plan.items} for bits, b in found.items()}
    names = list(dict.fromkeys(name for group in groups for name in group.parameters))
    table = _table(names, formats, {bits: b.error for bits, b in found.items()})
    write_whole(folder / "layers.md", table.encode())
    _picture(names, formats, folder / "layers.png")
    return tuple(_write(folder, bits, budget.recipe) for bits, budget in found.items())


def _write(folder: Path, bits: float, recipe: Recipe) -> Path:
    """Named after its content too: rows are kept by name."""
    text = recipe.to_toml()
    path = folder / f"budget-{bits:g}-{sha256(text.encode()).hexdigest()[:8]}.toml"
    write_whole(path, text.encode())
    return path


def _groups(job: Job, calibration: Calibration, folder: Path, say: Callable[[str], None]) -> tuple[Group, ...]:
    """As measured before, or now."""
    ladder = ladder_of(job)
    tokens = job.calibration
    if tokens is None:
        tokenizer = load_tokenizer(str(job.source.checkpoint.folder), trust_remote_code=job.options.trust_remote_code)
        tokens = calibration.tokens(tokenizer, maximum_context(job.source.model.config))
    key = sha256(json.dumps([job.fingerprint, ladder, tokens.sha256]).encode()).hexdigest()[:16]
    path = folder / f"sensitivity-{key}.json"
    said = recall(path)
    if said is not None:
        say("sensitivity: measured before")
        return tuple(Group.named(n, {parse_format(f): e for f, e in e.items()}) for n, e in said.items())
    wanted: Mapping[str, tuple[Format, ...]] = free_formats(job, ladder)
    say(f"sensitivity: {len(wanted)} matrices in up to {len(ladder)} formats")
    groups = measured(job, tokens.tokens, wanted)
    keep(path, {g.name: {str(f): e for f, e in g.errors.items()} for g in groups})
    return groups


def _table(names: Sequence[str], formats: Mapping[float, Mapping[str, str]], errors: Mapping[float, float]) -> str:
    """The format of each matrix at each size, and the divergence that is expected."""
    rows = [["matrix", *(f"{bits:g} bits" for bits in formats)], ["---", *("---" for _ in formats)]]
    rows += [[name, *(chosen[name] for chosen in formats.values())] for name in names]
    rows.append(["expected KL", *(f"{errors[bits]:.4g}" for bits in formats)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _bits(format: Format) -> int:
    """Bits of the codes; where rows lie in bands, of the most."""
    bands = bands_of(format)
    return format.bits if bands is None else bands.parts[-1][0].bits


def _picture(names: Sequence[str], formats: Mapping[float, Mapping[str, str]], path: Path) -> None:
    """Bits of codes by matrix and size; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not formats:
        return
    bits = [[_bits(parse_format(chosen[name])) for chosen in formats.values()] for name in names]
    figure = Figure(figsize=(2 + 0.5 * len(formats), 1.5 + 0.13 * len(names)), layout="constrained")
    axes: Any = figure.add_subplot()
    shown = axes.imshow(bits, aspect="auto", cmap="viridis", vmin=1, vmax=8, interpolation="nearest")
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=5)
    axes.set_xticks(range(len(formats)), [f"{size:g}" for size in formats])
    axes.set(xlabel="bits per weight of the whole model", title="bits of each matrix")
    figure.colorbar(shown, ax=axes, label="bits")
    figure.savefig(path, dpi=120)
