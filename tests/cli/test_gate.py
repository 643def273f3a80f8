"""`whit quantize --max-kl`, `--max-ppl-increase`: exit status 3, the measured value said, the result kept."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from whit.cli.gate import Gate
from whit.errors import QualityGateError
from whit.evaluation import EvaluationOptions, evaluate
from whit.evaluation.result import BaselineResult, EvaluationResult
from whit.pipeline.coverage import load_account

MEASURED = EvaluationResult(
    "out", 11.0, None, 100, 64, 4.0, 1000, BaselineResult("model", 10.0, 0.02, (0.01, 0.03), 0.5, 0.9)
)


def test_a_gate_that_is_not_met_exits_with_three_and_keeps_the_result(whit, tmp_path: Path):
    out = tmp_path / "out"
    words = ("quantize", "whit:model", out, "--format", "int3-g64", "--gate-tokens", 512, "--device", "cpu")
    status, _, notes = whit(*words, "--max-kl", "0.001")
    assert status == 3
    said = re.search(r"mean KL divergence is ([\d.]+); --max-kl allows 0.001", notes)
    assert said
    assert f"kept in {out}" in notes
    assert (out / "whit.json").exists()
    options = EvaluationOptions(baseline="whit:model", max_tokens=512, device="cpu")
    against = evaluate(str(out), options).baseline
    assert against is not None
    assert float(said[1]) == pytest.approx(against.kl_mean, rel=1e-4)
    measured = load_account(out).measured
    assert measured is not None
    assert (measured["kl"], measured["text"]) == (against.kl_mean, "whit:heldout")
    status, _, notes = whit(*words, "--max-kl", "10", "--max-ppl-increase", "500")  # the finished result is used
    assert status == 0
    assert f"mean KL divergence {said[1]}" in notes


def test_what_cannot_be_measured_is_said_before_the_work(whit, tmp_path: Path):
    out = tmp_path / "out"
    status, _, notes = whit("quantize", "whit:model", out, "--max-kl", "1", "--gate-text", tmp_path / "none.txt")
    assert (status, "none.txt: no such file" in notes) == (1, True)
    status, _, notes = whit("quantize", "whit:model", out, "--gate-tokens", "512")
    assert (status, "--max-kl" in notes) == (2, True)
    (tmp_path / "empty.txt").write_text("")
    status, _, notes = whit("quantize", "whit:model", out, "--max-kl", "1", "--gate-text", tmp_path / "empty.txt")
    assert (status, "the text is empty" in notes) == (1, True)
    for option, value in (("--max-kl", "nan"), ("--max-kl", "-1"), ("--max-ppl-increase", "nan")):
        status, _, notes = whit("quantize", "whit:model", out, option, value)
        assert (status, option in notes) == (2, True)
    assert not out.exists()


def test_each_limit_counts():
    Gate().check(MEASURED)
    Gate(0.02, 10.1).check(MEASURED)
    with pytest.raises(QualityGateError, match=r"out: mean KL divergence is 0.02; --max-kl allows 0.01; use more"):
        Gate(max_kl=0.01).check(MEASURED)
    with pytest.raises(QualityGateError, match=r"10 % above the baseline's; --max-ppl-increase allows 9 %"):
        Gate(max_ppl_increase=9).check(MEASURED)
    with pytest.raises(QualityGateError, match=r"KL .*; perplexity .*"):
        Gate(0.01, 9).check(MEASURED)
    with pytest.raises(QualityGateError, match="allows nan"):  # what cannot be compared is not met
        Gate(max_kl=float("nan")).check(MEASURED)
    Gate(0.01, 9).check(replace(MEASURED, baseline=None))
