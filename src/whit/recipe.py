"""A recipe: the method and the ordered rules that give every parameter its format.

    version = 1
    [method]
    name = "hqq"
    [[rules]]
    match = "*"
    format = "int4-g128"
    [[rules]]
    match = "lm_head"
    format = "int8"

A rule's glob is held against module names (`model.layers.0.self_attn.q_proj`), `*` crosses dots; of the rules that
match, the last one counts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from whit.errors import FormatError, RecipeError
from whit.formats import parse_format
from whit.methods import RTN, Method, method_options, parse_method
from whit.tensor import Format

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
DEFAULT_RULES = (("*", "int4-g128"),)


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized: one method, and rules (glob, format or its shorthand)."""

    method: Method
    rules: tuple[tuple[str, Format], ...]

    def __init__(
        self, method: Method | str | None = None, rules: Sequence[tuple[str, Format | str]] = DEFAULT_RULES
    ) -> None:
        parsed = []
        for rule in rules:
            if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
                raise RecipeError(f"rule {rule!r}: a rule is a pair of a glob and a format; write ('*', 'int4-g128')")
            parsed.append((str(rule[0]), parse_format(rule[1])))
        object.__setattr__(self, "method", RTN() if method is None else parse_method(method))
        object.__setattr__(self, "rules", tuple(parsed))

    def format_for(self, name: str, kept_by_default: bool = False) -> Format | None:
        """The format of a module, None to keep it as it is.

        Embeddings and output heads (`kept_by_default`) need a rule whose last component is not just `*`.
        """
        found = None
        for pattern, format in self.rules:
            if fnmatchcase(name, pattern) and not (kept_by_default and pattern.rpartition(".")[2] == "*"):
                found = format
        return None if found is None or found.bits == 16 else found

    def unmatched(self, names: Sequence[str]) -> tuple[str, ...]:
        """Globs that match none of the modules: most likely a slip of the pen."""
        return tuple(p for p, _ in self.rules if not any(fnmatchcase(name, p) for name in names))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML; `from_dict` gives the same recipe back."""
        rules = [{"match": pattern, "format": str(format)} for pattern, format in self.rules]
        return {"version": VERSION, "method": method_options(self.method), "rules": rules}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Raises RecipeError or FormatError with one sentence for anything it does not know."""
        if unknown := sorted(set(values) - {"version", "method", "rules"}):
            raise RecipeError(f"{where}: key {unknown[0]!r} does not exist; a recipe has version, method and rules")
        if values.get("version", VERSION) != VERSION:
            raise RecipeError(f"{where}: version {values['version']}; this whit reads {VERSION}; update whit")
        rules = []
        for rule in values.get("rules", ()):
            if not isinstance(rule, Mapping) or set(rule) != {"match", "format"}:
                raise RecipeError(f"{where}: rule {rule!r}; a rule has just `match` and `format`; correct it")
            try:
                rules.append((rule["match"], parse_format(str(rule["format"]))))
            except FormatError as error:
                raise RecipeError(f"{where}: rule {rule['match']!r}: {error}") from None
        return cls(parse_method(values.get("method", "rtn")), rules or DEFAULT_RULES)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a TOML file."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such file; give a recipe in TOML") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not TOML ({error}); correct the file") from None
        return cls.from_dict(values, str(path))

    def to_toml(self) -> str:
        """The recipe as TOML, to be read, edited and replayed."""
        lines = [f"version = {VERSION}", "", "[method]"]
        lines += [f"{key} = {_toml(value)}" for key, value in method_options(self.method).items()]
        for pattern, format in self.rules:
            lines += ["", "[[rules]]", f"match = {_toml(pattern)}", f"format = {_toml(str(format))}"]
        return "\n".join(lines) + "\n"


def _toml(value: str | bool | int | float | Mapping[str, Any]) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
