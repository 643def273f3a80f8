"""whit.finetune from end to end on a tiny model: killed, resumed, shared between processes, read by PEFT."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from small_tuning import TUNING, Watcher, adapter, mean_loss
from typer.testing import CliRunner

import whit
from forking import in_child
from whit.checkpoint.work import WorkFolder
from whit.cli import build_app
from whit.errors import OutputError, TrainingError, WhitError, WhitWarning
from whit.training.ranks import Ranks
from whit.tuning import prepare_tuning
from whit.tuning.run import build_loop


@pytest.fixture(scope="module")
def trained(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with what it left of the caller's random numbers checked."""
    out: Path = tmp_path_factory.mktemp("trained") / "out"
    before, watcher = torch.get_rng_state(), Watcher()
    record = whit.finetune(model, data, out, TUNING, watcher=watcher)
    assert torch.equal(torch.get_rng_state(), before)
    assert record == json.loads((out / "whit.json").read_text())
    assert any("trainable params: " in note for note in watcher.notes)
    assert any("for 6 steps, by a trial" in note for note in watcher.notes)
    return out


def test_an_adapter_names_its_model_as_the_hub_does(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not the folder of the hub's cache, which is on this machine alone."""
    monkeypatch.setattr("whit.checkpoint.hub.snapshot_download", lambda *_, **__: str(model))
    words = ["finetune", "org/tiny", str(data), str(tmp_path / "out"), "--revision", "v2", "--steps", "1"]
    result = CliRunner().invoke(build_app(), [*words, "--holdout", "0", "--context", "64", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.revision) == ("org/tiny", "v2")
    assert "AutoModelForCausalLM.from_pretrained('org/tiny', revision='v2')" in result.output


def test_the_loss_falls_and_all_is_written(trained):
    assert [path.name for path in trained.parent.iterdir()] == ["out"]
    wanted = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "training.jsonl",
        "whit.json",
    }
    assert {path.name for path in trained.iterdir()} == wanted
    log = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "loss" in e] == [1, 2, 3, 4, 5, 6]
    scores = {e["step"]: e["held_out_loss"] for e in log if "held_out_loss" in e}
    assert list(scores) == [0, 3, 6]
    assert scores[6] < scores[0] - 0.1
    assert {"learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes"} <= set(log[1])
    assert (trained / "loss.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((trained / "whit.json").read_text())
    assert record["held_out_loss"] == {"first": scores[0], "last": scores[6]}
    assert record["data"]["examples"] + record["held_out"]["examples"] == 24
    assert record["tuning"]["format"] == "nf4-dq"


def test_peft_loads_it(trained, model, data):
    base = hf.AutoModelForCausalLM.from_pretrained(model, quantization_config=whit.QuantizationConfig("nf4-dq"))
    loaded = peft.PeftModel.from_pretrained(base, trained).eval()
    job = prepare_tuning(model, data, trained.parent / "new", TUNING, None, whit.Options())
    record = json.loads((trained / "whit.json").read_text())
    assert mean_loss(loaded, job.work.held_out) == pytest.approx(record["held_out_loss"]["last"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw-8bit", marks=pytest.mark.slow)])
def test_killed_runs_go_on_to_the_same_bytes(model, data, trained, tmp_path, optimizer):
    tuning = replace(TUNING, optimizer=optimizer, rank=64 if optimizer == "adamw-8bit" else 4)  # small ones stay float
    if tuning != TUNING:
        trained = tmp_path / "undisturbed"
        whit.finetune(model, data, trained, tuning)
    out = tmp_path / "out"
    for die_after in (1, 5):
        run = Watcher(die_after)
        assert in_child(lambda run=run: whit.finetune(model, data, out, tuning, watcher=run)) == -signal.SIGKILL
        assert not out.exists()
    watcher = Watcher()
    whit.finetune(model, data, out, tuning, watcher=watcher)
    assert [e["step"] for e in watcher.entries if "loss" in e] == [5, 6]
    assert "goes on after step 4 of 6" in watcher.notes
    assert adapter(out) == adapter(trained)
    logs = [[json.loads(line) for line in (o / "training.jsonl").read_text().splitlines()] for o in (out, trained)]
    assert [(e["step"], e.get("loss"), e.get("held_out_loss")) for e in logs[0]] == [
        (e["step"], e.get("loss"), e.get("held_out_loss")) for e in logs[1]
    ]


@pytest.mark.parametrize("damaged", ["training.jsonl", "checkpoint-4.safetensors", "journal.jsonl"])
def test_a_damaged_state_is_one_sentence(model, data, tmp_path, damaged):
    run = Watcher(5)
    assert in_child(lambda: whit.finetune(model, data, tmp_path / "out", TUNING, watcher=run)) == -signal.SIGKILL
    file = tmp_path / ".out.partial" / damaged
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    with pytest.raises(WhitError, match=r"; or pass --restart|; pass --restart to begin again$") as caught:
        whit.finetune(model, data, tmp_path / "out", TUNING)
    assert "\n" not in str(caught.value)


def test_a_damaged_last_line_of_the_journal_begins_the_training_again(model, data, trained, tmp_path):
    run, again = Watcher(5), Watcher()
    assert in_child(lambda: whit.finetune(model, data, tmp_path / "out", TUNING, watcher=run)) == -signal.SIGKILL
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b"4", b"3"))
    with pytest.warns(WhitWarning, match=r"damaged in line \d; what was done there is done again"):
        whit.finetune(model, data, tmp_path / "out", TUNING, watcher=again)
    assert [e["step"] for e in again.entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert adapter(tmp_path / "out") == adapter(trained)


@pytest.mark.slow
def test_killed_while_the_result_is_put_in_place(model, data, trained, tmp_path, monkeypatch):
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        WorkFolder.commit = die  # in the child alone
        whit.finetune(model, data, tmp_path / "out", TUNING)

    assert in_child(run) == -signal.SIGKILL
    watcher = Watcher()
    whit.finetune(model, data, tmp_path / "out", TUNING, watcher=watcher)
    assert not watcher.entries
    assert adapter(tmp_path / "out") == adapter(trained)
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_a_finished_run_is_not_done_again(model, data, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    watcher = Watcher()
    assert whit.finetune(model, data, out, TUNING, watcher=watcher) == json.loads((out / "whit.json").read_text())
    assert not watcher.entries
    with pytest.raises(OutputError, match="another model, recipe or version"):
        whit.finetune(model, data, out, replace(TUNING, rank=8))


def losses(out: Path) -> list[float]:
    return [e["loss"] for e in map(json.loads, (out / "training.jsonl").read_text().splitlines()) if "loss" in e]


@pytest.mark.slow
def test_a_quantized_folder_is_trained_as_it_is(model, data, trained, tmp_path):
    hf.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=whit.QuantizationConfig("nf4-dq")
    ).save_pretrained(tmp_path / "quantized")
    for path in model.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "quantized")
    whit.finetune(tmp_path / "quantized", data, tmp_path / "out", replace(TUNING, format=None))
    assert losses(tmp_path / "out") == losses(trained)
    with pytest.raises(TrainingError, match=r"quantized already; .* drop --format nf4-dq"):
        whit.finetune(tmp_path / "quantized", data, tmp_path / "again", TUNING)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"format": None}, {"dora": True}, {"packing": False, "rslora": True}])
