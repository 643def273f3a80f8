"""A whole causal language model whose parameters are given anew for every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.methods.descent import replaced
from whit.pipeline.sources import Source
from whit.qat.inputs import Range, round_inputs

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
        self.exact: set[str] = set()  # parameters that stay float32
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

    def quantize_inputs(self, how: Mapping[str, tuple[Activations, int]], ranges: Mapping[str, Range]) -> None:
        """From here on the inputs of these modules are rounded as they will be when the model runs packed, so many
        columns rotated together (`round_inputs`).

        Static ones have `ranges`, whose values may be held like those of other parameters.
        """
        for holder, (activations, turn) in how.items():
            start = ranges[holder].start if holder in ranges else None
            round_inputs(self.model.get_submodule(holder), activations, start, turn)
            self.exact |= set(ranges[holder].names.values()) if holder in ranges else set()

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter of the model."""
        found: nn.Parameter = self.model.get_parameter(name)
        return found

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The model computes with these values, rounded to its dtype; yields leaves to take gradients in.

        Ranges of inputs stay in float32.
        """
        leaves = {
            name: value.to(torch.float32 if name in self.exact else self.dtype).detach().requires_grad_()
            for name, value in values.items()
        }
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
