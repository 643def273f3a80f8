"""Shapes of well-known models, as their public config.json files give them, so that no download is needed to plan.

A name is found however it is spelt (`llama-7b`, `LLaMA 7B`, `Llama7B`), with or without its organisation; `7B`, `13B`
and the like alone mean the LLaMA of that size. A bare number of parameters that no model of the table has becomes a
Llama-like shape of about that size (hidden = 128 x layers, the proportion of LLaMA-7B).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model by its name, the number of parameters in that name, and what config.json says."""

    name: str
    nominal: float
    config: dict[str, Any]


def _decoder(kind: str, *sizes: Any, **more: Any) -> dict[str, Any]:
    """config.json of a decoder; sizes: layers, hidden, intermediate, (heads, kv_heads), vocabulary, context."""
    layers, hidden, intermediate, (heads, kv_heads), vocabulary, context = sizes
    return {
        "model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"], "dtype": "bfloat16",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": context, **more,
    }  # fmt: skip


def _llama(*sizes: Any, **more: Any) -> dict[str, Any]:
    return _decoder("Llama", *sizes, **{"tie_word_embeddings": False, **more})


def _qwen2(*sizes: Any, tied: bool = False) -> dict[str, Any]:
    return _decoder("Qwen2", *sizes, 32768, tie_word_embeddings=tied)


def _qwen3(*sizes: Any, tied: bool = False) -> dict[str, Any]:
    return _decoder("Qwen3", *sizes, 151936, 40960, head_dim=128, tie_word_embeddings=tied)


def _gemma2(*sizes: Any, head_dim: int) -> dict[str, Any]:
    return _decoder("Gemma2", *sizes, 256000, 8192, head_dim=head_dim, sliding_window=4096)


def _phi3(*sizes: Any) -> dict[str, Any]:
    return _decoder("Phi3", *sizes, 32064, 4096, sliding_window=2047, pad_token_id=32000, tie_word_embeddings=False)


def _mistral(vocabulary: int, window: int | None) -> dict[str, Any]:
    more = {"sliding_window": window, "tie_word_embeddings": False}
    return _decoder("Mistral", 32, 4096, 14336, (32, 8), vocabulary, 32768, **more)


