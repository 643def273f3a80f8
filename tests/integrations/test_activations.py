"""Quantized activations through from_pretrained and back, against linears written out by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from loading_helpers import logits
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import whit
from whit.data import resolve_text
from whit.errors import RecipeError
from whit.evaluation.listener import Silent
from whit.evaluation.perplexity import score_windows
from whit.evaluation.text import read_text, tokenize
from whit.integrations.loading import load_tokenizer
from whit.integrations.offload import compute_apart, put_aside
from whit.modules import QuantizedLinear

from tiny_models import save_tiny, tiny_inputs

ENCODERS = ("bert-classifier", "distilbert", "roberta")
CLASSES = {"bert-classifier": AutoModelForSequenceClassification, "distilbert": AutoModel, "roberta": AutoModel}


class ByHand(nn.Module):
    """y = x W^T + b with x rounded per token to max|x| / 127 and W as its codes stand for; outlier columns exact."""

    def __init__(self, packed: QuantizedLinear, threshold: float) -> None:
        super().__init__()
        self.weight_, self.bias, self.threshold = packed.dequantize(torch.float64), packed.bias, threshold

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).double()
        outlier = (rows.abs() >= (self.threshold or torch.inf)).any(0)
        bulk = torch.where(outlier, 0, rows)
        scale = bulk.abs().amax(1, keepdim=True) / 127
        rounded = (bulk / scale.where(scale > 0, 1)).round() * scale + torch.where(outlier, rows, 0)
        y = rounded @ self.weight_.T + (0 if self.bias is None else self.bias.double())
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def by_hand(model: nn.Module, threshold: float = 0.0) -> nn.Module:
    """The same model with every packed linear written out."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, ByHand(module, threshold))
    return model


def automatic(architecture: str) -> type:
    return CLASSES.get(architecture, AutoModelForCausalLM)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *ENCODERS])
@pytest.mark.parametrize("scheme", ["w8a8", "llm.int8"])
def test_linears_are_those_written_by_hand(tmp_path: Path, architecture: str, scheme: str):
    folder, auto = save_tiny(tmp_path, architecture), automatic(architecture)
    threshold = {"outlier_threshold": 1.5} if scheme == "llm.int8" else {}
    config = whit.QuantizationConfig(scheme, **threshold)
    model = auto.from_pretrained(folder, quantization_config=config)
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert packed
    assert all(m.activations is not None for m in packed)
    found = logits(model, architecture)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, architecture), found)
    expected = logits(by_hand(model, 1.5 if scheme == "llm.int8" else 0.0), architecture)
    # a value on the edge between two codes may fall either way
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("spec", ["int8", "w8a8", "int4-g32"])
def test_what_is_padded_does_not_matter(tmp_path: Path, architecture: str, spec: str):
    folder = save_tiny(tmp_path, architecture)
    config = whit.QuantizationConfig(spec)
    model = automatic(architecture).from_pretrained(folder, quantization_config=config)
    tokens = tiny_inputs(architecture)["input_ids"][:1]
    with torch.no_grad():
        alone = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        longer = torch.cat([tokens, torch.full((1, 5), 0)], 1)
        batch, mask = torch.cat([longer, longer.flip(1)]), torch.ones(2, longer.shape[1], dtype=torch.long)
        mask[0, tokens.shape[1] :] = 0
        padded = model(input_ids=batch, attention_mask=mask)
    one, other = alone[0][0], padded[0][0]
    other = other if one.dim() == 1 else other[: len(one)]
    assert (one - other).abs().max() < 1e-2 * one.abs().max()


def test_options_are_named_as_in_bitsandbytes(tmp_path: Path):
    folder = save_tiny(tmp_path, "llama")
    config = whit.QuantizationConfig("llm.int8", llm_int8_threshold=4.0, llm_int8_skip_modules=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert str(model.model.layers[0].mlp.up_proj.activations) == "int8-outliers4"
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    said = model.config.quantization_config.to_dict()
    assert said["activations"] == "int8-outliers4"
    assert said["inputs"]["model.layers.0.mlp.up_proj"] == "int8-outliers4"
    assert str(whit.QuantizationConfig("llm.int8").recipe.activations) == "int8-outliers"


def test_linears_in_another_format_multiply_floats(tmp_path: Path):
    folder = save_tiny(tmp_path, "llama")
    config = whit.QuantizationConfig("w8a8", rules=[("*down_proj", "int4-g32"), ("lm_head", "int8")])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    layer = model.model.layers[0].mlp
    assert (layer.down_proj.activations, str(layer.up_proj.activations)) == (None, "int8")
    assert str(model.lm_head.activations) == "int8"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "int4-g32", "activations": "int8"}, "no linear can be multiplied by them in int4-g32"),
        ({"format": "int8", "activations": "int8-static"}, r"activations int8-static: needs .*; use dynamic ones"),
    ],
)
def test_what_cannot_be_is_said_before_loading(tmp_path: Path, options: dict[str, str], said: str):
    folder = save_tiny(tmp_path, "llama")
    with pytest.raises(RecipeError, match=said):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=whit.QuantizationConfig(**options))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"format": "int8", "outlier_threshold": 6.0}, "activations are not quantized"),
        ({"format": "w8a8", "activations": "int8-asym"}, "there must be one"),
        ({"format": "int8", "treshold": 6.0}, "'treshold' does not exist"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, object], said: str):
    with pytest.raises(RecipeError, match=said):
        whit.QuantizationConfig(**arguments)