def test_other_settings_train(model, data, tmp_path, options):
    record = whit.finetune(model, data, tmp_path / "out", replace(TUNING, steps=2, checkpointing=False, **options))
    assert record["held_out_loss"]["last"] < record["held_out_loss"]["first"]


def test_an_adapter_that_begins_with_what_was_lost(model, data, tmp_path):
    before = []
    for init in ("default", "loftq"):
        tuning = replace(TUNING, format="int2-g32", init=init, steps=1, learning_rate=1e-6, rank=16, dtype="float32")
        loop, _ = build_loop(prepare_tuning(model, data, tmp_path / "o", tuning, None, whit.Options()), Ranks())
        job = prepare_tuning(
            model, data, tmp_path / "o", replace(tuning, format=None, init="default"), None, whit.Options()
        )
        plain, _ = build_loop(job, Ranks())
        tokens = loop.work.examples[0].tokens[None]
        with torch.no_grad():
            errors = (loop.model.eval()(tokens).logits - plain.model.eval()(tokens).logits).norm()
        before.append(float(errors))
    assert before[1] < 0.9 * before[0]


def test_chunks_rows_and_processes_change_no_gradient(model, data, tmp_path):
    """What a step learns from does not depend on how it is cut: 4 rows at once, or one by one."""
    found = []
    for batch, accumulate in ((4, 1), (1, 4)):
        tuning = replace(TUNING, batch=batch, accumulate=accumulate, dropout=0.0, packing=False)
        loop, _ = build_loop(prepare_tuning(model, data, tmp_path / "o", tuning, None, whit.Options()), Ranks())
        loss = loop.gradients(0)
        found.append([loss, *(p.grad for p in loop.parameters)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_command_plans_trains_and_reports_as_json(model, data, tmp_path, capfd):
    words = ["finetune", str(model), str(data), str(tmp_path / "out"), "--format", "int4-g32", "--steps", "2"]
    words += ["--rank", "4", "--batch", "2", "--context", "64", "--target", "q_proj,v_proj"]
    runner = CliRunner()
    planned = runner.invoke(build_app(), [*words, "--dry-run", "--json"])
    plan = json.loads(planned.stdout)
    assert plan["steps"] == 2
    assert plan["optimizer_bytes"] == 16 * 4 * 2 * (64 + 64 + 64 + 32)
    assert not (tmp_path / "out").exists()
    done = runner.invoke(build_app(), [*words, "--json"], catch_exceptions=False)
    record = json.loads(done.stdout)
    assert record["tuning"]["targets"] == ["q_proj", "v_proj"]
    assert "step 2/2: loss" in done.stderr
    assert "tokens/s" in done.stderr
    again = runner.invoke(build_app(), words, catch_exceptions=False)  # what is done is only said again
    assert "of memory" not in again.stderr
    assert f"from_pretrained({str(model)!r}, quantization_config=whit.QuantizationConfig('int4-g32'))" in again.stdout


@pytest.mark.slow
def test_two_processes_learn_what_one_does(model, data, tmp_path):
    words = [str(model), str(data), "--format", "nf4-dq", "--rank", "4", "--steps", "3", "--batch", "2"]
    words += ["--dropout", "0.1", "--context", "64", "--accumulate", "4", "--device", "cpu"]
    alone = [sys.executable, "-m", "whit", "finetune", *words[:2], str(tmp_path / "alone"), *words[2:]]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    both = [sys.executable, "-m", *launcher, "--rdzv-endpoint", "localhost:0", "-m", "whit", "finetune"]
    commands = (
        alone,
        [*both, *words[:2], str(tmp_path / "both"), *words[2:]],
        [*both, *words[:2], str(tmp_path / "sharded"), *words[2:], "--shard"],
    )
    for command in commands:
        run = subprocess.run(command, capture_output=True, timeout=300, text=True)
        assert run.returncode == 0, run.stderr
    records = [json.loads((tmp_path / name / "whit.json").read_text()) for name in ("alone", "both")]
    assert [r["processes"] for r in records] == [1, 2]
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("both", "sharded")]
    assert weights[0] == weights[1]
    assert records[1]["held_out_loss"]["last"] == pytest.approx(records[0]["held_out_loss"]["last"], rel=1e-5)
