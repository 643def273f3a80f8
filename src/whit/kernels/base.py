"""What a kernel is: it multiplies activations by a packed weight."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from whit.errors import PackedWeightError
from whit.tensor import PackedWeight

QUANTIZED_INPUTS = "its activations are quantized, and this kernel multiplies floats"


def check_columns(x: Tensor, columns: int) -> None:
    """PackedWeightError where x is not (..., columns): a compiled kernel would read past its end."""
    if x.dim() == 0 or x.shape[-1] != columns:
        raise PackedWeightError(
            f"packed linear: the input's shape is {tuple(x.shape)}; its last dimension must be {columns}; "
            "give what the layer before it makes"
        )


@runtime_checkable
class Kernel(Protocol):
    """A stateless value. `supports` may depend on the format, the layout, devices, dtypes and the number of rows.

    Dispatch asks once for each power of two of rows, so a threshold on rows must be a power of two.
    """

    @property
    def name(self) -> str: ...

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        """None if the kernel runs this, otherwise the reason why not, for `explain`."""
        ...

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        """The weight in the form that `linear` reads fastest; most kernels return `packed` itself.

        A module asks once, at its first use, and holds the answer in place of its own tensors. So the answer is still
        a weight in its layout: under the layout's keys it has equal values, shapes and dtypes, though perhaps in other
        memory or with other strides. Or it is in layout `whole-bits`, which the module can turn back into its own.
        Tensors under further keys are derived, small, and never saved; a subclass of PackedWeight may carry more.
        Preparing twice changes nothing.
        """
        ...

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """x (..., in_features) @ weight (out_features, in_features)^T + bias (out_features,), in x.dtype.

        `packed` is what `prepare` returned, or a weight as it is stored. Where `packed.activations` is not None, x is
        quantized as it says before it is multiplied: `int8` and `float8` in this package define the result.
        """
        ...
