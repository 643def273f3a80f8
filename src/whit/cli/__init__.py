"""The command line: one small file per command, and here what they share at the door.

What `--help` says of each command stands in `whit_command`, which can say it before torch is imported.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

import whit
from whit.cli import (
    bench,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    finetune,
    generate,
    imatrix,
    inspect,
    memory,
    merge,
    quantize,
    train,
)
from whit.cli.console import say_error
from whit.cli.elsewhere import Command
from whit.cli.quiet import bars_on_terminals_alone, warnings_in_a_line
from whit.errors import WhitError, is_out_of_memory, reason_of
from whit_command import COMMANDS, SUMMARY

FUNCTIONS = (
    quantize.quantize, evaluate.evaluate, compare.compare, generate.generate, finetune.finetune, convert.convert,
    train.train, imatrix.imatrix, merge.merge, inspect.inspect, memory.memory, bench.bench, doctor.doctor, demo.demo,
)  # fmt: skip
INTERRUPTED = 130  # 128 + SIGINT, as shells have it; what typer makes of Ctrl-C too


def build_app() -> typer.Typer:
    """The whole command line as one typer application."""
    app = typer.Typer(
        name="whit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=SUMMARY
    )
    app.callback()(_root)
    for function in FUNCTIONS:
        app.command(function.__name__, cls=Command, help=COMMANDS[function.__name__])(function)
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"whit {whit.__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", callback=_version)] = False,
) -> None:
    """What stands before a command."""


def main() -> None:
    """Entry point: 0 done, 1 a clear error in one sentence, 2 wrong usage, 3 a quality gate not met."""
    bars_on_terminals_alone()
    warnings_in_a_line()
    try:
        build_app()()
    except WhitError as error:
        say_error(str(error))
        sys.exit(error.exit_status)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say_error(out_of_memory(error))
        sys.exit(1)
    except OSError as error:
        say_error(f"{error.filename or 'system'}: {error.strerror or error}; nothing was left half-written")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        say_error("interrupted: run the same command again to go on from here")
        sys.exit(INTERRUPTED)


def out_of_memory(error: BaseException) -> str:
    """What to do, and how much more was asked for where the error says so."""
    found = re.search(r"allocate (\d[\d.]* ?\w+)", str(error))
    said = f"{found[1]} more were asked for" if found else reason_of(error)
    return (
        f"out of memory ({said}); `whit memory MODEL` says what a model takes; make room, or ask for less (a smaller "
        "--context, fewer --samples); the same command goes on from what is finished"
    )
