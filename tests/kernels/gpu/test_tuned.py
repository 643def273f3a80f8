"""The tables of measured routes and configurations: what they dispatch, and that all of it can run."""

from __future__ import annotations

from itertools import pairwise

import pytest

import whit
from whit.kernels.gpu import stream, tables, tiled, tuned
from whit.kernels.gpu.stream import Scheme

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
