"""All candidates of a comparison, one after another, each in processes of its own; what is done is not done again.

A row is kept in OUT_DIR/rows/<key>.json, where the key is a hash of all that it depends on: the contents of the model
and of the text, the candidate, the settings, the machine and the libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import whit
from whit.calibration import Calibration
from whit.checkpoint.writer import file_sha256
from whit.data import resolve_model, resolve_text
from whit.evaluation import EvaluationOptions
from whit.evaluation.size import weight_files
from whit.integrations.loading import model_files
from whit.report.candidates import Entrant
from whit.report.machine import machine
from whit.report.speed import SpeedOptions
from whit.report.work import Order

Say = Callable[[str], None]
ROWS, MODELS = "rows", "models"


@dataclass(frozen=True)
class Settings:
    """How every candidate is measured."""

    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    speed: SpeedOptions | None = field(default_factory=SpeedOptions)
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0
    threads: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        for part, key in (("evaluation", "text"), ("evaluation", "task_data"), ("calibration", "text")):
            if values[part][key]:  # what it is, not where it lay
                values[part][key] = Path(values[part][key]).name
        return values


@dataclass(frozen=True)
class Comparison:
    """What was measured: a row for each candidate, the original's first. `name` is the model as it was asked for."""

    name: str
    model: str
    settings: Settings
    machine: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "whit": whit.__version__,
            "model": Path(self.name).name,
            "settings": self.settings.to_json(),
            "machine": self.machine,
            "rows": list(self.rows),
        }


def compare(name: str, out: Path, entrants: Sequence[Entrant], settings: Settings, say: Say) -> Comparison:
    """Measure every candidate; a failed one is a row with an `error`, tried again in the next run."""
    (out / ROWS).mkdir(parents=True, exist_ok=True)
    model = resolve_model(name)
    here = machine(settings.evaluation.device)
    if settings.threads is not None:
        here["threads"] = settings.threads
    contents = content_key(model, settings)
    here["read_bandwidth"] = _bandwidth(model, out, settings, here)
    rows = []
    for number, entrant in enumerate(entrants, 1):
        say(f"{number}/{len(entrants)} {entrant.label}")
        rows.append(_row(_order(model, out, entrant, settings), out, [contents, here["cpu"], here.get("gpu")], say))
        if "error" in rows[-1]:
            say(f"failed: {rows[-1]['error']}")
    return Comparison(name, model, settings, here, tuple(relate(rows)))


def _order(model: str, out: Path, entrant: Entrant, settings: Settings) -> Order:
    place = str(out / MODELS / entrant.folder)
    s = settings
    return Order(model, entrant, place, s.evaluation, s.speed, s.calibration, s.seed, s.threads)


def content_key(model: str, settings: Settings) -> str:
    """A hash of the contents of the model's and the texts' files and of the settings."""
    files = model_files(model)
    digest = sha256(json.dumps(settings.to_json(), sort_keys=True).encode())
    config = [files / "config.json"] if files.is_dir() else []
    texts = [resolve_text(settings.evaluation.text), resolve_text(str(settings.calibration.text))]
    for path in [*weight_files(files), *config, *texts]:
        digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    return digest.hexdigest()


def _row(order: Order, out: Path, context: Sequence[Any], say: Say) -> dict[str, Any]:
    """The row that lies there, or a new one."""
    mine = file_key(order) if order.entrant.kind == "checkpoint" else None
    versions = machine("cpu")["libraries"]
    key = sha256(json.dumps([whit.__version__, versions, asdict(order.entrant), mine, *context]).encode()).hexdigest()
    kept = out / ROWS / f"{order.entrant.folder}-{key[:16]}.json"
    if kept.is_file():
        say(f"{order.entrant.label}: measured before")
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    row: dict[str, Any] = {
        "candidate": order.entrant.label, "kind": order.entrant.kind, "method": order.entrant.method,
        "format": order.entrant.format if order.entrant.kind != "checkpoint" else "",
    }  # fmt: skip
    if order.entrant.kind == "whit":
        made = in_process("make", order)
        if "error" in made:
            return row | made
    row |= in_process("measure", order)
    if "error" not in row:
        unfinished = kept.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(row, indent=1), encoding="utf-8")
        os.replace(unfinished, kept)
    return row


def file_key(order: Order) -> str:
    """The contents of a checkpoint that somebody else wrote."""
    return sha256("".join(file_sha256(path) for path in weight_files(model_files(order.files))).encode()).hexdigest()


def in_process(step: str, order: Order) -> dict[str, Any]:
    """One step of work in a process of its own; a crash is an `error` too."""
    command = [sys.executable, "-m", "whit.report.work", step]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, errors = process.communicate(order.to_json())
    lines = out.strip().splitlines()
    if process.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    last = (errors.strip().splitlines() or ["it said nothing"])[-1]
    ended = f"by signal {-process.returncode}" if process.returncode < 0 else f"with status {process.returncode}"
    return {"error": f"its process ended {ended}: {last[:300]}"}


def _bandwidth(model: str, out: Path, settings: Settings, here: dict[str, Any]) -> float | None:
    """Measured once for a machine and kept beside the rows."""
    name = sha256(json.dumps([here["cpu"], here.get("gpu"), here["threads"]]).encode()).hexdigest()[:16]
    kept = out / ROWS / f"bandwidth-{name}.json"
    if not kept.is_file():
        order = _order(model, out, Entrant("bf16", "original"), settings)
        kept.write_text(json.dumps(in_process("bandwidth", order)), encoding="utf-8")
    rate = json.loads(kept.read_text(encoding="utf-8")).get("read")
    return None if rate is None else float(rate)


def relate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with its figures relative to the original's, where both are there."""
    original = next((row for row in rows if row["kind"] == "original" and "error" not in row), None)
    return [row | ({"relative": _relative(row, original)} if original and "error" not in row else {}) for row in rows]


def _relative(row: dict[str, Any], original: dict[str, Any]) -> dict[str, float]:
    found = {
        "size": row["size_bytes"] / original["size_bytes"],
        "perplexity_change": row["perplexity"] / original["perplexity"] - 1,
        "memory_loaded": row["memory_loaded_bytes"] / max(original["memory_loaded_bytes"], 1),
    }
    for name in ("prefill", "decode"):
        if name in row and name in original:
            found[name] = row[name]["median"] / original[name]["median"]
    if row.get("joules_per_token") and original.get("joules_per_token"):
        found["joules_per_token"] = row["joules_per_token"] / original["joules_per_token"]
    for name, task in row.get("tasks", {}).items():
        if name in original.get("tasks", {}):
            found[f"{name}_change"] = task["accuracy"] - original["tasks"][name]["accuracy"]
    return found
