"""`whit quantize`: the main job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from rich.console import Console
from rich.table import Table

from whit.activations import EXAMPLES as ACTIVATION_EXAMPLES
from whit.activations import SCHEMES
from whit.calibration import Calibration
from whit.calibration.storage import INPUT_MEMORY
from whit.cli.budget import (
    FitInto,
    Ladder,
    Request,
    SaveRecipe,
    SensitivityOption,
    TargetBpw,
    TargetSize,
    budget_recipe,
    keep_all,
    save_recipe,
)
from whit.cli.console import console, print_json
from whit.cli.gate import MaxIncrease, MaxKL, build_gate, measure
from whit.cli.shown import parse_size, pattern, progress, reasons, show_totals, size
from whit.coverage import Account
from whit.estimate import Estimate, estimate
from whit.export import EXPORTERS
from whit.formats import EXAMPLES
from whit.importance import weighed
from whit.job import Job, Options, prepare
from whit.methods import METHODS
from whit.parameter import entry_of
from whit.pipeline import run
from whit.recipe import Recipe
from whit.transforms import TRANSFORMS

CALIBRATION_HELP = "Text or .jsonl file for methods that need data. [default: whit:text]"
CONTEXT_HELP = "Tokens in each; with --fit, those that the model is to run with. [default: 2048, or the model's]"
DEFAULT_FORMAT = "int4-g128"
FORMAT_HELP = (
    "Format of every linear: " + ", ".join(EXAMPLES) + "; with activations: " + ", ".join(SCHEMES) + ". "
    f"[default: {DEFAULT_FORMAT}]"
)
ACTIVATIONS_HELP = (
    "Quantize what linears are given as well, while the model runs: " + ", ".join(ACTIVATION_EXAMPLES) + "."
)
GATE_HELP = "Text on which --max-kl and --max-ppl-increase are measured. [default: whit:heldout]"
METHOD_HELP = (
    "How codes are chosen: "
    + ", ".join(method.name for method in METHODS)
    + "; awq is clip with the transform awq, smoothquant is "
    "rtn with that transform, int8 and int8 activations. "
    "[default: rtn]"
)
LOW_RANK_HELP = "Repair every linear by two bfloat16 factors of this rank beside its codes; the same as SPEC+rR."
TRANSFORM_HELP = "What the weights are rescaled by first: " + ", ".join(t.name for t in TRANSFORMS) + "."
EXPORT_HELP = "What kind of file is written: " + "; ".join(f"{e.name}: {e.summary}" for e in EXPORTERS) + "."
RULE_HELP = (
    "A format for the modules that a glob matches, such as 'lm_head=int8', '*.0.*=bf16' or, with a method of its own, "
    "'*.down_proj=gptq:int4-g64'; the last match counts. The rows of an embedding or a head may have several, "
    "those used most the first: '*.embed_tokens=bands(q5_k:1024,q2_k)'."
)
InputMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for block inputs while calibrating, such as 24GB; those that take more lie in files beside OUT. "
        f"[default: {INPUT_MEMORY >> 30}GiB]",
    ),
]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id or whit:model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder; it appears when it is complete.")],
    method: Annotated[str | None, typer.Option(help=METHOD_HELP)] = None,
    transform: Annotated[str | None, typer.Option(help=TRANSFORM_HELP)] = None,
    format: Annotated[str | None, typer.Option(metavar="SPEC", help=FORMAT_HELP)] = None,
    activations: Annotated[str | None, typer.Option(metavar="SPEC", help=ACTIVATIONS_HELP)] = None,
    rule: Annotated[list[str] | None, typer.Option(metavar="GLOB=SPEC", help=RULE_HELP)] = None,
    low_rank: Annotated[int | None, typer.Option(min=1, metavar="R", help=LOW_RANK_HELP)] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with method and rules.")] = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    fit: FitInto = None,
    ladder: Ladder = None,
    sensitivity: SensitivityOption = None,
    save_recipe_to: SaveRecipe = None,
    calibration: Annotated[str | None, typer.Option(metavar="FILE|whit:text", help=CALIBRATION_HELP)] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration windows. [default: 128]")] = None,
    context: Annotated[int | None, typer.Option(min=2, help=CONTEXT_HELP)] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Weigh columns by llama.cpp's importance matrix.")] = None,
    input_memory: InputMemory = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    export: Annotated[str, typer.Option(metavar="NAME", help=EXPORT_HELP)] = "whit",
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; no byte depends on them.")] = None,
    max_kl: MaxKL = None,
    max_ppl_increase: MaxIncrease = None,
    gate_text: Annotated[str | None, typer.Option(metavar="FILE", help=GATE_HELP)] = None,
    gate_tokens: Annotated[int | None, typer.Option(min=2, help="Measure on its first N tokens.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again, and replace an older result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Quantize a model, block by block from disk to disk; run it again after a kill and it goes on."""
    if threads is not None:
        torch.set_num_threads(threads)
    options = Options(seed, device, restart, trust_remote_code, input_memory=input_bytes(input_memory))
    gate = build_gate(max_kl, max_ppl_increase, gate_text, gate_tokens)
    text = build_calibration(calibration, samples, context if fit is None else None, seed)
    if imatrix is not None and recipe is None:
        method = method or "clip"
    taken = any(given is not None for given in (format, recipe, imatrix, low_rank))
    how = None if sensitivity is None else sensitivity.value
    request = Request(target_bpw, target_size, fit, context, ladder, how, any_method=method is None)
    if request.wanted(taken):
        if activations is not None:
            raise typer.BadParameter("a size is about weights alone; drop one of them", param_hint="--activations")
        start = keep_all(method, parse_rules(rule), transform)
        used = text if start.needs_stats else None  # by the method; the choice of formats always uses it
        undecided = prepare(model, out, start, options, used, export)
        chosen, found = budget_recipe(undecided, text, request)
        used = text if chosen.needs_text else None
        job = replace(prepare(model, out, chosen, options, used, export), budget=found)
    else:
        wanted = build_recipe(method, format, rule, recipe, transform)
        wanted = wanted if activations is None else wanted.with_activations(activations)
        wanted = wanted if low_rank is None else wanted.with_side_cars(low_rank)
        job = prepare(model, out, wanted, options, text, export)
    if job.recipe is not None:
        save_recipe(job.recipe, save_recipe_to)
    job = job if imatrix is None else weighed(job, imatrix)
    if dry_run:
        show_plan(job, as_json)
    else:
        run_and_show(job, as_json)
        measure(model, out, gate, options, job.budget)


