"""Adapters on codes that calibration chose: the base beside them, the factors they begin with, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from small_tuning import TUNING, Watcher, adapter, mean_loss

import whit
from forking import in_child
from whit.checkpoint.places import work_path
from whit.checkpoint.reader import Checkpoint
from whit.errors import TrainingError
from whit.training.ranks import Ranks
from whit.tuning import base as based
from whit.tuning import prepare_tuning
from whit.tuning.run import build_loop
from written import weight_bytes

CALIBRATED = replace(TUNING, format="int2-g32", method="gptq", init="data", steps=2, evaluate_every=2)


@pytest.fixture(scope="module")
def trained(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("calibrated") / "out"
    whit.finetune(model, data, out, CALIBRATED)
    return out


def test_the_base_lies_beside_the_adapter_and_both_are_what_was_scored(trained, model, data):
    assert {path.name for path in trained.iterdir()} >= {"base", "adapter_model.safetensors", "whit.json"}
    assert not (trained / "start").exists()
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trained / "base")
    record = json.loads((trained / "whit.json").read_text())
    assert record["base"]["bits_per_weight"] == json.loads((trained / "base/whit.json").read_text())["bits_per_weight"]
    loaded = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(trained / "base"), trained).eval()
    job = prepare_tuning(model, data, trained.parent / "new", CALIBRATED, None, whit.Options())
    assert mean_loss(loaded, job.work.held_out) == pytest.approx(record["held_out_loss"]["last"], rel=1e-4)


def test_codes_and_factors_are_those_of_a_side_car(model, data, tmp_path):
    """Base and start together are the model that `whit quantize --low-rank` makes on the same tokens."""
    job = prepare_tuning(model, data, tmp_path / "out", replace(CALIBRATED, dtype="float32"), None, whit.Options())
    work_path(job.out).mkdir()
    based.make_base(job, Ranks())
    loop, _ = build_loop(job, Ranks())
    whole = hf.AutoModelForCausalLM.from_pretrained(work_path(job.out) / "start", dtype=torch.float32)
    tokens = job.work.examples[0].tokens[None]
    with torch.no_grad():
        torch.testing.assert_close(loop.model.eval()(tokens).logits, whole(tokens).logits, rtol=1e-3, atol=1e-4)
    start, base = (Checkpoint(work_path(job.out) / name) for name in ("start", "base"))
    assert {name for name in start if "low_rank" not in name} == set(base)
    assert all(torch.equal(start[name], base[name]) for name in base)


def test_killed_runs_end_with_the_same_bytes(model, data, trained, tmp_path):
    out = tmp_path / trained.parent.name / "out"

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:  # in the child alone
        based.set_start = die
        whit.tuning.run.set_start = die
        whit.finetune(model, data, out, CALIBRATED)

    assert in_child(run) == -signal.SIGKILL  # codes are chosen, nothing is trained
    assert (work_path(out) / "base" / "whit.json").exists()
    assert in_child(lambda: whit.finetune(model, data, out, CALIBRATED, watcher=Watcher(2))) == -signal.SIGKILL
    whit.finetune(model, data, out, CALIBRATED)
    assert weight_bytes(out / "base") == weight_bytes(trained / "base")
    assert adapter(out)["adapter_model.safetensors"] == adapter(trained)["adapter_model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"init": "default"}, {"method": "refine"}, {"dora": True, "targets": ("q_proj", "down_proj")}]
)
def test_other_settings_train(model, data, tmp_path, options):
    record = whit.finetune(model, data, tmp_path / "out", replace(CALIBRATED, **options))
    assert record["held_out_loss"]["last"] < record["held_out_loss"]["first"]


def test_targets_are_checked_before_anything_is_quantized(model, data, tmp_path):
    with pytest.raises(TrainingError, match="target nothing: matches no linear"):
        whit.finetune(model, data, tmp_path / "out", replace(CALIBRATED, targets=("nothing",)))
    assert not list(tmp_path.iterdir())


def test_windows_hold_the_examples_in_one_seeded_order(model, data):
    job = prepare_tuning(model, data, Path("out"), CALIBRATED, None, whit.Options())
    found = based.windows(job.data.examples, 16, 3)
    assert found.tokens.shape[1] == 16
    together = sorted(torch.cat([e.tokens for e in job.data.examples]).tolist())
    assert len(found.tokens.flatten()) > len(together) - 16
    assert torch.equal(found.tokens, based.windows(job.data.examples, 16, 3).tokens)
    assert not torch.equal(found.tokens, based.windows(job.data.examples, 16, 4).tokens)
    assert based.windows(job.data.examples[:1], 4096, 0).tokens.shape == (1, len(job.data.examples[0].tokens))


def test_a_start_by_data_goes_by_the_examples(model, data):
    def start(lines: tuple[str, ...]) -> dict[str, torch.Tensor]:
        few = data.parent / "few.jsonl"
        few.write_text("".join(lines))
        tuning = replace(CALIBRATED, method=None, targets=("q_proj", "down_proj"), holdout=0.0)
        loop, _ = build_loop(prepare_tuning(model, few, Path("out"), tuning, None, whit.Options()), Ranks())
        return {name: p.detach() for name, p in loop.model.named_parameters() if "lora_B" in name}

    lines = tuple(data.read_text().splitlines(keepends=True))
    one, again, other = start(lines[:6]), start(lines[:6]), start(lines[6:18])
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert all(bool(b.any()) for b in one.values())


def test_weights_alone_and_data_do_not_mix():
    with pytest.raises(TrainingError, match="init loftq: goes by weights alone, and gptq by data"):
        whit.Tuning("int2-g32", method="gptq", init="loftq")
