"""The rows of budget.py, kept in a file, and the processes that make more of them until the time is up."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import budget_cells as cells
from whit.allocation import Group, free_formats, ladder_of
from whit.pipeline.job import Job

import harness

SLICES = 3  # of the matrices of a kind, each measured by a process of its own


class Bench:
    """Rows by label, kept in a file; processes that make more of them until the time is up."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.end = time.monotonic() + args.limit_seconds
        self.setting = cells.Setting(
            args.model, args.text, args.calibration, args.samples, args.context, args.max_tokens, args.device,
            args.method, args.scratch,
        )  # fmt: skip
        self.path = harness.RESULTS / f"{args.name}.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.state: dict[str, Any] = {"rows": {}, "measured": {}, "parts": {}, **known}
        if args.again:
            others = {label: row for label, row in self.state["rows"].items() if row["kind"] in ("uniform", "mix")}
            self.state |= {"rows": others, "measured": {}, "parts": {}}
        self.pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
        self.ladder: list[str] | None = args.ladder
        self.ladder_is_checked = False
        self.lock = threading.Lock()  # rows come in on a thread of the pool
        Path(args.scratch).mkdir(parents=True, exist_ok=True)

    def row(self, label: str, work: Callable[..., dict[str, Any]], *arguments: Any, **more: Any) -> Future[Any] | None:
        """Begin a row unless it is there or the time is up."""
        if label in self.state["rows"] or time.monotonic() > self.end:
            return None
        future = self.pool.submit(work, self.setting, *arguments)
        future.add_done_callback(lambda done: self._keep(label, done, more))
        return future

    def _keep(self, label: str, done: Future[Any], more: dict[str, Any]) -> None:
        if done.cancelled():
            return
        if error := done.exception():
            print(f"{label}: failed: {type(error).__name__}: {error}", flush=True)
            return
        row = {**more, **done.result()}
        with self.lock:
            self.state["rows"][label] = row
        print(f"{label}: {row['bits_per_weight']:.3f} bits, KL {row['kl']:.4f}, {row['seconds']} s", flush=True)
        self.save()

    def wait(self, futures: list[Future[Any] | None]) -> None:
        """Until they are done or the time is up; what has not begun then is dropped."""
        wait([f for f in futures if f is not None], timeout=max(self.end - time.monotonic(), 0))
        for future in futures:
            if future is not None:
                future.cancel()

    def save(self) -> None:
        """The state so far."""
        harness.RESULTS.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with self.lock:
            partial.write_text(json.dumps(self.state, indent=1) + "\n")
            partial.replace(self.path)

    def check(self, job: Job, names: list[str]) -> None:
        """Leave out formats with which the method does not work on this device, and say so."""
        ladder = list(self.ladder or ladder_of(job))
        if self.setting.device == "cpu" or self.ladder_is_checked or all(n in self.state["measured"] for n in names):
            return
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:  # one may break a device's context
            wrong = apart.submit(cells.check, self.setting, ladder).result()
        for format, why in wrong.items():
            print(f"{format}: left out: {why}", flush=True)
        self.ladder, self.ladder_is_checked = [format for format in ladder if format not in wrong], True

    def start_measures(self, job: Job, names: list[str]) -> list[Future[Any] | None]:
        """Parts of a model's matrices, together all of them. Those of a part are alike, so that what is recorded for
        one serves the next."""
        ladder = list(self.ladder or ladder_of(job))
        kinds: dict[str, list[str]] = {}
        wanted = {n: [str(f) for f in formats] for n, formats in free_formats(job, ladder).items()}
        for name in wanted:
            kinds.setdefault(re.sub(r"[0-9]+", "*", name), []).append(name)
        parts = [part for kind in kinds.values() for i in range(SLICES) if (part := kind[i::SLICES])]
        parts.sort(key=lambda part: -len(part) * len(wanted[part[0]]))
        begun = []
        for how in (how for how in names if how not in self.state["measured"]):
            for part in parts:
                key = f"{how} {part[0]}"
                if key not in self.state["parts"] and time.monotonic() < self.end:
                    begun.append(
                        self.pool.submit(cells.measure, self.setting, how, {n: wanted[n] for n in part}, ladder)
                    )
                    begun[-1].add_done_callback(partial(self._keep_part, key))
        return begun

    def _keep_part(self, key: str, done: Future[Any]) -> None:
        if done.cancelled():
            return
        if error := done.exception():
            print(f"{key}: failed: {type(error).__name__}: {error}", flush=True)
            return
        with self.lock:
            self.state["parts"][key] = done.result()
        print(f"{key} ...: measured, {done.result()['seconds']:.0f} s", flush=True)
        self.save()

    def end_measures(self, job: Job, names: list[str], begun: list[Future[Any] | None]) -> bool:
        """Put the parts together; False where the time was up before the last."""
        self.wait(begun)
        items = [item.name for item in job.plan.items]
        count = len(free_formats(job, self.ladder or ladder_of(job)))
        for how in (how for how in names if how not in self.state["measured"]):
            with self.lock:
                parts = [part for key, part in self.state["parts"].items() if key.startswith(f"{how} ")]
            errors = {name: found for part in parts for name, found in part["errors"].items()}
            owners = {name: Group.named(name, {}).parameters for name in errors}
            if len({parameter for several in owners.values() for parameter in several}) < count:
                print(f"{how}: {len(errors)} groups are measured, not all; run it again", flush=True)
                return False
            seconds = sum(part["seconds"] for part in parts)
            ordered = dict(sorted(errors.items(), key=lambda entry: items.index(owners[entry[0]][0])))
            with self.lock:
                self.state["measured"][how] = {"errors": ordered, "process_seconds": round(seconds, 1)}
                self.state["parts"] = {k: v for k, v in self.state["parts"].items() if not k.startswith(f"{how} ")}
            print(f"{how}: {len(errors)} groups, {seconds:.0f} s of all processes", flush=True)
        self.save()
        return True

    def groups(self, how: str) -> tuple[Group, ...]:
        return cells.groups_of(self.state["measured"][how]["errors"])
