"""What of a configuration goes into the graph, and genai_config.json, by which onnxruntime-genai runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whit.errors import UnsupportedModelError
from whit.export.onnx.graph import Shape

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
ROTARIES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length


def shape_of(config: Any, where: str) -> Shape:
    """UnsupportedModelError where the graph cannot say what the model does."""

    def refuse(what: str, wanted: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{where}: {what} in an onnx file; whit writes {wanted} there; choose another --export"
        )

    if config.model_type not in FAMILY:
        raise refuse(f"model_type {config.model_type}", ", ".join(FAMILY))
    if config.hidden_act not in ("silu", "swish"):
        raise refuse(f"the activation {config.hidden_act}", "silu")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ROTARIES or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(f"rotary embedding of type {rope}", f"whole heads in {', '.join(ROTARIES)}")
    window = getattr(config, "sliding_window", None) or -1
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return Shape(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.rms_norm_eps,
        tuple(window if kind == "sliding_attention" else -1 for kind in kinds),
    )


def rotary_caches(model: Any) -> dict[str, Tensor]:
    """cos and sin of every position (max_position_embeddings, head_width / 2), float32, by transformers' own module."""
    config = model.config
    with torch.device("cpu"):
        rotary = type(model.model.rotary_emb)(config)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), rotary.inv_freq.float())
    scale = rotary.attention_scaling
    return {"cos_cache": angles.cos() * scale, "sin_cache": angles.sin() * scale}


def genai_config(
    config: Mapping[str, Any], generation: Mapping[str, Any], shape: Shape, filename: str
) -> dict[str, Any]:
    """`generation` is generation_config.json's content, empty where there is none."""

    def chosen(key: str, default: Any) -> Any:
        found = generation.get(key)
        return config.get(key, default) if found is None else found

    ends = chosen("eos_token_id", None)
    first = ends[0] if isinstance(ends, list) else ends
    padding, begin = chosen("pad_token_id", None), chosen("bos_token_id", None)
    length = config["max_position_embeddings"]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": shape.head_width,
        "hidden_size": config["hidden_size"],
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
        },
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
    }  # fmt: skip
    return {
        "model": {
            "bos_token_id": 1 if begin is None else begin,
            "context_length": length,
            "decoder": decoder,
            "eos_token_id": ends,
            "pad_token_id": first if padding is None else padding,
            "type": config["model_type"],
            "vocab_size": config["vocab_size"],
        },
        "search": {
            "diversity_penalty": 0.0, "do_sample": bool(chosen("do_sample", False)), "early_stopping": True,
            "length_penalty": 1.0, "max_length": length, "min_length": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
            "num_return_sequences": 1, "past_present_share_buffer": True,
            "repetition_penalty": chosen("repetition_penalty", 1.0), "temperature": chosen("temperature", 1.0),
            "top_k": chosen("top_k", 50), "top_p": chosen("top_p", 1.0),
        },
    }  # fmt: skip
