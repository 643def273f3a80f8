"""Graphs that other programs wrote, as models; and damaged ones, each refused in a sentence."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import whit
from whit.cli import build_app
from whit.errors import CheckpointError
from whit.export.lint import lint_onnx
from whit.export.readers.onnx import read_onnx_model
from whit.pipeline.job import open_source

from tiny_models import save_tiny

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of whit's."""
    folder = tmp_path_factory.mktemp("onnx")
    save_tiny(folder / "model", "qwen2", torch.bfloat16)
    whit.quantize(folder / "model", folder / "onnx", whit.Recipe(rules=[("*", "int4-g32")]), export="onnx")
    return folder / "onnx"


BUILT = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}  # of config.json


def built(name: str, op: str = "MatMulNBits", **numbers: int) -> Any:
    """A node over x as onnxruntime-genai's builder and its quantizers name them."""
    weight = name.strip("/").replace("/", ".") + ".weight"
    quantized = [f"{weight}_Q{numbers.get('bits')}G{numbers.get('block_size')}", f"{weight}_scale", f"{weight}_zp"]
    inputs, ending = (quantized, f"_Q{numbers['bits']}") if numbers else ([weight], "")
    domain = "com.microsoft" if numbers else ""
    return onnx.helper.make_node(op, ["x", *inputs], [name + "/output_0"], name=name + ending, domain=domain, **numbers)


def save(folder: Path, nodes: list[Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    stored = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], stored)
    (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (folder / "config.json").write_text(json.dumps(BUILT))
    return folder


def test_one_product_for_q_k_and_v(tmp_path: Path, random: torch.Generator):
    """Scales and zero points in one dimension, a bias for all three, and a plain product turned over."""
    base = "model.layers.0.attn.qkv_proj"
    bytes_ = torch.randint(0, 256, (128, 2, 16), generator=random).to(torch.uint8)
    scales = torch.rand(256, generator=random)
    zeros = torch.randint(0, 256, (128,), generator=random).to(torch.uint8)
    down, bias = torch.rand(96, 64, generator=random), torch.rand(128, generator=random)
    tensors = {
        f"{base}.MatMul.weight_Q4G32": bytes_, f"{base}.MatMul.weight_scale": scales, f"{base}.MatMul.weight_zp": zeros,
        f"{base}.Add.bias": bias, "model.layers.0.mlp.down_proj.MatMul.weight": down, "cos_cache": torch.ones(4, 4),
        "model.layers.1.final_norm_layernorm.weight": bias[:64],
        "model.layers.0.attn.q_norm.layernorm.weight": bias[:16],
    }  # fmt: skip
    nodes = [
        built("/model/layers.0/attn/qkv_proj/MatMul", bits=4, block_size=32, K=64, N=128),
        built("/model/layers.0/mlp/down_proj/MatMul", "MatMul"),
    ]
    read = read_onnx_model(save(tmp_path / "model", nodes, tensors) / "model.onnx")
    low, high = bytes_ & 15, bytes_ >> 4
    codes = torch.stack([low, high], dim=-1).reshape(128, 2, 32).float()
    zero = torch.stack([zeros & 15, zeros >> 4], dim=-1).reshape(128, 2, 1)
    whole = ((codes - zero) * scales.reshape(128, 2, 1)).reshape(128, 64)
    holder = "model.layers.0.self_attn"
    for name, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        assert str(read.packed[f"{holder}.{name}_proj.weight"].format) == "int4-g32-asym-f32"
        assert torch.equal(read[f"{holder}.{name}_proj.weight"], whole[rows])
        assert torch.equal(read[f"{holder}.{name}_proj.bias"], bias[rows])
    assert torch.equal(read["model.layers.0.mlp.down_proj.weight"], down.t())
    assert torch.equal(read["model.norm.weight"], bias[:64])
    assert torch.equal(read[f"{holder}.q_norm.weight"], bias[:16])
    assert "cos_cache" not in read


def test_act_order_float_zero_points_and_ragged_groups(tmp_path: Path, random: torch.Generator):
    codes = torch.randint(0, 256, (8, 2, 32), generator=random).to(torch.uint8)
    scales = torch.rand(8, 2, generator=random)
    group = torch.tensor([1, 0] * 32, dtype=torch.int32)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "c", "s", "z", "g"], ["y"], name="/model/layers.0/mlp/up_proj/MatMulNBits",
        K=64, N=8, bits=8, block_size=32,
    )  # fmt: skip
    tensors = {"c": codes, "s": scales, "g": group, "z": torch.tensor([[3, 250]] * 8).to(torch.uint8)}
    name = "model.layers.0.mlp.up_proj.weight"
    item = read_onnx_model(save(tmp_path / "act", [node], tensors) / "model.onnx").packed[name]
    assert str(item.format) == "int8-g32-asym-f32-act"
    wanted = (codes.reshape(8, 64).float() - tensors["z"][:, group].float()) * scales[:, group]
    assert torch.equal(item.floats(), wanted)
    node.input[4] = ""
    node.attribute[0].i = 60  # K, the last group shorter
    for zeros, format in ((torch.full((8, 2), 7.5), "int8-g32-asym-fz-f32"), (torch.full((8, 2), 0.1), "None")):
        folder = save(tmp_path / "zero", [node], {**tensors, "z": zeros})
        item = read_onnx_model(folder / "model.onnx").packed[name]
        assert str(item.format) == format
        wanted = (codes.reshape(8, 2, 32).float() - zeros[..., None]) * scales[..., None]
        assert torch.equal(item.floats(), wanted.reshape(8, 64)[:, :60])


