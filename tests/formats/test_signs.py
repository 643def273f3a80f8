"""Ternary and binary formats against every assignment of codes, and five ternary codes to a byte."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Generator, Tensor

import whit
from whit.errors import CheckpointError, FormatError
from whit.formats import parse_format
from whit.kernels.cpu import Cpu
from whit.kernels.gpu.scales import storage
from whit.kernels.reference import Reference
from whit.layouts import BITS
from whit.layouts.digits import digits_per_byte, pack_digits, unpack_digits
from whit.methods import GPTQ, Refine
from whit.tensor import LayerStats, PackedWeight


def least_error(row: Tensor, importance: Tensor, codes: tuple[int, ...]) -> float:
    """The least weighted squared error over every assignment of codes to a short row, each with its best scale."""
    signs = torch.tensor(list(product(codes, repeat=len(row))), dtype=torch.float64)
    along = (signs * importance * row).sum(dim=1)
    square = (signs * signs * importance).sum(dim=1)
    gain = torch.where(square > 0, along.clamp(min=0) ** 2 / square.clamp(min=1e-300), 0.0)
    return float((importance * row * row).sum() - gain.max())


def error(row: Tensor, spec: str, importance: Tensor | None, share: Tensor) -> float:
    format = parse_format(spec)
    params = format.fit(row[None], importance)
    decoded = format.decode(format.encode(row[None], params), params)[0]
    return float((share * (decoded.double() - row) ** 2).sum())


@pytest.mark.parametrize(("kind", "codes"), [("ternary", (-1, 0, 1)), ("binary", (-1, 1))])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_codes_and_scale_err_less(kind: str, codes: tuple[int, ...], weighted: bool, random: Generator):
    for columns in (1, 2, 5, 8):
        for _ in range(10):
            row = torch.randn(columns, generator=random, dtype=torch.float64) ** 3
            importance = torch.rand(columns, generator=random, dtype=torch.float64) if weighted else None
            share = torch.ones(columns, dtype=torch.float64) if importance is None else importance
            least = least_error(row, share, codes)
            size = float((share * row * row).sum())
            assert error(row, f"{kind}-channel", importance, share) <= least + 1e-6 * size
            assert error(row, f"{kind}-g64", importance, share) <= least + 1e-4 * size  # bfloat16 scale


def test_absmean_is_that_of_bitnet(random: Generator):
    weight = torch.randn(5, 96, generator=random)
    q = whit.quantize_tensor(weight, "ternary-absmean")
    mean = weight.abs().mean(dim=1, keepdim=True)
    assert torch.allclose(q.params["scale"], mean)
    assert torch.equal(q.codes.float(), (weight / mean).round().clamp(-1, 1))
    assert whit.error(weight, whit.quantize_tensor(weight, "ternary")).mse < whit.error(weight, q).mse


def test_bitlinear_has_one_scale_for_a_matrix(random: Generator):
    """Equations 1 to 3 of the paper: W / (mean |W| + epsilon), rounded and clipped to -1, 0, 1."""
    weight = torch.randn(7, 96, generator=random) * torch.logspace(-1, 1, 7)[:, None]
    q = whit.quantize_tensor(weight, "ternary-tensor-absmean")
    gamma = weight.abs().mean()
    assert q.params["scale"].shape == (1, 1)
    assert torch.allclose(q.params["scale"], gamma.reshape(1, 1))
    assert torch.equal(q.codes.float(), (weight / gamma).round().clamp(-1, 1))
    assert torch.allclose(q.dequantize(), q.codes.float() * gamma)
    packed = whit.layouts.BITS.pack(q)
    assert torch.equal(whit.layouts.BITS.unpack(packed).dequantize(), q.dequantize())


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_groups_are_fitted_alone_and_a_short_last_one_by_what_it_has(kind: str, random: Generator):
    weight, importance = torch.randn(3, 70, generator=random), torch.rand(70, generator=random)
    format = parse_format(f"{kind}-g32")
    whole = format.fit(weight, importance)["scale"]
    parts = [format.fit(weight[:, i : i + 32], importance[i : i + 32])["scale"] for i in (0, 32, 64)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    dead = importance.clone()
    dead[32:64] = 0  # counts as all alike
    alone = format.fit(weight, None)["scale"]
    assert torch.equal(format.fit(weight, dead)["scale"][:, 1], alone[:, 1])


@pytest.mark.parametrize("spec", ["ternary-g32", "binary-g32", "ternary", "binary"])
def test_refit_is_least_squares_for_the_codes(spec: str, random: Generator):
    weight, format = torch.randn(4, 64, generator=random), parse_format(spec + "-f32" * ("-" in spec))
    params = {"scale": format.fit(weight)["scale"] * 1.7}
    codes = format.encode(weight, params)
    best = format.refit(weight, codes, params, ("scale",))["scale"]

    def errors(scale: Tensor) -> Tensor:
        return format.sums((format.decode(codes, {"scale": scale}) - weight).square())

    assert (errors(best) <= errors(best * 1.001)).all()
    assert (errors(best) <= errors(best * 0.999)).all()
    assert format.refit(weight, codes, params, ()) is params


@pytest.mark.parametrize("spec", ["ternary-g32", "binary-g32", "ternary", "binary", "ternary-g32-absmean"])
def test_zeros_stay_zeros(spec: str, random: Generator):
    weight = torch.randn(4, 96, generator=random)
    weight[1] = 0
    weight[2, :32] = 0
    q = whit.quantize_tensor(weight, spec)
    assert not q.dequantize()[1].any()
    assert q.format.group_size == 0 or not q.dequantize()[2, :32].any()


@pytest.mark.parametrize("columns", [1, 4, 5, 6, 33])
def test_five_ternary_codes_to_a_byte(columns: int, random: Generator):
    codes = torch.randint(-1, 2, (3, columns), generator=random).to(torch.int8)
    stored = pack_digits(codes, 3, -1)
    for row, bytes_ in zip(codes.tolist(), stored.tolist(), strict=True):
        digits = [c + 1 for c in row] + [0] * (-columns % 5)
        assert bytes_ == [sum(d * 3**i for i, d in enumerate(digits[k : k + 5])) for k in range(0, len(digits), 5)]
    back = unpack_digits(stored, columns, 3, -1)
    assert torch.equal(back, codes)
    assert back.dtype == torch.int8
    assert [digits_per_byte(base) for base in (2, 3, 4, 5, 16, 256)] == [8, 5, 4, 3, 2, 1]


def test_bytes_that_are_no_five_digits_are_refused():
    with pytest.raises(CheckpointError, match="243"):
        unpack_digits(torch.tensor([[242, 243]], dtype=torch.uint8), 10, 3, -1)


@pytest.mark.parametrize(
    ("spec", "bits"), [("ternary-g64", 1.6 + 0.25), ("ternary", 1.6 + 0.05), ("binary-g64", 1.25), ("binary", 1.05)]
)
def test_stored_bits_are_counted(spec: str, bits: float, random: Generator):
    packed = BITS.pack(whit.quantize_tensor(torch.randn(8, 640, generator=random), spec))
    assert whit.bits_per_weight(packed) == pytest.approx(bits)


@pytest.mark.parametrize("method", [GPTQ(), Refine()])
@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_gptq_errs_less_in_the_outputs(method, kind: str, random: Generator):
    weight, x = torch.randn(24, 128, generator=random), torch.randn(512, 128, generator=random)
    x = x @ torch.randn(128, 128, generator=random)
    stats = LayerStats(x.T @ x, len(x))
    for spec in (kind, f"{kind}-g32"):
        q = method(weight, stats, parse_format(spec))
        nearest = whit.quantize_tensor(weight, spec)
        assert ((q.dequantize() - weight) @ x.T).norm() < 0.9 * ((nearest.dequantize() - weight) @ x.T).norm()


def packed(spec: str, random: Generator) -> PackedWeight:
    return BITS.pack(whit.quantize_tensor(torch.randn(24, 160, generator=random), spec))


def test_kernels_run_them_or_say_why_not(random: Generator):
    x = torch.randn(3, 160, generator=random)
    ternary, binary = packed("ternary-g32", random), packed("binary-g32", random)
    assert all(isinstance(storage(p.format), str) for p in (ternary, binary))
    for weight in (ternary, binary):
        assert "compile" in (Cpu().supports(weight, x) or "compiled")  # nothing but a missing library is in the way
        exact = x @ BITS.unpack(weight).dequantize().T
        kernels = [Reference()] + ([Cpu()] if Cpu().supports(weight, x) is None else [])
        for kernel in kernels:
            assert torch.allclose(whit.kernels.packed_linear(x, weight, None, kernel), exact, atol=1e-4)


def test_names_of_formats_come_back_as_they_were():
    for spec in (
        "ternary-g64",
        "ternary-channel",
        "ternary-g64-absmean",
        "ternary-tensor-absmean",
        "binary-g128-f32",
        "ternary-channel-bf16",
    ):
        assert str(parse_format(spec)) == spec
    assert parse_format("ternary") == parse_format("ternary-channel-f32")
    with pytest.raises(FormatError, match="absmean"):
        parse_format("binary-absmean")
    with pytest.raises(FormatError, match="BitNet's"):
        parse_format("ternary-tensor")
    with pytest.raises(FormatError, match="per row or group"):
        parse_format("binary-tensor")
