"""Decoding on a GPU through whit.compile: checked on small models, then timed on a Llama-3-8B-shaped one.

    python benchmarks/decode_gpu.py --seconds 110 --out FOLDER

Checked: greedy tokens of whit.compile against transformers' own generate, for a random two-layer Llama and the model
that ships with whit. Timed: one token at batch 1 and 16 in bfloat16, int4-g128 and nf4-dq (random weights, made on the
device; embedding and head in bfloat16), the prompt's pass of 2,048 tokens, and peak memory. --layers 2 --small tries
the script out; --tokens-only times nothing but a token at batch 1, in a third of the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import whit
from decode_checks import attempted, checks, compiled, few_rows_right
from decode_models import FORMATS, LLAMA, SMALL, random_model
from gpu_many import winners
from whit.compiled import static
from whit.formats import parse_format
from whit.kernels.gpu import nvrtc, stream, tables_few, tables_many, tuned, ways
from whit.kernels.gpu.again import Prepared
from whit.layouts import BITS

from gpu_harness import early_works
from harness import machine

PROMPT, NEW, STEPS, PREFILL = 128, 64, 40, 2048  # three times STEPS after PROMPT fit in a cache of 256


def seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Median wall time of a call, the device idle before and after."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def timed(
    spec: str, options: dict[str, Any], device: str, batches: tuple[int, ...], eager: bool = False
) -> dict[str, Any]:
    """One format: a token's time and generate's, by batch; the prompt's pass; peak memory."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = random_model(spec, options, device)
    found: dict[str, Any] = {"format": spec, "made_seconds": time.perf_counter() - start}
    random = torch.Generator(device).manual_seed(2)
    draw = lambda *shape: torch.randint(3, options["vocab_size"], shape, device=device, generator=random)  # noqa: E731
    with torch.no_grad():
        long = draw(1, PREFILL if device == "cuda" else 64)
        pass_ = lambda: model(long, use_cache=False, logits_to_keep=1)  # noqa: E731
        pass_()
        found["prefill_seconds"] = seconds(pass_, device)
    if eager:
        few = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        found["eager_token_seconds"] = seconds(lambda: model.generate(draw(1, PROMPT), **few), device, 2) / 8
    for batch in batches:
        compiled(model, device)
        tokens = draw(batch, PROMPT)
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        settings["attention_mask"] = torch.ones_like(tokens)
        start = time.perf_counter()
        model.generate(tokens, **settings)
        first = time.perf_counter() - start
        generate = seconds(lambda tokens=tokens, settings=settings: model.generate(tokens, **settings), device)
        decoder = model.generate.__self__._decoder

        def many(decoder: static.Decoder = decoder) -> None:
            for _ in range(STEPS):
                decoder.follow()

        with torch.no_grad():
            decoder.prefill(tokens, None, None)
            token = seconds(many, device) / STEPS
        key = f"batch {batch}"
        found[key] = {
            "token_seconds": token, "generate_token_seconds": generate / NEW, "first_call_seconds": first,
            "step": type(decoder._step).__name__,
        }  # fmt: skip
        if batch == 1 and device == "cuda":
            found[key]["kernels"] = kernels(decoder)
            found[key]["model_forward_token_seconds"] = plain_graph(model, decoder, tokens)
            found[key]["without_early_token_seconds"] = without_early(model, decoder, tokens)
        if device == "cuda":
            found[key]["peak_bytes"] = torch.cuda.max_memory_allocated()
        print(spec, key, {k: v for k, v in found[key].items() if k != "kernels"}, flush=True)
        model.__dict__.pop("generate")
    return found


def token_only(spec: str, options: dict[str, Any], device: str) -> dict[str, Any]:
    """A format's token at batch 1, the median of three times STEPS."""
    model = random_model(spec, options, device)
    compiled(model, device)
    tokens = torch.full((1, PROMPT), 7, device=device)
    with torch.no_grad():
        decoder = model.generate.__self__.decoder(1, 256)
        decoder.prefill(tokens, None, None)

        def many() -> None:
            for _ in range(STEPS):
                decoder.follow()

        token = seconds(many, device) / STEPS
    print(spec, f"{token * 1e3:.3f} ms a token", flush=True)
    return {"format": spec, "batch 1": {"token_seconds": token, "step": type(decoder._step).__name__}}


def plain_graph(model: Any, decoder: static.Decoder, tokens: Tensor) -> float:
    """A token by the model's own forward in a graph, without whit's norms, attention and gates."""
    with torch.no_grad():
        own = static.Decoder(model, decoder.state, static.PlainStep(model), static.captured_on_cuda)
        own.prefill(tokens, None, None)
        return seconds(lambda: [own.step() for _ in range(STEPS)], "cuda") / STEPS


def without_early(model: Any, decoder: static.Decoder, tokens: Tensor) -> float:
    """A token in a graph in which each kernel begins when the one before it has ended."""
    late = partialmethod(nvrtc.Function.cut, early=False)
    with (
        mock.patch.object(nvrtc.Function, "cut", late),
        mock.patch.object(Prepared, "again", return_value=None),  # launches that weights keep are early ones
        mock.patch.object(Prepared, "keep", return_value=None),
        torch.no_grad(),
    ):
        own = static.Decoder(model, decoder.state, decoder._step, static.captured_on_cuda)
        own.prefill(tokens, None, None)
        return seconds(lambda: [own.step() for _ in range(STEPS)], "cuda") / STEPS


