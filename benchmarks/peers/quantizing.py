"""Run in the peer's own environment: quantize, and write what the codes stand for as an ordinary checkpoint."""

from __future__ import annotations

import gc
import importlib
import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from adapters import Job, check_weights
from catalogue import Row
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Quantize by `task`, write `task["out"]`; returns seconds of the call alone and peak memory."""
    model, out, row = Path(task["model"]), Path(task["out"]), Row(**task["row"])
    tokens, sha256 = read_tokens(Path(task["tokens"]), task["seed"])
    job = Job(model, tokens, row, task["device"], task["options"], task["seed"])
    adapter = importlib.import_module(f"adapters.{task['adapter']}")
    _reset_peaks()
    try:
        weights, took = adapter.quantize(job)
        peaks = _peaks()
        original = load_file(model / "model.safetensors")
        weights = {name: weights[name].to(torch.bfloat16).contiguous().cpu() for name in original}
        changed = check_weights(original, weights, row)
        out.mkdir(parents=True, exist_ok=True)
        for file in (*model.glob("*.json"), *model.glob("*.jinja")):
            shutil.copy(file, out)
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    shape = list(tokens.shape)
    return {**asdict(took), **peaks, "matrices": changed, "tokens": shape, "tokens_sha256": sha256} | versions(adapter)


def read_tokens(folder: Path, seed: int) -> tuple[torch.Tensor, str]:
    """int64 (samples, context) and their hash."""
    with safe_open(folder / f"seed{seed}.safetensors", "pt") as file:
        return file.get_tensor("tokens").long(), file.metadata()["sha256"]


def versions(adapter: Any) -> dict[str, Any]:
    """What ran."""
    return {"peer_version": adapter.version(), "torch": torch.__version__}


def _reset_peaks() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak of resident memory starts anew
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peaks() -> dict[str, float]:
    status = Path("/proc/self/status").read_text().split()
    resident = int(status[status.index("VmHWM:") + 1]) if "VmHWM:" in status else _most()
    gpu = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
    return {"peak_mb": resident / 1e3, "gpu_peak_mb": gpu}


def _most() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
