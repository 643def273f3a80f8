"""`whit quantize --target-size`, `--target-bpw`, `--fit`: formats are chosen here, and the result is a usual recipe."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from math import inf
from pathlib import Path
from typing import Annotated, TypeAlias, get_args

import typer

from whit.allocation import LADDER, Budgeted, Measure, budgeted, foresee, ladder_of
from whit.calibration import Calibration, CalibrationTokens
from whit.checkpoint.files import write_whole
from whit.checkpoint.work import is_done, recorded_fingerprint
from whit.cli.console import console, on_screen, print_json, say
from whit.cli.shown import parse_size, progress
from whit.errors import OutputError, RecipeError
from whit.formats import parse_format
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.memory import Need, Planner, Situation, find_subject
from whit.pipeline.coverage import load_account
from whit.pipeline.job import Job
from whit.recipe import Recipe, split_list, split_methods
from whit.spoken import size

KEEP = ("*", "bf16")
DEFAULT_CONTEXT = 2048
CLIPPED = 4  # bits of the formats whose ranges are worth a search: of more, the best range is nearly all there is
DEFAULT: Measure = "probe"
UNITS = {"kl": "nats per token", "probe": "nats per token", "hessian": "shares of blocks' outputs"}

TargetBpw: TypeAlias = Annotated[
    float | None, typer.Option(metavar="BITS", min=0.0, help="Choose formats: at most so many bits per weight overall.")
]
TargetSize: TypeAlias = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Choose formats: weight files of at most 4GB, 700MiB ...")
]
FitInto: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        help="Choose formats: the model runs within this memory, such as 8GB, at --context tokens with their cache.",
    ),
]
Ladder: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC,METHOD:SPEC...",
        help="Formats to choose from, each with --method or with a method of its own; bf16 keeps a matrix as it is. "
        f"\\[default: what the kind of file holds, such as {','.join(LADDER)}]",
    ),
]
# kl: one run of the model per matrix and format; probe: two per matrix; hessian: one calibration pass
Sensitivity = Enum("Sensitivity", {name: name for name in get_args(Measure)}, type=str)  # type: ignore[misc]
SensitivityOption: TypeAlias = Annotated[
    Sensitivity | None,
    typer.Option("--sensitivity", help="How the harm of a format is measured; kl is the slowest. \\[default: probe]"),
]
SaveRecipe: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe",
        metavar="FILE.toml",
        help="Write the recipe of this run; --recipe FILE.toml repeats it. With --dry-run and a size, formats are "
        "measured and chosen for it.",
    ),
]


@dataclass(frozen=True)
class Request:
    """What a user asks of a budget: one of three sizes, and how it is to be met. `context` belongs to `fit`.

    `any_method`: none was named, and rounding to nearest need not be the one.
    """

    bpw: float | None = None
    size: str | None = None
    fit: str | None = None
    context: int | None = None
    ladder: str | None = None
    sensitivity: Measure | None = None
    any_method: bool = False

    def wanted(self, taken: bool) -> bool:
        """Whether a size was asked for; refuses what contradicts it (`taken`: --format or --recipe is given)."""
        sizes = {"--target-bpw": self.bpw, "--target-size": self.size, "--fit": self.fit}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise typer.BadParameter(f"{given[1]} says the size too; drop one of them", param_hint=given[0])
        if given and taken:
            raise typer.BadParameter(
                "chooses the formats itself; drop --format, --recipe, --low-rank and --imatrix", param_hint=given[0]
            )
        if not given and (self.ladder is not None or self.sensitivity is not None):
            name = "--ladder" if self.ladder is not None else "--sensitivity"
            raise typer.BadParameter("only a size needs it; add --target-size or --target-bpw", param_hint=name)
        if self.bpw is not None and not 0 < self.bpw < inf:
            raise typer.BadParameter(f"{self.bpw:g}: must be a number above 0, such as 3.5", param_hint="--target-bpw")
        for asked in filter(None, (self.size, self.fit)):
            parse_size(asked)  # what is wrong with it is said before the model is measured
        return bool(given)

    def bytes(self, job: Job) -> int:
        """Of the weight files, at most."""
        if self.fit is not None:
            return self._fitting(job)
        return parse_size(self.size) if self.size is not None else int((self.bpw or 0.0) * job.plan.parameters / 8)

    def _fitting(self, job: Job) -> int:
        """What is left for weights beside the cache, the activations, the kernels' workspace and the process."""
        total = parse_size(self.fit or "")
        context = self.context or maximum_context(job.source.model.config) or DEFAULT_CONTEXT
        subject = find_subject(str(job.source.checkpoint.folder), job.options.trust_remote_code)
        planner = Planner(subject, Situation(context, device=job.device.type))
        formats = tuple(str(rule[1]) for rule in split_methods([("*", entry) for entry in self.formats(job)])[0])
        need = max(_needs(planner, formats), key=lambda row: row.total_bytes - row.weights_bytes)
        left = total - (need.total_bytes - need.weights_bytes)
        parts = (
            f"cache of {context:,} tokens {size(need.kv_cache_bytes)}, activations {size(need.activations_bytes)}, "
            f"overhead {size(need.overhead_bytes)}"
        )
        if left <= 0:
            raise RecipeError(
                f"--fit {self.fit}: {parts}; that leaves nothing for the weights; ask for a smaller context"
            )
        say(f"{size(total)}: {parts}; weights {size(left)}")
        return left

    def formats(self, job: Job) -> tuple[str, ...]:
        """The formats to choose from, with the methods to try; where the user names neither, clipping too."""
        ladder = tuple(split_list(self.ladder)) if self.ladder else ladder_of(job)
        if self.ladder or not self.any_method:
            return ladder
        parsed = {entry: parse_format(entry) for entry in ladder}
        return (*ladder, *(f"clip:{entry}" for entry, f in parsed.items() if f.bits <= CLIPPED and not f.searches))


