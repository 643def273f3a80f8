"""Folding changes no model: random scales in every block of every architecture leave the logits as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from families import FAMILIES, family
from two_texts import MODELS, made
from whit.errors import UnsupportedModelError
from whit.model.graph import find_foldings
from whit.model.groups import GROUPS
from whit.tensor import LayerStats
from whit.transforms.base import Consumer
from whit.transforms.fold import Basis, fold, rescale

from tiny_models import ARCHITECTURES, tiny_inputs, tiny_model

FOLDED = list(ARCHITECTURES)
GATED, HEADS = {"feed_forward_proj": "gated-gelu"}, {"decoder_attention_heads": 2}
TWO_TEXTS = [  # with how many foldings a block of the encoder and one of the decoder have
    *(
        ("t5", option, *counts)
        for option, *counts in (({}, 4, 6), (GATED, 4, 6), ({"feed_forward_proj": "gelu"}, 3, 5))
    ),
    *((name, {}, 4, 6) for name in ("mt5", "umt5")),
    *((name, {"activation_function": "relu", **HEADS}, 2, 3) for name in ("bart", "marian")),
    *((name, {"activation_function": "gelu"}, 1, 2) for name in ("bart", "marian")),
    *((name, {"activation_function": "relu", **HEADS}, 4, 6) for name in ("mbart", "pegasus", "m2m_100")),
    *((name, {"activation_function": "gelu"}, 3, 5) for name in ("mbart", "pegasus", "m2m_100")),
]


def random_scale(channels: Tensor, matrices: int, random: torch.Generator) -> Tensor:
    """Between 1/8 and 8, equal for columns of one channel."""
    exponents = 6 * torch.rand(matrices, int(channels.max()) + 1, generator=random) - 3
    return torch.exp2(exponents)[:, channels]


def fold_all(model, random: torch.Generator, kept: dict[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """Fold random scales everywhere; returns the scale of each consumer."""
    parameters, scales = dict(model.named_parameters()), {}
    for folding in [folding for foldings in find_foldings(model).values() for folding in foldings]:
        source = parameters[folding.weight]
        scale = random_scale(folding.channels, len(source) if source.dim() == 3 else 1, random)
        new, scale = fold(folding, scale, {name: p.data for name, p in parameters.items()}, kept or {})
        for name, value in new.items():
            assert value.shape == parameters[name].shape
            parameters[name].data = value.to((kept or {}).get(name, torch.float32))
        scales |= dict.fromkeys(folding.consumers, scale)
    return scales


@torch.no_grad()
@pytest.mark.parametrize("architecture", FOLDED)
def test_folding_leaves_the_logits(architecture: str, random: torch.Generator):
    model, inputs = tiny_model(architecture), tiny_inputs(architecture)
    before = model(**inputs)
    weights = copy.deepcopy(model.state_dict())
    scales = fold_all(model, random)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert set(scales) < changed
    exact, now = (out["logits"] for out in (before, model(**inputs)))
    assert float((now - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if family(name).config.model_type in GROUPS])
def test_folding_leaves_the_logits_of_families_told_by_difference(name: str, random: torch.Generator):
    model, tokens = family(name), torch.randint(3, 128, (2, 12), generator=random)
    exact = model(input_ids=tokens).logits
    weights = copy.deepcopy(model.state_dict())
    scales = fold_all(model, random)
    assert all(not torch.equal(model.state_dict()[name], weights[name]) for name in scales)
    assert float((model(input_ids=tokens).logits - exact).abs().max()) < 1e-4 * float(exact.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "options", "read", "written"), TWO_TEXTS)
def test_folding_leaves_what_is_written(architecture, options, read, written, random: torch.Generator):
    model, tokens = made(architecture, **options), torch.randint(3, 300, (2, 12), generator=random)
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)[:, :7]}
    assert [len(found) for found in find_foldings(model).values()] == 2 * [read] + 3 * [written]
    exact = model(**inputs).logits
    weights = copy.deepcopy(model.state_dict())
    scales = fold_all(model, random)
    assert all(not torch.equal(model.state_dict()[name], weights[name]) for name in scales)
    assert float((model(**inputs).logits - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3_moe"])
def test_folding_is_exact_though_norms_are_stored_in_16_bits(architecture: str, random: torch.Generator):
    model, inputs = tiny_model(architecture, dtype=torch.bfloat16).float(), tiny_inputs(architecture)
    exact = model(**inputs)["logits"]
    kept = {name: torch.bfloat16 for name, p in model.named_parameters() if p.dim() == 1}
    fold_all(model, random, kept)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert float((model.float()(**inputs)["logits"] - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_a_linear_that_is_kept_in_16_bits_is_divided_by_powers_of_two(random: torch.Generator):
    model = tiny_model("phi3", dtype=torch.bfloat16)
    folding = find_foldings(model)["model.layers.0"][1]
    assert folding.weight.endswith("qkv_proj.weight")
    weights = {name: p.data for name, p in model.named_parameters()}
    asked = random_scale(folding.channels, 1, random)
    new, scale = fold(folding, asked, weights, {folding.weight: torch.bfloat16})
    assert torch.equal(new[folding.weight], new[folding.weight].bfloat16().float())
    assert float((scale / asked).log2().abs().max()) <= 0.5
    assert torch.equal(new[folding.weight][folding.channels] * scale.T, weights[folding.weight][folding.channels])


def test_a_channel_that_a_norm_cannot_divide_stays(random: torch.Generator):
    model = tiny_model("llama")
    folding = find_foldings(model)["model.layers.0"][0]
    weights = {name: p.data.clone() for name, p in model.named_parameters()}
    weights[folding.weight][3] = 0
    weights[folding.weight][5] = 1e-7
    scale = torch.full((1, 64), 64.0)
    new, came_to = fold(folding, scale, weights, {folding.weight: torch.float16})
    assert came_to[0, 3] == 1
    assert came_to[0, 5] == 1  # 1e-7 / 64 is 0 in float16
    assert new[folding.weight][5] == weights[folding.weight][5]
    assert torch.allclose(came_to[0, 6:], scale[0, 6:], rtol=1e-2)


def test_values_that_query_heads_share_have_one_scale():
    folding = find_foldings(tiny_model("llama"))["model.layers.0"][1]
    assert folding.weight.endswith("v_proj.weight")
    assert folding.channels.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    (packed,) = [f for f in find_foldings(tiny_model("gpt_neox"))["gpt_neox.layers.0"] if "query" in f.weight]
    assert packed.channels.tolist() == [48 * head + 32 + i for head in range(4) for i in range(16)]


def test_architectures_without_a_table_are_refused_in_one_sentence():
    model = tiny_model("llama")
    model.config.model_type = "unheard-of"
    with pytest.raises(
        UnsupportedModelError, match=r"'unheard-of' is not known.* needs one of bamba, bart, .*qwen3_moe"
    ) as e:
        find_foldings(model)
    assert "\n" not in str(e.value)
    tested = {tiny_model(name).config.model_type for name in FOLDED} | {family(n).config.model_type for n in FAMILIES}
    assert set(GROUPS) <= tested | set(MODELS)


@pytest.mark.parametrize(
    ("options", "sources"),
    [({"do_layer_norm_before": False}, {"v_proj", "fc1"}), ({"activation_function": "gelu"}, {"v_proj", "layer_norm"})],
)
def test_what_an_option_of_the_model_rules_out_is_left_out(options: dict[str, object], sources: set[str]):
    config = OPTConfig(**{**ARCHITECTURES["opt"][2], **options})
    (foldings, _) = find_foldings(OPTForCausalLM(config)).values()
    assert all(any(source in f.weight for source in sources) for f in foldings)
    assert all(any(source in f.weight for f in foldings) for source in sources)


class Doubles:
    """A transform whose scale is 2 everywhere, and which notes what it was given."""

    name, needs_stats, trials = "doubles", True, 1

    def __init__(self) -> None:
        self.asked: list[list[Consumer]] = []

    def search(self, consumers: list[Consumer], channels: Tensor) -> Tensor:
        self.asked.append(list(consumers))
        return torch.full((len(channels),), 2.0)


def test_a_block_is_rescaled_where_something_quantized_gains():
    model = tiny_model("qwen3_moe")
    foldings = find_foldings(model)["model.layers.0"]
    weights = {name: p.data for name, p in model.named_parameters() if name.startswith("model.layers.0.")}
    down, gate_up = (f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))
    stats = {
        down: tuple(LayerStats(torch.eye(32), 5, magnitude=torch.ones(32)) for _ in range(4)),
        gate_up: tuple(LayerStats(torch.eye(64), 5, magnitude=torch.ones(64)) for _ in range(4)),
    }
    rounding = dict.fromkeys(stats, lambda weight, _: weight)
    doubles = Doubles()
    basis = rescale(doubles, foldings, weights, stats, rounding, dict.fromkeys(weights, torch.bfloat16))
    assert len(doubles.asked) == 1 + 4  # all experts share their input; each has a scale of its own behind it
    assert basis.note == "rescaled by doubles"
    norm, router = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate.weight"
    assert set(basis.weights) == {down, gate_up, norm, router}
    rows = torch.cat([torch.ones(32), torch.full((32,), 0.5)])[:, None]
    assert torch.allclose(basis.weights[gate_up], 2 * weights[gate_up] * rows, rtol=1e-2)
    assert torch.equal(basis.weights[down], 2 * weights[down])
    for found in basis.stats(down, stats[down]):
        assert torch.equal(found.hessian, torch.eye(32) / 4)
        assert found.magnitude is not None
        assert torch.equal(found.magnitude, torch.full((32,), 0.5))
    other = stats[down][:1]
    assert Basis().stats("other", other) is other
