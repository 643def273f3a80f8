"""Under which names, and cut how, a checkpoint of transformers stores the parameters of a running model.

transformers' own conversions, reversed: parameters are renamed, and stacked experts are taken apart. To learn which
rows go where, the conversion is run over numbers of rows instead of weights.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from whit.errors import UnsupportedModelError


def stored_rows(model: PreTrainedModel, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Stored name to the rows of the parameter (leading dimensions flattened) that it holds, in its order.

    UnsupportedModelError where a conversion does more than rename, split and reorder rows.
    """
    count = shape[0] if len(shape) == 1 else prod(shape[:-1])
    numbers = torch.arange(count).reshape(shape if len(shape) < 2 else (*shape[:-1], 1))
    return {key: rows.reshape(-1) for key, rows in _reverted(model, name, numbers).items()}


def stored_tensors(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter as a checkpoint of transformers stores it."""
    return {key: value.contiguous() for key, value in _reverted(model, name, tensor).items()}


def _reverted(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    try:
        return dict(revert_weight_conversion(model, {name: tensor}))
    except Exception as error:  # what an architecture's own conversions raise is not written down
        raise UnsupportedModelError(
            f"{name}: transformers cannot store it as a checkpoint does ({error}); other programs need these names; "
            "use --export whit"
        ) from None
