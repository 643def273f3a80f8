"""Every peer at every row: python benchmarks/peers/run.py --environments DIR --tokens DIR --text wiki=FILE --out DIR

Each run quantizes in a process of the peer's own environment and is scored by one evaluator in whit's; its JSON goes
to OUT as soon as it is done, and a run that is there is not done again. --jobs processes work at a time; a process
does one run after the other, so that libraries are imported once. What fails is a result with its error; a process
that dies is replaced. At --minutes no further run is begun. `table.py OUT` shows what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from catalogue import DEFAULT_PEERS, PEERS, Task, parse_rows, tasks

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


class Child:
    """A process of `child.py`; `ask` gives its answer, or an error where it died or took too long."""

    def __init__(self, module: str, environment: list[Path], log: Path, threads: int) -> None:
        path = [str(HERE), *map(str, environment), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": str(max(threads, 2))}  # it needs two
        variables |= {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._log = log.open("ab")
        self.log_path = log
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "child.py"), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **variables},
            cwd=log.parent,  # some write logs where they are
        )
        self._answers: Queue[bytes] = Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, task: dict[str, Any], limit: float) -> dict[str, Any]:
        """The child's answer; without one within `limit` seconds it is ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=limit)
        except BrokenPipeError:
            answer = b""
        except Empty:
            self.end()
            return {"error": f"TimeoutError: no answer within {limit:.0f} s"}
        if not answer:
            self._process.wait()
            said = self.log_path.read_text(errors="replace").strip().splitlines()[-1:]
            return {"error": f"the process ended with {self._process.returncode}: {''.join(said)[:300]}"}
        found: dict[str, Any] = json.loads(answer)
        return found

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")


class Board:
    """The runs that are left; a worker that has a peer's process keeps to that peer while it has runs."""

    def __init__(self, todo: list[Task], deadline: float) -> None:
        self._todo, self._deadline, self._lock = todo, deadline, threading.Lock()
        self._busy: dict[str, int] = {}

    def take(self, peer: str | None) -> Task | None:
        """The next run: of `peer`, else of the peer with the fewest workers."""
        with self._lock:
            if peer is not None:
                self._busy[peer] -= 1
            if not self._todo or time.monotonic() > self._deadline:
                return None
            mine = [task for task in self._todo if task.peer == peer]
            task = mine[0] if mine else min(self._todo, key=lambda task: self._busy.get(task.peer, 0))
            self._todo.remove(task)
            self._busy[task.peer] = self._busy.get(task.peer, 0) + 1
            return task


class Worker(threading.Thread):
    """Does runs until none is left."""

    def __init__(self, number: int, board: Board, args: argparse.Namespace) -> None:
        super().__init__()
        self.number, self.board, self.args = number, board, args
        self.peer: str | None = None
        self.quantizer: Child | None = None
        self.scorer: Child | None = None

    def run(self) -> None:
        while (task := self.board.take(self.peer)) is not None:
            if task.peer != self.peer:
                self._dismiss()
            self.peer = task.peer
            start = time.monotonic()
            try:
                result = self._do(task)
            except Exception as error:  # one run never ends the others
                result = {"error": f"{type(error).__name__}: {error}"}
            result |= {"row": str(task.row), "peer": task.peer, "seed": task.seed, "wall": time.monotonic() - start}
            part = self.args.out / f"{task.name}.part"
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(self.args.out / f"{task.name}.json")
            print(f"{time.monotonic() - self.args.start:6.0f} s  {task.name}: {_said(result)}", flush=True)
        self._dismiss()
        if self.scorer is not None:
            self.scorer.end()

    def _do(self, task: Task) -> dict[str, Any]:
        args, environment = self.args, PEERS[task.peer].environment
        if environment and not (args.environments / environment).is_dir():
            return {"error": f"not installed: {args.environments / environment} is not there; see install.py"}
        if self.quantizer is None or not self.quantizer.alive:
            self.quantizer = self._child("quantizing", environment, f"{task.peer}-{self.number}")
        shared = {"model": str(args.model), "device": args.device}
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            shared["out"] = str(Path(scratch, "model"))
            asked = task.to_json() | shared | {"tokens": str(args.tokens)}
            asked["options"] |= args.options.get(task.peer, {})
            result = self.quantizer.ask(asked, args.limit)
            result["options"] = asked["options"]
            if "error" in result:
                return result
            if self.scorer is None or not self.scorer.alive:
                self.scorer = self._child("scoring", "", f"scorer-{self.number}")
            asked = shared | {"texts": args.texts, "context": args.context, "max_tokens": args.max_tokens}
            return result | self.scorer.ask(asked, args.limit)

    def _child(self, module: str, environment: str, log: str) -> Child:
        args = self.args
        paths = [args.environments / environment] if environment else [SOURCE]
        paths += [args.environments / "shared"] if (args.environments / "shared").is_dir() else []
        return Child(module, paths, args.out / f"{log}.log", args.threads)

    def _dismiss(self) -> None:
        if self.quantizer is not None:
            self.quantizer.end()
        self.quantizer = None


def _said(result: dict[str, Any]) -> str:
    if "error" in result:
        return str(result["error"])
    scores = [f"{name} ppl {s['perplexity']:.2f} KL {s['kl']:.4f}" for name, s in result["scores"].items()]
    return f"{', '.join(scores)}, {result['seconds']:.1f} s, {result['gpu_peak_mb'] or result['peak_mb']:.0f} MB"


def folder(text: str) -> Path:
    """Absolute: the children work elsewhere."""
    return Path(text).resolve()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=folder, required=True)
    parser.add_argument("--tokens", type=folder, required=True, help="the folder that tokens.py wrote")
    parser.add_argument("--environments", type=folder, required=True, help="the folder that install.py wrote")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="scored; repeatable")
    parser.add_argument("--out", type=folder, required=True)
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS))
    parser.add_argument("--rows", default="all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="of each text; all by default")
    parser.add_argument("--minutes", type=float, default=1e6, help="after so many no further run is begun")
    parser.add_argument("--limit", type=float, default=1e6, help="seconds that a run may take")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help='{"autoround": {"iters": 50}}')
    parser.add_argument("--scratch", type=folder, default=Path(tempfile.gettempdir()))
    parser.add_argument("--again", action="store_true", help="repeat the runs that ended in an error")
    args = parser.parse_args()
    named = (pair.split("=", 1) for pair in args.text)
    args.texts = {name: str(folder(path)) for name, path in named}
    args.start = time.monotonic()
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    peers, seeds = args.peers.split(","), map(int, args.seeds.split(","))
    todo = [task for task in tasks(parse_rows(args.rows), peers, seeds) if not _is_done(task, args)]
    board = Board(todo, args.start + 60 * args.minutes)
    workers = [Worker(number, board, args) for number in range(args.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for part in args.out.glob("*.part"):
        part.unlink()
    shutil.rmtree(HERE / "__pycache__", ignore_errors=True)


def _is_done(task: Task, args: argparse.Namespace) -> bool:
    path = args.out / f"{task.name}.json"
    return path.exists() and not (args.again and "error" in json.loads(path.read_text()))


if __name__ == "__main__":
    main()
