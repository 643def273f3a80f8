"""A step of Llama, Mistral, Qwen2 and Qwen3 with one launch for all that lies between two products.

Weights, rotary embedding and products are the model's own modules; norms, attention and gates are whit's kernels. Where
a model is of another kind, or its logits differ from its own forward's in a trial, the step is the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whit.compiled.static import PlainStep, State, Step
from whit.kernels.gpu import Gpu, decoding
from whit.kernels.gpu.kernel import products as gpu_products
from whit.kernels.gpu.kernel import why_not as no_kernels
from whit.modules import QuantizedLinear

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles depend on nothing but the position
MOST_ERROR = 0.1  # of the logits in the trial: rounding gives a tenth of it, another model's structure ten times


class FusedStep:
    """The step of one model; `run` launches a kernel."""

    def __init__(self, model: Any, run: decoding.Run = decoding.launch) -> None:
        self.model, self.run = model, run
        self.room: decoding.Workspace | None = None
        self.angles: tuple[Tensor, Tensor] | None = None

    def __call__(self, state: State) -> None:
        base, room = self.model.model, self._room(state)
        hidden = base.embed_tokens(state.tokens)[:, 0]
        rotary = (*self._angles(state, hidden), state.positions)
        added = None
        for layer, cache in zip(base.layers, state.cache.layers, strict=True):
            attention, x = layer.self_attn, self._norm(layer.input_layernorm, hidden, added)
            q, k, v = products(x, (attention.q_proj, attention.k_proj, attention.v_proj))
            if hasattr(attention, "q_norm"):
                q, k = self._norm_heads(attention.q_norm, q), self._norm_heads(attention.k_norm, k)
            held = cache.keys, cache.values
            y = decoding.attend((q, k, v), rotary, held, room, attention.scaling, self.run)
            x = self._norm(layer.post_attention_layernorm, hidden, product(y, attention.o_proj))
            gates, ups = products(x, (layer.mlp.gate_proj, layer.mlp.up_proj))
            added = product(decoding.gate(gates, ups, self.run), layer.mlp.down_proj)
        state.logits.copy_(self.model.lm_head(self._norm(base.norm, hidden, added)))

    def _norm(self, module: Any, hidden: Tensor, added: Tensor | None) -> Tensor:
        return decoding.norm(hidden, added, module.weight, module.variance_epsilon, self.run)

    def _norm_heads(self, module: Any, x: Tensor) -> Tensor:
        return self._norm(module, x.view(-1, len(module.weight)), None).view_as(x)

    def _angles(self, state: State, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (length, size) of all positions of the cache."""
        if self.angles is None:
            positions = torch.arange(state.length, device=like.device)
            cosine, sine = self.model.model.rotary_emb(like[:1], position_ids=positions[None])
            self.angles = cosine[0].contiguous(), sine[0].contiguous()
        return self.angles

    def _room(self, state: State) -> decoding.Workspace:
        if self.room is None:
            attention = self.model.model.layers[0].self_attn
            _, heads, _, size = state.cache.layers[0].keys.shape
            group = attention.num_key_value_groups
            self.room = decoding.Workspace.like(state.mask, state.slot, heads, group, size)
        return self.room


def products(x: Tensor, linears: Sequence[Any]) -> list[Tensor]:
    """x (rows, columns) through linears that share it, packed ones of one format in one launch where that can be."""
    packed = [
        linear for linear in linears if type(linear) is QuantizedLinear and linear.compute_dtype in (None, x.dtype)
    ]
    if len(packed) < len(linears):
        return [linear(x) for linear in linears]
    ready = [linear.ready(x) for linear in packed]
    if any(kernel != Gpu() for kernel, _ in ready) or any(b is not None and b.dtype != x.dtype for b in biases(packed)):
        return [linear(x) for linear in linears]
    return gpu_products(x, [weight for _, weight in ready], biases(packed))


def product(x: Tensor, linear: Any) -> Tensor:
    """x (rows, columns) through a linear: one row by the kernel of `products`, whose blocks begin while a norm or an
    attention in front still runs; alone the one that a packed weight has for itself is faster."""
    return products(x, (linear,))[0] if len(x) == 1 else linear(x)


def biases(linears: Sequence[Any]) -> list[Tensor | None]:
    """Of each linear (out,), None where it has none."""
    return [linear.bias for linear in linears]


def why_not(model: Any) -> str | None:
    """Why a model has no fused step, or None."""
    name, config = type(model).__name__, model.config
    if name not in MODELS:
        return f"{name} is none of {', '.join(MODELS)}"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"the model computes in {model.dtype}"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.hidden_act != "silu" or rotary not in ROTARY:
        return f"activation {config.hidden_act}, rotary embedding {rotary}"
    size = model.model.layers[0].self_attn.head_dim
    if size not in (16, 32, 64, 128, 256) or config.hidden_size % 8 or config.intermediate_size % 8:
        return f"heads of {size} columns"
    hooked = (m for layer in model.model.layers for m in layer.modules() if m._forward_hooks or m._forward_pre_hooks)
    return next((f"{type(m).__name__} has hooks" for m in hooked), None)


def best_step(model: Any, state: State, run: decoding.Run | None = None) -> Step:
    """The fused step where the model has one and a trial finds its logits to be the model's; else the model's own."""
    plain = PlainStep(model)
    if (run is None and no_kernels(model.device) is not None) or why_not(model) is not None:
        return plain
    run = run or decoding.launch
    fused = FusedStep(model, run)
    wanted, found = (trial(model, state, step) for step in (plain, fused))
    error = (found - wanted).norm() / wanted.norm()
    return fused if bool(error < MOST_ERROR) else plain


def trial(model: Any, state: State, step: Step) -> Tensor:
    """Logits (batch, vocabulary) in float32 of a token after a few others."""
    count = min(5, state.length - 1)
    tokens = torch.arange(1, state.batch * (count + 1) + 1, device=state.tokens.device).view(state.batch, -1)
    tokens = tokens % model.config.get_text_config().vocab_size
    state.clear()
    state.mask.fill_(True)
    model(input_ids=tokens[:, :count], past_key_values=state.cache, use_cache=True)
    state.tokens.copy_(tokens[:, count:])
    state.positions.fill_(count)
    state.slot.fill_(count)
    step(state)
    return state.logits.float()
