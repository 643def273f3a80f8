"""results.json, report.md, PNG files and report.html, which needs no network and no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from whit.checkpoint.files import write_whole
from whit.extras import missing
from whit.report.comparison import folder_name
from whit.report.front import chart, front
from whit.report.layers import grid
from whit.report.runs import MODELS, Comparison
from whit.report.tables import columns, markdown

BUSY = 10  # seconds that a process may wait for a disk before it is said to have waited for other work
NO_PICTURES = f"{missing('report', 'No pictures')} and run again."


def write_report(found: Comparison, out: Path, pictures: bool = True) -> list[Path]:
    """Write everything into `out`; returns the files."""
    name = found.name if found.name.startswith("whit:") else Path(found.name).name
    drawn: Mapping[str, bytes] = {}
    notes = []
    if pictures and find_spec("matplotlib") is None:
        notes.append(NO_PICTURES)
    elif pictures:
        from whit.report.pictures import draw_comparison

        drawn = draw_comparison(found)
    contents = {
        "results.json": (json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n").encode(),
        "report.md": _markdown(found, name, drawn, notes).encode(),
        "report.html": html(found, name, drawn, notes).encode(),
        **{f"{title}.png": data for title, data in drawn.items()},
    }
    for file, data in contents.items():
        write_whole(out / file, data)
    return [out / file for file in contents]


def html(found: Comparison, name: str, pictures: Mapping[str, bytes], notes: Sequence[str] = ()) -> str:
    """The page. Everything from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("whit.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    rows = found.rows
    grids = {row["candidate"]: made for row in rows if (made := grid(row.get("layers") or ()))}
    return environment.get_template("report.html.j2").render(
        name=name,
        rows=rows,
        columns=columns(rows),
        front=front(rows),
        chart=chart(rows),
        grids=grids,
        choices=_choices(rows),
        pictures={t: (CAPTIONS[t], base64.b64encode(data).decode()) for t, data in pictures.items()},
        machine=found.machine,
        measured=_how(found),
        command=_command(found, name),
        notes=[*_remarks(found), *notes],
        energy=_energy_note(rows),
    )


CAPTIONS = {
    "pareto": "Size against divergence: what lies on the line is beaten by nothing smaller.",
    "speed": "Tokens written per second, with the limit that reading the weights once per token sets.",
    "layers": "Relative error of every layer and projection.",
    "histogram": "Weights before and after quantization, with the levels that exist.",
    "error_bits": "Error against bits for symmetric, asymmetric, NormalFloat and per-group formats.",
    "outliers": "Largest activation of every channel: outliers are why activations are harder than weights.",
    "memory": "What takes memory as the context grows, in generating and in training.",
}


def _choices(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page's chooser compares: every candidate that works, the original with no divergence."""
    return [
        {
            "name": row["candidate"], "size": row["size_bytes"], "peak": row["memory_peak_bytes"],
            "place": f"{MODELS}/{folder_name(row['candidate'])}" if row["kind"] == "whit" else "",
            "decode": row.get("relative", {}).get("decode"),
            "kl": row["kl"]["mean"] if row["kind"] != "original" else 0.0,
            "change": row.get("relative", {}).get("perplexity_change", 0.0), "top1": row["top1_agreement"],
            "kind": row["kind"],
        }
        for row in rows if "error" not in row and row.get("kl")
    ]  # fmt: skip


def _how(found: Comparison) -> str:
    evaluation, row = found.settings.evaluation, next((r for r in found.rows if "error" not in r), None)
    tokens = f"{row['tokens']:,} predicted tokens at context {row['context']}" if row else "nothing was measured"
    here = found.machine
    speed = found.settings.speed
    load = here.get("load_before_speed")
    quiet = "" if load is None else f" (load average before: {load:g})"
    timed = (
        f"; speed at batch 1 after a prompt of {speed.prompt_tokens} tokens, in {speed.repeats} rounds" if speed else ""
    )
    where = here.get("gpu") or f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads"
    return f"{Path(evaluation.text).name}: {tokens}{timed}{quiet}; {where}"


def _remarks(found: Comparison) -> list[str]:
    """What a reader must know about single rows, and of how the rest was measured."""
    s, e = found.settings, found.settings.evaluation
    calibrated = [row["candidate"] for row in found.rows if (row.get("provenance") or {}).get("calibration")]
    said = []
    if calibrated:
        context = s.calibration.context or "2048, or the model's most,"
        text = Path(str(s.calibration.text)).name
        windows = f"{s.calibration.samples} windows of {context} tokens"
        said.append(f"Calibrated on {windows} of {text}: {', '.join(calibrated)}.")
    if e.tasks:
        said.append(f"Tasks: {f'the first {e.limit} items of each' if e.limit else 'all items'}.")
    made = [row["made"] for row in found.rows if "cpu_seconds" in row.get("made", {})]
    if any(each["seconds"] > BUSY + 2 * each["cpu_seconds"] for each in made):
        said.append("Candidates were quantized beside other work: go by processor seconds (CPU s), not by seconds.")
    if found.machine.get("speed_waves", 1) > 1:
        said.append("Not all candidates fit in memory together; each wave of them took turns with the original alone.")
    said += [f"{row['candidate']}: no speed: {row['speed_error']}." for row in found.rows if row.get("speed_error")]
    said += [f"{row['candidate']}: {row['size_note']}." for row in found.rows if row.get("size_note")]
    return said


def _command(found: Comparison, name: str) -> str:
    """What to type to get the same again (speed and pictures aside, it gives the same figures)."""
    s, e = found.settings, found.settings.evaluation
    original = {row["candidate"]: row for row in found.rows if row["kind"] != "original"}
    parts = [f"whit compare {name} OUT_DIR --candidates '{','.join(original)}'", f"--text {Path(e.text).name}"]
    pairs = (
        ("--context", e.context), ("--max-tokens", e.max_tokens), ("--tasks", ",".join(e.tasks)),
        ("--task-data", "DATA" if e.task_data else None), ("--limit", e.limit),
        ("--calibration", Path(str(s.calibration.text)).name if s.calibration.text != "whit:text" else None),
        ("--samples", s.calibration.samples), ("--calibration-context", s.calibration.context),
        ("--threads", s.threads), ("--seed", s.seed or None),
    )  # fmt: skip
    return " ".join([*parts, *(f"{option} {value}" for option, value in pairs if value)])


def _energy_note(rows: Sequence[dict[str, Any]]) -> str:
    return next((row["energy_note"] for row in rows if row.get("energy_note")), "not measured")


def _markdown(found: Comparison, name: str, pictures: Mapping[str, bytes], notes: Sequence[str]) -> str:
    lines = [f"# What each precision costs: {name}", "", markdown(found.rows), "", f"Measured on {_how(found)}."]
    lines += ["KL in nats per token against bf16. Energy per token: " + _energy_note(found.rows) + "."]
    lines += [*_remarks(found), ""]
    lines += [f"Made by `{_command(found, name)}`.", "", "What to deploy, by size (nothing smaller is better):", ""]
    for row in front(found.rows):
        change = f"{row['relative']['perplexity_change']:+.1%}" if "relative" in row else "not known"
        size = f"{row['size_bytes'] / 1e6:.1f} MB"
        lines.append(f"- {size}: `{row['candidate']}`, perplexity {change}, KL {row['kl']['mean']:.4g}")
    lines += [""] + [f"![{CAPTIONS[title]}]({title}.png)\n" for title in pictures] + list(notes)
    return "\n".join(lines).rstrip() + "\n"
