"""Tiny random models of families with blocks of their own: states instead of attention, gates inside gates, streams."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from tiny_models import COMMON, DECODER, ENCODER

HEADED = {**DECODER, "head_dim": 16}
STATE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 8,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LATENT = {**DECODER, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
          "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
          "moe_intermediate_size": 32, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
OLDER = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
FAMILIES = {
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig, STATE),
    "falcon_mamba": (hf.FalconMambaForCausalLM, hf.FalconMambaConfig, STATE),
    "jamba": (hf.JambaForCausalLM, hf.JambaConfig, {
        **DECODER, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    }),
    "zamba2": (hf.Zamba2ForCausalLM, hf.Zamba2Config, {
        **DECODER, "num_key_value_heads": 4, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "mamba_d_state": 8,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_headdim": 16, "mamba_ngroups": 1,
        "chunk_size": 16, "n_mamba_heads": 8, "num_mem_blocks": 1, "use_mem_rope": True, "adapter_rank": 8,
    }),
    "recurrent_gemma": (hf.RecurrentGemmaForCausalLM, hf.RecurrentGemmaConfig, {
        **HEADED, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 64, "attention_window_size": 16,
    }),
    "nemotron_h": (hf.NemotronHForCausalLM, hf.NemotronHConfig, {
        **HEADED, "num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "n_groups": 1,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    }),
    "jetmoe": (hf.JetMoeForCausalLM, hf.JetMoeConfig, {
        **COMMON, "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 64, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }),
    "hunyuan_moe": (hf.HunYuanMoEV1ForCausalLM, hf.HunYuanMoEV1Config, {
        **HEADED, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32,
    }),
    "glm4_moe": (hf.Glm4MoeForCausalLM, hf.Glm4MoeConfig, {
        **HEADED, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
        "topk_group": 1, "num_nextn_predict_layers": 1,
    }),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, LATENT),
    "gemma3n": (hf.Gemma3nForCausalLM, hf.Gemma3nTextConfig, {
        **HEADED, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2, "intermediate_size": [128, 128],
    }),
    "gemma4": (hf.Gemma4ForCausalLM, hf.Gemma4TextConfig, {  # its last two blocks read keys of the first two
        **HEADED, "num_hidden_layers": 4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16,
    }),
    "mamba2": (hf.Mamba2ForCausalLM, hf.Mamba2Config, {
        **STATE, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16,
    }),
    "bamba": (hf.BambaForCausalLM, hf.BambaConfig, {
        **DECODER, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
        "mamba_d_state": 8, "mamba_chunk_size": 16,
    }),
    "lfm2": (hf.Lfm2ForCausalLM, hf.Lfm2Config, {
        **DECODER, "layer_types": ["conv", "full_attention"], "block_ff_dim": 128,
    }),
    "qwen3_next": (hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig, {
        **HEADED, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }),
    "qwen3_5": (hf.Qwen3_5ForCausalLM, hf.Qwen3_5TextConfig, {**HEADED, **LINEAR}),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig, DECODER),
    "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config, DECODER),
    "ernie4_5": (hf.Ernie4_5ForCausalLM, hf.Ernie4_5Config, HEADED),
    "seed_oss": (hf.SeedOssForCausalLM, hf.SeedOssConfig, HEADED),
    "hunyuan": (hf.HunYuanDenseV1ForCausalLM, hf.HunYuanDenseV1Config, HEADED),
    "stablelm": (hf.StableLmForCausalLM, hf.StableLmConfig, DECODER),
    "stablelm-parallel": (hf.StableLmForCausalLM, hf.StableLmConfig, {**DECODER, "use_parallel_residual": True}),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig, DECODER),
    "cohere2": (hf.Cohere2ForCausalLM, hf.Cohere2Config, DECODER),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, DECODER),
    "olmo3": (hf.Olmo3ForCausalLM, hf.Olmo3Config, DECODER),
    "olmoe": (hf.OlmoeForCausalLM, hf.OlmoeConfig, {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe-clip": (hf.OlmoeForCausalLM, hf.OlmoeConfig, {
        **DECODER, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.01,
    }),
    "phimoe": (hf.PhimoeForCausalLM, hf.PhimoeConfig, {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5_moe": (hf.Ernie4_5_MoeForCausalLM, hf.Ernie4_5_MoeConfig, {
        **DECODER, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
    }),
    "deepseek_v2": (hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config, {**LATENT, "topk_method": "greedy"}),
    "glm": (hf.GlmForCausalLM, hf.GlmConfig, HEADED),
    "glm4": (hf.Glm4ForCausalLM, hf.Glm4Config, HEADED),
    "starcoder2": (hf.Starcoder2ForCausalLM, hf.Starcoder2Config, DECODER),
    "nemotron": (hf.NemotronForCausalLM, hf.NemotronConfig, DECODER),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, DECODER),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, {**OLDER, "n_positions": 64, "rotary_dim": 8}),
    "gpt_neo": (hf.GPTNeoForCausalLM, hf.GPTNeoConfig, {
        **COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16,
    }),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bloom-post": (hf.BloomForCausalLM, hf.BloomConfig, {
        "vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4,
        "apply_residual_connection_post_layernorm": True,
    }),
    "xglm": (hf.XGLMForCausalLM, hf.XGLMConfig, {
        "vocab_size": 128, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128,
        "max_position_embeddings": 64, "activation_function": "relu",
    }),
    "electra": (hf.ElectraForMaskedLM, hf.ElectraConfig, {**ENCODER, "embedding_size": 32}),
    "xlm-roberta": (hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig, ENCODER),
    "camembert": (hf.CamembertForTokenClassification, hf.CamembertConfig, ENCODER),
    "deberta-v2": (hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config, {
        **ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
    }),
    "mobilebert": (hf.MobileBertForMaskedLM, hf.MobileBertConfig, {
        **ENCODER, "intra_bottleneck_size": 32, "embedding_size": 32, "true_hidden_size": 32,
    }),
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig, {
        **ENCODER, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    }),
}  # fmt: skip


def family(name: str, **options: object) -> hf.PreTrainedModel:
    """One of FAMILIES in evaluation mode; the same weights every time."""
    kind, config, usual = FAMILIES[name]
    torch.manual_seed(0)
    model: hf.PreTrainedModel = kind(config(**usual | options)).eval()
    for parameter in model.parameters():  # norms and biases would all be ones and zeros
        if parameter.dim() == 1:
            parameter.data += 0.02 * torch.randn_like(parameter)
        elif not parameter.any():  # a gate of experts (ERNIE 4.5's with transformers 5.17), an adapter's second half
            parameter.data.normal_(std=0.02)
    return model


def save_family(folder: Path, name: str, **options: object) -> Path:
    """A checkpoint of `family` as `save_pretrained` writes it."""
    family(name, **options).save_pretrained(folder)
    return folder
