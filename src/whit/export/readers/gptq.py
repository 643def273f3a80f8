"""GPTQ versions 1 and 2, from the tensors as they are: bits by the length of `g_idx`, else by the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, group_size_of, modules_with, shape_of
from whit.formats.act_order import MOST_GROUPS, ActOrder
from whit.formats.affine import Affine
from whit.layouts.affine import middle
from whit.layouts.gptq import BITS, GPTQLayout, plain_groups
from whit.layouts.words import unpack_words, word_count
from whit.tensor import Format, PackedWeight, QuantizedTensor

ACT_ORDER = "act-order: its groups are not runs of neighbouring columns"
NO_FORMAT = f"{ACT_ORDER}, and group_size does not say how large they are"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_gptq(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `qweight`."""
    kind = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{checkpoint.folder}: GPTQ format {kind}; whit reads gptq and gptq_v2; convert it there")
    version = 1 if kind == "gptq" else 2
    packed = {}
    for module in modules_with(checkpoint, "qweight"):
        packed[f"{module}.weight"] = _linear(config, checkpoint, module, version)
    return packed


def _linear(config: Mapping[str, Any], checkpoint: Checkpoint, module: str, version: int) -> Packed:
    where = f"{checkpoint.folder}: {module}"
    words, rows = shape_of(checkpoint, f"{module}.qweight", 2, (torch.int32,))
    groups = shape_of(checkpoint, f"{module}.scales", 2, FLOATS)[0]
    has_index = f"{module}.g_idx" in checkpoint
    if has_index:
        columns = shape_of(checkpoint, f"{module}.g_idx", 1, (torch.int32, torch.int64))[0]
        bits = next((b for b in BITS if word_count(columns, b) == words), 0)
    else:
        bits = _claimed_bits(config, module)
        columns = 32 * words // max(bits, 1)
    zeros = shape_of(checkpoint, f"{module}.qzeros", 2, (torch.int32,))
    if bits not in BITS or zeros != (groups, word_count(rows, bits)):
        raise CheckpointError(
            f"{where}: qweight {[words, rows]} and qzeros {list(zeros)} fit no width of 2, 3, 4 or 8 bits; "
            "they must; get the file again"
        )
    keys = tuple(f"{module}.{key}" for key in ("qweight", "qzeros", "scales", *(["g_idx"] if has_index else [])))
    zero = _zero_points(checkpoint[f"{module}.qzeros"], rows, bits, version)
    symmetric = bool((zero == middle(bits)).all())
    index = checkpoint[f"{module}.g_idx"] if has_index else None
    size = _group_size(index, columns, groups, where, config.get("group_size"))
    kind = "f16" if checkpoint.entries[f"{module}.scales"].spec.dtype == torch.float16 else "f32"
    shape = (rows, columns)
    if size is None:
        scattered = size_of_scattered(columns, groups, config.get("group_size"))
        if scattered is None:
            floats = partial(_by_index, checkpoint, module, columns, bits, version)
            return Packed(keys, shape, None, floats, NO_FORMAT)
        ordered = ActOrder(Affine(bits, scattered, symmetric, scale_type=kind))
        return Packed(keys, shape, ordered, partial(_read, checkpoint, module, ordered, shape, version), ACT_ORDER)
    format = Affine(bits, size, symmetric, scale_type=kind)
    return Packed(keys, shape, format, partial(_read, checkpoint, module, format, shape, version))


def _read(checkpoint: Checkpoint, module: str, format: Format, shape: tuple[int, int], version: int) -> QuantizedTensor:
    keys = ("qweight", "qzeros", "scales", *(("g_idx",) if isinstance(format, ActOrder) else ()))
    tensors = {key: checkpoint[f"{module}.{key}"] for key in keys}
    if tensors["scales"].dtype != torch.float16:
        tensors["scales"] = tensors["scales"].float()
    return GPTQLayout(version).unpack(PackedWeight("gptq", format, shape, tensors))


def _by_index(checkpoint: Checkpoint, module: str, columns: int, bits: int, version: int) -> Tensor:
    """The weight where columns of a group lie apart: w[n, k] = scales[g, n] (q[k, n] - z[g, n]), g = g_idx[k]."""
    tensors = {key: checkpoint[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    group = tensors["g_idx"].long()
    codes = unpack_words(tensors["qweight"].t(), columns, bits).float()
    zero = _zero_points(tensors["qzeros"], len(codes), bits, version).float()
    return (codes - zero[group].t()) * tensors["scales"].float()[group].t()


def _zero_points(qzeros: Tensor, rows: int, bits: int, version: int) -> Tensor:
    """uint8 (groups, rows); what version 1 stores as 2^bits - 1 was 0, less one."""
    zero = unpack_words(qzeros, rows, bits)
    return (zero + 1) & ((1 << bits) - 1) if version == 1 else zero


def _group_size(index: Tensor | None, columns: int, groups: int, where: str, claimed: object) -> int | None:
    """Columns per group where groups are runs of neighbours, None where they are not."""
    if index is None:
        return group_size_of(columns, groups, where, claimed)
    if bool((index < 0).any()) or bool((index >= groups).any()):
        raise CheckpointError(f"{where}: g_idx names groups beyond the {groups} there are; get the file again")
    if columns % groups and isinstance(claimed, int) and claimed > 0 and -(-columns // claimed) == groups:
        if torch.equal(index.to(torch.int32), plain_groups(columns, claimed)):
            return claimed  # the last group of a row is shorter than the others
    elif columns % groups == 0:
        size = group_size_of(columns, groups, where, claimed)
        if torch.equal(index.to(torch.int32), plain_groups(columns, size)):
            return size
    return None


def size_of_scattered(columns: int, groups: int, claimed: object) -> int | None:
    """Columns per group where groups are not runs of neighbours; None where there is no such number."""
    if not 0 < groups <= MOST_GROUPS:
        return None
    if columns % groups == 0:
        return columns // groups
    return claimed if isinstance(claimed, int) and claimed > 0 and -(-columns // claimed) == groups else None


def _claimed_bits(config: Mapping[str, Any], module: str) -> int:
    """The bits of a module by the configuration, whose `dynamic` may have a regex for it."""
    bits = config.get("bits")
    for pattern, options in dict(config.get("dynamic") or {}).items():
        if isinstance(options, dict) and "bits" in options and re.match(pattern.removeprefix("+:"), module):
            bits = options["bits"]
    return bits if isinstance(bits, int) else 0
