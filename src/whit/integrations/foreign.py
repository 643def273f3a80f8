"""A checkpoint of another quantizer as a running model: its codes in whit's own modules, nothing quantized again.

The file's own library need not be installed. What no format of whit holds (tiles of fp8) is dequantized.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.activations import Activations
from whit.checkpoint.onnx import onnx_graph
from whit.checkpoint.reader import read_config
from whit.errors import CheckpointError, WhitWarning
from whit.export.foreign import ForeignSource
from whit.export.readers import READERS, open_foreign, quant_method
from whit.export.readers.gguf import read_gguf_model
from whit.export.readers.refused import REFUSED
from whit.export.whit import quantization_config
from whit.layouts import BITS
from whit.model.skeleton import load_skeleton
from whit.model.targets import find_targets
from whit.recipe import Recipe
from whit.tensor import Format


def is_foreign(folder: Path) -> bool:
    """Whether a model folder holds a kind of quantized file that whit reads itself."""
    method = quant_method(read_config(folder)) if (folder / "config.json").is_file() else None
    return any(method == name for name, _ in READERS) or onnx_graph(folder) is not None


def instead_of(folder: Path) -> str | None:
    """What to do where a model folder is of a kind that whit does not read, and its own library is not there either."""
    why = REFUSED.get(str(quant_method(read_config(folder))))
    return None if why is None else f"whit does not read it itself: {why}"


def load_foreign(place: Path, dtype: torch.dtype | str, trust_remote_code: bool = False, **placement: Any) -> Any:
    """The model of a folder or a .gguf file, as `from_pretrained` gives it, with its loading information.

    `dtype` "auto" is config.json's, or that of the model that a .gguf file was made of. UnsupportedModelError for an
    architecture that whit does not read from .gguf files.
    """
    gguf = read_gguf_model(place) if place.is_file() else None
    folder = place if gguf is None else gguf.folder
    config = read_config(folder)
    skeleton = load_skeleton(folder, trust_remote_code)
    source = ForeignSource(skeleton, gguf or open_foreign(folder, config))
    if dtype == "auto":
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    assert isinstance(dtype, torch.dtype)
    targets = {target.parameter: target for target in find_targets(skeleton)}
    state: dict[str, Tensor] = {}
    formats, inputs = dict[str, Format](), dict[str, Activations]()
    for name in source.origins:
        format = source.format(name)
        if format is None or name not in targets:
            tensor = source.read(name)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            continue
        holder = targets[name].holder
        formats[holder] = format
        state |= {f"{holder}.{key}": t for key, t in BITS.pack(source.quantized(name)).tensors.items()}
        if (rounding := _rounding(place, source, name)) is not None:
            inputs[holder], scales = rounding
            state |= {f"{holder}.{key}": scale for key, scale in scales.items()}
    source.checkpoint.close()
    plain = copy.deepcopy(skeleton.config)
    if hasattr(plain, "quantization_config"):  # the file's own library would make modules of its own for these floats
        del plain.quantization_config
    if formats:  # a graph of ONNX, tiles of fp8 and NVFP4 give floats alone
        plain.quantization_config = quantization_config(Recipe("rtn"), formats, inputs)
    return type(skeleton).from_pretrained(
        None, config=plain, state_dict=state, dtype=dtype, output_loading_info=True, **placement
    )


def _rounding(place: Path, source: ForeignSource, name: str) -> tuple[Activations, dict[str, Tensor]] | None:
    """How the inputs of a quantized parameter are rounded, with static scales; None, and a warning, where they stay."""
    try:
        return source.input_rounding(name)
    except CheckpointError as error:
        # Said once for each reason, by Python's own filter of warnings that repeat.
        said = f"{place}: {error}; they stay as they are, so that the weights alone are measured"
        warnings.warn(said, WhitWarning, stacklevel=3)
        return None
