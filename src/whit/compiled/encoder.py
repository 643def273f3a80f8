"""`whit.compile` for encoders on the processor: all layers of BERT, RoBERTa or DistilBERT in one compiled call.

What the model's own encoder would do with its packed linears is done, in the same numbers but for the order of float32
sums: embeddings, pooling and heads stay torch's. A call that wants more than the last hidden state (attentions, all
hidden states), gradients, or training runs the model's own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from whit.compiled.bert import records, take_tokens
from whit.errors import KernelError, UnsupportedModelError
from whit.kernels.cpu.binding import library
from whit.kernels.cpu.encoder import Encoder, Layer
from whit.kernels.cpu.encoder_linear import Linear
from whit.modules import QuantizedLinear

BERT = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",), "up": ("intermediate.dense",), "down": ("output.dense",),
    "norms": ("attention.output.LayerNorm", "output.LayerNorm"), "activation": ("intermediate.intermediate_act_fn",),
}  # fmt: skip
DISTILBERT = {
    "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "out": ("attention.out_lin",), "up": ("ffn.lin1",), "down": ("ffn.lin2",),
    "norms": ("sa_layer_norm", "output_layer_norm"), "activation": ("ffn.activation",),
}  # fmt: skip
STACKS = {  # classes of stacks of layers: the names within a layer, and what such a stack returns
    "BertEncoder": (BERT, BaseModelOutputWithPastAndCrossAttentions),
    "RobertaEncoder": (BERT, BaseModelOutputWithPastAndCrossAttentions),
    "Transformer": (DISTILBERT, BaseModelOutput),
}


def find_stack(model: nn.Module) -> nn.Module | None:
    """The stack of layers of an encoder that is known here, None where there is none or several."""
    found = [module for module in model.modules() if type(module).__name__ in STACKS]
    return found[0] if len(found) == 1 else None


def compile_encoder(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Make the model's stack of layers run in compiled code; UnsupportedModelError where it does not cover them."""
    if options:
        raise UnsupportedModelError(f"compile: option {next(iter(options))!r}; an encoder has none; leave it out")
    compiled, stack = library(), find_stack(model)
    heads: int = getattr(model.config, "num_attention_heads", 1)
    if stack is None or getattr(model.config, "is_decoder", False):
        raise UnsupportedModelError(f"compile: {type(model).__name__} is not an encoder with layers like BERT's")
    if isinstance(compiled, str):
        raise UnsupportedModelError(f"compile: the CPU kernels are {compiled}")
    names, output = STACKS[type(stack).__name__]
    blocks = list(stack.get_submodule("layer").children())
    layers = [_layer(block, names) for block in blocks]
    epsilons: set[float] = {
        getattr(block.get_submodule(name), "eps", 0.0) for block in blocks for name in names["norms"]
    }
    if len(epsilons) != 1:
        raise UnsupportedModelError(f"compile: norms have epsilons {sorted(epsilons)}; they must have one")
    try:
        encoder = Encoder(layers, heads, epsilons.pop(), compiled)
    except KernelError as error:
        raise UnsupportedModelError(f"compile: {error}") from error
    plain = type(stack).forward.__get__(stack)
    stack.forward = _forward(stack, encoder, plain, output)
    for module in model.modules():
        if type(module).__name__ == "BertModel" and getattr(module, "encoder", None) is stack:
            take_tokens(module, encoder)
    return model


def _layer(layer: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Layer:
    activation = layer.get_submodule(names["activation"][0])
    if not isinstance(activation, nn.GELU | GELUActivation) or getattr(activation, "approximate", "none") != "none":
        raise UnsupportedModelError(f"compile: activation {type(activation).__name__}; it must be the exact GELU")

    def linear(key: str) -> Linear:
        modules = [layer.get_submodule(name) for name in names[key]]
        for name, module in zip(names[key], modules, strict=True):
            if not isinstance(module, QuantizedLinear):
                raise UnsupportedModelError(f"compile: {name} is not quantized; all linears of a layer must be")
            if module.deterministic:
                raise UnsupportedModelError(f"compile: {name} is deterministic; compiled encoders sum by batch")
        return Linear(tuple(m.packed for m in modules), tuple(m.bias for m in modules))  # type: ignore[misc]

    def norm(name: str) -> tuple[Tensor, Tensor]:
        found = layer.get_submodule(name)
        return found.weight, found.bias  # type: ignore[return-value]

    first, second = names["norms"]
    return Layer(linear("qkv"), linear("out"), linear("up"), linear("down"), (norm(first), norm(second)))


def _forward(
    stack: nn.Module, encoder: Encoder, plain: Callable[..., Any], output: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if not _covered(stack, hidden_states, attention_mask, args, kwargs):
            return plain(hidden_states, attention_mask, *args, **kwargs)
        hidden = hidden_states.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        return output(last_hidden_state=encoder(hidden, attention_mask).to(hidden_states.dtype))

    return forward


def _covered(stack: nn.Module, hidden: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether the compiled code does what this call asks for."""
    if stack.training or hidden.device.type != "cpu" or (torch.is_grad_enabled() and hidden.requires_grad):
        return False
    if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1 or mask.device.type != "cpu"):
        return False
    unusual = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache")
    if any(value is not None for value in args) or any(kwargs.get(name) for name in unusual):
        return False
    return not torch.compiler.is_compiling() and not records()
