"""How the inputs of packed linears are quantized while a model runs: one value, said by a shorthand.

    int8                         dynamic: every row (token) of an input has a scale of its own, S = max|x| / 127
    int8-tensor                  dynamic, one scale for the whole input
    int8-g32                     dynamic, a scale per row and 32 columns: for weights of any 8 bits and fewer
    int8-asym                    with a zero point: x = (code - zero_point) S, codes from -128 to 127
    int8-outliers, -outliers4.5  LLM.int8(): columns in which any |x| reaches the threshold (6) stay in 16 bits
    int8-exact8, int8-g32-exact4 the columns with the largest |x| on calibration data stay floats
    int8-static                  one scale per linear, from calibration; its range is minmax unless named:
    int8-static-percentile99.9, -mse, -entropy, -moving0.01
    fp8, fp8-tensor, fp8-static  the same in E4M3, S = max|x| / 448

Only linears whose weights can enter such a product as they are take part (`Activations.fits`): integers with one
scale per row for int8, fp8 for fp8, all quantized ones for int8-g32. All others multiply floats, as without.

For int8-g32 integers stay what they are, and the levels of a codebook of up to 16 (nf4, fp4) are rounded to n-ths, n up
to 127 (`codebook.byte_levels`), that sums of products may be integers: beside what a linear's inputs lose (.5 %) that
takes .5 % of its output for nf4 and .35 % for fp4, whose own rounding of weights takes 9 and 12 %. With exact columns
products are floats and levels the format's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import torch

from whit.capabilities import product_dtype, rotation
from whit.errors import RecipeError
from whit.tensor import Activated, Format, TensorSpec

KINDS = ("dynamic", "static")
GRANULARITIES = ("token", "tensor", "group")
RANGES = ("minmax", "percentile", "mse", "entropy", "moving")
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # codes, where they have no zero point
THRESHOLD = 6.0  # of LLM.int8()
PERCENTILE, MOMENTUM = 99.99, 0.01
PATTERN = re.compile(
    r"(?P<type>int8|fp8)(?P<tensor>-tensor)?(?P<group>-g32)?"
    r"(?P<static>-static(?:-(?P<range>minmax|percentile|mse|entropy|moving)(?P<value>[0-9.]+)?)?)?"
    r"(?P<outliers>-outliers(?P<threshold>[0-9.]+)?)?(?:-exact(?P<exact>[1-9][0-9]*))?(?P<asym>-asym)?"
)
SCHEMES = {  # names of a format and activations together
    "llm.int8": ("int8-absmax", "int8-outliers"),
    "w8a8": ("int8", "int8"),
    "w8a8-static": ("int8", "int8-static"),
    "w4a8": ("int4-channel", "int8"),
    "w4a8-static": ("int4-channel", "int8-static"),
    "w8a8-fp8": ("fp8", "fp8"),
    "llm.int8+h64": ("int8-absmax+h64", "int8-outliers"),
    "w8a8+h64": ("int8+h64", "int8"),
    "w8a8-static+h64": ("int8+h64", "int8-static"),
    "w4a8+h64": ("int4-channel+h64", "int8"),
}
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {  # what the numbers of Activations must be
    "threshold": (lambda value: 0 <= value < math.inf, "at least 0 (0: no column is an outlier; 6 is usual)"),
    "percentile": (lambda value: 50 < value <= 100, "above 50 and at most 100"),
    "momentum": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "exact": (lambda value: value >= 0 and float(value).is_integer(), "whole and at least 0"),
}
EXAMPLES = ("int8", "int8-g32", "int8-g32-exact4", "int8-asym", "int8-outliers", "int8-static-mse", "fp8")


@dataclass(frozen=True)
class Activations:
    """How the inputs of linears are quantized. `parse_activations(str(a)) == a`.

    - `kind`: dynamic (scales from the input itself) or static (from calibration, one per linear).
    - `type`: int8 or fp8. `symmetric`: without a zero point.
    - `granularity`: what shares a scale: token, tensor, or group (32 columns of a token); static is always tensor.
    - `threshold`: above 0, columns of an input that hold an |x| of at least this are multiplied in the input's own type
      (dynamic int8 per token only).
    - `range`: how calibration chooses a static range. `percentile` (of |x| or of either end, in per cent) and
      `momentum` are options of two of the ways.
    - `exact`: so many columns, those with the largest |x| on calibration data, stay floats and count in no scale. Where
      the low end of the rest is much nearer to 0 than the high end (a GELU's output), codes of dynamic int8 begin
      there.

    RecipeError for what does not go together.
    """

    kind: str = "dynamic"
    type: str = "int8"
    symmetric: bool = True
    granularity: str = ""
    threshold: float = 0.0
    range: str = "minmax"
    percentile: float = PERCENTILE
    momentum: float = MOMENTUM
    exact: int = 0

    def __post_init__(self) -> None:
        if not self.granularity:
            object.__setattr__(self, "granularity", "tensor" if self.kind == "static" else "token")
        for name, known in (("kind", KINDS), ("type", tuple(TYPES)), ("granularity", GRANULARITIES), ("range", RANGES)):
            if (value := getattr(self, name)) not in known:
                raise RecipeError(f"activations: {name} {value!r} is not known; it must be one of {', '.join(known)}")
        for name, (fits, must) in NUMBERS.items():
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float) or not fits(value):
                raise RecipeError(f"activations: {name} {value!r}; it must be a number, {must}; correct it")
        is_plain = (self.kind, self.type, self.symmetric) == ("dynamic", "int8", True)
        if self.granularity == "group" and not is_plain:
            raise RecipeError("activations: in groups of columns they must be dynamic, symmetric int8; use int8-g32")
        if self.kind == "static" and self.granularity != "tensor":
            raise RecipeError("activations: static scales per token; a linear has only one; use granularity tensor")
        if self.type == "fp8" and not self.symmetric:
            raise RecipeError("activations: fp8 with a zero point; floats have none; use int8, or leave asym out")
        if self.threshold and not (is_plain and self.granularity == "token"):
            raise RecipeError(
                "activations: outlier columns are for dynamic, symmetric int8 per token; "
                "use int8-outliers, or a threshold of 0"
            )
        if self.exact and (not is_plain or self.threshold or self.granularity == "tensor"):
            raise RecipeError(
                "activations: exact columns are for dynamic, symmetric int8 per token or per 32 columns; use "
                "int8-exact8 or int8-g32-exact4"
            )

    def __str__(self) -> str:
        text = self.type + ("-tensor" if self.granularity == "tensor" and self.kind == "dynamic" else "")
        text += "-g32" if self.granularity == "group" else ""
        if self.kind == "static":
            value = {"percentile": _digits(self.percentile), "moving": _digits(self.momentum)}.get(self.range, "")
            text += "-static" + ("" if self.range == "minmax" else f"-{self.range}{value}")
        if self.threshold:
            text += "-outliers" + ("" if self.threshold == THRESHOLD else _digits(self.threshold))
        text += f"-exact{self.exact}" if self.exact else ""
        return text + ("" if self.symmetric else "-asym")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the codes."""
        return TYPES[self.type]

    @property
    def needs_stats(self) -> bool:
        """Whether calibration is needed."""
        return self.kind == "static" or self.exact > 0

    @classmethod
    def parse(cls, spec: str) -> Activations:
        """From a shorthand; RecipeError for what is not known."""
        return parse_activations(spec)

    def fits(self, format: Format) -> bool:
        """Whether a weight in this format can be multiplied by such inputs: its codes are numbers of the same type."""
        if self.exact and rotation(format):  # columns are chosen as they come
            return False
        codes: Format = getattr(format, "base", format) if rotation(format) else format  # inputs are rotated first
        return format.bits <= 8 if self.granularity == "group" else product_dtype(codes) == self.dtype

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What a packed weight holds beside its layout's tensors: static scales, and zero points where there are.

        With exact columns which ones, and the low end from which codes count, minus infinity where they are symmetric.
        """
        if self.exact:
            columns = TensorSpec((self.exact,), torch.int32)
            return {"input_columns": columns, "input_low": TensorSpec((1,), torch.float32)}
        if self.kind != "static":
            return {}
        scale = {"input_scale": TensorSpec((1,), torch.float32)}
        return scale if self.symmetric else {**scale, "input_zero_point": TensorSpec((1,), torch.int8)}

    def to_dict(self) -> dict[str, Any]:
        """Every option by name."""
        return asdict(self)


def parse_activations(spec: str | Mapping[str, Any] | Activated) -> Activations:
    """From a shorthand or from options by name, or as it is; RecipeError for what is not known."""
    if isinstance(spec, Activations):
        return spec
    if isinstance(spec, Mapping):
        if unknown := sorted(set(spec) - set(Activations.__dataclass_fields__)):
            known = ", ".join(Activations.__dataclass_fields__)
            raise RecipeError(f"activations: option {unknown[0]!r} does not exist; its options are: {known}")
        return Activations(**spec)
    found = PATTERN.fullmatch(text := str(spec).strip().lower())
    if found is None or sum(bool(found[name]) for name in ("tensor", "static", "group")) > 1:
        raise RecipeError(f"{text!r} says no way to quantize activations; write for example {', '.join(EXAMPLES)}")
    options: dict[str, Any] = {"type": found["type"], "symmetric": not found["asym"]}
    if found["static"]:
        options |= {"kind": "static", "range": found["range"] or "minmax"}
    elif found["tensor"]:
        options["granularity"] = "tensor"
    elif found["group"]:
        options["granularity"] = "group"
    if found["exact"]:
        options["exact"] = int(found["exact"])
    if found["outliers"]:
        options["threshold"] = _number(text, found["threshold"], THRESHOLD)
    if found["value"]:
        name = {"percentile": "percentile", "moving": "momentum"}.get(found["range"])
        if name is None:
            raise RecipeError(f"{text!r}: {found['range']} takes no number; percentile and moving do; leave it out")
        options[name] = _number(text, found["value"], 0.0)
    return Activations(**options)


def _digits(value: float) -> str:
    """All digits of a number, without an exponent, as `_number` reads it."""
    return format(Decimal(repr(float(value))).normalize(), "f")


def _number(text: str, digits: str | None, default: float) -> float:
    try:
        return float(digits) if digits else default
    except ValueError:
        raise RecipeError(f"{text!r}: {digits} is not a number; write one such as 99.9") from None
