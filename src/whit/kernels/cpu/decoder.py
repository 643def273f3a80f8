"""A decoder of Llama's kind in compiled code: csrc/decoder.cpp given a model's matrices, norms and tables.

The plan holds pointers to the very tensors that the model's modules hold; nothing is copied. Keys and values lie in a
tensor of their own, room for `capacity` tokens, which its owner fills for the tokens before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.kernels.activated import product_format
from whit.kernels.bands import PLACES, Parts
from whit.kernels.cpu.binding import ISAS, ISAS8, TYPES, Library, Pointer, WeightPlan
from whit.kernels.cpu.rows8 import levels_of
from whit.kernels.cpu.weight import CpuWeight, run_size
from whit.tensor import Activated

EXACT, PER_GROUP, PER_ROW = 0, 1, 2
Long, Int, Float = ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class MatrixPlan(ctypes.Structure):
    """whit_matrix of decoder.h."""

    _fields_: ClassVar = [
        ("packed", ctypes.POINTER(WeightPlan)), ("dense", Pointer), ("bias", Pointer), ("table", ctypes.c_char_p),
        ("rows", Long), ("columns", Long), ("inputs", Int), ("shift", Int), ("unit", Float),
        ("bands", Pointer), ("places", Pointer), ("band_count", Long),
    ]  # fmt: skip


class BlockPlan(ctypes.Structure):
    """whit_block of decoder.h."""

    _fields_: ClassVar = [
        *((name, Pointer) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, MatrixPlan) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Pointer) for name in ("keys", "values")),
    ]


class DecoderPlan(ctypes.Structure):
    """whit_decoder of decoder.h."""

    _fields_: ClassVar = [
        ("block", ctypes.POINTER(BlockPlan)),
        *((name, Long) for name in ("blocks", "hidden", "intermediate", "vocabulary")),
        *((name, Long) for name in ("heads", "kv_heads", "head_dim", "capacity")),
        *((name, Pointer) for name in ("norm", "cos", "sin")),
        ("embedding", MatrixPlan), ("head", MatrixPlan),
        ("epsilon", Float), ("scale", Float),
        *((name, Int) for name in ("type", "isa", "isa8", "threads")),
        *((name, Pointer) for name in ("parallel", "team_size", "team_member")),
    ]  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """(out, in): a packed weight as a kernel prepared it, or floats of the model's type; bias (out,) of that type.

    An embedding and a head may have bands of rows, and no bias then.
    """

    weight: CpuWeight | Parts | Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """One decoder block; the norms of queries and keys (head_dim,) where there are any."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class Network:
    """All that a token passes through; `epsilon` of the norms, `scale` of queries times keys."""

    blocks: tuple[Block, ...]
    embedding: Matrix
    norm: Tensor
    head: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype


def refusal(weight: CpuWeight) -> str | None:
    """Why the decoder does not multiply by a packed weight with its activations, or None."""
    how = weight.activations
    if how is None:
        return None
    if isinstance(levels := levels_of(product_format(weight)), str):
        return levels
    if how.dtype != torch.int8 or how.kind != "dynamic" or not how.symmetric or how.threshold > 0 or how.exact:
        return "its activations are quantized in another way than to symmetric int8 as they come"
    if how.granularity not in ("token", "group"):
        return f"its activations are quantized per {how.granularity}"
    runs = run_size(weight.format) // 32
    if how.granularity == "group" and runs & (runs - 1):
        return f"its groups of {run_size(weight.format)} columns are not a power of two"
    return None


class Decoder:
    """Tokens from a network. `states` (blocks, 2, kv_heads, capacity, head_dim): keys and values; cos, sin (capacity,
    head_dim), all of the network's type. `threads` are at most those of torch's team.
    """

    def __init__(self, network: Network, states: Tensor, cos: Tensor, sin: Tensor, library: Library) -> None:
        beside: list[object] = []
        self._library, self._held = library, (network, states, cos, sin, beside)
        first = network.blocks[0]
        blocks = (BlockPlan * len(network.blocks))(
            *(_block_plan(block, states[i], beside) for i, block in enumerate(network.blocks))
        )
        vocabulary, hidden = _shape(network.head)
        self._plan = DecoderPlan(
            block=blocks, blocks=len(blocks), hidden=hidden, intermediate=_shape(first.gate)[0], vocabulary=vocabulary,
            heads=network.heads, kv_heads=network.kv_heads, head_dim=network.head_dim, capacity=states.shape[3],
            norm=network.norm.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), epsilon=network.epsilon,
            scale=network.scale, type=TYPES[network.dtype], embedding=_matrix_plan(network.embedding, beside),
            head=_matrix_plan(network.head, beside), isa=ISAS.index(library.isas[-1]),
            isa8=ISAS8.index(library.isas8[-1]), parallel=library.parallel,
            team_size=library.team_size, team_member=library.team_member,
        )  # fmt: skip
        self.logits = torch.empty(vocabulary, dtype=network.dtype)

    def decode(self, token: int, position: int, count: int, stops: Sequence[int] = ()) -> list[int]:
        """The likeliest tokens after `token`, which stands at `position`: `count`, fewer if one of `stops` comes, the
        last then. `logits` are those of the last one.
        """
        tokens = (Long * (count + 1))(token)
        self._plan.threads = torch.get_num_threads() if self._library.parallel else 1
        done = self._library.decode(
            ctypes.addressof(self._plan), tokens, position, count, (Long * len(stops))(*stops), len(stops),
            self.logits.data_ptr(),
        )  # fmt: skip
        if done < 0:
            raise MemoryError(f"the CPU decoder could not run ({done})")
        return list(tokens[1 : done + 1])


def _shape(matrix: Matrix) -> tuple[int, int]:
    rows, columns = matrix.weight.shape
    return rows, columns


def _matrix_plan(matrix: Matrix, held: list[object]) -> MatrixPlan:
    """The plan; what it points to beside the matrix is put into `held`."""
    rows, columns = _shape(matrix)
    plan = MatrixPlan(rows=rows, columns=columns, bias=_address(matrix.bias))
    if isinstance(matrix.weight, Parts):
        bands = [_matrix_plan(Matrix(band), held) for band in matrix.weight.bands if isinstance(band, CpuWeight)]
        held.append(parts := (MatrixPlan * len(bands))(*bands))
        plan.bands, plan.band_count = ctypes.addressof(parts), len(parts)
        plan.places = matrix.weight.tensors[PLACES].data_ptr()
        return plan
    if isinstance(matrix.weight, Tensor):
        plan.dense = matrix.weight.data_ptr()
        return plan
    plan.packed = ctypes.pointer(matrix.weight.plan)
    how: Activated | None = matrix.weight.activations
    if how is not None:
        levels = levels_of(product_format(matrix.weight))
        assert not isinstance(levels, str)
        plan.inputs = PER_GROUP if how.granularity == "group" else PER_ROW
        plan.table, plan.shift, plan.unit = levels.table, levels.shift, levels.unit
    return plan


def _block_plan(block: Block, states: Tensor, held: list[object]) -> BlockPlan:
    return BlockPlan(
        **{name: _address(getattr(block, name)) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")},
        **{name: _matrix_plan(getattr(block, name), held) for name in ("q", "k", "v", "o", "gate", "up", "down")},
        keys=states[0].data_ptr(), values=states[1].data_ptr(),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
