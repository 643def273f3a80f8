"""The command line: one small file per command, and here what they share at the door."""

from __future__ import annotations

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
from whit.cli.quiet import bars_on_terminals_alone
from whit.errors import WhitError

COMMANDS = (
    ("quantize", quantize.quantize),
    ("evaluate", evaluate.evaluate),
    ("compare", compare.compare),
    ("generate", generate.generate),
    ("finetune", finetune.finetune),
    ("convert", convert.convert),
    ("train", train.train),
    ("imatrix", imatrix.imatrix),
    ("merge", merge.merge),
    ("inspect", inspect.inspect),
    ("memory", memory.memory),
    ("bench", bench.bench),
    ("doctor", doctor.doctor),
    ("demo", demo.demo),
)
INTERRUPTED = 130  # 128 + SIGINT, as shells have it; what typer makes of Ctrl-C too


def build_app() -> typer.Typer:
    """The whole command line as one typer application."""
    app = typer.Typer(
        name="whit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        help="Quantize any Hugging Face transformer, run it, and measure what was given up.",
    )  # fmt: skip
    app.callback()(_root)
    for name, function in COMMANDS:
        app.command(name)(function)
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"whit {whit.__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", callback=_version)] = False,
) -> None:
    """Quantize any Hugging Face transformer, run it, and measure what was given up."""


def main() -> None:
    """Entry point: 0 done, 1 a clear error in one sentence, 2 wrong usage, 3 a quality gate not met."""
    bars_on_terminals_alone()
    try:
        build_app()()
    except WhitError as error:
        say_error(str(error))
        sys.exit(error.exit_status)
    except OSError as error:
        say_error(f"{error.filename or 'system'}: {error.strerror or error}; nothing was left half-written")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        say_error("interrupted: run the same command again to go on from here")
        sys.exit(INTERRUPTED)
