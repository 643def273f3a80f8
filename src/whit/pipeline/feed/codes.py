"""The codes of a loaded block: matrix after matrix, or, where a method wants the whole block, of all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from whit.calibration.runner import holding
from whit.methods import Method
from whit.methods.base import Block, BlockMethod
from whit.methods.lowrank import beside, repaired
from whit.methods.together import Together, Work
from whit.pipeline.plan import Item
from whit.tensor import QuantizedTensor


class BlockCodes:
    """Codes of the matrices in `works`, each by the method that a rule names for its item, else by `own`."""

    def __init__(self, own: Method, items: Sequence[Item] = (), works: Sequence[Work] = ()) -> None:
        self._own, self._items = own, {item.name: item for item in items}
        self._together = self._by_method(works)  # by parameter
        self._refined: Mapping[str, QuantizedTensor] = {}

    @property
    def of_blocks(self) -> bool:
        """Whether a method chooses codes for the block as a whole: `refine` must be called."""
        return any(isinstance(self._method(name), BlockMethod) for name in self._items)

    def take(self, name: str) -> QuantizedTensor | None:
        """The codes of a matrix, None where they are not for a method to choose. Asked for once."""
        if self._refined:
            return self._refined.get(name)
        return self._together[name].take(name) if name in self._together else None

    def refine(
        self, works: Sequence[Work], parameters: Mapping[str, nn.Parameter],
        block_of: Callable[[Mapping[str, Item]], Block],
    ) -> None:  # fmt: skip
        """Choose all codes: those that methods of blocks choose together, while the others hold theirs.

        `block_of` gives the loaded block, whose parameters are `parameters`, for a method that moves some of them.
        """
        found = {work.name: self._together[work.name].take(work.name) for work in works}
        for method in dict.fromkeys(self._method(work.name) for work in works):
            if not isinstance(method, BlockMethod):
                continue
            mine = [work for work in works if self._method(work.name) == method]
            refining = {work.name: self._items[work.name] for work in mine}
            block = block_of(refining)
            others = {name: near for name, near in found.items() if name not in refining}
            with holding([(parameters[name], self._stands_for(name, near)) for name, near in others.items()]):
                refined = method.refine(block, {w.name: w.weight for w in mine}, {w.name: found[w.name] for w in mine})
            for work in mine:
                format = self._items[work.name].format or work.format
                found[work.name] = repaired(refined[work.name], work.weight, work.stats[0], format)
        self._refined = found

    def _method(self, name: str) -> Method:
        return self._items[name].method or self._own

    def _stands_for(self, name: str, near: QuantizedTensor) -> Tensor:
        """What codes stand for, as the file's own type and the parameter's shape have it."""
        item = self._items[name]
        return item.parameter(near.dequantize()).to(item.spec.dtype)

    def _by_method(self, works: Sequence[Work]) -> dict[str, Together]:
        """Matrices that one method quantizes are done together."""
        found: dict[str, Together] = {}
        for method in dict.fromkeys(self._method(work.name) for work in works):
            mine = [work for work in works if self._method(work.name) == method]
            found |= dict.fromkeys((work.name for work in mine), Together(beside(method), mine))
        return found
