"""llama.cpp's named mixes: its own quantizer of whole files is the oracle of which matrix gets which type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import whit
from whit.errors import FormatError, RecipeError
from whit.formats.ggml.mixes import MIXES
from whit.pipeline import run
from whit.pipeline.job import Options, prepare

from llama_cpp import needs_quantizer, quantize_file

gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
FILE_TYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "tq1_0": 36,
    "tq2_0": 37,
}  # fmt: skip
SHAPE = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def save(folder: Path, kind: str) -> Path:
    """Models of enough blocks that the rules show, as narrow as superblocks allow."""
    torch.manual_seed(0)
    llama = {**SHAPE, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
    model = {
        "grouped": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**llama, num_hidden_layers=17, num_key_value_heads=2, head_dim=32)
        ),
        "tied": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**llama, num_hidden_layers=8, num_key_value_heads=8, tie_word_embeddings=True)
        ),
        "narrow": lambda: hf.Qwen2ForCausalLM(
            hf.Qwen2Config(**{**llama, "hidden_size": 96, "num_attention_heads": 3}, num_hidden_layers=8,
                           num_key_value_heads=3)
        ),
        "joint": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, n_embd=256, n_inner=256, n_layer=8, n_head=4, n_positions=32)
        ),
    }[kind]()  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


@needs_quantizer()
@pytest.mark.parametrize("kind", ["grouped", "tied", "narrow", "joint"])
def test_types_are_llama_cpps(kind: str, tmp_path: Path):
    folder = save(tmp_path / "model", kind)
    run(prepare(folder, tmp_path / "dense.gguf", None, Options(), export="gguf"))
    for mix, number in FILE_TYPES.items():
        quantize_file(tmp_path / "dense.gguf", tmp_path / f"{mix}.theirs.gguf", number)
        job = prepare(folder, tmp_path / f"{mix}.gguf", whit.Recipe(rules=[("*", mix)]), Options(), export="gguf")
        ours = {}
        for item in job.plan.items:
            name = next(iter(item.written))
            dtype = str(item.written[name].dtype).removeprefix("torch.")
            ours[name] = str(item.format) if item.format else {"float32": "f32", "bfloat16": "bf16"}[dtype]
        assert ours == types(tmp_path / f"{mix}.theirs.gguf"), mix
        size = sum(spec.nbytes for shard in job.plan.shards for spec in shard.specs.values())
        assert size == sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / f"{mix}.theirs.gguf").tensors)


def test_every_mix_has_a_number():
    assert set(MIXES) == set(FILE_TYPES)


def test_falling_back_is_in_the_account(tmp_path: Path):
    folder = save(tmp_path / "model", "narrow")
    account = whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q4_k_m")]), export="gguf")
    entries = {entry.name: entry for entry in account.parameters}
    query = entries["model.layers.0.self_attn.q_proj.weight"]
    assert query.format == "q5_0"
    assert query.reason == "q5_0 instead of q4_k: 96 columns are not a multiple of 256, which q4_k needs"
    assert entries["model.layers.0.mlp.down_proj.weight"].reason is None
    assert account.recipe is not None
    assert account.recipe["mix"] == "q4_k_m"


def test_rules_go_over_a_mix_and_any_file_takes_it(tmp_path: Path):
    folder = save(tmp_path / "model", "tied")
    rules = [("*", "q4_k_m"), ("*.0.*", "bf16"), ("*.1.mlp.*_proj", "q3_k")]
    account = whit.quantize(folder, tmp_path / "out", whit.Recipe(rules=rules))
    found = {entry.name: entry.format for entry in account.parameters}
    assert found["model.layers.0.mlp.down_proj.weight"] is None
    assert found["model.layers.1.mlp.down_proj.weight"] == "q3_k"
    assert found["model.layers.2.mlp.down_proj.weight"] == "q4_k"
    assert found["model.layers.3.mlp.down_proj.weight"] == "q6_k"
    assert found["model.embed_tokens.weight"] == "q6_k"


def test_recipes_with_a_mix_travel(tmp_path: Path):
    recipe = whit.Recipe("gptq", [("*", "q4_k_m"), ("lm_head", "q8_0")])
    assert recipe.mix == "q4_k_m"
    assert whit.Recipe.from_dict(recipe.to_dict()) == recipe
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    assert whit.Recipe.load(tmp_path / "r.toml") == recipe
    with pytest.raises(RecipeError, match="is a mix of types for a whole model"):
        whit.Recipe(rules=[("*.0.*", "q4_k_m")])
    with pytest.raises(RecipeError, match="mix 'q9': not known"):
        whit.Recipe(mix="q9")
    with pytest.raises(FormatError, match="'q4_k_m' is not a format"):
        whit.quantize_tensor(torch.ones(1, 256), "q4_k_m")
