"""A quantized matrix that a gradient can move: what lies behind its codes, and how far its params have gone.

The codes are encode(x, params at the start), x = start + offset * step: a code changes when its x crosses into the
cell of a neighbour. `step` is the distance of neighbouring numbers there, found through encode and decode alone, so
that no format need say it. Each param that the format calls continuous is p = p_start + move * unit, rounded as it is
stored; a unit moves the weights that share the param by one step (root mean square). Rounding lets gradients through
as if it were not there (straight-through; Bengio et al. 2013).

Offsets and moves are float32; codes do not answer to the params, so that moving a scale turns no code over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.methods.units import TINY, unit_of
from whit.tensor import Format, QuantizedTensor

SMALLEST = 2.0**-20  # of a row's largest weight: where the search for neighbours begins
DOUBLINGS = 22


class Latent:
    """One matrix on its way.

    `inside` says where in its cell a weight begins: 0 in the middle, 1 where the unquantized weight lies (or as near
    to it as the cell goes). No offset goes further than `reach` steps.
    """

    def __init__(self, weight: Tensor, quantized: QuantizedTensor, inside: float, reach: float) -> None:
        self.format, self.shape, self.start = quantized.format, quantized.shape, quantized
        self.reach = reach
        value = quantized.format.decode(quantized.codes, quantized.params)
        above, below = (_to_neighbour(self.format, quantized, value, sign) for sign in (1, -1))
        both = (above > 0) & (below > 0)
        self.step = torch.where(both, (above + below) / 2, above + below)
        lean = (weight.to(torch.float32) - value).clamp(min=-below / 2, max=above / 2)
        self.origin = value.add_(lean, alpha=inside)
        self.offset = torch.zeros_like(value)
        self.codes = quantized.codes
        self.moves: dict[str, Tensor] = {}
        self.units: dict[str, Tensor] = {}
        for name in self.format.continuous:
            param = quantized.params[name]
            if isinstance(param, Tensor):  # one that is quantized itself stays
                self.units[name] = unit_of(name, param.to(torch.float32), quantized, self.step)
                self.moves[name] = torch.zeros_like(self.units[name])
        self._used: dict[str, Tensor] = {}
        self._decoded = value

    def decode(self) -> Tensor:
        """The weights (rows, columns) float32 as they now are, rounded as stored."""
        x = torch.addcmul(self.origin, self.offset, self.step)
        self.codes = self.format.encode(x, self.start.params)
        self._used = {name: value.requires_grad_() for name, value in self._stored().items()}
        with torch.enable_grad():
            self._decoded = self.format.decode(self.codes, {**self.start.params, **self._used})
        return self._decoded.detach()

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """From a loss's gradient in the weights that `decode` gave to those in `variables`."""
        names = list(self._used)
        found: tuple[Tensor, ...] = ()
        if names:
            found = torch.autograd.grad(self._decoded, [self._used[name] for name in names], gradient)
        moves = {name: grad * self.units[name] for name, grad in zip(names, found, strict=True)}
        return {"": gradient * self.step, **moves}

    @property
    def variables(self) -> dict[str, Tensor]:
        """What may be moved in place: the offsets under "", the params' moves under their names."""
        return {"": self.offset, **self.moves}

    def confine(self) -> None:
        """Bring back what went too far: offsets to `reach`, params to half of themselves: scales stay positive."""
        self.offset.clamp_(-self.reach, self.reach)
        for name, move in self.moves.items():
            most = self._plain(name).abs() / (2 * self.units[name]).clamp(min=TINY)
            torch.minimum(torch.maximum(move, -most, out=move), most, out=move)

    def quantized(self) -> QuantizedTensor:
        """What `decode` last gave, as it will be stored."""
        stored = {name: value.detach().to(self._dtype(name)) for name, value in self._used.items()}
        return QuantizedTensor(self.format, self.shape, self.codes, self.format.seal({**self.start.params, **stored}))

    def _stored(self) -> dict[str, Tensor]:
        """The params as they now are: float32 that the stored type can hold."""
        exact = {name: torch.addcmul(self._plain(name), move, self.units[name]) for name, move in self.moves.items()}
        return {name: value.to(self._dtype(name)).to(torch.float32) for name, value in exact.items()}

    def _plain(self, name: str) -> Tensor:
        return self._param(name).to(torch.float32)

    def _dtype(self, name: str) -> torch.dtype:
        return self._param(name).dtype

    def _param(self, name: str) -> Tensor:
        param = self.start.params[name]
        assert isinstance(param, Tensor)
        return param


def _to_neighbour(format: Format, quantized: QuantizedTensor, value: Tensor, sign: int) -> Tensor:
    """How far the next number that can be decoded lies above (1) or below (-1) each value; 0 where there is none.

    From far less than a step, a distance is doubled until encode answers with another number: less than a step from
    a number and at least half of one, that is its neighbour.
    """
    found = torch.zeros_like(value)
    far = value.abs().amax(dim=1, keepdim=True).expand_as(value) * SMALLEST
    for _ in range(DOUBLINGS + 1):
        tried = format.encode(value + sign * far, quantized.params)
        distance = (format.decode(tried, quantized.params) - value).mul_(sign)
        found = torch.where((found == 0) & (distance > 0), distance, found)
        far = far * 2
    return found
