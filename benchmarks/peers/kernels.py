"""Products with packed weights by other programs, for cpu_kernels.py: one process per peer, lines of JSON on a pipe.

A peer is a function of (format, shape, rows, copies): it makes as many weights as `copies`, multiplies by all of them,
one after the other, whenever it is called, and says the bytes of one. Values are random where the speed does not depend
on them. What a peer does not have it says by raising; the table names it. `install.py` installs them; the processes get
malloc's huge pages (GLIBC_TUNABLES), without which most of them read through pages of 4 kB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peers.kernels_ggml import ggml

Shape = tuple[int, int]
Made = tuple[Callable[[], object], int]
GROUP = 128
BITS = {"int4-g128": 4, "int2-g128": 2, "int8-channel": 8}


def onnxruntime_level(level: int) -> Callable[[str, Shape, int, int], Made]:
    """MatMulNBits, whose accuracy level 4 multiplies inputs in int8; each weight a node of one graph."""

    def make(format: str, shape: Shape, rows: int, copies: int) -> Made:
        import numpy as np
        import onnx
        import onnxruntime as ort

        bits, (outs, columns) = BITS[format], shape
        random, blocks = np.random.default_rng(0), columns // GROUP
        nodes, outputs, held = [], [], []
        for i in range(copies):
            codes = random.integers(0, 256, (outs, blocks, GROUP * bits // 8), dtype=np.uint8)
            scales = np.full((outs, blocks), 0.01, dtype=np.float32)
            held += [onnx.numpy_helper.from_array(codes, f"b{i}"), onnx.numpy_helper.from_array(scales, f"s{i}")]
            options = {"K": columns, "N": outs, "bits": bits, "block_size": GROUP, "accuracy_level": level}
            inputs = ["x", f"b{i}", f"s{i}"]
            nodes.append(onnx.helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **options))
            outputs.append(onnx.helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, (rows, outs)))
        given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (rows, columns))
        graph = onnx.helper.make_graph(nodes, "products", [given], outputs, held)
        sets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        x = random.standard_normal((rows, columns)).astype(np.float32)
        return lambda: session.run(None, {"x": x}), outs * (columns * bits // 8 + 4 * blocks)

    return make


def openvino_inputs(group: int) -> Callable[[str, Shape, int, int], Made]:
    """Compressed weights, all in one graph; inputs in int8 per `group` columns, or as they are where it is 0."""

    def make(format: str, shape: Shape, rows: int, copies: int) -> Made:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as ops

        outs, columns = shape
        random = np.random.default_rng(0)
        size, width = (0, 8) if format == "int8-channel" else (64 if format == "nf4" else GROUP, 4)
        kind = {"int4-g128": ov.Type.i4, "int8-channel": ov.Type.i8, "nf4": ov.Type.nf4}[format]
        x = ops.parameter([rows, columns], ov.Type.f32)
        groups = columns // size if size else 1
        products, held = [], []
        for _ in range(copies):
            inside = [outs, groups, columns // groups]
            raw = random.integers(0, 256, outs * columns * width // 8, dtype=np.uint8)
            held.append(raw)  # OpenVINO's tensor does not
            codes = ops.constant(ov.Tensor(raw.view(np.int8) if width == 8 else raw, ov.Shape(inside), kind))
            floats = ops.convert(codes, ov.Type.f16)
            scaled = ops.multiply(floats, ops.constant(np.full((outs, groups, 1), 0.01, dtype=np.float16)))
            weight = ops.convert(ops.reshape(scaled, [outs, columns], False), ov.Type.f32)
            products.append(ops.matmul(x, weight, False, True))
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }  # fmt: skip
        request = ov.Core().compile_model(ov.Model(products, [x]), "CPU", settings).create_infer_request()
        request.set_input_tensor(ov.Tensor(random.standard_normal((rows, columns)).astype(np.float32)))

        def run() -> None:
            assert held
            request.infer()

        return run, outs * (columns * width // 8 + 2 * groups)

    return make


def auto_round(format: str, shape: Shape, rows: int, copies: int) -> Made:
    """Intel's kernels under auto-round, as its QuantLinear calls them."""
    import auto_round_kernel as ark

    bits, (outs, columns) = BITS[format], shape
    group = columns if format == "int8-channel" else GROUP
    ark.set_threads(torch.get_num_threads()) if hasattr(ark, "set_threads") else None
    how = (group, "auto", f"int{bits}", "fp32", False)
    random, none = torch.Generator().manual_seed(0), torch.empty(0)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (columns, outs), generator=random, dtype=torch.int8)
    scales = torch.full((columns // group, outs), 0.01)
    one = ark.repack_quantized_weight(codes, scales, torch.empty(0, dtype=torch.int8), *how)
    blobs, x = [one, *(one.clone() for _ in range(copies - 1))], torch.randn(rows, columns, generator=random)

    def run() -> None:
        for blob in blobs:
            ark.woqgemm(x, blob, none, outs, columns, *how)

    run()
    return run, one.numel()


def torchao(format: str, shape: Shape, rows: int, copies: int) -> Made:
    """What torchao's configurations of these bits make of a linear."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if format == "int8-channel" else Int4WeightOnlyConfig(group_size=GROUP)
    if format not in ("int8-channel", "int4-g128"):
        raise KeyError(format)
    layers = []
    for _ in range(copies):
        layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        quantize_(layer, config)
        layers.append(layer)
    x = torch.randn(rows, shape[1]).bfloat16()

    def run() -> None:
        with torch.no_grad():
            for layer in layers:
                layer(x)

    run()
    bits = 8 if format == "int8-channel" else 4
    return run, shape[0] * (shape[1] * bits // 8 + (2 if bits == 8 else 4 * shape[1] // GROUP))


# By name in the table: the folder that install.py makes, how weights are made, which formats are tried.
PEERS: dict[str, tuple[str, Callable[[str, Shape, int, int], Made], tuple[str, ...]]] = {
    # At level 1 its 2 and 8 bits take a hundred times as long as at level 4.
    "ONNX Runtime, fp32": ("onnxruntime", onnxruntime_level(1), ("int4-g128",)),
    "ONNX Runtime, int8 inputs": ("onnxruntime", onnxruntime_level(4), ("int4-g128", "int2-g128", "int8-channel")),
    "OpenVINO": ("openvino", openvino_inputs(0), ("int4-g128", "nf4", "int8-channel")),
    "OpenVINO, int8 inputs": ("openvino", openvino_inputs(32), ("int4-g128", "int8-channel")),
    "auto-round-lib": ("auto-round-lib", auto_round, ("int4-g128", "int2-g128", "int8-channel")),
    "torchao": ("torchao", torchao, ("int4-g128", "int8-channel")),
    "ggml": ("ggml", ggml(False), ("int4-g128", "nf4", "int3-g128", "int2-g128", "int8-channel", "q4_k")),
    # Types that ggml does not repack on any x86 processor end the process when they are given such a buffer.
    "ggml, repacked": ("ggml", ggml(True), ("int4-g128", "nf4", "int2-g128", "q4_k")),
}


class Peer:
    """One peer in a process of its own, which has one case at a time and is started again where a case ends it."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        place, _, self.formats = PEERS[name]
        self.name, self.folder, self.threads = name, folder / place, threads
        self.pipe: subprocess.Popen[str] | None = None

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer, or {"error": why}."""
        if not self.folder.is_dir():
            return {"error": f"not installed; python benchmarks/peers/install.py {self.folder.parent} installs it"}
        pipe = self.pipe = self.pipe or self._start()
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        try:
            print(json.dumps(question), file=pipe.stdin, flush=True)
        except BrokenPipeError:  # it has ended since its last answer, for want of memory, say
            line = ""
        else:
            line = pipe.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.pipe = None
        return {"error": f"its process ended with status {pipe.wait()}"}

    def _start(self) -> subprocess.Popen[str]:
        search = [str(self.folder), str(Path(__file__).parents[1]), *filter(None, (os.environ.get("PYTHONPATH"),))]
        settings = {"PYTHONPATH": os.pathsep.join(search), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        return subprocess.Popen(
            [sys.executable, __file__, self.name, str(self.threads)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads), **settings},
        )  # fmt: skip

    def close(self) -> None:
        if self.pipe is not None:
            self.pipe.kill()
            self.pipe = None


def serve(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    run: Callable[[], object] = lambda: None  # noqa: E731
    copies = 1
    for line in sys.stdin:
        asked = json.loads(line)
        said: dict[str, Any] = {}
        try:
            if "format" in asked:
                run, copies = lambda: None, asked["copies"]
                run, said["bytes"] = PEERS[name][1](asked["format"], tuple(asked["shape"]), asked["rows"], copies)
            else:
                said["seconds"], start = [], time.perf_counter()
                while not said["seconds"] or time.perf_counter() - start < asked["turn"]:
                    before = time.perf_counter()
                    run()
                    said["seconds"].append((time.perf_counter() - before) / copies)
        except Exception as error:  # a peer's error is its result
            said = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
