"""The loss on responses, without ever holding all logits.

loss = sum over kept places t of -log softmax(h_t W^T)[target_t], in float32

The head multiplies a chunk of places at a time. Its weight is frozen, so the gradient of a chunk's hidden states is
known as soon as its loss is: dh = (softmax - onehot) W, and nothing else has to be kept or computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from whit.process import give_back_freed
from whit.training.packing import Batch

CHUNK = 1 << 26  # logits held at a time: 256 MB of float32


class ChunkedLoss(torch.autograd.Function):
    """Hidden states (n, hidden) and targets (n,) to the summed loss, with the gradient computed on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, rows: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = _sum(head(chunk), targets[start : start + rows])
            gradient[start : start + rows] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


@dataclass(frozen=True)
class ResponseLoss:
    """How the loss of one model is computed: in chunks where its logits are just head(hidden states)."""

    chunked: bool
    vocabulary: int

    @staticmethod
    def of(model: Any) -> ResponseLoss:
        """Found by trying: some models scale or cap their logits, and some train their head."""
        head = model.get_output_embeddings()
        vocabulary = int(model.config.get_text_config().vocab_size)
        if head is None or any(p.requires_grad for p in head.parameters()) or model.base_model is model:
            return ResponseLoss(False, vocabulary)
        tokens = torch.arange(1, 9, device=model.device)[None] % vocabulary
        with torch.no_grad():
            whole = model(input_ids=tokens, use_cache=False).logits
            parts = head(model.base_model(input_ids=tokens, use_cache=False)[0])
        return ResponseLoss(bool(torch.equal(whole, parts)), vocabulary)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """The loss summed over the batch's kept places, a float32 scalar."""
        inputs: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
        if batch.positions is not None:
            inputs["position_ids"] = batch.positions
        if not self.chunked:
            logits = model(**inputs).logits
            return _sum(logits.flatten(0, 1)[batch.kept], batch.targets)
        hidden = model.base_model(**inputs)[0].flatten(0, 1)[batch.kept]
        head, rows = model.get_output_embeddings(), max(CHUNK // self.vocabulary, 1)
        if hidden.device.type == "cpu":
            give_back_freed()  # the blocks'; the logits would lie beside it
        if not torch.is_grad_enabled():
            pairs = zip(torch.split(hidden, rows), torch.split(batch.targets, rows), strict=True)
            return torch.stack([_sum(head(h), t) for h, t in pairs]).sum()
        return ChunkedLoss.apply(hidden, batch.targets, head, rows)  # type: ignore[no-untyped-call,no-any-return]


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
