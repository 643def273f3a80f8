"""whit: quantize any Hugging Face transformer, run it, and measure what was given up.

    import whit
    whit.quantize("whit:model", "out", "int4-g128")                 # a folder to a folder, block by block
    AutoModelForCausalLM.from_pretrained("out")                     # transformers reads it after `import whit`
    AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=whit.QuantizationConfig("nf4"))   # on the fly
    whit.quantize_model(model, "int8")                              # in memory, any nn.Module
    q = whit.quantize_tensor(x, "int4-g64-asym"); q.dequantize()    # one tensor or array

What to quantize to and how: `Recipe` (a method: `RTN`, `Clip`, `HQQ`, `GPTQ`, `Refine`, `Blocks`; a transform: `AWQ`,
`SmoothQuant`; rules with a `Format`: `Affine`, `Codebook`, `Float8`, `BFloat16`, or their names, `parse_format`),
`Calibration`, `Activations`, `Options`. Values: `QuantizedTensor`, `PackedWeight`, `error`, `bits_per_weight`. Running:
`compile`, `QuantizedCache`, `set_deterministic`, `track_ranges`. Training adapters: `prepare_for_training`,
`initialize_adapter`, `finetune` with `Tuning`, `count_parameters`. All errors are a `WhitError`, one sentence each.
`resolve_model` gives the folder of the model that ships with whit.

Measuring, converting, merging and training for a format are commands (`whit --help`); in Python `whit.evaluation`,
`whit.pipeline.transcode`, `whit.merging` and `whit.qat`.
"""

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
