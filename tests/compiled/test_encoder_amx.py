"""Encoders by AMX's tiles, whose operations are loops here, against vectors; test_encoder runs the instructions."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from whit.kernels.cpu import build as builder
from whit.kernels.cpu.binding import Library

from test_encoder import COMPILED, ISAS_HERE, one_layer, ready

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif("avx512_vnni" not in ISAS_HERE, reason="what is not multiplied is by AVX-512")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The library, with encoders of one instruction set."""
    folder, compiler = tmp_path_factory.mktemp("amx"), str(builder.find_compiler())
    flags = [*(flag for flag in builder.FLAGS if flag != "-O2"), "-O1", "-DWHIT_EMULATE_AMX", f"-I{builder.SOURCES}"]

    def compiled(source: Path) -> str:
        out, own = folder / f"{source.stem}.o", builder.X86["tiles_int8"][0] if source.stem == "encoder_amx" else ()
        subprocess.run([compiler, *flags, *own, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    sources = [HERE / "emulate_encoder.cpp", *(builder.SOURCES / f"{name}.cpp" for name in ("encoder", "encoder_amx"))]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, "-shared", *objects, "-o", str(folder / "emulated.so")], check=True)
    encode = ctypes.CDLL(str(folder / "emulated.so")).whit_encode8
    encode.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2]
    assert not isinstance(COMPILED, str)
    return replace(COMPILED, encode8=encode)


@pytest.mark.parametrize(("spec", "activations"), [("int8", "int8"), ("int8", "int8-exact4"), ("int8", ""),
                                                   ("int8-g32", ""), ("int4-g64", ""),
                                                   ("int8-g32", "int8-g32-exact4")])  # fmt: skip
def test_tiles_give_the_bits_of_vectors(emulated: Library, spec: str, activations: str, random: torch.Generator):
    model = one_layer(spec, activations)
    by_vectors, by_tiles = ready(model, "avx512_vnni"), ready(model, "avx512_vnni")
    by_tiles.library = emulated
    for batch, tokens in ((1, 1), (2, 16), (1, 45), (30, 5)):
        hidden = torch.randn(batch, tokens, 128, generator=random)
        assert torch.equal(by_tiles(hidden.clone()), by_vectors(hidden.clone()))
