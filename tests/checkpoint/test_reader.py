"""Damaged and hostile files are one sentence; sound ones read as the safetensors library reads them."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from whit.checkpoint.header import read_header
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.reader import INDEX, Checkpoint
from whit.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "codes": torch.arange(3, dtype=torch.uint8),
}


def file_of(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


U8 = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HOSTILE = {
    "empty": (b"", "header claims"),
    "shorter than its length field": (b"\x01\x00", "header claims"),
    "header beyond the file": (file_of({}, length=1 << 20), "header claims 1048576 bytes"),
    "absurd header": (file_of({}, length=(1 << 64) - 1), "header claims 18446744073709551615 bytes"),
    "not JSON": (file_of(b"{nonsense}"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff\xfe": 1}'), "not JSON"),
    "deeply nested": (file_of(b"[" * 100_000), "not JSON"),
    "a list": (file_of(b"[]"), "not a JSON object"),
    "truncated data": (file_of({"a": tensor()}, b"1234"), "truncated"),
    "left-over data": (file_of({"a": tensor()}, b"123456789"), "1 bytes after the last tensor"),
    "overlap": (file_of({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"0" * 12), "overlaps"),
    "hole": (file_of({"a": tensor(), "b": tensor(offsets=(12, 20))}, b"0" * 20), "leaves a hole"),
    "negative offset": (file_of({"a": tensor(offsets=(-8, 0))}), "must be lists of counts"),
    "huge shape": (file_of({"a": tensor(shape=(1 << 40, 1 << 40))}, b"0" * 8), "must be lists of counts"),
    "offsets against the shape": (file_of({"a": tensor(shape=(3,))}, b"0" * 8), "needs 12 bytes"),
    "three offsets": (file_of({"a": tensor(offsets=(0, 4, 8))}, b"0" * 8), "data_offsets"),
    "float shape": (file_of({"a": tensor(shape=(2.0,))}, b"0" * 8), "must be lists of counts"),
    "bool shape": (file_of({"a": tensor(shape=(True, 2))}, b"0" * 8), "must be lists of counts"),
    "unknown dtype": (file_of({"a": tensor(dtype="F13")}, b"0" * 8), "'F13'"),
    "dtype of another type": (file_of({"a": tensor(dtype=["F32"])}, b"0" * 8), "dtype"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}, b"0" * 8), "no valid shape and data_offsets"),
    "entry is a number": (file_of({"a": 3}), "no valid shape"),
    "the same name twice": (file_of(b'{"a":' + U8 + b',"a":' + U8 + b"}", b"1"), "a is listed twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_sentence(case: str, tmp_path: Path):
    content, expected = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


@given(data=st.data())
def test_no_flipped_header_byte_does_worse_than_an_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    content = bytearray(save(TENSORS))
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(content)
    try:
        checkpoint = Checkpoint(path.parent)
    except CheckpointError:
        return
    for name in checkpoint:  # a flip in a name or in a dtype of the same width is a valid file
        assert checkpoint[name].numel() * checkpoint[name].element_size() <= len(content)
    checkpoint.close()


def test_tensors_are_read_as_the_library_reads_them(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(theirs)
        for name, expected in theirs.items():
            assert checkpoint[name].dtype == expected.dtype
            assert torch.equal(checkpoint[name], expected)


def sharded(folder: Path) -> dict[str, str]:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_are_one_mapping(tmp_path: Path):
    sharded(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert {name: checkpoint[name].tolist() for name in checkpoint} == {"a": [1, 1], "b": [0, 0]}


def test_all_missing_shards_are_named_at_once(tmp_path: Path):
    weight_map = sharded(tmp_path)
    for name in weight_map.values():
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002.safetensors, model-00002-of-00002"):
        Checkpoint(tmp_path)


def test_a_shard_that_the_index_does_not_know(tmp_path: Path):
    sharded(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003.safetensors is not in"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"c": "model-00001-of-00002.safetensors"}, r"c .listed in model-00001"),
        ({"b": "model-00001-of-00002.safetensors"}, r"model-00002-of-00002.safetensors is not in"),
        ({"a": "../secret.safetensors"}, r"must be a .*beside it"),
        ({"a": "model.bin"}, r"must be a .*beside it"),
    ],
)
def test_an_index_that_is_wrong(change: dict, expected: str, tmp_path: Path):
    weight_map = sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | change}))
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint(tmp_path)


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path):
    sharded(tmp_path)
    save_file({"a": torch.ones(2), "extra": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"extra .in model-00001-of-00002.safetensors, not listed"):
        Checkpoint(tmp_path)


def test_two_models_in_one_folder(tmp_path: Path):
    """transformers loads model.safetensors then, and the index was read here: two models under one name."""
    sharded(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both model.safetensors and .*; remove the other"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path):
    sharded(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"b is in model-00001-of-00002.safetensors and model-00002"):
        Checkpoint(tmp_path)


def test_pickles_are_refused(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, which whit never opens"):
        Checkpoint(tmp_path)


def test_one_file_of_another_name_is_enough(tmp_path: Path):
    save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert set(Checkpoint(tmp_path)) == {"a"}
    save_file({"b": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="shards need their index"):
        Checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    checkpoint = Checkpoint(tmp_path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="must not change"):
        checkpoint["a"]


def test_a_header_says_where_tensors_lie(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["a.weight"]
    content = (tmp_path / "model.safetensors").read_bytes()
    assert content[entry.start : entry.stop] == TENSORS["a.weight"].numpy().tobytes()


def test_models_that_are_neither_here_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Cannot reach the hub: offline mode is enabled.\nMore words.")

    monkeypatch.setattr("whit.checkpoint.hub.snapshot_download", offline)
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    for model, expected in (
        ("org/name", r"org/name: neither a folder here nor a model that the hub gives .Cannot reach the hub"),
        ("./no/such/folder", "no such folder"),
        ("model.gguf", r"model.gguf: no such folder or file; .* check the path"),
        ("a b", "no such folder"),
        ("", "no such folder"),
        ("~no-such-user/model", "no such folder"),
        (str(tmp_path / "file.txt"), "is a file"),
        (str(tmp_path / "adapter"), "is an adapter; .* whit merge"),
    ):
        with pytest.raises(CheckpointError, match=expected) as caught:
            resolve_model(model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (LocalEntryNotFoundError, "nor in the hub's cache on this machine, and the hub cannot be reached"),
        (RepositoryNotFoundError, "nor a model of the hub; check the name, or run hf auth login"),
        (GatedRepoError, "accounts that have accepted its terms"),
    ],
)
def test_why_the_hub_gives_no_model(kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> str:
        raise kind.__new__(kind, "Cannot find it. To enable look-ups, set this.")  # without an answer of the hub's

    monkeypatch.setattr("whit.checkpoint.hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=f"^org/name: .*{said}") as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_without_pickles_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(name: str, revision: None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, set(allow_patterns)))
        assert "consolidated*" in ignore_patterns  # some carry their weights twice
        return str(tmp_path)

    monkeypatch.setattr("whit.checkpoint.hub.snapshot_download", download)
    monkeypatch.setattr("whit.checkpoint.hub.list_repo_files", lambda *_, **__: ["model.safetensors"])
    assert resolve_model("org/name") == tmp_path
    resolve_model("org/name", trust_remote_code=True)
    resolve_model("org/name", weights=False)
    (name, plain), (_, trusted), (_, small) = asked
    assert plain - small == {"*.safetensors"}
    assert name == "org/name"
    assert "*.safetensors" in plain
    for file in ("LICENSE", "LICENCE.md", "NOTICE", "1_Pooling/config.json"):  # they go with what is made of the model
        assert any(fnmatch(file, pattern) for pattern in small), file
    assert not {"*.bin", "*.pt", "*.py"} & plain
    assert trusted - plain == {"*.py"}


def test_tensors_far_into_a_large_file(tmp_path: Path):
    path, size = tmp_path / "large.safetensors", 5 << 30  # of holes, which take no room on the disk
    header = {
        "first": {"dtype": "U8", "shape": [size - 4], "data_offsets": [0, size - 4]},
        "last": {"dtype": "U8", "shape": [4], "data_offsets": [size - 4, size]},
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    assert read_header(path)["last"].stop == path.stat().st_size
