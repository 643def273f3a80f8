"""Speeds in turns: every round is a lap of each, ratios are of one round, and what fails says why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from whit.calibration import Calibration
from whit.evaluation import EvaluationOptions
from whit.report.candidates import parse_entrants
from whit.report.speed import SpeedOptions
from whit.report.turns import Loaded, take_turns, waves
from whit.report.work import Order

OPTIONS = SpeedOptions(prompt_tokens=8, new_tokens=2)
EVALUATION = EvaluationOptions(device="cpu")


def orders(names: str) -> list[Order]:
    return [
        Order("whit:model", entrant, "nowhere", EVALUATION, OPTIONS, Calibration(), threads=1)
        for entrant in parse_entrants(names)
    ]


class Machine:
    """It slows down from lap to lap; every candidate has a speed of its own on it."""

    def __init__(self, speeds: dict[str, float]) -> None:
        self.speeds, self.asked, self.closed = speeds, [], []

    def __call__(self, order: Order) -> Machine.Candidate:
        return Machine.Candidate(self, order.entrant.label)

    class Candidate:
        def __init__(self, machine: Machine, label: str) -> None:
            self.machine, self.label = machine, label

        def answer(self) -> dict:
            return {"error": "no such thing"} if self.label == "int2-g32" else {"energy_note": "a counter"}

        def turn(self) -> dict:
            asked = self.machine.asked
            asked.append(self.label)
            if self.label == "int3-g64" and asked.count("int3-g64") == 2:
                return {"error": "out of memory"}
            speed = self.machine.speeds[self.label] * 0.9 ** len(asked)
            return {"prefill": 10 * speed, "decode": speed, "joules_per_token": 1 / speed}

        def close(self) -> None:
            self.machine.closed.append(self.label)


def test_rounds_go_there_and_back_and_ratios_are_of_one_round():
    machine = Machine({"bf16": 10.0, "int8": 20.0, "int4-g64": 40.0, "int3-g64": 1.0})
    found = take_turns(orders("int8,int4-g64,int3-g64,int2-g32"), 3, lambda _: None, machine)
    assert machine.asked == [
        "bf16", "int8", "int4-g64", "int3-g64", "int3-g64", "int4-g64", "int8", "bf16", "bf16", "int8", "int4-g64",
    ]  # fmt: skip
    assert sorted(machine.closed) == ["bf16", "int2-g32", "int3-g64", "int4-g64", "int8"]
    assert found["int3-g64"] == {"speed_error": "out of memory"}
    assert found["int2-g32"] == {"speed_error": "no such thing"}
    eight = found["int8"]
    laps = [20 * 0.9**2, 20 * 0.9**7, 20 * 0.9**10]
    assert eight["decode"] == {"median": laps[1], "low": laps[2], "high": laps[0], "rounds": laps}
    assert eight["paired"]["decode"] == pytest.approx(2 * 0.9)  # ratios 1.8, 2.22, 1.8: medians of speeds say 2.47
    assert eight["joules_per_token"] == 1 / laps[1]
    assert eight["energy_note"] == "a counter"


def test_waves_hold_what_fits_and_always_the_original():
    every = orders("int8,int4-g64,nf4")
    labels = [[order.entrant.label for order in wave] for wave in waves(every, [5, 3, 2, 9], 10)]
    assert labels == [["bf16", "int8", "int4-g64"], ["bf16", "nf4"]]
    assert [len(wave) for wave in waves(every, [1, 1, 1, 1], 4)] == [4]


def test_a_process_that_dies_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = tmp_path / "killed"
    script.write_text("#!/bin/sh\necho a reason >&2\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    dead = Loaded(orders("int8")[0])
    assert dead.answer() == {"error": "its process ended by signal 9: a reason"}
    assert "signal 9" in dead.turn()["error"]
    dead.close()


@pytest.mark.slow
def test_a_process_of_its_own_times_laps():
    found = take_turns(orders(""), 2, lambda _: None)
    assert found["bf16"]["decode"]["low"] > 0
    assert found["bf16"]["paired"] == {"prefill": 1.0, "decode": 1.0}
    lost = take_turns(orders("int8"), 1, lambda _: None)["int8"]  # `nowhere` holds no model
    assert "nowhere" in lost["speed_error"]
