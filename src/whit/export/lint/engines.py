"""Which engines will refuse a checkpoint, and why: what is known of them, by the format of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from whit.export.lint.findings import Finding
from whit.export.readers.base import Packed
from whit.formats.act_order import ActOrder
from whit.layouts.affine import integers_of

MARLIN_GROUPS = (0, 32, 64, 128)


def engine_findings(method: str, said: Mapping[str, Any], packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """One note per engine and reason."""
    for engine, kinds, refuses in ENGINES:
        if method in kinds:
            reasons: dict[str, int] = {}
            for item in packed.values():
                if reason := refuses(said, item):
                    reasons[reason] = reasons.get(reason, 0) + 1
            for reason, count in reasons.items():
                yield Finding("note", engine, f"will not take {count} of {len(packed)} matrices: {reason}")


def _marlin(said: Mapping[str, Any], item: Packed) -> str | None:
    affine = integers_of(item.format) if item.format is not None else None
    if affine is None:
        return None if item.note is None else item.note
    if affine.bits not in (4, 8):
        return f"{affine.bits} bits; it has 4 and 8"
    if said.get("quant_method") == "gptq" and not affine.symmetric:
        return "asymmetric GPTQ; it has symmetric only"
    if affine.group_size not in MARLIN_GROUPS:
        return f"group_size {affine.group_size}; it has 32, 64, 128 and whole rows"
    rows, columns = item.shape
    return f"shape {[rows, columns]}; it needs multiples of 64 and 128" if rows % 64 or columns % 128 else None


def _old_gptq(said: Mapping[str, Any], item: Packed) -> str | None:
    kind = said.get("checkpoint_format") or said.get("format")
    return "version 2 of the format, whose zero points it would take for version 1's" if kind == "gptq_v2" else None


def _bnb_cpu(said: Mapping[str, Any], item: Packed) -> str | None:
    return f"{item.shape[0]} rows; it needs a multiple of 32" if item.shape[0] % 32 else None


def _transformers_ct(said: Mapping[str, Any], item: Packed) -> str | None:
    if item.format is None or "asym" not in str(item.format):
        return None
    return "asymmetric; it fails on the zero point's shape unless given CompressedTensorsConfig(dequantize=True)"


def _new_ct(said: Mapping[str, Any], item: Packed) -> str | None:
    return "act-order by groups, which it no longer reads" if isinstance(item.format, ActOrder) else None


def _not_mlx(said: Mapping[str, Any], item: Packed) -> str | None:
    return "MLX's tensors, which only mlx-lm and whit read"


def _not_onnx(said: Mapping[str, Any], item: Packed) -> str | None:
    return "a graph of ONNX, which ONNX Runtime, onnxruntime-genai and whit read"


Refusal = Callable[[Mapping[str, Any], Packed], str | None]
ENGINES: tuple[tuple[str, tuple[str, ...], Refusal], ...] = (
    ("vLLM's Marlin kernels", ("gptq", "awq", "auto-round", "compressed-tensors"), _marlin),
    ("AutoGPTQ before version 2", ("gptq",), _old_gptq),
    ("bitsandbytes on a CPU", ("bitsandbytes",), _bnb_cpu),
    ("transformers with compressed-tensors", ("compressed-tensors",), _transformers_ct),
    ("compressed-tensors since 0.20", ("compressed-tensors",), _new_ct),
    ("transformers and vLLM", ("mlx",), _not_mlx),
    ("transformers and vLLM", ("onnx",), _not_onnx),
)
