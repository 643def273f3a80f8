"""What training says it will take: seconds near those it takes, in parts that grow with what they are counted in."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import whit
from whit.pipeline.estimate import Estimate
from whit.qat import Course, Setting, Training, Words, expected, prepare_full, train
from whit.qat.loop import Loop

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4}
COURSE = Course(steps=3, batch=2)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("expected")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_hidden_layers=2, tie_word_embeddings=True, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = Words(tokens=torch.randint(3, 500, (6, 128), generator=torch.Generator().manual_seed(0)))
    return prepare_full(folder / "model", folder / "out", whit.Recipe("rtn", [("*", "int3-g64")]), COURSE, words)


def test_a_step_takes_about_what_it_says(training: Training, monkeypatch: pytest.MonkeyPatch):
    """In processor time, of which other programs take nothing."""
    monkeypatch.setattr(expected, "time", SimpleNamespace(perf_counter=time.process_time))
    said = expected.step_seconds(training)
    step, taken = Loop._step, list[float]()

    def timed(self: Loop, team: object) -> torch.Tensor:
        began = time.process_time()
        loss = step(self, team)  # type: ignore[arg-type]
        taken.append(time.process_time() - began)
        return loss

    monkeypatch.setattr(Loop, "_step", timed)
    train(training)
    assert min(taken) / 4 < said < 4 * max(taken)


def test_it_grows_with_what_is_done(training: Training, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expected, "timed", lambda *_: 1e-3)
    monkeypatch.setattr(expected, "_moved", lambda _: 1e-4)  # a trial, which other work on the machine disturbs
    each, moved = expected.step_seconds(training), 1e-4 / torch.get_num_threads()

    def changed(**options: object) -> float:
        return expected.step_seconds(replace(training, course=replace(COURSE, **options)))  # type: ignore[arg-type]

    assert changed(batch=4) - moved == pytest.approx(2 * (each - moved))
    alone = changed(distill=0.0, text=1.0)  # three passes of four: no teacher
    assert 0.7 * each < alone < 0.9 * each
    monkeypatch.setattr(expected, "estimate", lambda job: Estimate(1.0, 0, 0))
    once = expected.expect(training).seconds
    assert expected.expect(replace(training, course=replace(COURSE, steps=300))).seconds - once == pytest.approx(
        297 * each, rel=0.05
    )
    ended = replace(training, course=replace(COURSE, steps=10**9, seconds=60.0))
    assert expected.expect(ended).seconds < once + 61
    own = replace(training, words=Words("self", 6, 128), tokens=None)
    assert expected.expect(own).seconds > once + 6 * 128 * expected.CALL
    scales = replace(training, mode="scales", begin=None, setting=Setting(teacher="another"))
    assert expected.expect(scales).seconds < once
