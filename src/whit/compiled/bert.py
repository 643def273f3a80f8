"""BERT from its tokens on in compiled code: words, positions and the first norm go into the call of the layers.

What transformers does around the layers (masks of four dimensions, three look-ups, checks, records of outputs) costs as
much as half of them where there is one short sequence. A call that asks for anything but the last hidden state and the
pooled one of plain tokens goes the long way.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from whit.kernels.cpu.encoder import Embedding, Encoder

ASKED = ("output_attentions", "output_hidden_states")


def take_tokens(model: Any, encoder: Encoder) -> None:
    """Let a BertModel give tokens to the encoder, if its embeddings are plain float32 and normed as its layers are."""
    embedding = _embedding(model.embeddings, encoder.epsilon)
    if embedding is None:
        return
    plain = model.forward

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> Any:
        if input_ids is None or others or not _covered(model, embedding, input_ids, attention_mask, kwargs):
            return plain(input_ids, attention_mask, token_type_ids, *others, **kwargs)
        if token_type_ids is not None and (token_type_ids.shape != input_ids.shape or bool(token_type_ids.any())):
            return plain(input_ids, attention_mask, token_type_ids, **kwargs)
        seen = None
        if attention_mask is not None and not bool((whole := attention_mask != 0).all()):
            seen = whole[:, None, None, :]
        hidden = encoder.of_tokens(input_ids, embedding, seen)
        pooled = None if model.pooler is None else model.pooler(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)

    model.forward = forward


def records() -> bool:
    """Whether transformers collects what layers give, which it does by hooks on them."""
    collector = getattr(import_module("transformers.utils.output_capturing"), "_active_collector", None)
    found = collector.get() if collector is not None else None
    return bool(found)


def _embedding(module: Any, epsilon: float) -> Embedding | None:
    tables = [module.word_embeddings, module.position_embeddings, module.token_type_embeddings]
    norm = module.LayerNorm
    if any(type(table) is not nn.Embedding or table.weight.dtype != torch.float32 for table in tables):
        return None
    if norm.eps != epsilon or not all(t.weight.is_contiguous() and t.max_norm is None for t in tables):
        return None
    word, position, kinds = (table.weight.detach() for table in tables)
    beside = position + kinds[0]
    return Embedding(word, beside, (norm.weight.detach().float(), norm.bias.detach().float()))


def _covered(model: Any, embedding: Embedding, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether a call is one for plain tokens."""
    config = model.config
    if model.embeddings.word_embeddings.weight.data_ptr() != embedding.word.data_ptr():  # moved, or of another type
        return False
    if torch.is_grad_enabled() or model.training or torch.compiler.is_compiling() or records():
        return False
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.device.type != "cpu" or ids.shape[1] > len(embedding.beside):
        return False
    if mask is not None and (mask.shape != ids.shape or mask.device.type != "cpu"):
        return False
    if any(getattr(config, name, False) for name in ASKED) or config.return_dict is False:
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in (model.embeddings, model.encoder)):
        return False
    return not any(value is not None for key, value in kwargs.items() if key != "return_dict") and (
        kwargs.get("return_dict", True) is not False
    )
