"""Predicted against measured peak memory of loading and generating: python benchmarks/memory_peak.py MODEL [FORMAT ...]

Each format is written by `whit.quantize` into a scratch folder and loaded in a process of its own, which generates
after a prompt. Its peak (VmHWM) is compared with `whit memory`, and so is the part above a process that has imported
the libraries and done nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import harness

CONTEXT, NEW = 512, 4
CHILD = """
import json, sys, torch, transformers, whit
from whit.integrations.loading import load_causal_lm
model, context, new, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def peak_memory():  # of this program alone: getrusage's figure begins with the parent's
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
base = peak_memory()
network = load_causal_lm(model, device=device)
ids = torch.arange(3, 3 + context - new)[None].to(network.device) % 500
with torch.inference_mode():
    out = network.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
assert out.shape[1] == context
peak = peak_memory()
if device == "cuda":
    free, total = torch.cuda.mem_get_info()
    base, peak = 0, total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_allocated()
print(json.dumps({"base": base, "peak": peak}))
"""


def measure(model: str, device: str = "cpu") -> dict[str, int]:
    """Bytes of the process before loading, and at its peak."""
    command = [sys.executable, "-c", CHILD, model, str(CONTEXT), str(NEW), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(model: str, spec: str, scratch: Path, device: str = "cpu") -> dict[str, object]:
    """Predicted and measured bytes for one format."""
    import whit
    from whit.memory import Planner, Situation, find_subject

    planner = Planner(find_subject(model), Situation(context=CONTEXT, device=device))
    need = planner.need(planner.weights(spec))
    written = model
    if spec != "bf16":
        written = str(scratch / spec)
        whit.quantize(model, written, whit.Recipe(rules=[("*", spec)]))
    return {"format": spec, "predicted": need.total_bytes, "overhead": need.overhead_bytes, **measure(written, device)}


def main() -> None:
    model, *specs = sys.argv[1:]
    device = "cuda" if "--cuda" in specs else "cpu"
    with TemporaryDirectory() as scratch:
        wanted = [spec for spec in specs if spec != "--cuda"] or ["bf16", "int8", "nf4-dq", "int4-g64"]
        rows = [compare(model, spec, Path(scratch), device) for spec in wanted]
    header = ("format", "predicted MB", "measured MB", "ratio", "imports MB", "ratio above imports")
    cells = []
    for row in rows:
        above = (row["predicted"] - row["base"]) / (row["peak"] - row["base"])  # type: ignore[operator]
        ratio = row["predicted"] / row["peak"]  # type: ignore[operator]
        figures = (row["predicted"] / 1e6, row["peak"] / 1e6, ratio, row["base"] / 1e6, above)  # type: ignore[operator]
        cells.append((str(row["format"]), *(f"{f:.0f}" if f > 10 else f"{f:.3f}" for f in figures)))
    note = f"\n{Path(model).name} on {device}, {CONTEXT} tokens, {NEW} of them generated."
    result = {"machine": harness.machine(), "model": Path(model).name, "device": device, "rows": rows}
    harness.save(f"memory_peak_{device}", result, harness.markdown(header, cells) + "\n" + note)


if __name__ == "__main__":
    main()
