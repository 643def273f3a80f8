"""Tiny random models of every architecture that whit promises: hidden 64, two blocks, 128 tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers as hf

import whit

COMMON = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
ATTENTION = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2}
DECODER = {**ATTENTION, "intermediate_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**COMMON, "num_attention_heads": 4, "intermediate_size": 128, "pad_token_id": 0}
EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, DECODER),
    "llama-tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {**DECODER, "tie_word_embeddings": True}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, DECODER),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, DECODER),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**DECODER, "head_dim": 16}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**DECODER, "head_dim": 16}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**DECODER, "head_dim": 16}),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, DECODER),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {
        "vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, {
        **COMMON, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {
        **COMMON, "num_attention_heads": 4, "intermediate_size": 128, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**DECODER, "num_local_experts": 4}),
    "qwen2_moe": (hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig, {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, {**EXPERTS, "head_dim": 16}),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, ENCODER),
    "bert-classifier": (hf.BertForSequenceClassification, hf.BertConfig, {**ENCODER, "num_labels": 3}),
    "distilbert": (hf.DistilBertForMaskedLM, hf.DistilBertConfig, {
        "vocab_size": 128, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64,
    }),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, ENCODER),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, {
        "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }),
    "gpt_oss": (hf.GptOssForCausalLM, hf.GptOssConfig, {  # experts lie (in, out)
        **DECODER, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
    }),
    "llama4": (hf.Llama4ForCausalLM, hf.Llama4TextConfig, {  # so they do here, in every second block
        **DECODER, "head_dim": 16, "num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size": 96,
        "intermediate_size_mlp": 128,
    }),
}  # fmt: skip


def tiny_config(architecture: str) -> hf.PretrainedConfig:
    """The configuration of one of ARCHITECTURES."""
    _, config_class, options = ARCHITECTURES[architecture]
    return config_class(**options)


def tiny_model(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """A random model in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture][0](tiny_config(architecture)).to(dtype).eval()
    for parameter in model.parameters():  # norms and biases would all be ones and zeros
        if parameter.dim() == 1:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def save_tiny(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, shard_size: str = "5GB") -> Path:
    """A checkpoint of `tiny_model` as `save_pretrained` writes it; shard_size such as "60KB" splits it."""
    tiny_model(architecture, dtype=dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_speaking(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A tiny random model with the tokenizer of the model that ships with whit, which knows 8,192 tokens."""
    config = tiny_config(architecture)
    config.update({"vocab_size": 8192, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    for path in Path(whit.resolve_model("whit:model")).glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def tiny_inputs(architecture: str) -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, with what the architecture's forward needs."""
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {**inputs, "decoder_input_ids": tokens} if architecture == "t5" else inputs
