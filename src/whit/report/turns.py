"""Speeds of all candidates, taken in turns: every round is one lap of each, so that what a machine does meanwhile
meets all alike, and a ratio to the original is one of laps of the same round.

Each candidate waits in a process of its own, loaded; one of them runs at a time. Where they do not fit in memory
together, they come in waves, and the original is in each of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from whit.process import command_of
from whit.report.speed import Spread
from whit.report.work import Order

LOADING = 2  # processes that import and load at the same time
Laps = list[dict[str, Any]]


class Loaded:
    """A candidate in a process of its own. `answer` waits for it to be loaded; each `turn` is a lap."""

    def __init__(self, order: Order) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            command_of("whit.report.timed"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, bufsize=1,
        )  # fmt: skip
        self._send(order.to_json())

    def turn(self) -> dict[str, Any]:
        """The next lap, or an `error`."""
        self._send("lap")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What it says next; an `error` where it has ended."""
        assert self._process.stdout is not None  # a pipe, see above
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        status = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"its process ended {ended(status)}: {last[:300]}"}

    def close(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None  # a pipe, see above
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has ended, and `answer` says how
            pass


def ended(status: int) -> str:
    """An exit status in words."""
    return f"by signal {-status}" if status < 0 else f"with status {status}"


def take_turns(
    orders: Sequence[Order], rounds: int, say: Callable[[str], None], start: Callable[[Order], Any] = Loaded
) -> dict[str, dict[str, Any]]:
    """By label: spreads of prefill and decode, joules per token, ratios to the original's; or a `speed_error`.

    The original must be the first, where it is there. All of them are in memory at once (`waves` cuts a list into
    those that fit).
    """
    loaded: dict[str, Any] = {}
    notes: dict[str, str] = {}
    laps: dict[str, Laps] = {order.entrant.label: [] for order in orders}
    failed: dict[str, str] = {}
    try:
        for first in range(0, len(orders), LOADING):
            some = orders[first : first + LOADING]
            loaded |= {order.entrant.label: start(order) for order in some}
            for label in (order.entrant.label for order in some):
                answer = loaded[label].answer()
                notes[label] = answer.get("energy_note", "")
                if "error" in answer:
                    failed[label] = answer["error"]
        for number in range(rounds):
            say(f"speed: round {number + 1} of {rounds}")
            # there and back: what rises or falls steadily in a round falls on none in particular
            for label in list(loaded)[:: -1 if number % 2 else 1]:
                if label not in failed:
                    answer = loaded[label].turn()
                    if "error" in answer:
                        failed[label] = answer["error"]
                    else:
                        laps[label].append(answer)
    finally:
        for process in loaded.values():
            process.close()
    first_one = orders[0].entrant
    base = laps[first_one.label] if first_one.kind == "original" and first_one.label not in failed else []
    return _summaries(laps, notes, failed, base)


def _summaries(
    laps: dict[str, Laps], notes: dict[str, str], failed: dict[str, str], base: Laps
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for label, mine in laps.items():
        if label in failed:
            found[label] = {"speed_error": failed[label]}
            continue
        joules = [answer["joules_per_token"] for answer in mine]
        found[label] = {
            "joules_per_token": None if None in joules else statistics.median(joules), "energy_note": notes[label],
        }  # fmt: skip
        for name in ("prefill", "decode"):
            values = [answer[name] for answer in mine]
            found[label][name] = {**Spread.of(values).to_json(), "rounds": values}
        if base:
            pairs = list(zip(mine, base, strict=True))
            found[label]["paired"] = {
                name: statistics.median(a[name] / b[name] for a, b in pairs) for name in ("prefill", "decode")
            }
    return found


def waves(orders: Sequence[Order], bytes_each: Sequence[int], available: int) -> list[list[Order]]:
    """The orders in lists that fit into `available` bytes, the first order in every one of them."""
    found = [[orders[0]]]
    used = bytes_each[0]
    for order, size in zip(orders[1:], bytes_each[1:], strict=True):
        if len(found[-1]) > 1 and used + size > available:
            found.append([orders[0]])
            used = bytes_each[0]
        found[-1].append(order)
        used += size
    return found
