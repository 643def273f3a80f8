"""MODEL and OUT as folders: where OUT may lie, which files travel with the weights, what `verify` sees of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from whit import Recipe
from whit.cli.inspect import verify_files
from whit.errors import CheckpointError, OutputError
from whit.pipeline import quantize
from whit.pipeline.job import Options, prepare
from whit.pipeline.transcode import prepare_transcode

from tiny_models import save_tiny

INT4 = Recipe(rules=[("*", "int4-g32")])


def test_out_must_lie_elsewhere(llama: Path, tmp_path: Path):
    before = {path.name: path.stat().st_mtime_ns for path in llama.iterdir()}
    (tmp_path / "link").symlink_to(llama)
    (tmp_path / "file").write_text("")
    for out in (llama, llama / "deeper/out", llama.parent, tmp_path / "link/out", tmp_path / "file"):
        with pytest.raises(OutputError, match=r"MODEL|is a file"):
            quantize(llama, out, INT4)
    assert {path.name: path.stat().st_mtime_ns for path in llama.iterdir()} == before


def test_an_out_that_is_there(llama: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    first = quantize(llama, out, INT4)  # an empty folder is as good as none
    assert quantize(llama, out, INT4) == first
    other = Recipe(rules=[("*", "int8")])
    with pytest.raises(OutputError, match="pass --restart to replace it"):
        quantize(llama, out, other)
    assert quantize(llama, out, other, options=Options(restart=True)).bits_per_weight > first.bits_per_weight
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("keep me")
    with pytest.raises(OutputError, match="was not written by whit"):
        quantize(llama, foreign, INT4, options=Options(restart=True))
    assert (foreign / "precious.txt").exists()


def test_side_files_travel_and_code_and_pickles_do_not(tmp_path: Path):
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    shutil.copytree(save_tiny(tmp_path / "model", "llama"), snapshot)
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "modeling_x.py", "weights.bin", "LICENSE",
                 "quantize_config.json", "genai_config.json"):  # fmt: skip
        (blobs / name).write_text(name)
        (snapshot / name).symlink_to(blobs / name)
    quantize(snapshot, tmp_path / "out", INT4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE", "config.json", "generation_config.json",
        "model.safetensors", "README.md", "whit.json",
    }  # fmt: skip
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert "import whit" in (tmp_path / "out/README.md").read_text().split("```")[0]
    (tmp_path / "secret").write_text("password")
    (snapshot / "stolen.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the model"):  # it was found out when all was done
        prepare(snapshot, tmp_path / "out2", INT4, Options())
    with pytest.raises(CheckpointError, match="outside of the model"):
        prepare_transcode(snapshot, tmp_path / "out2", "gguf", Options())


def test_names_that_are_no_text(tmp_path: Path):
    """Bytes of a file system; the model card could not be written, when all was done."""
    folder = save_tiny(tmp_path / os.fsdecode(b"m\xff"), "llama")
    quantize(folder, tmp_path / os.fsdecode(b"o\xfe"), INT4)
    assert "# m?, quantized by whit" in (tmp_path / os.fsdecode(b"o\xfe") / "README.md").read_text()


def test_links_into_the_hubs_cache_are_followed(tmp_path: Path):
    """Folders that huggingface_hub filled with links to its cache."""
    folder, blobs = save_tiny(tmp_path / "model", "llama"), tmp_path / "hub/models--org--name/blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123").write_text("words")
    (folder / "vocab.txt").symlink_to(blobs / "0123")
    quantize(folder, tmp_path / "out", INT4)
    assert (tmp_path / "out/vocab.txt").read_text() == "words"


def test_parts_of_sentence_transformers_and_no_index_of_other_weights(tmp_path: Path):
    folder = save_tiny(tmp_path / "model", "bert")
    parts = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}, {"path": "../other"}]
    (folder / "modules.json").write_text(json.dumps(parts))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/secret.json").write_text("{}")
    quantize(folder, tmp_path / "out", INT4)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names >= {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert not names & {"onnx/config.json", "pytorch_model.bin.index.json"}
    assert not any("secret" in name for name in names)


def test_verify_names_the_file_that_changed(llama: Path, tmp_path: Path):
    account = quantize(llama, tmp_path / "out", INT4, options=Options(shard_size=50_000))
    verify_files(tmp_path / "out", account)
    name = sorted(account.files)[1]
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} changed since it was written"):
        verify_files(tmp_path / "out", account)
