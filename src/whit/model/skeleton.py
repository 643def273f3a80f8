"""A transformers model without weights: the class that config.json names, on the meta device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from whit.checkpoint.reader import read_json
from whit.errors import CheckpointError, UnsupportedModelError, reason_of

DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
MOST_BLOCKS = 10_000


def load_skeleton(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder with every parameter on the meta device; weights are not touched."""
    raw = read_json(folder / "config.json")
    _check_depths(raw, str(folder))
    config = _load_config(folder, raw, trust_remote_code)
    model_class = _model_class(folder, raw, trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    return model.eval()


def build_skeleton(raw: dict[str, Any], where: str) -> PreTrainedModel:
    """The model that the content of a config.json describes, without a folder; `where` names it in errors."""
    _check_depths(raw, where)
    values = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(raw["model_type"], **values)
    except (KeyError, ValueError) as error:
        raise UnsupportedModelError(
            f"{where}: transformers {transformers.__version__} does not know model type {raw.get('model_type')!r} "
            f"({reason_of(error)}); it must; update transformers"
        ) from None
    with torch.device("meta"):
        model: PreTrainedModel = _model_class(where, raw, False)(config)
    return model.eval()


def _check_depths(raw: dict[str, Any], where: str) -> None:
    """CheckpointError for a number of blocks that is none: below 0 a model would have none, far above it takes minutes
    to build one before the checkpoint is found to hold other blocks."""
    for key, value in raw.items():
        if isinstance(value, dict):
            _check_depths(value, where)
        elif key in DEPTHS and isinstance(value, int) and not 0 <= value <= MOST_BLOCKS:
            raise CheckpointError(
                f"{where}: config.json says {key} {value}; it must be a number of blocks, {MOST_BLOCKS:,} at most; "
                "fetch config.json again"
            )


def _load_config(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # config classes, remote ones too, raise whatever they like
        if "auto_map" in raw and not trust_remote_code:
            raise UnsupportedModelError(
                f"{folder}: model type {raw.get('model_type')!r} comes with its own code; whit runs none unless told; "
                "read it and pass --trust-remote-code"
            ) from None
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} cannot use its config.json, model type "
            f"{raw.get('model_type')!r} ({reason_of(error)}); it must know the model; update transformers"
        ) from None


def _model_class(folder: Path | str, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise UnsupportedModelError(
            f'{folder}: config.json names no architecture; it must, as in "architectures": ["LlamaForCausalLM"]; add it'
        )
    name = str(names[0])
    if trust_remote_code and (reference := _remote_reference(raw, name)):
        return get_class_from_dynamic_module(reference, str(folder))
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} has no architecture {name!r}; it must have it; "
            "update transformers, or correct config.json"
        )
    return found


def _remote_reference(raw: dict[str, Any], name: str) -> str | None:
    """The `module.Class` of the folder's own code for an architecture."""
    references = raw.get("auto_map", {}).values()
    return next((r for r in references if isinstance(r, str) and r.rpartition(".")[2] == name), None)


def computed(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter that no checkpoint holds, as the model's class computes it: on the CPU, in the model's type."""
    path, _, key = name.rpartition(".")
    module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
    with torch.no_grad():
        module.get_parameter(key).fill_(torch.nan)
        model._init_weights(module)
    found: Tensor = module.get_parameter(key).detach()
    if found.isnan().any():
        raise UnsupportedModelError(
            f"{name}: is not in the checkpoint, and {type(model).__name__} does not say how it is computed; it must be "
            "there to run the model; choose a method that needs no data, such as hqq"
        )
    return found.to(dtype=model.config.dtype or torch.float32)
