"""The ways in which an adapter can go into a model, each a run like any other: planned, streamed, resumed, atomic.

`requantize`: the merged weights in the model's own formats, codes chosen by what the linears see, on the scales that
are there, moved or new (`methods.regrid`), or in another format by GPTQ. `sidecar`: codes as they are, the adapter as
a low-rank side-car beside them, in bfloat16. `bf16`: the merged weights in bfloat16, rounded once, from float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from whit.calibration import Calibration
from whit.checkpoint.files import check_side_files
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.places import RECORD, check_out
from whit.checkpoint.reader import read_json
from whit.checkpoint.writer import file_sha256
from whit.errors import CheckpointError, RecipeError
from whit.export import exporter_named
from whit.merging.source import CodedMerge, MergedSource
from whit.methods import GPTQ
from whit.model.targets import Target
from whit.pipeline import run
from whit.pipeline.coverage import Account
from whit.pipeline.job import Job, Options, calibration_tokens, open_source
from whit.pipeline.plan import plan_dense, plan_quantization
from whit.pipeline.sources import Coded, Source
from whit.pipeline.transcode import rules_for, with_inputs
from whit.recipe import Recipe
from whit.tensor import Format
from whit.training.peft_file import CONFIG, WEIGHTS, Adapter, read_adapter
from whit.training.settings import DEFAULT_INIT

ROUTES = ("requantize", "sidecar", "bf16")


@dataclass(frozen=True)
class Merge:
    """How an adapter is merged.

    - `route`: requantize, sidecar or bf16; None: requantize if the model is quantized or `format` is given, else bf16.
    - `format`: the SPEC of new codes; None: the model's own formats.
    - `source`: the model in full precision, whose weights the adapter is merged into instead of the quantized ones.
    - `calibration`: the text by which codes are chosen. `export`: the kind of file.
    """

    route: str | None = None
    format: str | None = None
    source: str | Path | None = None
    calibration: Calibration | None = None
    export: str = "whit"


def merge(
    model: str | Path, adapter: str | Path, out: str | Path, wanted: Merge | None = None, options: Options | None = None
) -> Account:
    """Merge an adapter's folder into a model and write it to `out`; returns the account, as in its whit.json.

    Raises CheckpointError if the adapter is incomplete or not one of this model, RecipeError if a route does not fit
    the model, and what `whit.quantize` raises.
    """
    return run(prepare_merge(model, adapter, out, wanted or Merge(), options or Options()))


def prepare_merge(model: str | Path, adapter: str | Path, out: str | Path, wanted: Merge, options: Options) -> Job:
    """Check and plan everything; of the weights only the adapter's are read."""
    if wanted.format is not None and _parsed(wanted.format).bits == 16 and wanted.route in (None, "bf16"):
        wanted = replace(wanted, route="bf16", format=None)
    folder, loaded = resolve_model(model, options.trust_remote_code), read_adapter(adapter)
    base = open_source(folder, options.trust_remote_code)
    check_side_files(base.checkpoint.folder, options.trust_remote_code)
    packed = isinstance(base, Coded) and any(base.format(name) is not None for name in base.origins)
    route = wanted.route or ("requantize" if packed or wanted.format else "bf16")
    _check_route(route, wanted, packed, str(model))
    _check_start(loaded, str(wanted.source or model), packed and wanted.source is None)
    weights = base if wanted.source is None else _original(wanted.source, base, options)
    source: Source = MergedSource(base, weights, loaded)
    if route != "bf16" and wanted.format is None:
        assert isinstance(base, Coded)
        source = CodedMerge(base, weights, loaded, route == "sidecar")
    name = f"{Path(model).resolve().name if Path(model).exists() else model} + {loaded.folder.resolve().name}"
    job = _job(name, source, Path(out), route, wanted, options)
    check_out(job.out, folder, job.exporter.suffix)
    check_out(job.out, loaded.folder, job.exporter.suffix, "ADAPTER")
    return replace(job, origin=_origin(loaded, wanted, weights))


def _check_route(route: str, wanted: Merge, packed: bool, model: str) -> None:
    if route not in ROUTES:
        raise RecipeError(f"route {route!r}: not known; it must be one of {', '.join(ROUTES)}; choose one")
    if wanted.format is not None and route != "requantize":
        raise RecipeError(f"route {route}: keeps the codes or has none; --format is for requantize; drop one of them")
    if route == "bf16" and wanted.export not in ("whit", "bf16"):
        raise RecipeError(
            f"route bf16: writes a plain checkpoint, not a {wanted.export} file; drop --export, or the file's ending, "
            "and convert what is written by whit convert"
        )
    if not packed and route == "sidecar":
        raise RecipeError(f"{model}: is not quantized; a side-car goes beside codes; use --route bf16")
    if not packed and route == "requantize" and wanted.format is None:
        raise RecipeError(f"{model}: is not quantized; its grid must be named; add --format, say int4-g128")


