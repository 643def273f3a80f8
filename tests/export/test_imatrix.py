"""Importance matrices: measured as llama.cpp's tool would, in both of its file formats, and used."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_gguf import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import whit
from whit.calibration import Calibration
from whit.cli import build_app
from whit.data import resolve_model
from whit.errors import CheckpointError, OutputError, RecipeError
from whit.export.gguf.architectures import architecture_of
from whit.export.gguf.imatrix import Imatrix, dat_bytes, gguf_bytes, read_imatrix
from whit.pipeline.importance import measure_importance, write_imatrix
from whit.pipeline.job import open_source

from tiny_models import tiny_config

SMALL = Calibration(samples=3, context=48)


@pytest.fixture(scope="module")
def measured() -> Imatrix:
    return measure_importance("whit:model", SMALL)


def test_sums_are_those_of_the_inputs(measured: Imatrix):
    """Against hooks on transformers' own model."""
    folder = resolve_model("whit:model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, args):
            squares = args[0].float().square().sum(dim=(0, 1))
            sums[name] = sums.get(name, 0) + squares

        return hook

    names = {"blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj", "blk.7.ffn_down.weight":
             "model.layers.7.mlp.down_proj", "blk.3.attn_output.weight": "model.layers.3.self_attn.o_proj"}  # fmt: skip
    for module in names.values():
        model.get_submodule(module).register_forward_pre_hook(watch(module))
    tokens = SMALL.tokens(AutoTokenizer.from_pretrained(folder), 2048).tokens
    with torch.no_grad():
        for row in tokens:
            model(row[None])
    for tensor, module in names.items():
        assert measured.counts[tensor] == tokens.numel()
        assert torch.allclose(measured.sums[tensor], sums[module], rtol=2e-2)
    assert len(measured.sums) == 8 * 7


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_files_come_back(measured: Imatrix, suffix: str, tmp_path: Path):
    path = tmp_path / f"imatrix{suffix}"
    write_imatrix(measured, path)
    found = read_imatrix(path)
    assert found.dataset == "whit:text"
    assert found.chunks == 3
    for name, sums in measured.sums.items():
        assert torch.allclose(found.sums[name] / found.counts[name], sums / measured.counts[name], rtol=1e-5)
    with pytest.raises(OutputError, match="goes into a new file"):
        write_imatrix(measured, path)


def test_gguf_py_reads_it(measured: Imatrix, tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
    (tmp_path / "i.gguf").write_bytes(gguf_bytes(measured))
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    tensors = {t.name: t.data for t in reader.tensors}
    name = "blk.2.ffn_up.weight"
    assert torch.equal(torch.from_numpy(tensors[f"{name}.in_sum2"].copy())[0], measured.sums[name])
    assert tensors[f"{name}.counts"].item() == measured.counts[name]


def test_the_older_file_is_laid_out_as_llama_cpp_has_it(tmp_path: Path):
    imatrix = Imatrix({"a": torch.tensor([8.0, 4.0])}, {"a": 4.0}, "text", 2)
    expected = (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iiff", 2, 2, 4.0, 2.0) + struct.pack("<ii", 2, 4) + b"text"
    )
    assert dat_bytes(imatrix) == expected


def test_weighed_columns_lose_less(measured: Imatrix, tmp_path: Path):
    write_imatrix(measured, tmp_path / "i.gguf")
    recipe = whit.Recipe("clip", [("*", "q3_k")])
    whit.quantize("whit:model", tmp_path / "plain", recipe)
    whit.quantize("whit:model", tmp_path / "weighed", recipe, imatrix=tmp_path / "i.gguf")
    exact = open_source(Path(resolve_model("whit:model")))
    plain, weighed = open_source(tmp_path / "plain"), open_source(tmp_path / "weighed")
    lost = {"plain": 0.0, "weighed": 0.0}
    for block in range(8):
        name = f"model.layers.{block}.mlp.down_proj.weight"
        weights = measured.sums[f"blk.{block}.ffn_down.weight"]
        for kind, source in (("plain", plain), ("weighed", weighed)):
            lost[kind] += float(((source.read(name) - exact.read(name).float()).square() * weights).sum())
    assert lost["weighed"] < 0.97 * lost["plain"]


@pytest.mark.parametrize(("name", "chosen"), [("qwen3_moe", 2), ("gpt_oss", 2)])
@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_every_expert_is_weighed_by_what_it_sees(name: str, chosen: int, suffix: str, tmp_path: Path):
    """Experts were left out of the file and of what it weighs."""
    folder = save(tmp_path / "model", name, torch.bfloat16)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    text = " ".join(f"w{i * i % 120 + 3}" for i in range(6000))
    measured = measure_importance(folder, Calibration([text], 32, 48))
    hidden, counts = measured.sums["blk.1.ffn_gate_exps.weight"], measured.counts["blk.1.ffn_gate_exps.weight"]
    assert hidden.shape == (4, 64)
    assert int(counts.sum()) == chosen * 32 * 48
    assert torch.equal(hidden, measured.sums["blk.1.ffn_up_exps.weight"])
    write_imatrix(measured, tmp_path / f"i{suffix}")
    found = read_imatrix(tmp_path / f"i{suffix}").importance(architecture_of(tiny_config(name), name))
    stack = "model.layers.1.mlp.experts.down_proj"
    expected = measured.sums["blk.1.ffn_down_exps.weight"] / measured.counts["blk.1.ffn_down_exps.weight"][:, None]
    assert torch.allclose(found[stack].reshape(expected.shape), expected, rtol=1e-5)
    recipe, lost = whit.Recipe("clip", [("*", "q4_0")]), {}
    for kind, imatrix in (("plain", None), ("weighed", tmp_path / f"i{suffix}")):
        whit.quantize(folder, tmp_path / kind, recipe, imatrix=imatrix)
        exact, near = open_source(folder).read(stack).float(), open_source(tmp_path / kind).read(stack)
        error = (near - exact).square() if name == "qwen3_moe" else (near - exact).square().mT  # (experts, out, in)
        lost[kind] = float((error * expected[:, None]).sum())
    assert lost["weighed"] < lost["plain"]


def test_a_gguf_file_says_what_weighed_it(measured: Imatrix, tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
    (tmp_path / "i.dat").write_bytes(dat_bytes(measured))
    recipe = whit.Recipe("clip", [("*", "bf16"), ("*.0.mlp.down_proj", "q4_0")])
    whit.quantize("whit:model", tmp_path / "m.gguf", recipe, export="gguf", imatrix=tmp_path / "i.dat")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {key: fields[f"quantize.imatrix.{key}"].contents() for key in ("file", "dataset")}
    assert found == {"file": "i.dat", "dataset": "whit:text"}
    assert fields["quantize.imatrix.entries_count"].contents() == len(measured.sums)
    assert fields["quantize.imatrix.chunks_count"].contents() == 3


def test_what_does_not_fit_is_said(measured: Imatrix, tmp_path: Path):
    write_imatrix(measured, tmp_path / "i.gguf")
    with pytest.raises(RecipeError, match="method hqq does not weigh by it; clip does"):
        whit.quantize("whit:model", tmp_path / "out", whit.Recipe("hqq"), imatrix=tmp_path / "i.gguf")
    other = save(tmp_path / "other", "llama")
    with pytest.raises(RecipeError, match=r"columns there; it must be of this model"):
        whit.quantize(other, tmp_path / "out", whit.Recipe("clip", [("*", "q4_0")]), imatrix=tmp_path / "i.gguf")
    with pytest.raises(CheckpointError, match="an importance matrix must be there"):
        read_imatrix(tmp_path / "absent")
    whit.quantize(other, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q4_0")]), export="gguf")
    with pytest.raises(CheckpointError, match="but no importance matrix"):
        read_imatrix(tmp_path / "m.gguf")


@given(cut=st.integers(0, 60), place=st.integers(0, 55), value=st.integers(-(2**31), 2**31 - 1))
def test_damaged_files_are_refused_or_read(cut: int, place: int, value: int, tmp_path_factory: pytest.TempPathFactory):
    content = bytearray(dat_bytes(Imatrix({"a": torch.ones(4), "b": torch.ones(2)}, {"a": 4.0, "b": 1.0}, "t", 2)))
    content[place : place + 4] = struct.pack("<i", value)
    path = tmp_path_factory.getbasetemp() / "damaged.dat"
    path.write_bytes(content[:cut] if cut < 55 else content)
    try:
        found = read_imatrix(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(torch.isfinite(sums).all() for sums in found.sums.values())


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Own(LlamaConfig):
    def __init__(self, **options):
        super().__init__(**options)
        self.model_type = "llama"

class OwnModel(LlamaForCausalLM):
    config_class = Own
"""


def test_the_command_takes_a_device_and_the_models_own_code(tmp_path: Path, measured: Imatrix):
    folder = tmp_path / "own"
    shutil.copytree(resolve_model("whit:model"), folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "slime", "auto_map": own, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    words = ["imatrix", str(folder), str(tmp_path / "i.gguf"), "--samples", "3", "--context", "48"]
    refused = CliRunner().invoke(build_app(), words)
    assert "pass --trust-remote-code" in str(refused.exception)
    elsewhere = CliRunner().invoke(build_app(), [*words, "--device", "npu"])
    assert "device npu: unknown" in str(elsewhere.exception)
    done = CliRunner().invoke(build_app(), [*words, "--device", "cpu", "--trust-remote-code"])
    assert done.exit_code == 0, done.exception
    found = read_imatrix(tmp_path / "i.gguf")
    assert all(torch.equal(found.sums[name], value) for name, value in measured.sums.items())
