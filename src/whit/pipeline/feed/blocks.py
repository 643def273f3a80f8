"""Calibrated blocks, in sequence: a block's statistics are taken with its own weights unquantized and all blocks before
it quantized; then it runs once more, quantized, and gives the next block its inputs. A run that goes on after a kill
finds those inputs again by running the finished blocks as they lie in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path

from torch import Tensor, nn

from whit.calibration import CalibrationTokens
from whit.calibration.capture import BlockStats, Watch
from whit.calibration.ranges import RangeWatch, input_tensors
from whit.calibration.runner import Runner
from whit.calibration.storage import Storage
from whit.capabilities import rotation
from whit.checkpoint.writer import Written
from whit.formats.lowrank import without_side_car
from whit.formats.numeric import check_finite
from whit.kernels import add_gram
from whit.kernels.inputs import rounded_inputs
from whit.methods import Method, stand_in
from whit.methods.base import Block, BlockMethod
from whit.methods.lowrank import beside
from whit.methods.together import Work
from whit.model.graph import find_blocks
from whit.pipeline.feed.base import Given
from whit.pipeline.feed.codes import BlockCodes
from whit.pipeline.feed.reading import BlockReader, reads_ahead
from whit.pipeline.job import Job
from whit.pipeline.near import Near
from whit.pipeline.plan import Item, Unit, floats
from whit.pipeline.sources import run_dtype
from whit.tensor import Format, LayerStats
from whit.transforms.base import Inputs, Rounding
from whit.transforms.fold import Basis, rescale


class BlockFeed:
    """For methods with calibration. `written` is the folder in which finished blocks lie, `reader` a thread."""

    def __init__(
        self, job: Job, method: Method, tokens: CalibrationTokens, written: Path, reader: ThreadPoolExecutor
    ) -> None:
        self._job, self._method, self._tokens, self._written = job, method, tokens, written
        self._read = BlockReader(job.source, reader, reads_ahead(job))
        self._blocks = {name: number for number, name in enumerate(find_blocks(job.source.model).names)}
        asking = {unit.name for unit in job.plan.units if any(item.format is not None for item in unit.items)}
        self._last = max((number for name, number in self._blocks.items() if name in asking), default=-1)
        self._next = 0  # the block whose inputs the runner holds
        self._parameters: dict[str, nn.Parameter] = {}
        self._stats: BlockStats | None = None
        self._codes = BlockCodes(method)
        self._basis = Basis()
        self._seen: Mapping[str, tuple[LayerStats, ...]] = {}  # by parameter, in that basis
        self._inputs: Mapping[str, Mapping[str, Tensor]] = {}

    @contextmanager
    def unit(self, unit: Unit) -> Iterator[None]:
        index = self._blocks.get(unit.name)
        if index is None or index > self._last:  # the inputs of no linear in it matter
            yield
            return
        while self._next < index:
            self._pass_over(self._next)
        items = [item for item in unit.items if item.format is not None]
        with self._runner.loaded(index) as self._parameters:
            if index < self._last:
                self._read.expect(self._runner.state_of(index + 1))
            self._stats = self._watch(index, items) if items else None
            if not items:
                self._runner.run_exact(index)
            self._basis = self._rescaled(unit)
            self._seen = self._in_basis(items)
            self._inputs = self._ranges(index, items)
            works = self._works(items)
            self._codes = BlockCodes(self._method, items, works)
            if self._codes.of_blocks:
                self._codes.refine(works, self._parameters, partial(self._block, index))
            yield
            if index < self._last:
                self._runner.run(index)
        self._next, self._parameters, self._stats = index + 1, {}, None
        self._codes, self._basis, self._seen, self._inputs = BlockCodes(self._method), Basis(), {}, {}

    def changes(self, item: Item) -> bool:
        return item.name in self._basis.weights

    def give(self, item: Item) -> Given:
        if item.name not in self._parameters:
            return Given(self._read(item.name))
        weight = self._basis.weights.get(item.name, self._parameters[item.name].data)
        if self._stats is None or item.format is None:
            return Given(weight, note=self._basis.note if self.changes(item) else None)
        seen = tuple(s.token_count for s in self._stats.stats[item.name])
        return Given(
            weight,
            self._seen[item.name],
            self._codes.take(item.name),
            seen if len(seen) > 1 else None,
            self._stats.starved(item.name),
            inputs=self._inputs.get(item.name, {}),
        )

    def take_back(self, item: Item, approximation: Tensor | Near) -> None:
        if item.name not in self._parameters:
            return
        parameter = self._parameters[item.name].data
        if isinstance(approximation, Near):
            approximation.copy_to(parameter)
        else:
            parameter.copy_(approximation.to(item.spec.dtype))

    def _watch(self, index: int, items: Sequence[Item]) -> BlockStats:
        """The statistics of a block's inputs; the unquantized model's samples go one block on."""
        runner = self._runner
        transform = None if self._job.recipe is None else self._job.recipe.transform
        sampled = transform is not None and transform.for_activations
        watch = Watch({item.name: self._parameters[item.name] for item in items}, add_gram, sampled)
        with watch:
            exact = repeat(None) if runner.exact is None else runner.batches(runner.exact)
            for samples, unquantized in zip(runner.batches(runner.inputs), exact, strict=False):
                if unquantized is not None:
                    with watch.exact():
                        output = runner.forward(index, unquantized)
                    unquantized.copy_(output)
                runner.forward(index, samples)
        return watch.stats()

    def _ranges(self, index: int, items: Sequence[Item]) -> dict[str, dict[str, Tensor]]:
        """What linears must know of their inputs (`Activations.specs`): one more run of the rescaled block."""
        wanted = {item.name: how for item in items if (how := item.activations) is not None and how.needs_stats}
        if not wanted:
            return {}
        first = next(iter(wanted.values()))
        turns = {item.name: rotation(item.format) for item in items if item.format is not None}
        watch = RangeWatch({name: self._parameters[name] for name in wanted}, first.momentum, turns)
        with watch:
            for sample in self._runner.inputs:  # a moving average is one over samples
                self._runner.forward(index, sample[None])
        kinds = {(watch.found[name], how) for name, how in wanted.items()}
        chosen = {kind: input_tensors(*kind) for kind in kinds}
        return {name: chosen[watch.found[name], how] for name, how in wanted.items()}

    def _rescaled(self, unit: Unit) -> Basis:
        """The loaded block in the basis of the recipe's transform; what is kept has its new values from here on."""
        recipe, stats = self._job.recipe, self._stats
        if recipe is None or recipe.transform is None or stats is None:
            return Basis()
        rounding = {
            item.name: _rounding(stand_in(self._method_of(item)), item.format)
            for item in unit.items if item.format is not None
        }  # fmt: skip
        seen = {name: stats.of(name) for name in rounding}
        dtypes = {item.name: item.spec.dtype for item in unit.items}
        weights = {name: parameter.data for name, parameter in self._parameters.items()}
        inputs = {item.name: _inputs(item) for item in unit.items if item.format is not None}
        basis = rescale(recipe.transform, self._job.foldings[unit.name], weights, seen, rounding, dtypes, inputs)
        for name, weight in basis.weights.items():
            weights[name].copy_(weight.to(dtypes[name]))
        return basis

    def _in_basis(self, items: Sequence[Item]) -> dict[str, tuple[LayerStats, ...]]:
        """What linears see in the new basis. Those that share an input and a scale share it still, so that one factor
        of it serves them all."""
        if self._stats is None:
            return {}
        seen = [(item.name, self._stats.of(item.name)) for item in items]  # held, so that no id is another's
        known: dict[tuple[int, ...], tuple[LayerStats, ...]] = {}
        found = {}
        for name, stats in seen:
            key = (id(self._basis.scales.get(name)), *(id(s.hessian) for s in stats))
            if key not in known:
                known[key] = self._basis.stats(name, stats)
            found[name] = known[key]
        return found

    def _works(self, items: Sequence[Item]) -> list[Work]:
        """The block's matrices that are to be given codes, with their statistics."""
        works = []
        for item in items:
            assert item.format is not None
            if item.name in self._job.exact | self._job.regridded:  # has its codes, or begins with them
                continue
            weight = self._basis.weights.get(item.name, self._parameters[item.name].data)
            check_finite(weight, item.name)
            together = isinstance(self._method_of(item), BlockMethod)  # a side-car is for what is left in the end
            format = without_side_car(item.format) if together else item.format
            works.append(Work(item.name, item.matrix(weight), self._seen[item.name], format))
        return works

    def _method_of(self, item: Item) -> Method:
        return item.method or self._method

    def _block(self, index: int, items: Mapping[str, Item]) -> Block:
        """The block as it is loaded, for a method that moves these of its parameters."""
        runner = self._runner
        assert runner.exact is not None
        return Block(
            runner.blocks[index],
            lambda samples: runner.forward(index, samples),
            runner.inputs,
            runner.exact,
            {name: self._parameters[name] for name in items},
            {name: item.parameter for name, item in items.items()},
        )

    @cached_property
    def _runner(self) -> Runner:
        job = self._job
        twice = self._method.needs_exact or (job.recipe is not None and job.recipe.needs_exact)
        storage = Storage(self._written, job.options.input_memory)
        return Runner(job.source.model, self._read, self._tokens.tokens, job.device, storage, twice)

    def _pass_over(self, index: int) -> None:
        """Run a block that an earlier run finished, to have the next one's inputs."""
        prefix = f"{self._runner.names[index]}."
        items = {i.name: i for i in self._job.plan.items if i.name.startswith(prefix)}
        with Written(self._written, self._job.plan.shards) as written:
            restore = self._job.exporter.restore
            weights = {
                name: floats(item, restore(item, {key: written.read(key) for key in item.written}))
                .to(item.spec.dtype)  # as `take_back` leaves it
                .to(run_dtype(self._job.source, name))
                for name, item in items.items()
            }
        if self._runner.exact is not None:
            with self._runner.loaded(index):
                self._runner.run_exact(index)
        with self._runner.loaded(index, weights):
            self._runner.run(index)
        self._next = index + 1


def _rounding(method: Method, format: Format) -> Rounding:
    """What a method makes of a matrix in a format, or nearly: a transform tries it many times."""
    base = without_side_car(format)
    quantizer = beside(method)
    return lambda weight, stats: quantizer(weight, stats, base).dequantize()


def _inputs(item: Item) -> Inputs:
    """How a linear's inputs are rounded, or that they are not."""
    how, turn = item.activations, 0 if item.format is None else rotation(item.format)
    return lambda x: x if how is None else rounded_inputs(x, how, turn)
