"""The value that says how a model is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from whit.activations import Activations, parse_activations
from whit.errors import RecipeError
from whit.formats.bands import bands_of
from whit.formats.ggml.mixes import MIXES
from whit.formats.lowrank import LowRank, side_car
from whit.methods import RTN, Method, method_options, parse_method
from whit.recipe.shorthands import parse_rules, split_methods, transform_and_method
from whit.recipe.stored import VERSION, arguments, dump_toml, read_toml, stored_rules
from whit.tensor import Format
from whit.transforms import Transform, parse_transform, transform_options

DEFAULT_RULES = (("*", "int4-g128"),)
SMOOTHED_RULES = (("*", "int8"),)  # with a transform that is made for quantized activations


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized: a method, rules (glob, format or its shorthand), and optionally a transform.

    - `method`: may name a transform too: "awq+gptq"; "awq" alone is the paper's, with clipping.
    - `mix`: one of llama.cpp's mixes, such as "q4_k_m", to which rules are exceptions; empty for none.
    - `activations`: how the inputs of linears are quantized while the model runs (a shorthand, options by name, or
      Activations); None: they are not. A transform made for quantized activations makes them int8, and the weights
      int8, unless others are named.
    - `methods`: pairs (glob, method) for some of the modules; a rule's shorthand may name one too: ("*.down_proj",
      "gptq:int4-g64").
    - `activation_rules`: pairs (glob, activations) for some of the modules; the last that matches counts, before
      `activations`.
    - `usual`: set where no rules were given; the first rule then stands for what the kind of file usually holds.

    RecipeError and FormatError for what does not exist or go together.
    """

    method: Method
    rules: tuple[tuple[str, Format], ...]
    transform: Transform | None
    mix: str
    activations: Activations | None
    methods: tuple[tuple[str, Method], ...]
    activation_rules: tuple[tuple[str, Activations], ...]
    usual: bool = field(init=False, compare=False)

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
        if isinstance(method, str) and (both := transform_and_method(method)):
            if transform is not None:
                raise RecipeError(f"method {method!r}: it names a transform, and another is given; drop one of the two")
            transform, method = both
        object.__setattr__(self, "usual", rules is None)
        chosen = None if transform is None else parse_transform(transform)
        usual = DEFAULT_RULES if chosen is None or not chosen.for_activations else SMOOTHED_RULES
        rules, others = split_methods(usual if rules is None else rules)
        parsed, mix, schemes = parse_rules(rules, mix)
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
        other = Recipe(**{part.name: getattr(self, part.name) for part in fields(self) if part.init} | changes)
        object.__setattr__(other, "usual", self.usual)
        return other

    def with_rules(self, rules: Sequence[tuple[str, Format | str]], mix: str = "") -> Recipe:
        """The same with other rules; methods and activations of its own rules stay."""
        return self.changed(rules=rules, mix=mix)

    def with_usual(self, format: Format | str) -> Recipe:
        """The same with a format, or a mix, in the place of the one that nobody has named."""
        other = self.changed(rules=[("*", format), *self.rules[1:]])
        object.__setattr__(other, "usual", False)
        return other

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
        """Globs that match none of the modules: most likely typing errors."""
        globs = dict.fromkeys(pattern for pattern, _ in (*self.rules, *self.methods))
        return tuple(glob for glob in globs if not any(fnmatchcase(name, glob) for name in names))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML; `from_dict` gives the same recipe back."""
        values: dict[str, Any] = {"version": VERSION, "method": method_options(self.method)}
        if self.transform is not None:
            values["transform"] = transform_options(self.transform)
        if self.mix:
            values["mix"] = self.mix
        if self.activations is not None:
            values["activations"] = str(self.activations)
        if self.activation_rules:
            values["activation_rules"] = [{"match": p, "activations": str(how)} for p, how in self.activation_rules]
        return values | {"rules": stored_rules(self.rules, self.methods)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Raises RecipeError or FormatError with one sentence for anything it does not know."""
        return cls(**arguments(values, where))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a TOML file."""
        return cls.from_dict(read_toml(path), str(path))

    def to_toml(self) -> str:
        """The recipe as TOML, to be read, edited and replayed."""
        return dump_toml(self.to_dict())


def _stands_alone(format: Format) -> bool:
    """Whether no side-car goes beside a format, or there is one."""
    return format.bits == 16 or side_car(format) is not None or bands_of(format) is not None
