"""The compiled CPU kernels, every file of them, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from whit.kernels.cpu import build as builder

START = """
import sys, torch, whit
from dataclasses import replace
from pathlib import Path
from whit.activations import parse_activations
from whit.kernels.cpu import Cpu, Cpu8, add_gram, binding
from whit.layouts import BITS
binding.LIBRARY = Path(sys.argv[1])
binding.library.cache_clear()
compiled = binding.library()
assert not isinstance(compiled, str), compiled
random = torch.Generator().manual_seed(0)
SHAPES = [(1, 1), (3, 33), (9, 257)]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
def packed(spec, rows, columns):
    return BITS.pack(whit.quantize_tensor(torch.randn(rows, columns, generator=random), spec))
def inputs(rows, columns, out):
    for dtype in TYPES:
        yield torch.randn(rows, columns, generator=random).to(dtype), torch.ones(out, dtype=dtype)
"""
# Floats by packed weights, ggml's superblocks among them (kernels.inl); and what measures the memory's rate.
FLOATS = """
for spec in ["int1-g16", "int2-g32-asym", "int3-g64", "int4-g48", "nf4-dq", "int5-g32", "int6-channel", "int7-g16",
             "int8-g64-asym", "fp8", "int8-tensor", "codebook(-1,0.1,1)-g32", "q4_0", "q5_1", "q8_0", "q2_k", "q3_k",
             "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq2_0", "mxfp4", "ternary", "ternary-g64"]:
    for rows, columns in SHAPES:
        weight = packed(spec, rows, columns)
        for isa in compiled.isas:
            for batch in (1, 7, 20):
                for x, bias in inputs(batch, columns, rows):
                    Cpu(isa).linear(x, weight, bias)
data = torch.ones(1000, dtype=torch.uint8)
for number in range(len(compiled.isas)):
    compiled.read(data.data_ptr(), len(data), compiled.parallel, number, 1)
"""
# int8.inl for every processor: rows of inputs that stream and that share panels, scales per row and per 32 columns.
INT8 = """
for spec, hows in {
    "int8": ["int8", "int8-asym", "int8-tensor", "int8-outliers1"], "int4-channel": ["int8", "int8-g32"],
    "int2-g64-asym": ["int8-g32"], "int3-g256-asym": ["int8-g32"], "int4-g96": ["int8-g32"], "int5-g32": ["int8-g32"],
    "int6-g128": ["int8-g32"], "int8-g32-asym": ["int8-g32"], "int4-g64-asym-fz": ["int8-g32"],
    "codebook(-1,0,1)-g32": ["int8-g32"], "codebook(-1,-0.75,-0.5,-0.25,0,0.125,0.25,0.5,1)-g32": ["int8-g32"],
    "q4_0": ["int8-g32"], "q4_1": ["int8-g32"], "q4_k": ["int8-g32"], "q6_k": ["int8-g32"], "iq4_xs": ["int8-g32"],
    "nf4-dq": ["int8-g32"], "ternary": ["int8", "int8-g32"], "ternary-g64": ["int8-g32"],
}.items():
    for rows, columns in [*SHAPES, (50, 289)]:
        for how in hows:
            weight = replace(packed(spec, rows, columns), activations=parse_activations(how))
            for isa in compiled.isas8:
                for batch in (1, 3, 15):
                    for x, bias in inputs(batch, columns, rows):
                        assert Cpu8(isa).supports(weight, x) is None
                        Cpu8(isa).linear(x, weight, bias)
                        for value in (float("nan"), -float("inf"), 1e-38) if rows == 9 and batch > 1 else ():
                            Cpu8(isa).linear(torch.full_like(x, value), weight, bias)
