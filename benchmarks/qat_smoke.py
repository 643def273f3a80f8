"""Before the whole of `qat.py`: every way on a few blocks of the model, and which rates suit ternary.

The smoke test runs all ways on the first BLOCKS blocks and says of each whether it passed: its cell is there, its
figures are finite, the packed model has the bits that were trained, and a run that was cut goes on. The pilot trains
the whole model in `ternary-g64` for a few steps in a few ways, and keeps in OUT/pilot.json what predicts held-out text
best.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qat_text
import whit
from qat_cells import WAYS, cell_path, model_path, save, windows
from qat_measures import compare, filled, load, on_gpu
from whit.evaluation.text import cut_windows
from whit.qat import Course, Setting, Training, Words, learn, prepare_full

BLOCKS = 4
SMOKE = {
    "formats": "ternary-g64,int2-g64", "ways": ",".join((*WAYS, "efficientqat", "resume")), "samples": 8,
    "context": 512, "valid-tokens": 8192, "test-tokens": 8192, "items": 8, "scale": 0.05, "full-batch": 4,
    "full-context": 256, "efficient-samples": 8, "at-once": 2, "leave": 20, "jobs": 8,
}  # fmt: skip
PILOT_FORMAT, PILOT_STEPS = "ternary-g64", 80
BASE = {"rate": 0.015, "kept_rate": 0.0005, "text": 0.3}
VARIANTS = {
    "base": {}, "fast": {"rate": 0.03}, "slow": {"rate": 0.0075}, "kept": {"kept_rate": 0.003}, "kl": {"text": 0.0}
}  # fmt: skip


def smoke(args: argparse.Namespace) -> int:
    """Run all ways on a few blocks; print a line for each, and give 1 where one failed."""
    began = time.time()
    place = args.out / "smoke"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "tokens").exists():
        (place / "tokens").symlink_to(args.out / "tokens")
    shorten(Path(args.model), place / "model")
    options = [word for key, value in SMOKE.items() for word in (f"--{key}", str(value))]
    seconds = ["--seconds", str(args.smoke_seconds), "--device", args.device, *(["--mps"] if args.mps else [])]
    command = [sys.executable, sys.argv[0], "--model", str(place / "model"), "--shared", str(args.shared)]
    status = subprocess.run([*command, "--out", str(place), *options, *seconds], check=False).returncode
    ways = [("bf16", "bf16"), ("ternary-g64", "resume"), ("int2-g64-asym-f16", "efficientqat")]
    ways += [(format, way) for format in ("ternary-g64", "int2-g64") for way in WAYS]
    found = argparse.Namespace(out=place)
    verdicts = {f"{format}:{way}": verdict(cell_path(found, format, way)) for format, way in ways}
    for name, said in verdicts.items():
        print(f"smoke {name}: {said}", flush=True)
    passed = sum(said.startswith("pass") for said in verdicts.values())
    print(f"smoke: {passed} of {len(verdicts)} passed in {time.time() - began:.0f} s, status {status}", flush=True)
    return int(passed < len(verdicts))


def verdict(path: Path) -> str:
    if not path.exists():
        return f"FAIL: no cell; see {path.parent.parent / 'logs'}"
    record = json.loads(path.read_text())
    if not all(math.isfinite(record[text]["perplexity"]) for text in ("wikitext2", "wiki_valid") if text in record):
        return f"FAIL: {record['wikitext2']}"
    for key in ("written", "packed_equals_trained", "resumed"):
        if not record.get(key, True):
            return f"FAIL: {key} is {record[key]}"
    if record.get("tasks_failed"):
        return f"FAIL: {record['tasks_failed']}"
    return f"pass ({record.get('said') or str(round(record['minutes'] * 60)) + ' s'})"


def shorten(model: Path, folder: Path) -> None:
    """A checkpoint of the model's first blocks."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    outside = [f".layers.{number}." for number in range(BLOCKS, 1000)]
    with safe_open(model / "model.safetensors", "pt") as file:
        kept = [name for name in file.keys() if not any(part in name for part in outside)]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in kept}, folder / "model.safetensors", {"format": "pt"})
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json" and ".index." not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": BLOCKS}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


