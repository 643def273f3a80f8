"""mlx itself (`pip install mlx[cpu]`, also on Linux) reads whit's MLX files; its `dequantize` restores the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import whit
from whit.checkpoint.reader import Checkpoint, read_json
from whit.export.readers import read_foreign
from whit.pipeline.job import open_source

from tiny_models import save_tiny

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
KINDS = (
    "int2-g32", "int3-g32-f16", "int4-g64", "int5-g32-offset", "int6-g32", "int8-g64-f16", "int4-g32-offset-f16",
    "int2-g64-offset", "int3-g32-offset-f32",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_its_dequantize_restores_the_weights(kind: str, tmp_path: Path):
    save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    rules = [("*", kind), ("*.0.mlp.up_proj", "int8-g32"), ("model.embed_tokens", kind)]
    whit.quantize(tmp_path / "model", tmp_path / "out", whit.Recipe(rules=rules), export="mlx")
    tensors = mx.load(str(tmp_path / "out/model.safetensors"))
    said, source = read_json(tmp_path / "out/config.json")["quantization"], open_source(tmp_path / "out")
    names = [name for name in source.origins if source.entry(name) is None]
    assert len(names) == 15
    for name in names:
        module = name.removesuffix(".weight")
        options = said.get(module, said)
        found = mx.dequantize(
            tensors[name], *(tensors[f"{module}.{key}"].astype(mx.float32) for key in ("scales", "biases")),
            group_size=options["group_size"], bits=options["bits"], mode=options["mode"],
        )  # fmt: skip
        assert torch.equal(torch.from_numpy(np.array(found)), source.read(name)), name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_whit_reads_what_mlx_quantizes(bits: int, tmp_path: Path):
    """Its own codes, in the type of its own scales, as an MLX checkpoint."""
    weight = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    packed, scales, biases = mx.quantize(mx.array(weight), group_size=64, bits=bits)
    tensors = {"m.weight": packed, "m.scales": scales, "m.biases": biases}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    said = {"group_size": 64, "bits": bits, "mode": "affine"}
    item = read_foreign({"quantization": said}, Checkpoint(tmp_path)).packed["m.weight"]
    assert item.format is not None
    assert (item.format.bits, item.format.group_size) == (bits, 64)
    theirs = torch.from_numpy(np.array(mx.dequantize(packed, scales, biases, group_size=64, bits=bits)))
    assert torch.allclose(item.floats(), theirs, rtol=0, atol=1e-6)
