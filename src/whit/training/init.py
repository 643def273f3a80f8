"""Adapters that begin where quantization has ended: the product B A makes up for what the packed weights lost.

PEFT starts with B = 0: the model begins as far from the original as quantization has left it. Here

    s B A ~ W - Q,    s the adapter's scaling, W the original weight, Q the packed one,

by one of METHODS: `loftq`, the least squared error of the weights (LoftQ, Li et al. 2023), or `data`, that of the
outputs on calibration text (QERA, Zhang et al. 2024; see `formats.factors`). The original model is read block by
block; one block at a time is in memory in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from whit.arrays import quantize_tensor
from whit.calibration import Calibration, CalibrationTokens
from whit.calibration.capture import Watch
from whit.calibration.runner import Runner
from whit.calibration.storage import Storage
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.reader import Checkpoint, read_config
from whit.errors import RecipeError, UnsupportedModelError
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.layouts import BITS
from whit.methods import GPTQ
from whit.methods.lowrank import Factored, beside, factored, lost
from whit.model.skeleton import load_skeleton
from whit.model.source import ModelSource
from whit.tensor import LayerStats, QuantizedTensor
from whit.training.places import Place, effective, find_places, put

METHODS = ("data", "loftq")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Start:
    """What an adapter makes of a linear before training. `before` and `after` are the shares of the original's energy
    that are lost, ||W - Q||^2 / ||W||^2 and with s B A added to Q: of the weights for `loftq`, else of the outputs."""

    module: str
    before: float
    after: float


def initialize_adapter(
    model: nn.Module,
    source: str | Path,
    *,
    method: str = "data",
    calibration: Calibration | CalibrationTokens | None = None,
    iterations: int = 1,
    adapter: str = "default",
    progress: Progress | None = None,
) -> tuple[Start, ...]:
    """Set the LoRA factors of a quantized PEFT model so that it begins as close to the model in `source` as they allow.

    - `model`: what `peft.get_peft_model` returned for packed linears of any format.
    - `source`: folder or hub id of the model that was quantized, in full precision.
    - `method`: `data` (errors of outputs) or `loftq` (errors of weights). `calibration` is for `data`: 128 samples of
      `whit:text` unless given; best is the text that will be trained on.
    - `iterations`: with 1 the packed weights stay as they are, and the adapter can be saved without them. With more
      they are quantized again around the adapter (LoftQ's alternation; by GPTQ for `data`, else to nearest). Then the
      model has to be saved too, and adapters that were trained on it before no longer fit it.
    - `adapter`: its name in the PEFT model. `progress` is called with a block's name, the number of blocks done and
      their total.

    Scalings such as rsLoRA's are taken into account; DoRA's magnitudes become the row norms of Q + s B A, so that they
    change nothing at the start. Adapters around linears that are not packed, and all other parameters, stay as they
    are. The same inputs give the same bits, whatever the thread count.

    Raises RecipeError for an unknown method, UnsupportedModelError where `model` has no such adapter on a packed linear
    or `source` is another model, CheckpointError and CalibrationError.
    """
    if method not in METHODS:
        raise RecipeError(f"init {method!r}: not known; it must be one of {', '.join(METHODS)}; choose one")
    if iterations < 1:
        raise RecipeError(f"init: {iterations} iterations; there must be at least one; ask for more")
    places = find_places(model, adapter)
    with _opened(source) as original, torch.no_grad():
        _check_same(places, original, str(source))
        setter = _Setter(adapter, iterations, original, places)
        if method == "loftq":
            return tuple(setter.run_plain(progress))
        return tuple(setter.run_with_data(calibration or Calibration(), progress))


class _Setter:
    """Sets one adapter, linear by linear."""

    def __init__(self, adapter: str, iterations: int, original: ModelSource, places: Mapping[str, Place]) -> None:
        self.adapter, self.iterations = adapter, iterations
        self.original, self.places = original, places

    def run_plain(self, progress: Progress | None) -> Iterator[Start]:
        """By the weights alone, in the model's order."""
        adapted = [place for place in self.places.values() if place.layer is not None]
        for done, place in enumerate(adapted, 1):
            yield self.set(place, self._weight(place), None)
            if progress is not None:
                progress(place.name, done, len(adapted))

    def run_with_data(self, calibration: Calibration | CalibrationTokens, progress: Progress | None) -> Iterator[Start]:
        """By what the linears see, all before them quantized and adapted; what lies in no block, by the weights."""
        original = self.original
        config, folder = original.model.config, str(original.checkpoint.folder)
        if isinstance(calibration, Calibration):
            calibration = calibration.tokens(load_tokenizer(folder), maximum_context(config))
        device = next(iter(self.places.values())).packed.packed.device
        with TemporaryDirectory(prefix="whit-") as scratch:
            store = Storage(Path(scratch))
            runner = Runner(original.model, self._read_adapted, calibration.tokens, device, store, False)
            for index, block in enumerate(runner.names):
                inside = [place for name, place in self.places.items() if name.startswith(f"{block}.")]
                yield from self._block(runner, index, inside)
                if progress is not None:
                    progress(block, index + 1, len(runner.names))
        blocks = tuple(f"{name}." for name in runner.names)
        for name, place in self.places.items():
            if place.layer is not None and not name.startswith(blocks):
                yield self.set(place, self._weight(place), None)

    def _block(self, runner: Runner, index: int, inside: list[Place]) -> Iterator[Start]:
        prefix = f"{runner.names[index]}."
        names = [prefix + name for name in runner.blocks[index].state_dict()]
        with runner.loaded(index, {name: self._read(name) for name in names}) as parameters:
            watched = {f"{p.name}.weight": parameters[f"{p.name}.weight"] for p in inside if p.layer is not None}
            with (watch := Watch(watched)):
                for sample in runner.inputs if watched else ():
                    runner.forward(index, sample[None])
            stats = watch.stats().stats if watched else {}
            for place in inside:
                parameter = parameters[f"{place.name}.weight"]
                if place.layer is not None:
                    yield self.set(place, self._weight(place), stats[f"{place.name}.weight"][0])
                near = effective(place, self.adapter)
                parameter.data.copy_(near.t() if place.packed.transposed else near)
            if index + 1 < len(runner.names):
                runner.run(index)

    def set(self, place: Place, weight: Tensor, stats: LayerStats | None) -> Start:
        """Set one linear's factors."""
        layer, packed = place.layer, place.packed
        hessian = None if stats is None else stats.hessian
        weight = weight.to(packed.packed.device, torch.float32)
        present = BITS.unpack(packed.packed)
        whole = lost(weight, hessian)
        before = lost(weight - present.dequantize(), hessian)  # while its params are what the module holds
        found = self._solve(weight, present, stats, len(layer.lora_A[self.adapter].weight))  # type: ignore[union-attr]
        if found.quantized is not present:
            packed.load_state_dict(dict(BITS.pack(found.quantized).tensors), strict=False)
        put(place, self.adapter, found.b, found.a)
        after = lost(weight - effective(place, self.adapter), hessian)
        return Start(place.name, before / whole if whole else 0.0, after / whole if whole else 0.0)

    def _solve(self, weight: Tensor, present: QuantizedTensor, stats: LayerStats | None, rank: int) -> Factored:
        def quantize(matrix: Tensor) -> QuantizedTensor:
            if stats is None:
                return quantize_tensor(matrix, present.format)
            return beside(GPTQ())(matrix, stats, present.format)

        hessian = None if stats is None else stats.hessian
        return factored(quantize, weight, hessian, rank, self.iterations, torch.float32, present)

    def _weight(self, place: Place) -> Tensor:
        weight = self._read(f"{place.name}.weight")
        return weight.t() if place.packed.transposed else weight

    def _read(self, name: str) -> Tensor:
        return self.original.read(self.original.tied.get(name, name))

    def _read_adapted(self, name: str) -> Tensor:
        """What lies before the blocks, as the quantized model has it."""
        place = self.places.get(name.removesuffix(".weight"))
        if place is None or not name.endswith(".weight"):
            return self._read(name)
        near = effective(place, self.adapter).to(self.original.origins[name].spec.dtype)
        return near.t() if place.packed.transposed else near


@contextmanager
def _opened(source: str | Path) -> Iterator[ModelSource]:
    folder = resolve_model(source)
    if folder.is_file() or "quantization_config" in read_config(folder):
        raise UnsupportedModelError(
            f"{source}: is quantized itself; its weights in full precision must be known; name the original model"
        )
    checkpoint = Checkpoint(folder)
    try:
        yield ModelSource(load_skeleton(folder), checkpoint)
    finally:
        checkpoint.close()


def _check_same(places: Mapping[str, Place], original: ModelSource, source: str) -> None:
    for name, place in places.items():
        weight = f"{name}.weight"
        origin = original.origins.get(original.tied.get(weight, weight))
        shape = tuple(place.packed.packed.shape)
        wanted = shape[::-1] if place.packed.transposed else shape
        if origin is None or origin.spec.shape != wanted:
            has = "has no such weight" if origin is None else f"has it as {list(origin.spec.shape)}"
            raise UnsupportedModelError(
                f"{name}: is {list(wanted)} here and {source} {has}; both must be the same model; name the original"
            )
