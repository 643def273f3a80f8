"""Embeddings whose matrix is packed: rows are decoded as they are looked up.

A subclass of nn.Embedding (Gemma's scaled one, OPT's shifted positions) keeps its behaviour: the module's class
becomes a subclass of both, in which `super().forward` of the original class finds the packed look-up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whit.modules.packed import PackedModule
from whit.modules.refusing import refusing
from whit.tensor import PackedWeight


class QuantizedEmbedding(PackedModule, nn.Embedding):
    """Stands for nn.Embedding; rows are dequantized as they are looked up. Made by `pack_embedding`."""

    def _has_all(self) -> bool:
        return original_class(self) is nn.Embedding  # others compute a scale of their own: Gemma's

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (original_class(self), QuantizedEmbedding), self.__getstate__()


class TiedEmbedding(nn.Embedding):
    """An embedding that shares the packed matrix of another module; made by `tie_embedding`."""

    _source: tuple[PackedModule]

    @property
    def source(self) -> PackedModule:
        return self._source[0]

    def forward(self, input: Tensor) -> Tensor:
        return self.source.rows(input).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tied"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (original_class(self), TiedEmbedding), dict(self.__dict__)


def pack_embedding(module: nn.Embedding, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Turn an embedding into one with a packed matrix, in place: whoever holds the module keeps it."""
    module.__class__ = _joined(original_class(module), QuantizedEmbedding)
    module.hold(packed, dtype)  # type: ignore[operator]


def tie_embedding(module: nn.Embedding, source: nn.Module, dtype: torch.dtype) -> None:
    """Turn an embedding into a view of `source`, which is packed or will be, in place."""
    module.__class__ = _joined(original_class(module), TiedEmbedding)
    empty = torch.empty(module.num_embeddings, 0, dtype=dtype, device=module.weight.device)
    module._parameters.pop("weight", None)
    module.register_buffer("weight", refusing(empty), persistent=False)
    module._source = (source,)  # type: ignore[assignment]  # in a tuple: it must not become a submodule


def original_class(module: nn.Embedding) -> type[nn.Embedding]:
    """The class that an embedding had before it was packed or tied."""
    for cls in type(module).__mro__:
        if not issubclass(cls, QuantizedEmbedding | TiedEmbedding):
            return cls if issubclass(cls, nn.Embedding) else nn.Embedding
    return nn.Embedding


def _joined(original: type[nn.Embedding], packed: type[nn.Embedding]) -> type[nn.Embedding]:
    if original is nn.Embedding:
        return packed
    return type(f"{packed.__name__}Of{original.__name__}", (original, packed), {})


def _blank(original: type[nn.Embedding], packed: type[nn.Embedding]) -> nn.Embedding:
    """An instance for copy and pickle to fill: classes made at run time have no name to be found by."""
    cls = _joined(original, packed)
    return cls.__new__(cls)
