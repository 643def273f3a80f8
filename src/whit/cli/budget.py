"""`whit quantize --target-size`, `--target-bpw`: the formats are chosen here, and the result is an ordinary recipe."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from whit.allocation import LADDER, Budgeted, budgeted
from whit.calibration import Calibration, CalibrationTokens
from whit.cli.console import console
from whit.cli.shown import parse_size, progress, size
from whit.errors import OutputError
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.job import Job
from whit.recipe import Recipe

KEEP = ("*", "bf16")

TargetBpw: TypeAlias = Annotated[
    float | None, typer.Option(metavar="BITS", min=0.0, help="Choose formats: at most so many bits per weight in all.")
]
TargetSize: TypeAlias = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Choose formats: weight files of at most 4GB, 700MiB ...")
]
Ladder: TypeAlias = Annotated[
    str | None, typer.Option(metavar="SPEC,SPEC...", help=f"Formats to choose from. [default: {','.join(LADDER)}]")
]
SaveRecipe: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe", metavar="FILE.toml", help="Write the recipe of this run; --recipe FILE.toml repeats it."
    ),
]


def check_target(bpw: float | None, target: str | None, taken: bool, ladder: str | None) -> bool:
    """Whether a size was asked for; refuses what contradicts it (`taken`: --format or --recipe is given)."""
    wanted = bpw is not None or target is not None
    if bpw is not None and target is not None:
        raise typer.BadParameter("--target-size says the size too; drop one of them", param_hint="--target-bpw")
    if wanted and taken:
        raise typer.BadParameter(
            "chooses the formats itself; drop --format, --recipe and --imatrix", param_hint="--target-size"
        )
    if ladder is not None and not wanted:
        raise typer.BadParameter("only a size needs it; add --target-size or --target-bpw", param_hint="--ladder")
    return wanted


def keep_all(method: str | None, rules: list[tuple[str, str]], transform: str | None) -> Recipe:
    """The recipe from which a budget starts: the user's own rules, all else undecided."""
    return Recipe(method, [KEEP, *rules], transform)


def choose(job: Job, bpw: float | None, target: str | None, ladder: str | None, tokens: CalibrationTokens) -> Budgeted:
    """The recipe for the size that was asked for, said in a line."""
    wanted = parse_size(target) if target is not None else int((bpw or 0.0) * job.plan.parameters / 8)
    notes = console()
    with progress(notes) as step:
        shown = replace(job, options=replace(job.options, progress=step))
        found = budgeted(shown, wanted, tokens, ladder.split(",") if ladder else LADDER)
    counts = Counter(str(format) for format in found.plan.formats.values())
    said = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    notes.print(
        f"chosen: {size(found.plan.size_bytes)} of {size(wanted)}, {found.plan.bits_per_weight:.3f} bits per weight: "
        f"{said}; expected error {found.error:.4g}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return found


def budget_recipe(
    job: Job, calibration: Calibration | None, bpw: float | None, target: str | None, ladder: str | None
) -> Recipe:
    """What `choose` finds for a job prepared with `keep_all`; the model is run over the calibration text once."""
    tokens = job.calibration
    if tokens is None:
        folder = str(job.source.checkpoint.folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=job.options.trust_remote_code)
        text = calibration or Calibration(seed=job.options.seed)
        tokens = text.tokens(tokenizer, maximum_context(job.source.model.config))
    found = choose(job, bpw, target, ladder, tokens)
    job.source.checkpoint.close()
    return found.recipe


def save_recipe(recipe: Recipe, path: Path | None) -> None:
    """Into a new file, or over the very same recipe."""
    if path is None:
        return
    text = recipe.to_toml()
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise OutputError(f"{path}: exists; a recipe goes into a new file; choose another name")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
