"""Encoders compiled for the processor against their own torch layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel

import whit
from whit.compiled.encoder import compile_encoder, find_stack
from whit.errors import UnsupportedModelError
from whit.kernels.cpu import library
from whit.kernels.cpu.encoder import Encoder, Layer
from whit.kernels.cpu.encoder_linear import Linear
from whit.kernels.int8 import quantize_rows, rounded_except, rounded_groups
from whit.layouts import BITS
from whit.modules import QuantizedLinear

from tiny_models import save_tiny, tiny_inputs, tiny_model

COMPILED = library()
ISAS_HERE = () if isinstance(COMPILED, str) else COMPILED.isas8
EXACT = torch.tensor([0, 33, 90, 127], dtype=torch.int32)
LOWS = {False: torch.tensor([-torch.inf]), True: torch.tensor([-0.17])}  # of a GELU's output
SCHEMES = {"int8": "int8", "int8-g32": "int8", "int4-g32": "int8-g32", "int8-g64": "int8-g32"}
pytestmark = pytest.mark.skipif(isinstance(COMPILED, str), reason=f"CPU kernels: {COMPILED}")


def float_layer(layer: nn.Module, hidden: Tensor, mask: Tensor, heads: int, rounded) -> Tensor:
    """A layer of BERT in float64, written out: `rounded` is what quantization makes of a linear's input."""

    def linear(module: QuantizedLinear, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        flat = (rounded(flat, module) if "exact" in str(module.activations) else rounded(flat)).double()
        return (flat @ module.dequantize(torch.float64).T + module.bias.double()).reshape(*x.shape[:-1], -1)

    def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], module.weight.double(), module.bias.double(), module.eps)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    own, out = layer.attention.self, layer.attention.output
    q, k, v = (split(linear(module, hidden)) for module in (own.query, own.key, own.value))
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    hidden = norm(out.LayerNorm, hidden + linear(out.dense, context))
    inner = nn.functional.gelu(linear(layer.intermediate.dense, hidden))
    return norm(layer.output.LayerNorm, hidden + linear(layer.output.dense, inner))


def token_rounded(x: Tensor) -> Tensor:
    codes, scale, _ = quantize_rows(x)
    return codes * scale


def rounded_but_some(x: Tensor, module: QuantizedLinear, grouped: bool) -> Tensor:
    tensors = module.packed.tensors
    return rounded_except(x, tensors["input_columns"], tensors["input_low"], grouped)


def one_layer(spec: str, activations: str) -> nn.Module:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 192, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=128, hidden_size=128, **sizes)
    torch.manual_seed(0)
    model = BertModel(config).eval().requires_grad_(False)
    layer = model.encoder.layer[0]
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent = layer.get_submodule(name.rpartition(".")[0])
            module.weight.mul_(4)
            module.bias.normal_(0, 0.1)
            packed = whit.quantize_tensor(module.weight.data, spec)
            how = whit.Activations.parse(activations) if activations else None
            weight = replace(BITS.pack(packed), activations=how)
            if how is not None and how.exact:
                beside = {"input_columns": EXACT, "input_low": LOWS[name == "output.dense"]}
                weight = replace(weight, tensors={**weight.tensors, **beside})
            setattr(parent, name.rpartition(".")[2], QuantizedLinear(weight, module.bias, torch.float32))
    return model


def ready(model: nn.Module, isa: str) -> Encoder:
    """The compiled layers of a BERT."""
    layers = []
    for layer in model.encoder.layer:
        own, out = layer.attention.self, layer.attention.output
        parts = [(own.query, own.key, own.value), (out.dense,), (layer.intermediate.dense,), (layer.output.dense,)]
        linears = [Linear(tuple(m.packed for m in p), tuple(m.bias for m in p)) for p in parts]
        norms = [(norm.weight, norm.bias) for norm in (out.LayerNorm, layer.output.LayerNorm)]
        layers.append(Layer(*linears, tuple(norms)))
    assert not isinstance(COMPILED, str)
    return Encoder(layers, model.config.num_attention_heads, 1e-12, COMPILED, isa)


@pytest.mark.parametrize("isa", ISAS_HERE)
@pytest.mark.parametrize(("spec", "activations"), [("int8", "int8"), ("int8-absmax", "int8"), ("int4-g32", "int8-g32"),
                                                   ("int8-g64", "int8-g32"), ("int4-channel", "int8-g32"),
                                                   ("int8-g32", ""), ("int8", ""), ("int4-g64", ""),
                                                   ("int8-g32", "int8-g32-exact4"),
                                                   ("int8", "int8-exact4")])  # fmt: skip
def test_a_layer_is_what_is_written_out(isa: str, spec: str, activations: str, random: torch.Generator):
    model = one_layer(spec, activations)
    hidden = torch.randn(3, 21, 128, generator=random)
    mask = torch.ones(3, 1, 1, 21, dtype=torch.bool)
    mask[0, ..., 9:], mask[1, ..., :2] = False, False
    rounded = {"int8": token_rounded, "int8-g32": rounded_groups, "": lambda x: x,
               "int8-exact4": partial(rounded_but_some, grouped=False),
               "int8-g32-exact4": partial(rounded_but_some, grouped=True)}[activations]  # fmt: skip
    wanted = float_layer(model.encoder.layer[0], hidden.double(), mask, 4, rounded)
    found = ready(model, isa)(hidden.clone(), mask)
    # a value on the edge between two codes may fall either way
    assert (found - wanted).norm() < (1e-3 if activations else 5e-5) * wanted.norm()
    assert (found - wanted).abs().median() < 1e-4
    unmasked = float_layer(model.encoder.layer[0], hidden.double(), torch.ones_like(mask), 4, rounded)
    assert (ready(model, isa)(hidden.clone()) - unmasked).norm() < 1e-3 * unmasked.norm()