class Shifted(nn.Module):
    """A norm whose output has a constant added in six channels."""

    CHANNELS = (3, 50, 99, 128, 201, 250)

    def __init__(self, norm: nn.Module, size: float) -> None:
        super().__init__()
        self.norm, self.shift = norm, torch.zeros_like(norm.weight)
        self.shift[list(self.CHANNELS)] = size

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.shift


def plant(model: nn.Module, size: float) -> None:
    """Outliers in six channels of what attention and MLP are given, taken off again by the linears' biases.

    The weights are brought onto the int8 grid first: what is lost later, activations lose.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for name, linears in (
            ("input_layernorm", (attention.q_proj, attention.k_proj, attention.v_proj)),
            ("post_attention_layernorm", (mlp.gate_proj, mlp.up_proj)),
        ):
            shifted = Shifted(getattr(layer, name), size)
            setattr(layer, name, shifted)
            for linear in linears:
                linear.weight.copy_(whit.quantize_tensor(linear.weight.data, "int8-absmax").dequantize())
                linear.bias = nn.Parameter(-linear.weight @ shifted.shift)


def quantized_copy(model: nn.Module, how: whit.Activations | None) -> nn.Module:
    copied = copy.deepcopy(model)
    for layer in copied.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    weight = whit.quantize_tensor(linear.weight.data, "int8-absmax")
                    setattr(part, name, QuantizedLinear.from_quantized(weight, linear.bias, activations=how))
    return copied


def test_decomposition_keeps_the_perplexity_that_int8_alone_loses():
    """The shipped model with outliers of size 300 planted in six channels, on 2,048 tokens of held-out text."""
    model = AutoModelForCausalLM.from_pretrained(whit.resolve_model("whit:model"), dtype=torch.float32)
    model.requires_grad_(False)
    plant(model, 300.0)
    text = read_text(resolve_text("whit:heldout"))[:16000]
    tokens = tokenize(text, load_tokenizer("whit:model"), 2048, "text").reshape(-1)[:2048].reshape(8, 256)

    def perplexity(network: nn.Module) -> float:
        return float(score_windows(network, tokens, Silent()).mean().exp())

    exact = perplexity(model)
    assert 5 < exact < 60
    assert abs(perplexity(quantized_copy(model, whit.Activations(threshold=6.0))) / exact - 1) < 0.005
    assert perplexity(quantized_copy(model, whit.Activations())) / exact - 1 > 0.10


def test_what_a_device_map_puts_aside_is_kept(tmp_path: Path):
    folder = save_tiny(tmp_path, "llama")
    aside = {"model.layers.1": "disk", "lm_head": "disk"}
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    places = {**dict.fromkeys(names, "cpu"), **aside}
    config = whit.QuantizationConfig("llm.int8", llm_int8_enable_fp32_cpu_offload=True)
    options = {"dtype": torch.bfloat16, "device_map": places, "offload_folder": str(tmp_path / "disk")}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    kept = model.model.layers[1].mlp.up_proj
    assert type(kept) is nn.Linear
    exact = logits(AutoModelForCausalLM.from_pretrained(folder), "llama")
    found = logits(model, "llama")
    assert (found - exact).norm() < 0.05 * exact.norm()
    assert put_aside({"": 0, "lm_head": "cpu"}) == ("lm_head",)
    assert put_aside({"": "cpu"}) == put_aside("auto") == ()


def test_a_part_in_float32_runs_inside_a_model_in_bfloat16(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, "llama"), dtype=torch.bfloat16)
    before = logits(model, "llama")
    model.model.layers[1].float()
    compute_apart(model, ("model.layers.0", "model.layers.1"), torch.bfloat16)
    found = logits(model, "llama")
    assert found.dtype == torch.bfloat16
    assert 0 < (found - before).float().norm() < 0.05 * before.float().norm()
