"""ggml's types as formats: their search, and that methods which know nothing of superblocks serve them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import whit
from whit.errors import FormatError
from whit.formats import parse_format
from whit.formats.ggml import KINDS
from whit.methods import GPTQ, HQQ, RTN, Clip
from whit.methods.stack import proxy_loss
from whit.tensor import LayerStats

from llama_cpp import needs_llama_cpp, quantize_chunk

SUPERBLOCKS = tuple(name for name, kind in KINDS.items() if kind.scale_bits)


def weights(kind: str, random: torch.Generator, rows: int = 128, columns: int = 512) -> torch.Tensor:
    normal = torch.randn(rows, columns, generator=random)
    return {"normal": normal, "heavy": normal.abs().pow(2) * normal.sign(), "shifted": normal + 0.7}[kind] * 0.02


def weighted_error(weight: torch.Tensor, near: torch.Tensor, importance: torch.Tensor | None) -> float:
    squares = (weight.double() - near.double()).square()
    return float((squares if importance is None else squares * importance).sum())


@needs_llama_cpp()
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
def test_error_is_at_most_llama_cpps(name: str, kind: str, random: torch.Generator):
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
    facts, format = KINDS[name], parse_format(name)
    weight = weights(kind, random)
    row_bytes = weight.shape[1] // facts.group_size * facts.bytes_per_group
    importance = torch.rand(weight.shape[1], generator=random).pow(4) * 10 + 0.01
    for given in (None, importance):
        params = format.fit(weight, given)
        ours = format.decode(format.encode(weight, params), params)
        theirs = quantize_chunk(weight, facts.number, row_bytes, given)
        theirs = torch.from_numpy(
            np.array(gguf.quants.dequantize(theirs.numpy(), gguf.GGMLQuantizationType(facts.number)))
        )
        assert weighted_error(weight, ours, given) <= weighted_error(weight, theirs, given)


@pytest.mark.parametrize("name", KINDS)
def test_more_important_columns_are_nearer(name: str, random: torch.Generator):
    weight, format = weights("normal", random), parse_format(name)
    importance = torch.rand(512, generator=random).pow(4) * 10 + 0.01

    def error(importance_of_fit: torch.Tensor | None) -> float:
        params = format.fit(weight, importance_of_fit)
        return weighted_error(weight, format.decode(format.encode(weight, params), params), importance)

    assert error(importance) < error(None)


@pytest.mark.parametrize("name", KINDS)
def test_codes_are_the_nearest_of_all(name: str, random: torch.Generator):
    """By trying every code."""
    format = parse_format(name)
    weight = weights("heavy", random, rows=3)
    params = format.fit(weight)
    codes = format.encode(weight, params)
    every = torch.arange(format.code_min, format.code_max + 1)
    each = torch.stack([format.decode(torch.full_like(codes, int(c)), params) for c in every])
    least = (each - weight).abs().amin(dim=0)
    error = (format.decode(codes, params) - weight).abs()
    assert (error <= least * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("name", KINDS)
def test_rows_do_not_know_each_other(name: str, random: torch.Generator):
    weight, format = weights("normal", random, rows=67), parse_format(name)
    importance = torch.rand(512, generator=random)
    whole = format.fit(weight, importance)
    for rows in (slice(0, 1), slice(5, 38), slice(66, 67)):
        part = format.fit(weight[rows], importance)
        assert all(torch.equal(part[key], whole[key][rows]) for key in whole)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fill", [0.0, 1.0, -0.25, 1e-7])
def test_constant_matrices(name: str, fill: float):
    weight = torch.full((2, 256), fill)
    near = whit.quantize_tensor(weight, name).dequantize()
    assert torch.isfinite(near).all()
    # 6 bits of mxfp4's scale are its power of two: 1.0, 0.25 are levels; float16 is coarse at 1e-7
    assert (near - weight).abs().max() <= max(abs(fill) * 0.04, 6e-8)


@pytest.mark.parametrize("name", [n for n in KINDS if n != "mxfp4"])
def test_what_float16_cannot_hold_is_said(name: str):
    with pytest.raises(FormatError, match=f"{name}: .* is beyond float16"):
        whit.quantize_tensor(torch.full((1, 256), 1e9), name)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "tq2_0"])
def test_gptq_runs_inside_superblocks(name: str, random: torch.Generator):
    """Error feedback within and across superblocks beats the best rounding on inputs that are correlated."""
    weight = weights("normal", random, rows=48)
    mix = torch.randn(512, 512, generator=random) / 20 + torch.eye(512)
    inputs = torch.randn(2048, 512, generator=random) @ mix
    stats = LayerStats(inputs.T @ inputs, 2048)
    format = parse_format(name)
    rounded = Clip()(weight, stats, format)
    for method in (GPTQ(), GPTQ(act_order=True), GPTQ(refit=True, sweeps=1), GPTQ(clip=False)):
        done = method(weight, stats, format)
        loss = proxy_loss(weight, done.dequantize(), [stats])
        assert loss < 0.9 * proxy_loss(weight, rounded.dequantize(), [stats])
        assert {k: (v.dtype, tuple(v.shape)) for k, v in done.params.items()} == {
            k: (s.dtype, s.shape) for k, s in format.param_specs(48, 512).items()
        }


@pytest.mark.parametrize("name", SUPERBLOCKS)
def test_refit_is_the_least_squares_solution(name: str, random: torch.Generator):
    """Against numpy's solver, superblock by superblock."""
    weight, format = weights("shifted", random, rows=2), parse_format(name)
    params = dict(format.fit(weight))
    codes = format.encode(weight, params)
    moved = format.refit(weight, codes, params, format.continuous)
    basis = []
    for key in format.continuous:
        unit = {k: torch.zeros_like(params[k]) for k in format.continuous} | {key: torch.ones_like(params[key])}
        basis.append(format.decode(codes, {**params, **unit}).double().numpy())
    for row in range(2):
        for group in range(2):
            area = np.s_[row, group * 256 : group * 256 + 256]
            a = np.stack([b[area] for b in basis], axis=1)
            best = np.linalg.lstsq(a, weight.double().numpy()[area], rcond=None)[0]
            found = [float(moved[key][row, group]) for key in format.continuous]
            assert np.allclose(found, best, rtol=2e-3)


def test_hqq_and_rtn_take_superblocks(random: torch.Generator):
    weight = weights("heavy", random)
    errors = {m.name: whit.error(weight, m(weight, None, parse_format("q4_k"))) for m in (RTN(), HQQ())}
    assert errors["hqq"].mae <= errors["rtn"].mae  # its norm is below 2
    assert errors["rtn"].mse <= errors["hqq"].mse
