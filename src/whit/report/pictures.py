"""What the pictures show, measured on a model: its weights, its activations, its layers, its memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import whit
from whit.calibration import Calibration
from whit.capabilities import code_count
from whit.checkpoint.files import write_whole
from whit.checkpoint.places import check_place, make_folder
from whit.checkpoint.reader import read_config
from whit.errors import CheckpointError, WhitError
from whit.integrations.loading import load_causal_lm, load_tokenizer, maximum_context, model_files
from whit.memory import Planner, Situation, find_subject
from whit.memory.needs import Weights
from whit.model.targets import Target, find_targets
from whit.pipeline.coverage import load_account
from whit.pipeline.job import open_source
from whit.pipeline.sources import Source
from whit.report import figures
from whit.report.front import measured
from whit.report.layers import Grid, grid
from whit.report.runs import Comparison
from whit.tensor import QuantizedTensor, matrix_shape

SHOWN = ("int8", "int4-g64", "nf4")  # of the histogram
BITS = (2, 3, 4, 6, 8)
STORED = 32  # columns of a stored matrix that are sure to share a group
SOME = 1 << 20  # weights that a histogram is drawn of
FAMILIES = {
    "symmetric, per row": "int{}-channel",
    "asymmetric, per row": "int{}-channel-asym",
    "symmetric, groups of 64": "int{}-g64",
    "asymmetric, groups of 64": "int{}-g64-asym",
}


def draw_comparison(found: Comparison) -> dict[str, bytes]:
    """All pictures of a comparison, as PNG by title."""
    rows = found.rows
    drawn: dict[str, Figure] = {}
    if measured(rows):
        drawn["pareto"] = figures.pareto(rows)
    if any("decode" in row for row in rows):
        drawn["speed"] = figures.speed(rows, found.machine.get("read_bandwidth"))
    worst: tuple[str, Grid] | None = None
    for row in rows:
        made = grid(row.get("layers") or ())
        if made is not None and (worst is None or made.most > worst[1].most):
            worst = row["candidate"], made
    if worst is not None:
        drawn["layers"] = figures.layers(*worst)
    drawn |= _of_model(found.model, found.settings.evaluation.trust_remote_code)
    return {title: figures.png(figure) for title, figure in drawn.items()}


def draw_checkpoint(model: str, folder: Path, out: Path) -> list[Path]:
    """The pictures that one checkpoint has, as PNG files in `out`; returns them."""
    check_place(out)
    drawn = _of_model(model, False)
    if (folder / "whit.json").is_file():
        account = load_account(folder)
        entries = [{"name": e.name, "relative_error": e.relative_error} for e in account.parameters if e.format]
        if (made := grid(entries)) is not None:
            drawn["layers"] = figures.layers(folder.name, made)
    make_folder(out, out)
    files = []
    for title, figure in drawn.items():
        files.append(out / f"{title}.png")
        write_whole(files[-1], figures.png(figure))
    return files


def _of_model(model: str, trust_remote_code: bool) -> dict[str, Figure]:
    """The pictures of a model's own weights, activations and memory; those that it cannot have are left out."""
    drawn: dict[str, Figure] = {}
    files = model_files(model)
    if files.is_dir():
        drawn |= _of_weights(files, trust_remote_code)
        drawn["memory"] = _memory(model)
    with suppress(WhitError):  # no tokenizer, or no causal language model: nothing to run
        drawn["outliers"] = figures.outliers(channel_maxima(model))
    return drawn


def _of_weights(folder: Path, trust_remote_code: bool) -> dict[str, Figure]:
    """Histogram and errors of a plain model; of one that whit quantized the histogram of what is stored."""
    quantization = read_config(folder).get("quantization_config")
    try:
        source = open_source(folder, trust_remote_code)
    except CheckpointError:  # codes of a library whose files are not read here
        return {}
    try:
        target = middle(source)
        if target is None:
            return {}
        weight = _matrix(source, target)
    finally:
        source.checkpoint.close()
    if quantization is not None:
        stored = {"as stored": (weight.flatten().numpy(), np.unique(weight[0, :STORED].numpy()))}
        return {"histogram": figures.histogram(target.holder, None, stored)}
    return {
        "histogram": figures.histogram(target.holder, *_histogram(weight)),
        "error_bits": figures.error_against_bits(target.holder, errors(weight)),
    }


