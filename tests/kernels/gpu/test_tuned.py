"""The tables of measured routes and configurations: what they dispatch, and that all of it can run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import whit
from whit.kernels.gpu import (
    few,
    halves,
    many,
    narrow,
    slab,
    stream,
    tables,
    tables_few,
    tables_many,
    tables_slab,
    tiled,
    tuned,
    ways,
)
from whit.kernels.gpu.stream import Scheme
from whit.layouts import BITS
from whit.tensor import PackedWeight

H100 = (9, 132)
SHARED = 227 << 10  # bytes that a Hopper multiprocessor's blocks have between them


def scheme_of(spec: str, columns: int) -> Scheme:
    found = stream.scheme(whit.parse_format(spec), columns)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize(
    ("spec", "shape", "rows", "way"),
    [
        ("int4-g128", (28672, 8192), 1, "stream"), ("int4-g128", (28672, 8192), 9, "tiled"),
        ("int4-g128", (4096, 4096), 16, "stream"), ("int4-g128", (4096, 4096), 100, "dequantize"),
        ("int4-g128", (12000, 4096), 256, "tiled"), ("int4-g128", (14336, 4096), 257, "dequantize"),
        ("int4-g128", (4096, 14336), 1024, "tiled"), ("int4-g128", (4096, 14336), 1025, "dequantize"),
        ("nf4", (4096, 14336), 200, "dequantize"), ("int5-g128", (4096, 4096), 17, "tiled"),
        ("int5-g128", (4096, 4096), 129, "dequantize"),
    ],
)  # fmt: skip
def test_rows_go_where_it_was_measured_to_be_fastest(spec: str, shape: tuple[int, int], rows: int, way: str):
    assert tuned.route(scheme_of(spec, shape[1]), shape, rows, H100) == way


def test_routes_are_in_order_and_known():
    for steps in tables.HOPPER_ROUTES.values():
        assert [most for most, _ in steps] == sorted({most for most, _ in steps})
        assert {way for _, way in steps} <= {"stream", "tiled", "dequantize"}
        assert all(a[1] != b[1] for a, b in pairwise(steps))


@pytest.mark.parametrize(("kind", "rows", "shape"), tables.HOPPER_TILED)
def test_measured_tiles_fit_the_multiprocessor(kind: str, rows: int, shape: tuple[int, int]):
    config = tiled.Config(*tables.HOPPER_TILED[kind, rows, shape])
    scheme = scheme_of("int4-g128", shape[1])
    assert kind == tuned.kind(scheme)
    assert config == tuned.best_tiled(scheme, shape, rows, H100)
    assert config.min_blocks * (tiled.shared_bytes(scheme, config) + 1024) <= SHARED + 1024
    assert config.stages <= 4  # the benchmark's checks cover no more
    assert config.rows >= min(rows, 128)


def test_more_rows_take_a_cut_for_their_own_height_and_only_where_it_won(monkeypatch: pytest.MonkeyPatch):
    won, shape = (2, 8, 4, 4, 1, 0, 1, 8), (4096, 4096)
    table = {("int4-128", 8, shape): None, ("int4-128", 64, shape): won, ("int4-128", 256, shape): None}
    monkeypatch.setattr(tuned, "MANY", {9: table})
    scheme = scheme_of("int4-g128", 4096)
    assert tuned.best_many(scheme, shape, 8, H100) is None
    assert tuned.best_many(scheme, shape, 9, H100) == many.Config(2, 2, 4, 4, lead=8)
    assert tuned.best_many(scheme, shape, 33, H100) == many.Config(*won)
    assert tuned.best_many(scheme, shape, 65, H100) is None
    assert tuned.best_many(scheme, shape, 9000, H100) is None
    assert tuned.best_many(scheme, (1024, 4096), 32, H100) == many.Config(2, 4, 4, 8, lead=8)  # as many blocks
    assert tuned.best_many(scheme, (1024, 4096), 64, H100) == many.Config(1, 8, 3, 8, lead=8, apart=2)
    assert tuned.best_many(scheme, (14336, 4096), 64, H100) == many.Config(2, 8, 4, 1, lead=8)
    assert tuned.best_many(scheme, shape, 64, (8, 108)) is None
    assert tuned.best_many(scheme_of("int8", 4096), shape, 64, H100) is None
    monkeypatch.setattr(tuned, "MANY", {9: {("int8-64", 64, shape): won}})
    assert tuned.best_many(scheme_of("int8", 4096), shape, 64, H100) == many.Config(*won)
    assert tuned.best_many(scheme_of("int8-g128", 4096), shape, 30, H100) == many.Config(2, 4, 4, 4, lead=8)
    assert tuned.best_many(scheme_of("int8-g32", 4096), shape, 64, H100) is None
    assert tuned.best_many(scheme_of("int4-g128-asym-fz", 4096), shape, 64, H100) is None


@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "int8-g128", "int2-g64"])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1024, 512), (16, 128)])
def test_an_invariant_cut_sums_alike_whatever_the_rows(spec: str, shape: tuple[int, int]):
    scheme = scheme_of(spec, shape[1])
    cuts = [tuned.invariant_many(scheme, shape, rows, H100) for rows in (1, 16, 17, 64, 256, 5000)]
    assert {(cut.groups, cut.split, cut.pair, cut.late) for cut in cuts} == {(2, cuts[0].split, 1, 0)}
    small = {"int8-g128": 4, "int2-g64": 1}.get(spec, 2)  # 1024 outs: by how many tiles 512 columns are
    assert cuts[0].split == {4096: 2, 14336: 1, 1024: small, 16: 1}[shape[0]]
    assert all(cut.shared_bytes(spec == "nf4") <= SHARED for cut in cuts)


def test_measured_cuts_for_more_rows_fit_the_multiprocessor():
    specs = {"table-64": "nf4", "int8-64": "int8-g128", "int8-64-zero": "int8-g64-asym"}
    for (kind, rows, shape), cut in tables_many.HOPPER_MANY.items():
        scheme = scheme_of(specs.get(kind) or kind.replace("-", "-g"), shape[1])
        assert tuned.kind(scheme) == kind
        config = tuned.best_many(scheme, shape, rows, H100)
        assert (config is None) == (cut is None)
        if config is not None:
            shared = config.shared_bytes(bool(scheme.storage.levels)) + 1024
            assert config.min_blocks * shared <= SHARED + 1024
            assert config.split * config.pair <= 8
            assert config.split == 1 or config.pair == 1
            assert not config.boxes or (config.split == 1 and config.row_tiles % 8 == 0)


def test_narrow_groups_of_odd_bits_take_whole_tiles_from_9_rows_on():
    shape = (4096, 4096)
    for spec, bits in (("int5-g64", 5), ("int3-g32", 3), ("int6-g64", 6)):
        scheme = narrow.scheme(whit.parse_format(spec), shape[1])
        assert scheme is not None
        assert many.group_of(scheme) == int(spec[-2:])
        wide = tuned.best_many(scheme_of(f"int{bits}-g128", shape[1]), shape, 64, H100)
        assert narrow.plan(scheme, shape, 64, H100) == ("many", wide)
        assert narrow.plan(scheme, shape, 8, H100)[0] == "few"
    seven = narrow.scheme(whit.parse_format("int7-g64"), shape[1])
    assert narrow.plan(seven, shape, 64, H100)[0] == "tiled"


@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "nf4-dq", "int8-g128", "int3-g128"])
@pytest.mark.parametrize("shape", [(1024, 4096), (512, 4096), (2048, 8192), (4096, 4096), (520, 512)])
def test_more_rows_of_few_outs_fill_the_device(spec: str, shape: tuple[int, int]):
    scheme = stream.scheme(whit.parse_format(spec), shape[1])
    assert not isinstance(scheme, str)
    for rows in (512, 1024, 2048, 4096):
        cut = tuned.best_many(scheme, shape, rows, H100)
        assert cut is not None
        assert cut.fits(bool(scheme.storage.levels))
        assert cut.split <= shape[1] // many.step(scheme)
        if shape[1] > 512:
            assert cut.grid([shape[0]], rows, H100[1])[0] >= 64
        assert cut.split == 1 or cut.tiles([shape[0]], rows) * cut.split <= H100[1]


@pytest.mark.parametrize(("kind", "rows", "shape"), tables_few.HOPPER_FEW)
def test_measured_cuts_for_few_rows_fit_the_multiprocessor(kind: str, rows: int, shape: tuple[int, int]):
    specs = ("int4-g128", "int4-g128-asym", "nf4", "nf4-dq", "int8", "int4-g64-asym", "int3-g128", "int2-g64")
    scheme = next(found for spec in specs if tuned.kind(found := scheme_of(spec, shape[1])) == kind)
    config = few.Config(*tables_few.HOPPER_FEW[kind, rows, shape])
    cuts = few.slices(scheme, config, rows, shape[1])
    steps = -(-shape[1] // (scheme.step * config.spread) // cuts)
    assert config.min_blocks * (few.shared_bytes(scheme, config, rows, steps) + 1024) <= SHARED + 1024
    assert few.fits(scheme, config, rows)
    assert tuned.best_few(scheme, shape, rows, H100) in (config, None)


def test_measured_cuts_of_blocks_beside_each_other_fit_the_multiprocessor():
    specs = {
        "int4-128": "int4-g128", "int4-64": "int4-g64", "table-64": "nf4", "table-64-dq": "nf4-dq",
        "int4-128-zero": "int4-g128-asym", "int8-128": "int8-g128", "int3-128": "int3-g128", "int2-64": "int2-g64",
    }  # fmt: skip
    for (kind, rows, shape), cut in tables_slab.HOPPER_SLAB.items():
        scheme = scheme_of(specs[kind.removesuffix(halves.KIND)], shape[1])
        if kind.endswith(halves.KIND):
            scheme = replace(scheme, storage=replace(scheme.storage, scale=1))
        assert tuned.kind(slab.in_groups(scheme)) == kind
        config = tuned.best_slab(scheme, shape, rows, H100)
        assert config == (slab.Config(*cut) if cut else None)
        if config is not None:
            assert config.fits(scheme, rows)
            assert config.shared_bytes(scheme, rows) <= slab.LARGEST_SHARED
            assert config.splits * config.across * slab.SPAN <= shape[1]


def test_measured_cuts_of_weights_that_share_an_input_fit_the_multiprocessor():
    for (kind, rows, shape), cut in tables_slab.HOPPER_SHARED.items():
        scheme = scheme_of({"int4-128": "int4-g128", "table-64-dq": "nf4-dq"}[kind], shape[1])
        assert tuned.kind(slab.in_groups(scheme)) == kind
        assert tuned.best_slab(scheme, shape, rows, H100, shared=True) == (slab.Config(*cut) if cut else None)


def test_weights_that_share_an_input_have_cuts_of_their_own(monkeypatch: pytest.MonkeyPatch):
    cut, shape = (64, 4, 1, 1, 2, 2), (6144, 4096)
    monkeypatch.setattr(tuned, "SHARED", {9: {("int4-128", 8, shape): None, ("int4-128", 16, shape): cut}})
    monkeypatch.setattr(tuned, "SLAB", {})
    ways.shared_cut.cache_clear()
    scheme = scheme_of("int4-g128", 4096)
    assert ways.shared_cut(scheme, shape, 9, H100) == slab.Config(*cut)
    assert ways.shared_cut(scheme, shape, 8, H100) is None
    assert ways.shared_cut(scheme, shape, 17, H100) is None
    assert ways.shared_cut(scheme_of("nf4", 4096), shape, 9, H100) is None
    assert tuned.best_slab(scheme, shape, 9, H100) is None
    ways.shared_cut.cache_clear()


def test_only_large_weights_that_share_an_input_leave_the_shared_launch_for_several_rows():
    def apart(spec: str, outs: int, rows: int) -> bool:
        format, shape = whit.parse_format(spec), (outs, 4096)
        empty = {name: torch.empty(0, dtype=want.dtype) for name, want in BITS.specs(format, shape).items()}
        return ways.apart(PackedWeight(BITS.name, format, shape, empty), rows, H100)

    assert apart("int4-g128", 14336, 16)
    assert apart("nf4", 14336, 16)
    assert not apart("int4-g128", 14336, 1)  # one row shares as fast
    assert not apart("int4-g128", 1024, 16)
    assert apart("int8", 14336, 16)
    assert not apart("int8-g128-asym", 14336, 16)


def test_blocks_lie_beside_each_other_only_for_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch):
    cut, shape = (64, 4, 1, 1, 2, 2), (4096, 4096)
    monkeypatch.setattr(tuned, "SLAB", {9: {("int4-128", 8, shape): None, ("int4-128", 16, shape): cut}})
    ways.plan.cache_clear()
    scheme = scheme_of("int4-g128", 4096)
    assert ways.plan(scheme, shape, 16, H100, False, scheme) == ("slab", slab.Config(*cut))
    assert ways.plan(scheme, shape, 16, H100, False)[0] != "slab"  # several weights at once
    assert ways.plan(scheme, shape, 16, H100, True, scheme)[0] != "slab"
    assert tuned.best_slab(scheme, shape, 8, H100) is None
    assert tuned.best_slab(scheme, shape, 17, H100) is None
    assert tuned.best_slab(scheme, (1024, 4096), 9, H100) == slab.Config(64, 4, 1, 1, 4, 2)  # no more than has columns
    assert tuned.best_slab(scheme, (28672, 4096), 9, H100) == slab.Config(64, 4, 1, 1, 1, 2)
    assert tuned.best_slab(scheme_of("int4-g128", 4224), (4096, 4224), 16, H100) is None
    assert tuned.best_slab(scheme, shape, 16, (8, 108)) is None
    for other in ("int4-g128-asym", "nf4-dq", "int8", "int4-g128-asym-fz"):
        assert tuned.best_slab(scheme_of(other, 4096), shape, 16, H100) is None
    ways.plan.cache_clear()


@pytest.mark.parametrize("spec", ["int2-g64", "int3-g32", "int5-g64", "int8-g64", "int8-channel", "nf4", "int4-g32"])
def test_tiles_on_hopper_have_room_and_no_empty_splits(spec):
    for outs, columns in ((64, 128), (1024, 4096), (4096, 14336), (28672, 8192)):
        for rows in (9, 17, 33, 64, 100, 256, 5000):
            format = whit.parse_format(spec)
            found = narrow.scheme(format, columns) or tiled.widened(stream.scheme(format, columns), rows, columns)
            cut = tiled.fitted(tuned.hopper_tiled(found, (outs, columns), rows, H100[1]), found, columns)
            assert tiled.shared_bytes(found, cut) * cut.min_blocks <= SHARED
            per_split = -(-(columns // found.step) // cut.splits)
            assert 0 < columns // found.step - (cut.splits - 1) * per_split <= per_split
            assert cut.rows >= min(rows, 64)
