"""Which activations of a block a scale folds into, as tables of names.

Architectures are told by difference, one line per activation: `source -> consumers`. A scale of the activation's
channels divides the source (a norm's weight, or the output rows of a linear) and multiplies the input columns of
every consumer, so all consumers are listed, routers too. Activations into which nothing folds are left out: what
passes a GELU, and norms whose output is the residual too (BERT's). `|` parts the consumers of blocks that differ.

A linear gives its last outputs to the activation: all of `up_proj`, the second half of `gate_up_proj`. `:heads` says
that the outputs are values, which several query heads may share; `:packed`, that each head's query, key and value
lie beside each other.
"""

from __future__ import annotations

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = {
    "input_layernorm": QKV,
    "self_attn.v_proj:heads": "self_attn.o_proj",
    "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
    "mlp.up_proj": "mlp.down_proj",
}
GEMMA = {
    "input_layernorm": QKV,
    "self_attn.v_proj:heads": "self_attn.o_proj",
    "pre_feedforward_layernorm": LLAMA["post_attention_layernorm"],
    "mlp.up_proj": "mlp.down_proj",
}
PHI3 = {
    "input_layernorm": "self_attn.qkv_proj",
    "self_attn.qkv_proj:heads": "self_attn.o_proj",
    "post_attention_layernorm": "mlp.gate_up_proj",
    "mlp.gate_up_proj": "mlp.down_proj",
}
OPT = {
    "self_attn_layer_norm": QKV,
    "self_attn.v_proj:heads": "self_attn.out_proj",
    "final_layer_norm": "fc1",
    "fc1": "fc2",
}
OPT_POST_NORM = {"self_attn.v_proj:heads": "self_attn.out_proj", "fc1": "fc2"}
GPT2 = {"ln_1": "attn.c_attn", "attn.c_attn:heads": "attn.c_proj", "ln_2": "mlp.c_fc"}
GPT_NEOX = {
    "input_layernorm": "attention.query_key_value",
    "attention.query_key_value:packed": "attention.dense",
    "post_attention_layernorm": "mlp.dense_h_to_4h",
}
EXPERTS = "mlp.gate mlp.experts.gate_up_proj"
MIXTRAL = {
    **LLAMA,
    "post_attention_layernorm": f"{EXPERTS} | {LLAMA['post_attention_layernorm']}",
    "mlp.experts.gate_up_proj": "mlp.experts.down_proj",
}
QWEN2_MOE = {
    **MIXTRAL,
    "post_attention_layernorm": f"{EXPERTS} mlp.shared_expert.gate_proj mlp.shared_expert.up_proj "
    f"mlp.shared_expert_gate | {LLAMA['post_attention_layernorm']}",
    "mlp.shared_expert.up_proj": "mlp.shared_expert.down_proj",
}
GPT_OSS = {
    "input_layernorm": QKV,
    "self_attn.v_proj:heads": "self_attn.o_proj",
    "post_attention_layernorm": "mlp.router mlp.experts.gate_up_proj",  # what is clamped lets no factor through
}
SHARED = "feed_forward.shared_expert"
LLAMA4 = {
    "input_layernorm": QKV,
    "self_attn.v_proj:heads": "self_attn.o_proj",
    "post_attention_layernorm": "feed_forward.router feed_forward.experts.gate_up_proj "
    f"{SHARED}.gate_proj {SHARED}.up_proj | feed_forward.gate_proj feed_forward.up_proj",
    "feed_forward.experts.gate_up_proj": "feed_forward.experts.down_proj",
    f"{SHARED}.up_proj": f"{SHARED}.down_proj",
    "feed_forward.up_proj": "feed_forward.down_proj",
}
T5 = {  # blocks of the encoder and, with a layer between, of the decoder; what it reads of the encoder comes unscaled
    "layer.0.layer_norm": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
    "layer.0.SelfAttention.v": "layer.0.SelfAttention.o",
    "layer.1.layer_norm": "layer.1.EncDecAttention.q | layer.1.DenseReluDense.wi | "
    "layer.1.DenseReluDense.wi_0 layer.1.DenseReluDense.wi_1",
    "layer.1.EncDecAttention.v": "layer.1.EncDecAttention.o",
    "layer.1.DenseReluDense.wi": "layer.1.DenseReluDense.wo",
    "layer.1.DenseReluDense.wi_1": "layer.1.DenseReluDense.wo",
    "layer.2.layer_norm": "layer.2.DenseReluDense.wi | layer.2.DenseReluDense.wi_0 layer.2.DenseReluDense.wi_1",
    "layer.2.DenseReluDense.wi": "layer.2.DenseReluDense.wo",
    "layer.2.DenseReluDense.wi_1": "layer.2.DenseReluDense.wo",
}
BART = {  # the norms come last, and what leaves them is the residual too
    "self_attn.v_proj": "self_attn.out_proj",
    "encoder_attn.v_proj": "encoder_attn.out_proj",
    "fc1": "fc2",
}
MBART = {
    **BART,
    "self_attn_layer_norm": QKV,
    "encoder_attn_layer_norm": "encoder_attn.q_proj",
    "final_layer_norm": "fc1",
}
VALUES = {"self_attn.v_proj:heads": "self_attn.o_proj"}
POST_NORM = {**VALUES, "mlp.up_proj": "mlp.down_proj"}  # norms of what leaves: the residual itself is read
PARALLEL = {**POST_NORM, "input_layernorm": f"{QKV} mlp.gate_proj mlp.up_proj"}  # one norm for both halves
GLM = {
    "input_layernorm": QKV,
    **VALUES,
    "post_attention_layernorm": "mlp.gate_up_proj",
    "mlp.gate_up_proj": "mlp.down_proj",
}
STARCODER2 = {"input_layernorm": QKV, **VALUES, "post_attention_layernorm": "mlp.c_fc"}
NEMOTRON = {"input_layernorm": QKV, **VALUES, "post_attention_layernorm": "mlp.up_proj"}
PHI = {"input_layernorm": f"{QKV} mlp.fc1", "self_attn.v_proj:heads": "self_attn.dense"}
GPT_J = {"ln_1": "attn.q_proj attn.k_proj attn.v_proj mlp.fc_in", "attn.v_proj": "attn.out_proj"}
GPT_NEO = {
    "ln_1": "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj",
    "attn.attention.v_proj": "attn.attention.out_proj",
    "ln_2": "mlp.c_fc",
}
BLOOM = {
    "input_layernorm": "self_attention.query_key_value",
    "self_attention.query_key_value:packed": "self_attention.dense",
    "post_attention_layernorm": "mlp.dense_h_to_4h",
}
LFM2 = {
    "operator_norm": f"conv.in_proj | {QKV}",
    "self_attn.v_proj:heads": "self_attn.out_proj",
    "ffn_norm": "feed_forward.w1 feed_forward.w3",
    "feed_forward.w3": "feed_forward.w2",
}
BAMBA = {
    "input_layernorm": f"mamba.in_proj | {QKV}",
    **VALUES,
    "pre_ff_layernorm": "feed_forward.gate_proj feed_forward.up_proj",
    "feed_forward.up_proj": "feed_forward.down_proj",
}
MAMBA = {"norm": "mixer.in_proj"}
SHARED_EXPERTS = {  # DeepSeek's way: some experts see every token, and the first blocks have none
    **MIXTRAL,
    "post_attention_layernorm": f"{EXPERTS} mlp.shared_experts.gate_proj mlp.shared_experts.up_proj | "
    f"{LLAMA['post_attention_layernorm']}",
    "mlp.shared_experts.up_proj": "mlp.shared_experts.down_proj",
}
LATENT = {
    "input_layernorm": "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa | "
    "self_attn.q_proj self_attn.kv_a_proj_with_mqa",
    "self_attn.q_a_layernorm": "self_attn.q_b_proj",
    "self_attn.kv_a_layernorm": "self_attn.kv_b_proj",
}
DEEPSEEK = {**{key: value for key, value in SHARED_EXPERTS.items() if key not in VALUES}, **LATENT}
PHIMOE = {**MIXTRAL, "post_attention_layernorm": "mlp.router mlp.experts.gate_up_proj"}
LINEAR_ATTENTION = {
    "input_layernorm": f"{QKV} | linear_attn.in_proj_qkvz linear_attn.in_proj_ba | linear_attn.in_proj_qkv "
    "linear_attn.in_proj_z linear_attn.in_proj_b linear_attn.in_proj_a",
}
QWEN3_5 = {**LLAMA, **LINEAR_ATTENTION}
QWEN3_NEXT = {**QWEN2_MOE, **LINEAR_ATTENTION}
NEEDS_RELU = ("fc1", "layer.1.DenseReluDense.wi", "layer.2.DenseReluDense.wi")  # no other lets factors through
BERT = {"attention.self.value:heads": "attention.output.dense"}
DEBERTA = {"attention.self.value_proj:heads": "attention.output.dense"}
MODERNBERT = {  # the first block has no norm of its own
    "attn_norm": "attn.Wqkv",
    "attn.Wqkv:heads": "attn.Wo",
    "mlp_norm": "mlp.Wi",
    "mlp.Wi": "mlp.Wo",
}
DISTILBERT = {"attention.v_lin:heads": "attention.out_lin"}
GROUPS = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma2": GEMMA, "gemma3_text": GEMMA,
    "phi3": PHI3, "opt": OPT, "gpt2": GPT2, "gpt_neox": GPT_NEOX, "bert": BERT, "roberta": BERT,
    "distilbert": DISTILBERT, "mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "qwen3_moe": MIXTRAL,
    "gpt_oss": GPT_OSS, "llama4_text": LLAMA4, "t5": T5, "mt5": T5, "umt5": T5, "bart": BART, "marian": BART,
    "mbart": MBART, "pegasus": MBART, "m2m_100": MBART,
    "smollm3": LLAMA, "granite": LLAMA, "ernie4_5": LLAMA, "seed_oss": LLAMA, "hunyuan_v1_dense": LLAMA,
    "stablelm": LLAMA, "cohere": PARALLEL, "cohere2": PARALLEL, "olmo2": POST_NORM, "olmo3": POST_NORM,
    "glm": GLM, "glm4": GLM, "starcoder2": STARCODER2, "nemotron": NEMOTRON, "phi": PHI, "gptj": GPT_J,
    "gpt_neo": GPT_NEO, "bloom": BLOOM, "xglm": OPT, "lfm2": LFM2, "bamba": BAMBA, "mamba": MAMBA, "mamba2": MAMBA,
    "falcon_mamba": MAMBA, "olmoe": MIXTRAL, "phimoe": PHIMOE, "glm4_moe": SHARED_EXPERTS,
    "ernie4_5_moe": SHARED_EXPERTS, "deepseek_v2": DEEPSEEK, "deepseek_v3": DEEPSEEK, "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": QWEN3_5, "electra": BERT, "xlm-roberta": BERT, "camembert": BERT,
    "deberta-v2": DEBERTA, "modernbert": MODERNBERT,
}  # fmt: skip
ADD_ONE = ("gemma2", "gemma3_text", "nemotron", "qwen3_next", "qwen3_5_text")  # their norms multiply by 1 + weight
