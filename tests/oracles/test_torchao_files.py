"""torchao's own tensors, written by transformers, dequantize as whit reads them, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from whit.checkpoint.reader import Checkpoint
from whit.export.readers import read_foreign
from whit.pipeline.job import open_source

from tiny_models import save_tiny

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support", reason="torchao is too old")

Make = Callable[[], Any]


def configurations() -> dict[str, tuple[Make, str | None, str | None]]:
    """Name to configuration, whit's format and how inputs are rounded."""
    q = quantization
    per_group, per_row, per_tensor = q.PerGroup(32), q.PerAxis(0), q.PerTensor()
    asymmetric = q.MappingType.ASYMMETRIC
    mx: Callable[..., Any] = lambda name, **options: getattr(_mx_formats(), name)(**options)  # noqa: E731
    e2m1 = torch.float4_e2m1fn_x2
    return {
        "int8": (lambda: q.Int8WeightOnlyConfig(version=2), "int8-channel", None),
        "int8-groups": (lambda: q.Int8WeightOnlyConfig(version=2, granularity=per_group), "int8-g32-f32", None),
        "int8-tensor": (lambda: q.Int8WeightOnlyConfig(version=2, granularity=per_tensor), "int8-tensor", None),
        "int8-dynamic": (lambda: q.Int8DynamicActivationInt8WeightConfig(version=2), "int8-channel", "int8"),
        "int8-dynamic-asymmetric": (
            lambda: q.Int8DynamicActivationInt8WeightConfig(version=2, act_mapping_type=asymmetric),
            "int8-channel", "int8-asym",
        ),
        "float8": (lambda: q.Float8WeightOnlyConfig(), "fp8", None),
        "int4-asymmetric": (
            lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=per_group, mapping_type=asymmetric),
            "int4-g32-asym-f32", None,
        ),
        "int3": (lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=per_row), "int3-channel", None),
        "int1": (
            lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int1, granularity=per_group, mapping_type=asymmetric),
            "int1-g32-asym-f32", None,
        ),
        "int4-dynamic": (
            lambda: q.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=per_group),
            "int4-g32-f32", "refused",
        ),
        "mxfp8": (lambda: mx("MXDynamicActivationMXWeightConfig"), None, None),
        "mxfp4": (
            lambda: mx("MXDynamicActivationMXWeightConfig", activation_dtype=e2m1, weight_dtype=e2m1),
            "mxfp4", "refused",
        ),
        "nvfp4": (lambda: mx("NVFP4WeightOnlyConfig"), None, None),
    }  # fmt: skip


def _mx_formats() -> Any:
    return pytest.importorskip("torchao.prototype.mx_formats", reason="torchao has no prototype.mx_formats")


def quantized(model: Any) -> Iterator[tuple[str, Any]]:
    """Its parameters of a class of torchao's."""
    yield from ((name, weight) for name, weight in model.named_parameters() if hasattr(weight, "qdata"))


@pytest.mark.parametrize("kind", configurations())
def test_weights_are_those_of_dequantize(kind: str, tmp_path: Path):
    make, format, inputs = configurations()[kind]
    dtype = torch.bfloat16 if "fp" in kind else torch.float32  # the small floats' prototypes want it
    save_tiny(tmp_path / "model", "llama", dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=TorchAoConfig(make()), dtype=dtype
        )
        model.save_pretrained(tmp_path / "out")
    source, names = open_source(tmp_path / "out"), dict(quantized(model))
    assert len(names) == 14
    for name, weight in names.items():
        floats = weight.dequantize() if dtype == torch.float32 else weight.dequantize(torch.float32)
        assert torch.equal(source.read(name), floats), name
        found = source.format(name)
        assert (None if found is None else str(found)) == format
        if inputs != "refused" and format is not None:
            how = source.input_rounding(name)
            assert (None if how is None else str(how[0])) == inputs
    for name in dict(model.named_parameters()).keys() - names.keys():
        assert torch.equal(source.read(name), model.get_parameter(name)), name


def test_int4_of_their_class(tmp_path: Path, random: torch.Generator):
    """Made by hand, as quantizing to it takes a GPU's kernels, and dequantizing too: w = code scale + zero_point."""
    codes = torch.randint(-8, 8, (24, 64), generator=random, dtype=torch.int8)
    scale, zero = (torch.rand(2, 24, generator=random).to(torch.bfloat16) for _ in range(2))
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    weight = quantization.Int4Tensor(packed, scale, zero, [1, 32], torch.Size([24, 64]))
    tensors, metadata = support.flatten_tensor_state_dict({"m.weight": weight})
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    found = read_foreign({"quantization_config": {"quant_method": "torchao"}}, Checkpoint(tmp_path)).packed["m.weight"]
    spread = [part.float().t().repeat_interleave(32, 1) for part in (scale, zero)]
    assert torch.equal(found.floats(), codes.float() * spread[0] + spread[1])
    assert str(found.format) == "int4-g32-offset-f32"
