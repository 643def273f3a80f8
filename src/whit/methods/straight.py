"""Straight-through fake quantization with learned params: what quantization-aware training computes with.

w^ = decode(encode(w, p), p). Rounding lets gradients through as if it were not there (Bengio et al. 2013), and params
are learned as step sizes are (LSQ, Esser et al. 2020): with the rounding frozen, a weight between the lowest and the
highest number of its group is w^ = w + r S(p), S the distance of these two and r = (w^ - w) / S; one beyond them is
w^ = decode(c, p), c its code. So

    dw^/dw = 1 within, 0 beyond;        dw^/dp = r dS/dp within, d decode(c, p) / dp beyond

which for w^ = s (q - z) is LSQ's (w^ - w) / s within and q - z beyond. It is said through encode and decode alone, and
so serves every format. A weight beyond still moves where its gradient leads it back. Which params are learned, and how
they are stored, is in `learned.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.methods.latent import Latent
from whit.methods.learned import Learned
from whit.tensor import QuantizedTensor


class Straight:
    """One matrix in training: float32 masters of its weights and params, and what they are rounded to.

    `inside` says where in its cell each weight begins, as in `Latent`; 1 takes `weight` itself. Masters of weights are
    counted in the root mean square step of their row, or (`plain`) as they are.
    """

    def __init__(self, weight: Tensor, quantized: QuantizedTensor, inside: float, plain: bool = False) -> None:
        self.format, self.shape = quantized.format, quantized.shape
        latent = Latent(weight, quantized, min(inside, 0.999), 1.0)
        origin = latent.origin if inside < 1 else weight.to(torch.float32)
        self.learned = Learned(quantized, latent.step, plain)
        step = latent.step.square_().mean(dim=1, keepdim=True).sqrt_()
        self.unit = torch.where(step > 0, step, 1.0) if not plain else torch.ones_like(step)
        self.master = origin / self.unit
        self.codes = quantized.codes

    @property
    def variables(self) -> dict[str, Tensor]:
        """What may be moved in place: the weights under "", the params' moves under their names."""
        return {"": self.master, **self.learned.moves}

    def decode(self) -> Tensor:
        """w^ (rows, columns) float32, as it will be stored."""
        params = self.learned.store()
        self.codes = self.format.encode(self.master * self.unit, params)
        return self.format.decode(self.codes, params)

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """From a loss's gradient in the w^ that `decode` gave to those in `variables`."""
        gradient = gradient.to(torch.float32)
        weight, used = self.master * self.unit, self.learned.used()
        with torch.enable_grad():
            params = {**self.learned.params, **used}
            decoded = self.format.decode(self.codes, params)
            ends = [self.format.decode(codes, params) for codes in self.learned.ends(weight)]
            low, high = torch.minimum(*ends), torch.maximum(*ends)
            within, span = (weight >= low) & (weight <= high), high - low
            # Where a scale is 0 there is no step to learn from, and the quotient is none.
            rounding = torch.where(span > 0, (decoded - weight) / span, 0.0).detach()
            moved = torch.where(within, rounding * span, decoded)
        back = torch.where(weight > high, gradient > 0, gradient < 0)
        own = torch.where(within | back, gradient, 0.0) * self.unit
        return {"": own.detach(), **self.learned.gradients(moved, used, gradient)}

    def confine(self) -> None:
        """Bring back params that went too far; weights may go anywhere."""
        self.learned.confine()

    def quantized(self) -> QuantizedTensor:
        """What `decode` last gave, as it will be stored."""
        return QuantizedTensor(self.format, self.shape, self.codes, self.format.seal(self.learned.params))


class Fitted:
    """One matrix in training whose params are none of their own: in every step the format fits them to the weights.

    What BitNet b1.58 does (Ma et al. 2024) with `ternary-tensor-absmean`: s = mean |w|, and every weight gets the
    gradient.
    """

    def __init__(self, weight: Tensor, quantized: QuantizedTensor) -> None:
        self.format, self.shape = quantized.format, quantized.shape
        exact = weight.to(torch.float32)
        size = exact.square().mean(dim=1, keepdim=True).sqrt_()
        self.unit = torch.where(size > 0, size, 1.0)
        self.master = exact / self.unit
        self.codes, self._params = quantized.codes, quantized.params

    @property
    def variables(self) -> dict[str, Tensor]:
        """What may be moved in place, in units of a row's root mean square."""
        return {"": self.master}

    def decode(self) -> Tensor:
        """w^ (rows, columns) float32, as it will be stored."""
        weight = self.master * self.unit
        self._params = self.format.seal(self.format.fit(weight))
        self.codes = self.format.encode(weight, self._params)
        return self.format.decode(self.codes, self._params)

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """From a loss's gradient in the w^ that `decode` gave."""
        return {"": gradient.to(torch.float32) * self.unit}

    def confine(self) -> None:
        """Weights may go anywhere."""

    def quantized(self) -> QuantizedTensor:
        """What `decode` last gave, as it will be stored."""
        return QuantizedTensor(self.format, self.shape, self.codes, self._params)
