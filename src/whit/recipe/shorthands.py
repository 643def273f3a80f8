"""What a user types for parts of a recipe: schemes for formats, methods before formats, a transform with a method."""

from __future__ import annotations

from collections.abc import Sequence

from whit.activations import SCHEMES, Activations, parse_activations
from whit.errors import RecipeError
from whit.formats import parse_format
from whit.formats.ggml.mixes import MIXES, ONLY_MIXES
from whit.methods import METHODS, RTN, Clip, Method
from whit.tensor import Format
from whit.transforms import TRANSFORMS


def parse_spec(spec: str) -> str:
    """A format's or a scheme's own name, for what a rule for everything may name; FormatError where it is neither."""
    name = spec.strip().lower()
    return name if name in SCHEMES else str(parse_format(spec))


def split_list(text: str) -> list[str]:
    """At commas that are not inside parentheses, as in codebook(-1,0,1)-g64."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def split_methods(
    rules: Sequence[tuple[str, Format | str]],
) -> tuple[list[tuple[str, Format | str]], list[tuple[str, str]]]:
    """Rules without the methods that lead their shorthands (`gptq:int4-g64`), and these."""
    plain: list[tuple[str, Format | str]] = []
    methods = []
    for rule in rules:
        named = len(rule) == 2 and not isinstance(rule, str) and isinstance(rule[1], str)
        lead, colon, format = str(rule[1]).partition(":") if named else ("", "", "")
        method = lead.strip().lower()
        if colon and any(method == known.name for known in METHODS):
            methods.append((rule[0], method))
            plain.append((rule[0], format))
        else:
            plain.append(rule)
    return plain, methods


def parse_rules(
    rules: Sequence[tuple[str, Format | str]], mix: str
) -> tuple[list[tuple[str, Format]], str, list[tuple[str, Activations]]]:
    """Rules with formats, the mix that a rule for everything names, and the activations that rules name."""
    parsed: list[tuple[str, Format]] = []
    schemes = []
    for rule in rules:
        if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
            raise RecipeError(f"rule {rule!r}: a rule is a pair of a glob and a format; write ('*', 'int4-g128')")
        name = str(rule[1]).strip().lower()
        if name in ONLY_MIXES and rule[0] != "*":
            raise RecipeError(
                f"rule {rule[0]!r}: {name} is a mix of types for a whole model; a rule for '*' can name it; "
                f"give this one a type, such as {MIXES[name]}"
            )
        if name in ONLY_MIXES:
            mix, parsed = name, []
        elif name in SCHEMES:
            parsed.append((str(rule[0]), parse_format(SCHEMES[name][0])))
            schemes.append((str(rule[0]), parse_activations(SCHEMES[name][1])))
        else:
            parsed.append((str(rule[0]), parse_format(rule[1])))
    return parsed, mix, schemes


def transform_and_method(name: str) -> tuple[str, Method | str] | None:
    """The parts of "awq+gptq", or of "awq"; None where the name is not led by a transform's."""
    transform, plus, method = name.partition("+")
    for known in TRANSFORMS:
        if transform == known.name:
            return transform, (method if plus else RTN() if known.for_activations else Clip())
    return None
