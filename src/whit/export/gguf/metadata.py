"""What a GGUF file says of a model's shape: the key-values under `<architecture>.`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.errors import UnsupportedModelError
from whit.export.gguf.architectures import Architecture
from whit.export.gguf.header import Info, Value
from whit.tensor import TensorSpec

F32 = 0
QUANTIZATION_VERSION = 2  # of ggml's formats


def metadata_of(config: Any, architecture: Architecture, folder: Path) -> dict[str, Value]:
    """All key-values but the tokenizer's and the file type."""
    shape = _gpt2(config) if architecture.name == "gpt2" else _llama_like(config, architecture, str(folder))
    return {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": folder.resolve().name,
        "general.quantization_version": QUANTIZATION_VERSION,
        **{f"{architecture.name}.{key}": value for key, value in shape.items()},
    }


def _gpt2(config: Any) -> dict[str, Value]:
    return {
        "vocab_size": config.vocab_size, "context_length": config.n_positions, "embedding_length": config.n_embd,
        "block_count": config.n_layer, "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head, "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }  # fmt: skip


def _llama_like(config: Any, architecture: Architecture, where: str) -> dict[str, Value]:
    heads = config.num_attention_heads
    width = head_width(config)
    rope = rope_parameters(config)
    shape: dict[str, Value] = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size, "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width, "attention.value_length": width,
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }  # fmt: skip
    shape |= _longrope(config, rope) if _is_longrope(architecture.name, rope) else _scaling(rope, where)
    if architecture.experts:
        shape |= _experts(config, architecture.name, where)
    if architecture.name.startswith("gemma"):
        shape |= _gemma(config, width, where)
    elif architecture.name == "gpt-oss":
        shape |= _gpt_oss(config, where)
    elif architecture.name == "phi3":
        shape["attention.sliding_window"] = config.sliding_window or 0
        shape["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return shape


def _experts(config: Any, name: str, where: str) -> dict[str, Value]:
    """What llama.cpp is told of experts; what it computes by the architecture's name must be what the model does."""
    normed = bool(getattr(config, "norm_topk_prob", True))
    dense = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
    if dense or normed != (name != "qwen2moe"):
        what = "blocks without experts" if dense else f"norm_topk_prob {normed}"
        raise UnsupportedModelError(
            f"{where}: {what}; llama.cpp computes {name} with experts in every block and norm_topk_prob "
            f"{name != 'qwen2moe'}; choose another --export"
        )
    count = getattr(config, "num_local_experts", None) or config.num_experts
    shape: dict[str, Value] = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    for key, value in (
        ("expert_feed_forward_length", getattr(config, "moe_intermediate_size", None)),
        ("expert_shared_feed_forward_length", getattr(config, "shared_expert_intermediate_size", None)),
    ):
        if value is not None:
            shape[key] = value
    return shape


def _gpt_oss(config: Any, where: str) -> dict[str, Value]:
    """llama.cpp has the activation's constants and the turns of sliding and full attention compiled in."""
    turns = ["full_attention" if i % 2 else "sliding_attention" for i in range(config.num_hidden_layers)]
    constants = (getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0))
    if constants != (1.702, 7.0) or list(config.layer_types) != turns:
        what = f"swiglu_alpha and swiglu_limit {constants}" if constants != (1.702, 7.0) else "other layer_types"
        raise UnsupportedModelError(
            f"{where}: {what}; llama.cpp computes gpt-oss with 1.702 and 7.0, and with sliding and full attention by "
            "turns; choose another --export"
        )
    return {
        "attention.sliding_window": config.sliding_window, "expert_feed_forward_length": config.intermediate_size,
    }  # fmt: skip


def _gemma(config: Any, width: int, where: str) -> dict[str, Value]:
    """llama.cpp knows the scale of the attention by the size of the model: only 27B differs from the head's width."""
    large = config.num_hidden_layers in (46, 62)
    scale = config.hidden_size // config.num_attention_heads if large else width
    if config.query_pre_attn_scalar != scale:
        raise UnsupportedModelError(
            f"{where}: query_pre_attn_scalar {config.query_pre_attn_scalar}; llama.cpp computes with {scale} here; "
            "choose another --export"
        )
    shape: dict[str, Value] = {"attention.sliding_window": config.sliding_window}
    for key, value in (
        ("attn_logit_softcapping", config.attn_logit_softcapping),
        ("final_logit_softcapping", config.final_logit_softcapping),
    ):
        if value is not None:
            shape[key] = float(value)
    return shape


def head_width(config: Any) -> int:
    """Columns of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_parameters(config: Any) -> dict[str, Any]:
    """Of the layers that attend to everything."""
    rope = dict(config.rope_parameters or {})
    return dict(rope.get("full_attention", rope))


def _is_longrope(name: str, rope: Mapping[str, Any]) -> bool:
    return name == "phi3" and rope.get("rope_type") in ("longrope", "su")


def _longrope(config: Any, rope: Mapping[str, Any]) -> dict[str, Value]:
    """The factor of the attention as transformers has it; the divisors are tensors."""
    attention, original = rope.get("attention_factor"), config.original_max_position_embeddings
    factor = rope.get("factor") or config.max_position_embeddings / original
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {"rope.scaling.attn_factor": float(attention)}


def _scaling(rope: dict[str, Any], where: str) -> dict[str, Value]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = int(rope["original_max_position_embeddings"])
        return {
            "rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original,
        }  # fmt: skip
    raise UnsupportedModelError(
        f"{where}: rope type {kind!r} in a gguf file; it must be default, linear, yarn or llama3; "
        "choose another --export"
    )


def constants_of(config: Any) -> dict[Info, bytes]:
    """Tensors that are facts of the config: divisors of the rotary frequencies, Llama 3's and Phi-3's."""
    rope = rope_parameters(config) if getattr(config, "rope_parameters", None) else {}
    if _is_longrope(config.model_type, rope):
        found = {}
        for kind in ("long", "short"):
            factors = torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            shape = tuple(factors.shape)
            named = Info(f"rope_factors_{kind}.weight", shape, F32, TensorSpec(shape, torch.float32))
            found[named] = factors.numpy().tobytes()
        return found
    if rope.get("rope_type") != "llama3":
        return {}
    width = head_width(config)
    values = llama3_divisors(rope, width)
    info = Info("rope_freqs.weight", (width // 2,), F32, TensorSpec((width // 2,), torch.float32))
    return {info: values.numpy().tobytes()}


def llama3_divisors(rope: Mapping[str, Any], width: int) -> Tensor:
    """By what each rotary frequency of a head is divided (width / 2,): what turns seldom, by the whole factor."""
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    original, divisors = rope["original_max_position_embeddings"], []
    for i in range(0, width, 2):
        turns = original * rope["rope_theta"] ** (-i / width) / (2 * math.pi)  # within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(divisors, dtype=torch.float32)
