"""MODEL, as a user types it, to a folder on this machine: a local path or a hub id through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from whit.data import resolve_model as shipped_model
from whit.errors import CheckpointError

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str | Path, trust_remote_code: bool = False) -> Path:
    """The folder that holds MODEL, or the .gguf file that it is; a hub id is downloaded (HF_HUB_OFFLINE is respected).

    `whit:model` is the model that ships with the package.
    """
    path = Path(shipped_model(str(model))).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise CheckpointError(
            f"{model}: is a file; a model is a folder with config.json and safetensors, or a .gguf file; give one"
        )
    if not HUB_ID.fullmatch(str(model)) or str(model).startswith("."):
        raise CheckpointError(
            f"{model}: no such folder; a model is a folder or a hub id such as org/name; check the path"
        )
    try:
        return Path(snapshot_download(str(model), allow_patterns=PATTERNS + ["*.py"] * trust_remote_code))
    except (HFValidationError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"{model}: neither a folder here nor a model that the hub gives ({reason}); check the name and the network"
        ) from None
