"""All candidates of a comparison, one after another, each in processes of its own; what is done is not done again.

Quality first: a row is kept in OUT_DIR/rows/<candidate>-<key>.json, where the key is a hash of all that it depends on:
the contents of the model and of the text, the candidate, the settings, the machine and the libraries. Then speed, of
all candidates in turns (report/turns.py), kept in OUT_DIR/rows/speed-<key>.json: it can be measured again alone, when
the machine is quiet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import whit
from whit.calibration import Calibration
from whit.checkpoint.places import make_folder
from whit.checkpoint.writer import file_sha256
from whit.data import resolve_model, resolve_text
from whit.errors import EvaluationError
from whit.evaluation import EvaluationOptions
from whit.evaluation.memory import available_bytes
from whit.evaluation.text import read_text
from whit.integrations.loading import causal_class, load_config
from whit.process import command_of
from whit.report.candidates import Entrant
from whit.report.kept import contents, keep, key, recall
from whit.report.machine import machine
from whit.report.speed import SpeedOptions
from whit.report.turns import Loaded, ended, take_turns, waves
from whit.report.work import Order

Say = Callable[[str], None]
ROWS, MODELS, LOGITS = "rows", "models", "logits"
SHARE = 0.8  # of the free memory, for candidates that wait for their turns


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
        for part, name in (("evaluation", "text"), ("evaluation", "task_data"), ("calibration", "text")):
            if values[part][name]:  # what it is, not where it lay
                values[part][name] = Path(values[part][name]).name
        return values

    def quality_key(self) -> str:
        """A hash of all that figures other than speeds depend on, the contents of the texts among it."""
        values = self.to_json()
        for other in ("speed", "threads"):
            del values[other]
        texts = [resolve_text(self.evaluation.text), resolve_text(str(self.calibration.text))]
        return key(values, [file_sha256(path) for path in texts])


@dataclass(frozen=True)
class Comparison:
    """What was measured: a row for each candidate, the original's first. `name` is the model as it was asked for."""

    name: str
    model: str
    settings: Settings
    machine: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def check(self) -> None:
        """EvaluationError where no candidate was measured, or, where there is none, not the original."""
        asked = self.rows[1:] or self.rows
        failed = [row for row in asked if "error" in row]
        if len(failed) == len(asked):
            raise EvaluationError(
                f"compare: none of {len(asked)} candidates could be measured; one at least must be; the first, "
                f"{failed[0]['candidate']}, failed with: {str(failed[0]['error']).splitlines()[0]}"
            )

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "whit": whit.__version__,
            "model": Path(self.name).name,
            "settings": self.settings.to_json(),
            "machine": self.machine,
            "rows": list(self.rows),
        }


def compare(
    name: str, out: Path, entrants: Sequence[Entrant], settings: Settings, say: Say, speed_again: bool = False
) -> Comparison:
    """Measure every candidate; a failed one is a row with an `error`, tried again in the next run.

    `speed_again` measures speeds though they are known.
    """
    model = resolve_model(name)
    trusted = settings.evaluation.trust_remote_code
    causal_class(name, load_config(model, trust_remote_code=trusted))  # before anything is quantized
    here = machine(settings.evaluation.device)
    here["threads"] = settings.threads or here["threads"]
    orders = [_order(model, out, entrant, settings) for entrant in entrants]
    source = contents(model)
    read_text(resolve_text(settings.evaluation.text))
    make_folder(out / ROWS, out)  # what is wrong with model or text leaves none behind
    parts = [source, settings.quality_key(), here["cpu"], here.get("gpu")]
    rows = []
    for number, order in enumerate(orders, 1):
        say(f"{number}/{len(orders)} {order.entrant.label}")
        rows.append(_row(order, out, parts, say))
        if "error" in rows[-1]:
            say(f"failed: {rows[-1]['error']}")
    shutil.rmtree(out / LOGITS, ignore_errors=True)
    timed = _speeds(source, orders, rows, out, here, speed_again, say) if settings.speed else {}
    here |= timed.get("machine", {})
    rows = [row | timed.get("rows", {}).get(row["candidate"], {}) for row in rows]
    return Comparison(name, model, settings, here, tuple(relate(rows)))


