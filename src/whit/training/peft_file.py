"""A LoRA adapter as PEFT saves it, read without PEFT: what it adds to each weight.

    W' = W + s B A,   A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r) (rsLoRA)
    DoRA:     row i of W' scaled to the length m_i,  m (out,)
    QA-LoRA:  A (r, groups), each column for a group of inputs: the product is constant inside a group
    an embedding's A (r, rows), B (dim, r):  W' = W + s (B A)^T

`modules_to_save` are weights that were trained whole. What else an adapter can hold is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.header import read_header
from whit.checkpoint.reader import TensorFiles, read_json
from whit.errors import CheckpointError
from whit.formats.numeric import check_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "ea", "lora_embedding_B": "eb",
    "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m",
}  # fmt: skip
REFUSED = (
    "alora_invocation_tokens", "layer_replication", "use_bdlora", "arrow_config", "lora_bias", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip


@dataclass(frozen=True)
class Delta:
    """What an adapter does to one matrix (out, in): `b` (out, r) with the scaling in it, `a` (r, in), both float32."""

    b: Tensor
    a: Tensor
    magnitude: Tensor | None = None

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged matrix (out, in), in float32."""
        merged: Tensor = weight.to(torch.float32) + (self.b @ self.a).to(weight.device)
        if self.magnitude is None:
            return merged
        scaled: Tensor = merged * (self.magnitude.to(weight.device) / merged.norm(dim=1))[:, None]
        return scaled

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b), self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """`deltas` by the name of the module, `whole` by that of the parameter, both as the model below PEFT has them."""

    folder: Path
    deltas: Mapping[str, Delta]
    whole: Mapping[str, Tensor]


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's folder; CheckpointError where it is not whole, not finite, or of another kind than LoRA."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: holds no {CONFIG}; ADAPTER must be a folder that PEFT saved; check the path")
    config = read_json(folder / CONFIG)
    _check_kind(config, folder)
    tensors = _tensors(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = next((suffix for suffix in FACTORS if name.endswith(f".{suffix}")), None)
        if found is not None:
            parts.setdefault(name.removesuffix(f".{found}"), {})[FACTORS[found]] = tensor.to(torch.float32)
        elif _is_whole(name, config):
            whole[name.replace(".base_layer.", ".")] = tensor
        else:
            raise CheckpointError(f"{folder}: {key} is not a part of LoRA that whit knows; merge it with PEFT itself")
    if not parts and not whole:
        raise CheckpointError(f"{folder}: its {WEIGHTS} is empty; an adapter must hold factors; save it again")
    return Adapter(folder, {name: _delta(name, found, config, folder) for name, found in parts.items()}, whole)


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder}: a {kind} adapter; whit merges LoRA, rsLoRA, DoRA and QA-LoRA; use PEFT's own")
    if not isinstance(config.get("r"), int):
        raise CheckpointError(f"{folder}: {CONFIG} says rank {config.get('r')}; it must be an integer; save it again")
    strange = [key for key in REFUSED if config.get(key)]
    if strange:
        raise CheckpointError(f"{folder}: {strange[0]} is set; such an adapter is not a sum of matrices; keep it apart")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors, which must be finite."""
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: holds no {WEIGHTS}; whit opens no pickles; save the adapter as safetensors")
    files = TensorFiles()
    files.entries = dict(read_header(folder / WEIGHTS))
    try:
        tensors = {name: files[name] for name in files}
    finally:
        files.close()
    for name, tensor in tensors.items():
        check_finite(tensor, f"{folder}: {name}")
    return tensors


def _is_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor takes a parameter's place: of a module to save, or a bias that was trained."""
    saved: Iterable[str] = config.get("modules_to_save") or ()
    if any(f".{module}." in f".{name}" for module in saved) or ".base_layer." in name:  # a head beside its factors
        return True
    return name.endswith(".bias") and config.get("bias", "none") != "none"


def _delta(name: str, found: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Delta:
    kinds = ("ea", "eb") if "ea" in found or "eb" in found else ("a", "b")
    missing = [kind for kind in kinds if kind not in found]
    if missing:
        raise CheckpointError(f"{folder}: {name} has one factor of two; both must be there; save the adapter again")
    a, b = (found["eb"].T, found["ea"].T) if kinds[0] == "ea" else (found["a"], found["b"])
    rank = int(_patterned(config.get("rank_pattern"), name, config.get("r")))
    if len(a) != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{folder}: {name} has factors {list(a.shape)} and {list(b.shape)}; {CONFIG} says rank {rank}; "
            "all must agree; save the adapter again"
        )
    alpha = float(_patterned(config.get("alpha_pattern"), name, config.get("lora_alpha", rank)))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if config.get("use_qalora"):  # means of the groups, times their number
        size = int(config["qalora_group_size"])
        a = a.repeat_interleave(size, dim=1) * (a.shape[1] / size)
    magnitude = found.get("m")
    if config.get("use_dora") and magnitude is None:
        raise CheckpointError(f"{folder}: {name} lacks DoRA's magnitudes; they must be there; save the adapter again")
    return Delta(b * scaling, a.contiguous(), None if magnitude is None else magnitude.reshape(-1))


def _patterned(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that is the end of a module's name, as PEFT looks it up."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)
