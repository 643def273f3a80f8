"""GGUF files: what llama.cpp computes from them, and what gguf-py reads in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import whit
from whit.errors import RecipeError, UnsupportedModelError
from whit.export.gguf.architectures import ARCHITECTURES
from whit.pipeline import dequantize, run
from whit.pipeline.job import Options, open_source, prepare

from llama_cpp import LlamaCpp, needs_llama_cpp
from tiny_models import tiny_inputs, tiny_model

gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
NAMES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model whose attention is scaled as llama.cpp scales it."""
    model = tiny_model(name, dtype=dtype)
    for config in (model.config, *(m.config for m in model.modules() if hasattr(m, "config"))):
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = config.head_dim
    if name == "qwen3_moe":  # as llama.cpp weighs its experts
        model.config.norm_topk_prob = True
    model.save_pretrained(folder)
    return folder


def expected(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tiny_inputs(name)["input_ids"][:1]
    with torch.no_grad():
        return tokens[0], model(tokens).logits[0]


@needs_llama_cpp()
@pytest.mark.parametrize("name", [*NAMES, *EXPERTS])
def test_llama_cpp_computes_transformers_logits(name: str, tmp_path: Path):
    folder = save(tmp_path / "model", name)
    run(prepare(folder, tmp_path / "m.gguf", None, Options(), export="gguf"))
    tokens, logits = expected(folder, name)
    theirs = LlamaCpp(tmp_path / "m.gguf")
    found = theirs.logits(tokens)
    theirs.close()
    assert torch.allclose(found, logits, atol=2e-3 * float(logits.abs().max()))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_stacks_and_come_back(name: str, tmp_path: Path):
    """gguf-py's decoder agrees, and what is read again has the same numbers."""
    folder = save(tmp_path / "model", name)
    account = whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q4_1")]), export="gguf")
    assert account.decoded is not None
    assert account.decoded["largest_error"] == 0
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    width = 128 if name in ("mixtral", "gpt_oss") else 32
    for part, shape in (("gate", [64, width, 4]), ("up", [64, width, 4]), ("down", [width, 64, 4])):
        assert tensors[f"blk.1.ffn_{part}_exps.weight"].shape.tolist() == shape
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    rules = [("*", "q4_1"), ("lm_head", "q8_0"), ("model.embed_tokens", "q4_1")]
    whit.quantize(folder, tmp_path / "whit", whit.Recipe(rules=rules))
    ours, back = open_source(tmp_path / "whit"), open_source(tmp_path / "m.gguf")
    assert ours.origins.keys() == back.origins.keys()
    assert all(torch.equal(ours.read(key).float(), back.read(key).float()) for key in ours.origins)


@needs_llama_cpp()
@pytest.mark.parametrize("count", [24, 300])
def test_phi3_turns_by_its_long_or_short_factors(count: int, tmp_path: Path):
    """Beyond the original context by the long ones; the file read back says the same."""
    folder = save(tmp_path / "model", "phi3")
    config = json.loads((folder / "config.json").read_text())
    factors = {"long_factor": [1.0 + i for i in range(8)], "short_factor": [1.0 + i / 8 for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256, **factors}
    config |= {"rope_parameters": rope, "original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    run(prepare(folder, tmp_path / "m.gguf", None, Options(), export="gguf"))
    tokens = torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(0))
    dequantize(tmp_path / "m.gguf", tmp_path / "back")
    logits = []
    for place in (folder, tmp_path / "back"):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(tokens[None]).logits[0])
    theirs = LlamaCpp(tmp_path / "m.gguf")
    found = theirs.logits(tokens)
    theirs.close()
    largest = float(logits[0].abs().max())
    assert torch.allclose(found, logits[0], atol=2e-3 * largest)
    assert torch.allclose(logits[1], logits[0], atol=2e-2 * largest)  # read back in bfloat16


@needs_llama_cpp()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("spec", ["q8_0", "q5_1", "iq4_nl", "mxfp4"])
def test_llama_cpp_runs_quantized_weights(name: str, spec: str, tmp_path: Path):
    """The logits are those of the dequantized weights, but for the 8 bits in which llama.cpp rounds activations."""
    folder = save(tmp_path / "model", name)
    whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", spec)]), export="gguf")
    dequantize(tmp_path / "m.gguf", tmp_path / "dense")
    tokens, logits = expected(tmp_path / "dense", name)
    theirs = LlamaCpp(tmp_path / "m.gguf")
    found = theirs.logits(tokens)
    theirs.close()
    assert (found - logits).norm() < 0.02 * logits.norm()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_llama_cpps(name: str, tmp_path: Path):
    """Against gguf-py's own map of names."""
    folder = save(tmp_path / "model", name)
    whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q4_0")]), export="gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    ours = ARCHITECTURES[tiny_model(name).config.model_type]
    number = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[ours.name]
    names = gguf.get_tensor_name_map(number, 2)
    for parameter, tensor in tiny_model(name).state_dict().items():
        found = ours.tensor_name(parameter)
        if not (parameter == "lm_head.weight" and name.startswith("gemma")):  # always tied there
            assert found == names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        assert found is not None
        assert ours.parameter_name(found) == parameter
        written = [t for t in reader.tensors if t.name == found]
        if found != "output.weight" or written:
            assert len(written) == 1
            assert sorted(written[0].shape.tolist()) == sorted(tensor.shape)
            is_vector = tensor.dim() == 1 or found.startswith("position_embd")
            assert (written[0].tensor_type == gguf.GGMLQuantizationType.F32) or not is_vector
    assert len({t.name for t in reader.tensors}) == len(reader.tensors)


def test_rows_of_q_and_k_are_interleaved_and_gemmas_norms_are_whole(tmp_path: Path):
    folder = save(tmp_path / "model", "llama")
    run(prepare(folder, tmp_path / "m.gguf", None, Options(), export="gguf"))
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    state = tiny_model("llama").state_dict()
    q = state["model.layers.1.self_attn.q_proj.weight"].numpy()
    head = q[16:32]  # the second of four
    assert np.array_equal(tensors["blk.1.attn_q.weight"][16:20], head[[0, 8, 1, 9]])
    assert np.array_equal(tensors["blk.1.attn_v.weight"], state["model.layers.1.self_attn.v_proj.weight"].numpy())
    save(tmp_path / "gemma", "gemma2")
    run(prepare(tmp_path / "gemma", tmp_path / "g.gguf", None, Options(), export="gguf"))
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "g.gguf").tensors}
    norm = tiny_model("gemma2").state_dict()["model.layers.0.input_layernorm.weight"].numpy()
    assert np.array_equal(tensors["blk.0.attn_norm.weight"], norm + 1)


