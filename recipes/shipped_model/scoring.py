"""Bits per byte of a causal language model over a token stream.

Every token after the stream's first `eos` is predicted once, in windows of `context` tokens that start cold:

    bits_per_byte = sum(-log2 p(token | window so far)) / bytes of the documents
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
def token_losses(model: torch.nn.Module, stream: np.ndarray, context: int) -> torch.Tensor:
    """stream (n + 1,) -> nats of each of its n predicted tokens, float32 on the CPU."""
    tokens = torch.from_numpy(stream.astype(np.int64)).to(model.device)
    losses = []
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = model(window[None, :-1], use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits, window[1:], reduction="none").cpu())
    return torch.cat(losses)


def summary(nats: float, tokens: int, text_bytes: int) -> dict:
    """Total nats over a text -> the three figures it is quoted by."""
    loss = nats / tokens
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "bits_per_byte": round(nats / math.log(2) / text_bytes, 4),
    }
