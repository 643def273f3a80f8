"""Calibrated quantization of whole checkpoints: the account, what is reached, the estimate, and what is refused."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from calibrated_runs import RULES, checkpoint, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import whit
from tiny_text import word_tokenizer
from whit import GPTQ, Calibration, Options, Recipe, Refine
from whit.calibration.runner import Runner
from whit.errors import NonFiniteError
from whit.methods import Method
from whit.methods.stack import energy
from whit.pipeline import quantize
from whit.pipeline.estimate import AROUND, Estimate, estimate
from whit.pipeline.job import open_source, prepare
from whit.tensor import QuantizedTensor

from tiny_models import ARCHITECTURES, DECODER, save_tiny, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")


@pytest.mark.parametrize("recipe", [Recipe(GPTQ(), RULES), Recipe("awq", RULES), Recipe("refine", RULES)])
def test_the_language_model_of_one_that_sees_is_calibrated(recipe: Recipe, text: Path, tmp_path: Path):
    """Two lists of blocks: those that run on text are calibrated, the others are quantized without data, and said."""
    words = {**DECODER, "model_type": "llama"}
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}  # fmt: skip
    config = LlavaConfig(text_config=words, vision_config=sight, image_token_index=5)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    account = run(tmp_path / "model", tmp_path / "out", text, recipe)
    entries = [entry for entry in account.parameters if entry.status == "quantized"]
    spoken = [entry for entry in entries if "language_model.layers" in entry.name]
    assert len(spoken) == 14
    assert all(entry.proxy_loss is not None and entry.reason is None for entry in spoken)
    seen = [entry for entry in entries if entry not in spoken]
    said = "by clip: calibration reaches the linears of blocks alone" if recipe.method.needs_stats else None
    assert all(entry.reason == said and entry.proxy_loss is None for entry in seen)
    assert sum("vision_tower" in entry.name for entry in seen) == 12
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(input_ids=torch.arange(6, 20)[None]).logits).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_calibrated(architecture: str, text: Path, tmp_path: Path):
    account = run(checkpoint(tmp_path / "model", architecture), tmp_path / "out", text)
    entries = {entry.name: entry for entry in account.parameters if entry.status == "quantized"}
    assert entries
    for entry in entries.values():
        if entry.reason is None:
            assert entry.proxy_loss is not None
            assert 0 < entry.proxy_loss < 0.05
        if "experts" in entry.name:
            assert entry.tokens is not None
            assert sum(entry.tokens) == tiny_config(architecture).num_experts_per_tok * 24 * 48
    assert account.calibration is not None
    assert account.calibration["tokens"] == 24 * 48


def test_nothing_of_a_block_stays_when_the_next_begins(text: Path, tmp_path: Path):
    """Without Python's search for cycles: gigabytes on a GPU are no reason for it to begin one."""
    held: list[int] = []

    def count(unit: str, done: int, total: int) -> None:
        if ".layers." in unit:
            real = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta]
            held.append(sum(t.nbytes for t in real))

    config, model = tiny_config("llama"), tmp_path / "model"
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    ARCHITECTURES["llama"][0](config).save_pretrained(model)
    gc.collect()
    gc.disable()
    try:
        run(model, tmp_path / "out", text, Recipe(GPTQ(refit=True, sweeps=1), RULES), progress=count)
    finally:
        gc.enable()
    assert len(held) == 4
    assert max(held) <= held[0] + 2 * 4 * 128 * 64  # what the writer may just be holding: a matrix and its bytes


def test_the_proxy_loss_is_that_of_the_written_file(text: Path, tmp_path: Path):
    model = checkpoint(tmp_path / "model", "llama")
    account = run(model, tmp_path / "out", text)
    name = "model.layers.0.mlp.down_proj.weight"
    (entry,) = [e for e in account.parameters if e.name == name]
    whole, inputs = tiny_model("llama"), []
    whole.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0][0]))
    tokens = Calibration(text, samples=24, context=48).tokens(word_tokenizer()).tokens
    with torch.no_grad():
        for row in tokens:
            whole.model(input_ids=row[None])
    x = torch.cat(inputs).double()
    before, after = (open_source(folder).read(name).double() for folder in (model, tmp_path / "out"))
    lost = energy(before - after, x.T @ x).sum() / energy(before, x.T @ x).sum()
    assert entry.proxy_loss == pytest.approx(float(lost), rel=1e-3)


def test_gptq_is_nearer_to_the_model_than_rounding(text: Path, tmp_path: Path):
    model = checkpoint(tmp_path / "model", "llama")
    run(model, tmp_path / "gptq", text, Recipe(GPTQ(), [("*", "int3-g32")]))
    quantize(model, tmp_path / "rtn", Recipe("rtn", [("*", "int3-g32")]))
    tokens = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(5))

    def logits(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder)(tokens).logits

    exact = logits(model)
    ours, plain = ((logits(tmp_path / name) - exact).square().mean() for name in ("gptq", "rtn"))
    assert ours < 0.8 * plain


def test_a_kept_weight_that_is_not_finite_is_named_before_what_it_does_to_the_inputs(text: Path, tmp_path: Path):
    path = save_tiny(tmp_path / "model", "llama") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.input_layernorm.weight"][4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"^model.layers.1.input_layernorm.weight: nan at position \[4\]"):
        run(tmp_path / "model", tmp_path / "out", text)


