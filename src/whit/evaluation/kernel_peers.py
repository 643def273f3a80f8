"""Products of installed peers by weights of about a format of whit's, for `whit bench kernels`: torch and bitsandbytes.

Each takes the weight in floats (out, in) and gives enough copies of its own to be cold, as calls, and their bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor

from whit.kernels.cpu.memory import in_huge_pages

Call: TypeAlias = Callable[[Tensor], object]
Peer: TypeAlias = tuple[list[Call], int]  # calls, one for each copy of the weight, and the bytes of one
Copies: TypeAlias = Callable[[int], int]  # how many weights of so many bytes are needed

FOUR = {f"{kind}{dq}": (kind, bool(dq)) for kind in ("nf4", "fp4") for dq in ("", "-dq")}
EIGHT = {"llm.int8": 6.0, "w8a8": 0.0, "int8": 0.0, "int8-channel": 0.0, "int8-absmax": 0.0}  # and the threshold


def peers_of(format: str) -> dict[str, Callable[[Tensor, Copies], Peer]]:
    """What makes the calls of each peer, by its name. They raise what the peer raises for a shape it does not take."""
    found: dict[str, Callable[[Tensor, Copies], Peer]] = {}
    kind, _, group = format.removesuffix("-asym").partition("-g")
    if kind == "int4" and group.isdigit():
        found["torch int4pack"] = partial(_int4pack, int(group))
    if find_spec("bitsandbytes"):
        if format in FOUR:
            found["bitsandbytes"] = partial(_four_bits, *FOUR[format])
        elif format in EIGHT:
            found["bitsandbytes"] = partial(_eight_bits, EIGHT[format])
    return found


def _int4pack(group: int, weight: Tensor, copies_of: Copies) -> Peer:
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    scales = torch.full((columns // group, rows, 2), 0.01, dtype=torch.bfloat16)
    operators = torch.ops.aten
    one = operators._convert_weight_to_int4pack_for_cpu(codes, 1)
    size = one.numel() * one.element_size() + scales.numel() * 2
    copies = [(in_huge_pages(one.clone()), scales.clone()) for _ in range(copies_of(size))]
    return [
        lambda x, w=w, s=s: operators._weight_int4pack_mm_for_cpu(x, w, group, s)  # type: ignore[misc]
        for w, s in copies
    ], size


def _four_bits(kind: str, double_quant: bool, weight: Tensor, copies_of: Copies) -> Peer:
    import bitsandbytes

    def layer() -> Any:
        made = bitsandbytes.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type=kind,
            compress_statistics=double_quant,
        )  # fmt: skip
        made.weight = bitsandbytes.nn.Params4bit(
            weight.bfloat16(), requires_grad=False, quant_type=kind, compress_statistics=double_quant
        )
        return made.to("cpu").eval()

    size = weight.numel() // 2 + weight.numel() // 64 * (1 if double_quant else 4)
    return [torch.no_grad()(layer()) for _ in range(copies_of(size))], size


def _eight_bits(threshold: float, weight: Tensor, copies_of: Copies) -> Peer:
    import bitsandbytes

    def layer() -> Any:
        made = bitsandbytes.nn.Linear8bitLt(
            weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold
        )
        made.weight = bitsandbytes.nn.Int8Params(weight.bfloat16(), requires_grad=False, has_fp16_weights=False)
        return made.to("cpu").eval()

    size = weight.numel() + 4 * weight.shape[0]
    return [torch.no_grad()(layer()) for _ in range(copies_of(size))], size