def input_bytes(asked: str | None) -> int:
    """Of --input-memory."""
    return INPUT_MEMORY if asked is None else parse_size(asked)


def build_calibration(text: str | None, samples: int | None, context: int | None, seed: int) -> Calibration | None:
    """The calibration of a command line; None where nothing is said of it."""
    if text is None and samples is None and context is None:
        return None
    return Calibration(text or "whit:text", samples or 128, context, seed)


def build_recipe(
    method: str | None, format: str | None, rules: list[str] | None, path: Path | None, transform: str | None = None
) -> Recipe:
    """The recipe of a command line; --rule adds to the rules of --recipe and --format."""
    more = parse_rules(rules)
    if path is None:
        start = Recipe(method, None if format is None else [("*", format)], transform)
        return start.with_rules([*start.rules, *more], start.mix)
    if method is not None or format is not None or transform is not None:
        raise typer.BadParameter(
            "holds method, transform and formats itself; drop --method, --transform and --format", param_hint="--recipe"
        )
    loaded = Recipe.load(path)
    return loaded.with_rules([*loaded.rules, *more], loaded.mix)


def parse_rules(rules: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of a glob and a format from GLOB=SPEC."""
    found = []
    for rule in rules or ():
        glob, separator, spec = rule.rpartition("=")
        if not (glob and separator and spec):
            raise typer.BadParameter(f"{rule!r}: write GLOB=SPEC, for example 'lm_head=int8'", param_hint="--rule")
        found.append((glob, spec))
    return found


def run_account(job: Job) -> Account:
    """Run with progress; on standard error what a user should know of it."""
    notes = console()
    for note in job.notes:
        notes.print(note, highlight=False, soft_wrap=True)
    for name, reason in job.source.dropped.items():
        notes.print(f"dropped {name}: {reason}", highlight=False, soft_wrap=True)
    if not _is_done(job):
        notes.print(cost(job, estimate(job)), highlight=False, soft_wrap=True)
    with progress(notes) as step:
        return run(replace(job, options=replace(job.options, progress=step)))


def run_and_show(job: Job, as_json: bool) -> Account:
    """Run with progress, then print the account."""
    done_before = _is_done(job)
    account = run_account(job)
    if as_json:
        print_json(account.to_json())
        return account
    screen = Console()
    show_totals(screen, account)
    took = f"{account.seconds:.1f} s, peak memory {size(account.peak_memory_bytes)}"
    if account.decoded is not None:
        screen.print(read_back(account.decoded), highlight=False, soft_wrap=True)
    screen.print(f"{job.out}: {'was done already' if done_before else took}", highlight=False, soft_wrap=True)
    return account


def _is_done(job: Job) -> bool:
    return job.out.exists() and not job.options.restart


def read_back(decoded: Mapping[str, Any]) -> str:
    """What a second decoder made of the file."""
    worst = decoded["largest_error"]
    said = "bit-exact" if worst == 0 else f"not exact, relative error up to {worst:.2g}"
    return f"read back by an independent decoder: {decoded['parameters']} parameters, {said}"


def show_plan(job: Job, as_json: bool) -> None:
    """The plan: formats, size, bits per weight, estimated time, memory and disk."""
    expected = estimate(job)
    entries = [entry_of(item) for item in job.plan.items]
    if as_json:
        parameters = [
            {k: v for k, v in asdict(e).items() if k not in ("relative_error", "proxy_loss")} for e in entries
        ]
        totals = {"bits_per_weight": job.plan.bits_per_weight, "size_bytes": job.plan.size_bytes}
        print_json({**totals, "parameters": parameters, "estimate": asdict(expected)})
        return
    table = Table("modules", "count", "shape", "format", "bits")
    rows: dict[tuple[str, str, str], list[float]] = {}
    for item in job.plan.items:
        if item.target is not None:
            shape = " x ".join(map(str, item.target.shape))
            form = "kept" if item.format is None else str(item.format)
            rows.setdefault((pattern(item.target.holder), shape, form), []).append(item.bits_per_weight)
    for (name, shape, form), bits in rows.items():
        table.add_row(name, str(len(bits)), shape, form, f"{bits[0]:.3f}")
    screen = Console()
    screen.print(table)
    for line in reasons(entries):
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print(cost(job, expected), highlight=False, soft_wrap=True)


def cost(job: Job, expected: Estimate) -> str:
    """What a run is going to take and give, in one line."""
    line = (
        f"{job.plan.bits_per_weight:.3f} bits per weight; {size(job.plan.size_bytes)} on disk; about "
        f"{expected.seconds:.0f} s and {size(expected.memory_bytes)} of memory on {job.device}"
    )
    inputs, most = expected.inputs_bytes, job.options.input_memory
    if not inputs:
        return line
    where = "in memory" if inputs <= most else f"in files until the end, more than --input-memory {size(most)}"
    return f"{line}; {size(inputs)} of block inputs {where}"
