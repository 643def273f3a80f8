"""One block at a time: its weights come and go, what flows between the blocks is kept.

The parts before the blocks run once, with the blocks replaced by stubs that note their arguments; from then on a
block is called directly, with one sample at a time, or on a GPU as many as their shape says, so that no result depends
on what a machine has room for (stack.py). Of a model that reads one text and writes another the encoder's blocks run
first; what they make of a sample goes along behind it from the decoder's first block on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.calibration.stack import Stack
from whit.calibration.storage import Storage, at_once
from whit.calibration.stubs import replaced, split
from whit.model.graph import find_blocks, text_parts
from whit.model.halves import halves

Read = Callable[[str], Tensor]


class Runner:
    """The blocks of a model and the inputs of the next one to run.

    `model` may be on the meta device; `read` gives any of its parameters by name. `tokens` is int64 (samples,
    context). `inputs` is (samples, context, hidden), in the dtype in which the model computes; where `twice`, `exact`
    holds beside it what the unquantized model has there. An encoder reads the first half of every sample, and its
    decoder writes the second (halves.py).
    """

    def __init__(
        self, model: PreTrainedModel, read: Read, tokens: Tensor, device: torch.device, storage: Storage, twice: bool
    ) -> None:
        with init_empty_weights(include_buffers=False):  # buffers that no checkpoint holds are computed
            self.model = type(model)(model.config).eval()
        parts = [part.config for part in self.model.modules() if isinstance(part, PreTrainedModel)]
        for config in (*parts, self.model.config.get_text_config()):  # T5's decoder has one of its own
            config.use_cache = False
            config._experts_implementation = "eager"  # one product per expert, which can be watched
        blocks = find_blocks(self.model)
        self.names, self.blocks, self._decoder = blocks.names, blocks.modules, blocks.decoder
        self.device = device
        self._read, self._storage, self._flows = read, storage, 1 + twice
        ends = (len(blocks.names),) if blocks.decoder is None else (blocks.decoder, len(blocks.names))
        self._stacks = tuple(
            Stack(type(self.model).__name__, part, self.blocks[begin:end])
            for part, begin, end in zip(text_parts(self.model), (0, *ends), ends, strict=False)
        )
        self._texts = None if blocks.decoder is None else halves(self.model.config, tokens)[:2]
        self._written = 0  # of what flows, the tokens that a decoder writes; behind them lies its memory
        self.inputs, *others = self._enter(self._stacks[0], tokens if self._texts is None else self._texts[0])
        self.exact = others[0] if twice else None

    @contextmanager
    def loaded(self, index: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, nn.Parameter]]:
        """The block with its weights, from `weights` by name or else read; yields its parameters by name."""
        if index == self._decoder:
            self._enter_decoder(index)
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
            return self._stacks[0].handed_on(entering)

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
        """A loaded block's outputs (n, context, hidden) for inputs of that shape; a decoder's memory stays behind."""
        samples = samples.to(self.device, non_blocking=True)
        if not self._written:
            return self._stacks[0].forward(index, samples, None)
        hidden, memory = samples[:, : self._written], samples[:, self._written :]
        before = len(self._stacks[0].blocks)
        return torch.cat([self._stacks[1].forward(index - before, hidden, memory), memory], 1)

    def made(self, samples: Tensor) -> Tensor:
        """What a block made of samples (..., context, hidden): without the memory of a decoder, which none changes."""
        return samples[..., : self._written, :] if self._written else samples

    def _enter(self, stack: Stack, tokens: Tensor) -> list[Tensor]:
        """The first block's inputs (samples, context, hidden), once for every flow."""
        with self._filled(self._outside(stack), {}):
            row = tokens[:1].to(self.device)
            stack.note(row, None, self._filled(self.state_of(0), {}))
            first = stack.first_input(row)
            kept = self._storage.empty((len(tokens), *first.shape[1:]), first.dtype, self.device, self._flows)
            for rows, *places in zip(self.batches(tokens, first), *(self.batches(k) for k in kept), strict=True):
                hidden = stack.first_input(rows.to(self.device))
                for place in places:
                    place.copy_(hidden)
        return kept

    def _enter_decoder(self, decoder: int) -> None:
        """What the encoder's blocks gave becomes the memory that stands behind every sample of the decoder's inputs."""
        (before, after), texts = self._stacks, self._texts
        assert texts is not None
        flows = [self.inputs] if self.exact is None else [self.inputs, self.exact]
        self._decoder = None
        with self._filled([*self._outside(before), *self._outside(after)], {}):
            source, target = (text[:1].to(self.device) for text in texts)
            memory = before.behind(source, self.inputs[:1].to(self.device))
            after.note(target, memory, self._filled(self.state_of(decoder), {}))
            hidden = after.first_input(target, memory)
            self._written = hidden.shape[1]
            shape = (len(self.inputs), self._written + memory.shape[1], hidden.shape[2])
            found = self._storage.empty(shape, hidden.dtype, self.device, self._flows)
            for flow, kept in zip(flows, found, strict=True):
                pieces = (self.batches(part, kept) for part in (*texts, flow, kept))
                for some, others, left, place in zip(*pieces, strict=True):
                    memory = before.behind(some.to(self.device), left.to(self.device))
                    place.copy_(torch.cat([after.first_input(others.to(self.device), memory), memory], 1))
        self.inputs, *exact = found
        self.exact = exact[0] if exact else None

    def _outside(self, stack: Stack) -> list[str]:
        """Names of what a stack's module holds outside all blocks."""
        prefix = next((f"{name}." for name, module in self.model.named_modules() if name and module is stack.base), "")
        inside = tuple(f"{name}." for name in self.names)
        return [name for name in (f"{prefix}{key}" for key in _state(stack.base)) if not name.startswith(inside)]

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
