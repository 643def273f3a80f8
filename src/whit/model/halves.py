"""A text cut for a model that reads one text and writes another: it reads the first half and writes the second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def halves(config: Any, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the encoder is given, what the decoder is given, and what it is to predict at every place.

    windows are int64 (n, context); the results are (n, context // 2), and twice (n, context - context // 2). As in
    training, the source ends with the end of a text, and the decoder's inputs are the targets one place later.
    """
    half = windows.shape[1] // 2
    source, target = windows[:, :half].clone(), windows[:, half:]
    end = _token(config, "eos_token_id")
    if end is not None:
        source[:, -1] = end
    begin = _token(config, "decoder_start_token_id", "bos_token_id", "pad_token_id")
    first = torch.full_like(target[:, :1], 0 if begin is None else begin)
    return source, torch.cat([first, target[:, :-1]], 1), target


def _token(config: Any, *names: str) -> int | None:
    """The first of these that the configuration names; of several ends the first."""
    for name in names:
        found = getattr(config, name, None)
        if isinstance(found, list | tuple) and found:
            return int(found[0])
        if isinstance(found, int):
            return found
    return None
