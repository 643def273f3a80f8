r"""Modules that a configuration names to be kept: `modules_to_not_convert`, `llm_int8_skip_modules`.

A name keeps the module of that name anywhere in a model, with all inside it. As in transformers it may also be the end
of a name ("proj"), or a regular expression for how one begins (r"model\.layers\.(0|1)").
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence

from torch import nn

from whit.errors import WhitWarning
from whit.model.targets import find_targets
from whit.recipe import Recipe

KEEP = "bf16"


def kept_rules(names: Sequence[str]) -> list[tuple[str, str]]:
    """Rules that need not know the model."""
    return [(glob, KEEP) for name in names for glob in (f"*{name}", f"{name}.*", f"*.{name}.*")]


def with_kept(recipe: Recipe, names: Sequence[str], model: nn.Module) -> Recipe:
    """The recipe with a rule more for each matrix that only a regular expression among the names keeps.

    A WhitWarning says which of the names are no module's.
    """
    modules = [module for module, _ in model.named_modules() if module]
    holders = [target.holder for target in find_targets(model)]
    for name in names:
        globs = Recipe(rules=kept_rules([name]))
        if not any(_begins(name, module) or globs.rules_for(module) for module in modules):
            warnings.warn(f"modules to keep: {name!r} is the name of no module; {_near(name, modules)}", WhitWarning, 2)
    kept = [(holder, KEEP) for holder in holders if any(_begins(name, holder) for name in names)]
    kept = [rule for rule in kept if not (found := recipe.rules_for(rule[0])) or found[-1].bits != 16]
    return recipe.with_rules([*recipe.rules, *kept], recipe.mix)


def _begins(expression: str, name: str) -> bool:
    """Whether a regular expression matches a name's beginning, up to a dot or to its end."""
    try:
        return re.match(rf"(?:{expression})(?:(?<=\.)|(?=\.|$))", name) is not None
    except re.error:  # a glob such as "*.mlp"
        return False


def _near(name: str, modules: Sequence[str]) -> str:
    known = sorted({*modules, *(module.rpartition(".")[2] for module in modules)})
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]}?" if found else "it keeps nothing; leave it out, or correct it"
