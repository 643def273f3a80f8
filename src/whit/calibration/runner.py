"""One block at a time: its weights come and go, what flows between the blocks is kept.

The parts before the blocks run once, with the blocks replaced by stubs that note their arguments; from then on a
block is called directly, with one sample at a time, or on a GPU as many as their shape says, so that no result depends
on what a machine has room for. What a block says of its other arguments (rotary embeddings, masks) is noted once: all
samples have the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from whit.calibration.storage import Storage, at_once
from whit.calibration.stubs import Stop, hidden_of, replaced, split, until_stopped
from whit.errors import UnsupportedModelError
from whit.model.graph import find_blocks, text_part

Read = Callable[[str], Tensor]
UNKNOWN = object()  # what a block gives beside hidden states: attention weights, mostly, which nobody asks for


class Runner:
    """The blocks of a model and the inputs of the next one to run.

    `model` may be on the meta device; `read` gives any of its parameters by name. `tokens` is int64 (samples,
    context). `inputs` is (samples, context, hidden), in the dtype in which the model computes; where `twice`, `exact`
    holds beside it what the unquantized model has there.
    """

    def __init__(
        self, model: PreTrainedModel, read: Read, tokens: Tensor, device: torch.device, storage: Storage, twice: bool
    ) -> None:
        with init_empty_weights(include_buffers=False):  # buffers that no checkpoint holds are computed
            self.model = type(model)(model.config).eval()
        for config in (self.model.config, self.model.config.get_text_config()):
            config.use_cache = False
            config._experts_implementation = "eager"  # one product per expert, which can be watched
        blocks = find_blocks(self.model)
        self.names, self.blocks = blocks.names, blocks.modules
        self.device = device
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._beside: tuple[Any, ...] | None = None
        self._read = read
        self.inputs, *others = self._embed(tokens, storage, 1 + twice)
        self.exact = others[0] if twice else None

    @contextmanager
    def loaded(self, index: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, nn.Parameter]]:
        """The block with its weights, from `weights` by name or else read; yields its parameters by name."""
        prefix = f"{self.names[index]}."
        with self._filled(self.state_of(index), weights or {}):
            yield {f"{prefix}{name}": p for name, p in self.blocks[index].named_parameters()}

    def state_of(self, index: int) -> list[str]:
        """Names of what a block holds; nothing behind the last one."""
        if index == len(self.blocks):
            return []
        return [f"{self.names[index]}.{name}" for name in _state(self.blocks[index])]

    @contextmanager
    def whole(self) -> Iterator[dict[str, nn.Parameter]]:
        """The whole model with its weights, in memory at once; yields its parameters by name, tied ones apart."""
        with self._filled(_state(self.model), {}):
            yield dict(self.model.named_parameters(remove_duplicate=False))

    def logits(self, row: Tensor, index: int = 0, hidden: Tensor | None = None) -> Tensor:
        """What the whole model, which must be loaded, predicts for tokens (1, context): (context, vocabulary).

        `hidden` (1, context, hidden) enters block `index`, the end of the blocks where it is their number; what is
        before it does not run.
        """
        if hidden is None:
            return self._head(row)
        entering = hidden.to(self.device)

        def skip(*args: Any, **kwargs: Any) -> Any:
            return self._handed_on(entering)

        with replaced(self.blocks[:index], skip):
            if index == len(self.blocks):
                return self._head(row)
            block = self.blocks[index]
            run = block.forward

            def enter(*args: Any, **kwargs: Any) -> Any:
                _, args, kwargs = split(args, kwargs)
                return run(entering, *args, **kwargs)

            with replaced((block,), enter):
                return self._head(row)

    def _head(self, row: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=row.to(self.device)).logits[0]
        return logits

    def run(self, index: int) -> None:
        """Run a loaded block over all samples; its outputs take the place of the inputs."""
        for samples in self.batches(self.inputs):
            samples.copy_(self.forward(index, samples))

    def run_exact(self, index: int) -> None:
        """The same for what the unquantized model has there; the block must hold its own weights."""
        if self.exact is not None:
            for samples in self.batches(self.exact):
                samples.copy_(self.forward(index, samples))

    def batches(self, samples: Tensor, inputs: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is run at once: one sample (1, context, hidden) on a CPU, on a GPU as many as its shape says.

        It is the shape of `inputs` where samples are something else.
        """
        return torch.split(samples, at_once(samples if inputs is None else inputs, self.device))

    def forward(self, index: int, samples: Tensor) -> Tensor:
        """A loaded block's outputs (n, context, hidden) for inputs of that shape."""
        args, kwargs = self._calls[index]
        return hidden_of(self.blocks[index](samples.to(self.device, non_blocking=True), *args, **kwargs))

    def _embed(self, tokens: Tensor, storage: Storage, copies: int) -> list[Tensor]:
        """The first block's inputs (samples, context, hidden), so many times."""
        base = text_part(self.model)
        inside = tuple(f"{name}." for name in self.names)
        prefix = next((f"{name}." for name, module in self.model.named_modules() if name and module is base), "")
        names = [f"{prefix}{name}" for name in _state(base)]
        with self._filled([name for name in names if not name.startswith(inside)], {}):
            self._calls = self._note_calls(base, tokens[:1])
            first = self._first_input(base, tokens[:1])
            shape = (len(tokens), *first.shape[1:])
            kept = storage.empty(shape, first.dtype, self.device, copies)
            for rows, *places in zip(self.batches(tokens, first), *(self.batches(k) for k in kept), strict=True):
                hidden = self._first_input(base, rows)
                for place in places:
                    place.copy_(hidden)
        return kept

    def _note_calls(self, base: nn.Module, row: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of every block beside the hidden states."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._beside = self._given_beside(base, row)

        def note(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = split(args, kwargs)
            calls.append((args, kwargs))
            if len(calls) == len(self.blocks):
                raise Stop
            return self._handed_on(hidden)

        with replaced(self.blocks, note):
            self._run_noted(base, row, calls)
        if len(calls) != len(self.blocks):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: {len(calls)} of {len(self.blocks)} blocks run on a text; "
                "calibration needs all in turn; choose a method that needs no data, such as hqq"
            )
        return calls

    def _run_noted(self, base: nn.Module, row: Tensor, calls: list[Any]) -> None:
        """Run the model over blocks that note their calls; UnsupportedModelError where one needs what another gave
        beside hidden states."""
        failed = False
        try:
            until_stopped(base, row.to(self.device))
        except Exception:  # the model's own code, at what is not there
            failed = bool(self._beside)
            if not failed:
                raise
        if failed or any(part is UNKNOWN for part in pytree.tree_leaves(calls)):
            raise UnsupportedModelError(
                f"{type(self.blocks[0]).__name__}: hands more than hidden states to the next block; "
                "calibration carries only those; choose a method that needs no data, such as hqq"
            )

    def _handed_on(self, hidden: Tensor) -> Any:
        """Hidden states as the model expects them of a block."""
        return hidden if self._beside is None else (hidden, *self._beside)

    def _given_beside(self, base: nn.Module, row: Tensor) -> tuple[Any, ...] | None:
        """What a block returns behind its hidden states, UNKNOWN in the place of values; None where it is no tuple."""
        call: list[Any] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            call.append((args, kwargs))
            raise Stop

        with replaced(self.blocks[:1], note):
            until_stopped(base, row.to(self.device))
        with self.loaded(0):
            output = self.blocks[0](*call[0][0], **call[0][1])
        return tuple(part if part is None else UNKNOWN for part in output[1:]) if isinstance(output, tuple) else None

    def _first_input(self, base: nn.Module, row: Tensor) -> Tensor:
        found: list[Tensor] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            found.append(split(args, kwargs)[0])
            raise Stop

        with replaced(self.blocks[:1], note):
            until_stopped(base, row.to(self.device))
        return found[0]

    @contextmanager
    def _filled(self, names: list[str], weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters and stored buffers their values, and take them back."""
        before = []
        for name in names:
            path, _, key = name.rpartition(".")
            module = self.model.get_submodule(path)
            store = module._parameters if key in module._parameters else module._buffers
            old = store[key]
            value = self._value(weights[name] if name in weights else self._read(name))
            before.append((store, key, old))
            store[key] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        try:
            yield
        finally:
            for store, key, old in before:
                store[key] = old

    def _value(self, tensor: Tensor) -> Tensor:
        """On the device, in memory of its own; float16 becomes float32 where the processor does not compute in it."""
        if tensor.dtype == torch.float16 and self.device.type == "cpu":
            tensor = tensor.to(torch.float32)
        tensor = tensor.to(self.device).contiguous()
        return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


@contextmanager
def holding(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Loaded parameters with other values, of their own shapes, for a while."""
    exact = [parameter.data.clone() for parameter, _ in values]
    for parameter, near in values:
        parameter.data.copy_(near)
    try:
        yield
    finally:
        for (parameter, _), before in zip(values, exact, strict=True):
            parameter.data.copy_(before)


def _state(module: nn.Module) -> list[str]:
    """Names of what a checkpoint holds."""
    return list(module.state_dict())
