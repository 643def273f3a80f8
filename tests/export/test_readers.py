"""Variants that whit reads and does not write, made by hand; and damaged files, refused in a sentence."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import whit
from whit.checkpoint.reader import Checkpoint
from whit.errors import WhitError
from whit.export.lint import lint
from whit.export.readers import Packed, read_foreign
from whit.formats.codebook import NF4
from whit.pipeline.job import open_source

from tiny_models import save_tiny

ROWS, COLUMNS = 32, 64


def opened(folder: Path, said: dict[str, object], tensors: dict[str, Tensor]) -> Packed:
    """The one linear `m` of a checkpoint made of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file({f"m.{key}": tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return read_foreign({"quantization_config": said}, Checkpoint(folder)).packed["m.weight"]


def codes_and_zeros(bits: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes, zeros = (torch.randint(0, 1 << bits, (ROWS, n), generator=g) for n in (COLUMNS, groups))
    return codes, zeros, (torch.rand(ROWS, groups, generator=g) + 0.5).to(torch.float16)


def words(values: Tensor, bits: int, each: int) -> Tensor:
    """`each` integers a word, lowest bits first, the rest zeros, by sums of products."""
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % each)).reshape(len(values), -1, each)
    total = (padded * (1 << (torch.arange(each) * bits))).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def test_awq_gemv_with_its_padding(tmp_path: Path):
    codes, zeros, scale = codes_and_zeros(4, 2)
    pad = (0, 14)
    tensors = {
        "qweight": words(codes, 4, 8),
        "qzeros": words(torch.nn.functional.pad(zeros, pad), 4, 8),
        "scales": torch.nn.functional.pad(scale, pad),
    }
    item = opened(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, tensors)
    assert str(item.format) == "int4-g32-asym-f16"
    wanted = (codes - zeros.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(item.floats(), wanted)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
def test_padded_words_of_older_compressed_tensors(bits: int, tmp_path: Path):
    codes, _, scale = codes_and_zeros(bits, 2)
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "symmetric": True, "group_size": 32}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    tensors = {
        "weight_packed": words(codes, bits, 32 // bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([32, 64]),
    }
    item = opened(tmp_path, said, tensors)
    assert str(item.format) == f"int{bits}-g32-f16"
    wanted = (codes - (1 << (bits - 1))) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(item.floats(), wanted)


def test_unpacked_zero_points_of_older_compressed_tensors(tmp_path: Path):
    codes, zeros, scale = codes_and_zeros(4, 2)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    tensors = {
        "weight_packed": words(codes, 4, 8), "weight_scale": scale, "weight_shape": torch.tensor([32, 64]),
        "weight_zero_point": (zeros - 8).to(torch.int8),
    }  # fmt: skip
    item = opened(tmp_path, said, tensors)
    wanted = (codes - zeros.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(item.floats(), wanted)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_with_act_order(version: int, tmp_path: Path):
    codes, zeros, scale = codes_and_zeros(4, 2)
    zeros = zeros.clamp(min=1)
    group = torch.randint(0, 2, (COLUMNS,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tensors = {
        "qweight": words(codes, 4, 8).t(), "qzeros": words((zeros - int(version == 1)).t(), 4, 8), "scales": scale.t(),
        "g_idx": group,
    }  # fmt: skip
    tensors["qweight"] = words(codes, 4, 8).t()
    kind = "gptq" if version == 1 else "gptq_v2"
    item = opened(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": kind}, tensors)
    assert str(item.format) == "int4-g32-asym-f16-act"
    assert "act-order" in str(item.note)
    assert torch.equal(item.floats(), (codes - zeros[:, group.long()]) * scale.float()[:, group.long()])


AUTOROUND = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:exllamav2": 0, "auto_round:gptqmodel": 0}


@pytest.mark.parametrize("kind", AUTOROUND)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_autorounds_own_files(kind: str, bits: int, tmp_path: Path):
    """No g_idx; a linear may have other bits than the file says; zero points less one with one packing alone."""
    codes, zeros, scale = codes_and_zeros(bits, 2)
    zeros = zeros.clamp(min=1)
    tensors = {
        "qweight": tight(codes, bits).t(), "qzeros": tight((zeros - AUTOROUND[kind]).t(), bits), "scales": scale.t(),
    }  # fmt: skip
    said = {
        "quant_method": "auto-round", "packing_format": kind, "bits": 4, "group_size": 32, "sym": False,
        "data_type": "int", "extra_config": {"m": {"bits": bits}},
    }  # fmt: skip
    item = opened(tmp_path, said, tensors)
    assert str(item.format) == f"int{bits}-g32-asym-f16"
    assert torch.equal(item.floats(), (codes - zeros.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1))


def tight(values: Tensor, bits: int) -> Tensor:
    """int32 words of a stream of bits without gaps, for rows of whole words."""
    places = (values.long().unsqueeze(-1) >> torch.arange(bits)) & 1
    return words(places.flatten(1), 1, 32)


def test_autorounds_awq_and_what_is_no_packing_of_its(tmp_path: Path):
    codes, zeros, scale = codes_and_zeros(4, 2)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    mixed = [torch.cat([part[:, order] for part in m.t().split(8, 1)], 1) for m in (codes, zeros)]
    tensors = {"qweight": words(mixed[0], 4, 8), "qzeros": words(mixed[1], 4, 8), "scales": scale.t()}
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    item = opened(tmp_path, said, tensors)
    assert str(item.format) == "int4-g32-asym-f16"
    assert torch.equal(item.floats(), (codes - zeros.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1))
    with pytest.raises(WhitError, match="packing_format itrex; whit reads"):
        opened(tmp_path, {**said, "packing_format": "itrex"}, tensors)


def test_bitsandbytes_blocks_that_run_on_from_row_to_row(tmp_path: Path):
    g = torch.Generator().manual_seed(0)
    codes, absmax = torch.randint(0, 16, (ROWS * 96,), generator=g), torch.rand(ROWS * 96 // 64, generator=g)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, 96]}
    tensors = {
        "weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8).reshape(-1, 1), "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    item = opened(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors)
    assert item.format is None
    assert torch.equal(item.floats(), (torch.tensor(NF4)[codes] * absmax.repeat_interleave(64)).reshape(ROWS, 96))


def test_fp8_in_tiles_is_dequantized(tmp_path: Path):
    g = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(ROWS, COLUMNS, generator=g).to(torch.float8_e4m3fn), torch.rand(2, 4, generator=g)
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    item = opened(tmp_path, said, {"weight": weight, "weight_scale": scale})
    assert item.format is None
    tiles = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(item.floats(), weight.float() * tiles)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    save_tiny(folder / "model", "llama", torch.bfloat16)
    for export, format in KINDS.items():
        whit.quantize(folder / "model", folder / export, whit.Recipe(rules=[("*", format)]), export=export)
    return folder


KINDS = {
    "gptq": "int4-g32", "awq": "int4-g32-asym", "bitsandbytes": "nf4-dq", "compressed-tensors": "int4-g32-asym",
    "mlx": "int4-g32", "hqq": "int4-g32-asym",
}  # fmt: skip


@pytest.mark.parametrize("export", KINDS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_tensors_are_read_or_refused_in_a_sentence(
    export: str, written: Path, tmp_path: Path, data: st.DataObject
):
    """Tensors cut, reshaped, retyped, filled with noise or left out; configurations with other values."""
    tensors = load_file(written / export / "model.safetensors")
    names = sorted(name for name in tensors if ".layers.0.mlp.up_proj." in name)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)):
        tensor = tensors.get(name)
        if tensor is None:
            continue
        kind = data.draw(st.sampled_from(["drop", "cut", "flat", "type", "noise", "empty"]))
        tensors.pop(name) if kind == "drop" else tensors.update({name: _damaged(kind, tensor)})
    config = json.loads((written / export / "config.json").read_text())
    said = config["quantization_config"]
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(said)))
        said[key] = data.draw(st.sampled_from([None, 0, -1, "x", [], {}, True, 3]))
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(WhitError):  # and nothing else
        open_source(folder).read("model.layers.0.mlp.up_proj.weight")
    with contextlib.suppress(WhitError), Checkpoint(folder) as checkpoint:
        assert all(finding.message for finding in lint(folder, config, checkpoint))


def _damaged(kind: str, tensor: Tensor) -> Tensor:
    if kind == "cut":
        return tensor[: len(tensor) // 2].clone() if tensor.dim() else tensor
    if kind == "flat":
        return tensor.reshape(-1).clone()
    if kind == "type":
        return tensor.to(torch.float32 if not tensor.is_floating_point() else torch.int32)
    if kind == "noise":
        bytes_ = torch.randint(
            0, 256, (tensor.numel() * tensor.element_size(),), generator=torch.Generator().manual_seed(0)
        )
        return bytes_.to(torch.uint8).view(tensor.dtype).reshape(tensor.shape)
    return tensor.reshape(-1)[:0].clone()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_that_config_does_not_speak_of_are_refused(dtype: torch.dtype, tmp_path: Path):
    """They were taken for the weights; FP8 without scales is what it says."""
    save_tiny(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 100).to(dtype)
    if dtype.is_floating_point:
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        assert open_source(tmp_path).read(name).dtype == dtype
    tensors[f"{name}_scale"] = torch.tensor(0.01)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WhitError, match=r"up_proj.weight is .*quantization_config"):
        open_source(tmp_path)


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_whose_configuration_does_not_say_so(axis: int, tmp_path: Path):
    """hqq's own files in 3 bits, whose last words are not full; config.json is a plain model's."""
    save_tiny(tmp_path, "llama")
    tensors, meant = load_file(tmp_path / "model.safetensors"), {}
    g = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        shape = tensors.pop(name).shape
        codes = torch.randint(0, 8, (shape.numel() // 32, 32) if axis else (32, shape.numel() // 32), generator=g)
        scale, zero = (torch.rand(1, shape.numel() // 32, generator=g) for _ in range(2))
        scale, zero = (scale.t(), zero.t()) if axis else (scale, zero)
        meant[name] = ((codes - zero) * scale).reshape(shape)
        slices = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % 10)).reshape(10, -1, codes.shape[1])
        words = sum(slices[i] << 3 * (9 - i) for i in range(10)).to(torch.int32)
        said = {"nbits": 3, "group_size": 32, "axis": axis}
        stored = {"W_q": words, "scale": scale, "zero": zero, "shape": torch.tensor(shape)}
        stored |= {key: torch.tensor(value, dtype=torch.int32) for key, value in said.items()}
        stored["packing"] = torch.tensor([ord(letter) for letter in "3bit_32"], dtype=torch.uint8)
        tensors |= {f"{name.removesuffix('weight')}{key}": value.contiguous() for key, value in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    for name, weight in meant.items():
        assert torch.equal(source.read(name), weight), name
