"""The command `whit`. What needs no model is answered here, before torch and transformers are imported.

It lies beside the package and not in it, because whatever imports a part of `whit` imports the whole: transformers then
knows whit's quantizer, as it must. `python -m whit` goes without it. `whit.cli` takes the summaries from here.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from whit_command.completion import ASKED, app, table

SUMMARY = "Quantize any Hugging Face transformer, run it, and measure what was given up."
COMMANDS = {  # in the order in which they are shown
    "quantize": "Quantize a model block by block, from disk to disk. A killed run resumes when it is run again."
    "\n\nFor example: whit quantize org/name small --format int4-g64 --method gptq",
    "evaluate": "Measure a model: perplexity, divergence from a baseline, zero-shot tasks, bits per weight."
    "\n\nFor example: whit evaluate small --baseline org/name",
    "compare": "Measure what each format costs on this model and machine. A killed run resumes when it is run again."
    "\n\nFor example: whit compare org/name report --candidates int8,nf4,gptq:int4-g64",
    "generate": "Continue a text with a model.",
    "finetune": "Train an adapter (LoRA, QLoRA) on instructions. A killed run resumes when it is run again."
    "\n\nUnder torchrun or accelerate launch the processes share each step's batches.",
    "convert": "Write a model as another kind of file, without loss where possible; else it says what would be lost, "
    "and --requantize accepts that.\n\nFor example: whit convert small model.gguf --format q8_0 --requantize",
    "train": "Train a model for the format it is stored in. A killed run resumes when it is run again, and gives the "
    "same bytes.",
    "imatrix": "Write llama.cpp's importance matrix: the mean square of every input of every matrix, over a "
    "calibration text.",
    "merge": "Merge an adapter into a model, and measure the cost: the KL divergence from the two kept apart.",
    "inspect": "Show formats, bits per weight, size, coverage and provenance, and what is wrong with a quantized "
    "checkpoint.",
    "memory": "Say how much memory a model takes in each format, from its config.json alone, and what fits."
    "\n\nFor example: whit memory Llama-3-8B --fit 24GB",
    "bench": "Measure kernels or a model: seconds, ratio to bfloat16, and share of what this machine can do.",
    "doctor": "Say what this machine has: libraries, devices, instruction sets, and which kernels run and why.",
    "demo": "Quantize the model that ships with whit in several ways, measure each, and let one write a text.",
}  # fmt: skip


def main() -> None:
    """`--version`, `--help` and what a shell asks, alone; all else is `whit.cli`'s."""
    asked = sys.argv[1:]
    if ASKED in os.environ:
        app(table(), COMMANDS)(prog_name="whit")
    elif asked == ["--version"]:
        print(f"whit {metadata.version('whit')}")
    elif asked[:1] == ["--install-completion"]:
        table()  # takes seconds now, and none at the first TAB
        overview()(prog_name="whit")
    elif asked in (["--help"], ["--show-completion"]):
        overview()(prog_name="whit")
    else:
        try:
            from whit.cli import main as run
        except KeyboardInterrupt:  # while torch is imported, for seconds
            print("whit: interrupted", file=sys.stderr)
            sys.exit(130)
        run()


def overview() -> typer.Typer:
    """The commands by name and summary: what `whit --help` shows, and nothing that runs."""
    shown = typer.Typer(name="whit", no_args_is_help=True, help=SUMMARY)
    shown.callback()(_options)
    for name, summary in COMMANDS.items():
        shown.command(name, help=summary)(_nothing)
    return shown


def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    """What stands before a command."""


def _nothing() -> None:
    """In the place of a command."""
