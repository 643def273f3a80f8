"""The compiled kernels as ctypes functions, and why they are not there where they are not.

The team of threads is OpenMP's own, which torch has loaded already: its entry point is handed to the library, so that
there is one pool and torch.set_num_threads governs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch

ABI = 10
BUILD = "python -m whit.kernels.cpu.build"
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # by number in whit_cpu.h, each better than the last
ISAS8 = ("scalar", "avx2", "avx512_vnni", "amx")  # of the products of 8-bit activations, by their number in int8.cpp
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES, NESTED, NONE = 3, 4, 5
Pointer = ctypes.c_void_p


class WeightPlan(ctypes.Structure):
    """whit_weight of whit_cpu.h."""

    _fields_: ClassVar = [
        ("codes", Pointer),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_bytes", "group_size", "groups")),
        *((name, Pointer) for name in ("scale", "zero", "levels", "nested_levels", "nested_absmax", "nested_offset")),
        ("scale_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("bits", "scale_type", "zero_type", "consecutive")),
        ("parallel", Pointer),
        *((name, Pointer) for name in ("sub_scale", "sub_min")),
        *((name, ctypes.c_int32) for name in ("subs", "sub_bits", "sub_bias", "offsets")),
        ("digit_bytes", ctypes.c_int64),
    ]


class RowsPlan(ctypes.Structure):
    """whit_rows8 of int8.h."""

    _fields_: ClassVar = [
        *((name, Pointer) for name in ("codes", "scale", "sums", "zero")),
        *((name, ctypes.c_int64) for name in ("count", "stride", "groups")),
    ]


@dataclass(frozen=True)
class Library:
    """The functions, the instruction sets that this processor runs, and OpenMP's entry points (0: one thread)."""

    linear: Callable[..., int]
    dequantize: Callable[..., int]
    round: Callable[..., int]
    read: Callable[..., float]
    gram: Callable[..., int]
    many: Callable[..., int]
    quantize8: Callable[..., int]
    product8: Callable[..., int]
    linear8: Callable[..., int]
    decode: Callable[..., int]
    encode8: Callable[..., int]
    isas: tuple[str, ...]
    isas8: tuple[str, ...]
    isas_many: tuple[str, ...]
    parallel: int
    team_size: int
    team_member: int


def check_ran(status: int) -> None:
    """MemoryError where one of the functions says that it did nothing, as when there is no room."""
    if status:
        raise MemoryError(f"the CPU kernel could not run ({status})")


@cache
def library() -> Library | str:
    """The compiled kernels, or the reason why there are none."""
    return load(_builder().LIBRARY)


def _builder() -> ModuleType:
    """The module that builds the library, not imported with the package: Python warns where `-m` runs one that is."""
    from whit.kernels.cpu import build

    return build


def load(path: Path) -> Library | str:
    """The kernels in the shared library at `path`, or the reason why they cannot be used."""
    build = _builder()
    if not path.exists():
        if build.find_compiler() is None:
            known = ", ".join(build.COMPILERS)
            return f"not built: no C++ compiler ({known}) is on the path; install one, then {BUILD}"
        return f"not built; {BUILD} builds it"
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{error}; build it again by {BUILD}"
    handle.whit_sources.restype = ctypes.c_char_p
    if handle.whit_abi() != ABI or handle.whit_sources().decode() != build.source_hash():
        return f"built from other sources; build it again by {BUILD}"
    long, short = ctypes.c_int64, ctypes.c_int
    rest8 = (short, Pointer, short, ctypes.c_float, long, short, short)
    for name, arguments in {
        "linear": [*[Pointer] * 4, long, *[short] * 3],
        "dequantize": [*[Pointer] * 2, *[long] * 2, *[short] * 3],
        "round": [Pointer, *[long] * 2, short, long, Pointer, short, Pointer, *[short] * 2],
        "read": [Pointer, long, Pointer, *[short] * 2],
        "many": [*[Pointer] * 4, long, *[short] * 4],
        "gram": [Pointer, *[long] * 2, *[Pointer] * 2, *[short] * 2],
        "quantize8": [Pointer, *[long] * 2, short, *[Pointer] * 3, *[long] * 2, Pointer, *[short] * 2],
        "encode8": [*[Pointer] * 3, *[short] * 2],
        "linear8": [*[Pointer] * 2, long, short, *[Pointer] * 2, *rest8],
        "product8": [*[Pointer] * 5, *rest8],
        "decode": [*[Pointer] * 2, *[long] * 2, Pointer, long, Pointer],
    }.items():
        getattr(handle, f"whit_{name}").argtypes = arguments
    handle.whit_read.restype, handle.whit_decode.restype = ctypes.c_double, long
    return Library(
        handle.whit_linear, handle.whit_dequantize, handle.whit_round, handle.whit_read, handle.whit_gram,
        handle.whit_many, handle.whit_quantize8, handle.whit_product8, handle.whit_linear8,
        handle.whit_decode, handle.whit_encode8,
        tuple(name for number, name in enumerate(ISAS) if handle.whit_has(number)),
        tuple(name for number, name in enumerate(ISAS8) if handle.whit_has8(number)),
        tuple(name for number, name in enumerate(ISAS) if handle.whit_has_many(number)),
        *(_of_openmp(name) for name in ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")),
    )  # fmt: skip


def _of_openmp(name: str) -> int:
    """An address in the OpenMP that torch uses; LLVM's and Intel's have these names too. 0: not found."""
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), Pointer).value or 0
    except (AttributeError, OSError):
        return 0
