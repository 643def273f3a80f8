"""MODEL, as a user types it, to a folder or file on this machine: a local path or a hub id through huggingface_hub."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from whit.checkpoint.choice import choose, models_of
from whit.data import resolve_model as shipped_model
from whit.errors import CheckpointError, reason_of

SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "LICEN[CS]E*", "NOTICE*"]
COPIES = ["original/*", "consolidated*"]  # the same weights once more, as their makers' own programs read them
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")  # no hub id ends so
HUB_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^\s:@]+))?(?::(?P<file>[^\s:]+))?")


@dataclass(frozen=True)
class HubName:
    """`repo@revision:file`: a model of the hub, at a branch, tag or commit; of several .gguf files one, by its type."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubName | None:
        """None for what is not a name on the hub."""
        found = HUB_ID.fullmatch(name)
        if found is None or name.startswith(".") or Path(found["repo"]).suffix in FILES:
            return None
        return cls(found["repo"], found["revision"], found["file"])


def resolve_model(model: str | Path, trust_remote_code: bool = False, weights: bool = True) -> Path:
    """The folder that holds MODEL, or the .gguf file that it is; a hub id is downloaded (HF_HUB_OFFLINE is respected),
    without its weight files where no `weights` are asked for.

    `org/name@REV` is a revision of the hub's; `org/name:Q4_K_M` and `FOLDER:Q4_K_M` one of several .gguf files there.
    `whit:model` is the model that ships with the package.
    """
    if not str(model):
        raise CheckpointError("MODEL: no such folder, the name is empty; name a model folder or a hub id")
    here = _local(shipped_model(str(model)))
    if here is not None:
        return here
    named = HubName.parse(str(model))
    if named is None:
        raise CheckpointError(
            f"{model}: no such folder or file; a model is a folder, a .gguf file or a hub id such as org/name; "
            "check the path"
        )
    try:
        return _fetched(named, trust_remote_code, weights)
    except (HFValidationError, HTTPError, OSError) as error:
        raise CheckpointError(f"{model}: {_why(error)}") from None


def at_revision(model: str, revision: str | None) -> str:
    """MODEL's name with a branch, tag or commit of the hub's in it; CheckpointError if the hub has no such names."""
    if revision is None:
        return model
    if _local(shipped_model(model)) is not None:
        raise CheckpointError(f"{model}: is on this machine; only models on the hub have revisions; drop --revision")
    named = HubName.parse(model)
    if named is None or named.revision is not None or HubName.parse(f"{named.repo}@{revision}") is None:
        raise CheckpointError(
            f"{model} --revision {revision}: no revision of the hub can be named so; MODEL must be org/name, and "
            "REV a branch, tag or commit; correct one of them"
        )
    return f"{named.repo}@{revision}" + (f":{named.file}" if named.file else "")


def hub_name(model: str | Path) -> HubName | None:
    """MODEL's name on the hub; None where it lies on this machine."""
    return HubName.parse(str(model)) if _local(shipped_model(str(model))) is None else None


def _local(model: str) -> Path | None:
    """What is meant on this machine; None where nothing here is called so."""
    path = Path(os.path.expanduser(model))  # Path's own raises where there is no such user
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{model}: is an adapter; MODEL must be a whole model; name the adapter's, or join the two with whit merge"
        )
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        files = [] if any(path.glob("*.safetensors")) or any(path.glob("*.onnx")) else _gguf_files(path)
        return path / choose(files, None, model)[0] if models_of(files) else path
    if path.exists():
        raise CheckpointError(
            f"{model}: is a file; a model is a folder with config.json and safetensors, or a .gguf file; give one"
        )
    folder, colon, file = model.rpartition(":")
    place = Path(os.path.expanduser(folder))
    if not (colon and place.is_dir()):
        return None
    return place / choose(_gguf_files(place), file, folder)[0]


def _gguf_files(folder: Path) -> list[str]:
    """Of a folder and those right below it, where the hub's makers put files in parts."""
    found = [*folder.glob("*.gguf"), *folder.glob("*/*.gguf")]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def _fetched(named: HubName, trust_remote_code: bool, weights: bool) -> Path:
    """The hub's files on this machine: a folder of safetensors, or a .gguf file."""

    def fetch(wanted: list[str]) -> Path:
        return Path(
            snapshot_download(named.repo, revision=named.revision, allow_patterns=wanted, ignore_patterns=COPIES)
        )

    wanted = [*SMALL, *["*.safetensors"] * (weights and named.file is None), *["*.py"] * trust_remote_code]
    folder = fetch(wanted)
    if named.file is None and any(folder.glob("*.safetensors")):
        return folder
    files = _listed(named, folder)
    if named.file is None and (any(file.endswith(".safetensors") for file in files) or not models_of(files)):
        return folder
    place = named.repo if named.revision is None else f"{named.repo}@{named.revision}"
    parts = choose(files, named.file, place)
    return fetch([glob.escape(part) for part in parts]) / parts[0]


def _listed(named: HubName, folder: Path) -> list[str]:
    """All files of a model on the hub; those that lie here, where the hub cannot be reached."""
    try:
        return [*list_repo_files(named.repo, revision=named.revision)]
    except (HTTPError, OSError):  # what is here is what can be had
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _why(error: Exception) -> str:
    """Why the hub gives no such model, and what to do."""
    if isinstance(error, GatedRepoError):
        return "the hub keeps it for accounts that have accepted its terms; accept them there and run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "neither a folder here nor a model of the hub; check the name, or run hf auth login if it is private"
    if isinstance(error, RevisionNotFoundError):
        return "the hub's model has no such revision; it must be a branch, tag or commit of it; check its name"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "neither a folder here nor in the hub's cache on this machine, and the hub cannot be reached; "
            "check the name, the network and HF_HUB_OFFLINE"
        )
    return f"neither a folder here nor a model that the hub gives ({reason_of(error)}); check the name and the network"
