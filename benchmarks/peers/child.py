"""A process that imports its libraries once and does one task after the other: python child.py MODULE

Each line of its input is a task in JSON, each line of its output the answer: what `MODULE.run(task)` gives, or
{"error": ...} in one sentence. Whatever libraries print goes to the error stream.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        try:
            answer = module.run(json.loads(line))
        except Exception as error:  # a peer raises whatever it likes, and the next task may still do
            traceback.print_exc()
            said = " ".join(str(error).split())[:400]
            answer = {"error": f"{type(error).__name__}: {said}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
