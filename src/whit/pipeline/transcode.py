"""From one kind of quantized file to another: codes and params are carried over where the other kind can say them.

Carried over, exactly: all codes; scales in another type where that rounds none of them; symmetric codes as asymmetric
ones whose zero point is in the middle; how inputs are quantized as they come. What is left of the weights needs
`requantize`, which rounds the dequantized ones again; how inputs are quantized otherwise is left behind, and said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from whit.activations import Activations
from whit.checkpoint.files import check_side_files
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.places import check_out
from whit.errors import CheckpointError, FormatError, RecipeError
from whit.export import Exporter, exporter_named
from whit.formats import parse_format
from whit.formats.act_order import ActOrder
from whit.formats.affine import Affine
from whit.formats.numeric import dtype_name
from whit.layouts.affine import as_affine, middle, with_scales
from whit.model.targets import Target, find_targets
from whit.pipeline.job import Job, Options, open_source, prepare
from whit.pipeline.plan import plan_quantization
from whit.pipeline.sources import Coded
from whit.recipe import Recipe
from whit.spoken import by_reason
from whit.tensor import Format, QuantizedTensor, tensor_param

PLAIN_GGML = {4: "q4_0", 5: "q5_0", 8: "q8_0"}
HELP = "nothing holds these numbers without loss; add --requantize --format SPEC to round them again"


def prepare_transcode(
    model: str | Path,
    out: str | Path,
    export: str,
    options: Options,
    recipe: Recipe | None = None,
    requantize: bool = False,
) -> Job:
    """Plan a file of kind `export` from a quantized MODEL; a `recipe` says which formats are wanted instead.

    RecipeError lists everything that cannot be carried over without loss, unless `requantize` allows it.
    A MODEL that is not quantized needs a recipe, but for GGUF, a container of its own: its floats go there as they are.
    """
    folder, kind = resolve_model(model, options.trust_remote_code), exporter_named(export)
    check_out(Path(out), folder, kind.suffix)
    source = open_source(folder, options.trust_remote_code)
    wanted = f"a {export} file needs a format; add --format, say {kind.example}"
    if not isinstance(source, Coded):
        if recipe is None and not kind.suffix:
            raise RecipeError(f"{model}: not quantized; {wanted}")
        return prepare(model, out, recipe or Recipe(rules=[("*", "bf16")]), options, export=export)
    check_side_files(source.checkpoint.folder, options.trust_remote_code)
    exporter = kind(source.model, source.checkpoint.folder)
    targets = [target for target in find_targets(source.model) if target.parameter in source.origins]
    chosen, exact, lost = _routes(source, exporter, targets, recipe, requantize)
    if lost:
        raise RecipeError("\n".join(lost))
    if not chosen:
        raise RecipeError(f"{model}: nothing of it is quantized; {wanted}")
    rules, notes = with_inputs(Recipe("rtn", rules_for(targets, chosen)), source, exporter, chosen)
    plan = plan_quantization(source, rules, exporter, options.shard_size)
    name = folder.resolve().name if Path(model).is_dir() else str(model)
    return Job(name, source, plan, Path(out), rules, options, exporter, exact=exact, requantize=requantize, notes=notes)


def _routes(
    source: Coded, exporter: Exporter, targets: Sequence[Target], recipe: Recipe | None, requantize: bool
) -> tuple[dict[Target, Format], frozenset[str], list[str]]:
    """The format of each target in the new file, the parameters whose codes are carried over, and what cannot be."""
    chosen: dict[Target, Format] = {}
    exact, unsayable, lost = set(), dict[Target, Format](), list[tuple[str, str]]()
    for target in targets:
        stored, note = source.format(target.parameter), source.note(target.parameter)
        wanted = recipe.format_for(target.holder, target.kept_by_default) if recipe is not None else None
        wanted = exporter.fitted(wanted) if wanted is not None else None
        if recipe is None and stored is None and note is None:
            continue  # 16 bits here and there
        same = [f for f in variants(stored) if recipe is None or f == wanted] if stored is not None else []
        route = next((f for f in same if not exporter.problems({target: f})), None)
        if route is not None:
            chosen[target] = route
            exact.add(target.parameter)
        elif requantize and recipe is not None:
            if wanted is not None:
                chosen[target] = wanted
        elif note is not None:
            lost.append((target.holder, f"{note}; {HELP}"))
        elif stored is not None and recipe is None:
            unsayable[target] = stored
        elif stored is not None or wanted is not None:
            lost.append((target.holder, f"{stored or '16 bits'} to {wanted or '16 bits'}; {HELP}"))
    refused = exporter.problems(unsayable) if unsayable else []
    return chosen, frozenset(exact), [*by_reason(lost), *(f"{problem}; {HELP}" for problem in refused)]


def with_inputs(
    recipe: Recipe, source: Coded, exporter: Exporter, chosen: Mapping[Target, Format]
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with what the source says of its linears' inputs, where the new file can say it; the rest is noted."""
    carried, left = dict[str, Activations](), dict[str, str]()
    for target, format in chosen.items():
        try:
            found = source.input_rounding(target.parameter)
        except CheckpointError as error:
            left["of this file"] = str(error)
            continue
        if found is None:
            continue
        how = found[0]
        reason = "their scales came from calibration; quantize the model itself again to have them"
        reason = reason if how.needs_stats else exporter.refuses(how) or ""
        if not reason and not how.fits(format):
            reason = f"the new file has {format}"
        if reason:
            left[str(how)] = reason
        else:
            carried[target.holder] = how
    notes = tuple(f"activations {how} are left behind: {why}" for how, why in left.items())
    if not carried:
        return recipe, notes
    common = recipe.changed(activations=Counter(carried.values()).most_common(1)[0][0])
    if all(common.activations_for(t.holder, t.kind, f) == carried.get(t.holder) for t, f in chosen.items()):
        return common, notes
    return recipe.changed(activation_rules=tuple(carried.items())), notes


