"""Completion in a shell, by a table of all commands: torch takes seconds to import, and a shell asks at every TAB.

The table is made by the whole command line once, when completion is installed or first asked for, and kept in the
user's cache until whit's own files change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import typer

ASKED = "_WHIT_COMPLETE"  # in the environment, by the script that typer gives the shell
LISTS = ("formats", "candidates", "ladder")  # options of several values, with commas
FILES = ("model", "baseline", "teacher", "source", "text", "calibration", "gate_text", "start")  # or a name


def table() -> dict[str, Any]:
    """By command, its parameters; from the cache, or made now."""
    place, key = _place(), _key()
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return dict(kept["commands"])
    from whit.cli.completion import completions

    found = completions()
    with suppress(OSError):  # a cache that cannot be written costs time alone
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_name(f".{place.name}.{os.getpid()}")
        unfinished.write_text(json.dumps({"key": key, "commands": found}), encoding="utf-8")
        unfinished.replace(place)
    return found


def app(commands: Mapping[str, Any], summaries: Mapping[str, str]) -> typer.Typer:
    """Commands that have all options and do nothing: what typer answers a shell by."""
    made = typer.Typer(name="whit")
    made.callback()(lambda: None)
    for name, parameters in commands.items():
        made.command(name, help=summaries.get(name))(_function(parameters))
    return made


def _function(parameters: list[dict[str, Any]]) -> Callable[..., None]:
    def function(**_: Any) -> None:
        """Of a command that is only completed."""

    kinds = {each["name"]: bool if each["flag"] else str for each in parameters}
    function.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(each["name"], Parameter.KEYWORD_ONLY, default=_declared(each), annotation=kinds[each["name"]])
            for each in parameters
        ]
    )
    function.__annotations__ = kinds
    return function


def _declared(each: Mapping[str, Any]) -> Any:
    values = _completer(each["name"], each["values"]) if each["values"] else None
    if not each["options"]:
        return typer.Argument("", autocompletion=values)
    if each["flag"]:
        return typer.Option(False, *each["options"], help=each["help"])
    return typer.Option("", *each["options"], help=each["help"], autocompletion=values)


def _completer(name: str, values: Mapping[str, str]) -> Callable[[str], list[tuple[str, str]]]:
    def complete(incomplete: str) -> list[tuple[str, str]]:
        if name in FILES and not incomplete:
            return []  # so that the shell offers files
        done, comma, _ = incomplete.rpartition(",") if name in LISTS else ("", "", "")
        return [(f"{done}{comma}{value}", said) for value, said in values.items()]

    return complete


def _place() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whit" / "completion.json"


def _key() -> str:
    """Another one where a file of whit's has changed."""
    spec = find_spec("whit")
    home = Path(str(spec.origin)).parent if spec is not None else Path()
    return str(max((path.stat().st_mtime_ns for path in home.rglob("*.py")), default=0)) + str(home)
