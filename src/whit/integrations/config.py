"""`whit.QuantizationConfig`: what `from_pretrained(..., quantization_config=...)` takes, and config.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from whit.errors import FormatError, RecipeError
from whit.export.whit import QUANT_METHOD, quantization_config
from whit.formats import parse_format
from whit.formats.ggml.mixes import ONLY_MIXES
from whit.layouts import layout_named
from whit.methods import Method
from whit.recipe import Recipe
from whit.tensor import Format

KEYS = {"quant_method", "layout", "version", "method", "transform", "mix", "rules", "formats", "compute_dtype"}


class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantize while loading.

    `format` is a shorthand ("nf4", "int4-g128-asym", or a mix: "q4_k_m"), a Format, or a whole Recipe; `rules` are
    pairs (glob over module names, format) that come after it; `method` a name ("rtn", "clip", "hqq") or a Method that
    needs no data.
    `double_quant` stores a codebook format's absmax in 8 bits. Linears multiply in `compute_dtype` (as their input
    comes unless given). Modules named in `modules_to_not_convert` (or `skip_modules`) are kept, with all inside them.
    Raises FormatError and RecipeError.
    """

    def __init__(
        self,
        format: str | Format | Recipe = "int4-g128",
        *,
        method: str | Method | None = None,
        rules: Sequence[tuple[str, str | Format]] = (),
        double_quant: bool = False,
        compute_dtype: torch.dtype | str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        skip_modules: Sequence[str] | None = None,
    ) -> None:
        given = format if isinstance(format, Recipe) else Recipe(method, [("*", _double(format, double_quant))])
        if given is format and (method is not None or double_quant):
            raise RecipeError("QuantizationConfig: a Recipe has its own method and formats; set them there")
        skipped = [*(modules_to_not_convert or ()), *(skip_modules or ())]
        kept = [(pattern, "bf16") for name in skipped for pattern in _patterns(name)]
        self.quant_method = QUANT_METHOD
        self.layout = "bits"
        self.recipe = Recipe(given.method, [*given.rules, *rules, *kept], given.transform, given.mix)
        self.compute_dtype = _dtype(compute_dtype)
        self.formats: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; `from_dict` gives the same configuration back."""
        formats = {name: parse_format(spec) for name, spec in self.formats.items()}
        values = {**quantization_config(self.recipe, formats), "layout": self.layout}
        if self.compute_dtype is not None:
            values["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Raises RecipeError for keys or versions that this whit does not know, FormatError for a layout."""
        if unknown := sorted(set(config_dict) - KEYS):
            raise RecipeError(f"quantization_config: key {unknown[0]!r} is not known; update whit to read this model")
        kept = ("version", "method", "transform", "mix", "rules")
        recipe = {key: config_dict[key] for key in kept if key in config_dict}
        config = cls(Recipe.from_dict(recipe, "quantization_config"), compute_dtype=config_dict.get("compute_dtype"))
        config.layout = layout_named(str(config_dict.get("layout", "bits"))).name
        config.formats = {str(name): str(spec) for name, spec in dict(config_dict.get("formats", {})).items()}
        return (config, kwargs) if return_unused_kwargs else config


def _double(format: str | Format, double_quant: bool) -> Format | str:
    if format in ONLY_MIXES and not double_quant:
        return str(format)
    parsed = parse_format(format)
    if not double_quant:
        return parsed
    if "double_quant" not in {field.name for field in fields(parsed)}:  # type: ignore[arg-type]
        raise FormatError(f"{parsed}: it has no double quantization; use it with nf4, fp4 or another codebook")
    return replace(parsed, double_quant=True)  # type: ignore[type-var]


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(value, str):
        return value
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(f"compute_dtype {value!r}: not a floating-point type; use float32, bfloat16 or float16")
    return found


def _patterns(name: str) -> tuple[str, ...]:
    """Globs for a module of that name anywhere in the model, and for all inside it."""
    return name, f"*.{name}", f"{name}.*", f"*.{name}.*"
