"""Every GPU kernel against float64 on the CPU: formats, ragged shapes, rows, dtypes; and what is promised of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import whit
from whit.formats import parse_format
from whit.kernels import Gpu, dequantize, packed_linear, reference
from whit.kernels.gpu import dequantize as unpacking
from whit.kernels.gpu import launches, stream, tiled
from whit.kernels.gpu.scales import storage
from whit.kernels.gpu.stream import Config, Scheme
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

from gpu_harness import Budget, Kitchen, relative_error

SPECS = (
    "int4-g128", "nf4", "nf4-dq", "int4-g64-asym", "int4-g128-asym-fz", "int4-g32", "int4-channel", "fp4-g128",
    "int8", "int8-g128", "int8-g32-asym", "int8-channel-asym", "int3-g128", "int3-g128-asym", "int2-g64",
    "int2-g128-asym",     "int1-g128", "int1-channel", "int5-g128-asym", "int6-channel", "int7-g256", "int4-g64-f16",
)  # fmt: skip
ODD_SPECS = ("int3-g20-asym-fz", "int2-g32", "codebook(-1,0,1)-g10", "dynamic8", "int4-g24-asym", "nf4-g40-dq")
TORCH_SPECS = ("int4-g128-asym", "nf4-dq", "int3-g20-asym-fz")
CONFIGS = (
    Config(1, 4, 2, 2, 1, 1), Config(2, 2, 2, 1, 3, 1), Config(1, 1, 4, 1, 2, 1), Config(1, 8, 1, 4, 5, 1),
)  # fmt: skip
TILED = (
    (torch.bfloat16, 16, tiled.Config(1, 1, 2, 2, 3, 2, 2)), (torch.bfloat16, 61, tiled.Config(1, 2, 8, 2, 4, 1, 2)),
    (torch.bfloat16, 300, tiled.Config(1, 2, 32, 1, 3, 2, 1)),
    (torch.bfloat16, 130, tiled.Config(2, 2, 16, 2, 3, 1, 1)), (torch.float16, 40, tiled.Config(1, 3, 8, 3, 4, 3, 1)),
)  # fmt: skip
TILED_SPECS = (
    "int4-g128", "nf4-dq", "int4-g64-asym", "int4-g128-asym-fz", "int4-channel", "int8", "int8-g32-asym",
    "int8-channel-asym", "int3-g128-asym", "int2-g64", "int1-g128", "int6-channel",
)  # fmt: skip
ROWS = (1, 5, 16, 30, 64, 130)
LIMIT = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # rounding of bfloat16 levels and of the result; float16's


def make(spec: str, outs: int, columns: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(outs + columns)
    return BITS.pack(whit.quantize_tensor(torch.randn(outs, columns, generator=generator), spec))


def on_gpu(packed: PackedWeight) -> PackedWeight:
    return PackedWeight(packed.layout, packed.format, packed.shape, {k: t.cuda() for k, t in packed.tensors.items()})


def fresh_x(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


class Report:
    """Counts checks and keeps the failures; a check that raises is a failure, not the end."""

    def __init__(self) -> None:
        self.passed, self.failures = 0, []

    def check(self, name: str, test: Callable[[], str | None]) -> None:
        try:
            problem = test()
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        if problem is None:
            self.passed += 1
            return
        self.failures.append(f"{name}: {problem}")
        if len(self.failures) <= 40:
            print("FAIL", self.failures[-1], flush=True)


def compare(found: Tensor, wanted: Tensor, limit: float) -> str | None:
    error = relative_error(found, wanted)
    return None if error <= limit else f"relative error {error:.2e} above {limit:.0e}"


def check_streams(report: Report, spec: str, shape: tuple[int, int]) -> None:
    packed = make(spec, *shape)
    there, wanted_w = on_gpu(packed), BITS.unpack(packed).dequantize(torch.float64)
    scheme = stream.scheme(packed.format, shape[1])
    if isinstance(scheme, str):
        report.check(f"{spec} {shape}", lambda: f"not fused: {scheme}")
        return
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    for dtype, rows, config in cases():
        x = fresh_x(rows, shape[1], dtype)
        wanted = x.double() @ wanted_w.T + bias.to(dtype).double()
        fitted = fit(config, scheme, shape[1], rows)

        def run(x: Tensor = x, fitted: Config = fitted, wanted: Tensor = wanted) -> str | None:
            def once() -> Tensor:
                return launches.by_stream(x.cuda(), [there], [bias.to(x.dtype).cuda()], scheme, fitted).start()[0]

            first = once()
            if not torch.equal(first, once()):
                return "two runs differ"
            return compare(first, wanted, LIMIT[x.dtype])

        report.check(f"{spec} {shape} rows {rows} {dtype} {fitted}", run)


def check_tiled(report: Report, spec: str, shape: tuple[int, int]) -> None:
    """Both with and without Hopper's instruction, where there is one."""
    packed = make(spec, *shape)
    there, wanted_w = on_gpu(packed), BITS.unpack(packed).dequantize(torch.float64)
    scheme = stream.scheme(packed.format, shape[1])
    assert not isinstance(scheme, str)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    for dtype, rows, config, wgmma in tiled_cases():
        x = fresh_x(rows, shape[1], dtype)
        wanted = x.double() @ wanted_w.T + bias.to(dtype).double()
        fitted = tiled.fitted(config, scheme, shape[1])

        def run(
            x: Tensor = x, fitted: tiled.Config = fitted, wanted: Tensor = wanted, wgmma: bool = wgmma
        ) -> str | None:
            def once() -> Tensor:
                return launches.multiply_tiled(x.cuda(), there, bias.to(x.dtype).cuda(), scheme, fitted, wgmma)

            first = once()
            if not torch.equal(first, once()):
                return "two runs differ"
            return compare(first, wanted, LIMIT[x.dtype])

        report.check(f"{spec} {shape} rows {rows} {dtype} {fitted} wgmma {wgmma}", run)


