"""A Llama-like model of transformers as the compiled decoder sees it: the same tensors, held by the same modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import UnsupportedModelError
from whit.kernels.bands import Parts
from whit.kernels.cpu import Cpu, Cpu8
from whit.kernels.cpu.binding import TYPES, Library, library
from whit.kernels.cpu.decoder import Block, Decoder, Matrix, Network, refusal
from whit.kernels.cpu.weight import CpuWeight
from whit.kernels.invariant import RowByRow
from whit.modules import PackedModule, QuantizedEmbedding, QuantizedLinear, TiedEmbedding, TiedHead

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles depend on nothing but the position
RECORDERS = "transformers.utils.output_capturing"


class Compiled:
    """A model that the decoder covers, looked at again before every use: modules may change, move or be replaced."""

    def __init__(self, model: Any, compiled: Library) -> None:
        self.model, self.library = model, compiled
        self.network = read_network(model)
        self._tensors = tuple(_identities(model))

    def refresh(self) -> None:
        """Read the model again if any of its tensors or modules is another one. Raises UnsupportedModelError."""
        if self._tensors != (now := tuple(_identities(self.model))):
            self.network, self._tensors = read_network(self.model), now
            self._tensors = tuple(_identities(self.model))

    def decoder(self, states: Tensor) -> Decoder:
        """A decoder whose keys and values lie in `states` (blocks, 2, kv_heads, capacity, head_dim)."""
        positions = torch.arange(states.shape[3])[None]
        like = torch.empty(0, dtype=self.network.dtype)
        cos, sin = (table[0].contiguous() for table in self.model.model.rotary_emb(like, position_ids=positions))
        return Decoder(self.network, states, cos, sin, self.library)

    def room(self, capacity: int) -> Tensor:
        """Keys and values of `capacity` tokens, not filled."""
        net = self.network
        return torch.empty(len(net.blocks), 2, net.kv_heads, capacity, net.head_dim, dtype=net.dtype)


def compiled_model(model: Any) -> Compiled:
    """Raises UnsupportedModelError, in one sentence, for what the decoder does not cover."""
    compiled = library()
    if isinstance(compiled, str):
        raise UnsupportedModelError(f"compile: the CPU kernels are {compiled}")
    return Compiled(model, compiled)


def read_network(model: Any) -> Network:
    """The model's parts. Raises UnsupportedModelError where one of them is not what the decoder computes."""
    name = type(model).__name__
    if name not in CLASSES or not type(model).__module__.startswith("transformers."):
        raise UnsupportedModelError(f"compile: {name} is none of {', '.join(CLASSES)}")
    config, inner = model.config, model.model
    rotary = (config.rope_parameters or {}).get("rope_type", "default")
    for found, known, what in (
        (config.hidden_act, ("silu",), "activation"), (rotary, ROTARY, "rotary embedding"),
        (config._attn_implementation, ("sdpa",), "attention"), (inner.norm.weight.dtype, tuple(TYPES), "type"),
    ):  # fmt: skip
        if found not in known:
            raise UnsupportedModelError(f"compile: {what} {found} is none of {', '.join(map(str, known))}")
    _refuse_hooks(model)
    dtype = inner.norm.weight.dtype
    attention = inner.layers[0].self_attn
    return Network(
        blocks=tuple(_block(layer, f"model.layers.{i}", dtype) for i, layer in enumerate(inner.layers)),
        embedding=_embedding(inner.embed_tokens, dtype), norm=_norm(inner.norm, "model.norm", dtype),
        head=_matrix(model.lm_head, "lm_head", dtype), heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, head_dim=attention.head_dim,
        epsilon=inner.norm.variance_epsilon, scale=attention.scaling,
    )  # fmt: skip


def _hooks(module: nn.Module) -> list[Any]:
    """What is called beside `forward`; not transformers' recorders of outputs, for which decoding here has no use."""
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in found if getattr(hook, "__module__", "") != RECORDERS]


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _hooks(module) or hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(f"compile: {name or 'the model'} has a hook, which would not be called")