@pytest.mark.parametrize("isa", ISAS_HERE)
def test_threads_batches_and_masks_change_no_bit(isa: str, random: torch.Generator):
    encoder = ready(one_layer("int8", "int8"), isa)
    hidden = torch.randn(5, 19, 128, generator=random)
    mask = torch.rand(5, 1, 19, 19, generator=random) < 0.7
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(encoder(hidden.clone(), mask))
            found.append(torch.cat([encoder(h.clone()[None], m[None]) for h, m in zip(hidden, mask, strict=True)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(encoder(hidden.clone(), mask.float().to(torch.bool)), found[0])
    assert encoder(hidden[:0].clone()).shape == (0, 19, 128)


def test_a_sequence_with_a_nan_leaves_the_others_alone(random: torch.Generator):
    model = one_layer("int8", "int8")
    hidden = torch.randn(3, 7, 128, generator=random)
    encoder = ready(model, ISAS_HERE[-1])
    exact = encoder(hidden.clone())
    hidden[1, 3, 5] = torch.nan
    found = encoder(hidden.clone())
    assert torch.equal(found[[0, 2]], exact[[0, 2]])
    assert bool(found[1].isnan().any())


@pytest.mark.parametrize("architecture", ["bert", "bert-classifier", "distilbert", "roberta"])
@pytest.mark.parametrize("spec", SCHEMES)
def test_models_give_what_they_gave(tmp_path: Path, architecture: str, spec: str):
    folder = save_tiny(tmp_path, architecture)
    model_class = type(tiny_model(architecture))
    config = whit.QuantizationConfig(spec, activations=SCHEMES[spec] if spec == "int8" else "int8-g32")
    model = model_class.from_pretrained(folder, quantization_config=config)
    inputs = tiny_inputs(architecture)
    inputs["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        before = model(**inputs).logits
        assert whit.compile(model, strict=True) is model
        found = model(**inputs).logits
    kept = slice(None) if before.dim() == 2 else inputs["attention_mask"].bool()
    assert "forward" in vars(find_stack(model))
    assert (found[kept] - before[kept]).norm() < 0.03 * before[kept].norm()


def test_tokens_go_the_short_way_and_give_what_the_long_one_does(tmp_path: Path):
    config = whit.QuantizationConfig("int8")  # inputs in 16 bits: no code falls the other way
    model = AutoModel.from_pretrained(save_tiny(tmp_path, "bert"), quantization_config=config)
    whit.compile(model, strict=True)
    inputs = tiny_inputs("bert")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mask[1, 5:] = 0
    with torch.no_grad():
        short = model(ids, mask)
        embedded = model.embeddings.word_embeddings(ids)
        long = model(inputs_embeds=embedded, attention_mask=mask)
        torch.testing.assert_close(short.last_hidden_state, long.last_hidden_state, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(short.pooler_output, long.pooler_output, rtol=1e-3, atol=1e-4)
        other = model(ids, mask, torch.ones_like(ids)).last_hidden_state
        assert not torch.equal(other, short.last_hidden_state)
        assert isinstance(model(ids, mask, return_dict=False), tuple)
        with pytest.raises(IndexError, match="none of the embedding's words"):
            model(ids + 10**6)


def test_what_is_not_covered_runs_as_before(tmp_path: Path):
    folder = save_tiny(tmp_path, "bert")
    model = AutoModel.from_pretrained(folder, quantization_config=whit.QuantizationConfig("w8a8"))
    inputs = tiny_inputs("bert")
    wanted = model(**inputs, output_hidden_states=True)
    whit.compile(model, strict=True)
    found = model(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))
    embedded = model.embeddings(inputs["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    assert embedded.grad is not None
    with torch.no_grad():
        short = model.to(torch.bfloat16)(**inputs).last_hidden_state
    assert short.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spec", "activations", "said"),
    [
        ("nf4-g32", None, "are not multiples of one number"),
        ("llm.int8", None, "are dynamic, symmetric int8"),
        ("int4-g32-asym", "int8-g32", "it has more than a scale for each group"),
    ],
)
def test_what_cannot_be_compiled_says_why(tmp_path: Path, spec: str, activations: str | None, said: str):
    config = whit.QuantizationConfig(spec, activations=activations)
    model = AutoModel.from_pretrained(save_tiny(tmp_path, "bert"), quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=said):
        whit.compile(model, strict=True)
    plain = tiny_model("bert")
    with pytest.warns(UserWarning, match="attention.self.query is not quantized"):
        whit.compile(plain)


def test_only_encoders_are_found():
    assert find_stack(tiny_model("llama")) is None
    with pytest.raises(UnsupportedModelError, match="is not an encoder"):
        compile_encoder(tiny_model("llama"), {})
    with pytest.raises(UnsupportedModelError, match="an encoder has none"):
        compile_encoder(tiny_model("bert"), {"cache": 3})


def test_codes_in_panels_are_the_codes(random: torch.Generator):
    from whit.kernels.cpu.encoder_linear import _panels

    weight = BITS.pack(whit.quantize_tensor(torch.randn(50, 64, generator=random), "int8"))
    levels = BITS.unpack(weight).codes
    panels = _panels(levels)
    assert panels.shape == (2, 16, 48, 4)
    assert torch.equal(panels[1, 3, 1], levels[49, 12:16])
    assert not panels[1, :, 2:].any()
