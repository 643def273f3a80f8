"""`whit bench kernels`: every row of its JSON is complete, and its ratios follow from its seconds."""

from __future__ import annotations

import gc
import json
import weakref
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

from whit.cli import build_app
from whit.errors import FormatError
from whit.evaluation import kernel_speed
from whit.evaluation.kernel_peers import peers_of
from whit.kernels.cpu import library


@pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")
def test_json_has_every_kernel_and_consistent_ratios(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_speed, "COLD", 1 << 20)
    monkeypatch.setattr(kernel_speed, "READ", 1 << 22)
    command = "bench kernels --format int4-g128,nf4 --shape 64x512 --rows 1,20 --rounds 1 --json"
    result = CliRunner().invoke(build_app(), command.split())
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["machine"]["read_bytes_per_second"] > 0
    cases = {(row["format"], row["rows"]) for row in found["rows"]}
    assert cases == {(format, rows) for format in ("int4-g128", "nf4") for rows in (1, 20)}
    for case in cases:
        rows = [row for row in found["rows"] if (row["format"], row["rows"]) == case]
        plain = next(row["seconds"] for row in rows if row["kernel"] == "torch bf16")
        kernels = {row["kernel"] for row in rows}
        assert {"torch bf16", "cpu"} <= kernels
        assert (kernel_speed.READING in kernels) == (case[1] == 1), "one row is bound by memory"
        for row in rows:
            assert row["shape"] == [64, 512]
            assert row["ratio_to_bf16"] == pytest.approx(plain / row["seconds"])
            assert row["share_of_limit"] > 0
            assert row["bytes"] >= 64 * 512 / 2
            assert row["hot_seconds"] > 0


@pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")
def test_schemes_are_measured_and_peers_that_cannot_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_speed, "COLD", 1 << 18)
    monkeypatch.setattr(kernel_speed, "READ", 1 << 22)
    command = "bench kernels --format llm.int8,w8a8-static,int4-g13 --shape 64x130 --rows 2 --rounds 1 --json"
    result = CliRunner().invoke(build_app(), command.split())
    assert result.exit_code == 0, result.output
    assert "torch int4pack is left out for int4-g13 64x130: " in result.stderr
    kernels: dict[str, set[str]] = {}
    for row in json.loads(result.stdout)["rows"]:
        kernels.setdefault(row["format"], set()).add(row["kernel"])
    assert "cpu-int8, int8-outliers inputs" in kernels["llm.int8"]
    assert "cpu-int8, int8-static inputs" in kernels["w8a8-static"]
    assert "torch int4pack" not in kernels["int4-g13"]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("format", ["nf4", "fp4-dq", "llm.int8"])
def test_bitsandbytes_multiplies_by_the_weight_that_was_given(format: str):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    calls, size = peers_of(format)["bitsandbytes"](weight, lambda size: 2)
    assert len(calls) == 2
    assert 64 * 128 / 2 < size < 64 * 128 * 1.1
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = x.float() @ weight.T
    for call in calls:
        assert (call(x).float() - wanted).norm() < (0.03 if format == "llm.int8" else 0.2) * wanted.norm()


@pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")
def test_what_is_read_alone_stays_as_long_as_it_may_be_read(monkeypatch: pytest.MonkeyPatch):
    class Memory(bytearray):
        pass

    monkeypatch.setattr(kernel_speed, "COLD", 1 << 13)
    held = [Memory(1 << 13)]
    known = weakref.ref(held[0])
    monkeypatch.setattr(kernel_speed, "in_huge_pages", lambda tensor: torch.frombuffer(held.pop(), dtype=torch.uint8))
    compiled = library()
    assert not isinstance(compiled, str)
    calls, size = kernel_speed.reading(1 << 12, compiled)
    gc.collect()
    assert (len(calls), size) == (2, 1 << 12)
    assert known() is not None
    del calls
    gc.collect()
    assert known() is None


def test_candidates_that_run_elsewhere_take_their_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_speed, "COLD", 1 << 18)
    asked = []

    def turn(seconds: float) -> list[float]:
        asked.append(seconds)
        return [9.0] if len(asked) == 1 else [0.25, 0.5, 0.75]

    limits = kernel_speed.Limits(1e9, 1e12)
    others = {"elsewhere": (turn, 1000), "broken": (lambda seconds: [], 1000)}
    found = kernel_speed.measure("int4-g128", (64, 512), 1, limits, rounds=2, peers=False, others=others)
    speeds = {speed.kernel: speed for speed in found}
    assert asked == [kernel_speed.TURN] * 3
    assert speeds["elsewhere"].seconds == 0.5, "the first turn warms up"
    assert speeds["elsewhere"].share_of_limit == pytest.approx(1000 / 1e9 / 0.5)
    assert speeds["elsewhere"].ratio_to_bf16 == pytest.approx(speeds["torch bf16"].seconds / 0.5)
    assert "broken" not in speeds


def test_a_wrong_shape_is_wrong_usage():
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--shape", "12"])
    assert result.exit_code == 2
    assert "out x in" in result.output
    for rows in ("x", "0", "1,-2"):
        result = CliRunner().invoke(build_app(), ["bench", "kernels", "--shape", "12x12", "--rows", rows])
        assert result.exit_code == 2
        assert "whole numbers from 1" in result.output


def test_a_wrong_format_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_speed, "measure_limits", lambda: pytest.fail("measured"))
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--format", "int4-g128,nf44", "--rows", "1"])
    assert isinstance(result.exception, FormatError)


def test_kernels_have_shapes_and_no_model():
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "whit:model"])
    assert result.exit_code == 2
    assert "use --shape" in result.output


def test_the_table_is_the_result(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_speed, "measure_limits", lambda: kernel_speed.Limits(1e9, 1e12))
    monkeypatch.setattr(kernel_speed, "measure", lambda *_: [])
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--rows", "1", "--threads", "1"])
    assert "kernel" in result.stdout
    assert "1 thread; the machine reads 1.0 GB/s" in result.stdout
    assert result.stderr == ""


@pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")
def test_a_model_is_measured_compiled_or_not_and_in_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_speed, "READ", 1 << 22)
    command = "bench model whit:model --prompt-tokens 4 --new-tokens 3 --rounds 1 --peers --json"
    result = CliRunner().invoke(build_app(), command.split())
    assert result.exit_code == 0, result.output
    assert "llama.cpp is left out: MODEL is no .gguf file" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    cases = {(row["kernel"], row["phase"], row["tokens"]) for row in rows}
    measured = (("prefill", 512), ("prefill", 4), ("decode", 3))
    assert cases == {(name, *case) for name in ("whit", "whit, not compiled", "bf16") for case in measured}
    for row in rows:
        plain = next(
            r for r in rows if r["kernel"] == "bf16" and (r["phase"], r["tokens"]) == (row["phase"], row["tokens"])
        )
        assert row["ratio_to_bf16"] == pytest.approx(plain["seconds"] / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        # Decoding is what is left when prefilling is taken off: beside other work on the machine that can be below 0.
        assert row["share_of_limit"] * row["seconds"] > 0


def test_a_model_must_be_named():
    result = CliRunner().invoke(build_app(), ["bench", "model"])
    assert result.exit_code == 2
    assert "no MODEL is given" in result.output
