"""`whit.compile(model)`: generation without Python's work per token, and encoders without Python's work per layer.

A backend is a function `(model, options) -> model` in a module of its own, imported when it is asked for. It makes the
same model object run faster, or raises UnsupportedModelError, before it has changed anything, where it cannot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import nn

from whit.errors import UnsupportedModelError

Backend: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], nn.Module]

BACKENDS = {  # by the type of the device: a module and its function
    "cpu": ("whit.compiled.cpu", "compile_cpu"),
    "cuda": ("whit.compiled.cuda", "compile_cuda"),
}
ENCODERS = {"cpu": ("whit.compiled.encoder", "compile_encoder")}  # of models that do not generate


def compile(model: nn.Module, *, strict: bool = False, **options: Any) -> nn.Module:
    """Make `model.generate` fast for one sequence at a time, or the layers of an encoder; returns the same model.

    `options` belong to the device. On a CPU: `prepared`, a folder where the weights are kept as the kernels use them,
    so that later processes only map the file, and `rebuild`, which writes it again. A model that is not supported stays
    as it is, and a warning says why in one sentence; with `strict` that is an UnsupportedModelError.
    """
    try:
        return backend_for(model)(model, options)
    except UnsupportedModelError as error:
        if strict:
            raise
        warnings.warn(f"{error}; it runs as before", stacklevel=2)
        return model


def backend_for(model: nn.Module) -> Backend:
    """The backend of the device that all parameters and buffers lie on. Raises UnsupportedModelError."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"compile: {type(model).__name__} is not a transformers model; it must be; torch.compile takes any module"
        )
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        said = ", ".join(sorted(devices)) or "no device"
        raise UnsupportedModelError(f"compile: the model lies on {said}; it must lie on one; move it whole")
    (device,) = devices
    generates = getattr(model, "can_generate", lambda: False)()
    module, function = (BACKENDS if generates or device not in ENCODERS else ENCODERS).get(device, ("", ""))
    if not module or find_spec(module) is None:
        raise UnsupportedModelError(f"compile: the model is on {device}, for which there is no compiled decoding")
    found: Backend = getattr(import_module(module), function)
    return found
