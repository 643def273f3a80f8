"""Options of `whit train` that say nothing of the way of training that is asked for: refused, not passed over."""

from __future__ import annotations

from typer import BadParameter, Context

END_TO_END = ("windows", "kept_rate", "teacher", "distill", "next_token", "hidden", "minutes", "at_once")
QUANTIZED = "scales of a quantized MODEL"
UNUSED = {"full": (), "blocks": END_TO_END, "scales": (), QUANTIZED: ("rate", "start", "samples", "input_memory")}


def typed(context: Context) -> set[str]:
    """Names of the parameters that the command line gives itself."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def refuse_unused(context: Context, mode: str, quantized: bool) -> None:
    """BadParameter for an option that would change nothing."""
    way, given = QUANTIZED if quantized and mode == "scales" else mode, typed(context)
    if context.params["recipe"] == "efficientqat":
        given.discard("samples")  # they are its steps too
    for name in UNUSED[way]:
        if name in given:
            raise BadParameter(f"has no effect with --qat {way}; drop it", param_hint=f"--{name.replace('_', '-')}")
