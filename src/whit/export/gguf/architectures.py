"""How llama.cpp names the parts of each architecture, and what it stores otherwise than transformers does.

Llama's q and k: transformers rotates the halves of a head against each other, llama.cpp neighbours, so rows are
interleaved. Gemma's norms multiply by 1 + w; the sum is stored. gpt-oss's experts have the rows of gate and up by
turns, which are parted. Names and facts as in llama.cpp's own converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whit.errors import UnsupportedModelError

BLOCK = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)")
TOP = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight", "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}  # fmt: skip
LLAMA = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORMED_HEADS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA = {
    **LLAMA, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
PHI = {
    "input_layernorm": "attn_norm", "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GPT2 = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
MIXTURE = {
    **{part: name for part, name in LLAMA.items() if not part.startswith("mlp.")}, "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
GPT_OSS = {
    **{part: name for part, name in MIXTURE.items() if not part.startswith("mlp.")},
    "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp", "self_attn.sinks": "attn_sinks",
}  # fmt: skip
SINKS = re.compile(r"model\.layers\.(\d+)\.(self_attn\.sinks)")  # a weight that is not called one
STACK = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?")
STACKED = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Architecture:
    """`name` is llama.cpp's; `parts` maps modules of a block; `activations` are those that it computes.

    `woven`: the hub has stacks of experts whole, the rows of gate and up by turns.
    """

    name: str
    parts: Mapping[str, str] = field(hash=False)
    activations: tuple[str, ...] = ("silu", "swish")
    interleaved: bool = False
    norm_offset: float = 0.0
    experts: bool = False
    woven: bool = False

    def tensor_name(self, parameter: str) -> str | None:
        """llama.cpp's name of a parameter of transformers, None where it has none."""
        if parameter in TOP:
            return TOP[parameter]
        found = BLOCK.fullmatch(parameter) or SINKS.fullmatch(parameter)
        if not found or found[2] not in self.parts:
            return None
        return f"blk.{found[1]}.{self.parts[found[2]]}.{found[3] if found.re is BLOCK else 'weight'}"

    def stack_names(self, parameter: str) -> tuple[str, ...]:
        """llama.cpp's names of what a stack of experts holds, or of its biases, its rows in equal parts; none where it
        is not a stack."""
        found = STACK.fullmatch(parameter)
        if found is None or not self.experts:
            return ()
        parts, kind = ("gate", "up") if found[2] == "gate_up" else ("down",), "bias" if found[3] else "weight"
        return tuple(f"blk.{found[1]}.ffn_{part}_exps.{kind}" for part in parts)

    def stack_parameter(self, tensor: str) -> str | None:
        """The running model's name of the whole stack that a tensor is part of; None where it is part of none."""
        found = STACKED.fullmatch(tensor)
        if found is None or not self.experts:
            return None
        part, kind = "down" if found[2] == "down" else "gate_up", "_bias" if found[3] == "bias" else ""
        return f"model.layers.{found[1]}.mlp.experts.{part}_proj{kind}"

    def part_order(self, experts: int, rows: int, parts: int) -> Tensor:
        """Of a stack (experts, rows, ...) that llama.cpp has in so many parts: which of its rows each of theirs is, the
        parts one after another."""
        numbers = torch.arange(experts * rows)
        if self.woven:
            return numbers.reshape(experts, -1, parts).permute(2, 0, 1).reshape(-1)
        return numbers.reshape(experts, parts, -1).transpose(0, 1).reshape(-1)

    def expert_names(self, tensor: str, count: int) -> list[str]:
        """The hub's names of the matrices of a stack; none where a tensor is not a stack."""
        found = STACKED.fullmatch(tensor)
        if found is None or not self.experts or self.woven:
            return []
        if self.name == "llama":  # Mixtral
            part, block = {"gate": "w1", "up": "w3", "down": "w2"}[found[2]], "block_sparse_moe"
        else:
            part, block = f"{found[2]}_proj", "mlp"
        return [f"model.layers.{found[1]}.{block}.experts.{number}.{part}.weight" for number in range(count)]

    def parameter_name(self, tensor: str) -> str | None:
        """The inverse of `tensor_name`."""
        gpt2 = self.parts is GPT2
        for parameter, name in TOP.items():
            if name == tensor and not parameter.startswith("model." if gpt2 else "transformer."):
                return parameter
        found = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", tensor)
        part = next((p for p, name in self.parts.items() if found and name == found[2]), None)
        if found is None or part is None:
            return None
        whole = f"{'transformer.h' if gpt2 else 'model.layers'}.{found[1]}.{part}"
        return whole if SINKS.fullmatch(whole) else f"{whole}.{found[3]}"


ARCHITECTURES = {
    "llama": Architecture("llama", LLAMA, interleaved=True),
    "mistral": Architecture("llama", LLAMA, interleaved=True),
    "qwen2": Architecture("qwen2", LLAMA),
    "qwen3": Architecture("qwen3", {**LLAMA, **NORMED_HEADS}),
    "mixtral": Architecture("llama", MIXTURE, interleaved=True, experts=True),
    "qwen2_moe": Architecture("qwen2moe", MIXTURE, experts=True),
    "qwen3_moe": Architecture("qwen3moe", {**MIXTURE, **NORMED_HEADS}, experts=True),
    "gpt_oss": Architecture("gpt-oss", GPT_OSS, experts=True, woven=True),
    "gemma2": Architecture("gemma2", GEMMA, GELU_TANH, norm_offset=1.0),
    "gemma3_text": Architecture("gemma3", {**GEMMA, **NORMED_HEADS}, GELU_TANH, norm_offset=1.0),
    "phi3": Architecture("phi3", PHI),
    "gpt2": Architecture("gpt2", GPT2, GELU_TANH),
}


def architecture_of(config: Any, where: str) -> Architecture:
    """The architecture of a transformers config; UnsupportedModelError where llama.cpp would compute something else."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None and config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"{where}: {config.model_type} sees or hears beside its text, and a gguf file holds the text alone; "
            "llama.cpp wants the rest in an mmproj file, which its convert_hf_to_gguf.py writes; whit quantize takes "
            "the file of the text that it writes; or choose another --export"
        )
    if found is None:
        raise UnsupportedModelError(
            f"{where}: model type {config.model_type!r} in a gguf file; it must be one of {', '.join(ARCHITECTURES)}; "
            "choose another --export"
        )
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((a for name in names if (a := getattr(config, name, None))), None)
    if activation not in found.activations:
        raise UnsupportedModelError(
            f"{where}: activation {activation!r}; llama.cpp computes {' or '.join(found.activations)} "
            f"for {found.name}; choose another --export"
        )
    return found
