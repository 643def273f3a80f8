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
    def needs_stats(self) -> bool: ...
    @property
    def needs_exact(self) -> bool:
        """Whether it also wants to know what the unquantized model computes: `LayerStats.drift`, `Block.targets`."""
        ...

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        """Quantize a finite float matrix (out_features, in_features)."""
        ...


@dataclass(frozen=True)
class Block:
    """A block of the model at work, for methods that choose the codes of all its matrices together.

    `forward` runs the block, with the parameters that it has at that moment, (n, context, hidden) to the same shape.
    `inputs` (samples, context, hidden) are those of the quantized model so far, `targets` what the unquantized model
    has behind this block. `parameters` are those to be quantized, by name; `shaped` gives their matrices (out, in)
    the shapes that they have in the module.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    parameters: Mapping[str, nn.Parameter]
    shaped: Mapping[str, Callable[[Tensor], Tensor]]


@runtime_checkable
class BlockMethod(Method, Protocol):
    """A method whose call gives a start, and which then refines a block's matrices together."""

    weight_bytes: ClassVar[int]  # per weight of the block that it keeps, beside the block itself

    @property
    def at_once(self) -> int:
        """Samples that are run at once, on a CPU at most one for each thread."""
        ...

    def passes(self, samples: int) -> float:
        """How often it runs that many samples through a block; a run backwards counts two more."""
        ...

    def refine(
        self, block: Block, weights: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]
    ) -> Mapping[str, QuantizedTensor]:
        """Better codes and params; `weights` are the matrices (out, in) that `quantized` approximates, by name."""
        ...
