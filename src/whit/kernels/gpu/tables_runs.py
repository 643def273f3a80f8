"""What was measured of ggml's types through many.cu on NVIDIA H100s: rows of benchmarks/runs_gpu.py.

The keys are those of tables.py: (kind of weight, how many rows, (outs, columns)).
"""

from __future__ import annotations

from whit.kernels.gpu.tables import Key

HOPPER_RUNS: dict[Key, tuple[int, ...] | None] = {}
RUNS_MANY = {9: HOPPER_RUNS}
