"""Options of other libraries' configurations, given to `whit.QuantizationConfig`: what says the same here.

Those of bitsandbytes are taken as they are (`bitsandbytes_names`). docs/tutorial/coming.md has the same as a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whit.errors import RecipeError

CALIBRATED = (
    "whit.quantize(MODEL, OUT, whit.Recipe(whit.GPTQ(), [('*', 'int4-g128')]), calibration=whit.Calibration(TEXTS))"
)
SAYS = {
    "a format's name says it; write one, such as 'int4-g128' or 'int4-g64-asym'": (
        "bits", "w_bit", "nbits", "num_bits", "group_size", "q_group_size", "sym", "symmetric", "zero_point",
        "quant_type", "quant_type_kwargs", "weights", "weight_block_size", "quantization_mode", "linear_class",
    ),
    f"codes are chosen by data before a model is loaded; write {CALIBRATED}": ("dataset", "damp_percent", "desc_act"),
    "act_order of whit.GPTQ() keeps the original groups; leave it out": ("act_group_aware", "static_groups"),
    "blocks always see what the quantized blocks before them give; leave it out": ("true_sequential",),
    "whit.Calibration has samples and context": ("model_seqlen", "nsamples", "seqlen", "iters"),
    "the tokenizer is read from the model's folder; leave it out": ("tokenizer", "pad_token_id"),
    "blocks are found without it; leave it out": ("block_name_to_quantize", "module_name_preceding_first_block"),
    "windows are as many as fit the memory (whit.Options(input_memory=...)); leave it out": (
        "batch_size", "cache_block_outputs",
    ),
    "rules say it, pairs of a glob and a format: rules=[('*.mlp.*', 'int3-g64'), ('lm_head', 'int8')]": (
        "dynamic_config", "dynamic", "modules_in_block_to_quantize", "modules_to_convert", "config_groups",
        "include_input_output_embeddings", "untie_embedding_weights", "expert_dtype",
    ),
    "modules_to_not_convert says it": ("ignore", "exclude", "modules_to_exclude", "ignored_layers"),
    "activations says it: 'int8' or 'fp8'": ("activation_scheme", "activation_scale_ub", "input_activations"),
    "keys and values are held by whit.QuantizedCache; leave it out": ("kv_cache_scheme", "kv_cache"),
    "whit chooses the kernel by what the machine has (whit doctor); leave it out": (
        "backend", "version", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "max_input_length",
        "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "run_compressed", "use_optimized_inference", "scale_fmt",
    ),
    "codes are bytes, and groups lie along the inputs; leave it out": ("view_as_float", "axis", "offload_meta"),
    "the kind of file is chosen when one is written: whit convert MODEL OUT --export gptq": (
        "format", "checkpoint_format", "meta", "quantization_status", "global_compression_ratio", "quant_method",
    ),
    "model.dequantize() gives a loaded model's floats; leave it out": ("dequantize",),
}  # fmt: skip
ANSWERS = {name: answer for answer, names in SAYS.items() for name in names}


def check_own(config: Any) -> None:
    """RecipeError for another library's configuration, or one as a dict, in the place of a format."""
    options = config if isinstance(config, Mapping) else None
    if options is None and not hasattr(config, "quant_method"):
        return
    kind = "a dict of options" if options is not None else type(config).__name__
    typed = "'int4-g128'"
    if _method(config) == "bitsandbytes":
        eight = options.get("load_in_8bit") if options is not None else config.load_in_8bit
        typed = "load_in_8bit=True" if eight else "load_in_4bit=True, bnb_4bit_quant_type='nf4'"
    raise RecipeError(
        f"QuantizationConfig: {kind} is not a format; give the options themselves: "
        f"whit.QuantizationConfig({typed}, ...)"
    )


def _method(config: Any) -> Any:
    return config.get("quant_method") if isinstance(config, Mapping) else config.quant_method
