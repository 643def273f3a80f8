"""optimum-quanto's files: `QuantizedModelForCausalLM.save_pretrained`, or a state's `save_file` and its map beside it.

config.json says nothing: `quanto_qmap.json` (or `quantization_map.json`) says of each module its `weights`.

    qint8, qfloat8   weight._data (N, K), weight._scale (N, 1), or one: w = data scale
    qint4, qint2     weight._data._data uint8 (R 4 / 8 or R 2 / 8, size), R = N K / size groups in rows of `size`, the
                     first R / 2 (R / 4) of them in the lowest bits; weight._scale, weight._shift (R, 1):
                     w = data scale - shift, or, where the shift is an integer, (data - shift) scale

The shape of a matrix in groups is in no file: it is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.activations import Activations
from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed, modules_with, shape_of
from whit.export.readers.blocks import Blocks, affine_blocks
from whit.formats.microfloat import Float8
from whit.formats.offset import Offset
from whit.model.skeleton import load_skeleton
from whit.tensor import QuantizedTensor

BITS = {"qint4": 4, "qint2": 2}
BYTES = {"qint8": torch.int8, "qfloat8": torch.float8_e4m3fn, "qfloat8_e4m3fn": torch.float8_e4m3fn,
         "qfloat8_e5m2": torch.float8_e5m2}  # fmt: skip
INPUTS = {"qint8": "int8", "qfloat8": "fp8", "qfloat8_e4m3fn": "fp8"}
FLOATS = tuple(SCALE_TYPES)
E5M2_NOTE = "FP8 in E5M2, which no format of whit is"


def read_quanto(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every module with a `weight._data` or `weight._data._data`."""
    known = config.get("modules")
    said = known if isinstance(known, Mapping) else {}
    names = [*modules_with(checkpoint, "weight._data"), *modules_with(checkpoint, "weight._data._data")]
    return {f"{module}.weight": _module(checkpoint, module, said.get(module)) for module in names}


def _module(checkpoint: Checkpoint, module: str, said: object) -> Packed:
    where = f"{checkpoint.folder}: {module}"
    kinds = said if isinstance(said, Mapping) else {}
    kind, inputs = str(kinds.get("weights"))[:40], str(kinds.get("activations"))[:40]
    if kind not in BITS and kind not in BYTES:
        raise CheckpointError(
            f"{where}: quanto's map says weights {kind} of it; they must be {', '.join([*BYTES, *BITS])}; get it again"
        )
    scale = checkpoint.entries.get(f"{module}.weight._scale")
    if scale is None or scale.spec.dtype not in FLOATS:
        raise CheckpointError(f"{where}: weight._scale is missing or holds no floats; get the file again")
    return (_groups if kind in BITS else _bytes)(checkpoint, module, kind, partial(_inputs, inputs))


def _inputs(kind: str) -> Activations | None:
    if kind in ("none", "None"):
        return None
    if kind not in INPUTS:
        raise CheckpointError(f"inputs are rounded to {kind}; whit has qint8 and qfloat8")
    return Activations("static", INPUTS[kind])


def _keys(checkpoint: Checkpoint, module: str, first: str) -> tuple[str, ...]:
    more = ("weight._scale", "weight._shift", "input_scale", "output_scale")
    return (f"{module}.{first}", *(key for name in more if (key := f"{module}.{name}") in checkpoint))


def _bytes(checkpoint: Checkpoint, module: str, kind: str, inputs: Any) -> Packed:
    keys = _keys(checkpoint, module, "weight._data")
    shape = shape_of(checkpoint, keys[0], 2, (BYTES[kind],))
    scale = checkpoint[keys[1]]
    if scale.numel() not in (1, shape[0]):
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: {scale.numel()} scales for {list(shape)}; there must be one, or one for "
            "each row; get the file again"
        )
    block = shape if scale.numel() == 1 else (1, shape[1])
    said = Blocks(f"{checkpoint.folder}: {module}", keys, shape, block, 8, -128)
    if kind == "qint8":
        found = affine_blocks(said, scale, None, lambda: checkpoint[keys[0]])
    elif kind == "qfloat8_e5m2":
        found = Packed(keys, shape, None, lambda: checkpoint[keys[0]].float() * said.spread(scale), E5M2_NOTE)
    else:
        params = {"scale": scale.float().reshape(-1, 1).expand(shape[0], 1).contiguous()}
        found = Packed(
            keys, shape, Float8(),
            lambda: QuantizedTensor(Float8(), shape, checkpoint[keys[0]].view(torch.uint8), params),
        )  # fmt: skip
    return Packed(found.keys, found.shape, found.format, found.load, found.note, inputs=inputs)


def _groups(checkpoint: Checkpoint, module: str, kind: str, inputs: Any) -> Packed:
    where, bits = f"{checkpoint.folder}: {module}", BITS[kind]
    keys = _keys(checkpoint, module, "weight._data._data")
    lines, size = shape_of(checkpoint, keys[0], 2, (torch.uint8,))
    scale, shift = checkpoint[keys[1]], checkpoint[f"{module}.weight._shift"]
    groups, each, shape = scale.numel(), 8 // bits, _shape(checkpoint.folder, module)
    fits = len(shape) == 2 and groups == shift.numel() and size and prod(shape) == groups * size
    if not fits or lines != -(-groups // each) or shape[1] % size:
        raise CheckpointError(
            f"{where}: {[lines, size]} bytes with {groups} scales and {shift.numel()} shifts for {list(shape)}; quanto "
            f"packs {each} groups to a line, with one of each; get the file again"
        )

    def codes() -> Tensor:
        packed = checkpoint[keys[0]]
        parts = [(packed >> bits * place) & ((1 << bits) - 1) for place in range(each)]
        return torch.cat(parts)[:groups].reshape(shape)

    if not shift.is_floating_point():
        found = affine_blocks(Blocks(where, keys, shape, (1, size), bits, 0), scale, shift, codes)
        return Packed(found.keys, found.shape, found.format, found.load, found.note, inputs=inputs)
    if not bool((torch.isfinite(scale) & torch.isfinite(shift)).all()):
        raise CheckpointError(f"{where}: scales or shifts that are not finite floats; all must be; get the file again")
    same = scale.dtype == shift.dtype
    format = Offset(bits, 0 if size == shape[1] else size, SCALE_TYPES[scale.dtype] if same else "f32")
    params = {"scale": scale, "offset": -shift} if same else {"scale": scale.float(), "offset": -shift.float()}
    params = {key: value.reshape(shape[0], -1) for key, value in params.items()}
    return Packed(keys, shape, format, lambda: QuantizedTensor(format, shape, codes(), params), inputs=inputs)


def _shape(folder: Path, module: str) -> tuple[int, ...]:
    """The shape of a module's weight in the model; CheckpointError where it has none."""
    found = _shapes(folder, (folder / "config.json").stat().st_mtime_ns).get(f"{module}.weight")
    if found is None:
        raise CheckpointError(
            f"{folder}: {module}: config.json's model has no such module; both must agree; correct it"
        )
    return found


@lru_cache(maxsize=1)
def _shapes(folder: Path, changed: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_skeleton(folder).state_dict().items()}
