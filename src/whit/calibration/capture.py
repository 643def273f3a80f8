"""What the linears of a block see: H = sum x x^T over all tokens, one H for linears that share an input.

A mode that torch asks at every call looks on while the block runs: a product whose matrix lies in a watched
parameter's memory is that parameter's, and where in it says which expert of a stack. So nothing depends on how a
module is written, and a parameter whose products were not seen is an error.

Every sample adds its x^T x in float32, in order: the same bits for any number of threads. A faster way to add one may
be given (`Gram`); it fills the lower triangle, which is mirrored at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from whit.errors import CalibrationError
from whit.tensor import LayerStats

EXPERT_TOKENS = 128  # an expert that saw fewer is quantized with the statistics of all experts together

SAMPLED, EVERY = 512, 16  # tokens of a linear's input that are kept at most, and every how many-th

MIRRORED = 512  # rows of a triangle mirrored at a time

MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)

Place = tuple[str, int]  # a parameter and the matrix in it: 0, or an expert
Gram = Callable[[Tensor, Tensor], bool]  # adds x^T x to the lower triangle of sums; False: not for such x


@dataclass(frozen=True)
class BlockStats:
    """Statistics by parameter, one per matrix; `groups` are the parameters that share their input."""

    stats: Mapping[str, tuple[LayerStats, ...]]
    groups: tuple[tuple[str, ...], ...]

    def of(self, parameter: str) -> tuple[LayerStats, ...]:
        """One LayerStats per expert, or a single one; experts that saw too little get the pooled statistics."""
        found = self.stats[parameter]
        if len(found) == 1 or all(s.token_count >= EXPERT_TOKENS for s in found):
            return found
        pooled = _sum(found)
        return tuple(s if s.token_count >= EXPERT_TOKENS else pooled for s in found)

    def starved(self, parameter: str) -> tuple[int, ...]:
        """The experts that saw fewer than EXPERT_TOKENS tokens."""
        found = self.stats[parameter]
        return tuple(i for i, s in enumerate(found) if len(found) > 1 and s.token_count < EXPERT_TOKENS)


def _unseen(name: str, parameter: Tensor) -> CalibrationError:
    """What to say of a parameter without statistics: some token reaches a stack of experts, whatever the text."""
    if parameter.dim() == 3:
        return CalibrationError(
            f"{name}: is multiplied in another way than linears are; calibration watches linears; "
            "keep it with a rule, or choose a method that needs no data, such as hqq"
        )
    return CalibrationError(
        f"{name}: no token reached it; all that is quantized must be used; use another text, or keep it with a rule"
    )


def _sum(found: tuple[LayerStats, ...]) -> LayerStats:
    """The statistics of all tokens that any of these experts saw."""
    sizes = [s.magnitude for s in found if s.magnitude is not None]
    magnitude = torch.stack(sizes).sum(0) if len(sizes) == len(found) else None
    hessian, tokens = torch.stack([s.hessian for s in found]).sum(0), sum(s.token_count for s in found)
    peaks = [s.peak for s in found if s.peak is not None]
    peak = torch.stack(peaks).amax(0) if len(peaks) == len(found) else None
    samples = [s.sample for s in found if s.sample is not None]
    sample = torch.cat(samples)[:SAMPLED] if samples else None
    return LayerStats(hessian, tokens, magnitude=magnitude, peak=peak, sample=sample)


class Products(TorchFunctionMode):
    """Shows `_see` every product of an activation with a watched parameter, while it is entered."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self._strides = {name: p.stride() for name, p in parameters.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            self._product(*_arguments(args, kwargs, ("input", "weight")))
        elif func is torch.addmm:  # Conv1D
            self._product(*_arguments(args[1:], kwargs, ("mat1", "mat2")))
        elif func in MATMULS and not kwargs and len(args) == 2 and isinstance(args[1], Tensor):
            self._matmul(*args)
        return func(*args, **kwargs)

    def _matmul(self, x: Tensor, right: Tensor) -> None:
        """x @ right, where it does what a linear does: by a parameter's transpose (Falcon's linears), by an expert that
        lies (in, out) (gpt-oss), or by a whole stack of such, each with the tokens that are not zero (Llama 4); or
        where the parameter itself is multiplied by tokens in columns (Falcon Mamba's and Jamba's `dt_proj`)."""
        if x.dim() == 2 and x.stride() == self._strides.get(self._names.get(x.untyped_storage().data_ptr(), "")):
            return self._product(right.mT, x)
        strides = self._strides.get(self._names.get(right.untyped_storage().data_ptr(), ""), ())
        if (len(strides), right.stride()) in ((2, strides[::-1]), (3, strides[1:])):
            self._product(x, right)
        elif len(strides) == 3 and right.stride() == strides and len(x) == len(right):
            for rows, matrix in zip(x, right, strict=True):
                if len(routed := rows[rows.any(dim=1)]):
                    self._product(routed, matrix)

    def _product(self, x: Tensor, weight: Tensor) -> None:
        name = self._names.get(weight.untyped_storage().data_ptr())
        if name is not None:
            self._see(name, x, weight)

    def _see(self, name: str, x: Tensor, weight: Tensor) -> None:
        """x (..., in) on its way to the parameter of that name, of which `weight` is the whole or a matrix."""
        raise NotImplementedError