def test_what_calibration_does_not_reach_is_said(text: Path, tmp_path: Path):
    model = checkpoint(tmp_path / "model", "llama")
    account = run(model, tmp_path / "out", text, Recipe(GPTQ(), [*RULES, ("lm_head", "int8")]))
    (head,) = [e for e in account.parameters if e.name == "lm_head.weight"]
    assert head.reason == "by clip: calibration reaches the linears of blocks alone"
    assert head.proxy_loss is None


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", [GPTQ(), "rtn"])
def test_a_stack_of_experts_is_never_decoded_whole(
    method, architecture: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its floats, four bytes a weight and several times over, were most of the memory that a run took."""
    model, sizes = checkpoint(tmp_path / "model", architecture), []
    decode = QuantizedTensor.dequantize

    def count(self: QuantizedTensor, *args, **kwargs):
        sizes.append(self.codes.numel())
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(QuantizedTensor, "dequantize", count)
    calibration = None if method == "rtn" else Calibration(text, samples=24, context=48)
    account = quantize(model, tmp_path / "out", Recipe(method, RULES), calibration=calibration)
    stacks = [p for name, p in tiny_model(architecture).named_parameters() if p.dim() == 3]
    assert len([e for e in account.parameters if "experts" in e.name and e.relative_error]) == len(stacks)
    assert max(sizes) < min(p.numel() for p in stacks)


def test_experts_that_saw_too_little_are_listed(text: Path, tmp_path: Path):
    model = checkpoint(tmp_path / "model", "qwen3_moe")
    calibration = Calibration(text, samples=2, context=48)
    account = quantize(model, tmp_path / "out", Recipe(GPTQ(), RULES), calibration=calibration)
    experts = [e for e in account.parameters if "experts" in e.name]
    assert experts
    for entry in experts:
        assert entry.reason is not None
        assert entry.reason.startswith("experts ")
        assert entry.tokens is not None
        assert min(entry.tokens) < 128


def test_requests_that_cannot_be_met_are_refused_before_anything_is_read(text: Path, tmp_path: Path):
    moe = checkpoint(tmp_path / "moe", "mixtral")
    with pytest.raises(whit.WhitError, match="params that span experts"):
        run(moe, tmp_path / "out", text, Recipe(GPTQ(), [("*", "nf4-dq")]))
    with pytest.raises(whit.WhitError, match="method rtn uses no data"):
        run(moe, tmp_path / "out", text, Recipe("rtn", RULES))
    assert not (tmp_path / "out").exists()


def test_the_estimate_counts_what_a_refinement_does(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = checkpoint(tmp_path / "model", "llama")
    monkeypatch.setattr("whit.pipeline.estimate._rate", lambda *_: 1e6)
    monkeypatch.setattr("whit.pipeline.estimate._seconds", lambda *_: 0.0)

    def expected(method: Method, activations: str | None = None) -> Estimate:
        rules = [("*", "int8")] if activations else RULES
        recipe, calibration = Recipe(method, rules, activations=activations), Calibration(text, samples=24, context=48)
        return estimate(prepare(model, tmp_path / "out", recipe, Options(), calibration))

    gptq, short, long = (expected(m) for m in (GPTQ(), Refine(steps=10, batch=4), Refine(steps=20, batch=4)))
    weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    products = 10 * 4 * 48 * 3 * (2 * weights + 2 * 4 * 48 * 64)  # steps, samples, tokens, there and back
    assert long.seconds - short.seconds == pytest.approx(AROUND * products / 1e6, rel=1e-6)
    assert gptq.seconds < short.seconds
    assert gptq.memory_bytes < short.memory_bytes
    assert short.memory_bytes <= long.memory_bytes < gptq.memory_bytes + (1 << 26)
    dynamic, static = (expected(GPTQ(), how) for how in ("int8", "int8-static"))
    once_more = 24 * 48 * (2 * weights + 2 * 4 * 48 * 64)  # for the ranges of inputs
    assert static.seconds - dynamic.seconds == pytest.approx(AROUND * once_more / 1e6, rel=1e-6)


@pytest.mark.parametrize(("rule", "ran"), [("*.0.self_attn.*", []), ("*.2.mlp.*", [0, 1]), (None, [])])
def test_blocks_behind_the_last_that_is_quantized_do_not_run(
    rule: str | None, ran: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found: list[int] = []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda runner, index: (found.append(index), run(runner, index))[1])
    rules = [("*", "bf16"), *([(rule, "int4-g64")] if rule else [])]
    few = whit.Calibration(samples=1, context=32)
    account = whit.quantize("whit:model", tmp_path / "out", whit.Recipe("gptq", rules), calibration=few)
    assert found == ran
    assert any(entry.format for entry in account.parameters) == (rule is not None)


def test_a_file_in_which_nothing_is_quantized_is_a_plain_model(tmp_path: Path):
    few = whit.Calibration(samples=1, context=32)
    whit.quantize("whit:model", tmp_path / "out", whit.Recipe("gptq", [("*", "bf16")]), calibration=few)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    model, plain = (
        AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "out", whit.resolve_model("whit:model"))
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
