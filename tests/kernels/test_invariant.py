"""The batch-invariant mode: a row's bits are the same whatever rows are beside it, in every format, on every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Generator, nn
from transformers import AutoModelForCausalLM

import whit
from whit.activations import parse_activations
from whit.errors import UnsupportedModelError
from whit.kernels import KERNELS, packed_arguments, packed_linear, packed_linear_op, select
from whit.kernels.cpu import Cpu, library
from whit.kernels.gpu import Gpu
from whit.kernels.invariant import RowByRow
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

PLAIN = [
    "int4-g64", "int1-g32-asym", "int2-g32", "int3-g64-asym", "int5-g64", "int6-g32", "int8", "int8-g128-asym-fz",
    "nf4", "nf4-dq", "fp4", "ternary-g64", "binary", "q2_k", "q4_k", "q6_k", "iq4_nl", "mxfp4", "fp8", "int4-g64-act",
    "int4-g64+r4", "int4-g64+h64",
]  # fmt: skip
ROUNDED = [
    ("int8", "int8"), ("int8", "int8-asym"), ("int4-channel", "int8"), ("int4-g64", "int8-g32"), ("nf4-dq", "int8-g32"),
    ("fp8", "fp8"), ("int8+h64", "int8"), ("q4_k", "int8-g32"), ("ternary", "int8"),
]  # fmt: skip


def packed(spec: str, how: str | None, random: Generator, rows: int = 40) -> PackedWeight:
    weight = BITS.pack(whit.quantize_tensor(torch.randn(rows, 256, generator=random), spec))
    return replace(weight, activations=parse_activations(how) if how else None, deterministic=True)


@pytest.mark.parametrize(("spec", "how"), [*((spec, None) for spec in PLAIN), *ROUNDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rows_bits_do_not_depend_on_the_batch(spec: str, how: str | None, dtype: torch.dtype, random: Generator):
    weight = packed(spec, how, random)
    x = torch.randn(67, 256, generator=random).to(dtype)
    bias = torch.randn(40, generator=random).to(dtype)
    alone = torch.cat([packed_linear(row[None], weight, bias) for row in x])
    for rows in (2, 3, 4, 5, 8, 9, 17, 67):
        assert torch.equal(packed_linear(x[:rows], weight, bias), alone[:rows]), rows
        assert torch.equal(packed_linear(x[-rows:].reshape(1, rows, 256), weight, bias)[0], alone[-rows:]), rows
    usual = packed_linear(x, replace(weight, deterministic=False), bias)
    torch.testing.assert_close(alone, usual, rtol=2e-2, atol=2e-2 * float(usual.abs().max()))
    assert packed_linear(torch.empty(0, 256, dtype=dtype), weight, bias).shape == (0, 40)


@pytest.mark.skipif(isinstance(library(), str), reason="no CPU kernels")
def test_the_usual_mode_does_sum_otherwise_in_other_batches(random: Generator):
    """Otherwise the test above would say nothing."""
    weight = replace(packed("nf4", None, random, 512), deterministic=False)
    x = torch.randn(64, 256, generator=random).bfloat16()
    alone = torch.cat([packed_linear(row[None], weight) for row in x])
    if Cpu()._strips(Cpu().prepare(weight), torch.bfloat16, 64):
        assert not torch.equal(packed_linear(x, weight), alone)


def test_the_operator_and_its_compiled_form_keep_to_it(random: Generator):
    weight, x = packed("int4-g64", None, random), torch.randn(9, 256, generator=random)
    tensors, names = packed_arguments(weight)
    assert names[2] == "int4-g64 deterministic"
    assert torch.equal(packed_linear_op(x, tensors, None, *names), packed_linear(x, weight))
    eight = packed("int8", "int8", random)
    assert packed_arguments(eight)[1][2] == "int8-channel int8 deterministic"
    module = QuantizedLinear(weight)
    traced = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x)[:1], module(x[:1]))


def test_the_invariant_kernel_of_a_gpu_comes_first(random: Generator):
    """Of which this machine can only ask in what order."""
    from whit.kernels.dispatch import INVARIANT

    assert INVARIANT[0] == Gpu(invariant=True)
    assert [kernel.kernel for kernel in INVARIANT[1:] if isinstance(kernel, RowByRow)] == list(KERNELS)
    weight = packed("int4-g64", None, random)
    assert select(weight, torch.ones(3, 256)).name.endswith("-rows")
    assert not select(replace(weight, deterministic=False), torch.ones(3, 256)).name.endswith("-rows")


def test_what_all_rows_decide_is_refused(random: Generator):
    for how in ("int8-outliers", "int8-tensor"):
        model = nn.Sequential(QuantizedLinear(replace(packed("int8", how, random), deterministic=False)))
        with pytest.raises(UnsupportedModelError, match="what all rows hold together"):
            whit.set_deterministic(model)
        assert not model[0].deterministic
        assert whit.set_deterministic(model, False) is model


def test_from_pretrained_and_config_json_say_it(tmp_path):
    config = whit.QuantizationConfig("int4-g32", deterministic=True)
    assert whit.QuantizationConfig.from_dict(config.to_dict()).deterministic
    assert "deterministic" not in whit.QuantizationConfig("int4-g32").to_dict()
    model = AutoModelForCausalLM.from_pretrained(whit.resolve_model("whit:model"), quantization_config=config)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert linears
    assert all(linear.deterministic for linear in linears)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    linear = next(module for module in again.modules() if isinstance(module, QuantizedLinear))
    assert linear.deterministic
    x = torch.randn(7, linear.in_features)
    assert torch.equal(linear(x)[3:4], linear(x[3:4]))
    whit.set_deterministic(again, False)
    assert not linear.deterministic
