"""One candidate, loaded in a process of its own, that waits for its turns: the other end of report/turns.py.

    python -m whit.report.timed

In come an Order as a line of JSON and then a line for every lap; out goes a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.utils import logging

from whit.report.energy import Meter
from whit.report.speed import lap, touch
from whit.report.work import Order, load, reason


def serve(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Load what the first line orders, then a lap for each line; what goes wrong is an `error`, and the end."""
    waiting = iter(lines)
    order = Order.from_json(next(waiting))
    assert order.speed is not None  # nothing is timed without it
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    try:
        model = load(order)
        touch(model, order.speed)
        meter = Meter(model.device)
        yield {"energy_note": meter.note}
        for _ in waiting:
            yield lap(model, order.speed, meter).to_json()
    except Exception as error:  # peers and damaged checkpoints raise whatever they like; the row says what
        yield {"error": reason(error)}


def main() -> None:
    """Serve the parent; what a library prints goes to standard error, so that answers are alone on their pipe."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for answer in serve(sys.stdin):
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
