"""What a merge has cost: KL divergence from the model with its adapter beside it, as PEFT runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.data import resolve_text
from whit.errors import UnsupportedModelError
from whit.evaluation.divergence import LiveBaseline, compare_all
from whit.evaluation.listener import Listener, Silent
from whit.evaluation.perplexity import next_token_logits
from whit.evaluation.statistics import blocks
from whit.evaluation.text import choose_context, cut_windows, read_text, tokenize
from whit.extras import missing
from whit.integrations.loading import load_causal_lm, load_config, load_tokenizer, maximum_context
from whit.layouts import BITS
from whit.methods import RTN
from whit.modules import QuantizedLinear
from whit.training.peft_file import Adapter, read_adapter

DROPPED, ROUNDED = "without the adapter", "rounded to nearest"


@dataclass(frozen=True)
class Text:
    """What is measured on: a file or a shipped text, in windows of `context` tokens, its first `max_tokens` or all."""

    name: str = "whit:heldout"
    context: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Measured:
    """`kl` is the mean KL divergence in nats per token from the base with its adapter; `agreement` of the likeliest."""

    route: str
    kl: float
    agreement: float


def measure_routes(
    model: str | Path,
    adapter: str | Path,
    merged: Mapping[str, str | Path],
    text: Text | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> tuple[Measured, ...]:
    """Each of the `merged` folders by the name of its route, and two to compare with.

    These are the base alone, and, where the base is packed, what dequantizing, adding and rounding to nearest gives
    (the way in which PEFT merges into 4-bit weights). All are in memory together, so that base and adapter run once.
    UnsupportedModelError where PEFT is not installed.
    """
    text, listener = text or Text(), listener or Silent()
    windows = _windows(str(model), text)
    reference = load_with_adapter(model, adapter, device)
    rounded = load_causal_lm(str(model), device=device)
    if not round_in_place(rounded, read_adapter(adapter)):
        rounded = None
    runs = {route: _runs(load_causal_lm(str(folder), device=device)) for route, folder in merged.items()}
    runs[DROPPED] = partial(_without_adapter, reference)
    if rounded is not None:
        runs[ROUNDED] = _runs(rounded)
    on_gpu = reference.device.type == "cuda"
    found = compare_all(runs, LiveBaseline(reference), windows, on_gpu, listener)
    return tuple(
        Measured(route, blocks(divergence.kl).mean, float(divergence.agreement.double().mean()))
        for route, divergence in zip(runs, found, strict=True)
    )


def _runs(network: Any) -> Callable[[Tensor], Tensor]:
    return partial(next_token_logits, network)


def _without_adapter(network: Any, batch: Tensor) -> Tensor:
    """The base's logits, of the model that has the adapter beside it."""
    with network.disable_adapter():
        return next_token_logits(network, batch)


def load_with_adapter(model: str | Path, adapter: str | Path, device: str = "auto") -> Any:
    """The base with its adapter beside it, as PEFT runs it; DoRA's over the dequantized base."""
    try:
        import peft
    except ImportError:
        raise UnsupportedModelError(missing("train", str(adapter))) from None
    network = load_causal_lm(str(model), device=device)
    dora = any(delta.magnitude is not None for delta in read_adapter(adapter).deltas.values())
    if dora and any(isinstance(module, QuantizedLinear) for module in network.modules()):
        network = network.dequantize()
    return peft.PeftModel.from_pretrained(network, str(adapter)).eval()


def round_in_place(network: Any, adapter: Adapter) -> bool:
    """Dequantize, add the adapter, round to nearest with new scales, in every packed linear; whether there was one."""
    modules = dict(network.named_modules())
    any_packed = False
    for name, delta in adapter.deltas.items():
        module = modules.get(name)
        if isinstance(module, QuantizedLinear) and module.layout == BITS.name:
            merged = delta.added_to(module.dequantize(torch.float32))
            module.load_state_dict(dict(BITS.pack(RTN()(merged, None, module.format)).tensors), strict=False)
            any_packed = True
    return any_packed


def _windows(model: str, text: Text) -> Tensor:
    tokenizer = load_tokenizer(model)
    context = choose_context(text.context, maximum_context(load_config(model)))
    words = read_text(resolve_text(text.name), tokenizer)
    return cut_windows(tokenize(words, tokenizer, text.max_tokens, text.name), context)
