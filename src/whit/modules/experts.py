"""A stack of expert matrices, packed: stands where a mixture's 3-D Parameter (experts, out, in) stood, or
(experts, in, out), as gpt-oss and Llama 4 hold theirs; packed it is (experts, out, in) either way.

transformers' eager experts multiply by `self.gate_up_proj[expert]`, and Llama 4's by the whole stack (torch.bmm). On a
CPU the kernels multiply by an expert's packed rows as they lie in the stack, and by no expert that no token asked for.
Whatever else is done with one of them, or with the stack, gets its floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whit.kernels import packed_linear
from whit.methods.stack import can_stack
from whit.modules.packed import PackedModule, resident
from whit.tensor import PackedWeight, turned

MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
BATCHED = (*MATMULS, torch.bmm, torch.Tensor.bmm)


class QuantizedExperts(PackedModule):
    """The packed matrices of a mixture's experts, for code that indexes a parameter (experts, out, in).

    Indexing gives floats in the module's dtype, or a value that stands for them. `transposed`: each matrix as (in,
    out).
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype = torch.float32, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.hold(packed, dtype)

    @property
    def shape(self) -> torch.Size:
        shape = self.weight_shape
        return torch.Size(turned(shape) if self.transposed else shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __len__(self) -> int:
        return self.weight_shape[0]

    def __getitem__(self, index: int | Tensor) -> Tensor | Expert:
        """The matrices (*index.shape, *shape[1:]) of one expert or of several."""
        chosen = torch.as_tensor(index)
        if chosen.dim() == 0 and self.multiplies:
            return Expert(self, range(len(self))[int(chosen)])
        return self.floats(chosen)

    def __iter__(self) -> Iterator[Tensor | Expert]:
        return (self[i] for i in range(len(self)))

    @property
    def multiplies(self) -> bool:
        """Whether the kernels multiply by single experts: on a CPU, where each has params of its own."""
        hook = getattr(self, "_hf_hook", None) if self._lying.device.type == "meta" else None  # brings them for a while
        place = self._lying.device if hook is None else getattr(hook, "execution_device", None)
        here = str(place) == "cpu" and not torch.compiler.is_compiling()
        return here and self.activations is None and can_stack(self.format)

    def floats(self, chosen: Tensor) -> Tensor:
        """The matrices (*chosen.shape, *shape[1:]) in the module's dtype."""
        lines = torch.arange(self.weight_shape[1], device=chosen.device)
        found = self.rows(chosen[..., None] * self.weight_shape[1] + lines).to(self.weight.dtype)
        return found.mT if self.transposed else found

    def whole(self) -> Tensor:
        """The floats of all experts, in the shape in which the model holds them."""
        floats = self.dequantize()
        return floats.mT if self.transposed else floats

    def product(self, x: Tensor, number: int, bias: Tensor | None = None) -> Tensor:
        """x (..., in) through one expert, packed."""
        out = self.weight_shape[1]
        with resident(self) as stored:
            rows = {key: tensor[number * out : (number + 1) * out] for key, tensor in stored.tensors.items()}
            return packed_linear(x, PackedWeight(stored.layout, stored.format, self.weight_shape[1:], rows), bias)

    def products(self, x: Tensor) -> Tensor:
        """x (experts, tokens, in), each through its own expert; zeros stay zeros and are not multiplied."""
        found = x.new_zeros((*x.shape[:2], self.weight_shape[1]))
        for number, rows in enumerate(x):
            asked = rows.any(dim=1)
            if bool(asked.any()):
                found[number, asked] = self.product(rows[asked], number)
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in BATCHED and not kwargs and len(args) == 2 and isinstance(args[0], Tensor):
            x, stack = args
            if isinstance(stack, cls) and stack.transposed and stack.multiplies and x.dim() == 3 and not _recorded(x):
                return stack.products(x)
        return func(*map(_floats, args), **{key: _floats(value) for key, value in (kwargs or {}).items()})

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, format={self.format}"


def _by_floats(name: str) -> Callable[..., Any]:
    """An operator, which Python looks up in the class, on an expert's floats."""
    return lambda self, *others: getattr(self.floats(), name)(*map(_floats, others))


class Expert:
    """One matrix of a stack, as the model holds it: torch's products multiply by it packed, all else by its floats."""

    def __init__(self, stack: QuantizedExperts, number: int) -> None:
        self._stack, self._number = stack, number

    @property
    def shape(self) -> torch.Size:
        return self._stack.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self._stack.dtype

    @property
    def device(self) -> torch.device:
        return self._stack.device

    def floats(self) -> Tensor:
        """The matrix in the module's dtype."""
        return self._stack.floats(torch.tensor(self._number))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.floats(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.floats()[index]

    def __len__(self) -> int:
        return self.shape[0]

    __add__, __radd__, __sub__ = map(_by_floats, ("__add__", "__radd__", "__sub__"))
    __mul__, __rmul__, __truediv__ = map(_by_floats, ("__mul__", "__rmul__", "__truediv__"))
    __matmul__, __neg__ = map(_by_floats, ("__matmul__", "__neg__"))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        matrix = named.get("weight")
        if func is torch.nn.functional.linear and isinstance(matrix, cls) and not matrix._stack.transposed:
            return matrix._stack.product(named["input"], matrix._number, named.get("bias"))
        if func in MATMULS and len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x, expert = args
            if expert._stack.transposed:
                return expert._stack.product(x, expert._number)
        return func(*map(_floats, args), **{key: _floats(value) for key, value in (kwargs or {}).items()})


def _recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _floats(value: Any) -> Any:
    """What a function of torch can take, in lists too."""
    if isinstance(value, QuantizedExperts):
        return value.whole()
    if isinstance(value, Expert):
        return value.floats()
    return type(value)(map(_floats, value)) if type(value) in (list, tuple) else value
