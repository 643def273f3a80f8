"""What counts as quantizable, and what is kept unless a rule names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import whit
from families import family, save_family
from whit.layouts import BITS
from whit.model.targets import find_targets, tied_weights
from whit.modules.embedding import pack_embedding

from tiny_models import tiny_config, tiny_model


def kept(model: nn.Module) -> set[str]:
    return {target.holder for target in find_targets(model) if target.kept_by_default}


def test_heads_are_kept_with_all_that_is_inside_them():
    classifier = hf.RobertaForSequenceClassification(tiny_config("roberta"))
    heads = {name for name in kept(classifier) if "embeddings" not in name}
    assert heads == {"classifier.dense", "classifier.out_proj"}
    assert {"lm_head", "model.embed_tokens"} <= kept(tiny_model("llama"))


def test_the_gates_of_experts_are_kept():
    assert "model.layers.0.mlp.shared_expert_gate" in kept(tiny_model("qwen2_moe"))


def test_a_gate_inside_a_gate_is_kept_too():
    found = kept(family("hunyuan_moe"))
    assert "model.layers.0.mlp.gate.wg" in found
    assert not [name for name in found if "shared_mlp" in name]
    assert "model.layers.0.mlp.router.layer" in kept(family("jetmoe"))


def test_linears_of_a_few_rows_or_columns_are_kept():
    found = {name.rpartition(".")[2] for name in kept(family("gemma3n")) if ".altup." in name}
    assert found == {"prediction_coefs", "correction_coefs", "modality_router"}


@pytest.mark.parametrize(
    ("name", "linear"), [("mamba", "backbone.layers.0.mixer.dt_proj"), ("mobilebert", "cls.predictions.dense")]
)
def test_a_linear_whose_holder_multiplies_by_its_weight_is_kept_and_said(name: str, linear: str, tmp_path: Path):
    """The models once did not run: a packed weight cannot be multiplied."""
    kind, tokens = type(family(name)), torch.arange(5, 15)[None]
    save_family(tmp_path / name, name)
    account = whit.quantize(tmp_path / name, tmp_path / "out", whit.Recipe(rules=[("*", "int8-g8")]))
    reasons = {entry.name: entry.reason for entry in account.parameters if entry.status == "kept"}
    assert reasons[f"{linear}.weight"] == "a linear whose weight the module around it multiplies by itself"
    config = whit.QuantizationConfig("int8-g8")
    with torch.no_grad():
        stored = kind.from_pretrained(tmp_path / "out")(input_ids=tokens).logits
        flying = kind.from_pretrained(tmp_path / name, quantization_config=config)(input_ids=tokens).logits
    torch.testing.assert_close(stored, flying)


def test_shapes_are_as_quantized():
    shapes = {t.holder: (t.kind, t.shape) for t in find_targets(tiny_model("gpt2"))}
    assert shapes["transformer.h.0.attn.c_attn"] == ("conv1d", (192, 64))
    shapes = {t.holder: (t.kind, t.shape) for t in find_targets(tiny_model("mixtral"))}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == ("experts", (4, 256, 64))


@pytest.mark.parametrize(
    ("architecture", "experts", "width"), [("gpt_oss", "0.mlp.experts", 128), ("llama4", "1.feed_forward.experts", 96)]
)
def test_experts_that_lie_in_by_out_are_quantized_along_their_inputs(architecture: str, experts: str, width: int):
    model = tiny_model(architecture)
    found = {t.holder: (t.kind, t.shape, t.transposed) for t in find_targets(model) if "experts" in t.holder}
    assert found[f"model.layers.{experts}.gate_up_proj"] == ("experts", (4, 2 * width, 64), True)
    assert found[f"model.layers.{experts}.down_proj"] == ("experts", (4, 64, width), True)
    assert model.get_parameter(f"model.layers.{experts}.down_proj").shape == (4, width, 64)


def test_linears_whose_weight_is_used_directly_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, 2 * self.weight)

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "scaled": Scaled(8, 8), "plain": nn.Linear(8, 8)})
    assert [target.holder for target in find_targets(model)] == ["plain"]


def test_what_is_packed_is_no_target_any_more():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8)})
    assert find_targets(model)
    pack_embedding(model["embed"], BITS.pack(whit.quantize_tensor(model["embed"].weight, "int8")), torch.float32)
    assert not find_targets(model)


def test_ties_are_those_of_weights():
    assert tied_weights(tiny_model("bert")) == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }
    assert set(tied_weights(tiny_model("t5")).values()) == {"shared.weight"}
    assert not tied_weights(nn.Linear(2, 2))
