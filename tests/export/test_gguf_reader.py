"""A .gguf file as MODEL: what was written comes back, codes included."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file
from test_gguf import NAMES, save
from tokenizers import Tokenizer

import whit
from whit.checkpoint.gguf import TYPES, GgufHeader, read_gguf
from whit.cli.inspect import inspect
from whit.data import resolve_model
from whit.errors import CheckpointError, UnsupportedModelError
from whit.evaluation import EvaluationOptions, evaluate
from whit.export.gguf.header import Info, gguf_shard
from whit.export.readers.gguf_weights import GgufCheckpoint, _decoded
from whit.pipeline import run
from whit.pipeline.job import Options, open_source, prepare
from whit.tensor import QuantizedTensor, TensorSpec

from tiny_models import save_tiny, tiny_model

gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_come_back(name: str, tmp_path: Path):
    folder = save(tmp_path / "model", name)
    recipe = whit.Recipe(rules=[("*", "q8_0"), ("*.0.*", "bf16")])
    whit.quantize(folder, tmp_path / "m.gguf", recipe, export="gguf")
    source = open_source(tmp_path / "m.gguf")
    state = tiny_model(name).state_dict()
    assert set(source.origins) | set(source.tied) == set(state)
    assert not source.dropped
    for parameter in source.origins:
        found, exact = source.read(parameter), state[parameter]
        assert found.shape == exact.shape
        if source.entry(parameter) is None and source.format(parameter) is not None:  # type: ignore[attr-defined]
            assert (found - exact).norm() < 0.01 * exact.norm()
        else:
            assert torch.allclose(found, exact, rtol=0, atol=1e-6)
    source.checkpoint.close()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("spec", ["q4_0", "q5_1", "iq4_nl", "mxfp4"])
def test_codes_come_back_without_quantizing_again(name: str, spec: str, tmp_path: Path):
    """GGUF to whit's own file and back: the same codes and params, and the same bytes of every tensor."""
    folder = save(tmp_path / "model", name)
    whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", spec)]), export="gguf")
    whit.quantize(folder, tmp_path / "packed", whit.Recipe(rules=[("*", spec)]))
    ours, theirs = open_source(tmp_path / "packed"), open_source(tmp_path / "m.gguf")
    compared = 0
    for parameter in ours.origins:
        if ours.entry(parameter) is None:
            assert str(theirs.format(parameter)) == spec  # type: ignore[attr-defined]
            found: QuantizedTensor = theirs.quantized(parameter)  # type: ignore[attr-defined]
            meant = ours.read(parameter)
            near = found.dequantize()
            turned = near.shape != meant.shape or name == "gpt2"
            assert torch.equal(near.t() if turned and not torch.equal(near, meant) else near, meant)
            compared += 1
    assert compared >= 8


def test_what_is_kept_of_codes_has_the_models_type_and_floats_their_own(tmp_path: Path):
    folder = save_tiny(tmp_path / "model", "llama", torch.float16)
    recipe = whit.Recipe(rules=[("*", "q8_0"), ("*.q_proj", "bf16"), ("model.embed_tokens", "q8_0")])
    whit.quantize(folder, tmp_path / "m.gguf", recipe, export="gguf")
    rules = [("*", "int4-g32"), ("*.q_proj", "bf16")]
    account = whit.quantize(tmp_path / "m.gguf", tmp_path / "out", whit.Recipe(rules=rules))
    source, stored = open_source(tmp_path / "m.gguf"), load_file(tmp_path / "out/model.safetensors")
    kept = {entry.name: entry for entry in account.parameters if entry.status == "kept"}
    assert {stored[name].dtype for name in kept if "norm" in name} == {torch.float32}  # as they lie in the file
    assert all(torch.equal(stored[name], source.read(name)) for name in kept if "norm" in name)
    embedding = source.read("model.embed_tokens.weight")
    assert embedding.dtype == torch.float32
    assert torch.equal(stored["model.embed_tokens.weight"], embedding.half())
    assert 0 < kept["model.embed_tokens.weight"].relative_error < 1e-3
    name = "model.layers.0.self_attn.q_proj.weight"
    assert stored[name].dtype == torch.float16
    assert torch.equal(stored[name], load_file(folder / "model.safetensors")[name])
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"


def test_every_type_of_ggml_is_read(tmp_path: Path):
    """Those that are no formats of whit, by gguf-py: random bytes, with scales that are numbers."""
    generator = torch.Generator().manual_seed(0)
    for number in (16, 17, 18, 19, 21, 22, 29, 40):
        kind, columns, size = TYPES[number]
        data = torch.randint(0, 60, (64, 512 // columns * size), generator=generator, dtype=torch.uint8)
        content = {"general.architecture": "llama"}
        shard = gguf_shard(
            "m", content, {}, [Info("x.weight", (64, 512), number, TensorSpec(tuple(data.shape), data.dtype))]
        )
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(shard.header + data.numpy().tobytes() + bytes(shard.size - len(shard.header) - data.numel()))
        header = read_gguf(path)
        expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(number))
        found = _decoded(checkpoint(header, tmp_path), header.tensors["x.weight"], None)
        assert torch.equal(found, torch.from_numpy(expected))


def checkpoint(header: GgufHeader, tmp_path: Path) -> GgufCheckpoint:
    folder = TemporaryDirectory(dir=tmp_path)
    (Path(folder.name) / "view").mkdir()
    return GgufCheckpoint(header, folder)


def test_the_shipped_model_with_its_tokenizer(tmp_path: Path):
    whit.quantize("whit:model", tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q4_k_m")]), export="gguf")
    result = evaluate(str(tmp_path / "m.gguf"), EvaluationOptions(max_tokens=512))
    assert result.perplexity < 60
    run(prepare(tmp_path / "m.gguf", tmp_path / "dense", None, Options()))
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    again = evaluate(str(tmp_path / "dense"), EvaluationOptions(max_tokens=512))
    assert again.perplexity == pytest.approx(result.perplexity, rel=5e-3)
    text = "Hello world, it's 2024!\n  x"
    first = Tokenizer.from_file(str(Path(resolve_model("whit:model")) / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "dense" / "tokenizer.json")).encode(text).ids == first.encode(text).ids


def test_what_cannot_be_read_is_said(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match="version 0; whit reads"):
        prepare(path, tmp_path / "out", None, Options())
    shard = gguf_shard("m", {"general.architecture": "mamba"}, {}, [])
    path.write_bytes(shard.header)
    with pytest.raises(UnsupportedModelError, match="architecture 'mamba'; whit reads llama, qwen2"):
        prepare(path, tmp_path / "out", None, Options())
    shard = gguf_shard("m", {"general.architecture": "llama"}, {}, [])
    path.write_bytes(shard.header)
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length is None; it must be a positive number"):
        prepare(path, tmp_path / "out", None, Options())


def test_inspect_shows_types_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, path = save(tmp_path / "model", "llama"), tmp_path / "m.gguf"
    whit.quantize(folder, path, whit.Recipe(rules=[("*", "q5_1")]), export="gguf")
    inspect(str(path), verify=True, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["dtypes"]["Q5_1"]["tensors"] == 14 + 1  # the embeddings
    assert facts["dtypes"]["Q8_0"]["tensors"] == 1  # llama.cpp's choice for a head so narrow
    assert facts["size_bytes"] == path.stat().st_size
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed since it was written"):
        inspect(str(path), verify=True)
