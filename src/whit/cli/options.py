"""Options that several commands share, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from whit.activations import SCHEMES
from whit.calibration import Calibration
from whit.calibration.storage import INPUT_MEMORY
from whit.cli.shown import parse_size
from whit.export import EXPORTERS
from whit.formats import EXAMPLES

MODEL_HELP = "Folder, .gguf file, hub id (or REPO:Q4_K_M, one .gguf file of several there) or whit:model."
OUT_HELP = "A new folder, or a new .gguf file; it appears once it is complete."
DEFAULT_FORMAT_HELP = (
    "int4-g128, in smaller groups if 128 does not divide the rows; in other kinds of file, what is usual there"
)
CALIBRATION_HELP = "Text or .jsonl file for methods that need data (gptq, refine, blocks, awq ...)."
SHIPPED = " \\[default: whit:text]"
FORMAT_HELP = "Format of every linear: " + ", ".join(EXAMPLES) + "; with activations: " + ", ".join(SCHEMES) + "."
EXPORT_HELP = "What kind of file is written: " + "; ".join(f"{e.name}: {e.summary}" for e in EXPORTERS) + "."
RULE_HELP = (
    "A format for the modules that a glob matches, such as 'lm_head=int8', '*.0.*=bf16' or, with a method of its own, "
    "'*.down_proj=gptq:int4-g64'; may be repeated, and the last match counts. The rows of an embedding or a head may "
    "have several formats, the most used rows the first: '*.embed_tokens=bands(q5_k:1024,q2_k)'."
)

Seed: TypeAlias = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]
Device: TypeAlias = Annotated[str, typer.Option(help="Where to compute: auto, cpu or cuda.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; the result's bytes do not depend on them.")
]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")]
Restart: TypeAlias = Annotated[bool, typer.Option("--restart", help="Start over, and replace an older result.")]
Dtype: TypeAlias = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
ScoredText: TypeAlias = Annotated[str, typer.Option(help="UTF-8 file, .jsonl of texts, whit:heldout or whit:text.")]
MaxTokens: TypeAlias = Annotated[int | None, typer.Option(help="Score only the first N tokens of the text.")]
Tasks: TypeAlias = Annotated[
    str, typer.Option(help="Zero-shot tasks, separated by commas: piqa,arc_easy,hellaswag,...")
]
TaskData: TypeAlias = Annotated[Path | None, typer.Option(help="Folder with the tasks' local files.")]
Limit: TypeAlias = Annotated[int | None, typer.Option(help="Only the first N items of each task.")]
Samples: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Calibration windows. \\[default: 128]")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Only JSON on standard output.")]
Revision: TypeAlias = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of MODEL on the hub; the same as MODEL@REV.")
]
TrustRemoteCode: TypeAlias = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]
Export: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"{EXPORT_HELP} \\[default: whit; gguf where OUT ends in .gguf]"),
]
InputMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for block inputs while calibrating, such as 24GB; inputs that need more go to files beside OUT. "
        f"\\[default: {INPUT_MEMORY >> 30}GiB]",
    ),
]


def input_bytes(asked: str | None) -> int:
    """Of --input-memory."""
    return INPUT_MEMORY if asked is None else parse_size(asked)


def build_calibration(text: str | None, samples: int | None, context: int | None, seed: int) -> Calibration | None:
    """The calibration of a command line; None where nothing is said of it."""
    if text is None and samples is None and context is None:
        return None
    return Calibration(text or "whit:text", samples or 128, context, seed)


def parse_names(text: str) -> tuple[str, ...]:
    """What stands between commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parse_rules(rules: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of a glob and a format from GLOB=SPEC."""
    found = []
    for rule in rules or ():
        glob, separator, spec = rule.rpartition("=")
        if not (glob and separator and spec):
            raise typer.BadParameter(f"{rule!r}: write GLOB=SPEC, for example 'lm_head=int8'", param_hint="--rule")
        found.append((glob, spec))
    return found