@pytest.mark.parametrize("said", [{"swiglu_limit": 5.0}, {"layer_types": ["full_attention"] * 2}])
def test_what_llama_cpp_has_compiled_in_for_gpt_oss_must_be_so(said: dict[str, object], tmp_path: Path):
    folder = save(tmp_path / "model", "gpt_oss")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    with pytest.raises(UnsupportedModelError, match=r"llama.cpp computes gpt-oss with 1.702 and 7.0"):
        prepare(folder, tmp_path / "m.gguf", None, Options(), export="gguf")


def test_account_lies_beside_the_file_and_the_run_is_known_again(tmp_path: Path):
    folder = save(tmp_path / "model", "llama", torch.bfloat16)
    recipe = whit.Recipe(rules=[("*", "q4_0")])
    account = whit.quantize(folder, tmp_path / "m.gguf", recipe, export="gguf")
    assert account.decoded == {"parameters": 16, "largest_error": 0.0}  # embeddings and head too
    stored = json.loads((tmp_path / "m.gguf.whit.json").read_text())
    assert stored["export"] == "gguf"
    assert account.size_bytes == (tmp_path / "m.gguf").stat().st_size
    before = (tmp_path / "m.gguf").stat().st_mtime_ns
    again = whit.quantize(folder, tmp_path / "m.gguf", recipe, export="gguf")
    assert again == account
    assert (tmp_path / "m.gguf").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.gguf.whit.json", "model"]


def test_what_a_gguf_cannot_hold_is_said(tmp_path: Path):
    with pytest.raises(
        RecipeError, match=r"q_proj and 6 others .14 modules.: int4-g32 is not a type of ggml.*choose one, such as q4_k"
    ):
        whit.quantize(save(tmp_path / "a", "llama"), tmp_path / "m.gguf", whit.Recipe(rules=[("*", "int4-g32")]),
                      export="gguf")  # fmt: skip
    tiny_model("bert").save_pretrained(tmp_path / "b")
    with pytest.raises(UnsupportedModelError, match="model type 'bert' in a gguf file; it must be one of llama"):
        whit.quantize(tmp_path / "b", tmp_path / "m.gguf", export="gguf")
    tiny_model("gemma2").save_pretrained(tmp_path / "c")  # its attention is scaled by 256 ** -0.5 for heads of 16
    with pytest.raises(UnsupportedModelError, match="query_pre_attn_scalar 256"):
        whit.quantize(tmp_path / "c", tmp_path / "m.gguf", export="gguf")
    assert not (tmp_path / "m.gguf").exists()


@needs_llama_cpp()
@pytest.mark.shared
@pytest.mark.slow
def test_perplexity_of_the_real_model_is_llama_cpps(shared: Path, tmp_path: Path):
    """20 kB of text: within 0.5 % of that of the dequantized weights, and the same tokens."""
    folder, path = shared / "models" / "smollm2-135m-fp", tmp_path / "m.gguf"
    whit.quantize(folder, path, whit.Recipe(rules=[("*", "q4_k_m")]), export="gguf")
    run(prepare(path, tmp_path / "dense", None, Options()))
    text = (shared / "data" / "wikitext2" / "wiki.test.raw").read_text()[:20000]
    tokens = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    theirs = LlamaCpp(path)
    assert theirs.tokens(text) == tokens.tolist()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    lost = {"whit": 0.0, "llama.cpp": 0.0}
    for window in tokens.split(1024):
        with torch.no_grad():
            found = {"whit": model(window[None]).logits[0], "llama.cpp": theirs.logits(window)}
        for name, logits in found.items():
            lost[name] += float(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum"))
    theirs.close()
    ratio = np.exp((lost["llama.cpp"] - lost["whit"]) / len(tokens))
    assert abs(ratio - 1) < 0.005
