"""llama.cpp's named mixes: which ggml type each matrix of a model gets in a file of type Q4_K_M and the like.

Most matrices get the mix's base type. More bits go where rounding hurts most: to the output head (Q6_K), to the
values' projection (or the joint one of queries, keys and values) and to the feed-forward's last matrix, all of them
or those of some blocks (the first and last eighth and every third between: `more_bits`). These are the rules of
llama.cpp's quantizer for dense models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["head", "embedding", "v", "attention_output", "ffn_down", "other"]

# Mix to base type. Names that are also types are mixes where a whole GGUF file is meant.
MIXES = {
    "q4_0": "q4_0", "q4_1": "q4_1", "q5_0": "q5_0", "q5_1": "q5_1", "q8_0": "q8_0", "q2_k": "q2_k",
    "q3_k_s": "q3_k", "q3_k_m": "q3_k", "q3_k_l": "q3_k", "q4_k_s": "q4_k", "q4_k_m": "q4_k",
    "q5_k_s": "q5_k", "q5_k_m": "q5_k", "q6_k": "q6_k", "iq4_nl": "iq4_nl", "iq4_xs": "iq4_xs",
    "tq1_0": "tq1_0", "tq2_0": "tq2_0",
}  # fmt: skip
# What a bare type means where a whole file is asked for, as for llama.cpp's own tool.
WHOLE_FILE = {**{name: name for name in MIXES}, "q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
ONLY_MIXES = tuple(name for name, base in MIXES.items() if name != base)


@dataclass(frozen=True)
class Place:
    """Where a matrix stands: its role, its block of `blocks`, and how many heads share a key (`shared`)."""

    role: Role
    block: int
    blocks: int
    shared: int
    columns: int


def more_bits(block: int, blocks: int) -> bool:
    """The first eighth of the blocks, the last one, and every third between."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def mixed_type(mix: str, place: Place, group_size: int) -> str:
    """The type of a matrix in a mix; `group_size` is the base type's."""
    base = MIXES[mix]
    if place.role == "head":
        return "q8_0" if base == "q8_0" or place.columns % group_size else "q6_k"
    if place.role == "embedding":
        return "q4_k" if base in ("tq1_0", "tq2_0") else base
    chosen = {
        "v": _values, "attention_output": _attention_output, "ffn_down": _down,
    }.get(place.role)  # fmt: skip
    return (chosen(mix, place) if chosen else None) or base


def _values(mix: str, place: Place) -> str | None:
    found = {
        "q2_k": "q4_k" if place.shared >= 4 else "q3_k",
        "q3_k_m": "q5_k" if place.block < 2 else "q4_k",
        "q3_k_l": "q5_k",
        "q4_k_s": "q5_k" if place.block < 4 else None,
        "q4_k_m": "q6_k" if more_bits(place.block, place.blocks) else None,
        "q5_k_m": "q6_k" if more_bits(place.block, place.blocks) else None,
        "iq4_nl": "q5_k" if place.shared >= 4 else None,
        "iq4_xs": "q5_k" if place.shared >= 4 else None,
    }.get(mix)
    # 70B models: eight times fewer values than queries, so that more bits cost next to nothing.
    large = place.blocks == 80 and place.shared == 8
    return "q5_k" if large and (found or MIXES[mix]) in ("q3_k", "q4_k") else found


def _attention_output(mix: str, place: Place) -> str | None:
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix)


def _down(mix: str, place: Place) -> str | None:
    early = place.block < place.blocks // 8
    return {
        "q2_k": "q3_k",
        "q3_k_m": "q5_k" if place.block < place.blocks // 16 else "q4_k",
        "q3_k_l": "q5_k",
        "q4_k_s": "q5_k" if early else None,
        "q4_k_m": "q6_k" if more_bits(place.block, place.blocks) else None,
        "q5_k_m": "q6_k" if more_bits(place.block, place.blocks) else None,
        "iq4_nl": "q5_k" if early else None,
        "iq4_xs": "q5_k" if early else None,
    }.get(mix)
