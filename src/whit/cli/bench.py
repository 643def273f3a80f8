"""`whit bench`: how fast the kernels run here, beside the machine's limits and the installed peers."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from whit.cli.console import console, print_json


class Subject(str, Enum):
    kernels = "kernels"


def bench(
    what: Annotated[Subject, typer.Argument(help="kernels: products with packed weights.")],
    formats: Annotated[str, typer.Option("--format", help="Formats, separated by commas.")] = "int4-g128,nf4",
    shapes: Annotated[str, typer.Option("--shape", help="out x in, separated by commas.")] = "4096x4096",
    rows: Annotated[str, typer.Option(help="Rows of activations, separated by commas.")] = "1,16,512",
    rounds: Annotated[int, typer.Option(help="Turns that every kernel takes.")] = 5,
    threads: Annotated[int, typer.Option(help="0: as torch chooses.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Only JSON on standard output.")] = False,
) -> None:
    """Measure kernels: seconds, ratio to torch's bfloat16 product, and share of what this machine can do."""
    import torch

    from whit.evaluation.kernel_speed import HEADER, measure, measure_limits, table

    if threads:
        torch.set_num_threads(threads)
    sizes = [parse_shape(text) for text in shapes.split(",")]
    limits = measure_limits()
    speeds = []
    for shape in sizes:
        for format in formats.split(","):
            for count in rows.split(","):
                speeds += measure(format, shape, int(count), limits, rounds)
    if json:
        machine = {
            "threads": torch.get_num_threads(),
            "read_bytes_per_second": limits.read_bytes_per_second,
            "matmul_flops": limits.matmul_flops,
        }
        print_json({"machine": machine, "rows": [speed.as_json() for speed in speeds]})
        return
    from rich.table import Table

    shown = Table(*HEADER)
    for line in table(speeds):
        shown.add_row(*line)
    read, flops = limits.read_bytes_per_second / 1e9, limits.matmul_flops / 1e12
    said = f"{torch.get_num_threads()} threads; the machine reads {read:.1f} GB/s and multiplies {flops:.2f} TFLOP/s"
    console().print(shown)
    console().print(said)


def parse_shape(text: str) -> tuple[int, int]:
    """`4096x11008` as (4096, 11008); wrong usage otherwise."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{text}: a shape is two sizes, out x in; for example 4096x11008")
    return int(parts[0]), int(parts[1])
