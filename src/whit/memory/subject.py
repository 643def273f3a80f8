"""What is asked about: a model's skeleton and where its parameters would come from, without a byte of its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whit.checkpoint.header import Entry, count_parameters
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.reader import Checkpoint, read_config
from whit.data import resolve_model as shipped_model
from whit.errors import CheckpointError
from whit.evaluation.size import weight_files
from whit.memory.shapes import Shape, find_shape
from whit.model.skeleton import build_skeleton, load_skeleton
from whit.model.source import Origin
from whit.pipeline.job import open_source
from whit.pipeline.sources import Source
from whit.tensor import Format, QuantizedTensor, TensorSpec


class ConfigSource:
    """The parameters that a checkpoint of this skeleton holds, as `save_pretrained` writes it, in one dtype."""

    checkpoint: Checkpoint  # there is none: nothing can be read
    config: Mapping[str, Any]

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model, self.config = model, model.config.to_dict()
        state = model.state_dict()
        self.tied = {n: o for n, o in (model.all_tied_weights_keys or {}).items() if n in state and o in state}
        skipped = set(model._keys_to_ignore_on_save or ()) | set(self.tied)
        self.dropped = {name: "not stored by transformers" for name in skipped - set(self.tied) if name in state}
        self.origins: Mapping[str, Origin] = {
            name: Origin(TensorSpec(tuple(t.shape), dtype if t.dtype.is_floating_point else t.dtype), (name,))
            for name, t in state.items()
            if name not in skipped
        }

    def read(self, name: str) -> Tensor:
        """Refused: there are no weights behind a config.json."""
        raise CheckpointError(f"{name}: only config.json is known; weights must be there to be read; fetch the model")

    def entry(self, name: str) -> Entry | None:
        """No parameter lies anywhere."""
        return None

    def format(self, name: str) -> Format | None:
        """No parameter is quantized yet."""
        return None

    def quantized(self, name: str) -> QuantizedTensor:
        """Refused, as `read` is."""
        raise CheckpointError(f"{name}: only config.json is known; weights must be there to be read; fetch the model")

    def note(self, name: str) -> str | None:
        """Nothing is to be said."""
        return None

    def coded(self, name: str) -> bool:
        """No parameter is quantized yet."""
        return False

    def input_rounding(self, name: str) -> None:
        """No inputs are rounded yet."""
        return None


@dataclass(frozen=True)
class Subject:
    """A model that memory is planned for. `nominal` is the number of parameters that its name says; `exists` is False
    where a name or number stands for a shape, and there are no weights to do anything with."""

    name: str
    source: Source
    nominal: float
    stored_bytes: int | None = None  # of weight files that are quantized already
    notes: tuple[str, ...] = ()
    exists: bool = True

    @property
    def model(self) -> PreTrainedModel:
        return self.source.model

    @property
    def config(self) -> Any:
        """The part of the configuration that describes the (decoder) transformer."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights, in which activations and the cache are computed."""
        sizes: dict[torch.dtype, int] = {}
        for origin in self.source.origins.values():
            if origin.spec.dtype.is_floating_point:
                sizes[origin.spec.dtype] = sizes.get(origin.spec.dtype, 0) + origin.spec.nbytes
        return max(sizes, key=sizes.__getitem__) if sizes else torch.float32

    @cached_property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return count_parameters({name: origin.spec for name, origin in self.source.origins.items()})


def find_subject(model: str, trust_remote_code: bool = False) -> Subject:
    """A model folder, a hub id (no weights are fetched), a well-known name, or a number of parameters."""
    here = Path(os.path.expanduser(shipped_model(model))).exists()
    shape = None if here else find_shape(model)
    if shape is not None:
        return of_shape(shape)
    try:
        path = resolve_model(model, trust_remote_code, weights=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or give a name such as Llama-3-8B or a number such as 7B") from None
    return _of_gguf(model, path) if path.is_file() else _of_folder(model, path, trust_remote_code)


def of_shape(shape: Shape) -> Subject:
    """A model of the table of well-known shapes."""
    source = ConfigSource(build_skeleton(shape.config, shape.name), torch.bfloat16)
    subject = Subject(shape.name, source, shape.nominal, exists=False)
    if not shape.name.endswith("parameters"):
        return subject
    text = f"{shape.name}: taken as a Llama of {subject.parameters / 1e9:.3g}B; a folder or a model's name is exact"
    return replace(subject, notes=(text,))


def _of_folder(name: str, folder: Path, trust_remote_code: bool) -> Subject:
    """By the headers of the weight files where there are some, else by config.json alone."""
    raw = read_config(folder)
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    stored = None
    if any(folder.glob("*.safetensors")):
        stored = sum(file.stat().st_size for file in weight_files(folder)) if method else None
        if method in (None, "whit"):
            return _sized(Subject(name, open_source(folder, trust_remote_code), 0, stored))
    model = load_skeleton(folder, trust_remote_code)
    dtype = getattr(model.config, "dtype", None) or torch.float32
    return _sized(Subject(name, ConfigSource(model, dtype), 0, stored))


def _of_gguf(name: str, file: Path) -> Subject:
    """By the file's header; as it lies, it runs from its own codes."""
    model = open_source(file).model
    dtype = getattr(model.config, "dtype", None) or torch.float32
    size = sum(part.stat().st_size for part in weight_files(file))
    return _sized(Subject(name, ConfigSource(model, dtype), 0, size))


def _sized(subject: Subject) -> Subject:
    return replace(subject, nominal=float(subject.parameters))
