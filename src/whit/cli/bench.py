"""`whit bench`: how fast kernels and models run here, beside the machine's limits and the installed peers."""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Annotated, Any

import typer

from whit.checkpoint.hub import at_revision
from whit.cli.console import on_screen, print_json, say
from whit.cli.options import MODEL_HELP, AsJson, Revision
from whit.cli.quiet import quiet_transformers
from whit.cli.shown import counted


class Subject(str, Enum):
    kernels = "kernels"
    model = "model"


def bench(
    what: Annotated[
        Subject,
        typer.Argument(metavar="WHAT", help="kernels: packed products; model: a whole MODEL; both on the CPU."),
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = "",
    formats: Annotated[
        str, typer.Option("--format", help="Formats or schemes such as w8a8, separated by commas.")
    ] = "int4-g128,nf4",
    shapes: Annotated[str, typer.Option("--shape", help="out x in, separated by commas.")] = "4096x4096",
    rows: Annotated[str, typer.Option(help="Rows of activations, separated by commas.")] = "1,16,512",
    rounds: Annotated[int, typer.Option(min=1, help="How often each kernel is measured, in turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    prompt: Annotated[int, typer.Option("--prompt-tokens", "--prompt", min=1, help="Tokens of the prompt.")] = 32,
    new: Annotated[int, typer.Option("--new-tokens", "--new", min=1, help="Tokens that a model writes.")] = 128,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also measure the model in bfloat16 and in llama.cpp (GGUF).")
    ] = False,
    as_json: AsJson = False,
    revision: Revision = None,
) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if what is Subject.model:
        if not model:
            raise typer.BadParameter(
                "bench model: no MODEL is given; name a folder, a .gguf file, a hub id or whit:model"
            )
        model = at_revision(model, revision)
        _bench_model(model, (prompt, new), rounds, peers, as_json)
    else:
        if model:
            raise typer.BadParameter(f"bench kernels: measures shapes, not {model}; use --shape, or whit bench model")
        _bench_kernels(formats, shapes, rows, rounds, as_json)


def _bench_model(model: str, lengths: tuple[int, int], rounds: int, peers: bool, as_json: bool) -> None:
    import torch

    from whit.checkpoint.hub import resolve_model
    from whit.errors import UnsupportedModelError
    from whit.evaluation.kernel_speed import measure_limits
    from whit.evaluation.model_speed import (
        HEADER,
        Contender,
        LlamaCpp,
        Transformers,
        has_llama_cpp,
        measure_model,
        table,
    )
    from whit.integrations.loading import load_causal_lm
    from whit.training import count_parameters

    quiet_transformers()
    network = load_causal_lm(model, device="cpu")
    limits = measure_limits()
    contenders: dict[str, Contender] = {"whit, not compiled": Transformers(network, compiled=False)}
    try:
        contenders["whit"] = Transformers(network, compiled=True)
    except UnsupportedModelError as error:
        say(str(error))
    if peers:
        plain = load_causal_lm(model, device="cpu", dtype="bfloat16")
        if hasattr(plain, "dequantize") and getattr(plain, "is_quantized", False):
            plain = plain.dequantize()
        contenders["bf16"] = Transformers(plain.to(torch.bfloat16), compiled=False)
        file = resolve_model(model)
        if file.suffix == ".gguf" and has_llama_cpp():
            contenders["llama.cpp"] = LlamaCpp(file, torch.get_num_threads())
        else:
            why = "xllamacpp is not installed" if file.suffix == ".gguf" else "MODEL is no .gguf file"
            say(f"llama.cpp is left out: {why}")
    speeds = measure_model(contenders, count_parameters(network)[1], limits, *lengths, rounds)
    _show(as_json, limits, [speed.as_json() for speed in speeds], HEADER, table(speeds))


def _bench_kernels(formats: str, shapes: str, rows: str, rounds: int, as_json: bool) -> None:
    from whit.evaluation.kernel_speed import HEADER, measure, measure_limits, table
    from whit.recipe import split_list
    from whit.recipe.shorthands import parse_spec

    quiet_transformers()  # the peers say things when they are imported
    sizes = [parse_shape(text) for text in split_list(shapes)]
    counts = [parse_rows(text) for text in split_list(rows)]
    specs = split_list(formats)
    for spec in specs:
        parse_spec(spec)  # a wrong one is said before anything is measured
    limits = measure_limits()
    speeds = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for shape in sizes:
            for format in specs:
                for count in counts:
                    speeds += measure(format, shape, count, limits, rounds)
    for text in dict.fromkeys(str(entry.message) for entry in said if "is left out" in str(entry.message)):
        say(text)
    _show(as_json, limits, [speed.as_json() for speed in speeds], HEADER, table(speeds))


def _show(
    as_json: bool, limits: Any, rows: list[dict[str, Any]], header: tuple[str, ...], lines: list[tuple[str, ...]]
) -> None:
    import torch
    from rich.table import Table

    threads = torch.get_num_threads()
    if as_json:
        machine = {
            "threads": threads, "read_bytes_per_second": limits.read_bytes_per_second,
            "matmul_flops": limits.matmul_flops,
        }  # fmt: skip
        print_json({"machine": machine, "rows": rows})
        return
    shown = Table(*header)
    for line in lines:
        shown.add_row(*line)
    read, flops = limits.read_bytes_per_second / 1e9, limits.matmul_flops / 1e12
    screen = on_screen()
    screen.print(shown)
    limit = f"the machine reads {read:.1f} GB/s and multiplies {flops:.2f} TFLOP/s"
    say(f"{counted(threads, 'thread')}; {limit}", screen)


def parse_shape(text: str) -> tuple[int, int]:
    """`4096x11008` as (4096, 11008); wrong usage otherwise."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{text}: a shape is two sizes, out x in; for example 4096x11008")
    return int(parts[0]), int(parts[1])


def parse_rows(text: str) -> int:
    """A number of rows; wrong usage otherwise."""
    if not text.isdigit() or not int(text):
        raise typer.BadParameter(f"{text!r}: rows are whole numbers from 1 on, with commas; for example 1,16,512")
    return int(text)