def middle(source: Source) -> Target | None:
    """A linear in the middle of the model."""
    linears = [t for t in find_targets(source.model) if t.kind == "linear" and not t.kept_by_default]
    here = [t for t in linears if t.parameter in source.origins]
    return here[len(here) // 2] if here else None


def _matrix(source: Source, target: Target) -> Tensor:
    weight = source.read(target.parameter).float()
    matrix = weight.reshape(matrix_shape(tuple(weight.shape)))
    return matrix[: max(SOME // matrix.shape[1], 1)]


def _histogram(weight: Tensor) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    found = {}
    for spec in _fitting(SHOWN, weight):
        quantized = whit.quantize_tensor(weight, spec)
        found[spec] = (quantized.dequantize().flatten().numpy(), levels(quantized))
    return weight.flatten().numpy(), found


def _fitting(specs: tuple[str, ...], weight: Tensor) -> list[str]:
    sizes = {spec: whit.parse_format(spec).group_size for spec in specs}
    return [spec for spec, size in sizes.items() if not size or weight.shape[1] % size == 0]


def levels(quantized: QuantizedTensor) -> np.ndarray:
    """Every value that the group with the largest weight can take, found by decoding every code there."""
    format, values = quantized.format, quantized.dequantize()
    row = int(values.abs().max(dim=1).values.argmax())
    column = int(values[row].abs().argmax())
    found = []
    for code in range(format.code_min, format.code_min + code_count(format)):
        codes = quantized.codes.clone()
        codes[row, column] = code
        found.append(float(format.decode(codes, quantized.params)[row, column]))
    return np.array(sorted(set(found)))


def errors(weight: Tensor) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Family of formats to bits to (MAE, RMSE, SQNR in dB)."""
    found = {name: _errors(weight, {b: form.format(b) for b in BITS}) for name, form in FAMILIES.items()}
    found["NormalFloat, groups of 64"] = _errors(weight, {b: normal_float(b) for b in BITS})
    return {name: points for name, points in found.items() if points}


def _errors(weight: Tensor, specs: Mapping[int, str]) -> dict[int, tuple[float, float, float]]:
    points = {}
    for bits, spec in specs.items():
        if _fitting((spec,), weight):
            found = whit.error(weight, whit.quantize_tensor(weight, spec))
            points[bits] = (found.mae, found.mse**0.5, found.sqnr_db)
    return points


def normal_float(bits: int) -> str:
    """The format of NF-k: `normal_levels` in groups of 64."""
    if bits == 4:
        return "nf4"
    return "codebook(" + ",".join(f"{value:.6g}" for value in normal_levels(bits)) + ")-g64"


def normal_levels(bits: int) -> list[float]:
    """Levels as QLoRA makes NF4's: quantiles of a normal distribution, 0 among them, one more above than below it."""
    half = 1 << (bits - 1)
    edge = 1 - 0.5 * (1 / (4 * half) + 1 / (2 * (2 * half - 1)))

    def quantiles(count: int) -> Tensor:
        found: Tensor = torch.special.ndtri(torch.linspace(0.5, edge, count, dtype=torch.float64))
        return found[1:]

    table = torch.cat([-quantiles(half), torch.zeros(1, dtype=torch.float64), quantiles(half + 1)])
    levels: list[float] = (table / table.abs().max()).sort().values.tolist()
    return levels


def channel_maxima(model: str, tokens: int = 256) -> dict[str, np.ndarray]:
    """Largest |input| per channel of one attention and one MLP linear in the middle, over some calibration text."""
    tokenizer = load_tokenizer(model)
    network = load_causal_lm(model, device="cpu")
    limit = maximum_context(network.config) or tokens
    ids = Calibration(samples=1, context=min(tokens, limit)).tokens(tokenizer).tokens
    seen: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[name] = inputs[0].detach().float().abs().flatten(0, -2).amax(dim=0)

        return hook

    for name in _watched(network):
        hooks.append(network.get_submodule(name).register_forward_pre_hook(watch(name)))
    try:
        with torch.inference_mode():
            network(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: values.numpy() for name, values in seen.items()}


def _watched(network: nn.Module) -> list[str]:
    """The first linear of the middle block, and its last."""
    linears = [
        n for n, m in network.named_modules() if isinstance(m, nn.Linear) and any(p.isdigit() for p in n.split("."))
    ]
    blocks: dict[str, list[str]] = {}
    for name in linears:
        parts = name.split(".")
        place = next(i for i, part in enumerate(parts) if part.isdigit())
        blocks.setdefault(".".join(parts[: place + 1]), []).append(name)
    if not blocks:
        return linears[:1]
    chosen = list(blocks.values())[len(blocks) // 2]
    return list(dict.fromkeys([chosen[0], chosen[-1]]))


def _memory(model: str) -> Figure:
    """Generating with the weights as they are, and training all of them in bf16, checkpointed."""
    subject = find_subject(model)
    planner = Planner(subject, Situation(context=1))
    weights = planner.stored() or planner.weights("bf16")
    stacks = {f"generating, {weights.format}": _stack(planner, weights, None)}
    with suppress(WhitError):  # packed weights are not trained
        training = Planner(subject, Situation(context=1, train="full"))
        stacks["training all weights, bf16"] = _stack(training, training.weights("bf16"), True)
    return figures.memory(Path(subject.name).name, stacks)


def _stack(planner: Planner, weights: Weights, checkpointing: bool | None) -> tuple[list[int], dict[str, list[float]]]:
    most = getattr(planner.subject.config, "max_position_embeddings", None) or 8192
    contexts = [max(most * step // 16, 1) for step in range(17)]
    needs = [planner.need(weights, context, checkpointing) for context in contexts]
    parts = {
        "weights": [float(n.weights_bytes) for n in needs], "overhead": [float(n.overhead_bytes) for n in needs],
        "KV cache": [float(n.kv_cache_bytes) for n in needs], "optimizer": [float(n.optimizer_bytes) for n in needs],
        "activations": [float(n.activations_bytes) for n in needs],
    }  # fmt: skip
    return contexts, {part: values for part, values in parts.items() if any(values)}
