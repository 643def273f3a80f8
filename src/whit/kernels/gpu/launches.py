"""What a product of each kernel is given: room for its result, and for what its blocks hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.gpu import few, many, slab, stream, tiled, tuned
from whit.tensor import PackedWeight

ARRIVED = "arrived"  # the derived tensor: zeros in which blocks count themselves


def device_of(x: Tensor) -> tuned.Device:
    """What configurations depend on."""
    return _device_of(x.device)


@lru_cache(maxsize=32)
def _device_of(device: torch.device) -> tuned.Device:
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count


def multiply(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: stream.Scheme, config: stream.Config
) -> Tensor:
    """The fused product of contiguous x (rows, columns) with a given configuration, which must be `fitted`."""
    operands = _operands(x, packed, bias, config.splits, stream.grid(config, packed.shape[0], x.shape[0]))
    stream.launch(operands, scheme, config)
    return operands.y


def multiply_tiled(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: stream.Scheme, config: tiled.Config,
    wgmma: bool | None = None,
) -> Tensor:  # fmt: skip
    """The same for more rows; `wgmma`: with Hopper's instruction, None where the device has it."""
    operands = _operands(x, packed, bias, config.splits, tiled.grid(config, packed.shape[0], x.shape[0]))
    tiled.launch(operands, scheme, config, tiled.has_wgmma(x.device) if wgmma is None else wgmma)
    return operands.y


def multiply_many(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None], scheme: stream.Scheme,
    config: many.Config,
) -> list[Tensor]:  # fmt: skip
    """The same on Hopper where `many.why_not` gives no reason: weights of one scheme at once."""
    found = _products(x, packed, biases)
    many.launch(x, found, scheme, config, device_of(x)[1])
    return [one.y for one in found]


def multiply_slabs(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None], scheme: stream.Scheme,
    config: slab.Config,
) -> list[Tensor]:  # fmt: skip
    """The same on Hopper for up to 16 rows, where `slab.why_not` gives no reason: weights of one scheme at once.

    `scheme`: how the weights are read (`halves.read_as`).
    """
    found = _products(x, packed, biases)
    slab.launch(x, found, scheme, config)
    return [one.y for one in found]


def _products(x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> list[many.Product]:
    sizes = [(x.shape[0], weight.shape[0]) for weight in packed]
    return [
        many.Product(weight, bias, torch.empty(size, dtype=x.dtype, device=x.device))
        for weight, bias, size in zip(packed, biases, sizes, strict=True)
    ]


def multiply_few(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None], scheme: stream.Scheme,
    config: few.Config,
) -> list[Tensor]:  # fmt: skip
    """x (rows, columns) through weights of one scheme, up to 16 rows, where `few.fits`; in one launch."""
    cuts = few.slices(scheme, config, *x.shape)
    operands = [
        _operands(x, weight, bias, cuts, (-(-weight.shape[0] // 16), cuts, 1))
        for weight, bias in zip(packed, biases, strict=True)
    ]
    few.launch(operands, scheme, config, cuts, device_of(x)[1])
    return [each.y for each in operands]


def multiply_row(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None], scheme: stream.Scheme,
    config: few.Config, ends: few.Ends, y: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """x (1, columns) through weights of one scheme in one launch, with what `ends` say, where `few.takes` it.

    Gate and up give one result; `y` (1, outs): what a result is added to, which is returned.
    """
    ys = [torch.empty(1, weight.shape[0], dtype=x.dtype, device=x.device) if y is None else y for weight in packed]
    ys = [ys[0]] * len(ys) if ends.gated else ys
    operands = [
        stream.Operands(x, room, bias, weight, None, None)
        for room, weight, bias in zip(ys, packed, biases, strict=True)
    ]
    few.launch(operands, scheme, config, 1, device_of(x)[1], ends)
    return ys[:1] if ends.gated else ys


def _one_few(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: stream.Scheme, cut: few.Config) -> Tensor:
    return multiply_few(x, [packed], [bias], scheme, cut)[0]


def _one_many(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: stream.Scheme, cut: many.Config) -> Tensor:
    return multiply_many(x, [packed], [bias], scheme, cut)[0]


def multiply_slab(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: stream.Scheme, config: slab.Config
) -> Tensor:
    """`multiply_slabs` for one weight."""
    return multiply_slabs(x, [packed], [bias], scheme, config)[0]


def _operands(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, splits: int, cut: tuple[int, int, int]
) -> stream.Operands:
    rows, outs = x.shape[0], packed.shape[0]
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    partial = arrived = None
    if splits > 1:
        partial = torch.empty(splits, rows, outs, dtype=torch.float32, device=x.device)
        arrived = packed.tensors.get(ARRIVED)
        if arrived is None or len(arrived) < cut[0] * cut[2]:
            arrived = torch.zeros(cut[0] * cut[2], dtype=torch.int32, device=x.device)
    return stream.Operands(x, y, bias, packed, partial, arrived)


# By the name of a way (`kernel.plan`): x (rows, columns), the weight, its bias, its scheme and the cut.
WAYS: dict[str, Callable[..., Tensor]] = {
    "few": _one_few, "many": _one_many, "slab": multiply_slab, "stream": multiply, "tiled": multiply_tiled,
}  # fmt: skip
# The same for weights of one scheme, in one launch.
AT_ONCE: dict[str, Callable[..., list[Tensor]]] = {"few": multiply_few, "many": multiply_many}
