"""The tokenizer that a GGUF file's key-values describe, of those with byte-level BPE: the inverse of `tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from whit.errors import UnsupportedModelError
from whit.export.gguf.pretokenizers import GPT2, KNOWN
from whit.export.gguf.tokenizer import CONTROL, SPECIAL, UNUSED, USER


def byte_level_tokenizer(metadata: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast:
    """UnsupportedModelError where the file's tokenizer is of another kind, or cuts text in a way that whit has not."""
    kind, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    splits = next((splits for splits, known in KNOWN.items() if known == name), None)
    if kind != "gpt2" or splits is None:
        raise UnsupportedModelError(
            f"{where}: a tokenizer {kind!r} that cuts text by {name!r}; whit reads gpt2 by one of "
            f"{', '.join(KNOWN.values())} here; use the original model"
        )
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE(vocabulary, merges))
    last = pre_tokenizers.ByteLevel(False, use_regex=GPT2 in splits)
    found.pre_tokenizer = pre_tokenizers.Sequence([*(_split(split) for split in splits if split != GPT2), last])
    found.decoder = decoders.ByteLevel()
    marked = [(token, types[i]) for token, i in vocabulary.items() if types[i] in (CONTROL, USER)]
    found.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in marked])
    named = {
        f"{theirs}_token": tokens[number]
        for ours, theirs in SPECIAL.items()
        if isinstance(number := metadata.get(f"tokenizer.ggml.{ours}_token_id"), int) and number < len(tokens)
    }
    made = PreTrainedTokenizerFast(tokenizer_object=found, **named)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        made.chat_template = template
    return made


def _split(split: str) -> Any:
    if split == "(digits)":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(split), "isolated")
