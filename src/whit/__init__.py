"""whit: quantize any Hugging Face transformer, run it, and measure what was given up."""

from whit.activations import Activations
from whit.arrays import error, quantize_tensor
from whit.calibration import Calibration
from whit.compiled import compile
from whit.data import resolve_model
from whit.errors import WhitError
from whit.formats import Affine, BFloat16, Codebook, Float8, parse_format
from whit.integrations.cache import QuantizedCache
from whit.integrations.in_memory import quantize_model
from whit.integrations.transformers import QuantizationConfig, register
from whit.methods import GPTQ, HQQ, RTN, Blocks, Clip, Refine
from whit.modules import set_deterministic, track_ranges
from whit.pipeline import quantize
from whit.pipeline.job import Options
from whit.recipe import Recipe
from whit.tensor import Format, PackedWeight, QuantizedTensor, bits_per_weight
from whit.training import count_parameters, initialize_adapter, prepare_for_training
from whit.training.settings import Tuning
from whit.transforms import AWQ, SmoothQuant
from whit.tuning import finetune

__version__ = "0.1.0"

register()

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "RTN",
    "Activations",
    "Affine",
    "BFloat16",
    "Blocks",
    "Calibration",
    "Clip",
    "Codebook",
    "Float8",
    "Format",
    "Options",
    "PackedWeight",
    "QuantizationConfig",
    "QuantizedCache",
    "QuantizedTensor",
    "Recipe",
    "Refine",
    "SmoothQuant",
    "Tuning",
    "WhitError",
    "bits_per_weight",
    "compile",
    "count_parameters",
    "error",
    "finetune",
    "initialize_adapter",
    "parse_format",
    "prepare_for_training",
    "quantize",
    "quantize_model",
    "quantize_tensor",
    "resolve_model",
    "set_deterministic",
    "track_ranges",
]
