"""Small facts about floating-point types that several formats need."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from whit.errors import FormatError, NonFiniteError

DTYPE_NAMES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def widened(tensor: Tensor) -> Tensor:
    """Floats as float32; integers as they are."""
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16: as config.json and errors have it."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type in which a weight is quantized: float32, or float64 where the weight has it."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on a device, made once: each copy to a device would wait for it. Not to be changed."""
    return torch.tensor(values, dtype=dtype, device=device)


def round_up_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that are not below the positive, finite `values`."""
    rounded = values.to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    too_low = rounded.to(values.dtype) < values
    # Positive floats are ordered like their bit patterns.
    return torch.where(too_low, (rounded.view(integer) + 1).view(dtype), rounded)


def check_fits(values: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raise FormatError where a value is beyond the largest finite number of `dtype`.

    Nothing can be asked of a device whose work is being captured: who captures checks the result.
    """
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    largest = torch.finfo(dtype).max
    if values.numel() and not bool(values.max() <= largest):
        found, kind = values.max().item(), dtype_name(dtype)
        raise FormatError(f"{where} {found:.3g} is beyond {kind}'s {largest:.3g}; use a wider scale type")


def is_finite(values: Tensor) -> bool:
    """Whether no value is a NaN or an infinity; integers have neither."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.dtype.itemsize == 1:  # float8 has no arithmetic
        values = values.to(torch.float32)
    # a finite sum has only finite terms, and takes a tenth of the time; it may overflow, though
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_finite(weight: Tensor, where: str) -> None:
    """Raise NonFiniteError naming `where` and the first position that holds a NaN or an infinity."""
    if is_finite(weight):
        return
    bad = ~torch.isfinite(weight.to(torch.float32) if weight.dtype.itemsize == 1 else weight)
    position = tuple(int(i) for i in bad.nonzero()[0])
    value = weight[position].item()
    raise NonFiniteError(
        f"{where}: {value} at position {list(position)} ({int(bad.sum())} such values); "
        "weights must be finite; repair the checkpoint"
    )
