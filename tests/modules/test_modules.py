"""Modules with packed weights behave like the modules that they stand for."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Generator, Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import whit
from whit.kernels import dequantize, select
from whit.layouts import BITS
from whit.modules import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, TiedEmbedding, TiedHead, prepare
from whit.modules.embedding import original_class, pack_embedding, tie_embedding
from whit.tensor import PackedWeight


def linear(random: Generator, spec: str = "int4-g32", bias: bool = True) -> QuantizedLinear:
    quantized = whit.quantize_tensor(torch.randn(48, 64, generator=random), spec)
    return QuantizedLinear.from_quantized(quantized, nn.Parameter(torch.randn(48, generator=random)) if bias else None)


def pack(embedding: nn.Embedding, spec: str = "int8") -> Tensor:
    """Pack in place; the floats that it now holds."""
    quantized = whit.quantize_tensor(embedding.weight, spec)
    pack_embedding(embedding, BITS.pack(quantized), torch.float32)
    return quantized.dequantize()


def test_linear_is_a_linear_without_a_weight_parameter(random: Generator):
    module = linear(random)
    assert isinstance(module, nn.Linear)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert set(module.state_dict()) == {"codes", "scale", "bias"}
    assert (module.in_features, module.out_features, module.weight.dtype) == (64, 48, torch.float32)
    assert "in_features=64, out_features=48, bias=True, format=int4-g32" in repr(module)
    x = torch.randn(2, 3, 64, generator=random)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.dequantize(), module.bias))
    with pytest.raises(RuntimeError):
        module.weight.data += torch.zeros(48, 64)


@pytest.mark.parametrize("spec", ["int4-g32", "ternary", "int4-g32+r4", "int8+h16"])
@pytest.mark.parametrize("shape", [(2, 63), (2, 65), (128,), (1, 128), ()])
def test_inputs_of_another_width_are_refused(spec: str, shape: tuple[int, ...], random: Generator):
    """A compiled kernel would read past their end."""
    with pytest.raises(RuntimeError, match="its last dimension must be 64"):
        linear(random, spec)(torch.randn(shape, generator=random))
    with pytest.raises(RuntimeError):
        linear(random, spec).traced(torch.randn(shape, generator=random), None)


def test_a_tied_head_is_taken_whole_by_torch_compile(random: Generator):
    embedding = nn.Embedding(96, 64)
    pack(embedding, "int8")
    model = nn.Sequential(embedding, TiedHead(nn.Linear(64, 96, bias=False), embedding, torch.float32))
    ids = torch.tensor([[3, 5, 90]])
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(ids), model(ids))


@pytest.mark.parametrize("spec", ["int4-g32", "int8", "int4-g32-asym-fz", "nf4-g32-dq"])
def test_casting_leaves_the_packed_tensors_alone(spec: str, random: Generator):
    module = linear(random, spec)
    before = {key: tensor.clone() for key, tensor in module.packed.tensors.items()}
    for cast in (module.half, module.bfloat16, module.double, module.float, lambda: module.to(torch.float16)):
        cast()
        assert all(torch.equal(before[k], t) and t.dtype == before[k].dtype for k, t in module.packed.tensors.items())
    assert module.bias.dtype == module.weight.dtype == torch.float16
    module.to("meta", torch.bfloat16)
    assert all(t.is_meta and t.dtype == before[k].dtype for k, t in module.packed.tensors.items())


def test_output_has_the_inputs_type_whatever_it_computes_in(random: Generator):
    module = linear(random)
    module.compute_dtype = torch.bfloat16
    x = torch.randn(2, 64, generator=random)
    wanted = nn.functional.linear(x.bfloat16(), module.dequantize(torch.bfloat16), module.bias.bfloat16())
    assert module(x).dtype == torch.float32
    assert torch.equal(module(x), module(x).bfloat16().float())
    torch.testing.assert_close(module(x), wanted.float(), rtol=2e-2, atol=5e-2)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_work(clone, random: Generator):
    model = nn.ModuleDict({"embed": Gemma3TextScaledWordEmbedding(32, 64, 0, 8.0), "linear": linear(random)})
    model["view"] = Gemma3TextScaledWordEmbedding(32, 64, 0, 2.0)
    pack(model["embed"])
    tie_embedding(model["view"], model["embed"], torch.float32)
    model["head"] = TiedHead(nn.Linear(64, 32, bias=False), model["embed"], torch.float32)
    tokens, x = torch.arange(5), torch.randn(2, 64, generator=random)
    model["linear"](x)
    again = clone(model)
    for name, inputs in [("linear", x), ("embed", tokens), ("view", tokens), ("head", x)]:
        assert torch.equal(again[name](inputs), model[name](inputs))
    assert again["head"].source is again["view"].source is again["embed"]
    assert again["embed"] is not model["embed"]
    assert original_class(again["embed"]) is Gemma3TextScaledWordEmbedding


def test_state_dict_goes_from_one_to_another(random: Generator):
    one, other = linear(random), linear(random)
    assert not torch.equal(one.codes, other.codes)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.dequantize(), other.dequantize())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(linear(random, "int8").state_dict())


def test_subclasses_of_embedding_keep_their_behaviour():
    tokens = torch.tensor([[1, 2], [31, 0]])
    scaled = Gemma3TextScaledWordEmbedding(32, 64, padding_idx=0, embed_scale=8.0)
    floats = pack(scaled)
    assert isinstance(scaled, QuantizedEmbedding)
    assert torch.equal(scaled(tokens), floats[tokens] * 8)
    assert "format=int8" in repr(scaled)
    positions = OPTLearnedPositionalEmbedding(32, 64)
    floats = pack(positions)
    assert torch.equal(positions(torch.ones(1, 3)), floats[None, 2:5])


def test_tied_modules_hold_nothing_of_their_own(random: Generator):
    owner, view = nn.Embedding(32, 64), Gemma3TextScaledWordEmbedding(32, 64, 0, embed_scale=2.0)
    plain = nn.Linear(64, 32)
    tie_embedding(view, owner, torch.float32)
    head = TiedHead(plain, owner, torch.float32)
    floats = pack(owner, "int4-g32")
    assert isinstance(view, TiedEmbedding)
    assert torch.equal(view(torch.tensor([3])), floats[[3]] * 2)
    x = torch.randn(5, 64, generator=random)
    torch.testing.assert_close(head(x), x @ floats.T + plain.bias)
    assert not view.state_dict()
    assert set(head.state_dict()) == {"bias"}


def test_experts_index_like_the_stack_they_replace(random: Generator):
    stack = torch.randn(4, 24, 32, generator=random)
    quantized = whit.quantize_tensor(stack, "int4-g32")
    experts, floats = QuantizedExperts(BITS.pack(quantized)), quantized.dequantize()
    assert experts.shape == stack.shape
    assert (experts.dtype, experts.device.type, len(experts)) == (torch.float32, "cpu", 4)
    assert torch.equal(experts[1], floats[1])
    assert torch.equal(experts[torch.tensor(3)], floats[3])
    assert torch.equal(experts[torch.tensor([2, 2, 0])], floats[[2, 2, 0]])
    x = torch.randn(4, 5, 24, generator=random)
    torch.testing.assert_close(torch.bmm(x, experts), torch.bmm(x, floats))
    torch.testing.assert_close(torch.matmul(input=x, other=experts), torch.matmul(x, floats))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spec", ["int4-g32", "int3-g32-asym", "mxfp4", "nf4-g32", "ternary", "nf4-g32-dq", "int8-tensor"]
)
def test_experts_are_multiplied_packed(
    spec: str, dtype: torch.dtype, random: Generator, monkeypatch: pytest.MonkeyPatch
):
    """As transformers' experts ask for them: F.linear, x @ W and, of Llama 4, torch.bmm. Floats were made each time."""
    packed = BITS.pack(whit.quantize_tensor(torch.randn(4, 24, 64, generator=random), spec))
    plain, turned = QuantizedExperts(packed, dtype), QuantizedExperts(packed, dtype, transposed=True)
    floats = plain.dequantize(torch.float32)
    x, bias = torch.randn(4, 5, 64, generator=random), torch.randn(24, generator=random)
    x[1], x[2, ::2] = 0, 0  # tokens of other experts
    given = x.to(dtype)
    if spec not in ("nf4-g32-dq", "int8-tensor"):  # whose params span experts
        monkeypatch.setattr(QuantizedExperts, "floats", lambda *_: pytest.fail("floats were made"))
        monkeypatch.setattr(QuantizedExperts, "whole", lambda *_: pytest.fail("floats were made"))
    for found, expected in (
        (torch.nn.functional.linear(given[0], plain[3], bias.to(dtype)), x[0] @ floats[3].T + bias),
        (given[0] @ turned[torch.tensor(2)], x[0] @ floats[2].T),
        (torch.matmul(given, turned[0]), x @ floats[0].T),
        (torch.bmm(given, turned), x @ floats.mT),
    ):
        assert found.dtype == dtype
        assert (found.float() - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.01) * expected.norm()


