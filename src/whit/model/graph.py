"""Which linears of a block share one input, and where a scale of that input folds.

Architectures are told by difference, one line per activation: `source -> consumers`. A scale of the activation's
channels divides the source (a norm's weight, or the output rows of a linear) and multiplies the input columns of
every consumer, so all consumers are listed, routers too. Activations into which nothing folds are left out: that
linears share an input is also observed while a block runs, in any architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from whit.errors import UnsupportedModelError
from whit.model.targets import find_targets
from whit.tensor import LinearGroup

LLAMA = {
    "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.v_proj": "self_attn.o_proj",
    "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
    "mlp.up_proj": "mlp.down_proj",
}
GEMMA = {
    "input_layernorm": LLAMA["input_layernorm"],
    "self_attn.v_proj": "self_attn.o_proj",
    "pre_feedforward_layernorm": LLAMA["post_attention_layernorm"],
    "mlp.up_proj": "mlp.down_proj",
}
PHI3 = {"input_layernorm": "self_attn.qkv_proj", "post_attention_layernorm": "mlp.gate_up_proj"}
OPT = {
    "self_attn_layer_norm": LLAMA["input_layernorm"],
    "self_attn.v_proj": "self_attn.out_proj",
    "final_layer_norm": "fc1",
    "fc1": "fc2",  # the ReLU between them lets positive factors through
}
GPT2 = {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"}
GPT_NEOX = {"input_layernorm": "attention.query_key_value", "post_attention_layernorm": "mlp.dense_h_to_4h"}
EXPERTS = "mlp.gate mlp.experts.gate_up_proj"
MIXTRAL = {
    "input_layernorm": LLAMA["input_layernorm"],
    "self_attn.v_proj": "self_attn.o_proj",
    "post_attention_layernorm": EXPERTS,
}
QWEN2_MOE = {
    **MIXTRAL,
    "post_attention_layernorm": f"{EXPERTS} mlp.shared_expert.gate_proj mlp.shared_expert.up_proj "
    "mlp.shared_expert_gate",
    "mlp.shared_expert.up_proj": "mlp.shared_expert.down_proj",
}
GROUPS = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma2": GEMMA, "gemma3_text": GEMMA,
    "phi3": PHI3, "opt": OPT, "gpt2": GPT2, "gpt_neox": GPT_NEOX,
    "mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "qwen3_moe": MIXTRAL,
}  # fmt: skip


def folding_groups(model_type: str) -> tuple[LinearGroup, ...]:
    """The groups of an architecture's block into whose source a scale folds, names relative to the block."""
    table = GROUPS.get(model_type, {})
    return tuple(LinearGroup(source, tuple(consumers.split())) for source, consumers in table.items())


@dataclass(frozen=True)
class Blocks:
    """The decoder or encoder blocks of a model, by name, in the order in which they run."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]


def find_blocks(model: PreTrainedModel) -> Blocks:
    """The one list of blocks that holds the linears; UnsupportedModelError where there is none or more than one."""
    holders = [target.holder for target in find_targets(model) if not target.kept_by_default]
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and outermost and any(h.startswith(f"{name}.") for h in holders):
            lists[name] = module
    if len(lists) != 1:
        found = "none" if not lists else f"{len(lists)} ({', '.join(lists)})"
        raise UnsupportedModelError(
            f"{type(model).__name__}: lists of blocks with linears: {found}; calibration runs a single list; "
            "choose a method that needs no data, such as hqq"
        )
    ((name, blocks),) = lists.items()
    return Blocks(tuple(f"{name}.{i}" for i in range(len(blocks))), tuple(blocks))
