"""Compiled decoding on the processor: the prompt goes through the model as ever, each token after it through C++.

`model.generate` is transformers' own with a decoding loop of whit's (its `custom_generate`): settings, logits
processors, stopping criteria, streamers and caches are those that transformers prepared. What the loop does not cover
goes to transformers' loop, and a warning says so in one sentence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn

from whit.compiled.llama import compiled_model
from whit.compiled.loop import NotCovered, decode_loop
from whit.compiled.prepared import use_prepared
from whit.errors import UnsupportedModelError


def compile_cpu(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model, whose `generate` decodes one sequence in compiled code.

    Options: `prepared`, a folder for packed weights as the kernels hold them: the first process writes a file there
    and later ones map it, so that they start at once and share its memory; `rebuild` writes it again.
    """
    if unknown := sorted(set(options) - {"prepared", "rebuild"}):
        raise TypeError(f"compile: {', '.join(unknown)} mean nothing on the processor")
    if options.get("prepared"):
        use_prepared(model, Path(options["prepared"]).expanduser(), bool(options.get("rebuild")))
    generate: Any = model.generate
    original = getattr(generate, "uncompiled", generate)
    model.generate = _compiled(model, original)  # type: ignore[assignment]
    return model


def _compiled(model: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    compiled = compiled_model(model)

    @wraps(original)
    def generate(*args: Any, streamer: Any = None, custom_generate: Any = None, **kwargs: Any) -> Any:
        if custom_generate is not None or kwargs.get("assistant_model") is not None:
            return original(*args, streamer=streamer, custom_generate=custom_generate, **kwargs)
        try:
            compiled.refresh()
            return original(
                *args, custom_generate=partial(decode_loop, compiled=compiled, streams_to=streamer), **kwargs
            )
        except (NotCovered, UnsupportedModelError) as reason:
            warnings.warn(f"{reason}; transformers' own loop takes this call", stacklevel=2)
            return original(*args, streamer=streamer, **kwargs)

    generate.uncompiled = original  # type: ignore[attr-defined]
    return generate
