"""A weight whose codes are of the rotated matrix: the inputs are rotated, and another kernel multiplies.

(x H) (w H)^T = x w^T: size products more per input, `rotation` of them, in the inputs' own type. Quantized inputs are
rounded after the rotation; static scales and thresholds are those of rotated inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from whit.capabilities import rotation
from whit.formats.rotated import in_its_basis
from whit.kernels.base import Kernel
from whit.rotation import rotate
from whit.tensor import PackedWeight


@dataclass(frozen=True)
class Turned(PackedWeight):
    """A packed weight and, prepared by the kernel for the codes, the same in its own basis."""

    codes: PackedWeight


@dataclass(frozen=True)
class Rotation:
    """What `kernel` multiplies, by rotated inputs."""

    kernel: Kernel

    @property
    def name(self) -> str:
        return f"{self.kernel.name}+rotation"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        codes = in_its_basis(packed)
        return "nothing is rotated" if codes is None else self.kernel.supports(codes, x)

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if isinstance(packed, Turned):
            return packed
        stored = in_its_basis(packed)
        assert stored is not None
        codes, how = self.kernel.prepare(stored), packed.activations
        return Turned(codes.layout, packed.format, packed.shape, codes.tensors, activations=how, codes=codes)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        codes = packed.codes if isinstance(packed, Turned) else in_its_basis(packed)
        assert codes is not None
        return self.kernel.linear(rotate(x, rotation(packed.format)), codes, bias)
