"""The columns of a matrix while GPTQ walks over them: codes and params so far, and the two ways to choose a code.

On a GPU a column costs a dozen kernels that each take less time than Python needs to ask for them. So the walk over
as many columns as share params (`LEAF` at most) is recorded once as a CUDA graph and replayed for every such run of
columns in the model; the kernels, and so the codes, are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from whit.methods.clip import Clip
from whit.methods.feedback import walk
from whit.tensor import Format, Params, QuantizedTensor

LEAF = 256  # columns in a graph: as many as the widest groups share
Step = Literal["feed", "settle"]

GRAPHS = 32  # recorded walks that are kept: a model has a handful of shapes and formats


@dataclass
class Columns:
    """Some rows of a matrix on their way. `fixed` are params (rows, n) that were fitted before; else each group's are
    fitted when the walk reaches it, squared errors weighted by `importance` (columns,)."""

    shape: tuple[int, int]
    importance: Tensor
    format: Format
    clip: bool
    fixed: Mapping[str, Tensor] | None
    params: dict[str, Tensor] = field(init=False)
    codes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.params = dict(self.fixed or {})
        self.codes = torch.zeros(self.shape, dtype=self.format.code_dtype, device=self.importance.device)

    @property
    def group(self) -> int:
        """Columns that share params: the whole row where the format has no groups."""
        return self.format.group_size or max(self.shape[1], 1)

    def feed_back(self, weight: Tensor, feedback: Tensor, order: Tensor | None) -> None:
        """Choose all codes, the error of each column fed to those after it."""
        target = weight.T.to(torch.float64, copy=True)
        target = target.contiguous() if order is None else target[order]
        if order is None and self._is_recorded:
            self._replay("feed", target, feedback)
        else:
            self.feed(target, feedback, range(len(target)) if order is None else order.tolist())

    def descend(self, weight: Tensor, hessian: Tensor) -> None:
        """Move each code to its best value given all others."""
        error = weight.to(torch.float64) - self.format.decode(self.codes, self.params)
        pull = hessian / hessian.diagonal()
        target = (weight + error @ pull - error).T.contiguous()
        if self._is_recorded:
            self._replay("settle", target, pull)
        else:
            self.settle(target, pull)

    def feed(self, target: Tensor, feedback: Tensor, columns: Sequence[int]) -> Tensor:
        """The walk of `feed_back`: `target` (columns, rows) float64, row i of it being column `columns[i]`."""

        def enter(first: int) -> None:
            if self.fixed is None:
                self._fit_group(target[first : first + self.group].T, first)

        def choose(first: int, last: int) -> Tensor:
            error = target[first:last] - self._encode(target[first:last], columns[first])
            if last - first == 1:
                return error
            # Jointly coded columns: what each would have added to the others is in `error` already.
            spread: Tensor = torch.linalg.solve_triangular(feedback[first:last, first:last].T, error, upper=False)
            return spread

        return walk(target, feedback, choose, self.format.vector_size, self.group, enter)

    def settle(self, target: Tensor, pull: Tensor) -> Tensor:
        """The walk of `descend`."""

        def choose(first: int, last: int) -> Tensor:
            before = self.format.decode(self.codes[:, first:last], self.params, first).T
            return self._encode(target[first:last], first) - before

        return walk(target, pull, choose, 1, 1)

    def _encode(self, target: Tensor, column: int) -> Tensor:
        """Set the codes of columns `column`..., targets (n, rows); returns what they stand for (n, rows)."""
        codes = self.format.encode(target.T, self.params, column)
        self.codes[:, column : column + len(target)] = codes
        return self.format.decode(codes, self.params, column).T.to(torch.float64)

    def _fit_group(self, weight: Tensor, first: int) -> None:
        """Fit the params of the group that begins at column `first`, and put them in their place."""
        self._place(fit_params(weight, self.importance[first : first + self.group], self.format, self.clip), first)

    def _place(self, params: Mapping[str, Tensor], first: int) -> None:
        for name, value in params.items():
            rows, width = value.shape
            if not first:
                self.params[name] = value.new_empty(rows, width * -(-self.shape[1] // self.group))
            place = first // self.group * width
            self.params[name][:, place : place + width] = value

    @property
    def _is_recorded(self) -> bool:
        return self.codes.is_cuda and self.format.vector_size == 1

    def _replay(self, step: Step, target: Tensor, feedback: Tensor) -> None:
        """`feed` or `settle`, from recorded pieces."""
        size = self.group
        fits = step == "feed" and self.fixed is None and size <= LEAF
        leaf = min(size, LEAF)

        def enter(first: int) -> None:
            if step == "feed" and self.fixed is None and not fits:
                self._fit_group(target[first : first + size].T, first)

        def choose(first: int, last: int) -> Tensor:
            local = {} if fits else self._params_at(first)
            specs = tuple((name, tuple(p.shape), p.dtype) for name, p in local.items())
            rows = self.shape[0]
            lane = torch.cuda.current_stream(target.device).cuda_stream
            piece = Piece(rows, last - first, self.format, self.clip, fits, specs, target.device, lane)
            recorded = record(step, piece)
            here = slice(first, last)
            inputs = {"target": target[here], "feedback": feedback[here, here], "importance": self.importance[here]}
            recorded.replay({**inputs, "codes": self.codes[:, here]}, local)
            self.codes[:, here] = recorded.columns.codes
            if fits:
                self._place(recorded.columns.params, first)
            return recorded.change

        walk(target, feedback, choose, leaf, size if step == "feed" else leaf, enter)

    def _params_at(self, first: int) -> dict[str, Tensor]:
        """The params of the group that holds column `first`."""
        groups, group = -(-self.shape[1] // self.group), first // self.group
        local = {}
        for name, value in self.params.items():
            width = value.shape[1] // groups
            local[name] = value[:, group * width : (group + 1) * width] if width else value
        return local


@dataclass(frozen=True)
class Piece:
    """What a recorded walk depends on: all but the numbers. Walks on two streams may not share their memory."""

    rows: int
    columns: int
    format: Format
    clip: bool
    fits: bool
    params: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    device: torch.device
    stream: int


class Recorded:
    """A walk over a few columns of one group as a CUDA graph: numbers are copied in, it is replayed, results lie in
    `columns` and `change` (columns, rows) until the next replay."""

    def __init__(self, step: Step, piece: Piece) -> None:
        count, rows, device = piece.columns, piece.rows, piece.device
        self._inputs = {
            "target": torch.zeros(count, rows, dtype=torch.float64, device=device),
            "feedback": torch.eye(count, dtype=torch.float64, device=device),
            "importance": torch.ones(count, dtype=torch.float64, device=device),
        }
        params = {name: torch.ones(shape, dtype=dtype, device=device) for name, shape, dtype in piece.params}
        fixed = None if piece.fits else params
        self.columns = Columns((rows, count), self._inputs["importance"], piece.format, piece.clip, fixed)
        self._inputs["codes"], self._params = self.columns.codes, params

        def run() -> Tensor:
            target, feedback = self._inputs["target"], self._inputs["feedback"]
            if step == "feed":
                return self.columns.feed(target, feedback, range(count))
            return self.columns.settle(target, feedback)

        # Recorded where it will run: graphs that run side by side may not share cuBLAS's workspace of a stream.
        lane = torch.cuda.current_stream(device)
        if lane == torch.cuda.default_stream(device):  # on which nothing can be recorded
            lane = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            lane.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(lane):  # makes whatever torch makes at first use
            run()
        torch.cuda.current_stream(device).wait_stream(lane)
        self._graph = torch.cuda.CUDAGraph()
        # The writer's thread copies what is finished from the device meanwhile.
        with torch.cuda.graph(self._graph, stream=lane, capture_error_mode="thread_local"):
            self.change = run()

    def replay(self, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        """Do the walk for these numbers."""
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        for name, value in params.items():
            self._params[name].copy_(value)
        self._graph.replay()


@lru_cache(maxsize=GRAPHS)
def record(step: Step, piece: Piece) -> Recorded:
    """The recorded walk, made once per process."""
    return Recorded(step, piece)


def fit_params(weight: Tensor, importance: Tensor, format: Format, clip: bool) -> dict[str, Tensor]:
    """Unsealed params for (rows, columns), in float32."""
    weight, importance = weight.to(torch.float32).contiguous(), importance.to(torch.float32)
    params = Clip().search(weight, format, importance) if clip else format.fit(weight, importance)
    return {name: plain(value, len(weight)) for name, value in params.items()}


def plain(value: Tensor | QuantizedTensor, rows: int) -> Tensor:
    """A param as floats or integers per row; one that is quantized itself lies in a single long row."""
    return value.dequantize().reshape(rows, -1) if isinstance(value, QuantizedTensor) else value


def plain_rows(params: Params, first: int, last: int, rows: int) -> dict[str, Tensor]:
    """Such params of rows [first, last) of a matrix of `rows`."""
    values = {name: plain(value, rows) for name, value in params.items()}
    return {name: value[first:last] if len(value) == rows else value for name, value in values.items()}
