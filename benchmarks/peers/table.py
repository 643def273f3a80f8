"""One Markdown table of what `run.py` found: python benchmarks/peers/table.py OUT [--save NAME] [--text NAME]

A cell is the mean KL over the seeds and its spread (largest minus smallest); the bold one is the row's least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catalogue import DEFAULT_PEERS, PEERS, ROWS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

Runs = Mapping[tuple[str, str], Sequence[dict[str, Any]]]


def read(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All results by (row, peer), those of peers that are compared no longer left out."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.seed*.json")):
        result = json.loads(path.read_text())
        if result["peer"] in PEERS:
            found.setdefault((result["row"], result["peer"]), []).append(result)
    return found


def figures(runs: Sequence[dict[str, Any]], text: str, name: str) -> list[float]:
    """One figure of the runs that have it."""
    return [run["scores"][text][name] for run in runs if "scores" in run]


def cell(runs: Sequence[dict[str, Any]], text: str, short: bool) -> str:
    """Mean KL, spread, perplexity; or why there is none."""
    kl, perplexity = figures(runs, text, "kl"), figures(runs, text, "perplexity")
    if not kl:
        return "error" if runs else "not run"
    spread = f" ±{(max(kl) - min(kl)) / 2:.4f}" if len(kl) > 1 else ""
    return f"{statistics.mean(kl):.4f}{spread}" + ("" if short else f" ({statistics.mean(perplexity):.2f})")


def table(runs: Runs, text: str, peers: Sequence[str], short: bool = False) -> str:
    """Rows by peers; rows that none of them ran are left out, perplexities too where it is to be `short`."""
    peers = [peer for peer in peers if any(key[1] == peer for key in runs)]
    lines = []
    for row in map(str, ROWS):
        if not any((row, peer) in runs for peer in peers):
            continue
        cells = [cell(runs.get((row, peer), ()), text, short) for peer in peers]
        means = [statistics.mean(kl) if (kl := figures(runs.get((row, p), ()), text, "kl")) else 1e9 for p in peers]
        best = min(range(len(peers)), key=means.__getitem__)
        if means[best] < 1e9:
            cells[best] = f"**{cells[best]}**"
        lines.append([row, *cells])
    return harness.markdown(["row", *peers], lines)


def costs(runs: Runs) -> str:
    """What the peers took, medians over all rows and seeds."""
    lines = []
    for peer in PEERS:
        done = [run for key, found in runs.items() if key[1] == peer for run in found if "scores" in run]
        if done:
            seconds = harness.spread([run["seconds"] for run in done])
            gpu = statistics.median(run["gpu_peak_mb"] for run in done)
            took = f"{seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f})"
            version = next((run["peer_version"] for run in done if "peer_version" in run), "")
            lines.append([peer, version, took, f"{gpu:.0f}", str(len(done))])
    return harness.markdown(["peer", "version", "seconds", "GPU peak MB", "runs"], lines)


def errors(runs: Runs) -> str:
    """Each error once, with its peer and rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for (row, peer), each in runs.items():
        for said in {run["error"] for run in each if "error" in run}:
            found.setdefault((peer, said), []).append(row)
    return "\n".join(f"- {peer}, {', '.join(rows)}: `{said}`" for (peer, said), rows in sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--save", help="a name in benchmarks/results")
    parser.add_argument("--machine", type=json.loads, help="of the runs, where it is not this one")
    parser.add_argument("--note", default="", help="said under the tables")
    args = parser.parse_args()
    runs = read(args.folder)
    texts = sorted({text for found in runs.values() for run in found for text in run.get("scores", {})})
    options = [peer for peer in PEERS if peer.startswith("whit-") and peer not in DEFAULT_PEERS]
    heads = ("KL in nats per token (perplexity) on {}; ± half the range over seeds", "Options of whit's methods, on {}")
    parts = [f"KL alone, on {texts[-1]}\n\n{table(runs, texts[-1], DEFAULT_PEERS, short=True)}"]
    for head, peers in zip(heads, (DEFAULT_PEERS, ["whit-gptq", "whit-refine", *options]), strict=True):
        parts += [f"{head.format(text)}\n\n{table(runs, text, peers)}" for text in texts]
    parts += [costs(runs)] + ([f"Errors\n\n{said}"] if (said := errors(runs)) else [])
    page = "\n\n".join([*parts, args.note])
    if args.save:
        results = [run for found in runs.values() for run in found]
        harness.save(args.save, {"machine": args.machine or harness.machine(), "runs": results}, page)
    else:
        print(page)


if __name__ == "__main__":
    main()