def run_resume(args: argparse.Namespace, format: str) -> None:
    """Cut a run in two; whether it ends where a whole one does (on a GPU attention's gradients may differ in bits)."""
    began, course = time.monotonic(), Course(steps=8, batch=2, at_once=2, kept_rate=0.001)
    words = Words(tokens=windows(args, course, 128))

    def prepare(name: str, options: whit.Options) -> Training:
        recipe = whit.Recipe("rtn", [("*", format)])
        return prepare_full(args.model, model_path(args, format, name), recipe, course, words, Setting(options))

    def stop(what: str, step: int, total: int, loss: float) -> None:
        if step == 5:
            raise InterruptedError

    device = "cuda" if on_gpu(args) else "cpu"
    whole = learn(prepare("whole", whit.Options(device=device, restart=True)), None, math.inf)
    with suppress(InterruptedError):
        learn(prepare("cut", whit.Options(device=device, restart=True)), stop, 0.0)
    steps: list[int] = []
    cut = learn(prepare("cut", whit.Options(device=device)), lambda _, step, *__: steps.append(step), math.inf)
    same = moved = 0.0
    for name, value in whole.items():
        pair = [v.dequantize() if isinstance(v, whit.QuantizedTensor) else v.float() for v in (value, cut[name])]
        same += float((pair[0] == pair[1]).float().mean()) / len(whole)
        moved = max(moved, float((pair[0] - pair[1]).abs().max()))
    said = f"{100 * same:.3f} % of weights equal, steps {steps[0]} to {steps[-1]}"
    resumed = steps[0] == 5 and same > (0.97 if on_gpu(args) else 0.999999)
    minutes = (time.monotonic() - began) / 60
    save(cell_path(args, format, "resume"), {"resumed": resumed, "said": said, "furthest": moved, "minutes": minutes})


def pilot(args: argparse.Namespace, run: Callable[[list[str]], None]) -> None:
    """Short runs side by side; writes what to train ternary and binary with."""
    run([f"pilot:{name}" for name in VARIANTS])
    found = {n: json.loads(p.read_text()) for n in VARIANTS if (p := cell_path(args, "pilot", n)).exists()}
    for name, record in found.items():
        print(f"pilot {name}: {json.dumps(record)}", flush=True)
    if "base" not in found:
        return
    best = dict(BASE)
    for name, change in VARIANTS.items():
        # A short run flatters high rates: they must be clearly better.
        better = found.get(name, found["base"])["loss"] < found["base"]["loss"] - (0.05 if name == "fast" else 0.0)
        if better and not (name == "slow" and best["rate"] != BASE["rate"]):
            best |= change
    save(args.out / "pilot.json", {"best": best, "runs": found})
    print(f"pilot: {best}", flush=True)


def run_pilot(args: argparse.Namespace, name: str) -> None:
    """Train for a few steps; the loss is that of held-out training text, in nats per token."""
    settings: dict[str, Any] = {**BASE, **VARIANTS[name]}
    course = Course(
        steps=PILOT_STEPS, batch=args.full_batch, scale_rate=args.full_scale_rate, at_once=args.at_once, seed=3,
        **settings,
    )  # fmt: skip
    options = whit.Options(device="cuda" if on_gpu(args) else "cpu", restart=True)
    recipe, out = whit.Recipe("rtn", [("*", PILOT_FORMAT)]), model_path(args, "pilot", name)
    words = Words(tokens=windows(args, course, args.full_context))
    times: list[float] = []

    def seen(what: str, step: int, total: int, loss: float) -> None:
        times.append(time.monotonic())
        print(f"{name}: {step}/{total} loss {loss:.4f}", flush=True)

    training = prepare_full(args.model, out, recipe, course, words, Setting(options))
    values = learn(training, seen, math.inf)
    cut = cut_windows(qat_text.stream(args.out / "tokens", qat_text.TRAIN), args.full_context)[-qat_text.HELD_OUT :]
    model = filled(args, training, values)
    perplexity, kl = compare(model, load(args, args.model), cut.to(model.device))
    steps = (PILOT_STEPS - 1) * (len(times) - 1) / max(len(times), 1)
    rate = steps * course.batch * args.full_context / max(times[-1] - times[0], 1e-9)
    peak = torch.cuda.max_memory_allocated() if on_gpu(args) else 0
    record = {**settings, "loss": math.log(perplexity), "kl": kl, "tokens_per_second": rate, "peak_memory_bytes": peak}
    save(cell_path(args, "pilot", name), record)