def tiled_cases() -> list[tuple[torch.dtype, int, tiled.Config, bool]]:
    ways = (True, False) if tiled.has_wgmma(torch.device("cuda", 0)) else (False,)
    return [(*case, wgmma) for wgmma in ways for case in (TILED if wgmma else TILED[:2])]


def fit(config: Config, scheme: Scheme, columns: int, rows: int) -> Config:
    """`config` with no empty splits and no more shared memory than there is."""
    while stream.shared_bytes(scheme, config, rows) > 160 << 10:
        config = replace(config, depth=config.depth // 2)
    return stream.fitted(config, scheme, columns)


def cases() -> list[tuple[torch.dtype, int, Config]]:
    found = [(torch.bfloat16, rows, CONFIGS[i % 4]) for i, rows in enumerate(ROWS)]
    return [*found, (torch.bfloat16, 3, CONFIGS[1]), (torch.float16, 4, CONFIGS[3]), (torch.float16, 33, CONFIGS[0])]


def check_dequantize(report: Report, spec: str, shape: tuple[int, int]) -> None:
    packed = make(spec, *shape)
    for dtype in (torch.bfloat16, torch.float16):

        def run(dtype: torch.dtype = dtype) -> str | None:
            found, wanted = dequantize(on_gpu(packed), dtype).cpu(), reference.dequantize(packed, dtype)
            return None if torch.equal(found, wanted) else f"{int((found != wanted).sum())} weights differ"

        report.check(f"dequantize {spec} {shape} {dtype}", run)


def check_invariance(report: Report, spec: str) -> None:
    packed, kernel = on_gpu(make(spec, 384, 2048)), Gpu(invariant=True)
    x = fresh_x(200, 2048, torch.bfloat16).cuda()

    def run() -> str | None:
        alone = torch.cat([kernel.linear(x[i : i + 1], packed, None) for i in (0, 7, 63, 64, 150)])
        for rows in (1, 8, 9, 31, 64, 151, 200):
            whole = kernel.linear(x[:rows], packed, None)
            for j, i in enumerate((0, 7, 63, 64, 150)):
                if i < rows and not torch.equal(whole[i], alone[j]):
                    return f"row {i} of {rows} differs from the row alone"
        return None

    report.check(f"invariance {spec}", run)


def check_torch(report: Report, spec: str) -> None:
    """Dispatch, the gradient, torch.compile and CUDA graphs."""
    packed = make(spec, 256, 512)
    there, weight = on_gpu(packed), BITS.unpack(packed).dequantize(torch.float64)
    module = QuantizedLinear(there)
    for rows in (1, 40, 300):
        x = fresh_x(rows, 512, torch.bfloat16)
        wanted = x.double() @ weight.T

        def eager(x: Tensor = x, wanted: Tensor = wanted) -> str | None:
            return compare(packed_linear(x.cuda(), there), wanted, LIMIT[x.dtype])

        def compiled(x: Tensor = x, wanted: Tensor = wanted) -> str | None:
            given = x.cuda().requires_grad_()
            module.ready(given)
            out = torch.compile(module, fullgraph=True)(given)
            out.sum().backward()
            assert given.grad is not None
            wrong = compare(given.grad, weight.sum(0).expand_as(x), LIMIT[x.dtype])
            return wrong or compare(out, wanted, LIMIT[x.dtype])

        def graphed(x: Tensor = x) -> str | None:
            given, ready = torch.randn_like(x.cuda()), Gpu().prepare(there)
            packed_linear(given, ready)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = packed_linear(given, ready)
            given.copy_(x)
            graph.replay()
            return None if torch.equal(out, packed_linear(x.cuda(), ready)) else "the replay differs from eager"

        def gradient(x: Tensor = x) -> str | None:
            given = x.cuda().requires_grad_()
            packed_linear(given, there).sum().backward()
            assert given.grad is not None
            return compare(given.grad, weight.sum(0).expand_as(x), LIMIT[x.dtype])

        for name, test in (("eager", eager), ("compiled", compiled), ("graph", graphed), ("gradient", gradient)):
            if name != "compiled" or rows != 40:
                report.check(f"{name} {spec} rows {rows}", test)


def check(kitchen: Kitchen, budget: Budget, only: str = "all") -> dict[str, Any]:
    """All of it, or the kernel for more rows and the public path; what the budget leaves no time for is named."""
    report, skipped = Report(), []
    shapes = ((200, 1024), (33, 2304))
    tests: list[tuple[str, Callable[[], None]]] = []
    more: list[tuple[Scheme, tiled.Config, bool, bool]] = []
    for spec in TILED_SPECS:
        for shape in shapes:
            scheme = stream.scheme(parse_format(spec), shape[1])
            assert not isinstance(scheme, str)
            more += [(scheme, c, d == torch.float16, wgmma) for d, _, c, wgmma in tiled_cases()]
            tests.append((f"tiled {spec}", lambda s=spec, shape=shape: check_tiled(report, s, shape)))
    kitchen.prepare_tiled(more)
    if only == "all":
        tests += streaming(kitchen, report, shapes)
    tests += [(f"invariance {s}", lambda s=s: check_invariance(report, s)) for s in ("int4-g128", "nf4", "int8")]
    tests += [(f"torch {s}", lambda s=s: check_torch(report, s)) for s in TORCH_SPECS]
    print(f"compiled {len(kitchen.done)} kernels, {budget.left:.0f} s left", flush=True)
    for name, test in tests:
        if budget.left < 1:
            skipped.append(name)
            continue
        test()
    print(f"checks: {report.passed} passed, {len(report.failures)} failed, {len(skipped)} groups skipped", flush=True)
    return {"passed": report.passed, "failures": report.failures, "skipped": skipped}


def streaming(
    kitchen: Kitchen, report: Report, shapes: Sequence[tuple[int, int]]
) -> list[tuple[str, Callable[[], None]]]:
    """The streaming and the dequantizing kernel's checks, compiled."""
    wanted, unpacked = [], []
    for spec in SPECS:
        for _, columns in shapes:
            scheme = stream.scheme(parse_format(spec), columns)
            if not isinstance(scheme, str):
                wanted += [(scheme, fit(c, scheme, columns, rows), d == torch.float16, rows) for d, rows, c in cases()]
    for spec in (*SPECS, *ODD_SPECS):
        for packed in (make(spec, *shape) for shape in ((5, 512), (3, 333))):
            stored = storage(packed.format)
            assert not isinstance(stored, str)
            unpacked += [(unpacking.SOURCE, unpacking.macros(packed, stored, half)) for half in (False, True)]
    kitchen.prepare_streams(wanted)
    kitchen.prepare(unpacked)
    tests: list[tuple[str, Callable[[], None]]] = []
    for spec in SPECS:
        tests += [(spec, lambda s=spec, shape=shape: check_streams(report, s, shape)) for shape in shapes]
    for spec in (*SPECS, *ODD_SPECS):
        tests += [(spec, lambda s=spec, h=h: check_dequantize(report, s, h)) for h in ((5, 512), (3, 333), (70, 40))]
    return tests
