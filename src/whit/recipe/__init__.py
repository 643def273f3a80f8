"""A recipe: the transform, the method, the ordered rules that give every parameter its format, and the activations.

The value is in `recipe`, what a user types for parts of it in `shorthands`, the file in `stored`:

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

from whit.recipe.recipe import Recipe
from whit.recipe.shorthands import parse_spec, split_list, split_methods

__all__ = ["Recipe", "parse_spec", "split_list", "split_methods"]
