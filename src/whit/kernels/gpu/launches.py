"""What a product of each kernel is given: room for its result, and for what its blocks hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.gpu import digits, few, many, nvrtc, slab, stream, tiled, tuned
from whit.tensor import PackedWeight

ARRIVED = "arrived"  # the derived tensor: zeros in which blocks count themselves
COUNTED = 144  # of the smallest weights: 33 tiles that four blocks share, by four warps each
Weights = Sequence[PackedWeight]
Biases = Sequence[Tensor | None]


@dataclass(frozen=True)
class Call:
    """One launch: it reads contiguous x (rows, columns) and fills each of ys (rows, outs).

    `partial` and `arrived` are what its blocks meet in, where they do. `box`: rows of x that Hopper's engine copies at
    once, where the kernel has a map of x and not its address. `boxes`: it has maps of ys, too.
    """

    launch: nvrtc.Launch
    x: Tensor
    ys: list[Tensor]
    partial: Tensor | None = None
    arrived: Tensor | None = None
    box: int = 0
    boxes: bool = False

    def start(self) -> list[Tensor]:
        """Enqueue it on torch's stream: ys, which will be filled."""
        self.launch.start(nvrtc.stream_on(self.x.device.index))
        return self.ys


def device_of(x: Tensor) -> tuned.Device:
    """What configurations depend on."""
    return _device_of(x.device)


@lru_cache(maxsize=32)
def _device_of(device: torch.device) -> tuned.Device:
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count


def by_stream(x: Tensor, packed: Weights, biases: Biases, scheme: stream.Scheme, config: stream.Config) -> Call:
    """The fused product of contiguous x (rows, columns) with a given configuration, which must be `fitted`."""
    (weight,), (bias,) = packed, biases
    operands = _operands(x, weight, bias, config.splits, stream.grid(config, weight.shape[0], x.shape[0]))
    return _meeting(stream.launch(operands, scheme, config), [operands])


def by_many(x: Tensor, packed: Weights, biases: Biases, scheme: stream.Scheme, config: many.Config) -> Call:
    """The same on Hopper where `many.why_not` gives no reason: weights of one scheme at once."""
    config = config.for_outs([one.shape[0] for one in packed])
    found = _products(x, packed, biases)
    room = many.meeting(x, found, config)
    launch = many.launch(x, found, scheme, config, device_of(x)[1], room)
    return Call(launch, x, [one.y for one in found], room.partial, room.arrived, config.box, bool(config.boxes))


def by_slab(x: Tensor, packed: Weights, biases: Biases, scheme: stream.Scheme, config: slab.Config) -> Call:
    """The same on Hopper for up to 16 rows, where `slab.why_not` gives no reason: weights of one scheme at once.

    `scheme`: how the weights are read (`halves.read_as`).
    """
    found = _products(x, packed, biases)
    launch = slab.launch(x, found, scheme, config)
    return Call(launch, x, [one.y for one in found], box=slab.rounded(len(x)))


def by_few(x: Tensor, packed: Weights, biases: Biases, scheme: stream.Scheme, config: few.Config) -> Call:
    """x (rows, columns) through weights of one scheme, up to 16 rows, where `few.fits`; in one launch."""
    cuts = few.slices(scheme, config, *x.shape)
    operands = [
        _operands(x, weight, bias, cuts, (-(-weight.shape[0] // 16), cuts, 1))
        for weight, bias in zip(packed, biases, strict=True)
    ]
    return _meeting(few.launch(operands, scheme, config, cuts, device_of(x)[1]), operands)


def row_by_few(
    x: Tensor, packed: Weights, biases: Biases, scheme: stream.Scheme, config: few.Config, ends: few.Ends,
    y: Tensor | None = None,
) -> Call:  # fmt: skip
    """x (1, columns) through weights of one scheme in one launch, with what `ends` say, where `few.takes` it.

    Gate and up give one result; `y` (1, outs): what a result is added to, which is returned.
    """
    ys = [torch.empty(1, weight.shape[0], dtype=x.dtype, device=x.device) if y is None else y for weight in packed]
    ys = [ys[0]] * len(ys) if ends.gated else ys
    operands = [
        stream.Operands(x, room, bias, weight, None, None)
        for room, weight, bias in zip(ys, packed, biases, strict=True)
    ]
    return Call(few.launch(operands, scheme, config, 1, device_of(x)[1], ends), x, ys[:1] if ends.gated else ys)


def by_digits(x: Tensor, packed: Weights, biases: Biases, scheme: stream.Scheme, cut: digits.Cut) -> Call:
    """One row on Hopper, with a cut from `digits.fit`: weights of one scheme at once."""
    ys = [torch.empty(1, weight.shape[0], dtype=x.dtype, device=x.device) for weight in packed]
    return Call(digits.launch(x, packed, biases, ys, scheme, cut), x, ys)


def multiply_tiled(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: stream.Scheme, config: tiled.Config,
    wgmma: bool | None = None,
) -> Tensor:  # fmt: skip
    """The same for more rows; `wgmma`: with Hopper's instruction, None where the device has it."""
    operands = _operands(x, packed, bias, config.splits, tiled.grid(config, packed.shape[0], x.shape[0]))
    tiled.launch(operands, scheme, config, tiled.has_wgmma(x.device) if wgmma is None else wgmma)
    return operands.y


def _products(x: Tensor, packed: Weights, biases: Biases) -> list[many.Product]:
    sizes = [(x.shape[0], weight.shape[0]) for weight in packed]
    return [
        many.Product(weight, bias, torch.empty(size, dtype=x.dtype, device=x.device))
        for weight, bias, size in zip(packed, biases, sizes, strict=True)
    ]


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


def counters(packed: PackedWeight) -> Tensor:
    """ARRIVED of a weight: a word for each of 64 outs' four warps, up to 512 rows; what needs more makes its own."""
    return torch.zeros(max(-(-packed.shape[0] // 8), COUNTED), dtype=torch.int32, device=packed.device)


def _meeting(launch: nvrtc.Launch, operands: Sequence[stream.Operands]) -> Call:
    first = operands[0]
    return Call(launch, first.x, [each.y for each in operands], first.partial, first.arrived)


# By the name of a way (`ways.plan`): x (rows, columns), weights of one scheme, their biases, the scheme and the cut.
WAYS: dict[str, Callable[..., Call]] = {
    "few": by_few, "many": by_many, "slab": by_slab, "stream": by_stream, "digits": by_digits,
}  # fmt: skip
AT_ONCE = ("few", "many")  # those of them that take several weights, and that `plan` chooses for these
