"""torchao's files in every layout that whit reads, made by hand from their description; and damaged ones."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from whit.checkpoint.reader import Checkpoint, read_json
from whit.errors import CheckpointError
from whit.export.lint import lint
from whit.export.readers import Packed, read_foreign
from whit.export.readers.torchao_kinds import KINDS
from whit.pipeline.job import open_source

from tiny_models import save_tiny

SAID = {"quantization_config": {"quant_method": "torchao"}}
ROWS, COLUMNS, SIZE = 24, 64, 32


def opened(folder: Path, kind: str, said: dict[str, Any], tensors: dict[str, Tensor], old: bool = False) -> Packed:
    """The parameter `m.weight` of such a class; `old` as 0.14 named its tensors."""
    write(folder, {"m.weight": {"_type": kind, "_data": said}}, tensors, old)
    return read_foreign(SAID, Checkpoint(folder)).packed["m.weight"]


def write(folder: Path, described: dict[str, Any], tensors: dict[str, Tensor], old: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    prefix = "m.weight:" if old else "m._weight_"
    metadata = {"tensor_names": json.dumps(list(described)), "format": "pt"}
    metadata |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in described.items()}
    named = {prefix + key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata)


def dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def spread(params: Tensor) -> Tensor:
    """(rows, groups) to (rows, columns)."""
    return params.float().repeat_interleave(SIZE, 1)[:, :COLUMNS]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_integers(old: bool, shifted: bool, tmp_path: Path, random: torch.Generator):
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=random, dtype=torch.int8)
    scale = torch.rand(ROWS, 2, generator=random).to(torch.bfloat16)
    zero = torch.randint(-8, 8, (ROWS, 2), generator=random, dtype=torch.int8) * int(shifted)
    said = {"target_dtype": dtype("int4"), "block_size": [1, SIZE], "dtype": dtype("bfloat16")}
    tensors = {"qdata": codes, "scale": scale, "zero_point": zero}
    found = opened(tmp_path, "IntxUnpackedToInt8Tensor", said, tensors, old)
    assert str(found.format) == ("int4-g32-asym" if shifted else "int4-g32")
    assert torch.equal(found.floats(), (codes.float() - spread(zero)) * spread(scale))


def test_blocks_that_are_no_groups(tmp_path: Path, random: torch.Generator):
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), generator=random, dtype=torch.int8)
    scale = torch.rand(2, 4, generator=random)
    found = opened(tmp_path, "Int8Tensor", {"block_size": [12, 16]}, {"qdata": codes, "scale": scale})
    assert found.format is None
    assert torch.equal(found.floats(), codes * scale.repeat_interleave(12, 0).repeat_interleave(16, 1))


def test_stacks_of_experts(tmp_path: Path, random: torch.Generator):
    codes = torch.randint(-128, 128, (3, ROWS, COLUMNS), generator=random, dtype=torch.int8)
    scale = torch.rand(3, ROWS, 1, generator=random)
    found = opened(tmp_path, "Int8Tensor", {"block_size": [1, 1, COLUMNS]}, {"qdata": codes, "scale": scale})
    assert (str(found.format), found.shape) == ("int8-channel", (3, ROWS, COLUMNS))
    assert torch.equal(found.floats(), codes * scale)


@pytest.mark.parametrize("type", [torch.int8, torch.uint8])
@pytest.mark.parametrize("middle", [False, True])
def test_int4(type: torch.dtype, middle: bool, tmp_path: Path, random: torch.Generator):
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=random)
    scale, offset = (torch.rand(2, ROWS, generator=random).to(torch.bfloat16) for _ in range(2))
    offset = offset * 0 if middle else offset
    packed = ((codes[:, ::2] & 15) + 16 * (codes[:, 1::2] & 15)).to(torch.uint8).view(type)
    said = {"block_size": [1, SIZE], "shape": [ROWS, COLUMNS], "activation_dtype": dtype("bfloat16")}
    found = opened(tmp_path, "Int4Tensor", said, {"qdata": packed, "scale": scale, "zero_point": offset})
    assert str(found.format) == ("int4-g32" if middle else "int4-g32-offset-f32")
    assert torch.equal(found.floats(), codes * spread(scale.t()) + spread(offset.t()))


def test_offsets_that_no_float32_holds_are_dequantized(tmp_path: Path):
    codes = torch.arange(8).repeat(ROWS, 8)
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    scale, offset = torch.full((2, ROWS), 1e-9).bfloat16(), torch.ones(2, ROWS).bfloat16()
    said = {"block_size": [1, SIZE], "shape": [ROWS, COLUMNS]}
    found = opened(tmp_path, "Int4Tensor", said, {"qdata": packed, "scale": scale, "zero_point": offset})
    assert found.format is None
    assert torch.equal(found.floats(), codes * spread(scale.t()) + spread(offset.t()))


def tiles_of(codes: Tensor) -> Tensor:
    """The words of a tensor core's tiles, one after another, as torch's kernel for GPUs fills them."""
    rows, columns = codes.shape
    out = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int64)
    for n in range(rows // 8):
        for k in range(columns // 128):
            for lane in range(32):
                for word in range(4):
                    first = 128 * k + 32 * word + 2 * (lane % 4)
                    places = [first + step for step in (0, 8, 16, 24, 1, 9, 17, 25)]
                    values = [int(codes[8 * n + lane // 4, place]) << 4 * i for i, place in enumerate(places)]
                    out[n, k, lane, word] = sum(values)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def test_int4_in_tiles_of_a_gpu(tmp_path: Path, random: torch.Generator):
    """With the rows and columns that were added to fill tiles."""
    codes = torch.randint(0, 16, (32, 1024), generator=random)
    params = torch.rand(32, 32, 2, generator=random).to(torch.bfloat16)  # groups, rows, scale and zero point
    said = {"block_size": [1, SIZE], "shape": [27, 72]}
    found = opened(tmp_path, "Int4TilePackedTo4dTensor", said, {"qdata": tiles_of(codes), "scale_and_zero": params})
    scale, offset = (part[:3, :27].t().float().repeat_interleave(SIZE, 1)[:, :72] for part in params.unbind(-1))
    assert str(found.format) == "int4-g32-offset-f32"
    assert torch.equal(found.floats(), (codes[:27, :72] - 8) * scale + offset)


@pytest.mark.parametrize("block", [[1, COLUMNS], [ROWS, COLUMNS], [12, 16]])
def test_float8(block: list[int], tmp_path: Path, random: torch.Generator):
    codes = torch.randn(ROWS, COLUMNS, generator=random).to(torch.float8_e4m3fn)
    scale = torch.rand(ROWS // block[0], COLUMNS // block[1], generator=random)
    found = opened(tmp_path, "Float8Tensor", {"block_size": block}, {"qdata": codes, "scale": scale})
    assert str(found.format) == ("None" if block[0] == 12 else "fp8")
    wanted = codes.float() * scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert torch.equal(found.floats(), wanted)


def swizzled(scale: Tensor) -> Tensor:
    """(rows, groups) in tiles of 128 rows and 4 groups: row r, group g of a tile at 16 (r % 32) + 4 (r / 32) + g."""
    rows, groups = scale.shape
    out = torch.zeros(-(-rows // 128), -(-groups // 4), 512, dtype=torch.uint8)
    for r in range(rows):
        for g in range(groups):
            out[r // 128, g // 4, 16 * (r % 32) + 4 * (r % 128 // 32) + g % 4] = scale.view(torch.uint8)[r, g]
    return out.reshape(-1, 16).view(scale.dtype)


@pytest.mark.parametrize("order", [False, True])
def test_small_floats(order: bool, tmp_path: Path, random: torch.Generator):
    exponents = torch.randint(120, 130, (150, 6), generator=random).to(torch.uint8).view(torch.float8_e8m0fnu)
    stored = swizzled(exponents) if order else exponents
    codes = torch.randn(150, 192, generator=random).to(torch.float8_e4m3fn)
    said = {"elem_dtype": dtype("float8_e4m3fn"), "block_size": 32, "is_swizzled_scales": order}
    found = opened(tmp_path / "mx", "MXTensor", said, {"qdata": codes, "scale": stored})
    assert torch.equal(found.floats(), codes.float() * exponents.float().repeat_interleave(32, 1))

    bytes = torch.randint(0, 256, (150, 96), generator=random, dtype=torch.uint8)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    floats = torch.stack([levels[bytes.int() % 16], levels[bytes.int() // 16]], -1).flatten(-2)
    said = {"elem_dtype": dtype("float4_e2m1fn_x2"), "block_size": 32, "is_swizzled_scales": order}
    found = opened(tmp_path / "mxfp4", "MXTensor", said, {"qdata": bytes, "scale": stored})
    assert str(found.format) == "mxfp4"
    assert torch.equal(found.floats(), floats * exponents.float().repeat_interleave(32, 1))

    scale, whole = torch.rand(150, 12, generator=random).to(torch.float8_e4m3fn), torch.tensor(0.37)
    tensors = {"qdata": bytes, "scale": swizzled(scale) if order else scale, "per_tensor_scale": whole}
    found = opened(tmp_path / "nvfp4", "NVFP4Tensor", {"block_size": 16, "is_swizzled_scales": order}, tensors)
    assert torch.equal(found.floats(), floats * (whole * scale.float()).repeat_interleave(16, 1))


def test_scales_of_inputs_are_the_columns(tmp_path: Path, random: torch.Generator):
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), generator=random, dtype=torch.int8)
    scale, before = torch.rand(ROWS, 1, generator=random), torch.rand(COLUMNS, generator=random)
    tensors = {"qdata": codes, "scale": scale, "act_pre_scale": before}
    found = opened(tmp_path, "Int8Tensor", {"block_size": [1, COLUMNS]}, tensors)
    assert torch.equal(found.floats(), codes * scale * before)


def model_of(folder: Path, old: bool = False) -> dict[str, Tensor]:
    """A model in eight bits; the tensors that stand for its parameters."""
    save_tiny(folder, "llama")
    meant, stored, described = load_file(folder / "model.safetensors"), dict[str, Tensor](), {}
    for name, tensor in list(meant.items()):
        if not name.endswith("_proj.weight") or "layers.1.self_attn" in name:
            stored[f"{name}:_data" if old else name] = tensor
            described[name] = json.dumps({"_type": "Tensor"})
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        codes = (tensor / scale).round().to(torch.int8)
        prefix = f"{name}:" if old else f"{name.removesuffix('weight')}_weight_"
        stored |= {f"{prefix}qdata": codes, f"{prefix}scale": scale}
        described[name] = json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, tensor.shape[1]]}})
        meant[name] = codes * scale
    save_file(stored, folder / "model.safetensors", {**described, "tensor_names": json.dumps(list(described))})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SAID}))
    return meant


@pytest.mark.parametrize("old", [False, True])
def test_whole_models(old: bool, tmp_path: Path):
    meant = model_of(tmp_path / "model", old)
    source = open_source(tmp_path / "model")
    for name, tensor in meant.items():
        assert torch.equal(source.read(name), tensor), name
        assert (source.format(name) is not None) == (name.endswith("_proj.weight") and "layers.1.self_attn" not in name)
    assert not lint(tmp_path / "model", read_json(tmp_path / "model" / "config.json"), Checkpoint(tmp_path / "model"))


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"_type": "Int4PreshuffledTensor", "_data": {}}, "class Int4PreshuffledTensor; whit reads Int8Tensor"),
    "blocks": ({"_type": "Int8Tensor", "_data": {"block_size": [1, 7]}}, "must divide"),
    "sizes": ({"_type": "Int8Tensor", "_data": {"block_size": "a" * 10_000}}, "it must be sizes"),
    "none": ({"_type": "Int8Tensor"}, "it must be sizes"),
    "deep": ({"_type": "Int8Tensor", "_data": json.loads("[" * 400 + "]" * 400)}, "fit together|sizes"),
    "count": ({"_type": "Int8Tensor", "_data": {"block_size": [1, 8]}}, "scales or zero points for"),
    "codes": (
        {"_type": "IntxUnpackedToInt8Tensor", "_data": {"target_dtype": dtype("int4"), "block_size": [1, COLUMNS]}},
        "codes from",
    ),
    "type": ({"_type": "Float8Tensor", "_data": {"block_size": [1, COLUMNS]}}, "which its class has not"),
    "text": ("{not JSON", "fit together"),
    "nameless": ("plain", "does not say of which class"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_said(kind: str, tmp_path: Path):
    described, said = DAMAGE[kind]
    codes = torch.arange(-32, 32, dtype=torch.int8).repeat(ROWS, 1)
    write(tmp_path, {"m.weight": described}, {"qdata": codes, "scale": torch.ones(ROWS, 1)})
    with pytest.raises(CheckpointError, match=said) as caught:
        read_foreign(SAID, Checkpoint(tmp_path)).packed["m.weight"].read()
    assert len(str(caught.value)) < 600


def test_missing_scales_and_those_that_are_no_numbers(tmp_path: Path):
    codes = torch.zeros(ROWS, COLUMNS, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="scale is missing"):
        opened(tmp_path, "Int8Tensor", {"block_size": [1, COLUMNS]}, {"qdata": codes})
    broken = {"qdata": codes, "scale": torch.full((ROWS, 1), torch.nan)}
    with pytest.raises(CheckpointError, match="not finite floats"):
        opened(tmp_path, "Int8Tensor", {"block_size": [1, COLUMNS]}, broken)


def test_pickles_of_older_versions_are_refused(tmp_path: Path):
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **SAID}))
    with pytest.raises(
        CheckpointError, match=r"pickles can run code; .* dequantize\(\) gives, or quantize the original"
    ):
        open_source(tmp_path)


def per(kind: str, **said: Any) -> dict[str, Any]:
    return {"_type": kind, "_data": said}


ROUNDED: dict[str, tuple[dict[str, Any], str | None]] = {
    "none": ({}, None),
    "token": ({"act_quant_kwargs": per("K", granularity=per("PerRow", dim=-1), mapping_type="SYMMETRIC")}, "int8"),
    "tensor": (
        {"act_quant_kwargs": per("K", granularity=per("PerTensor"), mapping_type=per("M") | {"_data": "ASYMMETRIC"})},
        "int8-tensor-asym",
    ),
    "float8": ({"act_quant_kwargs": per("K", granularity=per("PerRow", dim=-1), float8_dtype=dtype("x"))}, "fp8"),
    "name": ({"activation_quantization": "int8_asym_per_token"}, "int8-asym"),
    "groups": ({"act_quant_kwargs": per("K", granularity=per("PerGroup", group_size=32), mapping_type="S")}, "refused"),
    "other": ({"activation_quantization": "int2"}, "refused"),
    "small": ({"act_quant_kwargs": per("K", elem_dtype=dtype("float4_e2m1fn_x2"))}, "refused"),
}


@pytest.mark.parametrize("kind", ROUNDED)
def test_how_inputs_are_rounded(kind: str, tmp_path: Path):
    said, meant = ROUNDED[kind]
    tensors = {"qdata": torch.ones(ROWS, COLUMNS, dtype=torch.int8), "scale": torch.ones(ROWS, 1)}
    found = opened(tmp_path, "Int8Tensor", {"block_size": [1, COLUMNS], **said}, tensors)
    assert found.inputs is not None
    if meant == "refused":
        with pytest.raises(CheckpointError, match="inputs are rounded"):
            found.inputs()
    else:
        how = found.inputs()
        assert (None if how is None else str(how)) == meant


WRONG = (None, 0, -1, "x", [], {}, True, [1], [1, 0], [1, 32], [2, 2, 2], [1, 10**18], 10**30, {"_data": 3})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_described_is_read_or_refused_in_a_sentence(data: st.DataObject, tmp_path: Path):
    """Attributes and tensors of one class under the name of another, left out, cut, or with other values."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    said: dict[str, Any] = {"block_size": [1, SIZE], "shape": [ROWS, COLUMNS], "target_dtype": dtype("int4")}
    said |= {"elem_dtype": dtype("float8_e4m3fn"), "is_swizzled_scales": True}
    for key in data.draw(st.lists(st.sampled_from(sorted(said)), max_size=2)):
        said[key] = data.draw(st.sampled_from(WRONG))
    types = st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float32, torch.bfloat16])
    shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, SIZE, ROWS, COLUMNS]), max_size=4)
    names = st.lists(
        st.sampled_from(["qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale"]), min_size=1
    )
    tensors = {key: torch.ones(data.draw(shapes)).to(data.draw(types)) for key in data.draw(names)}
    with contextlib.suppress(CheckpointError):  # and nothing else
        opened(tmp_path, kind, said, tensors).floats()