def _block(layer: Any, name: str, dtype: torch.dtype) -> Block:
    def matrix(part: str, linear: str) -> Matrix:
        return _matrix(getattr(getattr(layer, part), linear), f"{name}.{part}.{linear}", dtype)

    def norm(part: Any, where: str, key: str) -> Tensor | None:
        return _norm(getattr(part, key), f"{where}.{key}", dtype) if hasattr(part, key) else None

    return Block(
        attention_norm=_norm(layer.input_layernorm, f"{name}.input_layernorm", dtype),
        mlp_norm=_norm(layer.post_attention_layernorm, f"{name}.post_attention_layernorm", dtype),
        q=matrix("self_attn", "q_proj"), k=matrix("self_attn", "k_proj"), v=matrix("self_attn", "v_proj"),
        o=matrix("self_attn", "o_proj"), gate=matrix("mlp", "gate_proj"), up=matrix("mlp", "up_proj"),
        down=matrix("mlp", "down_proj"), q_norm=norm(layer.self_attn, f"{name}.self_attn", "q_norm"),
        k_norm=norm(layer.self_attn, f"{name}.self_attn", "k_norm"),
    )  # fmt: skip


def _norm(module: Any, name: str, dtype: torch.dtype) -> Tensor:
    if not type(module).__name__.endswith("RMSNorm"):
        raise UnsupportedModelError(f"compile: {name} is a {type(module).__name__}, not an RMSNorm")
    return _floats(module.weight, name, dtype)


def _floats(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise UnsupportedModelError(f"compile: {name} is {tensor.dtype}, the norms are {dtype}; they must agree")
    return tensor.detach()


def _matrix(module: Any, name: str, dtype: torch.dtype) -> Matrix:
    kind = type(module)
    if kind not in (nn.Linear, QuantizedLinear, TiedHead):
        raise UnsupportedModelError(f"compile: {name} is a {kind.__name__}, not a linear that whit or torch made")
    bias = None if module.bias is None else _floats(module.bias, f"{name}.bias", dtype)
    if kind is nn.Linear:
        return Matrix(_floats(module.weight, name, dtype), bias)
    if kind is QuantizedLinear and module.compute_dtype not in (None, dtype):
        raise UnsupportedModelError(f"compile: {name} computes in {module.compute_dtype}, the model in {dtype}")
    weight = _prepared(module if kind is QuantizedLinear else module.source, name, dtype)
    if bias is not None and isinstance(weight, Parts):
        raise UnsupportedModelError(f"compile: {name} in {weight.format} has a bias, and rows in bands have none")
    return Matrix(weight, bias)


def _embedding(module: Any, dtype: torch.dtype) -> Matrix:
    name = "model.embed_tokens"
    if type(module) is nn.Embedding:
        return Matrix(_floats(module.weight, name, dtype))
    if type(module) not in (QuantizedEmbedding, TiedEmbedding) or module.weight.dtype != dtype:
        raise UnsupportedModelError(f"compile: {name} is a {type(module).__name__} in {module.weight.dtype}")
    return Matrix(_prepared(module.source if type(module) is TiedEmbedding else module, name, dtype))


def _prepared(module: PackedModule, name: str, dtype: torch.dtype) -> CpuWeight | Parts:
    """What the module multiplies one row of activations by."""
    kernel, weight = module.ready(torch.empty(1, module.weight_shape[1], dtype=dtype))
    if isinstance(weight, Parts) and all(isinstance(band, CpuWeight) for band in weight.bands):
        return weight
    if isinstance(kernel, RowByRow):  # one row is alone anyway
        kernel = kernel.kernel
    if not isinstance(kernel, Cpu | Cpu8) or not isinstance(weight, CpuWeight):
        raise UnsupportedModelError(f"compile: {name} in {module.format} runs on the kernel {kernel.name}")
    if reason := refusal(weight):
        raise UnsupportedModelError(f"compile: {name} in {module.format}: {reason}")
    return weight


def _identities(model: nn.Module) -> Iterator[object]:
    """What must be the same for a network to be still that of the model."""
    for module in model.modules():
        yield id(module)
        if module._forward_hooks or module._forward_pre_hooks:
            yield tuple(map(id, _hooks(module)))
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    yield tensor.data_ptr()