def _check_start(adapter: Adapter, weights: str, packed: bool) -> None:
    """RecipeError where the adapter holds what quantization lost, and the weights have not lost it."""
    try:
        tuning = read_json(adapter.folder / RECORD)["tuning"]
    except (CheckpointError, KeyError):  # not one of whit's
        return
    if packed or tuning.get("init", DEFAULT_INIT) == DEFAULT_INIT:
        return
    own = adapter.folder / "base"
    method = tuning.get("method") or "rtn"
    named = str(own) if own.is_dir() else f"the model quantized to {tuning['format']} by {method}"
    raise RecipeError(
        f"{adapter.folder}: began with what quantization lost (init {tuning['init']}), which {weights} still has; it "
        f"must be merged into the weights that it was trained on; name {named}"
    )


def _job(name: str, source: Source, out: Path, route: str, wanted: Merge, options: Options) -> Job:
    if route == "bf16":
        exporter = exporter_named("bf16")(source.model, source.checkpoint.folder)
        return Job(name, source, plan_dense(source, exporter, options.shard_size), out, None, options, exporter)
    exporter = exporter_named(wanted.export)(source.model, source.checkpoint.folder)
    notes: tuple[str, ...] = ()
    if not isinstance(source, CodedMerge):
        recipe = Recipe(GPTQ(), [("*", exporter.fitted(_parsed(wanted.format)))])
        touched: frozenset[str] = frozenset()
        exact = touched
    else:
        chosen = _formats(source)
        touched = frozenset() if source.beside else frozenset(t.parameter for t in chosen) & source.deltas.keys()
        exact = frozenset(t.parameter for t in chosen) - touched
        known = [t for t in source.targets.values() if t.parameter in source.origins]
        recipe = Recipe(GPTQ() if touched else "rtn", rules_for(known, chosen))
        recipe, notes = with_inputs(recipe, source, exporter, chosen)
    plan = plan_quantization(source, recipe, exporter, options.shard_size)
    folder = source.checkpoint.folder
    tokens = calibration_tokens(source, folder, recipe, options, wanted.calibration if recipe.needs_text else None)
    return Job(name, source, plan, out, recipe, options, exporter, tokens, notes, exact=exact, regridded=touched)


def _parsed(format: str | None) -> Format:
    assert format is not None
    return Recipe("rtn", [("*", format)]).rules[0][1]


def _formats(source: CodedMerge) -> Mapping[Target, Format]:
    """The format of everything that stays quantized; CheckpointError where the file's numbers have none."""
    chosen: dict[Target, Format] = {}
    for parameter, target in source.targets.items():
        if parameter not in source.origins:
            continue
        if (format := source.format(parameter)) is not None:
            chosen[target] = format
        elif (note := source.note(parameter)) is not None and parameter not in source.whole:
            raise CheckpointError(f"{target.holder}: {note}; its grid must be known; merge with --format or into bf16")
    return chosen


def _original(source: str | Path, base: Source, options: Options) -> Source:
    """The model in full precision, which must be the one that was quantized."""
    original = open_source(resolve_model(source, options.trust_remote_code), options.trust_remote_code)
    if isinstance(original, Coded):
        raise RecipeError(f"{source}: is quantized; --source must be the model in full precision; name that one")
    quantization = base.config.get("quantization_config") or {}
    if quantization.get("transform"):
        raise RecipeError(
            f"{source}: MODEL's weights were rescaled before they were quantized; --source must have the same basis; "
            "drop --source"
        )
    for name, origin in base.origins.items():
        found = original.origins.get(name)
        if found is None or found.spec.shape != origin.spec.shape:
            has = "has none" if found is None else f"has {list(found.spec.shape)}"
            raise CheckpointError(
                f"{name}: is {list(origin.spec.shape)} in MODEL and {source} {has}; both must be one model; "
                "name the one that was quantized"
            )
    return original


def _origin(adapter: Adapter, wanted: Merge, weights: Source) -> str:
    """What the bytes depend on beside MODEL and the plan."""
    parts = [file_sha256(adapter.folder / name) for name in (CONFIG, WEIGHTS)]
    if wanted.source is not None:
        parts += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in weights.checkpoint.shards]
    return sha256("\n".join([*parts, str(wanted.route)]).encode()).hexdigest()