def variants(format: Format) -> tuple[Format, ...]:
    """The format itself, then others that may hold its numbers exactly."""
    if isinstance(format, ActOrder):
        return tuple(ActOrder(f) for f in variants(format.integers) if isinstance(f, Affine))
    affine = as_affine(format)
    if affine is None:
        bits = next((bits for bits, name in PLAIN_GGML.items() if name == str(format)), 0)
        return (format, *(Affine(bits, 32, scale_type=kind) for kind in ("f16", "f32", "bf16"))) if bits else (format,)
    kinds = dict.fromkeys((affine.scale_type, "bf16", "f16", "f32"))
    same = [with_scales(affine, kind) for kind in kinds]
    if not affine.symmetric or affine.bits == 1:
        return tuple(same)
    ggml = [parse_format(PLAIN_GGML[affine.bits])] if affine.bits in PLAIN_GGML and affine.group_size % 32 == 0 else []
    return (*same, *(Affine(affine.bits, affine.group_size, False, scale_type=kind) for kind in kinds), *ggml)


def recast(value: QuantizedTensor, format: Format, where: str) -> QuantizedTensor:
    """The same numbers in one of the `variants` of their format. FormatError where a scale would be rounded."""
    if value.format == format:
        return value
    if isinstance(value.format, ActOrder) and isinstance(format, ActOrder):
        params = {name: param for name, param in value.params.items() if name != "group"}
        same = recast(QuantizedTensor(value.format.integers, value.shape, value.codes, params), format.integers, where)
        return QuantizedTensor(format, value.shape, same.codes, {**same.params, "group": value.params["group"]})
    old, new = as_affine(value.format), as_affine(format)
    if old is None:  # ggml's plain types are symmetric integers in groups of 32, the scale called d
        old = Affine(value.format.bits, 32, scale_type="f16")
        value = QuantizedTensor(old, value.shape, value.codes, {"scale": value.params["d"]})
    if new is None:
        wide = tensor_param(recast(value, with_scales(old, "f16"), where).params, "scale")
        repeated = wide.repeat_interleave(value.codes.shape[1] // 32 // wide.shape[1], dim=1)
        return QuantizedTensor(format, value.shape, value.codes, {"d": repeated})
    scale = tensor_param(value.params, "scale")
    params = {name: param for name, param in value.params.items() if name != "scale"}
    target = new.param_specs(1, 1)["scale"].dtype
    if not torch.equal(scale.to(target).float(), scale.float()):
        kind = dtype_name(target)
        raise FormatError(f"{where}: a scale has no {kind}, which {format} stores; it must be exact; add --requantize")
    codes = value.codes
    if old.symmetric and not new.symmetric:
        codes = (codes.to(torch.int16) - old.code_min).to(torch.uint8)
        params["zero_point"] = torch.full(scale.shape, middle(old.bits), dtype=torch.uint8)
    return QuantizedTensor(format, value.shape, codes, {"scale": scale.to(target), **params})


def taken_over(job: Job, name: str, format: Format) -> QuantizedTensor | None:
    """A parameter's own codes in a format, where the plan says so; None where it is to be quantized."""
    if name not in job.exact or not isinstance(job.source, Coded):
        return None
    try:
        return recast(job.source.quantized(name), format, name)
    except FormatError:
        if not job.requantize:
            raise
        return None


def rules_for(targets: Sequence[Target], formats: Mapping[Target, Format]) -> list[tuple[str, Format | str]]:
    """Rules that give every target its format: the commonest by `*`, the others by name."""
    common = Counter(formats.values()).most_common(1)[0][0]
    rules: list[tuple[str, Format | str]] = [("*", common)]
    for target in targets:
        format = formats.get(target)
        if format is None and not target.kept_by_default:
            rules.append((target.holder, "bf16"))
        elif format is not None and (format != common or target.kept_by_default):
            rules.append((target.holder, format))
    return rules
