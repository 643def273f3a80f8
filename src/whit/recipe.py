"""A recipe: the method and the ordered rules that give every parameter its format."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from whit.formats import parse_format
from whit.methods import RTN, Method
from whit.tensor import Format


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized. Of the rules (glob, format) that match a module's name, the last one counts."""

    method: Method = field(default_factory=RTN)
    rules: tuple[tuple[str, Format], ...] = (("*", parse_format("int4-g128")),)

    def format_for(self, name: str, kept_by_default: bool = False) -> Format | None:
        """The format of a module, None to keep it; embeddings and heads need a rule that names them."""
        found = None
        for pattern, format in self.rules:
            if fnmatchcase(name, pattern) and not (kept_by_default and pattern.rpartition(".")[2] == "*"):
                found = format
        return found
