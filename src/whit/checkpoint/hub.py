"""MODEL, as a user types it, to a folder on this machine: a local path or a hub id through huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from whit.data import resolve_model as shipped_model
from whit.errors import CheckpointError, reason_of

SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "LICEN[CS]E*", "NOTICE*"]
COPIES = ["original/*", "consolidated*"]  # the same weights once more, as their makers' own programs read them
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")  # no hub id ends so
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str | Path, trust_remote_code: bool = False, weights: bool = True) -> Path:
    """The folder that holds MODEL, or the .gguf file that it is; a hub id is downloaded (HF_HUB_OFFLINE is respected),
    without its weight files where no `weights` are asked for.

    `whit:model` is the model that ships with the package.
    """
    if not str(model):
        raise CheckpointError("MODEL: no such folder, the name is empty; name a model folder or a hub id")
    path = Path(os.path.expanduser(shipped_model(str(model))))  # Path's own raises where there is no such user
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{model}: is an adapter; MODEL must be a whole model; name the adapter's, or join the two with whit merge"
        )
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise CheckpointError(
            f"{model}: is a file; a model is a folder with config.json and safetensors, or a .gguf file; give one"
        )
    if not HUB_ID.fullmatch(str(model)) or str(model).startswith(".") or path.suffix in FILES:
        raise CheckpointError(
            f"{model}: no such folder or file; a model is a folder, a .gguf file or a hub id such as org/name; "
            "check the path"
        )
    try:
        wanted = [*SMALL, *["*.safetensors"] * weights, *["*.py"] * trust_remote_code]
        return Path(snapshot_download(str(model), allow_patterns=wanted, ignore_patterns=COPIES))
    except (HFValidationError, HTTPError, OSError) as error:
        raise CheckpointError(f"{model}: {_why(error)}") from None


def _why(error: Exception) -> str:
    """Why the hub gives no such model, and what to do."""
    if isinstance(error, GatedRepoError):
        return "the hub keeps it for accounts that have accepted its terms; accept them there and run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "neither a folder here nor a model of the hub; check the name, or run hf auth login if it is private"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "neither a folder here nor in the hub's cache on this machine, and the hub cannot be reached; "
            "check the name, the network and HF_HUB_OFFLINE"
        )
    return f"neither a folder here nor a model that the hub gives ({reason_of(error)}); check the name and the network"
