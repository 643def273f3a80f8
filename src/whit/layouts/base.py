"""What a layout is: it turns codes and params into the bytes of a file or a kernel and back, without loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec


@runtime_checkable
class Layout(Protocol):
    """A stateless value; `unpack(pack(q))` is q, bit for bit, for every format that it does not refuse."""

    @property
    def name(self) -> str: ...

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        """None if the layout can hold a tensor of that shape in that format, else why not, in a clause."""
        ...

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes of the tensors that `pack` makes, in their order."""
        ...

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        """Codes to bytes, losslessly."""
        ...

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """Bytes to codes: the inverse of `pack`. CheckpointError for bytes that `pack` cannot have made."""
        ...

    def rows(self, packed: PackedWeight, index: Tensor) -> Tensor:
        """Dequantized float32 rows (len(index), columns) of a matrix: an embedding's look-up."""
        ...


class WholeRows:
    """`rows` for layouts in which rows share bytes: everything is unpacked."""

    def rows(self: Layout, packed: PackedWeight, index: Tensor) -> Tensor:
        """Dequantized float32 rows (len(index), columns)."""
        floats = self.unpack(packed).dequantize()
        return floats.reshape(-1, packed.shape[-1])[index]
