"""Perplexity: exp of the mean negative log-likelihood of each next token, every window scored on its own.

ppl = exp( 1/N  sum_w sum_t  -log p(x[w, t+1] | x[w, 0..t]) ),   N = windows * (context - 1)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from whit.errors import EvaluationError
from whit.evaluation.listener import Listener
from whit.model.halves import halves

_BATCH_TOKENS = 2048  # one window of the usual context; short windows share a forward pass
_GPU_BATCHES = 8  # times as many there: small models are bound by launches
_CHUNK_ELEMENTS = 16 * 2**20  # logits turned into float32 at a time: 64 MiB


def batches(windows: Tensor, on_gpu: bool) -> list[Tensor]:
    """The windows [windows, context] in the groups that share one forward pass."""
    tokens = _BATCH_TOKENS * (_GPU_BATCHES if on_gpu else 1)
    return list(torch.split(windows, max(1, tokens // windows.shape[1])))


def next_token_logits(model: Any, batch: Tensor) -> Tensor:
    """Logits of the tokens that are predicted, [windows * predicted, vocabulary] in the model's own dtype.

    They are all of a window but the first; of a model that reads one text and writes another, the second half.
    """
    batch = batch.to(model.device)
    with torch.inference_mode():
        if getattr(model.config, "is_encoder_decoder", False):
            source, begun, _ = halves(model.config, batch)
            logits: Tensor = model(input_ids=source, decoder_input_ids=begun, use_cache=False).logits
        else:
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return logits.reshape(-1, logits.shape[-1])


def predicted(logits: Tensor, batch: Tensor) -> Tensor:
    """The tokens that `next_token_logits` are of, int64 [rows]: as many as they are, the last of every window."""
    return batch[:, -(len(logits) // len(batch)) :].reshape(-1)


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows whose float32 log-probabilities stay small."""
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), float64 [rows] on the CPU, from logits [rows, vocabulary] and targets int64 [rows]."""
    targets = targets.to(logits.device)
    parts = []
    for rows in row_chunks(*logits.shape):
        log_probabilities = torch.log_softmax(logits[rows].float(), dim=-1)
        parts.append(-log_probabilities.gather(1, targets[rows, None]).squeeze(1))
    return torch.cat(parts).double().cpu()


def score_windows(model: Any, windows: Tensor, listener: Listener) -> Tensor:
    """The loss of every predicted token, float64 [windows, predicted]. Raises EvaluationError on NaN."""
    losses = []
    done = 0
    for batch in batches(windows, model.device.type == "cuda"):
        logits = next_token_logits(model, batch)
        losses.append(token_losses(logits, predicted(logits, batch)).reshape(batch.shape[0], -1))
        require_finite(losses[-1], called(model))
        done += batch.shape[0]
        listener.step("perplexity", done, windows.shape[0], batch.numel())
    return torch.cat(losses)


def called(model: Any) -> str:
    """A loaded model by the name that it was loaded by."""
    return str(getattr(model, "name_or_path", "") or "the model")


def require_finite(losses: Tensor, who: str) -> None:
    """A NaN or an infinite loss would make every figure of the run worthless."""
    if not torch.isfinite(losses).all():
        raise EvaluationError(
            f"{who}: a next token has no finite probability; every one must; try --dtype float32 or check the weights"
        )
