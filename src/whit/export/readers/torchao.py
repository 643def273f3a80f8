"""torchao's tensor subclasses in safetensors, as transformers' TorchAoConfig saves them (torchao 0.14 and newer).

The file's header says of each parameter `module.leaf` its class and that class's attributes, as JSON; its tensors are
`module._leaf_qdata`, `module._leaf_scale` and so on; in 0.14 `module.leaf:qdata`, and `module.leaf:_data` for one that
is no subclass. What each class holds is in `torchao_kinds`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whit.activations import Activations
from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, sentences, shape_of
from whit.export.readers.torchao_kinds import KINDS, Stored

DATA = (
    "qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale", "act_quant_scale",
    "act_quant_zero_point", "act_per_tensor_scale",
)  # fmt: skip
PLAIN = "Tensor"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def read_torchao(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every parameter of a class of torchao's; and what 0.14 renamed."""
    packed = {}
    for name, kind, said in _described(checkpoint):
        keys = _keys(checkpoint, name)
        if kind == PLAIN:
            if (key := f"{name}:_data") in checkpoint:
                packed[name] = _plain(checkpoint, key)
        elif keys:
            with sentences(name):
                packed[name] = _parameter(Stored(checkpoint, name, said, keys), kind)
    codes = {key for item in packed.values() for key in item.keys}
    lost = next((key for key in checkpoint if key.endswith(("_qdata", ":qdata")) and key not in codes), None)
    if lost is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: {lost}: the file's header does not say of which class of torchao's it is; it must, "
            "as save_pretrained writes it; get the file again"
        )
    return packed


def _described(checkpoint: Checkpoint) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(parameter, class, attributes) of all that the headers describe."""
    for name, text in checkpoint.metadata.items():
        if "." not in name or not text.startswith("{"):
            continue
        with sentences(name):
            said = json.loads(text)
            yield name, str(said["_type"]), _plainly(said.get("_data") or {})


def _plainly(value: Any) -> Any:
    """Attributes without their classes: {"_type": "torch.dtype", "_data": "int4"} is "int4"."""
    if isinstance(value, dict):
        return _plainly(value["_data"]) if "_data" in value else {key: _plainly(v) for key, v in value.items()}
    return [_plainly(item) for item in value] if isinstance(value, list) else value


def _keys(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """The tensors that a parameter has in the file, by the names of the class."""
    module, _, leaf = name.rpartition(".")
    places = [(key, place) for key in DATA for place in (f"{module}._{leaf}_{key}", f"{name}:{key}")]
    return {key: place for key, place in places if place in checkpoint}


def _plain(checkpoint: Checkpoint, key: str) -> Packed:
    spec = checkpoint.entries[key].spec
    return Packed((key,), spec.shape, None, lambda: checkpoint[key], dtype=spec.dtype)


def _parameter(stored: Stored, kind: str) -> Packed:
    if kind not in KINDS:
        raise CheckpointError(
            f"{stored.where}: of torchao's class {kind}; whit reads {', '.join(KINDS)}; quantize the original model"
        )
    needed = ("qdata", "scale_and_zero") if kind == "Int4TilePackedTo4dTensor" else ("qdata", "scale")
    if missing := [key for key in needed if key not in stored.keys]:
        raise CheckpointError(f"{stored.where}: {missing[0]} is missing; {kind} has it; get the file again")
    found = replace(KINDS[kind](stored), inputs=lambda: _inputs(stored))
    return _for_scaled_inputs(found, stored) if "act_pre_scale" in stored.keys else found


def _for_scaled_inputs(found: Packed, stored: Stored) -> Packed:
    """The weight whose inputs are multiplied by a number each before: it has that number in its columns."""
    key, checkpoint = stored.keys["act_pre_scale"], stored.checkpoint
    dimensions = len(checkpoint.entries[key].spec.shape)
    shape = shape_of(checkpoint, key, dimensions, FLOATS)
    if checkpoint.entries[key].spec.shape[-1:] != found.shape[-1:] or any(n != 1 for n in shape[:-1]):
        raise CheckpointError(f"{stored.where}: {key} has not one number for each of {found.shape[-1]} inputs")

    def load() -> Tensor:
        return found.floats() * checkpoint[key].float().reshape(-1)

    return replace(
        found, format=None, load=load, inputs=None, note="a scale for each input, which no format of whit has"
    )


def _inputs(stored: Stored) -> Activations | None:
    """How the inputs of a linear are rounded as it runs."""
    said, keys = stored.said, stored.keys
    how = said.get("act_quant_kwargs")
    if said.get("activation_quantization"):
        if said["activation_quantization"] != "int8_asym_per_token":
            raise CheckpointError(f"inputs are rounded with {said['activation_quantization']}, unknown to whit")
        return Activations(symmetric=False)
    if said.get("activation_dtype") == "float8_e4m3fn":
        return Activations(type="fp8")
    if not isinstance(how, dict):
        return None
    if "act_quant_scale" in keys or not {"float8_dtype", "mapping_type"} & how.keys():
        raise CheckpointError("inputs are rounded by static scales or to small floats in blocks, which is not read")
    if not isinstance(rows := how.get("granularity"), dict) or rows.keys() - {"dim"}:
        raise CheckpointError(
            "inputs are rounded with scales for something else than a token or all, which is not read"
        )
    granularity = "token" if rows else "tensor"
    kind = "fp8" if "float8_dtype" in how else "int8"
    return Activations(type=kind, symmetric=how.get("mapping_type") != "ASYMMETRIC", granularity=granularity)
