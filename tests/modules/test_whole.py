"""A module that holds its ternary codes in whole bits, as products on Hopper want them, is saved and moved as ever."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import whit
from whit.errors import FormatError
from whit.formats import parse_format
from whit.kernels import dequantize, reference
from whit.kernels.gpu import GpuTernary
from whit.kernels.gpu.kernel_ternary import why_not_turned
from whit.kernels.rotated import Rotation
from whit.kernels.side_car import SideCar
from whit.layouts import BITS, WHOLE_BITS, whole
from whit.modules import QuantizedLinear
from whit.modules.packed import is_offloaded

SPECS = ("ternary-g64", "ternary", "ternary-tensor-absmean", "ternary-g128-f32")


def stored(spec: str, random: torch.Generator, shape: tuple[int, int] = (70, 384)) -> whit.PackedWeight:
    return BITS.pack(whit.quantize_tensor(torch.randn(*shape, generator=random), spec))


@pytest.mark.parametrize("spec", SPECS)
def test_codes_in_whole_bits_are_the_same_weight(spec, random, monkeypatch):
    monkeypatch.setattr(whole, "AT_ONCE", 1000)
    packed = stored(spec, random)
    turned = whole.as_whole(packed)
    assert turned.tensors["codes"].shape == (70, 96)
    wanted = reference.dequantize(packed, torch.float32)
    for same in (turned, whole.integers(turned)):
        assert torch.equal(reference.dequantize(same, torch.float32), wanted)
        assert torch.equal(dequantize(same, torch.float32), wanted)
    back = whole.as_stored(turned)
    assert back.layout == BITS.name
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in packed.tensors.items())
    assert whole.as_stored(packed) is packed


def test_only_ternary_codes_are_integers_of_two_bits():
    with pytest.raises(FormatError, match="digits of base 3"):
        whole.integers_of(parse_format("binary-g64"))
    assert WHOLE_BITS.refuses(parse_format("int4-g64"), (4, 64)) is not None
    assert WHOLE_BITS.refuses(parse_format("ternary-g64"), (4, 64)) is None


@pytest.mark.parametrize("spec", SPECS)
def test_a_module_gives_back_what_it_was_made_of(spec, random):
    packed, x = stored(spec, random), torch.randn(3, 384, generator=random)
    module = QuantizedLinear(packed, None, torch.float32)
    y, before = module(x), {key: tensor.clone() for key, tensor in module.state_dict().items()}
    prepared = GpuTernary().prepare(module.packed)
    assert GpuTernary().prepare(prepared) is prepared
    module._adopt(prepared)
    assert module.layout == WHOLE_BITS.name
    held = sum(tensor.nbytes for tensor in module.buffers())
    assert held == 70 * 384 // 4 + packed.tensors["scale"].nbytes  # no second copy
    now = module.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())
    assert module.packed.layout == BITS.name
    assert torch.equal(module.dequantize(), dequantize(packed, torch.float32))
    assert torch.equal(module.rows(torch.tensor([69, 0])), dequantize(packed, torch.float32)[[69, 0]])
    torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(module)(x), y, rtol=1e-4, atol=1e-4)
    module.load_state_dict(before)
    assert module.layout == BITS.name
    assert torch.equal(module(x), y)


@pytest.mark.parametrize(("spec", "around"), [("ternary-g64+r4", SideCar), ("ternary-g64+h64", Rotation)])
def test_so_does_one_with_something_around_its_codes(spec, around, random):
    packed, x = stored(spec, random), torch.randn(2, 384, generator=random)
    module = QuantizedLinear(packed, None, torch.float32)
    y, before = module(x), {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module._adopt(around(GpuTernary()).prepare(packed))
    assert module.layout == WHOLE_BITS.name
    torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.dequantize(), dequantize(packed), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("how", [lambda m: m.to(torch.bfloat16), lambda m: m.make_shardable()])
def test_what_moves_or_shards_a_module_finds_the_stored_tensors(how, random):
    packed = stored("ternary-g64", random)
    module = QuantizedLinear(packed, None, torch.float32)
    module._adopt(GpuTernary().prepare(packed))
    how(module)
    assert module.layout == BITS.name
    assert torch.equal(module.packed.tensors["codes"], packed.tensors["codes"])


def test_tensors_that_come_for_a_forward_alone_are_not_turned():
    module = torch.nn.Linear(1, 1)
    assert not is_offloaded(module)
    module._hf_hook = SimpleNamespace(offload=False)
    assert not is_offloaded(module)
    module._hf_hook = SimpleNamespace(hooks=(SimpleNamespace(), SimpleNamespace(offload=True)))
    assert is_offloaded(module)


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        ("ternary-g32", (8, 64), "multiples of 64"),
        ("binary-g64", (8, 64), "not ternary"),
        ("ternary", (8, 80), "of 64"),
    ],
)
def test_what_is_not_turned_says_why(spec, shape, reason, random):
    found = why_not_turned(stored(spec, random, shape))
    assert found is not None
    assert reason in found
