"""8 to 32 rows of bfloat16 through ggml's types (runs_rows.cu says how)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc, runs, runs_row
from whit.kernels.gpu.runs_row import MOST_SHARED, Params, kind_of, pitches, steps
from whit.tensor import PackedWeight

SOURCE = Path(__file__).with_name("runs_rows.cu")
TOGETHER = 32  # rows of a launch
LEAST_ROWS, MOST_ROWS, LEAST_SIZE = 5, 32, 1 << 25  # where it is faster than others; of weights


@dataclass(frozen=True)
class Config:
    """How the work is cut: warps of a block, and steps that a warp has under way."""

    warps: int = 16
    ahead: int = 1


def rounded(rows: int) -> int:
    """Rows that the kernel is built for: 8, 16 or 32."""
    return max(8, 1 << (min(rows, TOGETHER) - 1).bit_length())


def shared_bytes(packed: PackedWeight, config: Config, rows: int, slice_steps: int) -> int:
    """Dynamic shared memory of a block: table, a slice of x, sums and scales of two tiles, a ticket."""
    rows, table = rounded(rows), runs_row.TABLE if kind_of(packed).levels else 0
    return table + rows * (slice_steps * 256 + 128 * config.warps) + 2 * (16 * sum(pitches(packed)) + 16) + 16


def slices(packed: PackedWeight, config: Config, rows: int) -> int:
    """Into how many slices of columns x is cut, so that one has room; 0: none has. No slice is empty."""
    count = steps(packed.shape[1])
    each = (MOST_SHARED - shared_bytes(packed, config, rows, 0)) // (256 * rounded(rows))
    return 0 if each < 1 else -(-count // -(-count // -(-count // each)))


def best(packed: PackedWeight, rows: int) -> Config | None:
    """How the product is cut, by what was fastest on an H100; None where another way is faster."""
    (outs, columns), wide = packed.shape, packed.shape[0] >= 2 * packed.shape[1]
    if not LEAST_ROWS <= rows <= MOST_ROWS or (rows <= runs.MOST_ROWS and not wide) or outs * columns < LEAST_SIZE:
        return None
    cut = Config()
    return cut if slices(packed, cut, rows) else None


def macros(packed: PackedWeight, config: Config, rows: int) -> dict[str, int]:
    """What runs_rows.cu is compiled with."""
    base = runs_row.macros(packed, runs_row.Config(config.warps, config.ahead), False, 1)
    return base | {"ROWS": rounded(rows)}


def params(x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor, room: tuple[Tensor, Tensor]) -> Params:
    """The kernel's argument; `room`: partial sums (slices, rows, outs) in float32 and int32 zeros for each 16 outs."""
    found = runs_row.params(x, packed, bias, y)
    found.slice_steps = -(-steps(packed.shape[1]) // len(room[0]))
    found.partial, found.arrived = room[0].data_ptr(), room[1].data_ptr()
    return found


@lru_cache(maxsize=64)
def _build(macros: tuple[tuple[str, int], ...], device: int) -> nvrtc.Function:
    return nvrtc.build(SOURCE, dict(macros), "runs_rows", device)


def multiply(x: Tensor, packed: PackedWeight, bias: Tensor | None, config: Config) -> Tensor:
    """Contiguous x (rows, columns) of bfloat16, 32 rows at a time, through a weight that `runs_row.why_not` allows."""
    y = torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    for first in range(0, len(x), TOGETHER):
        launch(x[first : first + TOGETHER], packed, bias, y[first : first + TOGETHER], config)
    return y


def launch(x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor, config: Config) -> None:
    """Fill y (rows, outs) from x (rows, columns), up to 32 rows."""
    rows, outs, cuts = len(x), packed.shape[0], slices(packed, config, len(x))
    tiles = -(-outs // 16)
    partial = torch.empty(cuts, rows if cuts > 1 else 0, outs, device=x.device)
    arrived = torch.zeros(tiles if cuts > 1 else 0, dtype=torch.int32, device=x.device)
    function = _build(tuple(macros(packed, config, rows).items()), x.device.index)
    blocks = min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count // cuts)
    where = nvrtc.stream_on(x.device.index)
    argument = params(x, packed, bias, y, (partial, arrived))
    shared = shared_bytes(packed, config, rows, argument.slice_steps)
    function.launch_early((max(blocks, 1), cuts, 1), 32 * config.warps, shared, argument, where)
