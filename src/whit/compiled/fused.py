"""A step of Llama, Mistral, Qwen2 and Qwen3 with one launch, or none, for all that lies between two products.

Weights, rotary embedding and products are the model's own modules; norms, attention and gates are whit's kernels. One
row through packed weights that few.cu takes has its norm, its gate and its sum with the residual there. Where a model
is of another kind, or its logits differ from its own forward's in a trial, the step is the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whit.compiled.llama import CLASSES, ROTARY
from whit.compiled.static import PlainStep, State, Step
from whit.kernels.gpu import Gpu, decoding, few
from whit.kernels.gpu.attention import Workspace, attend
from whit.kernels.gpu.kernel import products as gpu_products
from whit.kernels.gpu.kernel import row_through
from whit.kernels.gpu.kernel import why_not as no_kernels
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

MOST_ERROR = 0.1  # of the logits in the trial: rounding gives a tenth of it, another model's structure ten times


@dataclass
class Residual:
    """What runs through the blocks: `total` (rows, columns), and what is still to be added to it, if anything is."""

    total: Tensor
    added: Tensor | None = None


class FusedStep:
    """The step of one model; `run` launches a kernel."""

    def __init__(self, model: Any, run: decoding.Run = decoding.launch) -> None:
        self.model, self.run = model, run
        self.room: Workspace | None = None
        self.angles: tuple[Tensor, Tensor] | None = None
        cuda = model.device.type == "cuda"
        self.multiprocessors = torch.cuda.get_device_properties(model.device).multi_processor_count if cuda else 0

    def __call__(self, state: State) -> None:
        base, room = self.model.model, self._room(state)
        residual = Residual(base.embed_tokens(state.tokens)[:, 0])
        rotary = (*self._angles(state, residual.total), state.positions)
        for layer, cache in zip(base.layers, state.cache.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            heads = attention.q_proj, attention.k_proj, attention.v_proj
            q, k, v = self._normed_products(layer.input_layernorm, residual, heads)
            if hasattr(attention, "q_norm"):
                q, k = self._norm_heads(attention.q_norm, q), self._norm_heads(attention.k_norm, k)
            held = cache.keys, cache.values
            y = attend((q, k, v), rotary, held, room, attention.scaling, self.run)
            add_product(residual, y, attention.o_proj)
            y = self._gated(layer.post_attention_layernorm, residual, mlp)
            add_product(residual, y, mlp.down_proj)
        self._head(self._norm(base.norm, residual), state.logits)

    def _head(self, x: Tensor, logits: Tensor) -> None:
        """The logits of x; of one row, by a model's own linear, by a kernel that reads it faster than torch's."""
        head = self.model.lm_head
        plain = type(head) is nn.Linear and head.bias is None and not has_hooks(head)
        if self.multiprocessors and plain and decoding.dense_takes(x, head.weight):
            decoding.dense(x, head.weight, logits, self.multiprocessors, self.run)
        else:
            logits.copy_(head(x))

    def _normed_products(self, module: Any, residual: Residual, linears: Sequence[Any]) -> list[Tensor]:
        """The residual's norm through linears."""
        ends = few.Ends(module.weight, module.variance_epsilon)
        found = None if residual.added is not None else through(residual.total, linears, ends)
        return found or products(self._norm(module, residual), linears)

    def _gated(self, module: Any, residual: Residual, mlp: Any) -> Tensor:
        """silu(gate) * up of the residual's norm."""
        linears, ends = (mlp.gate_proj, mlp.up_proj), few.Ends(module.weight, module.variance_epsilon, gated=True)
        if residual.added is None and (found := through(residual.total, linears, ends)):
            return found[0]
        gates, ups = products(self._norm(module, residual), linears)
        return decoding.gate(gates, ups, self.run)

    def _norm(self, module: Any, residual: Residual) -> Tensor:
        """The norm of a residual, which has then got what was to be added."""
        added, residual.added = residual.added, None
        return decoding.norm(residual.total, added, module.weight, module.variance_epsilon, self.run)

    def _norm_heads(self, module: Any, x: Tensor) -> Tensor:
        return self._norm(module, Residual(x.view(-1, len(module.weight)))).view_as(x)

    def _angles(self, state: State, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (length, size) of all positions of the cache."""
        if self.angles is None:
            positions = torch.arange(state.length, device=like.device)
            cosine, sine = self.model.model.rotary_emb(like[:1], position_ids=positions[None])
            self.angles = cosine[0].contiguous(), sine[0].contiguous()
        return self.angles

    def _room(self, state: State) -> Workspace:
        if self.room is None:
            attention = self.model.model.layers[0].self_attn
            _, heads, _, size = state.cache.layers[0].keys.shape
            group = attention.num_key_value_groups
            self.room = Workspace.like(state.mask, state.slot, heads, group, size)
        return self.room


def packed_weights(x: Tensor, linears: Sequence[Any]) -> list[PackedWeight] | None:
    """The weights of linears that all are packed, and whose products with x are the GPU kernels' own; else None."""
    packed = [
        linear for linear in linears if type(linear) is QuantizedLinear and linear.compute_dtype in (None, x.dtype)
    ]
    if len(packed) < len(linears):
        return None
    ready = [linear.ready(x) for linear in packed]
    if any(kernel != Gpu() for kernel, _ in ready) or any(b is not None and b.dtype != x.dtype for b in biases(packed)):
        return None
    return [weight for _, weight in ready]


def products(x: Tensor, linears: Sequence[Any]) -> list[Tensor]:
    """x (rows, columns) through linears that share it, packed ones of one format in one launch where that can be."""
    weights = packed_weights(x, linears)
    return [linear(x) for linear in linears] if weights is None else gpu_products(x, weights, biases(linears))


def through(x: Tensor, linears: Sequence[Any], ends: few.Ends, y: Tensor | None = None) -> list[Tensor] | None:
    """One row x through linears, with what `ends` say, in one launch; None where that cannot be."""
    weights = packed_weights(x, linears) if len(x) == 1 else None
    if weights is None or (ends.norm is not None and ends.norm.dtype != x.dtype):
        return None
    return row_through(x, weights, biases(linears), ends, y)


def add_product(residual: Residual, x: Tensor, linear: Any) -> None:
    """residual += x through a linear, or as what is to be added."""
    if residual.added is not None or through(x, (linear,), few.Ends(onto=True), residual.total) is None:
        residual.added = product(x, linear)


def product(x: Tensor, linear: Any) -> Tensor:
    """x (rows, columns) through a linear: one row by the kernel of `products`, whose blocks begin while a norm or an
    attention in front still runs; alone the one that a packed weight has for itself is faster."""
    return products(x, (linear,))[0] if len(x) == 1 else linear(x)


def biases(linears: Sequence[Any]) -> list[Tensor | None]:
    """Of each linear (out,), None where it has none."""
    return [linear.bias for linear in linears]


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def why_not(model: Any) -> str | None:
    """Why a model has no fused step, or None."""
    name, config = type(model).__name__, model.config
    if name not in CLASSES:
        return f"{name} is none of {', '.join(CLASSES)}"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"the model computes in {model.dtype}"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.hidden_act != "silu" or rotary not in ROTARY:
        return f"activation {config.hidden_act}, rotary embedding {rotary}"
    size = model.model.layers[0].self_attn.head_dim
    if size not in (16, 32, 64, 128, 256) or config.hidden_size % 8 or config.intermediate_size % 8:
        return f"heads of {size} columns"
    hooked = (m for layer in model.model.layers for m in layer.modules() if has_hooks(m))
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
