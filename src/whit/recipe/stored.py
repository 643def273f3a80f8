"""A recipe as plain values and as TOML: what a file holds, and what is wrong with one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whit.activations import SCHEMES
from whit.errors import FormatError, RecipeError
from whit.formats import parse_format
from whit.formats.ggml.mixes import ONLY_MIXES
from whit.methods import Method, method_options, parse_method
from whit.tensor import Format
from whit.transforms import parse_transform

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
NAMED: tuple[type, ...] = (str, Mapping)  # a name, or a table of it and options
TYPES: dict[str, tuple[type, ...]] = {
    "version": (int,), "method": NAMED, "transform": NAMED, "mix": (str,), "activations": NAMED,
    "activation_rules": (list, tuple), "rules": (list, tuple),
}  # fmt: skip
KEYS = frozenset(TYPES)
RULE_TYPES: dict[str, tuple[type, ...]] = {"match": (str,), "format": (str,), "method": NAMED, "activations": NAMED}
KINDS = {int: "a number", str: "a text", Mapping: "a table", list: "a list of tables"}


def arguments(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `Recipe` is made with, from what a file holds; RecipeError or FormatError name what it does not know."""
    if unknown := sorted(set(values) - KEYS):
        raise RecipeError(f"{where}: key {unknown[0]!r} does not exist; a recipe has {', '.join(sorted(KEYS))}")
    _check_types(values, TYPES, where)
    for rule in (*values.get("rules", ()), *values.get("activation_rules", ())):
        if isinstance(rule, Mapping):
            _check_types(rule, RULE_TYPES, f"{where}: a rule")
    if values.get("version", VERSION) != VERSION:
        raise RecipeError(f"{where}: version {values['version']}; this whit reads {VERSION}; update whit")
    rules, methods = _rules_and_methods(values.get("rules", ()), where)
    method, transform, mix = values.get("method", "rtn"), values.get("transform"), str(values.get("mix", ""))
    if isinstance(method, Mapping) and set(method) == {"name"}:
        method = str(method["name"])  # which may name a transform too
    return {
        "activation_rules": _activation_rules(values.get("activation_rules", ()), where),
        "method": method if isinstance(method, str) else parse_method(method),
        "rules": rules or (() if mix else None),
        "transform": None if transform is None else parse_transform(transform),
        "mix": mix,
        "activations": values.get("activations"),
        "methods": methods,
    }


def _check_types(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str) -> None:
    """RecipeError where what stands behind a key is of another type."""
    for key, value in values.items():
        if key in kinds and value is not None and not isinstance(value, kinds[key]):
            known = " or ".join(KINDS[kind] for kind in kinds[key] if kind in KINDS)
            raise RecipeError(f"{where}: {key} = {value!r}; it must be {known}; correct it")


def _rules_and_methods(
    stored: Sequence[Any], where: str
) -> tuple[list[tuple[str, Format | str]], list[tuple[str, Method | str | Mapping[str, Any]]]]:
    """The formats of rules, which may be names of mixes and schemes, and the methods of rules."""
    rules: list[tuple[str, Format | str]] = []
    methods: list[tuple[str, Method | str | Mapping[str, Any]]] = []
    for rule in stored:
        keys = set(rule) if isinstance(rule, Mapping) else set()
        if "match" not in keys or not {"match"} < keys <= {"match", "format", "method"}:
            raise RecipeError(
                f"{where}: rule {rule!r}; a rule has just `match` and `format`, `method` or both; correct it"
            )
        if "method" in keys:
            methods.append((rule["match"], rule["method"]))
        if "format" in keys:
            spec = str(rule["format"])
            try:
                rules.append((rule["match"], spec if spec in (*ONLY_MIXES, *SCHEMES) else parse_format(spec)))
            except FormatError as error:
                raise RecipeError(f"{where}: rule {rule['match']!r}: {error}") from None
    return rules, methods


def _activation_rules(stored: Sequence[Any], where: str) -> list[tuple[str, str]]:
    for rule in stored:
        if not isinstance(rule, Mapping) or set(rule) != {"match", "activations"}:
            raise RecipeError(f"{where}: activation rule {rule!r}; it has just `match` and `activations`; correct it")
    return [(rule["match"], rule["activations"]) for rule in stored]


def stored_rules(rules: Sequence[tuple[str, Format]], methods: Sequence[tuple[str, Method]]) -> list[dict[str, Any]]:
    """Rules as a file holds them: formats and methods together where they are for the same modules."""
    found: list[dict[str, Any]] = []
    left = [{"match": pattern, "method": _brief(method)} for pattern, method in methods]
    for pattern, format in rules:
        rule: dict[str, Any] = {"match": pattern, "format": str(format)}
        if any(other["match"] == pattern for other in left):
            while left[0]["match"] != pattern:  # their order is kept
                found.append(left.pop(0))
            rule["method"] = left.pop(0)["method"]
        found.append(rule)
    return [*found, *left]


def _brief(method: Method) -> str | dict[str, Any]:
    """Its name, or a table where an option is not the usual one."""
    return method.name if method == parse_method(method.name) else method_options(method)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file; RecipeError where it is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; give a recipe in TOML") from None
    except OSError as error:
        raise RecipeError(f"{path}: {str(error.strerror).lower()}; it must be a recipe in TOML; check it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error}); correct the file") from None


def dump_toml(values: Mapping[str, Any]) -> str:
    """Plain values as TOML: single ones first, then tables, then lists of tables."""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, Mapping | list)]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", *(f"{name} = {_toml(inner)}" for name, inner in value.items())]
    for key, value in values.items():
        for table in value if isinstance(value, list) else ():
            lines += ["", f"[[{key}]]", *(f"{name} = {_toml(inner)}" for name, inner in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: str | bool | int | float | Mapping[str, Any]) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
