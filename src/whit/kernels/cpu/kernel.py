"""Products on the processor, in whit's own compiled code.

Few rows of activations stream the codes past them, dequantizing in registers; the sums are float32 and the weights
are exactly those of the reference, not rounded to the activations' type. More rows, in bfloat16, meet strips of 16 rows
of the weight, whose integers are exact in bfloat16 and whose scales are applied to float32 sums; tables' levels are
rounded. In other types, and on processors without such products, they take weights a few hundred rows at a time,
dequantized to the activations' type in the cache, to torch's own product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.capabilities import radix
from whit.kernels.base import QUANTIZED_INPUTS
from whit.kernels.cpu.binding import ISAS, TYPES, Library, check_ran, library
from whit.kernels.cpu.weight import CpuWeight, exact_in, plan_weight, unsupported
from whit.tensor import PackedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STREAMED_ROWS = {True: 16, False: 8}  # for 1 to 4 bits, and more: up to here streaming beats dequantizing
# In bfloat16: from here on strips beat streaming, where levels are exact in bfloat16 and where they are to be rounded.
STRIPS_FROM = {True: 5, False: 8}
# And tiles by AMX, for 1 to 4 bits and for more: benchmarks/results/cpu_ways_amx.md.
TILES_FROM = {True: 5, False: 8}
PANEL = 1 << 19  # weights dequantized at a time: 1 MiB of 16-bit floats, which stay in the second cache


@dataclass(frozen=True)
class Cpu:
    """Formats of up to 8 bits with a scale, and a zero point perhaps, per group of 16 n columns or per row.

    `isa` is one of binding.ISAS; None takes the best that the processor has.
    """

    isa: str | None = None
    name: ClassVar[str] = "cpu"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        if x.device.type != "cpu" or packed.device.type != "cpu":
            return f"activations are on {x.device.type}, the weight is on {packed.device.type}"
        if packed.activations is not None:
            return QUANTIZED_INPUTS
        return self.decodes(packed, x.dtype)

    def decodes(self, packed: PackedWeight, dtype: torch.dtype) -> str | None:
        """None if `dequantize` gives a weight on this processor in `dtype`, otherwise the reason why not."""
        if dtype not in FLOATS:
            return f"activations are {dtype}"
        compiled = library()
        if isinstance(compiled, str):
            return compiled
        if self.isa is not None and self.isa not in compiled.isas:
            return f"this processor does not run {self.isa}, or the compiler did not build it"
        return unsupported(packed)

    def prepare(self, packed: PackedWeight) -> CpuWeight:
        return packed if isinstance(packed, CpuWeight) else plan_weight(packed, compiled_library(), move=True)

    def restore(self, packed: PackedWeight) -> CpuWeight:
        """The weight around tensors that `prepare` made before, derived ones among them: nothing is moved or made."""
        return plan_weight(packed, compiled_library(), move=False)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return self.product(x, packed, bias)

    def product(self, x: Tensor, packed: PackedWeight, bias: Tensor | None, folds: bool = False) -> Tensor:
        """`linear`; where it `folds`, weights may be rounded to bfloat16, scales and all, if that is faster."""
        weight = _planned(packed)
        rows, (out_features, columns) = x.numel() // weight.shape[1], weight.shape
        strips = self._strips(weight, x.dtype, rows)
        if not strips and rows > STREAMED_ROWS[weight.format.bits <= 4]:
            return self._panels(x.reshape(rows, columns), weight, bias).view(*x.shape[:-1], out_features)
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
        if rows:
            compiled = compiled_library()
            bias_pointer = None if bias is None else bias.contiguous().data_ptr()
            arguments = (
                weight.address, x.data_ptr(), bias_pointer, y.data_ptr(), rows, TYPES[x.dtype],
                self._isa(compiled), torch.get_num_threads(),
            )  # fmt: skip
            check_ran(compiled.many(*arguments, folds) if strips else compiled.linear(*arguments))
        return y

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of the weight as floats (last - first, in_features), bit for bit the reference's."""
        weight = _planned(packed)
        last = weight.shape[0] if last is None else last
        out = torch.empty(last - first, weight.shape[1], dtype=dtype)
        self._decode(weight, out, first, last)
        return out

    def _decode(self, weight: CpuWeight, out: Tensor, first: int, last: int) -> None:
        compiled = compiled_library()
        rest = TYPES[out.dtype], self._isa(compiled), torch.get_num_threads()
        check_ran(compiled.dequantize(weight.address, out.data_ptr(), first, last, *rest))

    def _panels(self, x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
        out_features, columns = weight.shape
        y = torch.empty(len(x), out_features, dtype=x.dtype)
        step = max(PANEL // columns, 64) & ~63
        panel = torch.empty(min(step, out_features), columns, dtype=x.dtype)
        for first in range(0, out_features, step):
            last = min(first + step, out_features)
            self._decode(weight, panel, first, last)
            part = None if bias is None else bias[first:last]
            y[:, first:last] = torch.nn.functional.linear(x, panel[: last - first], part)
        return y

    def _strips(self, weight: CpuWeight, dtype: torch.dtype, rows: int) -> bool:
        compiled = compiled_library()
        isa = self.isa or compiled.isas[-1]
        if dtype != torch.bfloat16 or radix(weight.format) or isa not in compiled.isas_many:
            return False
        if isa == "amx":
            return rows >= TILES_FROM[weight.format.bits <= 4]
        return rows >= STRIPS_FROM[exact_in(weight.format, dtype)]

    def _isa(self, compiled: Library) -> int:
        return ISAS.index(self.isa or compiled.isas[-1])


def _planned(packed: PackedWeight) -> CpuWeight:
    return packed if isinstance(packed, CpuWeight) else plan_weight(packed, compiled_library(), move=False)


def compiled_library() -> Library:
    """The compiled kernels; RuntimeError where there are none."""
    compiled = library()
    if isinstance(compiled, str):
        raise RuntimeError(f"the CPU kernels are {compiled}")
    return compiled
