"""A .gguf file as a running model: its codes in whit's own modules, not floats in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_gguf import EXPERTS, NAMES, save
from test_gguf_tokenizers import SIZE, TEXTS, byte_level
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import whit
from whit.errors import UnsupportedModelError, WhitWarning
from whit.export.gguf.pretokenizers import KNOWN
from whit.integrations import foreign
from whit.integrations.loading import load_causal_lm, load_config, load_tokenizer
from whit.modules import PackedModule
from whit.pipeline.job import Options, prepare

from tiny_models import tiny_inputs

pytest.importorskip("gguf", reason="gguf-py is not installed here")


@pytest.mark.parametrize("name", [*NAMES, *EXPERTS])
def test_codes_run_as_they_lie(name: str, tmp_path: Path):
    folder = save(tmp_path / "model", name)
    whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q8_0")]), export="gguf")
    model = load_causal_lm(str(tmp_path / "m.gguf"), dtype="float32")
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    assert {str(module.format) for module in packed} == {"q8_0"}
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found, exact = (each(**tiny_inputs(name)).logits for each in (model, plain))
    lost = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert lost.quantile(0.9) < 0.05  # a token whose experts are a near choice may take others
    assert model.get_memory_footprint() < 0.5 * plain.get_memory_footprint()


def test_gpt_oss_brings_its_tokenizer(tmp_path: Path):
    """transformers, asked for either, ended over how the rotary embedding is scaled."""
    folder = save(tmp_path / "model", "gpt_oss")
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|start|>"])
    tokenizer.add_tokens(["<tool>"])
    (regex,) = next(splits for splits, name in KNOWN.items() if name == "gpt-4o")
    cut = pre_tokenizers.Split(Regex(regex), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<|start|>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    config = json.loads((folder / "config.json").read_text())
    model = GptOssForCausalLM(GptOssConfig(**{**config, "vocab_size": SIZE + 8}))
    model.save_pretrained(folder)
    whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "mxfp4")]), export="gguf")
    found = load_tokenizer(str(tmp_path / "m.gguf"))
    for text in [*TEXTS, "<|start|>system<tool> says"]:
        assert found.encode(text) == tokenizer.encode(text).ids
        assert found.decode(found.encode(text)) == tokenizer.decode(tokenizer.encode(text).ids, False)
    assert (found.bos_token, found.eos_token) == ("<|start|>", "</s>")
    assert found.chat_template == said["chat_template"]
    assert load_config(str(tmp_path / "m.gguf")).model_type == "gpt_oss"
    job = prepare(tmp_path / "m.gguf", tmp_path / "out", whit.Recipe(rules=[("*", "int8")]), Options())
    assert len(job.plan.formats) == 12
    job.source.checkpoint.close()


def test_a_file_that_transformers_alone_reads_is_dequantized_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_: Path) -> None:
        raise UnsupportedModelError("m.gguf: architecture 'falcon'; whit reads llama; convert it")

    folder = save(tmp_path / "model", "llama")
    whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q8_0")]), export="gguf")
    monkeypatch.setattr(foreign, "read_gguf_model", refuse)
    with pytest.warns(WhitWarning, match="'falcon'.*; until then transformers dequantizes all of it"):
        model = load_causal_lm(str(tmp_path / "m.gguf"))
    assert not any(isinstance(module, PackedModule) for module in model.modules())


def test_floats_in_a_file_are_not_quantized_already(tmp_path: Path):
    folder = save(tmp_path / "model", "llama")
    for spec, noted in (("bf16", False), ("q8_0", True)):
        file = tmp_path / f"{spec}.gguf"
        whit.quantize(folder, file, whit.Recipe(rules=[("*", spec)]), export="gguf")
        job = prepare(file, tmp_path / "out", whit.Recipe(rules=[("*", "int8")]), Options())
        assert any("quantized already" in note for note in job.notes) == noted
        job.source.checkpoint.close()
