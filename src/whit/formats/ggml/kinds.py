"""What the ggml types are, as data: which integers or levels a code means, and who shares which scale.

A type stores `group_size` neighbouring columns of a row together (256, a superblock, or 32); within them runs of
`sub_size` columns share a sub-scale (and a sub-minimum). With d, dmin in float16 and integers scale, min per run:

    w = (d scale) level[code] - (dmin min)

Types without sub-scales have scale = 1; q4_1 and q5_1 store the offset m = -dmin min itself in float16. MXFP4 has a
power of two for d. These are facts of ggml's file format (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from dataclasses import dataclass

SUPERBLOCK = 256
SIMPLE = 32

# Levels of IQ4_NL and IQ4_XS: a table that is denser near zero. Its 16 values are 8-bit integers.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# MXFP4's E2M1 floats, doubled so that they are integers; the scale is halved for it.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Kind:
    """One ggml type.

    `bits` per code; linear codes lie in [low, high] and mean themselves, others index `levels`. `scale_bits` is the
    width of an integer sub-scale (0: none), stored plus `scale_bias`. `offset`: "" none, "m" one float16, "min"
    sub-minima of `scale_bits` bits. `stretch` is the part of the search that tries steps smaller than those that
    just reach the largest value: from, to, count, in shares of the step.
    """

    number: int  # ggml's own
    bytes_per_group: int
    bits: int
    group_size: int
    sub_size: int
    low: int = 0
    high: int = 0
    levels: tuple[int, ...] = ()
    scale_bits: int = 0
    scale_bias: int = 0
    offset: str = ""
    exponent: bool = False
    stretch: tuple[float, float, int] = (-0.1, 0.1, 9)

    @property
    def subs(self) -> int:
        """Runs of columns with a sub-scale of their own in a group."""
        return self.group_size // self.sub_size

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_per_group / self.group_size


KINDS: dict[str, Kind] = {
    "q4_0": Kind(2, 18, 4, SIMPLE, SIMPLE, low=-8, high=7, stretch=(-0.15, 0.3, 16)),
    "q4_1": Kind(3, 20, 4, SIMPLE, SIMPLE, high=15, offset="m", stretch=(-0.1, 0.3, 16)),
    "q5_0": Kind(6, 22, 5, SIMPLE, SIMPLE, low=-16, high=15, stretch=(-0.08, 0.15, 14)),
    "q5_1": Kind(7, 24, 5, SIMPLE, SIMPLE, high=31, offset="m", stretch=(-0.05, 0.15, 14)),
    "q8_0": Kind(8, 34, 8, SIMPLE, SIMPLE, low=-128, high=127, stretch=(-0.01, 0.012, 9)),
    "q2_k": Kind(10, 84, 2, SUPERBLOCK, 16, high=3, scale_bits=4, offset="min", stretch=(-0.2, 0.5, 16)),
    "q3_k": Kind(11, 110, 3, SUPERBLOCK, 16, low=-4, high=3, scale_bits=6, scale_bias=32, stretch=(-0.3, 0.5, 20)),
    "q4_k": Kind(12, 144, 4, SUPERBLOCK, 32, high=15, scale_bits=6, offset="min", stretch=(-0.1, 0.3, 14)),
    "q5_k": Kind(13, 176, 5, SUPERBLOCK, 32, high=31, scale_bits=6, offset="min", stretch=(-0.06, 0.15, 14)),
    "q6_k": Kind(14, 210, 6, SUPERBLOCK, 16, low=-32, high=31, scale_bits=8, scale_bias=128, stretch=(-0.06, 0.06, 11)),
    "iq4_nl": Kind(20, 18, 4, SIMPLE, SIMPLE, levels=IQ4_LEVELS, stretch=(-0.2, 0.25, 14)),
    "iq4_xs": Kind(
        23, 136, 4, SUPERBLOCK, 32, levels=IQ4_LEVELS, scale_bits=6, scale_bias=32, stretch=(-0.2, 0.25, 14)
    ),
    "tq1_0": Kind(34, 54, 2, SUPERBLOCK, SUPERBLOCK, low=-1, high=1, stretch=(0.0, 5.0, 41)),
    "tq2_0": Kind(35, 66, 2, SUPERBLOCK, SUPERBLOCK, low=-1, high=1, stretch=(0.0, 5.0, 41)),
    "mxfp4": Kind(39, 17, 4, SIMPLE, SIMPLE, levels=E2M1_DOUBLED, exponent=True),
}
