"""What a shell can complete: the options of every command, and the values that whit knows by name."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from whit.activations import EXAMPLES as ACTIVATIONS
from whit.activations import SCHEMES
from whit.cli import FUNCTIONS, build_app
from whit.export import EXPORTERS
from whit.formats import EXAMPLES
from whit.formats.ggml.mixes import MIXES
from whit.integrations.loading import DTYPES
from whit.methods import METHODS
from whit.training.init import METHODS as INITS
from whit.training.settings import DEFAULT_INIT
from whit.transforms import TRANSFORMS

Values = dict[str, str]  # by name, with what a shell says beside it


def completions() -> dict[str, list[dict[str, Any]]]:
    """By command, its parameters in order, as plain values for JSON."""
    commands: Any = typer.main.get_command(build_app())
    values = _values()
    return {f.__name__: _parameters(commands.commands[f.__name__].params, f, values) for f in FUNCTIONS}


def _parameters(
    parameters: list[Any], function: Callable[..., None], values: Mapping[str, Values]
) -> list[dict[str, Any]]:
    hints = get_type_hints(function, include_extras=True)
    return [
        {
            "name": p.name,
            "options": _options(p) if p.param_type_name == "option" else [],
            "flag": bool(getattr(p, "is_flag", False)),
            "help": re.sub(r"\\?\[default:.*?\]", "", p.help or "").strip(),
            "values": _choices(hints.get(p.name)) or values.get(str(p.name), {}),
        }
        for p in parameters
        if p.name != "help"
    ]


def _options(parameter: Any) -> list[str]:
    """As typer is told of them: `--compile/--no-compile` is one."""
    if parameter.secondary_opts:
        return ["/".join((parameter.opts[0], parameter.secondary_opts[0]))]
    return list(parameter.opts)


def _choices(hint: Any) -> Values:
    """Of an option that is one of a few words by its type."""
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        inside = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
        return {name: "" for each in inside for name in _choices(each)}
    if get_origin(hint) is Literal:
        return dict.fromkeys(map(str, get_args(hint)), "")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {str(each.value): "" for each in hint}
    return {}


def _values() -> dict[str, Values]:
    """By the name of a parameter."""
    formats = {**EXAMPLES, **dict.fromkeys(MIXES, "a mix of llama.cpp's types"), **dict.fromkeys(SCHEMES, "")}
    methods = {each.name: "" for each in (*METHODS, *TRANSFORMS)}
    texts = {"whit:text": "the shipped calibration text", "whit:heldout": "the shipped text for measuring"}
    models = {"whit:model": "the model that ships with whit"}
    return {
        "format": formats, "formats": formats, "candidates": formats, "ladder": formats, "cache_format": formats,
        "method": methods | {"awq+gptq": ""}, "start": methods, "init": dict.fromkeys((DEFAULT_INIT, *INITS), ""),
        "transform": {each.name: "" for each in TRANSFORMS}, "activations": dict.fromkeys(ACTIVATIONS, ""),
        "export": {each.name: each.summary for each in EXPORTERS}, "dtype": dict.fromkeys(DTYPES, ""),
        "device": {"auto": "a GPU where there is one", "cpu": "", "cuda": ""},
        "model": models, "baseline": models, "teacher": models, "source": models, "text": texts, "calibration": texts,
        "gate_text": texts,
    }  # fmt: skip
