"""gpt-oss as it is published: its experts in MXFP4, decoded by transformers' own function beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import whit
from whit import GPTQ, Calibration, Recipe
from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.lint import lint
from whit.export.readers.mxfp4 import read_mxfp4
from whit.integrations.loading import load_causal_lm
from whit.pipeline.job import Options, open_source
from whit.pipeline.loop import run
from whit.pipeline.transcode import prepare_transcode

from tiny_models import save_tiny, tiny_inputs

SAID = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


def published(folder: Path, random: torch.Generator, scales: tuple[int, int] = (118, 123)) -> dict[str, torch.Tensor]:
    """A checkpoint as OpenAI writes it, of random codes; what its experts are to transformers, float32."""
    save_tiny(folder, "gpt_oss", torch.bfloat16)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        exponents = torch.randint(*scales, shape, dtype=torch.uint8, generator=random)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        meant[name] = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": SAID}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return meant


def test_every_code_with_every_scale_is_what_transformers_makes_of_it(tmp_path: Path):
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1).expand(1, 255, 16).contiguous()
    save_file({"experts.w_blocks": blocks, "experts.w_scales": scales}, tmp_path / "model.safetensors")
    found = read_mxfp4({}, Checkpoint(tmp_path))["experts.w"]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float64).mT
    assert torch.equal(found.floats().double(), expected.float().double())
    assert found.shape == (1, 255, 512)


def test_it_is_read_and_kept_without_loss(tmp_path: Path, random: torch.Generator):
    meant = published(tmp_path / "model", random)
    source = open_source(tmp_path / "model")
    for name, weight in meant.items():
        assert str(source.format(name)) == "mxfp4"
        assert torch.equal(source.read(name), weight)
    account = run(prepare_transcode(tmp_path / "model", tmp_path / "out", "whit", Options()))
    assert account.carried
    assert {e.format for e in account.parameters if e.name in meant} == {"mxfp4"}
    kept = open_source(tmp_path / "out")
    for name, weight in meant.items():
        assert torch.equal(kept.read(name), weight)


@torch.no_grad()
def test_it_runs_as_it_is_and_converted(tmp_path: Path, random: torch.Generator):
    meant = published(tmp_path / "model", random)
    plain = load_causal_lm(str(save_tiny(tmp_path / "plain", "gpt_oss", torch.bfloat16)), dtype="float32")
    for name, weight in meant.items():
        plain.get_parameter(name).data = weight
    run(prepare_transcode(tmp_path / "model", tmp_path / "out", "whit", Options()))
    inputs = tiny_inputs("gpt_oss")
    wanted = plain(**inputs).logits
    for folder in ("model", "out"):
        model = load_causal_lm(str(tmp_path / folder), dtype="float32")
        assert torch.allclose(model(**inputs).logits, wanted, atol=1e-5)
        assert model.get_memory_footprint() < 0.5 * plain.get_memory_footprint()


def test_it_is_quantized_again_by_calibration(tmp_path: Path, random: torch.Generator):
    """What codes stand for is float32, and the rest of the block bfloat16: that ended in torch's own words."""
    published(tmp_path / "model", random)
    text = [" ".join(f"w{i * i % 120 + 3}" for i in range(6000))]
    recipe = Recipe(GPTQ(), [("*", "int4-g32")])
    account = whit.quantize(tmp_path / "model", tmp_path / "out", recipe, calibration=Calibration(text, 64, 48))
    experts = [entry for entry in account.parameters if "experts" in entry.name and entry.status == "quantized"]
    assert len(experts) == 4
    assert all(entry.proxy_loss < 0.05 and sum(entry.tokens) == 2 * 64 * 48 for entry in experts)


def test_what_does_not_fit_is_said(tmp_path: Path, random: torch.Generator):
    published(tmp_path / "model", random)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert lint(tmp_path / "model", config, Checkpoint(tmp_path / "model")) == []
    path, name = tmp_path / "model/model.safetensors", "model.layers.0.mlp.experts.down_proj_scales"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj: blocks .* one scale for 16 bytes"):
        open_source(tmp_path / "model")
    tensors[name][0, 0, 0] = 255
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj_scales: holds 255, which is not a scale"):
        whit.quantize(tmp_path / "model", tmp_path / "out", "int4-g32")


def test_a_gguf_file_holds_the_same_codes(tmp_path: Path, random: torch.Generator):
    """ggml's MXFP4 is the same numbers in another order; gguf-py says so, and the names are its own."""
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
    meant = published(tmp_path / "model", random)
    (tmp_path / "model/tokenizer.json").unlink()
    account = run(prepare_transcode(tmp_path / "model", tmp_path / "m.gguf", "gguf", Options()))
    assert account.carried
    assert account.decoded == {"parameters": 4, "largest_error": 0.0}
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for block in range(2):
        gate_up = meant[f"model.layers.{block}.mlp.experts.gate_up_proj"]  # (experts, in, out), gate and up by turns
        for part, weight in (
            ("gate", gate_up[:, :, ::2].mT),
            ("up", gate_up[:, :, 1::2].mT),
            ("down", meant[f"model.layers.{block}.mlp.experts.down_proj"].mT),
        ):
            found = tensors[f"blk.{block}.ffn_{part}_exps.weight"]
            assert found.tensor_type == gguf.GGMLQuantizationType.MXFP4
            assert torch.equal(torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type)), weight)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, 2)
    plain = [name for name in open_source(tmp_path / "model").origins if "experts" not in name]
    assert {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in plain} == {
        name.removesuffix(".weight") if name.endswith("attn_sinks.weight") else name
        for name in tensors
        if "_exps" not in name
    }
    source, back = open_source(tmp_path / "model"), open_source(tmp_path / "m.gguf")
    assert source.origins.keys() == back.origins.keys()
    assert all(torch.equal(source.read(key).float(), back.read(key).float()) for key in source.origins)
