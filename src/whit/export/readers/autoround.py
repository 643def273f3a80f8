"""AutoRound's own files: the tensors of GPTQ, of AWQ or of compressed-tensors, as `packing_format` says.

`auto_round:auto_gptq` is GPTQ version 1; `auto_round:gptqmodel` and plain `auto_round` (with or without the name of a
kernel) hold zero points as they are, version 2; `auto_round:auto_awq` is AWQ gemm; `auto_round:llm_compressor` has
compressed-tensors' names. There is no `g_idx`, and bits may differ by linear (`extra_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.awq import read_awq
from whit.export.readers.base import Packed, modules_with
from whit.export.readers.compressed_tensors import read_compressed_tensors
from whit.export.readers.gptq import read_gptq
from whit.layouts.gptq import BITS
from whit.layouts.words import word_count


def read_autoround(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `qweight`, or with a `weight_packed` or `weight_scale`."""
    kind = str(config.get("packing_format") or config.get("backend") or "auto_round")
    if "awq" in kind:
        return read_awq({**config, "version": "gemm"}, checkpoint)
    if "llm_compressor" in kind or "fp8" in kind:
        return read_compressed_tensors({}, checkpoint)
    if not kind.startswith(("auto_round", "auto-round", "autoround", "gptq")):
        raise CheckpointError(
            f"{checkpoint.folder}: AutoRound's packing_format {kind}; whit reads auto_round, auto_round:auto_gptq, "
            "auto_round:gptqmodel, auto_round:auto_awq and auto_round:llm_compressor; export it as one of these"
        )
    version = "gptq" if "gptq" in kind and "gptqmodel" not in kind else "gptq_v2"
    widths = {f"^{module}$".replace(".", r"\."): w for module in modules_with(checkpoint, "qweight")
              if (w := _width(checkpoint, module))}  # fmt: skip
    dynamic = {pattern: {"bits": width} for pattern, width in widths.items()}
    return read_gptq({**config, "checkpoint_format": version, "dynamic": dynamic}, checkpoint)


def _width(checkpoint: Checkpoint, module: str) -> int | None:
    """Bits of a linear by the words that its rows' zero points fill; None where no tensor says so."""
    scales, zeros = (checkpoint.entries.get(f"{module}.{key}") for key in ("scales", "qzeros"))
    if scales is None or zeros is None or len(scales.spec.shape) != 2 or len(zeros.spec.shape) != 2:
        return None
    rows, words = scales.spec.shape[1], zeros.spec.shape[1]
    return next((bits for bits in BITS if word_count(rows, bits) == words), None)
