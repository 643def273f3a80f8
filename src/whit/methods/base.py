"""What a method is: it chooses codes. Everything a method may know is in its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from whit.tensor import Format, LayerStats, QuantizedTensor

Quantizer: TypeAlias = Callable[[Tensor, LayerStats | None, Format], QuantizedTensor]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of options; the same inputs give the same codes."""

    @property
    def name(self) -> str: ...
    @property
    def needs_stats(self) -> bool:
        """Whether it needs `stats`, and so a calibration text."""
        ...

    @property
    def needs_exact(self) -> bool:
        """Whether it also needs what the unquantized model computes: `LayerStats.drift`, `Block.targets`."""
        ...

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        """Quantize a finite float matrix (out_features, in_features); `stats` are None for a method without data."""
        ...


@dataclass(frozen=True)
class Block:
    """A block of the model that can be run, for methods that choose the codes of all its matrices together.

    `forward` runs the block with the parameters that it has at that moment, (n, context, hidden) to the same shape.
    `inputs` (samples, context, hidden) come from the quantized blocks before this one; `targets`, of the same shape,
    are this block's outputs in the unquantized model. `parameters` are those to be quantized, by name; `shaped` brings
    their matrices (out, in) into the shapes that they have in the module.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    parameters: Mapping[str, nn.Parameter]
    shaped: Mapping[str, Callable[[Tensor], Tensor]]


@runtime_checkable
class BlockMethod(Method, Protocol):
    """A method whose call gives each matrix a start, and whose `refine` then improves a block's matrices together."""

    weight_bytes: ClassVar[int]  # that it keeps for each weight of the block, in addition to the block itself

    @property
    def at_once(self) -> int:
        """How many samples are run together; on a CPU at most one for each thread."""
        ...

    def passes(self, samples: int) -> float:
        """How often `refine` runs that many samples through a block; a backward pass counts two more."""
        ...

    def refine(
        self, block: Block, weights: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]
    ) -> Mapping[str, QuantizedTensor]:
        """Better codes and params; `weights` are the matrices (out, in) that `quantized` approximates, by name."""
        ...
