"""Options of `whit.QuantizationConfig` by the names that bitsandbytes' configuration has for them.

What was typed for `BitsAndBytesConfig` means the same here: `load_in_4bit` is fp4 unless `bnb_4bit_quant_type` says
nf4, `load_in_8bit` is llm.int8 with the threshold 6, and with it whatever is said of 4 bits has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from whit.errors import RecipeError
from whit.named import require

FOUR_BIT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
ADVICE = {
    "llm_int8_has_fp16_weight": "keeps weights in 16 bits, to train them, and whit only codes; "
    "leave it out, and train adapters beside the codes (whit.prepare_for_training), "
    "or all weights (whit train --qat full --format w8a8)",
    "bnb_4bit_quant_storage": "whit stores codes as bytes; "
    "leave it out: for FSDP, whit finetune --shard packs them itself",
}


class BitsandbytesOptions(TypedDict, total=False):
    """With and without bitsandbytes' prefixes."""

    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: str
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: torch.dtype | str | None
    bnb_4bit_quant_storage: torch.dtype | str | None
    outlier_threshold: float | None
    llm_int8_threshold: float | None
    skip_modules: Sequence[str] | None
    llm_int8_skip_modules: Sequence[str] | None
    enable_fp32_cpu_offload: bool
    llm_int8_enable_fp32_cpu_offload: bool
    llm_int8_has_fp16_weight: bool


@dataclass(frozen=True)
class Named:
    """What such options come to. `format` is None where they name none."""

    format: str | None
    double_quant: bool
    compute_dtype: torch.dtype | str | None
    threshold: float | None
    skipped: tuple[str, ...]
    fp32_cpu_offload: bool


def listed(names: Sequence[str] | None) -> Sequence[str]:
    """Names of modules, or a single one; RecipeError for anything else."""
    require(names, str | Sequence | None, "QuantizationConfig: modules to skip", "they must be a list of names")
    return [names] if isinstance(names, str) else names or ()


def understand(options: Mapping[str, Any]) -> Named:
    """RecipeError for options that contradict each other, or that whit has nothing for."""
    four, eight = bool(options.get("load_in_4bit")), bool(options.get("load_in_8bit"))
    if four and eight:
        raise RecipeError("QuantizationConfig: load_in_4bit and load_in_8bit; weights have one format; drop one")
    for name in FOUR_BIT:
        if not (four or eight) and options.get(name):
            raise RecipeError(f"QuantizationConfig: {name} belongs to load_in_4bit=True; add that, or name a format")
    kind = options.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise RecipeError(f"QuantizationConfig: bnb_4bit_quant_type {kind!r}; it must be nf4 or fp4; choose one")
    if options.get("llm_int8_has_fp16_weight"):
        raise RecipeError(f"QuantizationConfig: llm_int8_has_fp16_weight {ADVICE['llm_int8_has_fp16_weight']}")
    if not eight and options.get("bnb_4bit_quant_storage") not in (None, torch.uint8, "uint8"):
        raise RecipeError(f"QuantizationConfig: bnb_4bit_quant_storage: {ADVICE['bnb_4bit_quant_storage']}")
    skips = (options.get("skip_modules"), options.get("llm_int8_skip_modules"))
    return Named(
        format=kind if four else "llm.int8" if eight else None,
        double_quant=four and bool(options.get("bnb_4bit_use_double_quant")),
        compute_dtype=None if eight else options.get("bnb_4bit_compute_dtype"),
        threshold=_threshold(options, four),
        skipped=tuple(name for names in skips for name in listed(names)),
        fp32_cpu_offload=any(options.get(f"{by}enable_fp32_cpu_offload") for by in ("", "llm_int8_")),
    )


def _threshold(options: Mapping[str, Any], four: bool) -> float | None:
    """Of outliers; with 4 bits bitsandbytes' own configuration takes one too, and it changes nothing there."""
    given = (options.get("outlier_threshold"), None if four else options.get("llm_int8_threshold"))
    thresholds = {threshold for threshold in given if threshold is not None}
    if len(thresholds) > 1:
        raise RecipeError(
            "QuantizationConfig: outlier_threshold and llm_int8_threshold differ; they are one option; give one"
        )
    return next(iter(thresholds), None)
