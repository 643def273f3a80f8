"""Quality gates: a model that was measured and is worse than the user allowed gives exit status 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from whit.cli.console import console, say
from whit.cli.quiet import quiet_transformers
from whit.cli.watching import Watching
from whit.data import resolve_text
from whit.errors import EvaluationError, QualityGateError, WhitError
from whit.evaluation.result import EvaluationResult
from whit.evaluation.text import read_text
from whit.pipeline.coverage import add_measured
from whit.pipeline.job import Options

HELDOUT = "whit:heldout"
FEW = 8192  # tokens on which a budget's divergence is measured where no gate names others
MaxKL: TypeAlias = Annotated[
    float | None, typer.Option(help="Exit with 3 if the mean KL divergence from the baseline is above this.")
]
MaxIncrease: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Exit with 3 if perplexity is more than this per cent above the baseline's."),
]


@dataclass(frozen=True)
class Gate:
    """The most that a quantized model may differ from the one that it was made from; None allows anything.

    `max_kl` is in nats per token, `max_ppl_increase` in per cent; both are measured on `text`, a file or a shipped
    text, or its first `max_tokens` tokens.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    text: str = HELDOUT
    max_tokens: int | None = None

    @property
    def is_set(self) -> bool:
        return self.max_kl is not None or self.max_ppl_increase is not None

    def check(self, result: EvaluationResult, note: str = "") -> None:
        """Raise QualityGateError with the measured values if a gate is not met; `note` is said last."""
        against = result.baseline
        if against is None:
            return
        failed = []
        if self.max_kl is not None and not against.kl_mean <= self.max_kl:
            failed.append(f"mean KL divergence is {against.kl_mean:.6g}; --max-kl allows {self.max_kl:g}")
        increase = 100.0 * (result.perplexity / against.perplexity - 1.0)
        if self.max_ppl_increase is not None and not increase <= self.max_ppl_increase:
            allowed = f"--max-ppl-increase allows {self.max_ppl_increase:g} %"
            failed.append(f"perplexity is {increase:.3g} % above the baseline's; {allowed}")
        if failed:
            raise QualityGateError(f"{result.model}: {'; '.join(failed)}; use more bits or a better method{note}")


def build_gate(max_kl: float | None, increase: float | None, text: str | None, max_tokens: int | None) -> Gate:
    """The gate of a command line; refuses what no model can meet and a text that is not one, before all the work."""
    gate = Gate(max_kl, increase, text or HELDOUT, max_tokens)
    if not gate.is_set and (text is not None or max_tokens is not None):
        raise typer.BadParameter(
            "nothing is to be measured; add --max-kl or --max-ppl-increase", param_hint="--gate-text"
        )
    if max_kl is not None and not max_kl >= 0:  # a NaN too
        raise typer.BadParameter(f"{max_kl:g}: no divergence is below 0; give 0 or more", param_hint="--max-kl")
    if increase is not None and isnan(increase):
        raise typer.BadParameter("nan: must be a number of per cent", param_hint="--max-ppl-increase")
    if gate.is_set and not resolve_text(gate.text).is_file():
        raise EvaluationError(f"{gate.text}: no such file; a gate needs a text to measure on; check --gate-text")
    if gate.is_set:
        read_text(resolve_text(gate.text))
    return gate


def measure(model: str, out: Path, gate: Gate, options: Options, budget: Mapping[str, Any] | None = None) -> None:
    """Compare what lies in `out` with the model that it was made from, where there is a gate or a `budget`.

    Says what is found and puts it into the account; raises if the gate is not met.
    """
    if not gate.is_set and budget is None:
        return
    from whit.evaluation import EvaluationOptions, evaluate

    quiet_transformers()
    how = EvaluationOptions(
        baseline=model, text=gate.text, max_tokens=gate.max_tokens if gate.is_set else FEW, device=options.device,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    notes = console()
    try:
        with Watching(notes) as watching:
            result = evaluate(str(out), how, watching)
    except WhitError as error:
        if gate.is_set:
            raise
        say(f"not measured: {error}", notes)
        return
    against = result.baseline
    assert against is not None
    found = f"mean KL divergence {against.kl_mean:.6g}, perplexity {result.perplexity:.4f} ({against.perplexity:.4f})"
    expected = "" if budget is None else f"; expected {budget['expected']:.4g} {budget['unit']}"
    say(f"{gate.text}: {found}{expected}", notes)
    add_measured(out, {
        "text": Path(gate.text).name, "tokens": result.tokens, "kl": against.kl_mean, "perplexity": result.perplexity,
        "baseline_perplexity": against.perplexity,
    })  # fmt: skip
    gate.check(result, f"; what was written is kept in {out}")
