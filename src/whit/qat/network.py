"""A whole causal language model whose parameters are given anew for every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.errors import RecipeError
from whit.kernels import float8, int8
from whit.methods.refine import replaced
from whit.plan import Source

Read = Callable[[str], Tensor]


class Network:
    """The model of a source, its floats in `dtype` on `device`. `read` gives parameters by name; those `without` a
    value of their own stay on the meta device and must be held."""

    def __init__(
        self, source: Source, read: Read, device: torch.device, dtype: torch.dtype, without: Collection[str] = ()
    ) -> None:
        skeleton = source.model
        with init_empty_weights(include_buffers=False):  # buffers that no checkpoint holds are computed
            model: PreTrainedModel = type(skeleton)(skeleton.config)
        self.model, self.device, self.dtype = model.eval().requires_grad_(False), device, dtype
        model.config.use_cache = False
        model.config._experts_implementation = "eager"
        for name in source.origins:
            if name not in without:
                self._put(name, read(name))
        for name, owner in source.tied.items():
            path, _, key = name.rpartition(".")
            model.get_submodule(path)._parameters[key] = self.parameter(owner)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(device)

    def twin(self) -> Network:
        """Another network with the same parameters, which holds values of its own: it takes no memory."""
        same = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model, same)
        return other

    def quantize_inputs(self, how: Mapping[str, Activations]) -> None:
        """From here on the inputs of these modules are rounded as they will be when the model runs packed.

        Gradients pass as if they were not. Scales come from the input itself; RecipeError for others.
        """
        for holder, activations in how.items():
            if activations.kind != "dynamic" or activations.threshold:
                raise RecipeError(
                    f"{holder}: activations {activations}; training rounds inputs by scales of their own; use int8"
                )
            rounded = partial(_rounded_input, activations)
            self.model.get_submodule(holder).register_forward_pre_hook(rounded)

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter of the model."""
        found: nn.Parameter = self.model.get_parameter(name)
        return found

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The model computes with these values, rounded to its dtype; yields leaves to take gradients in."""
        leaves = {name: value.to(self.dtype).detach().requires_grad_() for name, value in values.items()}
        with replaced(self.model, {id(self.parameter(name)): leaf for name, leaf in leaves.items()}):
            yield leaves

    def run(self, tokens: Tensor, hidden: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (n, context, vocabulary) of tokens (n, context), and what lies between the blocks where asked for."""
        output = self.model(input_ids=tokens, use_cache=False, output_hidden_states=hidden)
        return output.logits, tuple(output.hidden_states or ()) if hidden else ()

    def _put(self, name: str, value: Tensor) -> None:
        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        value = value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(value.contiguous(), requires_grad=False)
        else:
            module._buffers[key] = value


def _rounded_input(how: Activations, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    flat, whole = x.detach().reshape(-1, x.shape[-1]), how.granularity == "tensor"
    if how.dtype == torch.int8:
        codes, scale, zero = int8.quantize_rows(flat, whole, how.symmetric)
    else:
        codes, scale, zero = float8.quantize_rows(flat, whole)
    near = codes.to(torch.float32) if zero is None else codes.to(torch.float32) - zero
    return x + ((near * scale).reshape(x.shape).to(x.dtype) - x.detach()), *others
