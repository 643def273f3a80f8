"""`whit.QuantizedCache`: keys and values of past tokens in few bits, through transformers' cache interface.

Every token's key (and value) of every head is a row of head_dim columns: a format's groups lie within it, and a token
is quantized once, alone, when it leaves the window of `recent` tokens that stay in the model's own type. What is
returned to attention is all of it: old tokens dequantized, recent and new ones as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from whit.errors import FormatError, RecipeError, UnsupportedModelError
from whit.formats import parse_format
from whit.layouts import BITS
from whit.named import require
from whit.tensor import Format, PackedWeight, QuantizedTensor


def check_heads(format: Format, columns: int) -> None:
    """RecipeError where a head's columns cannot be cut into the format's groups."""
    if format.group_size and columns % format.group_size:
        raise RecipeError(
            f"cache format {format}: a head has {columns} columns, not divisible by group_size {format.group_size}; "
            "choose a group size that divides it"
        )


class PackedStates:
    """States (batch, heads, tokens, dim) in a format: every packed tensor as (batch, heads, tokens, its columns)."""

    def __init__(self, format: Format, like: Tensor) -> None:
        self.format, self.columns, self.dtype = format, like.shape[-1], like.dtype
        check_heads(format, self.columns)
        specs = BITS.specs(format, (3, self.columns))
        if any(spec.shape[0] != 3 for spec in specs.values()):
            raise RecipeError(
                f"cache format {format}: some of its params are shared by tokens; each must have its own; "
                "use int8, int4-g32 or another without -dq or -tensor"
            )
        empty = {key: (*like.shape[:2], 0, spec.shape[1]) for key, spec in specs.items()}
        self.tensors = {
            key: torch.empty(shape, dtype=specs[key].dtype, device=like.device) for key, shape in empty.items()
        }

    def __len__(self) -> int:
        return self.tensors["codes"].shape[2]

    def append(self, states: Tensor) -> None:
        """Quantize states (batch, heads, n, dim), rounding to the nearest. FormatError where they are not finite."""
        rows = states.reshape(-1, self.columns)
        params = self.format.seal(self.format.fit(rows))
        codes = self.format.encode(rows, params)
        packed = BITS.pack(QuantizedTensor(self.format, tuple(rows.shape), codes, params))
        for key, tensor in packed.tensors.items():
            added = tensor.reshape(*states.shape[:3], -1)
            self.tensors[key] = torch.cat([self.tensors[key], added], dim=2)

    def floats(self) -> Tensor:
        """All states in the type in which they came."""
        batch, heads, tokens, _ = self.tensors["codes"].shape
        flat = {key: tensor.reshape(batch * heads * tokens, -1) for key, tensor in self.tensors.items()}
        packed = PackedWeight(BITS.name, self.format, (batch * heads * tokens, self.columns), flat)
        return BITS.unpack(packed).dequantize(self.dtype).reshape(batch, heads, tokens, self.columns)

    def keep(self, first: int, last: int) -> None:
        """Only tokens [first, last)."""
        self.tensors = {key: tensor[:, :, first:last].contiguous() for key, tensor in self.tensors.items()}

    def choose(self, index: Tensor) -> None:
        """Only these sequences of the batch, in this order."""
        self.tensors = {key: tensor.index_select(0, index.to(tensor.device)) for key, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class QuantizedLayer(DynamicLayer):  # type: ignore[misc]
    """All tokens; `keys` and `values` are the recent ones, in the model's type."""

    def __init__(self, format: Format, recent: int) -> None:
        super().__init__()
        self.format, self.recent = format, recent
        self.packed: tuple[PackedStates, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.packed = tuple(PackedStates(self.format, states) for states in (key_states, value_states))
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new states are kept; returns all, (batch, heads, tokens, dim) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found, recent = [], []
        for packed, kept, new in zip(self.packed, (self.keys, self.values), (key_states, value_states), strict=True):
            late = torch.cat([kept, new], dim=2)
            found.append(torch.cat([packed.floats(), late], dim=2) if len(packed) else late)
            leaving = max(late.shape[2] - self.recent, 0)
            if leaving:
                packed.append(late[:, :, :leaving])
            recent.append(late[:, :, leaving:].contiguous())
        self.keys, self.values = recent
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return len(self.packed[0]) + self.keys.shape[2] if self.is_initialized else 0

    def reset(self) -> None:
        """Empty, as it was made; older transformers would keep the shapes."""
        self.packed, self.is_initialized = (), False
        self.keys = self.values = None  # type: ignore[assignment]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        for packed in self.packed:
            packed.choose(indices)
        index = indices.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: {tokens_to_remove}; it must not be positive; give minus the number to remove")
        if not tokens_to_remove or not self.is_initialized:
            return
        late = self.keys.shape[2]
        kept = max(late + tokens_to_remove, 0)
        for packed in self.packed:
            packed.keep(0, max(len(packed) + late + tokens_to_remove - kept, 0))
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        for packed in self.packed:
            packed.tensors = {key: tensor.to(device) for key, tensor in packed.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds now."""
        if not self.is_initialized:
            return 0
        recent: int = self.keys.nbytes + self.values.nbytes
        return recent + sum(packed.nbytes for packed in self.packed)


class QuantizedSlidingLayer(QuantizedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The last `sliding_window` - 1 tokens."""

    is_croppable = False

    def __init__(self, format: Format, recent: int, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.format, self.recent = format, recent
        self.packed = ()

    def activate_past_recording(self) -> None:
        raise UnsupportedModelError(
            "cache: a quantized layer with a sliding window cannot take tokens back; assisted decoding needs that; "
            "use a cache in 16 bits"
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[2]
        found = QuantizedLayer.update(self, key_states, value_states)
        room = self.sliding_window - 1
        surplus = max(self.keys.shape[2] - room, 0)
        self.keys, self.values = self.keys[:, :, surplus:], self.values[:, :, surplus:]
        for packed in self.packed:
            packed.keep(max(len(packed) + self.keys.shape[2] - room, 0), len(packed))
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = DynamicSlidingWindowLayer.get_mask_sizes(self, query_length)
        return sizes

    def get_seq_length(self) -> int:
        seen: int = self.cumulative_length
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.activate_past_recording()


class QuantizedCache(Cache):  # type: ignore[misc]
    """A cache of keys and values in few bits, for `generate(past_key_values=...)` and every forward of a decoder.

    `config` is the model's and tells its sliding windows; without it all layers keep all tokens. `format` is a SPEC
    whose params belong to single tokens: int8 (one scale for each head of a token), int4-g32 (one per 32 columns of a
    head), int4-g32-asym and the like. The last `recent` tokens stay in 16 bits.

    RecipeError for a format or a `recent` that cannot be used, at the latest when the first states come;
    UnsupportedModelError for layers that cache something else.
    """

    def __init__(self, config: Any = None, format: str | Format = "int8", recent: int = 0) -> None:
        advice = 'it must be the model\'s; write QuantizedCache(model.config, "int8")'
        require(config, PretrainedConfig | None, "cache: config", advice)
        chosen = parse_format(format)
        if recent < 0:
            raise RecipeError(f"cache: {recent} recent tokens; there cannot be fewer than none; use 0 or more")
        if chosen.bits == 16:
            raise FormatError(f"cache format {chosen}: it quantizes nothing; use int8 or int4-g32, or a plain cache")
        if config is None:
            super().__init__(layer_class_to_replicate=lambda: QuantizedLayer(chosen, recent))
            return
        super().__init__(layers=[_layer(layer, chosen, recent) for layer in DynamicCache(config=config).layers])

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now, recent tokens included."""
        return sum(layer.nbytes for layer in self.layers)


def _layer(plain: Any, format: Format, recent: int) -> QuantizedLayer:
    if type(plain) is DynamicSlidingWindowLayer:
        return QuantizedSlidingLayer(format, recent, plain.sliding_window)
    if type(plain) is DynamicLayer:
        return QuantizedLayer(format, recent)
    raise UnsupportedModelError(
        f"cache: the model has a {type(plain).__name__}, which keeps more than keys and values; "
        "only these can be quantized; use a cache in 16 bits"
    )
