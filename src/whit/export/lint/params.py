"""Scales and zero points of a quantized matrix, and the configuration's claims about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch

from whit.checkpoint.reader import Checkpoint, TensorFiles
from whit.export.lint.findings import Finding
from whit.export.readers.base import Packed
from whit.export.readers.compressed_tensors import beyond, packing
from whit.layouts.affine import integers_of, middle
from whit.layouts.words import unpack_words

SCALES = ("scales", "weight_scale", "SCB", "weight.absmax", "weight.nested_absmax", "scale")


def param_findings(
    method: str, said: Mapping[str, Any], checkpoint: Checkpoint, module: str, item: Packed
) -> Iterator[Finding]:
    """What is wrong or odd about one module."""
    if item.note is not None:
        yield Finding("note", module, item.note)
    for key in SCALES:
        if f"{module}.{key}" in checkpoint and checkpoint.entries[f"{module}.{key}"].spec.dtype.is_floating_point:
            yield from scale_findings(checkpoint, f"{module}.{key}")
    if method == "gptq":
        yield from _gptq(said, checkpoint, module, item)
    if method == "compressed-tensors":
        yield from _zeros(checkpoint, module, item)
        yield from _words(said, checkpoint, module, item)
    if item.format is not None and method in ("gptq", "awq"):
        integers = integers_of(item.format)
        size = item.format.group_size if integers is None else integers.group_size
        yield from _claims(said, module, item.format.bits, size)


def scale_findings(checkpoint: TensorFiles, key: str) -> Iterator[Finding]:
    """Scales that are not finite, or negative."""
    scale = checkpoint[key].float()
    finite = torch.isfinite(scale)
    if bad := int((~finite).sum()):
        yield Finding("problem", key, f"{bad} of {scale.numel()} are not finite; they must be; quantize again")
    if bool((scale[finite] < 0).any()):  # not how many: one line for all modules of a kind
        yield Finding("note", key, "some are negative, which some kernels do not expect")


def _gptq(said: Mapping[str, Any], checkpoint: Checkpoint, module: str, item: Packed) -> Iterator[Finding]:
    """Version 1 stores zero points less one: symmetric 4-bit words read 0x77777777, in version 2 0x88888888."""
    rows = item.shape[0]
    words = checkpoint[f"{module}.qzeros"]
    bits = 32 * words.shape[1] // max(rows, 1)
    if bits not in (2, 3, 4, 8):
        return
    stored = unpack_words(words, rows, bits)
    kind = str(said.get("checkpoint_format") or said.get("format") or "gptq")
    center, total = middle(bits), stored.numel()
    if kind == "gptq" and said.get("sym", False) and int((stored == center).sum()) == total:
        yield Finding(
            "problem", module, f"zero points of {center} as stored, which version 1 reads as {center + 1}: the file is "
            'version 2; set checkpoint_format to "gptq_v2"',
        )  # fmt: skip
    if kind == "gptq_v2" and said.get("sym", False) and int((stored == center - 1).sum()) == total:
        yield Finding(
            "problem", module, f"zero points of {center - 1} as stored, which version 2 takes as they are: the file is "
            'version 1; set checkpoint_format to "gptq"',
        )  # fmt: skip
    if kind == "gptq" and (over := int((stored == (1 << bits) - 1).sum())):
        yield Finding(
            "problem", module, f"{over} of {total} zero points are out of range: {1 << bits} after version 1's offset, "
            "which some readers take for 0 and others carry into the next; write it as gptq_v2",
        )  # fmt: skip
    if said.get("sym", False) and item.format is not None and "asym" in str(item.format):
        yield Finding("problem", module, "config.json says sym, and zero points are not the middle; set sym to false")


def _claims(said: Mapping[str, Any], module: str, bits: int, group_size: int) -> Iterator[Finding]:
    """Claimed bits and group size against real shapes."""
    options: Mapping[str, Any] = said
    dynamic = said.get("dynamic")
    for pattern, more in dynamic.items() if isinstance(dynamic, dict) else ():
        if isinstance(more, dict) and re.match(str(pattern).removeprefix("+:"), module):
            options = {**said, **more}
    claimed = options.get("bits", options.get("w_bit", bits))
    if claimed != bits:
        yield Finding("problem", module, f"config.json says {claimed} bits, and the tensors hold {bits}; correct it")
    size = options.get("group_size", options.get("q_group_size", group_size))
    if isinstance(size, int) and max(size, 0) != group_size and group_size:
        yield Finding(
            "problem", module, f"config.json says group_size {size}, the tensors have {group_size}; correct it"
        )


def _zeros(checkpoint: Checkpoint, module: str, item: Packed) -> Iterator[Finding]:
    """Zero points of older files, a byte each."""
    key = f"{module}.weight_zero_point"
    if item.format is None or key not in checkpoint or checkpoint.entries[key].spec.dtype != torch.int8:
        return
    if outside := beyond(checkpoint[key], item.format.bits):
        total = prod(checkpoint.entries[key].spec.shape)
        yield Finding(
            "problem", key, f"{outside} of {total} zero points are out of range of {item.format.bits} bits; they "
            "must be codes; quantize again",
        )  # fmt: skip


def _words(said: Mapping[str, Any], checkpoint: Checkpoint, module: str, item: Packed) -> Iterator[Finding]:
    """Dense or padded words, which differ for 3, 5, 6 and 7 bits and have no mark in the file."""
    if f"{module}.weight_packed" not in checkpoint or item.format is None or 32 % item.format.bits == 0:
        return
    words = checkpoint.entries[f"{module}.weight_packed"].spec.shape[1]
    found = packing(item.shape[1], words, [item.format.bits])
    if found is not None:
        kind, other = ("dense", "before") if found[1] else ("padded", "since")
        yield Finding(
            "note", module, f"{item.format.bits}-bit codes in {kind} words; compressed-tensors {other} 0.18 "
            "reads them otherwise",
        )  # fmt: skip
