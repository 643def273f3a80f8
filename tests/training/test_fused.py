"""LoRA in one step beside a packed weight against PEFT's own layer; the loss in chunks against the whole."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import whit
from whit.modules import QuantizedLinear
from whit.training.data import Example
from whit.training.lora import LoraLinear, PackedLora, use_fused
from whit.training.loss import ChunkedLoss, ResponseLoss
from whit.training.packing import collate

from tiny_models import tiny_model

FORMATS = ("nf4-dq", "int4-g64", "int3-g64", "int2-g64", "q4_k", "ternary")


class Two(nn.Module):
    """Two linears, one with a bias."""

    def __init__(self, format: str, dtype: torch.dtype) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        weights = [torch.randn(out, 256, generator=random) / 16 for out in (256, 48)]
        packed = [whit.quantize_tensor(w, format) for w in weights]
        bias = nn.Parameter(torch.randn(256, generator=random).to(dtype), requires_grad=False)
        self.first = QuantizedLinear.from_quantized(packed[0], bias, dtype)
        self.second = QuantizedLinear.from_quantized(packed[1], dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(model: nn.Module, fused: bool, **options: object) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], init_lora_weights=False, **options)
    if fused:
        use_fused(config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(copy.deepcopy(model), config)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    given = x.clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(2)  # of the dropout
        y = model(given)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.requires_grad}
    return found | {"x": given.grad.float(), "y": y.detach().float()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_is_what_peft_computes(format, dropout):
    model = Two(format, torch.float32)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3))
    ours, theirs = (adapted(model, fused, lora_dropout=dropout).train() for fused in (True, False))
    assert isinstance(ours.base_model.model.first, LoraLinear)
    assert not isinstance(theirs.base_model.model.first, LoraLinear)
    found, wanted = gradients(ours, x), gradients(theirs, x)
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_in_bfloat16_it_is_as_near_to_float32(format):
    truth, half = Two(format, torch.float32), Two(format, torch.bfloat16)
    truth.first.bias.data = half.first.bias.data.float()
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    wanted = gradients(adapted(truth, False), x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found, other = (gradients(adapted(half, fused), x) for fused in (True, False))
    for name, value in wanted.items():
        errors = [float((g[name] - value).norm() / value.norm()) for g in (found, other)]
        assert errors[0] < 1.3 * errors[1] + 0.003


def test_gradients_by_differences():
    packed = whit.quantize_tensor(torch.randn(6, 8, dtype=torch.float64), "int8")
    module = QuantizedLinear.from_quantized(packed, dtype=torch.float64)
    x, a, b = (torch.randn(n, dtype=torch.float64).requires_grad_() for n in ((3, 8), (2, 8), (6, 2)))
    kernel, weight = module.ready(x.detach())

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return PackedLora.apply(x, None, a, b, (weight, kernel, None), 0.7)

    assert torch.autograd.gradcheck(product, (x, a, b))


def test_nothing_dequantized_is_kept_for_the_way_back():
    model = adapted(Two("int4-g64", torch.float32), True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(torch.randn(1, 256, requires_grad=True))
    assert max(kept) <= 4 * 256  # x, u, A, B; never 256 x 256


def test_what_is_not_plain_goes_pefts_way():
    x = torch.randn(2, 256)
    model = adapted(Two("int4-g64", torch.float32), True, use_dora=True)
    other = adapted(Two("int4-g64", torch.float32), False, use_dora=True)
    torch.testing.assert_close(model(x), other(x))
    plain = adapted(Two("int4-g64", torch.float32), True)
    with plain.disable_adapter():
        torch.testing.assert_close(plain(x), Two("int4-g64", torch.float32)(x))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2"])
def test_the_loss_in_chunks(architecture):
    with torch.random.fork_rng():
        model = tiny_model(architecture).requires_grad_(False)
    model.enable_input_require_grads()
    random = torch.Generator().manual_seed(0)
    data = [Example(torch.randint(3, 128, (n,), generator=random), torch.arange(n) > 3, 0) for n in (9, 14)]
    batch = collate(((0, 1),), data, 0)
    loss = ResponseLoss.of(model)
    assert loss.chunked == (architecture != "gemma2")  # which caps its logits
    losses = []
    for used in (loss, ResponseLoss(False, 128)):
        for p in model.model.layers.parameters():
            p.requires_grad_(True).grad = None
        value = used(model, batch)
        value.backward()
        losses.append((value.detach(), model.model.layers[0].mlp.up_proj.weight.grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(loss(model, batch), losses[0][0])


def test_chunks_of_any_size_give_the_same():
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 32, bias=False).requires_grad_(False)
    hidden = torch.randn(11, 8, generator=random).requires_grad_()
    targets = torch.randint(32, (11,), generator=random)
    wanted = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    gradient = torch.autograd.grad(wanted, hidden)[0]
    for rows in (1, 4, 11, 100):
        loss = ChunkedLoss.apply(hidden, targets, head, rows)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(torch.autograd.grad(2 * loss, hidden)[0], 2 * gradient)