def test_one_expert_is_whatever_else_a_tensor_is(random: Generator):
    quantized = whit.quantize_tensor(torch.randn(4, 24, 32, generator=random), "int4-g32")
    experts, floats = QuantizedExperts(BITS.pack(quantized)), quantized.dequantize()
    assert (experts[1].shape, experts[1].dtype, len(experts[1])) == ((24, 32), torch.float32, 24)
    for found, expected in (
        (experts[1].T, floats[1].T), (experts[1][2], floats[1, 2]), (experts[1] * 2 + 1, floats[1] * 2 + 1),
        (torch.stack([experts[0], experts[3]]), floats[[0, 3]]), (experts[-1].sum(), floats[3].sum()),
        (torch.stack(list(map(torch.clone, experts))), floats), (2 * experts[0] / 4, floats[0] / 2),
    ):  # fmt: skip
        assert torch.equal(found, expected)
    x = torch.randn(3, 32, generator=random, requires_grad=True)
    torch.nn.functional.linear(x, experts[2]).sum().backward()
    torch.testing.assert_close(x.grad, floats[2].sum(0).expand(3, -1))
    with pytest.raises(IndexError):
        experts[4]


@pytest.mark.parametrize("spec", ["int8", "int3-g32-asym", "nf4-g32-dq", "q4_0", "ternary", "int2-g32+r4"])
def test_shardable_tensors_are_floats_to_torch_and_the_same_bytes_to_us(spec: str, random: Generator):
    module, x = linear(random, spec), torch.randn(5, 64, generator=random)
    before, expected = {key: tensor.clone() for key, tensor in module.packed.tensors.items()}, module(x)
    with torch.no_grad():
        module.packed.tensors["codes"].view(torch.uint8)[:1] = 127  # which float8 calls a NaN
        before["codes"].view(torch.uint8)[:1] = 127
    parameters = module.make_shardable()
    assert len(parameters) > 1
    assert all(one is other for one, other in zip(parameters, module.make_shardable(), strict=True))
    torch.testing.assert_close(module(x)[:, 1:], expected[:, 1:])
    for parameter in parameters:  # torch 2.11 asks each for gradients, before it remembers that it is frozen
        assert nn.Parameter(parameter.detach()).requires_grad
        assert not parameter.requires_grad
    for held in (module, copy.deepcopy(module), module.to(torch.bfloat16)):
        found = held.packed.tensors
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in found.items()} == {
            key: (tensor.dtype, tensor.shape) for key, tensor in before.items()
        }
        assert all(torch.equal(found[key], before[key]) for key in before)


