"""MODEL as it is typed: revisions of the hub, one .gguf file of several, and models in several files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError
from typer.testing import CliRunner

import whit
from whit.checkpoint.choice import choose
from whit.checkpoint.hub import at_revision, resolve_model
from whit.cli import build_app
from whit.errors import CheckpointError, WhitError
from whit.evaluation import EvaluationOptions, evaluate
from whit.evaluation.size import weight_files
from whit.pipeline.job import Options, prepare
from whit.pipeline.transcode import prepare_transcode

FILES = (
    "README.md", "config.json", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.q8_0.gguf", "m-UD-Q4_K_XL.gguf", "mmproj-F16.gguf",
    "BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf", "imatrix.gguf",
)  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Q4_K_M", ("m-Q4_K_M.gguf",)),
        ("q4_k_m", ("m-Q4_K_M.gguf",)),
        ("Q8_0", ("m.q8_0.gguf",)),
        ("UD-Q4_K_XL", ("m-UD-Q4_K_XL.gguf",)),
        ("Q4_K_XL", ("m-UD-Q4_K_XL.gguf",)),
        ("m-Q4_K_S.gguf", ("m-Q4_K_S.gguf",)),
        ("BF16", ("BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf")),
    ],
)
def test_a_type_names_one_file_of_several(wanted: str, found: tuple[str, ...]):
    assert choose(FILES, wanted, "org/m") == found


@pytest.mark.parametrize(
    ("files", "wanted", "said"),
    [
        (FILES, "Q9_K", "org/m:Q9_K: no file there of that type; .* name org/m:BF16 or org/m:Q4_K_M or org/m:Q4_K_S"),
        (FILES, "4_K_M", "no file there of that type"),
        (FILES, None, "org/m: holds 5 .gguf files; one must be chosen; name org/m:BF16 or"),
        (("a-Q4_0.gguf", "b-Q4_0.gguf"), "Q4_0", "2 files there of that type; .* name org/m:a-Q4_0 or org/m:b-Q4_0"),
        (("model.safetensors",), "Q4_0", "holds no .gguf file of a model; .* drop :Q4_0"),
        (tuple(f"m{i}.gguf" for i in range(20)), "Q4_0", "name org/m:m0 or .*, or one of 8 more$"),
    ],
)
def test_what_no_one_file_is_meant_by(files: tuple[str, ...], wanted: str | None, said: str):
    with pytest.raises(CheckpointError, match=said):
        choose(files, wanted, "org/m")


class Hub:
    """huggingface_hub's two calls, over folders of this machine."""

    def __init__(self, cache: Path, revisions: Mapping[str | None, Path]) -> None:
        self.cache, self.revisions, self.offline = cache, revisions, False
        self.fetched: list[str] = []

    def snapshot_download(
        self, repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        snapshot = self.cache / "snapshots" / str(revision)
        if self.offline:
            return str(snapshot)
        if revision not in self.revisions:
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        for path in sorted(self.revisions[revision].rglob("*")):
            name = path.relative_to(self.revisions[revision]).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
                self.fetched.append(name)
        return str(snapshot)

    def list_repo_files(self, repo: str, revision: str | None) -> list[str]:
        if self.offline:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        folder = self.revisions[revision]
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """org/m: safetensors at main, .gguf files at v2."""
    files, plain = tmp_path / "files", tmp_path / "plain"
    for folder in (files, plain):
        folder.mkdir()
        (folder / "README.md").write_text("")
        shutil.copy(resolve_model("whit:model") / "config.json", folder)
    shutil.copy(resolve_model("whit:model") / "model.safetensors", plain)
    for name in ("q4_0", "q8_0"):
        whit.quantize("whit:model", files / f"m-{name.upper()}.gguf", name, export="gguf")
    found = Hub(tmp_path / "cache", {None: plain, "v2": files, "feature/x": plain})
    for name in ("snapshot_download", "list_repo_files"):
        monkeypatch.setattr(f"whit.checkpoint.hub.{name}", getattr(found, name))
    return found


def test_a_revision_and_a_type_are_asked_of_the_hub(hub: Hub, tmp_path: Path):
    assert resolve_model("org/m").name == "None"
    assert resolve_model("org/m@feature/x").parts[-2:] == ("feature", "x")
    hub.fetched.clear()
    assert resolve_model("org/m@v2:Q4_0").name == "m-Q4_0.gguf"
    assert "m-Q4_0.gguf" in hub.fetched
    assert "m-Q8_0.gguf" not in hub.fetched
    with pytest.raises(CheckpointError, match=r"org/m@v2: holds 2 .gguf files; .* name org/m@v2:Q4_0 or org/m@v2:Q8_0"):
        resolve_model("org/m@v2")
    with pytest.raises(CheckpointError, match=r"org/m@v3: the hub's model has no such revision; .* check its name"):
        resolve_model("org/m@v3")
    job = prepare("org/m@feature/x", tmp_path / "out", whit.Recipe("rtn", [("*", "int8")]), Options())
    assert job.model == "org/m@feature/x"  # which whit.json says
    hub.offline = True
    assert resolve_model("org/m@v2:Q4_0").name == "m-Q4_0.gguf"


def test_a_model_of_the_hub_is_measured_by_its_type(hub: Hub):
    result = evaluate("org/m@v2:Q8_0", EvaluationOptions(max_tokens=256))
    assert result.model == "org/m@v2:Q8_0"
    assert result.perplexity < 60
    assert 8 < result.bits_per_weight < 10


def test_revision_is_written_into_the_name():
    assert at_revision("org/m", None) == "org/m"
    assert at_revision("org/m", "refs/pr/3") == "org/m@refs/pr/3"
    assert at_revision("org/m:Q4_0", "v2") == "org/m@v2:Q4_0"


@pytest.mark.parametrize(
    ("model", "revision", "said"),
    [
        (".", "v2", r"^\.: is on this machine; .* drop --revision"),
        ("whit:model", "v2", "is on this machine"),
        ("org/m@v1", "v2", "org/m@v1 --revision v2: no revision of the hub can be named so"),
        ("org/m", "", "can be named so"),
        ("./no/such/folder", "v2", "can be named so"),
    ],
)
def test_a_revision_that_cannot_be_meant(model: str, revision: str, said: str):
    with pytest.raises(CheckpointError, match=said):
        at_revision(model, revision)


def test_a_folder_of_gguf_files(hub: Hub, tmp_path: Path):
    files = hub.revisions["v2"]
    assert resolve_model(f"{files}:q8_0") == files / "m-Q8_0.gguf"
    with pytest.raises(CheckpointError, match=r"files: holds 2 .gguf files; one must be chosen; name .*files:Q4_0 or"):
        resolve_model(files)
    (files / "m-Q8_0.gguf").rename(files / "mmproj-F16.gguf")
    assert resolve_model(files) == files / "m-Q4_0.gguf"
    plain = hub.revisions[None]
    shutil.copy(files / "m-Q4_0.gguf", plain)
    assert resolve_model(plain) == plain  # safetensors come first


def test_what_whit_wrote_into_a_folder_is_read_there(tmp_path: Path):
    whit.quantize("whit:model", tmp_path / "out", "q4_0", export="gguf")
    assert resolve_model(tmp_path / "out") == tmp_path / "out" / "model.gguf"
    job = prepare_transcode(tmp_path / "out", tmp_path / "plain", "whit", Options(), None)
    assert len(job.exact) == 57
    job.source.checkpoint.close()


def cut(file: Path, folder: Path) -> list[Path]:
    """The same model in parts, as gguf-py writes them."""
    gguf = pytest.importorskip("gguf")
    folder.mkdir(exist_ok=True)
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(folder / "m-Q4_0.gguf", "llama", split_max_tensors=30)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return sorted(folder.glob("*.gguf"))


def test_a_model_in_parts_is_the_model(tmp_path: Path):
    whit.quantize("whit:model", tmp_path / "m.gguf", "q4_0", export="gguf")
    parts = cut(tmp_path / "m.gguf", tmp_path / "parts")
    assert [part.name for part in parts] == [f"m-Q4_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    options = EvaluationOptions(max_tokens=256)
    whole, cut_up = (evaluate(str(name), options) for name in (tmp_path / "m.gguf", f"{tmp_path / 'parts'}:Q4_0"))
    assert cut_up.perplexity == whole.perplexity
    assert weight_files(parts[0]) == parts
    assert cut_up.size_bytes == sum(part.stat().st_size for part in parts)
    with pytest.raises(CheckpointError, match=r"is a part of a model; .* name m-Q4_0-00001-of-00003.gguf"):
        load(parts[1])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=r"00003-of-00003.gguf: has '.*' once more; it must be a part of"):
        load(parts[0])
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"of 3 parts 1 are not beside it, m-Q4_0-00003-of-00003.gguf the first"):
        load(parts[0])
    shutil.copy(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 parts; they must be named as llama.cpp does"):
        load(tmp_path / "alone.gguf")


def load(file: Path) -> Any:
    return prepare(file, file.parent / "out", None, Options())


COMMANDS = {
    "quantize": ["OUT", "--format", "int8"],
    "evaluate": [],
    "compare": ["OUT"],
    "generate": ["-p", "Once"],
    "finetune": ["DATA", "OUT"],
    "convert": ["OUT", "--export", "bf16"],
    "train": ["OUT", "--format", "int4-g32"],
    "imatrix": ["OUT"],
    "merge": ["DATA", "OUT"],
    "inspect": [],
    "memory": [],
    "bench": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_the_hub_for_a_revision(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str]] = []

    def refuse(repo: str, revision: str, **_: object) -> str:
        asked.append((repo, revision))
        raise LocalEntryNotFoundError("it is not here")

    def run(model: str) -> str:
        begin = [command, "model"] if command == "bench" else [command]
        words = [str(tmp_path / word) if word in ("OUT", "DATA") else word for word in COMMANDS[command]]
        result = CliRunner().invoke(build_app(), [*begin, model, *words, "--revision", "v2"])
        assert isinstance(result.exception, WhitError), result.output
        return str(result.exception)

    monkeypatch.setattr("whit.checkpoint.hub.snapshot_download", refuse)
    assert "neither a folder here nor in the hub's cache" in run("org/m")
    assert set(asked) == {("org/m", "v2")}
    assert "drop --revision" in run("whit:model")
