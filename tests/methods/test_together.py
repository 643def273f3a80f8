"""Matrices of a block quantized together get the codes that they get alone."""

from __future__ import annotations

import pytest
import torch

import whit
from whit.methods import GPTQ, together
from whit.methods.stack import quantize_stack
from whit.methods.together import Together, Work
from whit.tensor import LayerStats, QuantizedTensor


def stats(columns: int, random: torch.Generator) -> LayerStats:
    x = torch.randn(400, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    return LayerStats(x.T @ x, len(x))


def block(random: torch.Generator) -> list[Work]:
    """q, k, v below one activation, one of them in another format and one whose params span rows; o; a stack."""
    shared, inner, experts = (stats(64, random),), (stats(96, random),), (stats(64, random), stats(64, random))
    shapes = {"q": (48, 64), "k": (16, 64), "v": (16, 64), "up": (80, 64), "gate": (8, 64)}
    formats = {"v": "int8-channel", "up": "nf4-dq"}
    works = [
        Work(name, torch.randn(shape, generator=random), shared, whit.parse_format(formats.get(name, "int4-g32")))
        for name, shape in shapes.items()
    ]
    works.append(Work("o", torch.randn(64, 96, generator=random), inner, whit.parse_format("int4-g32")))
    works.append(Work("experts", torch.randn(40, 64, generator=random), experts, whit.parse_format("int4-g32")))
    return works


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_each_has_the_codes_that_it_has_alone(random: torch.Generator):
    works, method, calls = block(random), GPTQ(), []

    def counted(weight, stats, format):
        calls.append(len(weight))
        return method(weight, stats, format)

    together = Together(counted, works)
    for work in reversed(works):
        assert_same(together.take(work.name), quantize_stack(method, work.weight, work.stats, work.format))
    assert sorted(calls) == [16, 20, 20, 64, 48 + 16 + 8, 80]  # q, k and gate were one matrix


@pytest.mark.gpu
def test_side_by_side_on_a_gpu(random: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    works = [
        Work(w.name, w.weight.cuda(), tuple(LayerStats(s.hessian.cuda(), s.token_count) for s in w.stats), w.format)
        for w in block(random)
    ]
    for _ in range(3):
        beside = Together(GPTQ(refit=True, sweeps=1), works)
        found = {work.name: beside.take(work.name) for work in works}
        monkeypatch.setattr(together, "LANE_ELEMENTS", 0)
        after = Together(GPTQ(refit=True, sweeps=1), works)
        for work in works:
            assert_same(found[work.name], after.take(work.name))
        monkeypatch.undo()
