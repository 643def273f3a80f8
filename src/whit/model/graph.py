"""Which linears of a block share one input, and where a scale of that input folds.

Architectures are told by difference, one line per activation: `source -> consumers`. A scale of the activation's
channels divides the source (a norm's weight, or the output rows of a linear) and multiplies the input columns of
every consumer, so all consumers are listed, routers too. Activations into which nothing folds are left out: what
passes a GELU, and norms whose output is the residual too (BERT's). `|` parts the consumers of blocks that differ.

A linear gives its last outputs to the activation: all of `up_proj`, the second half of `gate_up_proj`. `:heads` says
that the outputs are values, which several query heads may share; `:packed`, that each head's query, key and value
lie beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from whit.errors import UnsupportedModelError
from whit.model.targets import experts_transposed, find_targets, is_experts

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
    "fc1": "fc2",  # the ReLU between them lets positive factors through
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
BERT = {"attention.self.value:heads": "attention.output.dense"}
DISTILBERT = {"attention.v_lin:heads": "attention.out_lin"}
GROUPS = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma2": GEMMA, "gemma3_text": GEMMA,
    "phi3": PHI3, "opt": OPT, "gpt2": GPT2, "gpt_neox": GPT_NEOX, "bert": BERT, "roberta": BERT,
    "distilbert": DISTILBERT, "mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "qwen3_moe": MIXTRAL,
    "gpt_oss": GPT_OSS, "llama4_text": LLAMA4,
}  # fmt: skip
ADD_ONE = ("gemma2", "gemma3_text")  # their norms multiply by 1 + weight


@dataclass(frozen=True, eq=False)
class Folding:
    """One activation into which a scale folds; all are names of the model's parameters.

    `channels` (in,) int64 says which of the source's channels each input column of the consumers sees. `offset` is
    what the module adds to the source's weight. `is_norm`: the weight is a vector; otherwise it is a matrix or a
    stack of them, whose outputs are the channels. `transposed` are the parameters that are stored (in, out).
    """

    weight: str
    bias: str | None
    consumers: tuple[str, ...]
    channels: Tensor
    is_norm: bool
    offset: float = 0.0
    transposed: frozenset[str] = frozenset()


def find_foldings(model: PreTrainedModel) -> dict[str, tuple[Folding, ...]]:
    """The foldings of every block; UnsupportedModelError where the architecture has no table."""
    config, blocks = model.config.get_text_config(), find_blocks(model)
    table = GROUPS.get(config.model_type, {})
    if config.model_type == "opt" and not config.do_layer_norm_before:
        table = OPT_POST_NORM
    if config.model_type == "opt" and config.activation_function != "relu":
        table = {source: consumers for source, consumers in table.items() if source != "fc1"}
    found = {
        name: tuple(_foldings(model, name, block, table))
        for name, block in zip(blocks.names, blocks.modules, strict=True)
    }
    if not any(found.values()):
        known = ", ".join(sorted(GROUPS))
        raise UnsupportedModelError(
            f"{type(model).__name__}: where scales fold in model type {config.model_type!r} is not known; a transform "
            f"such as awq needs one of {known}; choose a method without a transform, such as gptq"
        )
    return found


def _foldings(model: PreTrainedModel, prefix: str, block: nn.Module, table: dict[str, str]) -> Iterator[Folding]:
    modules, parameters = dict(block.named_modules()), dict(block.named_parameters())
    config = model.config.get_text_config()

    def parameter(name: str) -> str | None:
        """Of a module its weight; experts are parameters themselves."""
        return next((p for p in (f"{name}.weight", name) if p in parameters), None)

    for key, variants in table.items():
        source, _, layout = key.partition(":")
        for variant in variants.split("|"):
            names = [parameter(name) for name in (source, *variant.split())]
            if None in names:
                continue
            weight, *consumers = [name for name in names if name is not None]
            involved = (weight, *consumers)
            transposed = {n for n in involved if _is_transposed(modules[n.rpartition(".")[0]])}
            is_norm = parameters[weight].dim() == 1
            columns = parameters[consumers[0]].shape[-2 if consumers[0] in transposed else -1]
            rows = parameters[weight].shape[-1 if weight in transposed or is_norm else -2]
            yield Folding(
                f"{prefix}.{weight}",
                f"{prefix}.{source}.bias" if f"{source}.bias" in parameters else None,
                tuple(f"{prefix}.{name}" for name in consumers),
                _channels(config, layout, rows, columns),
                is_norm,
                float(is_norm and config.model_type in ADD_ONE),
                frozenset(f"{prefix}.{name}" for name in transposed),
            )


def _is_transposed(holder: nn.Module) -> bool:
    """Whether the matrices that a module holds are (in, out)."""
    return isinstance(holder, Conv1D) or (is_experts(holder) and experts_transposed(holder))


def _channels(config: PretrainedConfig, layout: str, rows: int, columns: int) -> Tensor:
    """The source's channel of each input column of its consumers."""
    if not layout:
        return torch.arange(rows - columns, rows)
    heads: int = config.num_attention_heads
    within = torch.arange(columns // heads)
    if layout == "packed":
        first = (torch.arange(heads) + 1) * (rows // heads) - len(within)  # values come last in each head
        return (first[:, None] + within).flatten()
    value_heads: int = getattr(config, "num_key_value_heads", None) or heads
    first = rows + (torch.arange(heads) // (heads // value_heads) - value_heads) * len(within)
    return (first[:, None] + within).flatten()


@dataclass(frozen=True)
class Blocks:
    """The decoder or encoder blocks of a model, by name, in the order in which they run."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]


def text_part(model: PreTrainedModel) -> nn.Module:
    """What runs on tokens alone: where images or sounds come in beside them, the language model."""
    config = model.config
    beside = config.get_text_config() is not config and not getattr(config, "is_encoder_decoder", False)
    part: nn.Module = model.get_decoder() if beside else model.base_model
    return part


def find_blocks(model: PreTrainedModel) -> Blocks:
    """The one list of blocks, of those that run on text, that holds linears.

    UnsupportedModelError where there is none or more than one.
    """
    holders = [target.holder for target in find_targets(model) if not target.kept_by_default]
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and outermost and any(h.startswith(f"{name}.") for h in holders):
            lists[name] = module
    part = text_part(model)
    if (takes := getattr(part, "main_input_name", "input_ids")) != "input_ids" and len(lists) == 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: runs on {takes}; calibration runs a model on text; choose a method that needs no "
            "data, such as hqq"
        )
    text = {id(module) for module in part.modules()}
    lists = {name: blocks for name, blocks in lists.items() if id(blocks) in text}
    if len(lists) != 1:
        found = "none" if not lists else f"{len(lists)} ({', '.join(lists)})"
        raise UnsupportedModelError(
            f"{type(model).__name__}: lists of blocks with linears: {found}; calibration runs a single list; "
            "choose a method that needs no data, such as hqq"
        )
    ((name, blocks),) = lists.items()
    return Blocks(tuple(f"{name}.{i}" for i in range(len(blocks))), tuple(blocks))
