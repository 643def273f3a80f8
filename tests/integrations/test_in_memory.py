"""whit.quantize_model: a model in memory, of transformers or any other, quantized where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import whit
from whit.errors import NonFiniteError, RecipeError, UnsupportedModelError, WhitError
from whit.modules import PackedModule, QuantizedEmbedding, QuantizedLinear

from tiny_models import ARCHITECTURES, tiny_inputs, tiny_model


class Net(nn.Module):
    """A net of the user's own: an embedding, two blocks, and a head that shares the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


TOKENS = torch.arange(24).reshape(2, 12)


def test_a_module_of_ones_own_is_quantized_in_place():
    model, plain = net(), net()
    assert whit.quantize_model(model, "int8", modules_to_not_convert=["head"]) is model
    assert isinstance(model.body[0], QuantizedLinear)
    assert type(model.embed) is nn.Embedding  # kept unless a rule names it
    assert model.head.weight is model.embed.weight
    assert (model(TOKENS) - plain(TOKENS)).norm() < 0.02 * plain(TOKENS).norm()


def test_a_deterministic_one_is_so_or_stays_as_it_was():
    model = whit.quantize_model(net(), "int8", deterministic=True)
    assert all(module.deterministic for module in model.modules() if isinstance(module, PackedModule))
    for model in (net(), tiny_model("llama")):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(UnsupportedModelError, match="rounded by what all rows hold together"):
            whit.quantize_model(model, "llm.int8", deterministic=True)
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_what_is_shared_stays_shared():
    model, plain = net(), net()
    whit.quantize_model(model, "int8", rules=[("embed", "int8")])
    assert isinstance(model.embed, QuantizedEmbedding)
    assert sum(isinstance(module, PackedModule) for module in model.modules()) == 3  # the matrix of both once
    assert (model(TOKENS) - plain(TOKENS)).norm() < 0.03 * plain(TOKENS).norm()


def test_its_state_goes_into_another_one_of_its_kind():
    one, other = (whit.quantize_model(net(seed), "int4-g32", method="hqq") for seed in (0, 1))
    assert not torch.equal(one(TOKENS), other(TOKENS))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(TOKENS), other(TOKENS))


@pytest.mark.parametrize("config", ["int4-g32", "nf4-g32", "llm.int8", "int8+h64"])
def test_it_computes_what_loading_computes(config: str, tmp_path: Path):
    model_class = ARCHITECTURES["llama-tied"][0]
    tiny_model("llama-tied").save_pretrained(tmp_path / "plain")
    loaded = model_class.from_pretrained(tmp_path / "plain", quantization_config=whit.QuantizationConfig(config))
    model = whit.quantize_model(tiny_model("llama-tied"), config)
    with torch.no_grad():
        found, wanted = (each(**tiny_inputs("llama-tied")).logits for each in (model, loaded.eval()))
    assert torch.equal(found, wanted)
    assert model.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3_moe", "t5", "bert"])
def test_a_model_of_transformers_is_saved_loaded_and_dequantized(name: str, tmp_path: Path):
    rules = [("*embed_tokens", "int8"), ("*shared", "int8"), ("*wte", "int8"), ("*word_embeddings", "int8")]
    there = {module for module, _ in tiny_model(name).named_modules()}
    rules = [rule for rule in rules if any(module.endswith(rule[0][1:]) for module in there)]
    model = whit.quantize_model(tiny_model(name), "int8-g32", rules=rules)
    model.save_pretrained(tmp_path / "saved")
    again = ARCHITECTURES[name][0].from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        found, wanted = (each(**tiny_inputs(name)) for each in (again, model))
        assert torch.equal(found.logits, wanted.logits)
        plain = model.dequantize()
        assert not any(isinstance(module, PackedModule) for module in plain.modules())
        assert torch.allclose(plain(**tiny_inputs(name)).logits, wanted.logits, atol=1e-3)


def test_adapters_train_on_it():
    model = whit.prepare_for_training(whit.quantize_model(tiny_model("llama"), "nf4-g32"))
    assert all(not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_torch_compiles_it():
    model = whit.quantize_model(net(), "int4-g32")
    wanted = model(TOKENS)
    assert torch.allclose(torch.compile(model, fullgraph=True)(TOKENS), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "config", "options", "said"),
    [
        (lambda: nn.Linear(64, 64), "int8", {}, "Linear: is one layer, which has no place"),
        (lambda: torch.zeros(4, 4), "int8", {}, "Tensor: is not a module.*whit.quantize_tensor"),
        (lambda: whit.quantize_model(net(), "int8"), "int8", {}, "Net: is quantized already"),
        (lambda: net().to("meta"), "int8", {}, "Net: embed.weight is not in memory"),
        (lambda: nn.Sequential(nn.ReLU()), "int8", {}, "no module that can be quantized"),
        (net, "int4-g48", {}, r"embed and 1 other \(2 modules\): in_features 64 is not divisible by group_size 48"),
        (net, "int8", {"method": "gptq"}, "needs calibration data"),
        (net, "int8", {"foo": 1}, "option 'foo' does not exist"),
        (net, whit.QuantizationConfig("int8"), {"method": "hqq"}, "option 'method': a QuantizationConfig has its own"),
    ],
)  # fmt: skip
def test_what_it_refuses(make, config, options: dict, said: str):
    with pytest.raises(WhitError, match=said) as caught:
        whit.quantize_model(make(), config, **options)
    assert isinstance(caught.value, RecipeError | UnsupportedModelError)


def test_nothing_is_changed_where_a_weight_is_no_number():
    model = net()
    model.body[2].weight.data[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"body\.2\.weight"):
        whit.quantize_model(model, "int8")
    assert not any(isinstance(module, PackedModule) for module in model.modules())