def first(model: Any, name: str = "model.embed_tokens.weight") -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def place(key: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        next(pair for pair in first(model).external_data if pair.key == key).value = value

    return change


def number(op: str, name: str, value: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        node = next(node for node in model.graph.node if node.op_type == op)
        next(attribute for attribute in node.attribute if attribute.name == name).i = value

    return change


def twice(model: Any) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


DAMAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "outside": (place("location", "../secret"), "it must be one in the model's folder"),
    "absolute": (place("location", "/etc/passwd"), "it must be one in the model's folder"),
    "absent": (place("location", "other.data"), "it must be one in the model's folder"),
    "link": (place("location", "link.data"), "it must be one in the model's folder"),
    "beyond": (place("offset", "99999999"), "must be there; download it again"),
    "negative": (place("offset", "-4"), "must be there"),
    "huge": (place("offset", "9" * 400), "must be there"),
    "length": (place("length", "12"), "must be there"),
    "shape": (lambda model: first(model).dims.extend([1 << 62]), "no tensor can be"),
    "twice": (twice, "is there twice"),
    "bits": (number("MatMulNBits", "bits", 3), "2, 4 or 8 bits"),
    "block": (number("MatMulNBits", "block_size", 24), "a power of two from 16"),
    "rows": (number("MatMulNBits", "N", 1 << 40), "its node's numbers want"),
    "empty": (lambda model: model.graph.ClearField("node"), "a graph without nodes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_graphs_are_refused(kind: str, written: Path, tmp_path: Path):
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    (folder / "link.data").symlink_to(tmp_path / "secret")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change, said = DAMAGE[kind]
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=25)
@given(place=st.integers(0, 1 << 20), byte=st.integers(0, 255), cut=st.integers(0, 1 << 20))
def test_bytes_changed_and_cut_off(
    place: int, byte: int, cut: int, written: Path, tmp_path_factory: pytest.TempPathFactory
):
    good = (written / "model.onnx").read_bytes()
    changed = bytearray(good)
    changed[place % len(good)] = byte
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "model.onnx.data").symlink_to(folder / "data")
    shutil.copy(written / "model.onnx.data", folder / "data")
    (folder / "model.onnx").write_bytes(changed[: cut % len(good) or None] if cut % 3 == 0 else changed)
    shutil.copy(written / "config.json", folder)
    with contextlib.suppress(CheckpointError):
        read = read_onnx_model(folder / "model.onnx")
        assert all(read[name].shape == torch.Size(read.entries[name].spec.shape) for name in read)


def test_what_a_folder_lacks_is_said(written: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    shutil.copy(folder / "model.onnx", folder / "other.onnx")
    assert open_source(folder).origins  # model.onnx goes first
    (folder / "model.onnx").rename(folder / "third.onnx")
    with pytest.raises(CheckpointError, match=r"other.onnx, third.onnx; a model folder must hold one graph"):
        open_source(folder)
    (folder / "third.onnx").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json beside other.onnx"):
        read_onnx_model(folder / "other.onnx")


def test_inspect_names_the_kind_and_what_is_wrong(written: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    runner = CliRunner()
    said = json.loads(runner.invoke(build_app(), ["inspect", str(folder), "--verify", "--json"]).stdout)
    assert said["export"] == "onnx"
    assert [finding["where"] for finding in said["findings"]] == ["transformers and vLLM"]
    (folder / "whit.json").unlink()
    facts = json.loads(runner.invoke(build_app(), ["inspect", str(folder), "--json"]).stdout)
    assert facts["quant_method"] == "onnx"
    assert facts["dtypes"]["U8"]["tensors"] == 14
    assert facts["files"] == ["model.onnx", "model.onnx.data"]
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    scales = first(model, "model.layers.0.attn.q_proj.MatMul.weight_scales")
    places = {pair.key: int(pair.value) for pair in scales.external_data if pair.key != "location"}
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(places["offset"])
        file.write(b"\xff" * 8)
    number("MatMulNBits", "K", 32)(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    first_node = "/model/layers.0/attn/q_proj/MatMul_Q4"
    problems = [str(finding) for finding in lint_onnx(folder / "model.onnx") if finding.kind == "problem"]
    assert len(problems) == 1
    assert first_node in problems[0]
    number("MatMulNBits", "K", 64)(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    problems = [str(finding) for finding in lint_onnx(folder / "model.onnx") if finding.kind == "problem"]
    assert "2 of 128 are not finite" in problems[0]