def test_dispatch_is_asked_once_per_kind_of_input(random: Generator, monkeypatch):
    asked = []
    monkeypatch.setattr("whit.modules.packed.select", lambda p, x: asked.append(x.shape) or select(p, x))
    module = linear(random)
    for rows in (1, 1, 3, 4, 4, 1):
        module(torch.ones(rows, 64))
    assert len(asked) == 2


class Rehoming:
    """A kernel that moves the codes to columns first and derives a table, and counts how often."""

    name = "rehoming"

    def __init__(self) -> None:
        self.prepared = 0

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        return None

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        self.prepared += 1
        tensors = {**packed.tensors, "codes": packed.tensors["codes"].T.contiguous().T, "table": torch.ones(3)}
        return PackedWeight(packed.layout, packed.format, packed.shape, tensors)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert packed.tensors["codes"].stride(0) == 1
        return nn.functional.linear(x, dequantize(packed, x.dtype), bias) * packed.tensors["table"].mean()


def test_a_kernels_own_form_of_the_weight_is_made_once_and_never_saved(random: Generator, monkeypatch):
    kernel = Rehoming()
    monkeypatch.setattr("whit.modules.packed.select", lambda packed, x: kernel)
    module, x = linear(random), torch.randn(3, 64, generator=random)
    stored = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    wanted = nn.functional.linear(x, module.dequantize(), module.bias)
    for rows in (3, 1, 3):
        torch.testing.assert_close(module(x[:rows]), wanted[:rows])
    assert kernel.prepared == 1
    assert module.codes.stride(0) == 1, "the stored codes are still held"
    assert all(tensor.is_contiguous() for tensor in module.state_dict().values())
    assert stored.keys() == module.state_dict().keys() == {"codes", "scale", "bias"}
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in stored.items())
    other = linear(random)
    prepare(nn.Sequential(module, other), torch.float32)
    assert kernel.prepared == 2
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert kernel.prepared == 3
    module.to(torch.float64)
    assert module(x.double()).dtype == torch.float64
    module.codes = module.codes.clone()
    module(x.double())
    assert kernel.prepared == 5
