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
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import whit
from gpu_many import winners
from whit.compiled import cuda, static
from whit.formats import parse_format
from whit.kernels import dequantize
from whit.kernels.gpu import decoding, few, nvrtc, stream, tables, tables_many, tuned, ways
from whit.kernels.gpu import kernel as gpu_kernel
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

from gpu_harness import early_works, relative_error
from harness import machine

LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SMALL = LLAMA | {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2}
FORMATS = ("bf16", "int4-g128", "nf4-dq")
PROMPT, NEW, STEPS, PREFILL = 128, 64, 40, 2048  # three times STEPS after PROMPT fit in a cache of 256


def random_packed(spec: str, shape: tuple[int, int], device: str, random: torch.Generator) -> PackedWeight:
    """Random codes and params such that weights are about 0.02."""
    format, tensors = parse_format(spec), {}
    for name, want in BITS.specs(format, shape).items():
        if want.dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, want.shape, dtype=torch.uint8, device=device, generator=random)
        else:
            low = 0.004 if name == "scale" else 0.02
            values = torch.rand(want.shape, device=device, generator=random) * low + low / 2
            tensors[name] = values.to(want.dtype)
    return PackedWeight(BITS.name, format, shape, tensors)


def random_model(spec: str, options: dict[str, Any], device: str, seed: int = 0) -> Any:
    """A Llama with random weights made where it will run; linears of the blocks in a format."""
    config = transformers.LlamaConfig(**options, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    random = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            if spec != "bf16" and name != "lm_head":
                new: nn.Module = QuantizedLinear(random_packed(spec, shape, device, random), None, torch.bfloat16)
            else:
                new = nn.Linear(1, 1, bias=False)
                weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=random)
                new.weight = nn.Parameter(weight, requires_grad=False)
                new.out_features, new.in_features = shape
            setattr(parent, name.rpartition(".")[2], new)
        elif isinstance(module, nn.Embedding):
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(generator=random)
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device))
    model.requires_grad_(False)
    return model


def compiled(model: Any, device: str) -> Any:
    """`whit.compile` on a GPU; elsewhere the same loop without graphs."""
    return whit.compile(model, strict=True) if device == "cuda" else cuda.compile_cuda(model, {}, lambda work: work)


def same_tokens(model: Any, tokens: Tensor, device: str, count: int = 32) -> dict[str, Any]:
    """Greedy tokens of transformers and of whit.compile; where they part, how near the two likeliest tokens were."""
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    wanted = type(model).generate(model, tokens, attention_mask=mask, **settings)
    eager_static = type(model).generate(
        model, tokens, attention_mask=mask, cache_implementation="static", disable_compile=True, **settings
    )
    found = compiled(model, device).generate(tokens, attention_mask=mask, **settings)
    result: dict[str, Any] = {
        "equal": torch.equal(found, wanted), "static_equals_dynamic": torch.equal(eager_static, wanted),
        "step": type(model.generate.__self__._decoder._step).__name__,
    }  # fmt: skip
    if not result["equal"]:
        row, column = (found != wanted).nonzero()[0].tolist()
        with torch.no_grad():
            logits = model(wanted[row : row + 1, :column]).logits[0, -1].float()
        best = logits.topk(2).values
        result |= {
            "parts_at": column - tokens.shape[1], "row": row, "gap": (best[0] - best[1]).item(),
            "largest_logit": best[0].item(), "chosen_behind_best": (best[0] - logits[found[row, column]]).item(),
        }  # fmt: skip
    model.__dict__.pop("generate", None)
    return result


def attempted(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it finds, or how it failed."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def checks(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens equal to eager's."""
    random = torch.Generator(device).manual_seed(1)
    found = {}
    for spec in FORMATS:
        model = random_model(spec, options | {"num_hidden_layers": 2}, device)
        for batch in (1, 16):
            tokens = torch.randint(3, options["vocab_size"], (batch, 20), device=device, generator=random)
            found[f"random {spec} batch {batch}"] = attempted(lambda m=model, t=tokens: same_tokens(m, t, device))
    folder = whit.resolve_model("whit:model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer("The history of the town", return_tensors="pt").input_ids.to(device)
    for spec in FORMATS:
        settings = {} if spec == "bf16" else {"quantization_config": whit.QuantizationConfig(spec)}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings)
        found[f"shipped {spec}"] = attempted(lambda m=model: same_tokens(m.to(device), text, device, 48))
    for name, each in found.items():
        print(name, each, flush=True)
    return found


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
    normal = nvrtc.Function.launch_early
    nvrtc.Function.launch_early = nvrtc.Function.launch  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            own = static.Decoder(model, decoder.state, decoder._step, static.captured_on_cuda)
            own.prefill(tokens, None, None)
            return seconds(lambda: [own.step() for _ in range(STEPS)], "cuda") / STEPS
    finally:
        nvrtc.Function.launch_early = normal  # type: ignore[method-assign]


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


def few_rows_right(some_rows: tuple[int, ...] = (1, 5)) -> bool:
    """Whether what is taken for few rows is right here; if not, it is left out of what follows."""
    random, right = torch.Generator("cuda").manual_seed(5), True
    for spec, shape in itertools.product(("int4-g128", "nf4-dq"), ((4096, 4096), (4096, 14336))):
        packed = random_packed(spec, shape, "cuda", random)
        weight = dequantize(packed, torch.bfloat16).double()
        for rows in some_rows:
            x = torch.randn(rows, shape[1], device="cuda", generator=random).bfloat16()
            wanted = x.double() @ weight.T
            for y in gpu_kernel.products(x, [packed, packed], [None, None]):
                error = ((y.double() - wanted).norm() / wanted.norm()).item()
                if not error < 5e-3:
                    print(f"few rows WRONG: {spec} {shape} {rows}: {error:.1e}", flush=True)
                    right = False
        if not ends_right(x[:1], packed):
            print(f"norm, gate or sum WRONG: {spec} {shape}", flush=True)
            right = False
    return right


def ends_right(x: Tensor, packed: PackedWeight) -> bool:
    """Whether one row's product with its norm and gate, and with its sum, is what launches of their own give."""
    weight = torch.rand(x.shape[1], device=x.device).bfloat16()
    normed = decoding.norm(x.clone(), None, weight, 1e-5)
    gates, ups = gpu_kernel.products(normed, [packed, packed], [None, None])
    (product,) = gpu_kernel.products(x, [packed], [None])
    before = torch.randn_like(product)
    ends = few.Ends(weight, 1e-5, gated=True)
    gated = gpu_kernel.row_through(x, [packed, packed], [None, None], ends)
    summed = gpu_kernel.row_through(x, [packed], [None], few.Ends(onto=True), before.clone())
    if gated is None or summed is None:
        return False
    pairs = ((gated[0], decoding.gate(gates, ups)), (summed[0], before + product))
    return all(relative_error(found, wanted) < 5e-3 for found, wanted in pairs)


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
            tables.HOPPER_FEW[key] = tuple(each["ranking"][0][1])
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
