"""llama.cpp's names for the ways in which byte-level BPE cuts text before it merges.

llama.cpp has each of them compiled in; a file only names it. A tokenizer.json says the same as a list of splits by
regular expressions, which is what is compared here. An unknown one is refused: with another cut the same text gives
other tokens, in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whit.errors import UnsupportedModelError

GPT2 = "(byte-level)"
# Splits in order, and the name. "(digits)": each digit alone; "(byte-level)": GPT-2's own expression.
KNOWN: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    ("(digits)", GPT2): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen2",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "gpt-4o",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
}  # fmt: skip


def pretokenizer_name(pre_tokenizer: Any, where: str) -> str:
    """llama.cpp's name of a tokenizer.json's pre-tokenizer; UnsupportedModelError where it has none."""
    splits = tuple(_splits(pre_tokenizer))
    name = KNOWN.get(splits)
    if name is None:
        shown = " then ".join(splits) or "none"
        raise UnsupportedModelError(
            f"{where}: the pre-tokenizer {shown!r} has no name in llama.cpp that whit knows; it must be one of "
            f"{', '.join(KNOWN.values())}; choose another --export"
        )
    return name


def _splits(pre_tokenizer: Any) -> list[str]:
    if not isinstance(pre_tokenizer, Mapping):
        return []
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [split for part in pre_tokenizer.get("pretokenizers", ()) for split in _splits(part)]
    if kind == "Digits":
        return ["(digits)"] if pre_tokenizer.get("individual_digits") else ["(numbers)"]
    if kind == "ByteLevel":
        return [GPT2] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Split":
        pattern = pre_tokenizer.get("pattern", {})
        return [str(pattern.get("Regex", pattern.get("String")))]
    return [f"({kind})"]
