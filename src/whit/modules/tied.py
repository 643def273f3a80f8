"""An output head that shares the packed matrix of the input embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whit.kernels import packed_linear
from whit.modules.embedding import QuantizedEmbedding
from whit.modules.packed import resident


class TiedHead(nn.Module):
    """x (..., embedding_dim) times the embedding's matrix (num_embeddings, embedding_dim)^T, plus its own bias."""

    bias: nn.Parameter | None

    def __init__(self, source: nn.Embedding, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple, lest it become a submodule and be saved twice
        self.in_features, self.out_features = source.embedding_dim, source.num_embeddings
        empty = torch.empty(self.out_features, 0, dtype=dtype, device=source.weight.device)
        self.register_buffer("weight", empty, persistent=False)
        self.register_parameter("bias", bias)

    @property
    def source(self) -> QuantizedEmbedding:
        return self._source[0]  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        with resident(self.source) as packed:
            return packed_linear(input.to(packed.device), packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"
