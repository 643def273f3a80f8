"""The key-value cache: what generation remembers of every token it has seen.

bytes = sum over layers of batch x tokens x kv_heads x (key_dim + value_dim) x bytes of an element

`tokens` is the context, or the window where a layer attends to that many only (transformers keeps window - 1 of them
for the next token). Grouped queries share keys: kv_heads, not heads, count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from whit.errors import UnsupportedModelError
from whit.formats import parse_format
from whit.integrations.cache import check_heads
from whit.layouts import BITS

DENSE = {
    "fp32": torch.float32, "float32": torch.float32, "fp16": torch.float16, "float16": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
}  # fmt: skip
STATELESS = ("moe", "mlp")  # blocks that look at one token at a time (Nemotron-H)


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a token, and of how many tokens at most (None: all)."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


def cache_layers(config: Any) -> tuple[tuple[CacheLayer, ...], tuple[str, ...]]:
    """The layers of a decoder's configuration that cache keys and values, and notes on those that do not."""
    check_even(config)
    heads = getattr(config, "num_attention_heads", 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = head_dim(config)
    key_dim, value_dim = dim, dim
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention: transformers caches what all heads share
        kv_heads, key_dim, value_dim = 1, config.kv_lora_rank, config.qk_rope_head_dim
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_window_size", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    count = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    usual = "recurrent blocks" if not heads else "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [usual] * count
    layers, strange = [], []
    own = count - (getattr(config, "num_kv_shared_layers", None) or 0)  # the last read others' keys
    for kind in (usual if kind == "attention" else kind for kind in kinds[:own]):
        if kind == "full_attention":
            layers.append(CacheLayer(kv_heads, key_dim, value_dim))
        elif kind in ("sliding_attention", "chunked_attention"):
            limit = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else window
            layers.append(CacheLayer(kv_heads, key_dim, value_dim, limit))
        elif kind not in STATELESS:
            strange.append(kind)
            if kind == "hybrid":  # attention beside a state
                layers.append(CacheLayer(kv_heads, key_dim, value_dim))
    counts = {kind: strange.count(kind) for kind in dict.fromkeys(strange)}
    return tuple(layers), tuple(f"{n} layers of {k} keep a state of fixed size, not counted" for k, n in counts.items())


def check_even(config: Any) -> None:
    """UnsupportedModelError where a configuration has widths of stages instead of one (Segformer, ConvNeXt)."""
    kinds = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not all(isinstance(kind, int) for kind in kinds):
        raise UnsupportedModelError(
            f"{type(config).__name__}: has no single hidden_size and num_hidden_layers; whit memory counts models "
            "whose blocks are equally wide; see what the weights take by whit quantize --dry-run"
        )


def head_dim(config: Any) -> int:
    """Columns of a head; 0 where a model has no attention (Mamba, RWKV)."""
    heads = getattr(config, "num_attention_heads", 0)
    own = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(own or config.hidden_size // heads) if heads else 0


def cache_bytes(layers: tuple[CacheLayer, ...], tokens: int, batch: int, precision: str, default: torch.dtype) -> int:
    """Bytes of the whole cache at `tokens` of context in a precision: `auto`, fp32, fp16, bf16, or any SPEC."""
    total = 0
    for layer in layers:
        kept = tokens if layer.window is None else min(tokens, layer.window)
        rows = batch * kept * layer.kv_heads
        total += sum(_matrix_bytes(rows, dim, precision, default) for dim in (layer.key_dim, layer.value_dim))
    return total


def check_precision(precision: str, layers: tuple[CacheLayer, ...]) -> None:
    """RecipeError where the cache's heads cannot be cut into the format's groups; FormatError for an unknown one."""
    if precision == "auto" or precision in DENSE:
        return
    format = parse_format(precision)
    for dim in {dim for layer in layers for dim in (layer.key_dim, layer.value_dim)}:
        check_heads(format, dim)


def _matrix_bytes(rows: int, columns: int, precision: str, default: torch.dtype) -> int:
    dtype = default if precision == "auto" else DENSE.get(precision)
    if dtype is not None:
        return rows * columns * dtype.itemsize
    return sum(spec.nbytes for spec in BITS.specs(parse_format(precision), (rows, columns)).values())
