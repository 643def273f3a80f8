"""One candidate, made and measured; each in a process of its own, so that one failure is a row that says why.

    python -m whit.report.work make|measure|bandwidth     an Order as JSON in, the findings as JSON out

`make` quantizes (its seconds and memory are of that process), `measure` loads the result and measures memory and
quality; speeds are taken in turns (report/turns.py). Nothing else is printed on standard output.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from whit.calibration import Calibration
from whit.data import resolve_text
from whit.devices import find_device
from whit.errors import WhitError
from whit.evaluation import EvaluationOptions, evaluate
from whit.evaluation.size import measure_size
from whit.integrations.loading import load_causal_lm, load_config, model_files
from whit.pipeline import quantize
from whit.pipeline.coverage import load_account
from whit.pipeline.job import Options
from whit.process import process_memory
from whit.recipe import Recipe
from whit.report.candidates import Entrant
from whit.report.machine import read_bandwidth
from whit.report.peers import find_peer, held_bytes, load_peer
from whit.report.speed import SpeedOptions, touch

BYTES_PER_TOKEN = 2  # of text; fewer than any tokenizer needs of what people write
SHARE = 0.25  # of the free disk, for logits


@dataclass(frozen=True)
class Order:
    """Everything that a process needs to know. `place` is the folder for the quantized model.

    `logits` is a folder where the original's logits are kept for all candidates; None: the original runs each time.
    """

    model: str
    entrant: Entrant
    place: str
    evaluation: EvaluationOptions
    speed: SpeedOptions | None
    calibration: Calibration
    seed: int = 0
    threads: int | None = None
    logits: str | None = None

    def to_json(self) -> str:
        """For the standard input of another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Order:
        """The inverse."""
        raw = json.loads(text)
        evaluation = raw["evaluation"]
        for key in ("task_data", "baseline_cache"):
            evaluation[key] = Path(evaluation[key]) if evaluation[key] else None
        evaluation["tasks"] = tuple(evaluation["tasks"])
        parts = {
            "entrant": Entrant(**raw["entrant"]),
            "evaluation": EvaluationOptions(**evaluation),
            "speed": SpeedOptions(**raw["speed"]) if raw["speed"] else None,
            "calibration": Calibration(**raw["calibration"]),
        }
        return cls(**{**raw, **parts})

    @property
    def files(self) -> str:
        """Where the candidate's files lie: the original, a checkpoint, or what `make` wrote."""
        return {"original": self.model, "peer": self.model, "checkpoint": self.entrant.format}.get(
            self.entrant.kind, self.place
        )