class Watch(Products):
    """Sums x^T x and |x| for every product of an activation with a watched parameter, while it is entered.

    The parameters are (out, in), (in, out) of a Conv1D, or stacks of either. What is run inside `exact()` is the
    same sample as the unquantized model sees it: it comes first, and gives the pairs of which `drift` is summed. With
    `sampled` the first SAMPLED of every EVERY-th token are kept.
    """

    def __init__(self, parameters: Mapping[str, Tensor], gram: Gram | None = None, sampled: bool = False) -> None:
        super().__init__(parameters)
        self._gram, self._sampled = gram, sampled
        self.samples: dict[Place, Tensor] = {}
        self._triangles: set[Place] = set()  # whose sums are right in the lower triangle only
        self.hessians: dict[Place, Tensor] = {}
        self.crosses: dict[Place, Tensor] = {}
        self.magnitudes: dict[Place, Tensor] = {}
        self.peaks: dict[Place, Tensor] = {}
        self.tokens: dict[Place, int] = defaultdict(int)
        self.leaders: dict[Place, Place] = {}  # whose statistics a place shares
        self._parameters = parameters
        self._inputs: dict[tuple[int, ...], tuple[Tensor, Place]] = {}  # of this sample, kept so that none is reused
        self._seen: set[Place] = set()
        self._exact: dict[Place, Tensor] = {}  # of this sample, by the unquantized model
        self._is_exact = False
        self._matrix = {name: p[0].numel() if p.dim() == 3 else p.numel() for name, p in parameters.items()}

    @contextmanager
    def exact(self) -> Iterator[None]:
        """What runs in here is the unquantized model's own view of the next sample."""
        self._is_exact = True
        self._exact.clear()
        try:
            yield
        finally:
            self._is_exact = False

    def stats(self) -> BlockStats:
        """What was seen; CalibrationError names a parameter that no token reached."""
        stats, members = {}, defaultdict(list)
        for place in self._triangles:
            _mirror(self.hessians[place])
        for name, parameter in self._parameters.items():
            experts = len(parameter) if parameter.dim() == 3 else 1
            leaders = [self.leaders.get((name, i), (name, i)) for i in range(experts)]
            if not any(self.tokens[place] for place in leaders):
                raise _unseen(name, parameter)
            columns = next(len(self.hessians[place]) for place in leaders if place in self.hessians)
            empty = torch.zeros(1, 1, device=parameter.device).expand(columns, columns)
            stats[name] = tuple(
                LayerStats(
                    self.hessians.get(place, empty),
                    self.tokens[place],
                    self._drift(place),
                    self.magnitudes.get(place, empty[0]),
                    self.peaks.get(place, empty[0]),
                    self.samples.get(place),
                )
                for place in leaders
            )
            members[leaders[0]].append(name)
        return BlockStats(stats, tuple(tuple(names) for names in members.values()))

    def _drift(self, place: Place) -> Tensor | None:
        return self.crosses[place] - self.hessians[place] if place in self.crosses else None

    def _see(self, name: str, x: Tensor, weight: Tensor) -> None:
        place = (name, weight.storage_offset() // self._matrix[name])
        if self._is_exact:
            if self._parameters[name].dim() == 2:  # which tokens an expert sees may differ
                self._exact[place] = x
            return
        if self._leader(x, place) != place:
            return
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):  # an expert that no token chose, and that is multiplied all the same (JetMoE's)
            return
        self._add_gram(place, rows)
        absolute = rows.abs()
        size, peak = absolute.sum(0, dtype=torch.float32), absolute.amax(0).to(torch.float32)
        self.magnitudes[place] = self.magnitudes[place] + size if place in self.magnitudes else size
        self.peaks[place] = torch.maximum(self.peaks[place], peak) if place in self.peaks else peak
        if self._sampled and (known := self.samples.get(place, rows[:0].to(torch.float32))).shape[0] < SAMPLED:
            self.samples[place] = torch.cat([known, rows[::EVERY].to(torch.float32)])[:SAMPLED]
        if place in self._exact:
            _add(self.crosses, place, self._exact.pop(place).reshape(rows.shape), rows)
        self.tokens[place] += len(rows)

    def _add_gram(self, place: Place, rows: Tensor) -> None:
        columns = rows.shape[1]
        if self._gram is not None and place not in self.hessians:
            self.hessians[place] = torch.zeros(columns, columns, device=rows.device)
        if self._gram is not None and self._gram(rows, self.hessians[place]):
            self._triangles.add(place)
        else:
            _add(self.hessians, place, rows, rows)

    def _leader(self, x: Tensor, place: Place) -> Place:
        """The first place of the block whose input lies in the very same memory."""
        if place in self._seen:  # the next sample
            self._seen.clear()
            self._inputs.clear()
        self._seen.add(place)
        key = (x.data_ptr(), x._version, x.numel(), x.shape[-1])
        _, first = self._inputs.setdefault(key, (x, place))
        return self.leaders.setdefault(place, first)


def _add(sums: dict[Place, Tensor], place: Place, x: Tensor, y: Tensor) -> None:
    """Add x^T y, in float32; on a GPU by its matrix units, whose products of 16-bit floats are exact."""
    if x.is_cuda and x.dtype == y.dtype and x.dtype.itemsize == 2:
        product = torch.mm(x.T, y, out_dtype=torch.float32)
    else:
        product = x.to(torch.float32).T @ y.to(torch.float32)
    if place in sums:
        sums[place] += product
    else:
        sums[place] = product


def _mirror(sums: Tensor) -> None:
    """Make a square matrix symmetric by its lower triangle, in place."""
    for start in range(0, len(sums), MIRRORED):
        stop = min(start + MIRRORED, len(sums))
        corner = sums[start:stop, start:stop].tril()
        sums[start:stop, start:stop] = corner + corner.tril(-1).T
        sums[start:stop, stop:] = sums[stop:, start:stop].T


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    first, second = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    return first, second
