"""The transformers config that a GGUF file's key-values describe: the inverse of `metadata`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from whit.errors import CheckpointError, UnsupportedModelError
from whit.export.gguf.architectures import ARCHITECTURES, Architecture
from whit.export.gguf.metadata import llama3_divisors

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL_CONTEXT = 8192  # of every Llama 3; the file has only what follows from it
LOCAL_THETA = 10000.0  # of Gemma 3's sliding layers
REQUIRED = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "context_length": "max_position_embeddings",
}  # fmt: skip
GPT2 = {
    "embedding_length": "n_embd", "block_count": "n_layer", "feed_forward_length": "n_inner",
    "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
}  # fmt: skip


def config_of(
    metadata: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]],
    frequencies: Mapping[str, Tensor], where: str,
) -> Any:  # fmt: skip
    """`shapes` are the tensors' own, `frequencies` the divisors of the rotary ones that the file has, by name."""
    model_type = next(name for name, known in ARCHITECTURES.items() if known == architecture)
    prefix = f"{architecture.name}."
    facts = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    values: dict[str, Any] = {}
    for key, name in (GPT2 if architecture.name == "gpt2" else REQUIRED).items():
        if not isinstance(facts.get(key), int | float) or facts[key] <= 0:
            raise CheckpointError(f"{where}: {prefix}{key} is {facts.get(key)!r}; it must be a positive number; "
                                  "get another copy")  # fmt: skip
        values[name] = facts[key]
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where}: token_embd.weight is missing; every model has it; get another copy")
    values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    for short, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        values[f"{short}_token_id"] = number if isinstance(number, int) and number < values["vocab_size"] else None
    if architecture.name != "gpt2":
        _llama_like(values, facts, architecture, shapes)
        values["rope_parameters"] = _rope(values, facts, architecture, frequencies, where)
    return AutoConfig.for_model(model_type, **values)


def _llama_like(
    values: dict[str, Any], facts: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = facts.get("attention.head_count_kv", heads)
    values["head_dim"] = facts.get("attention.key_length") or values["hidden_size"] // heads
    values["attention_bias"] = "blk.0.attn_q.bias" in shapes
    values["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if architecture.name.startswith("gemma"):
        large = values["num_hidden_layers"] in (46, 62)
        values["query_pre_attn_scalar"] = values["hidden_size"] // heads if large else values["head_dim"]
        values["attn_logit_softcapping"] = facts.get("attn_logit_softcapping")
        values["final_logit_softcapping"] = facts.get("final_logit_softcapping")
    if architecture.experts:
        _experts(values, facts, architecture)
    if window := facts.get("attention.sliding_window"):
        values["sliding_window"] = window
    if architecture.name == "phi3":
        original = facts.get("rope.scaling.original_context_length", values["max_position_embeddings"])
        values["original_max_position_embeddings"] = original
        values["partial_rotary_factor"] = facts.get("rope.dimension_count", values["head_dim"]) / values["head_dim"]


def _experts(values: dict[str, Any], facts: Mapping[str, Any], architecture: Architecture) -> None:
    count = "num_local_experts" if architecture.name in ("llama", "gpt-oss") else "num_experts"
    values |= {count: facts["expert_count"], "num_experts_per_tok": facts.get("expert_used_count", 2)}
    if architecture.name == "gpt-oss":
        values["intermediate_size"] = facts.get("expert_feed_forward_length", values["intermediate_size"])
    elif architecture.name != "llama":
        values |= {"norm_topk_prob": architecture.name != "qwen2moe", "decoder_sparse_step": 1, "mlp_only_layers": []}
        values["moe_intermediate_size"] = facts.get("expert_feed_forward_length", values["intermediate_size"])
    if shared := facts.get("expert_shared_feed_forward_length"):
        values["shared_expert_intermediate_size"] = shared


def _rope(
    values: Mapping[str, Any], facts: Mapping[str, Any], architecture: Architecture,
    frequencies: Mapping[str, Tensor], where: str,
) -> dict[str, Any]:  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(facts.get("rope.freq_base", 10000.0))}
    if architecture.name == "phi3":
        rope["partial_rotary_factor"] = values["partial_rotary_factor"]
    kind = facts.get("rope.scaling.type", "none")
    if architecture.name == "phi3" and {"long", "short"} <= frequencies.keys():
        factors = {f"{kind}_factor": frequencies[kind].tolist() for kind in ("long", "short")}
        attention = float(facts.get("rope.scaling.attn_factor", 1.0))
        original = values["original_max_position_embeddings"]
        rope |= {"rope_type": "longrope", **factors, "attention_factor": attention}
        rope["original_max_position_embeddings"] = original
    elif "freqs" in frequencies:
        rope |= _llama3(rope, int(values["head_dim"]), frequencies["freqs"], where)
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(facts["rope.scaling.factor"])}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = facts["rope.scaling.original_context_length"]
        if architecture.name == "gpt-oss":
            rope["truncate"] = False  # as it is published, which the file does not say
    elif kind != "none":
        raise UnsupportedModelError(
            f"{where}: rope scaling {kind!r}; whit reads linear and yarn; use the original model"
        )
    if architecture.name == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(facts.get("rope.freq_base_swa", LOCAL_THETA))}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _llama3(rope: Mapping[str, Any], width: int, frequencies: Tensor, where: str) -> dict[str, Any]:
    """Llama 3's parameters, recognised by what follows from them."""
    found = {
        **LLAMA3, "rope_theta": rope["rope_theta"], "factor": float(frequencies.max()),
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }  # fmt: skip
    divisors = llama3_divisors(found, width)
    if divisors.shape != frequencies.shape or not torch.allclose(divisors, frequencies, rtol=1e-4):
        raise UnsupportedModelError(
            f"{where}: rope_freqs are not those of a Llama 3; they must be; use the original model"
        )
    return found