def _order(model: str, out: Path, entrant: Entrant, settings: Settings) -> Order:
    s = settings
    return Order(
        model, entrant, str(out / MODELS / entrant.folder), s.evaluation, s.speed, s.calibration, s.seed, s.threads,
        str(out / LOGITS),
    )  # fmt: skip


def _row(order: Order, out: Path, context: Sequence[Any], say: Say) -> dict[str, Any]:
    """The row that lies there, or a new one."""
    label, folder = order.entrant.label, order.entrant.folder
    name = key(whit.__version__, _versions(), asdict(order.entrant), _own(order), *context)[:16]
    found = recall(out / ROWS / f"{folder}-{name}.json")
    if found is not None:
        say(f"{label}: measured before")
        return found
    row: dict[str, Any] = {
        "candidate": label, "kind": order.entrant.kind, "method": order.entrant.method,
        "format": order.entrant.format if order.entrant.kind != "checkpoint" else "",
    }  # fmt: skip
    made: dict[str, Any] = {}
    if order.entrant.kind == "whit":
        place = out / ROWS / f"{folder}-{name}.made.json"
        made = recall(place) or in_process("make", order)
        if "error" in made:
            return row | made
        keep(place, made)
    row |= in_process("measure", order)
    if "error" in row:
        return row
    if "made" in row:
        row["made"] |= made
    return keep(out / ROWS / f"{folder}-{name}.json", row)


def _versions() -> Any:
    return machine("cpu")["libraries"]


def _own(order: Order) -> str | None:
    """The contents of a checkpoint that somebody else wrote."""
    return contents(order.files) if order.entrant.kind == "checkpoint" else None


def _speeds(
    source: str, orders: Sequence[Order], rows: Sequence[dict[str, Any]], out: Path, here: dict[str, Any],
    again: bool, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """{"rows": by label, "machine": what was found out about it}: those that are kept, or new ones."""
    pairs = [(order, row) for order, row in zip(orders, rows, strict=True) if "error" not in row]
    if not pairs:
        return {}
    able = [order for order, _ in pairs]
    options = able[0].speed
    assert options is not None  # the caller looked
    entrants = [(asdict(order.entrant), _own(order)) for order in able]
    machine_key = [here["cpu"], here.get("gpu"), here["threads"], _versions(), whit.__version__]
    place = out / ROWS / f"speed-{key(source, entrants, asdict(options), machine_key)[:16]}.json"
    kept = None if again else recall(place)
    if kept is not None:
        say("speed: measured before; --speed-again measures it again")
        return kept
    load = os.getloadavg()[0]
    device = able[0].evaluation.device
    groups = waves(able, [row["memory_peak_bytes"] for _, row in pairs], int(SHARE * available_bytes(device)))
    found: dict[str, Any] = {}
    for orders_together in groups:
        found = take_turns(orders_together, options.repeats, say, Loaded) | found
    rate = in_process("bandwidth", able[0]).get("read")
    about = {"read_bandwidth": rate, "load_before_speed": round(load, 2), "speed_waves": len(groups)}
    timed = {"rows": found, "machine": about}
    return timed if any("speed_error" in row for row in found.values()) else keep(place, timed)


def in_process(step: str, order: Order) -> dict[str, Any]:
    """One step of work in a process of its own; a crash is an `error` too."""
    command, pipe = command_of("whit.report.work", step), subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        out, errors = process.communicate(order.to_json())
    lines = out.strip().splitlines()
    if process.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    last = (errors.strip().splitlines() or ["it said nothing"])[-1]
    return {"error": f"its process ended {ended(process.returncode)}: {last[:300]}"}


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
    found |= row.get("paired", {})
    if row.get("joules_per_token") and original.get("joules_per_token"):
        found["joules_per_token"] = row["joules_per_token"] / original["joules_per_token"]
    for name, task in row.get("tasks", {}).items():
        if name in original.get("tasks", {}):
            found[f"{name}_change"] = task["accuracy"] - original["tasks"][name]["accuracy"]
    return found
