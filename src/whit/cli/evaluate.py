"""`whit evaluate`: perplexity, divergence from a baseline, tasks, bits per weight."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from whit.checkpoint.hub import at_revision
from whit.cli.console import console, on_screen, print_json
from whit.cli.gate import Gate, MaxIncrease, MaxKL
from whit.cli.options import (
    MODEL_HELP,
    AsJson,
    Device,
    Dtype,
    Limit,
    MaxTokens,
    Revision,
    ScoredText,
    TaskData,
    Tasks,
    TrustRemoteCode,
    parse_names,
)
from whit.cli.quiet import quiet_transformers
from whit.cli.watching import Watching
from whit.evaluation.result import EvaluationResult


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    baseline: Annotated[
        str | None, typer.Option(help="Compare with this model: KL divergence, agreement of the likeliest tokens.")
    ] = None,
    text: ScoredText = "whit:heldout",
    context: Annotated[
        int | None, typer.Option(help="Tokens in a window. \\[default: 2048, or the model's maximum if that is less]")
    ] = None,
    max_tokens: MaxTokens = None,
    tasks: Tasks = "",
    task_data: TaskData = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_kl: MaxKL = None,
    max_ppl_increase: MaxIncrease = None,
    two_pass: Annotated[bool, typer.Option("--two-pass", help="Never hold both models in memory.")] = False,
    baseline_cache: Annotated[Path | None, typer.Option(help="Keep the baseline's logits here.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap behind the confidence interval.")] = 0,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    needs = {
        "--max-kl": max_kl is not None,
        "--max-ppl-increase": max_ppl_increase is not None,
        "--two-pass": two_pass,
        "--baseline-cache": baseline_cache is not None,
    }
    alone = [name for name, given in needs.items() if given and baseline is None]
    if alone:
        raise typer.BadParameter(f"{' and '.join(alone)} needs --baseline MODEL")
    from whit.evaluation import EvaluationOptions
    from whit.evaluation import evaluate as measure

    model = at_revision(model, revision)
    quiet_transformers()
    options = EvaluationOptions(
        baseline=baseline, text=text, context=context, max_tokens=max_tokens,
        tasks=parse_names(tasks), task_data=task_data, limit=limit, device=device, dtype=dtype,
        trust_remote_code=trust_remote_code, two_pass=two_pass, baseline_cache=baseline_cache, seed=seed,
    )  # fmt: skip
    with Watching(console()) as watching:
        result = measure(model, options, watching)
    if as_json:
        print_json(result.to_json())
    else:
        _show(result)
    Gate(max_kl, max_ppl_increase).check(result)


def _rows(result: EvaluationResult) -> list[tuple[str, str]]:
    error = "" if result.perplexity_stderr is None else f" ± {result.perplexity_stderr:.3f}"
    rows = [
        ("perplexity", f"{result.perplexity:.4f}{error}"),
        ("tokens", f"{result.tokens:,} in windows of {result.context:,}"),
        ("bits per weight", f"{result.bits_per_weight:.3f}"),
        ("size", f"{result.size_bytes / 1e6:,.1f} MB"),
    ]
    if result.baseline is not None:
        against = result.baseline
        low, high = against.kl_ci95
        rows += [
            ("baseline", against.name),
            ("baseline perplexity", f"{against.perplexity:.4f}"),
            ("mean KL divergence", f"{against.kl_mean:.6f} nats, 95 % in {low:.6f} .. {high:.6f}"),
            ("99th percentile of KL", f"{against.kl_p99:.6f}"),
            ("top-1 agreement", f"{100 * against.top1_agreement:.2f} %"),
        ]
    for name, task in result.tasks.items():
        spread = "" if task.stderr is None else f" ± {100 * task.stderr:.2f}"
        rows.append((name, f"{100 * task.accuracy:.2f}{spread} % {task.metric}, {task.items:,} items"))
    return rows


def _show(result: EvaluationResult) -> None:
    """A table on a terminal, `name: value` lines otherwise."""
    rows = [("model", result.model), *_rows(result)]
    if not sys.stdout.isatty():
        print("\n".join(f"{name}: {value}" for name, value in rows))
        return

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    on_screen().print(table)
