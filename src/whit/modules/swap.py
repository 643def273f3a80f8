"""Put packed modules into a model, and take them out again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from whit.activations import Activations
from whit.kernels import dequantize
from whit.layouts import BITS
from whit.model.targets import Target
from whit.modules.embedding import QuantizedEmbedding, TiedEmbedding, original_class, pack_embedding, tie_embedding
from whit.modules.experts import QuantizedExperts
from whit.modules.linear import QuantizedLinear
from whit.modules.packed import PackedModule
from whit.modules.tied import TiedHead
from whit.tensor import Format, PackedWeight


@dataclass(frozen=True)
class Dtypes:
    """`model`: what the float tensors around have; `compute`: what linears multiply in (None: as they are given)."""

    model: torch.dtype
    compute: torch.dtype | None = None


def empty_packed(format: Format, shape: tuple[int, ...], activations: Activations | None = None) -> PackedWeight:
    """A packed weight of the right shapes and dtypes on the device meta, with nothing in it."""
    specs = {**BITS.specs(format, shape), **(activations.specs if activations is not None else {})}
    tensors = {key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for key, spec in specs.items()}
    return PackedWeight(BITS.name, format, shape, tensors, activations=activations)


def announce(model: nn.Module, target: Target, format: Format) -> None:
    """Let the module as it is name the buffers that it will be replaced by: offloading goes by these names."""
    module, prefix = _announcer(model, target)
    for key, tensor in empty_packed(format, target.shape).tensors.items():
        module._buffers[prefix + key] = tensor
        module._non_persistent_buffers_set.add(prefix + key)


def withdraw(model: nn.Module, target: Target, format: Format) -> None:
    """Undo `announce`; without one it does nothing."""
    module, prefix = _announcer(model, target)
    for key in BITS.specs(format, target.shape):
        module._buffers.pop(prefix + key, None)
        module._non_persistent_buffers_set.discard(prefix + key)


def _announcer(model: nn.Module, target: Target) -> tuple[nn.Module, str]:
    """The module that exists before, and what precedes a packed tensor's key in it."""
    if target.kind != "experts":
        return model.get_submodule(target.holder), ""
    parent, _, name = target.holder.rpartition(".")
    return model.get_submodule(parent), f"{name}."  # with a dot, which register_buffer would refuse


def install(model: nn.Module, target: Target, packed: PackedWeight, dtypes: Dtypes) -> PackedModule:
    """Replace what holds the target's parameter by a module that holds `packed`."""
    parent_name, _, name = target.holder.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, name)
    if target.kind == "embedding":
        pack_embedding(old, packed, dtypes.model)
        return old  # type: ignore[no-any-return]
    if target.kind == "experts":
        new: PackedModule = QuantizedExperts(packed, dtypes.model, target.transposed)
        del parent._parameters[name]
    else:
        new = QuantizedLinear(packed, old.bias, dtypes.model, dtypes.compute, target.transposed)
        for module in model.modules():
            if isinstance(module, TiedHead | TiedEmbedding) and module.source is old:
                module._source = (new,)
    new.train(old.training if isinstance(old, nn.Module) else parent.training)
    setattr(parent, name, new)
    return new


def install_tied(model: nn.Module, holder: str, source: nn.Module, dtypes: Dtypes) -> None:
    """Replace an embedding or a head by one that uses the matrix of `source`, which is packed or will be."""
    parent_name, _, name = holder.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, name)
    if isinstance(old, nn.Embedding):
        tie_embedding(old, source, dtypes.model)
    else:
        setattr(parent, name, TiedHead(old, source, dtypes.model))


def remove_packed(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed module by the plain one that holds its dequantized weight; ties stay tied."""
    weights: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, PackedModule):
            floats = dequantize(module.packed, dtype)
            transposed = isinstance(module, QuantizedLinear | QuantizedExperts) and module.transposed
            weights[id(module)] = nn.Parameter(floats.mT.contiguous() if transposed else floats)
    for name, module in modules.items():
        parent_name, _, key = name.rpartition(".")
        parent = model.get_submodule(parent_name) if name else model
        if isinstance(module, QuantizedEmbedding | TiedEmbedding):
            owner = module.source if isinstance(module, TiedEmbedding) else module
            _unpack_embedding(module, weights[id(owner)])
        elif isinstance(module, TiedHead):
            setattr(parent, key, _plain_linear(module, weights[id(module.source)]))
        elif isinstance(module, QuantizedLinear):
            setattr(parent, key, _plain_linear(module, weights[id(module)]))
        elif isinstance(module, QuantizedExperts):
            delattr(parent, key)
            parent.register_parameter(key, weights[id(module)])


def _unpack_embedding(module: nn.Embedding, weight: nn.Parameter) -> None:
    for key in (*getattr(module, "_keys", ()), "weight"):
        del module._buffers[key]
    module._non_persistent_buffers_set.discard("weight")
    module._parameters.clear()  # what training put there to be counted
    module.__class__ = original_class(module)
    module.register_parameter("weight", weight)


def _plain_linear(module: QuantizedLinear | TiedHead, weight: nn.Parameter) -> nn.Module:
    bias: Tensor | None = module.bias
    if getattr(module, "transposed", False):
        plain: nn.Module = Conv1D(0, 0)
        plain.nx, plain.nf = weight.shape  # type: ignore[assignment]
    else:
        plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    plain.register_parameter("weight", weight)
    plain.register_parameter("bias", bias if bias is None else nn.Parameter(bias.to(weight.dtype)))
    return plain.train(module.training)
