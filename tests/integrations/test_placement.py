"""Where the parts of a loaded model lie, on devices and on disk, and in which types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loading_helpers import INT4, fake_quantized, load, logits, packed_copy

import whit

from tiny_models import save_tiny


def placed(**where: str) -> dict[str, str]:
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    return {f"model.{p}": where.get(p.replace(".", "_"), "cpu") for p in parts} | {
        "lm_head": where.get("lm_head", "cpu")
    }


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3_moe"])
def test_parts_offloaded_to_disk_give_the_same_logits(
    architecture: str, offload_buffers: bool, everything: bool, tmp_path: Path
):
    original = save_tiny(tmp_path / "original", architecture)
    rules = [("*embed_tokens", "int8")] if everything else []
    config = whit.QuantizationConfig("int4-g32", rules=rules)
    wanted = logits(load(original, architecture, quantization_config=config), architecture)
    packed = packed_copy(original, config, architecture)
    for name, folder, options in [("fly", original, {"quantization_config": config}), ("packed", packed, {})]:
        for device_map in (placed(layers_0="disk"), placed(layers_0="disk", layers_1="disk", embed_tokens="disk")):
            if "tied" in architecture:
                device_map["lm_head"] = device_map["model.embed_tokens"]  # accelerate keeps ties together
            model = load(
                folder, architecture, device_map=device_map, offload_folder=tmp_path / name,
                offload_buffers=offload_buffers, **options,
            )  # fmt: skip
            assert torch.equal(logits(model, architecture), wanted)
            assert model.model.layers[0].self_attn.q_proj.codes.is_meta == offload_buffers
            model.save_pretrained(tmp_path / "again")
            assert torch.equal(logits(load(tmp_path / "again", architecture), architecture), wanted)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_every_device_map_gives_the_same_logits(device_map, llama: Path):
    model = load(llama, quantization_config=INT4, device_map=device_map)
    wanted = logits(fake_quantized(type(model), llama, INT4.recipe), "llama")
    torch.testing.assert_close(logits(model, "llama"), wanted, atol=1e-5, rtol=0)
    assert not [name for name, tensor in model.named_buffers() if tensor.is_meta]


def test_memory_footprint_counts_every_packed_byte(llama: Path):
    plain = load(llama, dtype=torch.bfloat16)
    model = load(llama, quantization_config=INT4, dtype=torch.bfloat16)
    linears = [m for m in plain.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linears)
    saved = plain.get_memory_footprint() - model.get_memory_footprint()
    assert saved == weights * 2 - weights * (4 + 16 / 32) / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_users_and_scales_keep_theirs(dtype: torch.dtype, llama: Path):
    packed = packed_copy(llama)
    for model in (load(llama, quantization_config=INT4, dtype=dtype), load(packed, dtype=dtype)):
        assert model.dtype == model.lm_head.weight.dtype == dtype
        assert logits(model, "llama").dtype == dtype
        assert model.model.layers[0].mlp.up_proj.scale.dtype == torch.bfloat16
        assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert load(packed).dtype == torch.float32


def test_modules_that_an_architecture_keeps_in_float32(tmp_path: Path):
    original = save_tiny(tmp_path, "t5")
    model = load(original, "t5", quantization_config=whit.QuantizationConfig("int8"), dtype=torch.float16)
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wo.weight.dtype == torch.float32
    assert feed_forward.wi.weight.dtype == torch.float16
    assert logits(model, "t5").isfinite().all()


def test_the_compute_dtype_is_kept_in_the_file(llama: Path):
    config = whit.QuantizationConfig("nf4-g32", compute_dtype=torch.bfloat16)
    model = load(llama, quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16
    model.save_pretrained(llama / "out")
    again = load(llama / "out")
    assert again.model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
