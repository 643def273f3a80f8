"""Register whit with transformers: `import whit` is enough for `from_pretrained` to know its checkpoints."""

from __future__ import annotations

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from whit.export.whit import QUANT_METHOD
from whit.integrations.config import QuantizationConfig
from whit.integrations.quantizer import WhitQuantizer


def register() -> None:
    """Tell transformers which classes stand behind `quant_method: whit`; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuantizationConfig)
        register_quantizer(QUANT_METHOD)(WhitQuantizer)


__all__ = ["QuantizationConfig", "WhitQuantizer", "register"]
