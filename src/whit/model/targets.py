"""Which parameters of a transformer can be quantized, found on a skeleton that holds no weights.

A target is a matrix (out_features, in_features) or a stack of them (experts, out, in). Its packed tensors are
buffers of a module of their own, named `<Target.holder>.<tensor>`: a linear `...q_proj` with the parameter
`...q_proj.weight` becomes `...q_proj.codes`, `...q_proj.scale`; a fused expert parameter `...experts.down_proj`
becomes `...experts.down_proj.codes` and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "conv1d", "embedding", "experts"]


@dataclass(frozen=True)
class Target:
    """One quantizable parameter. `shape` is the shape as quantized: in_features last."""

    parameter: str
    holder: str
    kind: Kind
    shape: tuple[int, ...]
    is_head: bool = False

    @property
    def transposed(self) -> bool:
        """GPT-2's Conv1D stores (in, out); whit quantizes (out, in)."""
        return self.kind == "conv1d"

    @property
    def kept_by_default(self) -> bool:
        """Embeddings and output heads are quantized only where a rule names them."""
        return self.is_head or self.kind == "embedding"


def find_targets(model: nn.Module) -> tuple[Target, ...]:
    """Every quantizable parameter of a transformers model, in module order."""
    heads = _heads(model)
    return tuple(t for name, module in model.named_modules() for t in _targets_of(name, module, heads))


def _targets_of(name: str, module: nn.Module, heads: set[int]) -> Iterator[Target]:
    weight = f"{name}.weight"
    if isinstance(module, nn.Linear):
        yield Target(weight, name, "linear", tuple(module.weight.shape), id(module) in heads)
    elif isinstance(module, Conv1D):
        yield Target(weight, name, "conv1d", tuple(module.weight.shape[::-1]), id(module) in heads)
    elif isinstance(module, nn.Embedding):
        yield Target(weight, name, "embedding", tuple(module.weight.shape))
    elif type(module).__name__.endswith("Experts"):
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                yield Target(f"{name}.{key}", f"{name}.{key}", "experts", tuple(parameter.shape))


def _heads(model: nn.Module) -> set[int]:
    """Modules that map to the vocabulary or to classes."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")
    found = {id(getattr(model, n)) for n in names if isinstance(getattr(model, n, None), nn.Module)}
    return found | ({id(output)} if output is not None else set())
