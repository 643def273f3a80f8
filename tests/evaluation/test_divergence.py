"""KL divergence against a direct float64 computation; live and stored baselines agree bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from whit.errors import EvaluationError, OutputError
from whit.evaluation import EvaluationOptions, evaluate
from whit.evaluation.divergence import _compare
from whit.evaluation.memory import available_bytes, fit_together
from whit.evaluation.statistics import blocks, percentile


@pytest.fixture
def options(tiny, text_file):
    return EvaluationOptions(baseline=str(tiny), text=str(text_file), context=32, max_tokens=640, device="cpu")


def test_equals_the_reference(tiny, perturbed, text_file, tokenizer, options):
    models = [LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (tiny, perturbed)]
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][:640]).reshape(-1, 32)
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].log_softmax(-1) for model in models)
    kl = (p.exp() * (p - q)).sum(-1)
    got = evaluate(str(perturbed), options).baseline
    assert got.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert got.kl_p99 == pytest.approx(float(np.percentile(kl.numpy(), 99)), rel=1e-3)
    assert got.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    losses = -p.gather(-1, ids[:, 1:, None])
    assert got.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    low, high = got.kl_ci95
    assert 0 < low < got.kl_mean < high


def test_the_same_model_diverges_by_exactly_nothing(tiny, options):
    result = evaluate(str(tiny), options)
    got = result.baseline
    assert (got.kl_mean, got.kl_ci95, got.kl_p99, got.top1_agreement) == (0.0, (0.0, 0.0), 0.0, 1.0)
    assert got.perplexity == result.perplexity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_passes_equal_side_by_side_bit_for_bit(perturbed, options, tmp_path, dtype):
    beside = evaluate(str(perturbed), replace(options, dtype=dtype))
    passes = evaluate(str(perturbed), replace(options, dtype=dtype, two_pass=True))
    cached = evaluate(str(perturbed), replace(options, dtype=dtype, baseline_cache=tmp_path))
    assert beside.to_json() == passes.to_json() == cached.to_json()
    assert any("its logits take" in note for note in passes.notes)


def test_the_cache_is_read_again_and_goes_on_where_it_stopped(perturbed, options, tmp_path, monkeypatch):
    monkeypatch.setattr("whit.evaluation.perplexity._BATCH_TOKENS", 128)
    first = evaluate(str(perturbed), replace(options, baseline_cache=tmp_path))
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 5
    again = evaluate(str(perturbed), replace(options, baseline_cache=tmp_path))
    assert any("are read from" in note for note in again.notes)
    written = {path: path.stat().st_mtime_ns for path in files}
    files[2].unlink()
    third = evaluate(str(perturbed), replace(options, baseline_cache=tmp_path))
    assert first.to_json() == again.to_json() == third.to_json()
    assert [path for path in files if path.stat().st_mtime_ns != written[path]] == [files[2]]
    evaluate(str(perturbed), replace(options, baseline_cache=tmp_path, max_tokens=320))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_cache_is_named(perturbed, options, tmp_path):
    evaluate(str(perturbed), replace(options, baseline_cache=tmp_path))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EvaluationError, match=r"000000.safetensors: cannot be read"):
        evaluate(str(perturbed), replace(options, baseline_cache=tmp_path))


def test_a_full_disk_is_told_before_the_pass(perturbed, options, monkeypatch):
    monkeypatch.setattr("whit.evaluation.storage.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match="are free"):
        evaluate(str(perturbed), replace(options, two_pass=True))


def test_models_that_do_not_fit_together_go_one_after_the_other(perturbed, options, monkeypatch):
    monkeypatch.setattr("whit.evaluation.measure.available_bytes", lambda _: 0)
    result = evaluate(str(perturbed), options)
    assert any("do not fit in memory together" in note for note in result.notes)
    assert available_bytes("cpu") > 2**20
    assert fit_together([10, 10], 2**40)


def test_other_vocabularies_are_refused(perturbed, options, make_model, tmp_path):
    wider = make_model(tmp_path / "wider", vocab_size=320)
    with pytest.raises(EvaluationError, match="its vocabulary is 320 tokens and the model's is 256"):
        evaluate(str(perturbed), replace(options, baseline=str(wider)))


def test_a_token_that_the_baseline_rules_out_adds_nothing():
    reference = torch.tensor([[0.0, 1.0, -torch.inf]])
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    loss, baseline_loss, kl, agree = _compare(logits, reference, torch.tensor([1]))[:, 0].tolist()
    p, q = torch.softmax(reference, -1)[0], torch.softmax(logits, -1)[0]
    assert kl == pytest.approx(float((p[:2] * (p[:2] / q[:2]).log()).sum()), rel=1e-5)
    assert agree == 0.0
    assert (loss, baseline_loss) == pytest.approx((-float(q[1].log()), -float(p[1].log())), rel=1e-5)


@pytest.mark.parametrize("windows", [1, 7, 60])
def test_the_interval_covers_the_true_mean(windows):
    """Of 200 samples of a skewed, within a window correlated figure at least 85 % must cover."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        noise = rng.exponential(1.0, (windows, 400)) * (1.0 if windows < 60 else rng.gamma(4.0, 0.25, (windows, 1)))
        low, high = blocks(torch.from_numpy(noise)).interval(seed)
        covered += low <= 1.0 <= high
    assert 170 <= covered <= 200


def test_statistics_are_deterministic_and_weigh_ragged_blocks():
    values = torch.arange(2 * 31, dtype=torch.float64).reshape(2, 31)
    cut = blocks(values)
    assert cut.mean == pytest.approx(float(values.mean()))
    assert cut.sums.numel() == 30
    assert cut.interval(7) == cut.interval(7) != cut.interval(8)
    assert percentile(values, 50.0) == 30.5
    single = blocks(torch.ones(1, 1))
    assert single.standard_error() is None
    assert single.interval(0) == (1.0, 1.0)
