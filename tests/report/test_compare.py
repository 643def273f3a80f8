"""whit compare: what candidates are, that rows are measured, kept and told apart, and that failures are rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import whit
from whit.calibration import Calibration
from whit.errors import WhitError, WhitWarning
from whit.evaluation import EvaluationOptions, evaluate
from whit.report.candidates import parse_entrants
from whit.report.energy import Meter
from whit.report.front import chart, front
from whit.report.kept import keep, recall
from whit.report.layers import grid
from whit.report.runs import Settings, compare, in_process
from whit.report.speed import SpeedOptions, Spread
from whit.report.tables import columns, markdown
from whit.report.timed import serve
from whit.report.work import Order, do

MODEL = "whit:model"
SETTINGS = Settings(
    EvaluationOptions(max_tokens=600, context=128),
    SpeedOptions(prompt_tokens=16, new_tokens=2, repeats=2),
    Calibration(samples=2, context=64),
    threads=1,
)


def row(name: str, size: int, kl: float, kind: str = "whit") -> dict:
    return {
        "candidate": name, "kind": kind, "size_bytes": size, "bits_per_weight": 4.0, "perplexity": 20.0,
        "memory_loaded_bytes": size, "memory_peak_bytes": size, "top1_agreement": 0.9, "tokens": 10, "context": 4,
        "kl": {"mean": kl, "ci95": [kl * 0.9, kl * 1.1], "p99": kl * 5}, "tasks": {},
    }  # fmt: skip


def test_candidates_are_told_apart(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = f"int8, gptq:int4-g64,rtn:int8 ,codebook(-1,0,1)-g64,bitsandbytes:nf4,{folder}"
    found = parse_entrants(text)
    assert [e.label for e in found] == [
        "bf16", "int8", "gptq:int4-g64", "codebook(-1,0,1)-g64", "bitsandbytes:nf4", "mine",
    ]  # fmt: skip
    assert [e.kind for e in found] == ["original", "whit", "whit", "whit", "peer", "checkpoint"]
    for wrong in ("int9", "nothing:int4-g64", "./not/there", ":int4"):
        with pytest.raises(WhitError):
            parse_entrants(wrong)


def test_every_method_and_format_is_a_candidate():
    for method in whit.methods.METHODS:
        assert parse_entrants(f"{method.name}:int4-g64")[1].method == method.name
    for spec in whit.formats.EXAMPLES:
        assert parse_entrants(spec)[-1].format == ("bf16" if spec == "bf16" else str(whit.parse_format(spec)))


def at_home(step: str, order: Order) -> dict:
    """A step in this process, which has imported everything already; the order makes the same way."""
    return json.loads(json.dumps(do(step, Order.from_json(order.to_json()))))


class LoadedAtHome:
    """A candidate that waits for its turns in this process."""

    def __init__(self, order: Order) -> None:
        self.answers = serve(itertools.chain([order.to_json()], itertools.repeat("lap")))

    def answer(self) -> dict:
        return json.loads(json.dumps(next(self.answers)))

    turn = answer

    def close(self) -> None:
        self.answers.close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run with one of whit's own, a checkpoint from elsewhere, and one that must fail."""
    out = tmp_path_factory.mktemp("compare")
    copy = out / "copy"
    whit.quantize(MODEL, copy, whit.Recipe(rules=[("*", "int4-g64")]))
    damaged = out / "damaged"
    shutil.copytree(copy, damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    said: list[str] = []
    entrants = parse_entrants(f"int4-g64,{copy},{damaged}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whit.report.runs.in_process", at_home)
        patch.setattr("whit.report.runs.Loaded", LoadedAtHome)
        return out, entrants, compare(MODEL, out, entrants, SETTINGS, said.append), said


def test_a_row_has_the_figures_of_whit_evaluate(measured):
    out, _, found, _ = measured
    original, ours, copy, _ = found.rows
    options = dataclasses.replace(SETTINGS.evaluation, baseline=whit.resolve_model(MODEL))
    alone = evaluate(str(out / "models" / "int4-g64"), options).to_json()
    for key in ("perplexity", "kl", "top1_agreement", "bits_per_weight", "size_bytes", "tokens"):
        assert ours[key] == pytest.approx(alone[key]) if key == "perplexity" else ours[key] == alone[key], key
    assert (copy["perplexity"], copy["kl"]) == (ours["perplexity"], ours["kl"])
    assert original["kl"]["mean"] == 0
    assert ours["relative"]["size"] == ours["size_bytes"] / original["size_bytes"]
    assert ours["prefill"]["low"] <= ours["prefill"]["median"] <= ours["prefill"]["high"]
    assert ours["memory_peak_bytes"] > ours["memory_loaded_bytes"] > 0
    assert (
        whit.Recipe.from_dict(json.loads((out / "models/int4-g64/whit.json").read_text())["recipe"]).to_toml()
        == ours["recipe"]
    )
    assert ours["made"]["seconds"] > 0 < ours["made"]["cpu_seconds"]
    assert ours["energy_note"]
    assert ours["relative"]["decode"] == ours["paired"]["decode"]
    assert original["paired"] == {"prefill": 1.0, "decode": 1.0}
    assert found.machine["read_bandwidth"] > 1e8
    assert not (out / "logits").exists()


def test_a_failure_is_a_row_that_says_why(measured):
    _, _, found, said = measured
    failed = found.rows[-1]
    assert "model.safetensors" in failed["error"] or "header" in failed["error"].lower()
    assert any(line.startswith("failed: ") for line in said)
    assert failed["error"].replace("|", "\\|") in markdown(found.rows)


def test_a_run_in_which_no_candidate_was_measured_is_a_failure(measured):
    _, _, found, _ = measured
    found.check()  # one failed of three
    alone = dataclasses.replace(found, rows=(found.rows[0], found.rows[-1]))
    with pytest.raises(WhitError, match=r"none of 1 candidates could be measured.*the first, damaged, failed with: "):
        alone.check()
    dataclasses.replace(found, rows=found.rows[:1]).check()  # the original alone


def test_what_was_measured_is_not_measured_again(measured, monkeypatch):
    out, entrants, found, _ = measured
    asked = []

    def refuse(step: str, order: Order) -> dict:
        asked.append(order.entrant.label)
        return {"error": "should not run"}

    monkeypatch.setattr("whit.report.runs.in_process", refuse)
    monkeypatch.setattr("whit.report.runs.Loaded", LoadedAtHome)
    again = compare(MODEL, out, entrants, SETTINGS, lambda _: None)
    assert asked == ["damaged"]  # tried again
    assert again.rows[:3] == found.rows[:3]
    shorter = dataclasses.replace(SETTINGS, speed=SpeedOptions(prompt_tokens=8, new_tokens=1, repeats=1))
    asked.clear()
    fresh = compare(MODEL, out, entrants, shorter, lambda _: None)  # other speeds, the same quality
    again = compare(MODEL, out, entrants, SETTINGS, lambda _: None, speed_again=True)
    assert asked == ["damaged", "bf16", "damaged", "bf16"]  # the bandwidth is asked of the first
    for rows in (fresh.rows, again.rows):
        assert [row["kl"] for row in rows[:3]] == [row["kl"] for row in found.rows[:3]]
        assert not any(row["decode"] == old["decode"] for row, old in zip(rows[:3], found.rows[:3], strict=True))
    asked.clear()
    other = dataclasses.replace(SETTINGS, evaluation=EvaluationOptions(max_tokens=700, context=128))
    compare(MODEL, out, entrants[:1], other, lambda _: None)
    assert asked == ["bf16"]  # other settings, other rows


@pytest.mark.parametrize(("model", "text"), [("nowhere", "whit:heldout"), (MODEL, "empty.txt")])
def test_what_is_wrong_with_model_or_text_leaves_nothing_behind(model: str, text: str, tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    text = text if text.startswith("whit:") else str(tmp_path / text)
    settings = dataclasses.replace(SETTINGS, evaluation=dataclasses.replace(SETTINGS.evaluation, text=text))
    with pytest.raises(WhitError, match=r"nowhere|the text is empty"):
        compare(str(tmp_path / model) if model == "nowhere" else model, tmp_path / "out", (), settings, print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b'{"a": 1', b"[1]", b"\xff{}", b""])
def test_what_was_kept_and_is_damaged_is_measured_again(content: bytes, tmp_path: Path):
    place = tmp_path / "row.json"
    assert recall(place) is None
    keep(place, {"a": 1})
    assert recall(place) == {"a": 1}
    place.write_bytes(content)
    with pytest.warns(WhitWarning, match=r"row.json: damaged; what it held is measured again"):
        assert recall(place) is None


def test_a_step_runs_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch.py").write_text("raise ImportError('a file of the user, in the folder that whit is run from')")
    monkeypatch.chdir(tmp_path)
    order = Order(MODEL, parse_entrants("int8")[1], str(tmp_path / "int8"), SETTINGS.evaluation, None, Calibration())
    made = in_process("make", order)
    assert made["seconds"] > 0
    assert (tmp_path / "int8" / "whit.json").is_file()


def test_a_process_that_dies_is_an_error(monkeypatch, tmp_path: Path):
    script = tmp_path / "killed"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    order = Order(MODEL, parse_entrants("int8")[1], str(tmp_path), SETTINGS.evaluation, None, Calibration())
    assert "by signal 9" in in_process("make", order)["error"]


def test_orders_survive_the_way_to_another_process(tmp_path: Path):
    evaluation = EvaluationOptions(task_data=tmp_path, tasks=("piqa",), limit=3)
    order = Order(
        MODEL, parse_entrants("gptq:int3-g64")[1], "x", evaluation, SpeedOptions(), Calibration(samples=3), 1, 2
    )
    assert Order.from_json(order.to_json()) == order


def test_the_front_is_what_nothing_smaller_beats():
    rows = [
        row("a", 100, 0.1),
        row("b", 110, 0.2),
        row("c", 120, 0.05),
        row("d", 120, 0.06),
        row("o", 300, 0, "original"),
    ]
    assert [r["candidate"] for r in front(rows)] == ["a", "c"]
    drawn = chart(rows)
    assert drawn is not None
    best = {p.row["candidate"]: p for p in drawn.points}
    assert best["a"].x < best["c"].x < drawn.original_x
    assert best["a"].y < best["c"].y  # pixels grow downwards: more divergence is higher up
    assert chart([{"candidate": "x", "kind": "whit", "error": "no"}]) is None


def test_tables_show_only_what_was_measured():
    rows = [row("bf16", 10, 0, "original"), row("int8", 5, 0.01), {"candidate": "x", "kind": "peer", "error": "why"}]
    titles = [column.title for column in columns(rows)]
    assert "KL" in titles
    assert "decode tok/s" not in titles
    lines = markdown(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_layers_become_a_grid():
    layers = [{"name": f"model.layers.{b}.{p}.weight", "relative_error": b + 0.5} for b in (0, 1) for p in ("q", "k")]
    found = grid([*layers, {"name": "lm_head.weight", "relative_error": 1.0}])
    assert found is not None
    assert (found.blocks, found.projections, found.errors) == ((0, 1), ("q", "k"), ((0.5, 0.5), (1.5, 1.5)))


def test_energy_is_a_counter_or_a_reason(tmp_path: Path):
    nothing = Meter(torch.device("cpu"), tmp_path)
    assert nothing.read() is None
    assert nothing.note.startswith("not measurable here")
    for package, joules in (("intel-rapl:0", 2), ("intel-rapl:1", 3), ("intel-rapl:0:0", 100)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "energy_uj").write_text(f"{joules}000000\n")
    assert Meter(torch.device("cpu"), tmp_path).read() == 5.0  # packages, not their parts


def test_a_spread_is_median_least_and_most():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
