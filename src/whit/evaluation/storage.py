"""A baseline's logits on disk, so that the baseline and the model need not be in memory at once.

One safetensors file for each forward pass, in the dtype that the baseline computes in: nothing is rounded, so the
figures equal those of two live models bit for bit. A token costs vocabulary x 2 bytes (bfloat16, float16) or x 4.
The folder's name is a hash of everything that the logits depend on; a killed pass goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from whit.checkpoint.files import write_tensors
from whit.checkpoint.writer import file_sha256
from whit.errors import EvaluationError, OutputError
from whit.evaluation.listener import Listener
from whit.evaluation.perplexity import batches, next_token_logits
from whit.evaluation.size import weight_files


@dataclass(frozen=True)
class StoredBaseline:
    """Logits of the model `name` that `store_baseline` wrote."""

    folder: Path
    name: str

    def logits(self, index: int, batch: Tensor) -> Tensor:
        """Read batch number `index`. Raises EvaluationError for a damaged or foreign file."""
        path = self.folder / _file_name(index)
        try:
            logits: Tensor = load_file(path)["logits"]
        except (OSError, KeyError, SafetensorError) as error:
            raise EvaluationError(f"{path}: cannot be read ({error}); delete the file and run again") from error
        most = batch.shape[0] * (batch.shape[1] - 1)
        if logits.shape[0] not in (most, batch.shape[0] * -(-batch.shape[1] // 2)):  # an encoder reads the first half
            raise EvaluationError(f"{path}: holds {logits.shape[0]} rows, not {most}; delete the file and run again")
        return logits


def baseline_key(model_files: Path, windows: Tensor, dtype: str, device: str) -> str:
    """A name for the logits: weights, configuration, windows, dtype, device and torch version, hashed."""
    digest = hashlib.sha256()
    config = model_files / "config.json"
    for path in [*weight_files(model_files), *([config] if config.is_file() else [])]:
        digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    digest.update(f"{tuple(windows.shape)}\0{dtype}\0{device}\0{torch.__version__}\0".encode())
    digest.update(windows.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def is_complete(folder: Path, windows: Tensor, on_gpu: bool) -> bool:
    """Whether every batch is stored; each file appears whole or not at all."""
    return all((folder / _file_name(index)).is_file() for index in range(len(batches(windows, on_gpu))))


def bytes_needed(windows: Tensor, vocabulary: int, element_size: int) -> int:
    """The size on disk of all logits, headers aside, or more: one that an encoder reads has none."""
    return windows.shape[0] * (windows.shape[1] - 1) * vocabulary * element_size


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError before the pass, not in the middle of it."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder}: the baseline's logits take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "use --max-tokens, or --baseline-cache on a larger disk"
        )


def store_baseline(model: Any, windows: Tensor, folder: Path, listener: Listener) -> None:
    """Run the baseline over all windows; batches already stored are not run again."""
    done = 0
    for index, batch in enumerate(batches(windows, model.device.type == "cuda")):
        path = folder / _file_name(index)
        if not path.is_file():
            logits = next_token_logits(model, batch).contiguous().cpu()
            write_tensors(path, {"logits": logits})
        done += batch.shape[0]
        listener.step("baseline", done, windows.shape[0], batch.numel())


def _file_name(index: int) -> str:
    return f"{index:06d}.safetensors"
