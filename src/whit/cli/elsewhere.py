"""Options of other programs, typed to whit: what says the same here (`--bits 4` is `--format int4-g128`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from whit.activations import SCHEMES
from whit.errors import FormatError
from whit.formats import parse_format
from whit.formats.ggml.mixes import MIXES

BITS = ("bits", "wbits", "w_bits", "w_bit", "q_bits", "nbits", "n_bits", "num_bits", "weight_bits")
GROUP = ("group_size", "groupsize", "q_group_size", "w_groupsize")
FLAGS = {"load_in_4bit": "nf4", "load_in_8bit": "int8", "sym": "int4-g128", "asym": "int4-g128-asym", "nf4": "nf4"}
USUAL = {"1": "binary", "1.58": "ternary", "2": "int2-g32", "3": "int3-g64", "8": "int8", "16": "bf16"}
SAME = {
    "--format": ("qtype", "quant_type", "wtype"),
    "--calibration": ("dataset", "calib_data", "calib_dataset", "calibration_data", "calibration_dataset"),
    "--samples": ("nsamples", "num_samples", "n_samples", "num_calibration_samples", "max_calib_samples"),
    "--context": ("seqlen", "seq_len", "max_seq_len", "max_seq_length", "max_length", "ctx_size"),
    "--max-new-tokens": ("max_tokens", "n_predict", "max_length"),
    "--export": ("outtype", "quant_method", "output_format", "dtype", "torch_dtype"),
    "MODEL": ("model", "m", "model_path", "model_name_or_path", "model_id", "hf_path", "pretrained"),
    "OUT": ("o", "out", "output", "output_dir", "output_path", "outfile", "out_dir", "save_dir", "quant_path"),
}  # fmt: skip
NAME = re.compile(r"--?([A-Za-z][\w-]*)")
USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, wherever typer keeps it


class Command(TyperCommand):
    """A command that answers other programs' options with its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)  # parsing takes them away
        try:
            return super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            hint = self._hint(str(getattr(error, "option_name", "")), str(getattr(error, "message", "")), typed)
            if hint is None:
                raise
            said = str(error.message).partition(" (Possible options")[0].removesuffix(".")
            raise USAGE_ERROR(f"{said}; {hint}", ctx) from None

    def _hint(self, option: str, message: str, typed: Sequence[str]) -> str | None:
        ours = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        if extra := re.search(r"extra argument(?:\(s\))? \((\S+)\)", message):  # llama-quantize's: IN OUT Q4_K_M
            return f"write --format {extra[1].lower()}" if "--format" in ours and _is_format(extra[1]) else None
        name = _plain(option)
        asks = "--format" if "--format" in ours else "--candidates" if "--candidates" in ours else None
        if asks is not None and name in (*BITS, *GROUP, *FLAGS):
            return f"the format says it: {asks} {_format(dict(_given(typed)))}"
        for same, others in SAME.items():
            if name not in others:
                continue
            if same in ours:
                return f"it is {same} here"
            if any(same == getattr(parameter, "metavar", None) for parameter in self.params):
                return f"{same} is typed without an option: whit {self.name} {self._arguments()}"
        return None

    def _arguments(self) -> str:
        return " ".join(str(p.metavar) for p in self.params if p.param_type_name == "argument")


def _plain(option: str) -> str:
    """`--group-size` as other programs have it: group_size."""
    return option.lstrip("-").replace("-", "_").lower()


def _given(typed: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and what follows each, `--bits 4` and `--bits=4`."""
    for word, following in zip(typed, [*typed[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if NAME.fullmatch(option):
            yield _plain(option), value if equals else following


def _format(given: dict[str, str]) -> str:
    """The format that other programs' options mean; the usual one where they mean none."""
    flag = next((format for name, format in FLAGS.items() if name in given), "int4-g128")
    bits = next((given[name] for name in BITS if name in given), None)
    group = next((given[name] for name in GROUP if name in given), None)
    if bits is None and group is None:
        return flag
    channel = group == "-1"
    usual = USUAL.get(str(bits), f"int{bits or 4}-g128")
    tail = "-asym" if "asym" in given or given.get("sym", "").lower() == "false" else ""
    spec = usual if group is None else f"int{bits or 4}-{'channel' if channel else f'g{group}'}"
    for wanted in (spec + tail, spec):
        if _is_format(wanted):
            return wanted
    return "int4-g128"


def _is_format(spec: str) -> bool:
    if spec.lower() in (*MIXES, *SCHEMES):
        return True
    try:
        parse_format(spec)
    except FormatError:
        return False
    return True
