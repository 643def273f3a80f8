"""A recipe: the transform, the method, the ordered rules that give every parameter its format, and the activations.

    version = 1
    activations = "int8"        # may be left out: inputs of linears are quantized too (`whit.activations`)
    [method]
    name = "hqq"
    [transform]                 # may be left out
    name = "awq"
    [[rules]]
    match = "*"
    format = "int4-g128"
    [[rules]]
    match = "lm_head"
    format = "int8"
    method = "rtn"              # may be left out; a table `{ name = "gptq", damp = 0.05 }` gives options

A rule may name a method as well as a format, or a method alone: of the rules that match a module and name a method, the
last one counts, and where none does the recipe's own.

In the place of a format for `*` a rule may name one of llama.cpp's mixes (`q4_k_m`): `mix`, which the plan of a run
turns into a format for each matrix of the model; other rules come after it. Or it may name a format and activations
together (`w8a8`, `llm.int8`): `activations.SCHEMES`. A rule for other modules may name such a pair too, and so give
their inputs activations of their own (`activation_rules`).

A rule's glob is held against module names (`model.layers.0.self_attn.q_proj`), `*` crosses dots; of the rules that
match, the last one counts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from whit.activations import SCHEMES, Activations, parse_activations
from whit.errors import FormatError, RecipeError
from whit.formats import parse_format
from whit.formats.bands import bands_of
from whit.formats.ggml.mixes import MIXES, ONLY_MIXES
from whit.formats.lowrank import LowRank, side_car
from whit.methods import METHODS, RTN, Clip, Method, method_options, parse_method
from whit.tensor import Format
from whit.transforms import TRANSFORMS, Transform, parse_transform, transform_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
KEYS = frozenset(("version", "method", "transform", "mix", "activations", "activation_rules", "rules"))
DEFAULT_RULES = (("*", "int4-g128"),)
SMOOTHED_RULES = (("*", "int8"),)  # with a transform that is made for quantized activations


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized: one method, rules (glob, format or its shorthand), and a transform where wanted.

    The method may name both: "awq+gptq"; "awq" alone is the paper's, with clipping. `mix` names one of llama.cpp's
    mixes, over which the rules go; it is empty where there is none. `activations` (a shorthand, options by name, or
    Activations) say how the inputs of linears are quantized while the model runs, None that they are not; a transform
    that is made for them has them be int8, and the weights int8, unless others are named. `methods` are other methods
    for some of the modules (glob, method); a rule's shorthand may name one too: ("*.down_proj", "gptq:int4-g64").
    `activation_rules` are those of some modules, by glob: of those that match the last one counts, before what
    `activations` says.
    """

    method: Method
    rules: tuple[tuple[str, Format], ...]
    transform: Transform | None
    mix: str
    activations: Activations | None
    methods: tuple[tuple[str, Method], ...]
    activation_rules: tuple[tuple[str, Activations], ...]

    def __init__(
        self,
        method: Method | str | None = None,
        rules: Sequence[tuple[str, Format | str]] | None = None,
        transform: Transform | str | None = None,
        mix: str = "",
        activations: Activations | str | Mapping[str, Any] | None = None,
        methods: Sequence[tuple[str, Method | str | Mapping[str, Any]]] = (),
        activation_rules: Sequence[tuple[str, Activations | str]] = (),
    ) -> None:
        if isinstance(method, str) and (both := _transform_and_method(method)):
            if transform is not None:
                raise RecipeError(f"method {method!r}: it names a transform, and another is given; drop one of the two")
            transform, method = both
        chosen = None if transform is None else parse_transform(transform)
        usual = DEFAULT_RULES if chosen is None or not chosen.for_activations else SMOOTHED_RULES
        rules, others = split_methods(usual if rules is None else rules)
        parsed, mix, schemes = _parse_rules(rules, mix)
        named = next((found for pattern, found in reversed(schemes) if pattern == "*"), None)
        some = [(pattern, parse_activations(found)) for pattern, found in activation_rules]
        how = None if activations is None else parse_activations(activations)
        if named is not None and how not in (None, named):
            raise RecipeError(f"activations: {how}, and a rule names {named}; there must be one; drop one of the two")
        if mix and mix not in MIXES:
            raise RecipeError(f"mix {mix!r}: not known; it must be one of {', '.join(MIXES)}; choose one")
        if chosen is not None and chosen.for_activations:
            how = how or named or Activations()
        object.__setattr__(self, "method", RTN() if method is None else parse_method(method))
        object.__setattr__(self, "rules", tuple(parsed))
        object.__setattr__(self, "transform", chosen)
        object.__setattr__(self, "mix", mix)
        object.__setattr__(self, "activations", how or named)
        object.__setattr__(self, "methods", tuple((p, parse_method(m)) for p, m in (*methods, *others)))
        some += [scheme for scheme in schemes if scheme[0] != "*" and scheme not in some]
        object.__setattr__(self, "activation_rules", tuple(some))

    def changed(self, **changes: Any) -> Recipe:
        """The same with other values for some of its fields."""
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(self)} | changes)

    def with_rules(self, rules: Sequence[tuple[str, Format | str]], mix: str = "") -> Recipe:
        """The same with other rules; methods and activations of its own rules stay."""
        return self.changed(rules=rules, mix=mix)

    def with_activations(self, activations: Activations | str) -> Recipe:
        """The same with activations; RecipeError where it has others."""
        how = parse_activations(activations)
        if self.activations not in (None, how) and not (self.transform and self.activations == Activations()):
            raise RecipeError(
                f"activations {how}: the recipe has {self.activations}; there is one; drop one of the two"
            )
        return self.changed(activations=how)

    def with_methods(self, methods: Sequence[tuple[str, Method]]) -> Recipe:
        """The same with other methods for some of the modules, before those that its own rules name."""
        return self.changed(methods=(*methods, *self.methods))

    def with_side_cars(self, rank: int) -> Recipe:
        """The same, every format with a low-rank side-car; RecipeError where it can have none."""
        if self.mix or self.all_activations:
            what = f"mix {self.mix}" if self.mix else f"activations {self.all_activations[0]}"
            raise RecipeError(f"{what}: goes with no side-car; formats of weights alone must be given; choose one")
        rules = [(p, f if _stands_alone(f) else LowRank(f, rank)) for p, f in self.rules]
        return self.with_rules(rules)

    @property
    def needs_stats(self) -> bool:
        """Whether calibration is needed: the model runs over a text."""
        parts = (self.transform, *self.all_methods, *self.all_activations)
        return any(part is not None and part.needs_stats for part in parts)

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed, if only to say which rows of a table are used most."""
        return self.needs_stats or any(bands_of(format) is not None for _, format in self.rules)

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """Its own method, and those of rules."""
        return tuple(dict.fromkeys((self.method, *(method for _, method in self.methods))))

    @property
    def all_activations(self) -> tuple[Activations, ...]:
        """Those of all linears, and those of some."""
        general = () if self.activations is None else (self.activations,)
        return (*general, *(how for _, how in self.activation_rules))

    @property
    def needs_exact(self) -> bool:
        """Whether a method wants to know what the unquantized model computes."""
        return any(method.needs_exact for method in self.all_methods)

    @property
    def title(self) -> str:
        """What of it uses data, as an error names it: its transform, method or activations."""
        if self.transform is not None:
            return f"transform {self.transform.name}"
        static = [how for how in self.all_activations if how.needs_stats]
        if static and not self.method.needs_stats:
            return f"activations {static[0]}"
        return f"method {next((m for m in self.all_methods if m.needs_stats), self.method).name}"

    def method_for(self, name: str) -> Method | None:
        """The method that rules name for a module; None where it is the recipe's own."""
        return next((method for pattern, method in reversed(self.methods) if fnmatchcase(name, pattern)), None)

    def format_for(self, name: str, kept_by_default: bool = False) -> Format | None:
        """The format of a module, None to keep it as it is.

        Embeddings and output heads (`kept_by_default`) need a rule whose last component is not just `*`.
        """
        if self.mix:
            raise RecipeError(f"mix {self.mix}: it gives each matrix of a model its own type; use whit quantize")
        found = self.rules_for(name, kept_by_default)
        return None if not found or found[-1].bits == 16 else found[-1]

    def rules_for(self, name: str, kept_by_default: bool = False) -> tuple[Format, ...]:
        """The formats of all rules that match a module."""
        return tuple(
            format
            for pattern, format in self.rules
            if fnmatchcase(name, pattern) and not (kept_by_default and pattern.rpartition(".")[2] == "*")
        )

    def activations_for(self, name: str, kind: str, format: Format | None) -> Activations | None:
        """How the inputs of a module are quantized (`Target.kind`): only linears' are, whose format fits."""
        how = next(
            (found for pattern, found in reversed(self.activation_rules) if fnmatchcase(name, pattern)),
            self.activations,
        )
        takes = how is not None and kind in ("linear", "conv1d") and format is not None and how.fits(format)
        return how if takes else None

    def unmatched(self, names: Sequence[str]) -> tuple[str, ...]:
        """Globs that match none of the modules: most likely a slip of the pen."""
        globs = dict.fromkeys(pattern for pattern, _ in (*self.rules, *self.methods))
        return tuple(glob for glob in globs if not any(fnmatchcase(name, glob) for name in names))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML; `from_dict` gives the same recipe back."""
        transform = {} if self.transform is None else {"transform": transform_options(self.transform)}
        mix = {"mix": self.mix} if self.mix else {}
        how: dict[str, Any] = {} if self.activations is None else {"activations": str(self.activations)}
        if self.activation_rules:
            how["activation_rules"] = [
                {"match": pattern, "activations": str(found)} for pattern, found in self.activation_rules
            ]
        rules = {"rules": self._rules()}
        return {"version": VERSION, "method": method_options(self.method), **transform, **mix, **how, **rules}

    def _rules(self) -> list[dict[str, Any]]:
        """Rules as a file holds them: formats and methods together where they are for the same modules."""
        found: list[dict[str, Any]] = []
        methods = [{"match": pattern, "method": _brief(method)} for pattern, method in self.methods]
        for pattern, format in self.rules:
            if any(rule["match"] == pattern for rule in methods):
                while methods[0]["match"] != pattern:  # their order is kept
                    found.append(methods.pop(0))
                found.append({"match": pattern, "format": str(format), "method": methods.pop(0)["method"]})
            else:
                found.append({"match": pattern, "format": str(format)})
        return [*found, *methods]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Raises RecipeError or FormatError with one sentence for anything it does not know."""
        if unknown := sorted(set(values) - KEYS):
            raise RecipeError(f"{where}: key {unknown[0]!r} does not exist; a recipe has {', '.join(sorted(KEYS))}")
        if values.get("version", VERSION) != VERSION:
            raise RecipeError(f"{where}: version {values['version']}; this whit reads {VERSION}; update whit")
        rules: list[tuple[str, Format | str]] = []
        methods: list[tuple[str, Method | str | Mapping[str, Any]]] = []
        for rule in values.get("rules", ()):
            keys = set(rule) if isinstance(rule, Mapping) else set()
            if "match" not in keys or not {"match"} < keys <= {"match", "format", "method"}:
                raise RecipeError(
                    f"{where}: rule {rule!r}; a rule has just `match` and `format`, `method` or both; correct it"
                )
            if "method" in keys:
                methods.append((rule["match"], rule["method"]))
            try:
                spec = str(rule["format"]) if "format" in keys else None
                if spec is not None:
                    rules.append((rule["match"], spec if spec in (*ONLY_MIXES, *SCHEMES) else parse_format(spec)))
            except FormatError as error:
                raise RecipeError(f"{where}: rule {rule['match']!r}: {error}") from None
        method, transform = values.get("method", "rtn"), values.get("transform")
        if isinstance(method, Mapping) and set(method) == {"name"}:
            method = str(method["name"])  # which may name a transform too
        mix, some = str(values.get("mix", "")), values.get("activation_rules", ())
        if wrong := [rule for rule in some if not isinstance(rule, Mapping) or set(rule) != {"match", "activations"}]:
            raise RecipeError(
                f"{where}: activation rule {wrong[0]!r}; it has just `match` and `activations`; correct it"
            )
        return cls(
            method if isinstance(method, str) else parse_method(method),
            rules or (() if mix else None),
            None if transform is None else parse_transform(transform),
            mix,
            values.get("activations"),
            methods,
            [(rule["match"], rule["activations"]) for rule in some],
        )

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
        mix = [f"mix = {_toml(self.mix)}"] if self.mix else []
        how = [] if self.activations is None else [f"activations = {_toml(str(self.activations))}"]
        lines = [f"version = {VERSION}", *mix, *how, "", "[method]"]
        lines += [f"{key} = {_toml(value)}" for key, value in method_options(self.method).items()]
        if self.transform is not None:
            options = transform_options(self.transform)
            lines += ["", "[transform]", *(f"{key} = {_toml(value)}" for key, value in options.items())]
        for pattern, found in self.activation_rules:
            lines += ["", "[[activation_rules]]", f"match = {_toml(pattern)}", f"activations = {_toml(str(found))}"]
        for rule in self._rules():
            lines += ["", "[[rules]]", *(f"{key} = {_toml(value)}" for key, value in rule.items())]
        return "\n".join(lines) + "\n"


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


def _stands_alone(format: Format) -> bool:
    """Whether no side-car goes beside a format, or there is one."""
    return format.bits == 16 or side_car(format) is not None or bands_of(format) is not None


def _brief(method: Method) -> str | dict[str, Any]:
    """Its name, or a table where an option is not the usual one."""
    return method.name if method == parse_method(method.name) else method_options(method)


def _parse_rules(
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


def _transform_and_method(name: str) -> tuple[str, Method | str] | None:
    """The parts of "awq+gptq", or of "awq"; None where the name is not led by a transform's."""
    transform, plus, method = name.partition("+")
    for known in TRANSFORMS:
        if transform == known.name:
            return transform, (method if plus else RTN() if known.for_activations else Clip())
    return None


def _toml(value: str | bool | int | float | Mapping[str, Any]) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