def make(order: Order) -> dict[str, Any]:
    """Quantize with whit; a finished result is used again."""
    recipe = order.entrant.recipe
    calibration = order.calibration if recipe.needs_text else None
    device = order.evaluation.device if recipe.needs_stats else "cpu"
    options = Options(seed=order.seed, device=device, trust_remote_code=order.evaluation.trust_remote_code)
    start = time.process_time()
    account = quantize(order.model, order.place, recipe, calibration=calibration, options=options)
    return {
        "seconds": account.seconds, "peak_memory_bytes": account.peak_memory_bytes,
        "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def measure(order: Order) -> dict[str, Any]:
    """Load, then memory before anything else is in the process, then quality against the original."""
    before = process_memory()
    start, processor = time.monotonic(), time.process_time()
    network = load(order)
    found: dict[str, Any] = {"load_seconds": time.monotonic() - start}
    if order.entrant.kind == "peer":  # it quantizes while it loads
        found["made"] = {"seconds": found["load_seconds"], "cpu_seconds": time.process_time() - processor}
    touch(network, order.speed or SpeedOptions())
    found |= _memory(before)
    options = replace(order.evaluation, baseline=order.model, baseline_cache=_logits(order, network))
    result = evaluate(order.files, options, _Lines(order.entrant.label), network)
    found |= {key: value for key, value in result.to_json().items() if key != "model"}  # a place on this machine
    found["notes"] = [note for note in result.notes if not note.startswith("baseline: its logits")]  # places again
    found |= _about(order, network)
    found["perplexity_stderr"] = result.perplexity_stderr
    return found


def bandwidth(order: Order) -> dict[str, Any]:
    """Bytes per second at which this machine reads memory."""
    return {"read": read_bandwidth(order.evaluation.device)}


def load(order: Order) -> Any:
    """The candidate as a model, by whit or by its own library."""
    peer = find_peer(order.entrant.label) if order.entrant.kind == "peer" else None
    if peer is not None:
        return load_peer(peer, str(model_files(order.model)), find_device(order.evaluation.device).type)
    e = order.evaluation
    return load_causal_lm(order.files, device=e.device, dtype=e.dtype, trust_remote_code=e.trust_remote_code)


def _logits(order: Order, network: Any) -> Path | None:
    """Where the original's logits are kept for all candidates; None where the disk has no room to spare for them."""
    if order.logits is None:
        return None
    place = Path(order.logits)
    place.mkdir(parents=True, exist_ok=True)
    most = order.evaluation.max_tokens or resolve_text(order.evaluation.text).stat().st_size // BYTES_PER_TOKEN
    needed = most * network.config.get_text_config().vocab_size * torch.float32.itemsize
    return place if needed < shutil.disk_usage(place).free * SHARE else None


def _about(order: Order, network: Any) -> dict[str, Any]:
    """Size, recipe, provenance and, for whit's own, the error of every layer."""
    if order.entrant.kind == "peer":
        return _peer_size(order, network)
    folder = model_files(order.files)
    if not (folder / "whit.json").is_file():
        return {}
    account = load_account(folder)
    layers = [
        {"name": e.name, "format": e.format, "relative_error": e.relative_error, "proxy_loss": e.proxy_loss}
        for e in account.parameters
        if e.status == "quantized"
    ]
    recipe = Recipe.from_dict(account.recipe).to_toml() if account.recipe is not None else None
    provenance = {
        "whit": account.version, "seed": account.seed, "source": dict(account.source), "files": dict(account.files),
        "calibration": account.calibration, "libraries": dict(account.libraries),
    }  # fmt: skip
    made = {"seconds": account.seconds, "peak_memory_bytes": account.peak_memory_bytes}
    return {"layers": layers, "recipe": recipe, "provenance": provenance, "made": made}


def _peer_size(order: Order, network: Any) -> dict[str, Any]:
    """Bytes of what the peer saves; where it cannot save, of what it holds in memory, and a note."""
    parameters = measure_size(model_files(order.model), load_config(order.model)).parameters
    with tempfile.TemporaryDirectory(prefix="whit-peer-") as folder:
        try:
            network.save_pretrained(folder)
            files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.gguf")]
            size = sum(file.stat().st_size for file in files)
        except Exception as error:  # peers raise whatever they like
            size, said = held_bytes(network), f"not saved ({type(error).__name__}): size is that in memory"
        else:
            said = ""
    about: dict[str, Any] = {"size_bytes": size, "bits_per_weight": 8 * size / parameters}
    return about | ({"size_note": said} if said else {})


def _memory(before: int) -> dict[str, int]:
    """Bytes that the model added to the process, and the most that the process held (of the GPU, where it runs)."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return {
            "memory_loaded_bytes": torch.cuda.memory_allocated(),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(),
        }
    return {"memory_loaded_bytes": max(process_memory() - before, 0), "memory_peak_bytes": process_memory("VmHWM")}


class _Lines:
    """Progress as plain lines on standard error, where the parent hears them."""

    def __init__(self, label: str) -> None:
        self.label = label

    def step(self, what: str, done: int, total: int, tokens: int) -> None:
        print(f"{self.label}: {what} {done}/{total}", file=sys.stderr, flush=True)

    def note(self, sentence: str) -> None:
        print(f"{self.label}: {sentence}", file=sys.stderr, flush=True)


STEPS: dict[str, Callable[[Order], dict[str, Any]]] = {"make": make, "measure": measure, "bandwidth": bandwidth}


def do(step: str, order: Order) -> dict[str, Any]:
    """One of STEPS; what goes wrong is a result too, an `error`."""
    try:
        return STEPS[step](order)
    except Exception as error:  # peers and damaged checkpoints raise whatever they like; the row says what
        return {"error": reason(error)}


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, WhitError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def main() -> None:
    """Do one order."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    order = Order.from_json(sys.stdin.read())
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    print(json.dumps(do(sys.argv[1], order)))


if __name__ == "__main__":
    main()
