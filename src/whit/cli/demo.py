"""`whit demo`: the main job on the model that ships with the package."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from whit.cli.console import console, on_screen, print_json
from whit.cli.options import AsJson
from whit.cli.quiet import quiet_transformers
from whit.cli.watching import Watching
from whit.data import resolve_model

CANDIDATES = ("bf16", "int8", "nf4-dq", "int4-g64", "hqq:int4-g64", "int3-g64", "clip:int3-g64", "hqq:int3-g64")
PROMPT = "It was late in the evening when"


def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the quantized models here.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Score the first N tokens of the held-out text.")] = 16384,
    as_json: AsJson = False,
) -> None:
    from whit.evaluation import EvaluationOptions
    from whit.report.comparison import Candidate, measure

    quiet_transformers()
    model, options = resolve_model("whit:model"), EvaluationOptions(max_tokens=max_tokens)
    with tempfile.TemporaryDirectory(prefix="whit-demo-") as scratch:
        folder, rows = out or Path(scratch), []
        for spec in CANDIDATES:
            with Watching(console()) as watching:
                rows.append(measure(model, Candidate.parse(spec), folder, options, watching))
        if as_json:
            print_json([row.to_json() for row in rows])
            return
        _show(rows)
        _speak(str(folder / Candidate.parse("hqq:int4-g64").folder))


def _show(rows: list) -> None:  # type: ignore[type-arg]
    from whit.report.comparison import HEADER, cells, markdown

    print("\nA held-out novel under the shipped model, quantized; KL and top-1 agreement against bf16:\n")
    if not sys.stdout.isatty():
        print(markdown(rows))
        return
    table = Table()
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*cells(row))
    on_screen().print(table)


def _speak(folder: str) -> None:
    from whit.integrations.generation import Sampling, generate
    from whit.integrations.loading import load_causal_lm, load_tokenizer

    print(f"\nThe int4-g64 model (hqq) continues “{PROMPT}”:\n")
    result = generate(load_causal_lm(folder), load_tokenizer(folder), PROMPT, Sampling(max_new_tokens=60))
    print(PROMPT + result.text)
