"""The quantizer that transformers calls while it loads a model (transformers 5).

On the fly: modules stay as they are until their weight arrives; it is quantized, and the module replaced by one that
holds the packed tensors. What the checkpoint does not have (a fresh classification head) is never touched. A
checkpoint of whit's own has the packed modules put in before loading, and its tensors go to them by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer

from whit.activations import Activations
from whit.arrays import quantize_tensor
from whit.errors import CheckpointError, WhitError
from whit.formats.numeric import check_finite
from whit.integrations.config import QuantizationConfig
from whit.integrations.offload import compute_apart, is_inside, put_aside
from whit.integrations.plan import (
    check_absent,
    check_complete,
    match_formats,
    match_inputs,
    packed_ties,
    plan_formats,
    shared_weights,
)
from whit.integrations.slow import warn_of_slow_products
from whit.kernels.cpu.memory import release
from whit.layouts import BITS
from whit.model.targets import Target
from whit.modules import (
    Dtypes,
    PackedModule,
    announce,
    check_rows_apart,
    empty_packed,
    install,
    install_tied,
    is_offloaded,
    make_countable,
    remove_packed,
    set_deterministic,
    withdraw,
)
from whit.process import give_back_freed
from whit.tensor import Format, PackedWeight


class WhitQuantizer(HfQuantizer):  # type: ignore[misc]
    """One per `from_pretrained`; afterwards it is the model's `hf_quantizer`."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        # A copy: the formats of this model are written into it, and the user may load others with the same config.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.plan: dict[str, tuple[Target, Format]] = {}
        self.inputs: dict[str, Activations] = {}
        self.aside: tuple[str, ...] = ()  # kept unquantized
        self.files: tuple[str, ...] = ()  # that a quantized checkpoint is loaded from
        self.dtype = torch.float32
        self.conversions: list[Any] = []
        self.failures: list[WhitError] = []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """transformers says here which dtype the model will have; it stays that way."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        stored = _stored_in(checkpoint_files)
        if self.pre_quantized:
            self.files = tuple(checkpoint_files or ())
            formats = match_formats(model, self.quantization_config.formats)
            self.inputs = match_inputs(formats, self.quantization_config.inputs, model)
            ties = packed_ties(model, formats, stored)
            for target, format in formats.items():
                install(model, target, self._empty(target, format), self.dtypes(model, target.holder))
            if checkpoint_files is not None:
                check_complete(model, _packed_names(model), stored)
        else:
            ties = shared_weights(model, stored)
            self.quantization_config.settle(model)
            formats = plan_formats(model, self.quantization_config.recipe, ties)
            if self.quantization_config.fp32_cpu_offload:
                self.aside = put_aside(device_map)
                formats = {t: format for t, format in formats.items() if not is_inside(t.holder, self.aside)}
                model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *self.aside}
            self.quantization_config.formats = {target.holder: str(format) for target, format in formats.items()}
            recipe = self.quantization_config.recipe
            how = {t.holder: recipe.activations_for(t.holder, t.kind, f) for t, f in formats.items()}
            self.inputs = {holder: activations for holder, activations in how.items() if activations is not None}
            self.quantization_config.inputs = {holder: str(how) for holder, how in self.inputs.items()}
            for target in formats if self.quantization_config.deterministic else ():
                check_rows_apart(target.holder, target.kind == "experts", self.inputs.get(target.holder))
            for target, format in formats.items():
                if device_map is not None:
                    announce(model, target, format)
        self.plan = {target.parameter: (target, format) for target, format in formats.items()}
        self._install_ties(model, ties)
        if any(target.kind == "experts" for target in formats):
            model.set_experts_implementation("eager")  # the one that takes expert after expert

    def _install_ties(self, model: Any, ties: dict[str, str]) -> None:
        """Sharing is settled here; transformers' own list keeps only the ties between parameters."""
        for name, owner in ties.items():
            if owner in self.plan:
                holder = name.removesuffix(".weight")
                source = model.get_submodule(owner.removesuffix(".weight"))
                install_tied(model, holder, source, self.dtypes(model, holder))
        settled = {*self.plan, *(name for name, owner in ties.items() if owner in self.plan)}
        kept = {name: owner for name, owner in model.all_tied_weights_keys.items() if not settled & {name, owner}}
        model.all_tied_weights_keys = kept

    def dtypes(self, model: Any, holder: str) -> Dtypes:
        """The model's dtype, but float32 for modules that the architecture keeps in it."""
        names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype == torch.float16:
            names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        wide = any(f".{name}." in f".{holder}." for name in names)
        return Dtypes(torch.float32 if wide else self.dtype, self.quantization_config.compute_dtype)

    def _empty(self, target: Target, format: Format) -> PackedWeight:
        return empty_packed(format, target.shape, activations=self.inputs.get(target.holder))

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return not self.pre_quantized and param_name in self.plan

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element, for device maps that are worked out before anything is loaded."""
        waits = self.param_needs_quantization(model, param_name)
        return 0.0 if waits else float(param.element_size())  # its packed tensors are announced beside it

    def get_quantize_ops(self) -> QuantizeOnLoad:
        return QuantizeOnLoad(self)

    def quantize(self, model: Any, parameter: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a weight that has arrived, put the module for it into the model, and name its packed tensors."""
        target, format = self.plan[parameter]
        check_finite(weight, parameter)
        matrix = weight.mT.contiguous() if target.transposed else weight
        recipe = self.quantization_config.recipe
        quantized = quantize_tensor(matrix, format, recipe.method_for(target.holder) or recipe.method)
        packed = BITS.pack(quantized)
        if weight.is_contiguous() and weight.device.type == "cpu":
            release(weight)  # read for the last time: a mapped file's pages would count as this process's to the end
        withdraw(model, target, format)
        install(model, target, self._empty(target, format), self.dtypes(model, target.holder))
        return {f"{target.holder}.{key}": tensor for key, tensor in packed.tensors.items()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """whit's own files hold the names of the model as it runs: nothing is converted."""
        return [] if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if self.failures:
            raise type(self.failures[0])("\n".join(map(str, self.failures)))
        conversions = getattr(model, "_weight_conversions", None) or []
        for parameter, (target, format) in list(self.plan.items()):
            if not isinstance(_holder(model, target), PackedModule):
                check_absent(parameter, target, conversions, model)
                withdraw(model, target, format)
                del self.plan[parameter], self.quantization_config.formats[target.holder]
                self.quantization_config.inputs.pop(target.holder, None)
        for module in model.modules():
            if isinstance(module, PackedModule) and not is_offloaded(module):  # accelerate would look for it in files
                make_countable(module)  # PEFT counts before and after its own prepare_model_for_kbit_training
        compute_apart(model, self.aside, self.dtype)
        if self.quantization_config.deterministic:
            set_deterministic(model)
        warn_of_slow_products(model)
        if not self.pre_quantized:
            give_back_freed()
        # Saving must not undo conversions (split experts, rename) on packed tensors.
        self.conversions, model._weight_conversions = conversions, []

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        named = str(dtype or self.dtype).removeprefix("torch.")  # a string after save_pretrained, which wrote it so
        remove_packed(model, getattr(torch, named))
        model._weight_conversions = self.conversions
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of the packed weights, which stay as they are."""
        return True


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """The last step of loading a weight: transformers hands it over whole, converted, on its device."""

    def __init__(self, quantizer: WhitQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(model, name):
                result[name] = tensor
                continue
            try:
                result |= self.quantizer.quantize(model, name, tensor)
                if missing_keys is not None:
                    missing_keys.discard(name)
            except WhitError as error:  # transformers would bury it in a report: said when loading is over
                self.quantizer.failures.append(error)
                result[name] = tensor
        return result


def _holder(model: nn.Module, target: Target) -> Any:
    """What has the holder's name now: a module, or the stacked parameter of experts."""
    parent, _, name = target.holder.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def _packed_names(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield from (f"{name}.{key}" for key in module.packed.tensors)


def _stored_in(files: list[str] | None) -> dict[str, str]:
    """Names of the tensors in safetensors files, and in which one each lies."""
    stored: dict[str, str] = {}
    for file in files or ():
        if not file.endswith(".safetensors"):
            continue
        try:
            with safe_open(file, framework="pt") as handle:
                stored |= dict.fromkeys(handle.keys(), file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {error}; it must be a safetensors file; get it again") from None
    return stored
