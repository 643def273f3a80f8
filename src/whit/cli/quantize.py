"""`whit quantize`: the main job."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from whit.activations import EXAMPLES as ACTIVATION_EXAMPLES
from whit.checkpoint.hub import at_revision
from whit.cli.budget import (
    FitInto,
    Ladder,
    Request,
    SaveRecipe,
    SensitivityOption,
    TargetBpw,
    TargetSize,
    budget_recipe,
    check_result,
    keep_all,
    save_recipe,
    show_outlook,
)
from whit.cli.gate import MaxIncrease, MaxKL, build_gate, measure
from whit.cli.options import (
    CALIBRATION_HELP,
    DEFAULT_FORMAT_HELP,
    FORMAT_HELP,
    MODEL_HELP,
    OUT_HELP,
    RULE_HELP,
    SHIPPED,
    AsJson,
    Device,
    DryRun,
    Export,
    InputMemory,
    Restart,
    Revision,
    Samples,
    Seed,
    Threads,
    TrustRemoteCode,
    build_calibration,
    input_bytes,
    parse_rules,
)
from whit.cli.runs import run_and_show, show_plan
from whit.export import kind_of
from whit.methods import GPTQ
from whit.pipeline.importance import weighed
from whit.pipeline.job import Options, prepare
from whit.recipe import Recipe
from whit.transforms import TRANSFORMS

CONTEXT_HELP = "Tokens in each; with --fit, tokens that the model will run with. \\[default: 2048, or the model's]"
ACTIVATIONS_HELP = "Also quantize the inputs of linears, while the model runs: " + ", ".join(ACTIVATION_EXAMPLES) + "."
GATE_HELP = "Text on which --max-kl and --max-ppl-increase are measured. \\[default: whit:heldout]"
METHOD_HELP = (
    "How codes are chosen. Without data: rtn rounds to nearest; clip, in the range that fits best; hqq, with the zero "
    "points that fit best. With a calibration text: gptq goes column by column, each making up for the error of those "
    "before; refine and blocks train block by block; awq is clip after the transform awq; smoothquant is rtn after the "
    "transform smoothquant, with int8 weights and activations; awq+gptq names both. Options of a method are fields in "
    "a --recipe, for example of gptq: " + ", ".join(field.name for field in fields(GPTQ)) + ". "
    "\\[default: rtn]"
)
LOW_RANK_HELP = "Repair every linear by two bfloat16 factors of rank R beside its codes; the same as SPEC+rR."
TRANSFORM_HELP = "Rescale the weights first: " + ", ".join(t.name for t in TRANSFORMS) + "."


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=OUT_HELP)],
    method: Annotated[str | None, typer.Option(help=METHOD_HELP)] = None,
    transform: Annotated[str | None, typer.Option(help=TRANSFORM_HELP)] = None,
    format: Annotated[
        str | None, typer.Option(metavar="SPEC", help=f"{FORMAT_HELP} \\[default: {DEFAULT_FORMAT_HELP}]")
    ] = None,
    activations: Annotated[str | None, typer.Option(metavar="SPEC", help=ACTIVATIONS_HELP)] = None,
    rule: Annotated[list[str] | None, typer.Option(metavar="GLOB=SPEC", help=RULE_HELP)] = None,
    low_rank: Annotated[int | None, typer.Option(min=1, metavar="R", help=LOW_RANK_HELP)] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file, as --save-recipe writes it.")] = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    fit: FitInto = None,
    ladder: Ladder = None,
    sensitivity: SensitivityOption = None,
    save_recipe_to: SaveRecipe = None,
    calibration: Annotated[str | None, typer.Option(metavar="FILE|whit:text", help=CALIBRATION_HELP + SHIPPED)] = None,
    samples: Samples = None,
    context: Annotated[int | None, typer.Option(min=2, help=CONTEXT_HELP)] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Weight the columns by llama.cpp's importance matrix.")] = None,
    input_memory: InputMemory = None,
    seed: Seed = 0,
    export: Export = None,
    device: Device = "auto",
    threads: Threads = None,
    max_kl: MaxKL = None,
    max_ppl_increase: MaxIncrease = None,
    gate_text: Annotated[str | None, typer.Option(metavar="FILE", help=GATE_HELP)] = None,
    gate_tokens: Annotated[int | None, typer.Option(min=2, help="Measure on the first N tokens of that text.")] = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    model = at_revision(model, revision)
    if threads is not None:
        torch.set_num_threads(threads)
    options = Options(seed, device, restart, trust_remote_code, input_memory=input_bytes(input_memory))
    export = export or kind_of(out)
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
        if dry_run and save_recipe_to is None:
            show_outlook(undecided, request, as_json)
            return
        if not dry_run:
            check_result(undecided)
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


def build_recipe(
    method: str | None, format: str | None, rules: list[str] | None, path: Path | None, transform: str | None = None
) -> Recipe:
    """The recipe of a command line; --rule adds to the rules of --recipe and --format."""
    more = parse_rules(rules)
    if path is None:
        start = Recipe(method, None if format is None else [("*", format)], transform)
        return start.with_rules([*start.rules, *more], start.mix)  # a usual format stays the first of them
    if method is not None or format is not None or transform is not None:
        raise typer.BadParameter(
            "holds method, transform and formats itself; drop --method, --transform and --format", param_hint="--recipe"
        )
    loaded = Recipe.load(path)
    return loaded.with_rules([*loaded.rules, *more], loaded.mix)
