"""MLX checkpoints, mode affine, for mlx-lm on Apple machines: linears and embeddings.

`quantization` in config.json, mirrored in `quantization_config`: group_size, bits, mode, and by module what differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from whit.export import decoders
from whit.export.base import Outcome
from whit.export.linears import LinearsExport
from whit.layouts import Layout
from whit.layouts.mlx import MLXLayout
from whit.tensor import Format

USAGE = """```
mlx_lm.generate --model PATH --prompt "..."
```"""


class MLX(LinearsExport):
    """Several formats in one file where they differ by module."""

    name: ClassVar[str] = "mlx"
    summary: ClassVar[str] = "MLX affine: integers of 2, 3, 4, 5, 6, 8 bits"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    fuses: ClassVar[bool] = False
    usage: ClassVar[str] = USAGE

    def layout(self, format: Format) -> Layout:
        return MLXLayout()

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        return decoders.mlx(**tensors, columns=shape[1])

    def config(self, outcome: Outcome) -> dict[str, Any]:
        formats = outcome.formats
        common = Counter(formats.values()).most_common(1)[0][0]
        said = _options(common)
        for p in outcome.parameters:
            if p.target is not None and p.format is not None and _options(p.format) != _options(common):
                said |= {module: _options(p.format) for module, _ in self.pieces(p.target)}
        return {"quantization": said, "quantization_config": said}


def _options(format: Format) -> dict[str, Any]:
    return {"group_size": format.group_size, "bits": format.bits, "mode": "affine"}
