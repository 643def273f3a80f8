"""A model's tokenizer.json as the key-values `tokenizer.*` of a GGUF file.

llama.cpp has its own tokenizers: "gpt2" (byte-level BPE: tokens, merges, and the name of a way to cut text before
merging), "llama" (SentencePiece's BPE with byte tokens: a score for every token, the highest is merged first) and "t5"
(unigram). Token types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from whit.checkpoint.reader import read_json
from whit.errors import CheckpointError, UnsupportedModelError
from whit.export.gguf.header import Value
from whit.export.gguf.pretokenizers import pretokenizer_name

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "separator": "sep", "padding": "pad", "mask": "mask"}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def tokenizer_metadata(folder: Path, config: Any) -> dict[str, Value]:
    """Key-values of the tokenizer of a model folder; without a tokenizer.json llama.cpp is told that there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        if (folder / "tokenizer.model").exists() or (folder / "vocab.json").exists():
            raise UnsupportedModelError(
                f"{folder}: a tokenizer without tokenizer.json; a gguf file is made from that; "
                "save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return {"tokenizer.ggml.model": "none"}
    raw = read_json(path)
    found = _of_model(raw, path)
    tokens, types = _tokens(raw, config.vocab_size, path)
    values: dict[str, Value] = {
        **found, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        **_special(folder, config, tokens), **_adds(path, folder),
    }  # fmt: skip
    if "tokenizer.ggml.scores" in values:
        scores = values["tokenizer.ggml.scores"]
        assert isinstance(scores, list)
        values["tokenizer.ggml.scores"] = scores + [-1e4] * (len(tokens) - len(scores))
    if template := _chat_template(folder):
        values["tokenizer.chat_template"] = template
    return values


def _of_model(raw: Mapping[str, Any], path: Path) -> dict[str, Value]:
    """What only one of llama.cpp's tokenizers has."""
    model = raw["model"]
    if model.get("type") == "Unigram":
        values: dict[str, Value] = {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.scores": [float(score) for _, score in model["vocab"]],
            "tokenizer.ggml.add_space_prefix": _adds_space(raw),
            "tokenizer.ggml.remove_extra_whitespaces": '" {2,}"' in json.dumps(raw.get("normalizer")),
        }
        if charsmap := _charsmap(raw.get("normalizer")):
            values["tokenizer.ggml.precompiled_charsmap"] = list(charsmap)
        return values
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"{path}: a {model.get('type')} tokenizer; llama.cpp's decoders read BPE and Unigram; "
            "choose another --export"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": _scores(model["vocab"], merges),
            "tokenizer.ggml.add_space_prefix": _adds_space(raw),
        }
    name = pretokenizer_name(raw.get("pre_tokenizer"), str(path))
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _scores(vocabulary: Mapping[str, int], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair whose result scores highest: a result's score is that of its first merge."""
    scores = [-1e4 - float(len(merges))] * (max(vocabulary.values()) + 1)
    seen: set[str] = set()
    for rank, merge in enumerate(merges):
        result = merge.replace(" ", "")
        if result in vocabulary and result not in seen:
            seen.add(result)
            scores[vocabulary[result]] = -float(rank)
    return scores


def _tokens(raw: Mapping[str, Any], size: int, path: Path) -> tuple[list[str], list[int]]:
    """Every token by its number, and its type; numbers without a token are unused."""
    model = raw["model"]
    vocabulary = model["vocab"]
    numbered = (
        {number: text for text, number in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else {number: text for number, (text, _) in enumerate(vocabulary)}
    )
    added = {token["id"]: token for token in raw.get("added_tokens", ())}
    last = max([*numbered, *added], default=-1)
    if last >= size:
        raise CheckpointError(
            f"{path}: token {last} for {size} embeddings; every token must have one; get the model's own tokenizer"
        )
    byte_fallback = bool(model.get("byte_fallback"))
    unknown = model.get("unk_token") if isinstance(vocabulary, dict) else numbered.get(model.get("unk_id"))
    tokens, types = [], []
    for number in range(size):
        text = added[number]["content"] if number in added else numbered.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)
        if text is None:
            types.append(UNUSED)
        elif text == unknown and (byte_fallback or not isinstance(vocabulary, dict)):
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number].get("special") else USER)
        else:
            types.append(BYTE if byte_fallback and BYTE_TOKEN.fullmatch(text) else NORMAL)
    return tokens, types


def _special(folder: Path, config: Any, tokens: list[str]) -> dict[str, Value]:
    """Numbers of the special tokens: the tokenizer's own where it names them, else the config's."""
    named = _tokenizer_config(folder)
    numbers = {text: number for number, text in reversed(list(enumerate(tokens)))}
    values: dict[str, Value] = {}
    for key, short in SPECIAL.items():
        text = named.get(f"{short}_token")
        text = text.get("content") if isinstance(text, dict) else text
        number: Any = numbers.get(text) if isinstance(text, str) else None
        if number is None:
            told = getattr(config, f"{short}_token_id", None)
            number = told[0] if isinstance(told, list) and told else told
        if isinstance(number, int) and 0 <= number < len(tokens):
            values[f"tokenizer.ggml.{key}_token_id"] = number
    return values


def _adds(path: Path, folder: Path) -> dict[str, Value]:
    """Whether text gets a begin and an end of its own: tried on the tokenizer."""
    try:
        encoded = Tokenizer.from_file(str(path)).encode("a", add_special_tokens=True)
        plain = Tokenizer.from_file(str(path)).encode("a", add_special_tokens=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer ({error}); it must be one; get another copy") from None
    before = encoded.ids.index(plain.ids[0]) if plain.ids else 0
    named = _tokenizer_config(folder)
    begins, ends = before > 0, len(encoded.ids) > before + len(plain.ids)
    return {
        "tokenizer.ggml.add_bos_token": begins or bool(named.get("add_bos_token")),
        "tokenizer.ggml.add_eos_token": ends or bool(named.get("add_eos_token")),
    }


def _adds_space(raw: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text: a normalizer or a pre-tokenizer does it."""
    text = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _charsmap(normalizer: Any) -> bytes | None:
    """SentencePiece's table of normalisations."""
    if not isinstance(normalizer, dict):
        return None
    if normalizer.get("type") == "Precompiled":
        return base64.b64decode(normalizer.get("precompiled_charsmap") or "")
    parts = normalizer.get("normalizers") or ()
    return next((found for part in parts if (found := _charsmap(part))), None)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = _tokenizer_config(folder).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
