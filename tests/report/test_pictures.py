"""The pictures: what they are drawn from is right, and they are PNG files, the same for the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import whit

pytest.importorskip("matplotlib")
import numpy as np

from whit.formats import NF4
from whit.report import figures, pictures


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.1 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("spec", "count"), [("int4-g64", 16), ("int3-g64-asym", 8), ("nf4", 16), ("int8", 256)])
def test_levels_are_all_that_the_largest_group_can_take(weight: torch.Tensor, spec: str, count: int):
    quantized = whit.quantize_tensor(weight, spec)
    found = pictures.levels(quantized)
    assert len(found) == count
    values = quantized.dequantize()
    row = int(values.abs().max(dim=1).values.argmax())
    column = int(values[row].abs().argmax()) // 64 * 64
    group = values[row, column : column + 64] if spec != "int8" else values[row]
    distances = np.abs(group.numpy()[:, None] - found[None]).min(axis=1)
    assert distances.max() < 1e-6


def test_normal_float_tables_are_made_as_nf4_is(monkeypatch: pytest.MonkeyPatch):
    assert pictures.normal_levels(4) == pytest.approx(NF4, abs=2e-3)
    for bits in (2, 3, 6, 8):
        table = pictures.normal_levels(bits)
        assert len(table) == len(set(table)) == 2**bits
        assert 0 in table
        assert max(map(abs, table)) == 1


def test_errors_are_those_of_whit_and_fall_with_bits(weight: torch.Tensor):
    found = pictures.errors(weight)
    exact = whit.error(weight, whit.quantize_tensor(weight, "int4-g64"))
    assert found["symmetric, groups of 64"][4] == (exact.mae, exact.mse**0.5, exact.sqnr_db)
    for points in found.values():
        assert list(points) == [2, 3, 4, 6, 8]
        assert [p[0] for p in points.values()] == sorted((p[0] for p in points.values()), reverse=True)


def test_channel_maxima_are_what_went_into_the_linears():
    found = pictures.channel_maxima("whit:model", tokens=32)
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "down_proj"]
    assert [len(values) for values in found.values()] == [256, 768]
    assert all((values > 0).all() for values in found.values())


def test_a_checkpoint_has_its_pictures(tmp_path: Path):
    whit.quantize("whit:model", tmp_path / "model", whit.Recipe(rules=[("*", "int4-g64")]))
    files = pictures.draw_checkpoint(str(tmp_path / "model"), tmp_path / "model", tmp_path / "plots")
    assert {file.stem for file in files} == {"histogram", "memory", "layers", "outliers"}
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    plain = whit.resolve_model("whit:model")
    names = {file.stem for file in pictures.draw_checkpoint(plain, Path(plain), tmp_path / "more")}
    assert names == {"histogram", "error_bits", "memory", "outliers"}


def test_the_same_figure_gives_the_same_bytes():
    generating = {"weights": [5e9] * 3, "KV cache": [0.0, 1e9, 2e9]}
    training = {"weights": [5e9] * 3, "optimizer": [1e9] * 3, "activations": [0.0, 1e9, 2e9]}
    stacks = {"generating": ([0, 1, 2], generating), "training": ([0, 1, 2], training)}
    first, second = (figures.png(figures.memory("m", stacks)) for _ in range(2))
    assert first == second
