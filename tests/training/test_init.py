"""Adapters that begin with the quantization error; the oracles are LoftQ in ten lines and the model run whole."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

import whit
from tiny_text import random_words, word_tokenizer, write_words
from whit.methods.stack import energy

from tiny_models import save_tiny, tiny_model

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> whit.Calibration:
    path = write_words(tmp_path_factory.mktemp("text"), random_words(1500, 1, seed=7))
    return whit.Calibration(path, samples=6, context=48)


@pytest.fixture(autouse=True)
def _tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whit.training.init.load_tokenizer", lambda *_, **__: word_tokenizer())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def adapted(folder: Path, format: str = "int2-g32", architecture: str = "llama", **options) -> peft.PeftModel:
    config = whit.QuantizationConfig(format)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[architecture], "task_type": "CAUSAL_LM", **options}
    return peft.get_peft_model(model, peft.LoraConfig(**chosen))


def layer(model: peft.PeftModel, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Q, and the adapter's s B and A."""
    found = model.get_base_model().get_submodule(name)
    scaling = found.scaling["default"]
    return (
        found.base_layer.dequantize(torch.float32),
        scaling * found.lora_B["default"].weight.data,
        found.lora_A["default"].weight.data,
    )


def loftq(weight: Tensor, format: str, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper: Q and B A of the last round."""
    product = torch.zeros_like(weight)
    for _ in range(rounds):
        q = whit.quantize_tensor(weight - product, format).dequantize()
        u, s, v = torch.linalg.svd((weight - q).double())
        product = (u[:, :rank] * s[:rank] @ v[:rank]).float()
    return q, product


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("format", ["int2-g32", "nf4-dq"])
def test_loftq_is_the_papers(llama, format, rounds):
    model = adapted(llama, format)
    starts = whit.initialize_adapter(model, llama, method="loftq", iterations=rounds)
    assert len(starts) == 2 * 3
    original = tiny_model("llama")
    for start in starts:
        weight = original.get_submodule(start.module).weight.data
        candidates = [loftq(weight, format, 4, n) for n in range(1, rounds + 1)]
        wanted_q, wanted = min(candidates, key=lambda pair: float((weight - pair[0] - pair[1]).norm()))
        q, b, a = layer(model, start.module)
        torch.testing.assert_close(q, wanted_q)
        torch.testing.assert_close(b @ a, wanted, rtol=1e-4, atol=1e-6)
        left = (weight - q - b @ a).square().sum() / weight.square().sum()
        assert start.after == pytest.approx(float(left), rel=1e-4)
        plain = whit.quantize_tensor(weight, format).dequantize()
        assert start.before == pytest.approx(float((weight - plain).square().sum() / weight.square().sum()), rel=1e-4)
        assert start.after < start.before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_by_data_each_linear_is_best_for_what_it_sees(architecture, tmp_path, text):
    folder = save_tiny(tmp_path, architecture)
    model = adapted(folder, architecture=architecture)
    base = {n: t.clone() for n, t in model.get_base_model().named_buffers()}
    starts = whit.initialize_adapter(model, folder, method="data", calibration=text)
    assert all(torch.equal(t, base[n]) for n, t in model.get_base_model().named_buffers())
    tokens = text.tokens(word_tokenizer()).tokens
    blocks = sorted({".".join(s.module.split(".")[:3]) for s in starts})
    original = tiny_model(architecture)
    for start in (s for s in starts if s.module.startswith(blocks[0])):  # what it sees is the original's
        inputs: list[Tensor] = []
        module = original.get_submodule(start.module)
        hook = module.register_forward_pre_hook(lambda _m, args, seen=inputs: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            original(input_ids=tokens)
        hook.remove()
        x = torch.cat(inputs).double()
        weight = module.weight.data.T if architecture == "gpt2" else module.weight.data
        q, b, a = layer(model, start.module)
        error = (weight - q).double()
        best = torch.linalg.svdvals(error @ x.T)[4:].square().sum()
        found = energy(error - b.double() @ a.double(), x.T @ x).sum()
        assert float(found) == pytest.approx(float(best), rel=1e-3)
        assert start.after == pytest.approx(float(found / energy(weight.double(), x.T @ x).sum()), rel=1e-3)


def test_by_data_the_model_begins_nearer_to_the_original(llama, text):
    tokens = text.tokens(word_tokenizer()).tokens
    with torch.no_grad():
        exact = tiny_model("llama")(tokens).logits
        distance = {}
        for method in ("none", "loftq", "data"):
            model = adapted(llama, target_modules="all-linear").eval()
            if method != "none":
                whit.initialize_adapter(model, llama, method=method, calibration=text if method == "data" else None)
            distance[method] = float((model(tokens).logits - exact).square().mean())
    assert distance["data"] < distance["loftq"] < 0.9 * distance["none"]


@pytest.mark.parametrize("format", [pytest.param("int2-g32", marks=pytest.mark.slow), "int2-g32+r2", "int2-g32+h16"])
def test_more_iterations_move_the_packed_weights_and_lose_less(llama, text, format):
    once, often = adapted(llama, format), adapted(llama, format)
    first = whit.initialize_adapter(once, llama, method="data", calibration=text)
    more = whit.initialize_adapter(often, llama, method="data", calibration=text, iterations=3)
    assert sum(s.after for s in more) < 0.8 * sum(s.after for s in first)
    assert [s.module for s in more] == [s.module for s in first]
    assert not torch.equal(layer(once, first[0].module)[0], layer(often, first[0].module)[0])


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_alpha": 32, "rank_pattern": {"v_proj": 2}}])
def test_scalings_are_honoured(llama, options):
    plain, other = adapted(llama), adapted(llama, **options)
    for model in (plain, other):
        whit.initialize_adapter(model, llama, method="loftq")
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        (_, b, a), (_, other_b, other_a) = layer(plain, name), layer(other, name)
        torch.testing.assert_close(b @ a, other_b @ other_a)


def test_doras_magnitudes_change_nothing_at_the_start(llama):
    model = adapted(llama, "int2-g32").get_base_model()
    module = model.model.layers[0].self_attn.q_proj
    magnitude = torch.nn.Module()
    magnitude.weight = torch.nn.Parameter(torch.ones(64))
    module.lora_magnitude_vector["default"] = magnitude
    whit.initialize_adapter(model, llama, method="loftq")
    q = module.base_layer.dequantize(torch.float32)
    effective = q + module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    torch.testing.assert_close(magnitude.weight, effective.norm(dim=1))


@pytest.mark.slow
def test_the_same_bits_on_any_number_of_threads(llama, text):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = adapted(llama)
            whit.initialize_adapter(model, llama, calibration=text)
            found.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_cannot_be_initialised_is_said(llama, tmp_path):
    model = adapted(llama)
    with pytest.raises(whit.WhitError, match="must be one of data, loftq"):
        whit.initialize_adapter(model, llama, method="pissa")
    with pytest.raises(whit.WhitError, match="no LoRA adapter 'other'"):
        whit.initialize_adapter(model, llama, adapter="other")
    with pytest.raises(whit.WhitError, match="no LoRA adapter"):
        whit.initialize_adapter(tiny_model("llama"), llama)
    whit.quantize(llama, tmp_path / "packed", whit.Recipe("rtn", [("*", "int4-g32")]))
    with pytest.raises(whit.WhitError, match="name the original model"):
        whit.initialize_adapter(model, tmp_path / "packed")
    with pytest.raises(whit.WhitError, match="both must be the same model"):
        whit.initialize_adapter(model, save_tiny(tmp_path / "gpt2", "gpt2"))
