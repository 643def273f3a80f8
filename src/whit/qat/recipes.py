"""Hyper-parameters of the literature, by name.

`efficientqat`: Chen et al. 2024, section 4.1 and the authors' published scripts. Phase 1: round to nearest, then 2
epochs of AdamW on 4096 samples of 2048 tokens, batches of 2, squared error against the unquantized model's block,
1e-4 for scales and zero points, 2e-5 for weights at 2 bits and 1e-5 above, a cosine to a twentieth. Phase 2: one epoch
on 4096 samples (4096 tokens where the model takes them), batches of 32, next-token loss, 2e-5 at 2 bits and 1e-5 above
for the scales alone, a cosine to 0 after a warm-up of 3 %, gradients clipped to 0.3. It was made for asymmetric
integers in groups of 64 or 128.

`bitnet`: BitLinear of BitNet b1.58 (Ma et al. 2024): `ternary-tensor-absmean` weights, whose scale is mean |w| of the
matrix in every step, and inputs in 8 bits by max |x| of each token.
"""

from __future__ import annotations

from dataclasses import dataclass

from whit.methods import RTN, Blocks
from whit.qat.course import Course
from whit.tensor import Format

SAMPLES = 4096
NAMES = ("whit", "efficientqat", "bitnet")
BITNET_FORMAT, BITNET_ACTIVATIONS = "ternary-tensor-absmean", "int8"


@dataclass(frozen=True)
class Phases:
    """Block-wise training, the end-to-end training of params after it, and how much text each takes."""

    blocks: Blocks
    scales: Course
    calibration_samples: int
    windows: int


def efficientqat(format: Format, samples: int = SAMPLES) -> Phases:
    """The published recipe for a format; fewer `samples` than were published make shorter runs at the same rates."""
    weights = 2e-5 if format.bits <= 2 else 1e-5
    blocks = Blocks(
        start=RTN(), steps=2 * max(samples // 2, 1), batch=2, rate=weights, scale_rate=1e-4, units="plain", loss="mse",
        inside=1.0, floor=0.05, slow=0.999, checks=1,
    )  # fmt: skip
    scales = Course(
        steps=max(samples // 32, 1), batch=32, rate=0.0, scale_rate=weights, units="plain", warmup=0.03, floor=0.0,
        slow=0.999, distill=0.0, text=1.0, clip=0.3, at_once=2,
    )  # fmt: skip
    return Phases(blocks, scales, samples, samples)
