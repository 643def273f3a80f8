"""int8 linears on the processor beside ONNX Runtime's: python benchmarks/cpu_int8.py [PEERS]

One row with cold weights beside a plain reading of as many cold bytes; more rows against torch's bfloat16 product and
ONNX Runtime's DynamicQuantizeMatMul (PEERS: see encoders_speed.py; left out without it). Inputs of the int8 products
are float32 and quantized in the call; candidates of a case in turns of many calls. What of the processor's own rate of
products is reached stands beside it (int8_ceiling.py). Writes results/NAME.*.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

import whit
from whit.activations import parse_activations
from whit.evaluation.kernel_speed import READING, measure_limits, reading
from whit.kernels import Cpu8
from whit.kernels.cpu import library
from whit.layouts import BITS

import harness
from int8_ceiling import ceilings

# Rows and columns of the weight: those of language models, of encoders behind them.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1536, 384), (384, 1536), (384, 384))
ROWS = (1, 16, 32, 512)
COLD = 256 << 20  # bytes of weights, at least, that take turns where there is one row


def cold_bytes() -> int:
    """More than the last cache holds, twice, where the system says how much that is."""
    sizes = [COLD]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(2 * 1024 * int(text[:-1]))
    return max(sizes)


def onnx_product(rows: int, weight: torch.Tensor, scale: torch.Tensor, threads: int) -> Callable[[Any], object]:
    """ONNX Runtime's product of float32 rows, quantized in the call, and an int8 weight (out, in), scales (out,)."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    out, columns = weight.shape
    tensors = {"B": weight.T.contiguous().numpy(), "scale": scale.numpy()}
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeMatMul", ["A", *tensors], ["Y"], domain="com.microsoft")],
        "product",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [rows, columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [rows, out])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"A": x.numpy()})


def candidates(rows: int, shape: tuple[int, int], args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The products of one case; those of one row go through copies of the weight that no cache holds."""
    random = torch.Generator().manual_seed(0)
    weight, kernel = torch.randn(shape, generator=random), Cpu8()
    quantized = whit.quantize_tensor(weight, "int8")
    how = parse_activations("int8")
    copies = max(cold_bytes() // weight.numel(), 1) if rows == 1 else 1
    packed = [kernel.prepare(replace(BITS.pack(quantized), activations=how)) for _ in range(copies)]
    halves = [weight.bfloat16() for _ in range(-(-copies // 2))]
    x = torch.randn(rows, shape[1], generator=random)
    short, turn = x.bfloat16(), {"whit": 0, "torch": 0}

    def mine() -> object:
        turn["whit"] += 1
        return kernel.linear(x, packed[turn["whit"] % copies], None)

    def theirs() -> object:
        turn["torch"] += 1
        return torch.nn.functional.linear(short, halves[turn["torch"] % len(halves)])

    found = {"whit w8a8": mine, "torch bfloat16": theirs}
    if rows == 1 and not isinstance(compiled := library(), str):
        calls = cycle(reading(packed[0].nbytes, compiled)[0])
        found[READING] = lambda: next(calls)(x)
    if args.peers is not None and rows > 1:
        scale: Any = quantized.params["scale"]
        product = onnx_product(rows, quantized.codes, scale.reshape(-1), args.threads)
        found["ONNX Runtime int8"] = lambda: product(x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="for all timings together")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="only these, by number")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--name", default="cpu_int8", help="of the files in results/")
    parser.add_argument("--cpu-time", action="store_true", help="least CPU time of the thread, for a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peers is not None:
        folder = args.peers / "onnxruntime"
        sys.path.insert(0, str(folder if (folder / "onnxruntime").is_dir() else args.peers))
    clock = time.thread_time if args.cpu_time else time.perf_counter
    limits, most, rows, lines = measure_limits(), max(ceilings(args.threads).values(), default=0.0), [], []
    for shape in (SHAPES[i] for i in args.shapes):
        for count in args.rows:
            tasks = candidates(count, shape, args)
            seconds = harness.in_turns(tasks, args.seconds / len(args.rows) / len(args.shapes), clock)
            middle = {n: min(row) if args.cpu_time else harness.spread(row)["median"] for n, row in seconds.items()}
            own = shape[0] * shape[1] / middle["whit w8a8"]
            cold, busy = count == 1 and shape[0] * shape[1] > 1 << 22, count > 1 and most > 0
            read, done = middle.get(READING, 0.0) / middle["whit w8a8"], 2 * count * own / most if busy else 0.0
            shares = (f"{100 * read:.0f} %" if cold else "", f"{100 * done:.0f} %" if busy else "")
            cells = [f"{1e3 * middle[n]:.3f}" if n in middle else "" for n in LABELS]
            lines.append((f"{shape[0]}x{shape[1]}", str(count), *cells, *shares))
            rows.append({"shape": shape, "rows": count, "seconds": middle, "of_bandwidth": read if cold else None})
            print(*lines[-1], flush=True)
    peer = version("onnxruntime") if args.peers is not None else "left out"
    note = (
        f"\nMilliseconds, {args.threads} threads; one row: weights cold, and the share of it that reading as many cold "
        f"bytes took in these turns (before: {limits.read_bytes_per_second / 1e9:.1f} GB/s); more rows: share of the "
        f"{most / 1e12:.2f} TOP/s that it multiplies bytes at. torch {torch.__version__}, ONNX Runtime {peer}."
    )
    header = ("weight", "rows", *LABELS, "of bandwidth", "of products")
    ceiling = {"read_bytes_per_second": limits.read_bytes_per_second, "operations_per_second": most}
    result = {"machine": harness.machine(), "onnxruntime": peer, "ceilings": ceiling, "rows": rows}
    harness.save(args.name, result, harness.markdown(header, lines) + "\n" + note)


LABELS = ("whit w8a8", "torch bfloat16", "ONNX Runtime int8", READING)

if __name__ == "__main__":
    harness.wait_as_usual()
    main()
