"""LoRA beside a packed linear in one step: y = x W^T + s (x A^T) B^T, with nothing kept but x and x A^T.

PEFT's own forward works in the adapter's float32, and scales and adds in passes of their own: at batch 4 x 2048 these
passes over memory take as long as a third of the products. Here the adapter is cast to the activations' type, the
product with B adds into y, and on the way back W is dequantized once more, never kept:

    g_u = s g B     dx = g W + g_u A     dA = g_u^T x     dB = s g^T u          u = x A^T (rows, r)

Whatever is not plain LoRA (several adapters, DoRA, biases, merged) goes PEFT's own way.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.lora import Linear
from torch import Tensor

from whit.kernels import Kernel, dequantize
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight


class PackedLora(torch.autograd.Function):
    """`dropped` is x after the adapter's dropout, None where there is none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor,
        weight: tuple[PackedWeight, Kernel, Tensor | None], scaling: float,
    ) -> Tensor:  # fmt: skip
        packed, kernel, bias = weight
        y = kernel.linear(x, packed, None if bias is None else bias.to(x.dtype))
        seen = x if dropped is None else dropped
        u = _rows(seen) @ a.to(x.dtype).T
        y.view(-1, y.shape[-1]).addmm_(u, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(seen, u, a, b)
        ctx.packed, ctx.scaling, ctx.dropped = packed, scaling, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, u, a, b = ctx.saved_tensors
        g = _rows(grads[0].to(seen.dtype))
        gu = ctx.scaling * (g @ b.to(g.dtype))
        da = (gu.T @ _rows(seen)).to(a.dtype) if ctx.needs_input_grad[2] else None
        db = (g.T @ u).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[3] else None
        dx = g @ dequantize(ctx.packed, g.dtype) if ctx.needs_input_grad[0] else None
        behind = None  # what goes back through the dropout
        if ctx.dropped and ctx.needs_input_grad[1]:
            behind = (gu @ a.to(g.dtype)).reshape(seen.shape)
        elif dx is not None and not ctx.dropped:
            dx.addmm_(gu, a.to(g.dtype))
        return None if dx is None else dx.reshape(seen.shape), behind, da, db, None, None


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer around a QuantizedLinear; only its forward is ours."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype."""
        name = self._plain_adapter()
        if name is None or args or kwargs or torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base: QuantizedLinear = self.base_layer
        inside = x if base.compute_dtype is None else x.to(base.compute_dtype)
        if torch.is_autocast_enabled(x.device.type):
            inside = inside.to(torch.get_autocast_dtype(x.device.type))
        kernel, packed = base.ready(inside)
        layer = self.lora_dropout[name]
        dropped = layer(inside) if self.training and getattr(layer, "p", 0.0) else None
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        scaling = float(self.scaling[name])
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = PackedLora.apply(inside, dropped, a, b, (packed, kernel, base.bias), scaling)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)

    def _plain_adapter(self) -> str | None:
        """The one adapter that is on, where it is a plain one."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant:
            return None
        biases = self.lora_B[names[0]].bias, self.base_layer.bias
        return None if biases[0] is not None or (biases[1] is not None and biases[1].requires_grad) else names[0]


def use_fused(config: peft.LoraConfig) -> None:
    """Let PEFT put `LoraLinear` around packed linears; what is saved is the same adapter."""
    config._register_custom_module({QuantizedLinear: LoraLinear})


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
