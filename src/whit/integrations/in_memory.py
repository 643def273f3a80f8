"""A model that is in memory already, quantized where it stands: any `nn.Module`, transformers' models among them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.arrays import quantize_tensor
from whit.errors import RecipeError, UnsupportedModelError
from whit.formats.numeric import check_finite
from whit.integrations.config import QuantizationConfig
from whit.integrations.plan import plan_formats
from whit.integrations.quantizer import WhitQuantizer
from whit.integrations.slow import warn_of_slow_products
from whit.layouts import BITS
from whit.model.targets import Target, tied_weights
from whit.modules import Dtypes, PackedModule, check_rows_apart, install, install_tied, set_deterministic
from whit.recipe import Recipe
from whit.tensor import Format

M = TypeVar("M", bound=nn.Module)


def quantize_model(model: M, config: QuantizationConfig | str | Format | Recipe | None = None, **options: Any) -> M:
    """Quantize the linears of a model in memory, in place, and return it.

    `model` is any module with linears inside, on any device. Each matrix is quantized where it is, and freed before the
    next. `config` is a `QuantizationConfig`, or the format that one begins with, with its `options`:

        whit.quantize_model(model, "int4-g64", method="hqq", modules_to_not_convert=["head"])

    Rules match the names of `model.named_modules()`. Embeddings and output heads are quantized only where a rule names
    them; matrices that modules share stay shared.

    A transformers model can then be saved (`save_pretrained`) and loaded again, trained on
    (`whit.prepare_for_training`) and dequantized, like one that was quantized while loading. For another module save
    its `state_dict()` and load that into a module that was quantized in the same way. `torch.compile(model)` works too.

    If it raises, nothing was changed: RecipeError and FormatError for what does not fit, NonFiniteError for weights
    with NaN or infinity, UnsupportedModelError if `model` has no module inside that can be replaced, or is quantized
    already.
    """
    if isinstance(config, QuantizationConfig) and options:
        raise RecipeError(f"option {min(options)!r}: a QuantizationConfig has its own; give it there")
    wanted = copy.deepcopy(config) if isinstance(config, QuantizationConfig) else QuantizationConfig(config, **options)
    _check(model)
    wanted.settle(model)
    is_known = isinstance(model, PreTrainedModel)
    ties = tied_weights(model) if is_known else _shared(model)
    formats = plan_formats(model, wanted.recipe, ties)
    for target in formats:
        check_finite(model.get_parameter(target.parameter).detach(), target.parameter)
    with torch.no_grad():
        if is_known:
            _known(model, wanted)
        else:
            _any(model, wanted, formats, ties)
    return model


def _known(model: PreTrainedModel, wanted: QuantizationConfig) -> None:
    """A model of transformers, which comes to know that it is quantized, and how."""
    quantizer = WhitQuantizer(wanted, pre_quantized=False)
    quantizer.update_dtype(model.dtype)
    quantizer.preprocess_model(model)
    formats, dtypes = dict(quantizer.plan.values()), partial(quantizer.dtypes, model)
    _pack(model, formats, quantizer.inputs, wanted.recipe, dtypes)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _any(model: nn.Module, wanted: QuantizationConfig, formats: Mapping[Target, Format], ties: dict[str, str]) -> None:
    how = {t.holder: wanted.recipe.activations_for(t.holder, t.kind, format) for t, format in formats.items()}
    inputs = {holder: activations for holder, activations in how.items() if activations is not None}
    for target in formats if wanted.deterministic else ():
        check_rows_apart(target.holder, target.kind == "experts", inputs.get(target.holder))
    types = {t.holder: Dtypes(model.get_parameter(t.parameter).dtype, wanted.compute_dtype) for t in formats}
    packed = {target.parameter for target in formats}
    for name, owner in ties.items():
        if owner in packed:
            holder, source = name.removesuffix(".weight"), owner.removesuffix(".weight")
            install_tied(model, holder, model.get_submodule(source), types[source])
    _pack(model, formats, inputs, wanted.recipe, types.__getitem__)
    if wanted.deterministic:
        set_deterministic(model)
    warn_of_slow_products(model)


def _pack(
    model: nn.Module, formats: Mapping[Target, Format], inputs: Mapping[str, Activations], recipe: Recipe,
    dtypes: Callable[[str], Dtypes],
) -> None:  # fmt: skip
    """One matrix after the other; the floats of each are let go with the module that held them."""
    for target, format in formats.items():
        weight = model.get_parameter(target.parameter).detach()
        matrix = weight.mT.contiguous() if target.transposed else weight
        method = recipe.method_for(target.holder) or recipe.method
        packed = BITS.pack(quantize_tensor(matrix, format, method))
        install(model, target, replace(packed, activations=inputs.get(target.holder)), dtypes(target.holder))


def _check(model: nn.Module) -> None:
    """UnsupportedModelError for what cannot be quantized where it stands."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__}: is not a module; it must be an nn.Module; for one array use whit.quantize_tensor"
        )
    name = type(model).__name__
    if isinstance(model, nn.Linear | nn.Embedding):
        raise UnsupportedModelError(
            f"{name}: is one layer, which has no place to be replaced in; it must be inside of a module; "
            "put it into nn.Sequential"
        )
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise UnsupportedModelError(f"{name}: is quantized already; its floats must be there; begin with the original")
    if away := next((key for key, parameter in model.named_parameters() if parameter.is_meta), None):
        raise UnsupportedModelError(
            f"{name}: {away} is not in memory; all weights must be; load the model without offloading, "
            "or quantize it while it is loaded (quantization_config=...)"
        )


def _shared(model: nn.Module) -> dict[str, str]:
    """Parameters under a second name, and the first one."""
    owners: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name and name.endswith("weight"):
            found[name] = owner
    return found