"""
# Layers of an encoder: codes of 8 and of 16 bits, sequences of odd lengths, alone and shared by threads, with masks.
ENCODER = """
from whit.kernels.cpu.encoder import Encoder, Layer
from whit.kernels.cpu.encoder_linear import Linear
def linear(rows, columns, spec, how, parts=1):
    how = parse_activations(how) if how else None
    weights = [replace(packed(spec, rows, columns), activations=how) for _ in range(parts)]
    return Linear(tuple(weights), tuple(torch.ones(rows) for _ in weights))
norm = (torch.ones(64), torch.zeros(64))
for spec, how in (("int8", "int8"), ("int4-g32", "int8-g32"), ("int8-g32", "")):
    sizes = ((64, 64, spec, how, 3), (64, 64, spec, how), (128, 64, spec, how), (64, 128, spec, how))
    layer = Layer(*(linear(*size) for size in sizes), (norm, norm))
    for isa in compiled.isas8:
        encoder = Encoder([layer], 4, 1e-12, compiled, isa)
        for batch, tokens in ((1, 1), (2, 17), (5, 33)):
            mask = torch.rand(batch, 1, 1, tokens, generator=random) < 0.8
            for threads in (1, 3):
                torch.set_num_threads(threads)
                encoder(torch.randn(batch, tokens, 64, generator=random), mask)
                encoder(torch.full((batch, tokens, 64), float("inf")))
torch.set_num_threads(1)
"""
GRAM = """
for rows, columns in [(1, 1), (2, 47), (7, 48), (128, 49), (129, 97), (300, 200)]:
    x = torch.randn(rows, columns, generator=random).to(torch.bfloat16)
    assert add_gram(x, torch.zeros(columns, columns)) == ("avx512_bf16" in compiled.isas)
"""
# A decoder of every kind of matrix, in a team of two, past the 512 keys that attention takes at a time.
DECODER = """
import sys
from dataclasses import replace as changed
sys.path.insert(0, sys.argv[2])
from tiny_models import tiny_model
from transformers import DynamicCache
from whit.compiled.llama import Compiled
from whit.compiled.loop import States
from whit.modules import QuantizedLinear
torch.set_num_threads(2)
def linear(old, spec, how):
    quantized = whit.quantize_tensor(old.weight.detach().float(), spec)
    return QuantizedLinear.from_quantized(quantized, old.bias, old.weight.dtype, how and parse_activations(how))
for architecture, length in (("qwen2", 5), ("qwen3", 520)):
    for dtype in TYPES:
        for spec, how in (("int4-g32", None), ("nf4", None), ("int4-g32-asym", "int8-g32"), ("int8", "int8"),
                          ("ternary", None), ("ternary", "int8")):
            model = tiny_model(architecture, dtype=dtype)
            for layer in model.model.layers:
                layer.self_attn.q_proj = linear(layer.self_attn.q_proj, spec, how)
                layer.mlp.down_proj = linear(layer.mlp.down_proj, spec, how)
            for number, isa in enumerate(compiled.isas):
                isas8 = compiled.isas8[: number + 1]
                only = Compiled(model, changed(compiled, isas=compiled.isas[: number + 1], isas8=isas8))
                cache = DynamicCache(config=model.config)
                for layer in range(2):
                    keys = torch.randn(1, 2, length, 16, generator=random).to(dtype)
                    cache.update(keys, keys.flip(2), layer)
                states = States(only, cache, length + 3)
                states.begin()
                assert len(states.decode(5, 3, [])) == 3
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or builder.find_compiler() is None, reason="needs Linux and a compiler")
def test_sanitizers_find_nothing(tmp_path: Path):
    library_path = tmp_path / "sanitized.so"
    builder.build(library_path, extra=(*builder.SANITIZERS, "-DWHIT_EMULATE_AMX"))
    runtimes = [
        subprocess.run([builder.find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "LD_PRELOAD": ":".join(name.strip() for name in runtimes), "PYTHONPATH": ":".join(sys.path),
        "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = START + FLOATS + INT8 + ENCODER + GRAM + DECODER + "print('clean')"
    done = subprocess.run(
        [sys.executable, "-c", script, str(library_path), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "clean" in done.stdout