def kernels(decoder: static.Decoder) -> dict[str, Any]:
    """Microseconds per token and launches by kernel."""
    from torch.profiler import ProfilerActivity, profile

    try:
        decoder.state.slot.fill_(PROMPT)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(4):
                decoder.step()
            torch.cuda.synchronize()
        found = {e.key[:60]: (e.device_time_total / 4, e.count / 4) for e in seen.key_averages() if e.device_time_total}
    except Exception as error:
        return {"error": str(error)[:200]}
    ranked = dict(sorted(found.items(), key=lambda item: -item[1][0])[:14])
    for name, (time_, count) in ranked.items():
        print(f"    {time_:8.1f} us {count:6.1f} x {name}", flush=True)
    return ranked


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Times as fast as the same path in bfloat16."""
    first = next((r for r in rows if r["format"] == "bf16"), None)
    found = {}
    for row in rows if first else ():
        cells = {k: first[k]["token_seconds"] / v["token_seconds"] for k, v in row.items() if k.startswith("batch")}
        if "prefill_seconds" not in row:
            found[row["format"]] = cells
            continue
        cells["prefill"] = first["prefill_seconds"] / row["prefill_seconds"]
        cells["generate"] = first["batch 1"]["generate_token_seconds"] / row["batch 1"]["generate_token_seconds"]
        found[row["format"]] = {**cells, "peak_GB": row["batch 1"].get("peak_bytes", 0) / 1e9}
    return found


def quantizing(device: str) -> dict[str, Any]:
    """Seconds to quantize and pack a matrix where it lies, and what 7 G weights would take."""
    shape = (14336, 4096) if device == "cuda" else (256, 256)
    weight, found = torch.randn(shape, device=device).bfloat16(), {}
    for spec in ("int4-g128", "nf4", "nf4-dq", "int8"):
        work = lambda spec=spec: BITS.pack(whit.quantize_tensor(weight, spec))  # noqa: E731
        work()
        once = seconds(work, device, 3)
        found[spec] = {"seconds": once, "seconds_for_7G": once * 7e9 / weight.numel()}
    print("quantizing", found, flush=True)
    return found


def take_cuts(found: list[dict[str, Any]]) -> None:
    """Use the fastest cuts of gpu_few.py."""
    for each in found:
        if each and each["ranking"]:
            scheme = stream.scheme(parse_format(each["spec"]), each["shape"][1])
            key = tuned.kind(scheme), each["rows"], tuple(each["shape"])
            tables_few.HOPPER_FEW[key] = tuple(each["ranking"][0][1])
    ways.plan.cache_clear()


def take_many(path: Path) -> None:
    """Use what gpu_many.py found."""
    tables_many.HOPPER_MANY.update(winners(json.loads(path.read_text())["times"] or ()))
    ways.plan.cache_clear()
    right = few_rows_right((9, 16, 40))
    print(
        f"{len(tables_many.HOPPER_MANY)} cuts for more rows, weights together: {'right' if right else 'WRONG'}",
        flush=True,
    )
    if not right:
        tables_many.HOPPER_MANY.clear()
        ways.plan.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--tokens-only", action="store_true")
    parser.add_argument("--eager", action="store_true", help="time transformers' own generate too")
    parser.add_argument("--cuts", type=Path, help="gpu_few.json: cuts found there are used here")
    parser.add_argument("--many", type=Path, help="gpu_many.json: cuts found there are used here")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end = time.perf_counter() + given.seconds
    options = (SMALL if given.small else LLAMA) | {"num_hidden_layers": given.layers}
    result: dict[str, Any] = {"machine": machine(), "layers": given.layers}
    if device == "cuda":
        result |= {"early_launches": early_works(), "few_rows": attempted(lambda: {"right": few_rows_right()})}
        if result["few_rows"].get("right") is not True:
            tuned.best_few = lambda *_: None  # type: ignore[assignment]
            ways.plan.cache_clear()
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def write() -> None:
        result.update(rows=rows, ratios=ratios(rows))
        (given.out / "decode_gpu.json").write_text(json.dumps(result, indent=1, default=str) + "\n")

    if given.cuts and given.cuts.exists():
        take_cuts(json.loads(given.cuts.read_text())["timed"])
    if given.many and given.many.exists():
        take_many(given.many)
    if not given.no_checks:
        result["checks"] = checks(device, SMALL)
        write()
    for spec in given.formats:
        if time.perf_counter() > end - 15:
            print(f"no time left for {spec}")
            break
        if given.tokens_only:
            found = attempted(lambda spec=spec: token_only(spec, options, device))
            gc.collect()
        else:
            found = attempted(lambda spec=spec: timed(spec, options, device, (1, 16), given.eager))
        if "failed" in found:
            result.setdefault("failures", []).append(found)
            continue
        rows.append(found)
        print({k: v for k, v in rows[-1].items() if not k.startswith("batch")}, flush=True)
        write()
    if not given.tokens_only:
        result["quantizing"] = attempted(lambda: quantizing(device))
    write()
    for name, row in result["ratios"].items():
        print(name, {k: round(v, 2) for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