SHAPES = (
    Shape("LLaMA-7B", 7e9, _llama(32, 4096, 11008, (32, 32), 32000, 2048)),
    Shape("LLaMA-13B", 13e9, _llama(40, 5120, 13824, (40, 40), 32000, 2048)),
    Shape("LLaMA-30B", 30e9, _llama(60, 6656, 17920, (52, 52), 32000, 2048)),
    Shape("LLaMA-65B", 65e9, _llama(80, 8192, 22016, (64, 64), 32000, 2048)),
    Shape("Llama-2-7B", 7e9, _llama(32, 4096, 11008, (32, 32), 32000, 4096)),
    Shape("Llama-2-13B", 13e9, _llama(40, 5120, 13824, (40, 40), 32000, 4096)),
    Shape("Llama-2-70B", 70e9, _llama(80, 8192, 28672, (64, 8), 32000, 4096)),
    Shape("Llama-3-8B", 8e9, _llama(32, 4096, 14336, (32, 8), 128256, 8192)),
    Shape("Llama-3-70B", 70e9, _llama(80, 8192, 28672, (64, 8), 128256, 8192)),
    Shape("Llama-3.1-8B", 8e9, _llama(32, 4096, 14336, (32, 8), 128256, 131072)),
    Shape("Llama-3.1-70B", 70e9, _llama(80, 8192, 28672, (64, 8), 128256, 131072)),
    Shape("Llama-3.1-405B", 405e9, _llama(126, 16384, 53248, (128, 8), 128256, 131072)),
    Shape("Llama-3.2-1B", 1e9, _llama(16, 2048, 8192, (32, 8), 128256, 131072, head_dim=64, tie_word_embeddings=True)),
    Shape("Llama-3.2-3B", 3e9, _llama(28, 3072, 8192, (24, 8), 128256, 131072, head_dim=128, tie_word_embeddings=True)),
    Shape("Mistral-7B-v0.1", 7e9, _mistral(32000, 4096)),
    Shape("Mistral-7B-v0.3", 7e9, _mistral(32768, None)),
    Shape("Mixtral-8x7B", 47e9, _decoder("Mixtral", 32, 4096, 14336, (32, 8), 32000, 32768, num_local_experts=8)),
    Shape("Qwen2.5-0.5B", 0.5e9, _qwen2(24, 896, 4864, (14, 2), 151936, tied=True)),
    Shape("Qwen2.5-1.5B", 1.5e9, _qwen2(28, 1536, 8960, (12, 2), 151936, tied=True)),
    Shape("Qwen2.5-3B", 3e9, _qwen2(36, 2048, 11008, (16, 2), 151936, tied=True)),
    Shape("Qwen2.5-7B", 7e9, _qwen2(28, 3584, 18944, (28, 4), 152064)),
    Shape("Qwen2.5-14B", 14e9, _qwen2(48, 5120, 13824, (40, 8), 152064)),
    Shape("Qwen2.5-32B", 32e9, _qwen2(64, 5120, 27648, (40, 8), 152064)),
    Shape("Qwen2.5-72B", 72e9, _qwen2(80, 8192, 29568, (64, 8), 152064)),
    Shape("Qwen3-0.6B", 0.6e9, _qwen3(28, 1024, 3072, (16, 8), tied=True)),
    Shape("Qwen3-1.7B", 1.7e9, _qwen3(28, 2048, 6144, (16, 8), tied=True)),
    Shape("Qwen3-4B", 4e9, _qwen3(36, 2560, 9728, (32, 8), tied=True)),
    Shape("Qwen3-8B", 8e9, _qwen3(36, 4096, 12288, (32, 8))),
    Shape("Qwen3-14B", 14e9, _qwen3(40, 5120, 17408, (40, 8))),
    Shape("Qwen3-32B", 32e9, _qwen3(64, 5120, 25600, (64, 8))),
    Shape("Gemma-2-2B", 2e9, _gemma2(26, 2304, 9216, (8, 4), head_dim=256)),
    Shape("Gemma-2-9B", 9e9, _gemma2(42, 3584, 14336, (16, 8), head_dim=256)),
    Shape("Gemma-2-27B", 27e9, _gemma2(46, 4608, 36864, (32, 16), head_dim=128)),
    Shape("Phi-3-mini", 3.8e9, _phi3(32, 3072, 8192, (32, 32))),
    Shape("Phi-3-medium", 14e9, _phi3(40, 5120, 17920, (40, 10))),
)  # fmt: skip
ALIASES = {
    "llama70b": "Llama-2-70B", "70b": "Llama-2-70B", "8b": "Llama-3-8B", "405b": "Llama-3.1-405B",
    "mistral7b": "Mistral-7B-v0.1", "phi3mini4kinstruct": "Phi-3-mini", "phi3medium4kinstruct": "Phi-3-medium",
}  # fmt: skip
COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", re.IGNORECASE)
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def find_shape(text: str) -> Shape | None:
    """The shape that a name or a number of parameters stands for; None where it is neither."""
    key = _key(text.rpartition("/")[2])
    by_key = {_key(shape.name): shape for shape in SHAPES}
    for guess in (key, _key(ALIASES.get(key, "")), f"llama{key}", re.sub(r"(instruct|chat|it|hf|base)+$", "", key)):
        if guess in by_key:
            return by_key[guess]
    count = COUNT.fullmatch(text.strip())
    return llama_like(float(count[1]) * UNITS[count[2].lower()]) if count else None


def llama_like(parameters: float) -> Shape | None:
    """A Llama of about so many parameters: 12 hidden^2 a layer, hidden = 128 x layers; None below a million."""
    if parameters < 1e6:
        return None
    layers = max(round((parameters / (12 * 128**2)) ** (1 / 3)), 1)
    hidden = 128 * layers
    intermediate = 32 * round(8 * hidden / 3 / 32)
    shape = _llama(layers, hidden, intermediate, (layers, layers), 32000, 4096, head_dim=128)
    return Shape(f"{parameters / 1e9:g}B parameters", parameters, shape)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