def _needs(planner: Planner, formats: tuple[str, ...]) -> list[Need]:
    """What the model needs in each format that fits all its matrices; in the usual ones where none does."""
    found = []
    for format in formats:
        with suppress(RecipeError):  # a choice for some of the matrices
            found += planner.rows((format,))
    return found or planner.rows(())


def keep_all(method: str | None, rules: list[tuple[str, str]], transform: str | None) -> Recipe:
    """The recipe from which a budget starts: the user's own rules, all else undecided."""
    return Recipe(method, [KEEP, *rules], transform)


def check_result(job: Job) -> None:
    """OutputError where OUT holds what was not made for a size: said before the model is measured, for minutes."""
    found = recorded_fingerprint(job.out)
    budgeted_before = found is not None and load_account(job.out).budget is not None
    is_done(job.out, str(found) if budgeted_before else job.fingerprint, job.options.restart)


def choose(job: Job, request: Request, tokens: CalibrationTokens) -> Budgeted:
    """The recipe for the size that was asked for, said in a line."""
    wanted = request.bytes(job)
    measure = request.sensitivity or DEFAULT
    notes = console()
    with progress(notes) as step:
        shown = replace(job, options=replace(job.options, progress=step))
        found = budgeted(shown, wanted, tokens, request.formats(job), measure)
    chosen = ((item.method, item.format) for item in found.plan.items if item.format is not None)
    counts = Counter(f"{method.name}:{format}" if method else str(format) for method, format in chosen)
    said = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    say(
        f"chosen: {size(found.plan.size_bytes)} of {size(wanted)}, {found.plan.bits_per_weight:.3f} bits per weight: "
        f"{said}; expected error {found.error:.4g} {UNITS[measure]}",
        notes,
    )
    return found


def budget_recipe(
    job: Job, calibration: Calibration | None, request: Request
) -> tuple[Recipe, dict[str, float | int | str]]:
    """What `choose` finds for a job prepared with `keep_all`, and how; the model is run over the calibration text."""
    tokens = job.calibration
    if tokens is None:
        folder = str(job.source.checkpoint.folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=job.options.trust_remote_code)
        text = calibration or Calibration(seed=job.options.seed)
        tokens = text.tokens(tokenizer, maximum_context(job.source.model.config))
    found = choose(job, request, tokens)
    job.source.checkpoint.close()
    measure = request.sensitivity or DEFAULT
    expected = float(f"{found.error:.5g}")
    return found.recipe, {"sensitivity": measure, "expected": expected, "unit": UNITS[measure]}


def show_outlook(job: Job, request: Request, as_json: bool) -> None:
    """Between which files a size lies and what choosing takes; nothing is measured."""
    measure = request.sensitivity or DEFAULT
    formats = request.formats(job)
    found = foresee(job, request.bytes(job), formats, measure)
    job.source.checkpoint.close()
    if as_json:
        print_json({"outlook": asdict(found), "sensitivity": measure, "ladder": formats})
        return
    screen, bits = on_screen(), 8 / max(job.plan.parameters, 1)
    sizes = {"at most": found.limit_bytes, "smallest": found.smallest_bytes, "largest": found.largest_bytes}
    for name, count in sizes.items():
        say(f"{name:<9}{size(count)}, {bits * count:.3f} bits per weight", screen)
    say(f"formats  {', '.join(formats)}", screen)
    runs = f"at most {found.runs:,} runs of the model over {found.tokens:,} tokens, each from a matrix's block on"
    takes = "one run over the calibration text" if measure == "hessian" else runs
    say(
        f"choosing for {found.matrices} matrices takes {takes}; --save-recipe FILE.toml does it, without a model",
        screen,
    )


def save_recipe(recipe: Recipe, path: Path | None) -> None:
    """Into a new file, or over the very same recipe."""
    if path is None:
        return
    content = recipe.to_toml().encode()
    if path.exists() and path.read_bytes() != content:
        raise OutputError(f"{path}: exists; a recipe goes into a new file; choose another name")
    write_whole(path, content)
