"""`whit.QuantizationConfig`: what `from_pretrained(..., quantization_config=...)` takes, and config.json holds."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import Unpack

from whit.activations import Activations, parse_activations
from whit.errors import FormatError, RecipeError
from whit.export.whit import QUANT_METHOD, quantization_config
from whit.formats import parse_format
from whit.formats.numeric import dtype_name
from whit.integrations.bitsandbytes_names import BitsandbytesOptions, listed, understand
from whit.integrations.elsewhere import ANSWERS, check_own
from whit.integrations.skipped import kept_rules, with_kept
from whit.layouts import layout_named
from whit.methods import Method
from whit.recipe import Recipe
from whit.recipe.stored import KEYS as RECIPE_KEYS
from whit.tensor import Format

DEFAULT = "int4-g128"
KEYS = RECIPE_KEYS | {
    "quant_method", "layout", "formats", "inputs", "compute_dtype", "deterministic", "modules_to_not_convert",
}  # fmt: skip


class FurtherOptions(BitsandbytesOptions, total=False):
    """What else a configuration takes."""

    deterministic: bool


class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is quantized while it is loaded: `from_pretrained(MODEL,
    quantization_config=QuantizationConfig("nf4"))`.

    - `format`: a shorthand ("nf4", "int8", "int4-g128-asym", or a mix: "q4_k_m"), a scheme ("w8a8", "llm.int8"), a
      Format, or a whole Recipe. `rules`: pairs (glob over module names, format) that follow it.
    - `method`: a name ("rtn", "clip", "hqq") or a Method that needs no data. `double_quant` stores a codebook format's
      absmax in 8 bits.
    - `activations` ("int8", "fp8") quantizes the inputs of linears as well. `outlier_threshold`: columns that reach it
      stay in 16 bits, as in bitsandbytes (llm.int8's is 6.0; 0: none do).
    - `compute_dtype`: the type in which linears multiply; their input's unless given.
    - `modules_to_not_convert` (or `skip_modules`): names of modules that are kept, with everything inside them; as in
      transformers also how a name ends, or a regular expression for how it begins.
      `enable_fp32_cpu_offload` keeps what a device map puts on disk, or on the CPU beside a GPU (then in float32),
      unquantized.
    - `deterministic`: a row of a product has the same bits whatever batch it is in (`whit.set_deterministic`).

    The options of BitsAndBytesConfig mean what they mean there: `load_in_4bit=True` with `bnb_4bit_quant_type="nf4"`,
    `bnb_4bit_use_double_quant` and `bnb_4bit_compute_dtype`, or `load_in_8bit=True`. Raises FormatError and
    RecipeError.
    """

    def __init__(
        self,
        format: str | Format | Recipe | None = None,
        *,
        method: str | Method | None = None,
        rules: Sequence[tuple[str, str | Format]] = (),
        double_quant: bool = False,
        activations: str | Activations | None = None,
        compute_dtype: torch.dtype | str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        **named: Unpack[FurtherOptions],
    ) -> None:
        if unknown := sorted(set(named) - set(FurtherOptions.__annotations__)):
            raise RecipeError(f"QuantizationConfig: option {unknown[0]!r} does not exist; {_instead_of(unknown[0])}")
        check_own(format)
        other = understand(named)
        if format is not None and other.format is not None:
            raise RecipeError(f"QuantizationConfig: {format}, and an option means {other.format}; give one of the two")
        double_quant = double_quant or other.double_quant
        if not isinstance(format, Recipe):
            given = _recipe(format or other.format or DEFAULT, method, double_quant, activations)
        elif method is not None or double_quant or activations is not None:
            raise RecipeError(
                "QuantizationConfig: a Recipe has its own method, formats and activations; set them there"
            )
        else:
            given = format
        if other.threshold is not None:
            given = _with_threshold(given, other.threshold)
        self.skipped = (*listed(modules_to_not_convert), *other.skipped)
        self.quant_method = QUANT_METHOD
        self.layout = "bits"
        self.recipe = given.with_rules([*given.rules, *rules, *kept_rules(self.skipped)], given.mix)
        self.compute_dtype = _dtype(other.compute_dtype if compute_dtype is None else compute_dtype)
        self.deterministic = bool(named.get("deterministic"))
        self.formats: dict[str, str] = {}
        self.inputs: dict[str, str] = {}
        self.fp32_cpu_offload = other.fp32_cpu_offload

    def settle(self, model: nn.Module) -> None:
        """Complete the recipe by what names of modules to keep mean in a model (`skipped`)."""
        if self.skipped:
            self.recipe, self.skipped = with_kept(self.recipe, self.skipped, model), ()

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; `from_dict` gives the same configuration back."""
        formats = {name: parse_format(spec) for name, spec in self.formats.items()}
        inputs = {name: parse_activations(spec) for name, spec in self.inputs.items()}
        values = {**quantization_config(self.recipe, formats, inputs), "layout": self.layout}
        if self.compute_dtype is not None:
            values["compute_dtype"] = dtype_name(self.compute_dtype)
        if self.deterministic:
            values["deterministic"] = True
        if self.skipped:  # until a model is loaded
            values["modules_to_not_convert"] = list(self.skipped)
        return values

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what `to_dict` gives, or from options by name ({"quant_method": "whit", "format": "int4-g128"}).

        Raises RecipeError for keys or versions that this whit does not know, FormatError for a layout.
        """
        if "version" not in config_dict:
            options = {key: value for key, value in config_dict.items() if key != "quant_method"}
            return (cls(**options), kwargs) if return_unused_kwargs else cls(**options)
        if unknown := sorted(set(config_dict) - KEYS):
            raise RecipeError(f"quantization_config: key {unknown[0]!r} is not known; update whit to read this model")
        recipe = {key: config_dict[key] for key in RECIPE_KEYS if key in config_dict}
        config = cls(
            Recipe.from_dict(recipe, "quantization_config"),
            compute_dtype=config_dict.get("compute_dtype"),
            deterministic=config_dict.get("deterministic", False),
        )
        config.skipped = tuple(listed(config_dict.get("modules_to_not_convert")))
        config.layout = layout_named(str(config_dict.get("layout", "bits"))).name
        config.formats = {str(name): str(spec) for name, spec in dict(config_dict.get("formats", {})).items()}
        config.inputs = {str(name): str(spec) for name, spec in dict(config_dict.get("inputs", {})).items()}
        return (config, kwargs) if return_unused_kwargs else config


def _instead_of(option: str) -> str:
    """What to write where an option does not exist."""
    if option in ANSWERS:
        return ANSWERS[option]
    known = [*inspect.signature(QuantizationConfig).parameters, *FurtherOptions.__annotations__]
    near = difflib.get_close_matches(option, known, n=1)
    return f"did you mean {near[0]}?" if near else "leave it out"


def _recipe(
    format: str | Format, method: str | Method | None, double_quant: bool, activations: str | Activations | None
) -> Recipe:
    return Recipe(method, [("*", _double(format) if double_quant else format)], activations=activations)


def _with_threshold(recipe: Recipe, threshold: float) -> Recipe:
    """The recipe with another threshold for outliers."""
    how = recipe.activations
    if how is None:
        raise RecipeError("outlier_threshold: activations are not quantized; they must be; use llm.int8, or drop it")
    how = replace(how, threshold=threshold)  # RecipeError for one that is no threshold
    return recipe.changed(activations=how)


def _double(format: str | Format) -> Format:
    parsed = parse_format(format)
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
