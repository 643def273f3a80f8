"""EETQ's and FBGEMM's bytes, made by hand from their description; and the kinds of file that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whit.checkpoint.reader import Checkpoint, read_json
from whit.errors import CheckpointError
from whit.export.lint import lint
from whit.export.readers import READERS, read_foreign
from whit.export.readers.refused import REFUSED
from whit.formats import parse_format
from whit.integrations.loading import load_causal_lm
from whit.pipeline.job import open_source

from tiny_models import save_tiny


def turning(codes: Tensor) -> Tensor:
    """int8 (in, out) in the order in which EETQ stores them, step by step as its preprocessing goes."""
    columns, rows = codes.shape  # inputs, outputs
    order = [8 * (t % 4 // 2) + t % 2 + 2 * (t // 4) for t in range(16)]
    permuted = torch.cat([codes[first : first + 16][order] for first in range(0, columns, 16)]).t()
    flat = torch.zeros(columns * rows, dtype=torch.int8)
    for row in range(rows):
        for column in range(columns):
            first = column // 64 * 64
            place = row // 2 * columns * 2 + 2 * first + 64 * (row % 2) + column % 64
            flat[place] = permuted[row, column]
    fours = (flat.to(torch.int16) + 128).to(torch.uint8).reshape(-1, 4)
    return fours[:, [0, 2, 1, 3]].reshape(columns, rows).view(torch.int8)


def model(folder: Path, method: str, random: torch.Generator) -> dict[str, Tensor]:
    """A model whose linears but the head are so; the weights that they stand for."""
    save_tiny(folder, "llama")
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scale = (torch.rand(rows, generator=random) / 500).to(torch.float16)
        if method == "eetq":
            codes = torch.randint(-128, 128, (rows, columns), generator=random, dtype=torch.int8)
            tensors[name], tensors[f"{name}_scales"] = turning(codes.t()), scale
        else:
            codes = torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn)
            scale = scale.float()
            tensors[name], tensors[f"{name}_scale"] = codes, scale.reshape(-1, 1)
        meant[name] = codes.float() * scale.float().reshape(-1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    say(folder, {"quant_method": method, "modules_to_not_convert": ["lm_head"]})
    return meant


def say(folder: Path, said: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


@pytest.mark.parametrize(
    ("method", "format", "inputs"), [("eetq", "int8-channel-f16", None), ("fbgemm_fp8", "fp8", "fp8")]
)
def test_weights(method: str, format: str, inputs: str | None, tmp_path: Path, random: torch.Generator):
    meant = model(tmp_path, method, random)
    source = open_source(tmp_path)
    for name, weight in meant.items():
        assert str(source.format(name)) == format
        assert torch.equal(source.read(name), weight), name
        how = source.input_rounding(name)
        assert (None if how is None else str(how[0])) == inputs
    found = load_causal_lm(str(tmp_path))
    assert torch.isfinite(found(torch.arange(3, 23)[None]).logits).all()


def test_experts_of_fbgemm(tmp_path: Path, random: torch.Generator):
    up = torch.randn(2, 16, 24, generator=random).to(torch.float8_e4m3fn)
    down = torch.randn(2, 12, 16, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 1, 24, generator=random), torch.rand(2, 16, 1, generator=random)
    tensors = {"gate_up_proj": up, "gate_up_proj_scale": scales[0], "down_proj": down, "down_proj_scale": scales[1]}
    save_file({f"m.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    found = read_foreign({"quantization_config": {"quant_method": "fbgemm_fp8"}}, Checkpoint(tmp_path)).packed
    assert torch.equal(found["m.gate_up_proj"].floats(), up.float() * scales[0])
    assert torch.equal(found["m.down_proj"].floats(), down.float() * scales[1].mT)


@pytest.mark.parametrize("method", ["eetq", "fbgemm_fp8"])
def test_scales_that_do_not_fit(method: str, tmp_path: Path, random: torch.Generator):
    meant = model(tmp_path, method, random)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(iter(meant)) + ("_scales" if method == "eetq" else "_scale")
    tensors[key] = tensors[key][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"scale for each|one for each"):
        open_source(tmp_path)


@pytest.mark.parametrize("method", REFUSED)
def test_what_is_not_read_is_said(method: str, tmp_path: Path):
    assert method not in dict(READERS)
    save_tiny(tmp_path, "llama")
    say(tmp_path, {"quant_method": method})
    with pytest.raises(CheckpointError, match=f"quantized by {method}, which whit does not read: .*(original|export)"):
        open_source(tmp_path)
    findings = lint(tmp_path, read_json(tmp_path / "config.json"), Checkpoint(tmp_path))
    assert any(REFUSED[method] in str(finding) for finding in findings)
    words = REFUSED[method].partition("--format ")[2].partition(",")[0].split(" or ")
    for word in filter(None, words):
        assert method == "quark" or parse_format(word) is not None


def test_where_its_library_is_not_there_what_to_do_is_said(tmp_path: Path):
    save_tiny(tmp_path, "llama")
    say(tmp_path, {"quant_method": "aqlm"})
    with pytest.raises(CheckpointError, match=r"transformers cannot load it .* quantize the original model"):
        load_causal_lm(str(tmp_path))
