"""The parameters of a transformers model, read one at a time from a checkpoint that may name and cut them otherwise.

Names here are those of the running model. transformers' own conversions say how a checkpoint becomes them: keys are
renamed, the base model's prefix is added or removed, and experts are stacked (`core_model_loading.WeightConverter`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from whit.checkpoint.header import Entry
from whit.checkpoint.reader import Tensors, read_config
from whit.errors import CheckpointError
from whit.tensor import TensorSpec

COMPUTED = "transformers computes it itself"
AUXILIARY = "an auxiliary head (multi-token prediction), which transformers does not run"
NOT_STORED = "not in the checkpoint; transformers computes it on loading"


@dataclass(frozen=True)
class Origin:
    """How a parameter comes out of the checkpoint: `keys` are its tensors; `first` names the conversion, if any."""

    spec: TensorSpec
    keys: tuple[str, ...]
    first: str | None = None


class ModelSource:
    """`origins`: the parameters that are read; `tied`: name to the parameter it shares; `dropped`: name to reason."""

    def __init__(self, model: PreTrainedModel, checkpoint: Tensors) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.config = read_config(checkpoint.folder)
        self.dropped: dict[str, str] = {}
        self._state: dict[str, Tensor] = model.state_dict()
        self._pieces: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self._converters: dict[str, WeightConverter] = {}
        self._converted: dict[str, Tensor] = {}
        self._map_keys()
        found = self._find_origins()
        self.dropped |= {n: f"{type(model).__name__} has no such parameter" for n in found if n not in self._state}
        self.tied = self._find_tied(found)
        self.origins: Mapping[str, Origin] = {n: found[n] for n in self._state if n in found and n not in self.tied}
        self._check(found)
        self._check_types()

    def read(self, name: str) -> Tensor:
        """One parameter as the model holds it, in the checkpoint's dtype."""
        origin = self.origins[name]
        if origin.first is None:
            return self.checkpoint[origin.keys[0]]
        if name not in self._converted:  # one conversion may give several parameters, which are asked for in turn
            self._converted = self._convert(origin.first, self.checkpoint.__getitem__)
        return self._converted.pop(name)

    def entry(self, name: str) -> Entry | None:
        """Where a parameter that is stored as it is lies in the checkpoint; None where it must be converted."""
        origin = self.origins[name]
        return self.checkpoint.entries[origin.keys[0]] if origin.first is None else None

    def _map_keys(self) -> None:
        """Sort the checkpoint's keys by the parameter they become part of, as transformers does on loading."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in mapping if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        for key in sorted(self.checkpoint, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._state)
            if name not in self._state and key in self._state:
                name, pattern = rename_source_key(key, [], [], prefix, self._state)
            if name not in self._state:
                self.dropped[key] = self._why_dropped(key)
            elif pattern is not None:
                self._converters.setdefault(name, by_pattern[pattern])
                self._pieces[name].append((key, pattern))
            elif name in self._pieces:
                self.dropped[key] = f"{self._pieces[name][0][0]} already gives {name}"
            else:
                self._pieces[name].append((key, key))

    def _why_dropped(self, key: str) -> str:
        if any(re.search(pattern, key) for pattern in (r"rotary_emb\.inv_freq", r"position_ids$")):
            return COMPUTED
        ignored = any(re.search(pattern, key) for pattern in self.model._keys_to_ignore_on_load_unexpected or ())
        if self._is_auxiliary(key, ignored):
            return AUXILIARY
        return COMPUTED if ignored else f"{type(self.model).__name__} has no such parameter"

    def _is_auxiliary(self, key: str, ignored: bool) -> bool:
        """Whether a key belongs to a head that predicts tokens further ahead: one that the class ignores and that is
        called so, or a block behind the last that the class ignores (for the published model's number of blocks) or
        the configuration counts."""
        config = self.model.config.get_text_config()
        depth = getattr(config, "num_hidden_layers", 1 << 30)
        ahead = max(getattr(config, name, None) or 0 for name in ("num_mtp_layers", "num_nextn_predict_layers"))
        found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
        block = int(found[1]) if found else -1
        called = re.search(r"(^|\.)(mtp|nextn)", key) is not None
        return (ignored and (called or block >= depth)) or depth <= block < depth + ahead

    def _find_origins(self) -> dict[str, Origin]:
        found = {}
        for first, pieces in self._pieces.items():
            keys = tuple(key for key, _ in pieces)
            if first not in self._converters:
                found[first] = Origin(self.checkpoint.entries[keys[0]].spec, keys)
                continue
            for name, tensor in self._convert(first, self._meta).items():
                found[name] = Origin(TensorSpec(tuple(tensor.shape), tensor.dtype), keys, first)
        return found

    def _meta(self, key: str) -> Tensor:
        spec = self.checkpoint.entries[key].spec
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    def _convert(self, first: str, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Run transformers' conversion whose first result is `first` over tensors that `load` gives."""
        converter = deepcopy(self._converters[first])
        for key, pattern in self._pieces[first]:
            converter.add_tensor(first, key, pattern, partial(load, key))
        try:
            results: dict[str, Any] = converter.convert(first, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            keys = ", ".join(key for key, _ in self._pieces[first][:3])
            raise CheckpointError(
                f"{self.checkpoint.folder}: {first} cannot be assembled from {keys} ... ({error}); "
                "its parts must fit together; get the checkpoint again"
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}

    def _find_tied(self, found: Mapping[str, Origin]) -> dict[str, str]:
        """Parameter to the one that is stored for it. Two stored copies count as tied only where they are equal."""
        groups: dict[str, list[str]] = defaultdict(list)
        for target, source in (self.model.all_tied_weights_keys or {}).items():
            groups[source].append(target)
        tied = {}
        for source, targets in groups.items():
            names = [source, *targets]
            owner = next((name for name in names if name in found), None)
            for name in names:
                if owner is None or name == owner:
                    continue
                if name not in found or self._equal(found[owner], found[name]):
                    tied[name] = owner
        return tied

    def _equal(self, left: Origin, right: Origin) -> bool:
        if left.spec != right.spec:
            return False
        a, b = self.checkpoint[left.keys[0]], self.checkpoint[right.keys[0]]
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    def _check(self, found: Mapping[str, Origin]) -> None:
        """Every parameter is there with its shape, or all that are not are named at once."""
        wrong = [
            f"{name} has shape {list(origin.spec.shape)} for {list(self._state[name].shape)}"
            for name, origin in found.items()
            if name in self._state and origin.spec.shape != tuple(self._state[name].shape)
        ]
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        optional = self.model._keys_to_ignore_on_load_missing or ()
        for name in self._state:
            if name in self.origins or name in self.tied:
                continue
            if name in parameters and not any(re.search(pattern, name) for pattern in optional):
                wrong.append(f"{name} is missing")
            else:
                self.dropped[name] = NOT_STORED
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {'; '.join(wrong)}; all parameters of {type(self.model).__name__} "
                "must be there; get the whole checkpoint"
            )

    def _check_types(self) -> None:
        """Codes that config.json does not call so would be taken for weights: integers, and FP8 with scales beside."""
        scales = [name for name in self.dropped if "scale" in name.rpartition(".")[2]]
        for name, origin in self.origins.items():
            dtype, key = origin.spec.dtype, origin.keys[0]
            if not self._state[name].is_floating_point() or (dtype.is_floating_point and dtype.itemsize > 1):
                continue
            beside = [scale for scale in scales if scale.startswith((f"{key}_", f"{key.removesuffix('.weight')}."))]
            if beside or not dtype.is_floating_point:
                scaled = f", with {beside[0]} beside it" if beside else ""
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {key} is {str(dtype).removeprefix('torch.')}{scaled}, and nothing says "
                    "what its codes mean; config.json must have the quantization_config; NVIDIA ModelOpt's older files "
                    'say it in hf_quant_config.json, and are read with {"quant_method": "modelopt"} there'
                )
