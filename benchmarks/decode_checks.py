"""What decode_gpu.py checks before it times: tokens, products of few rows, and what their launches end with."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import whit
from decode_models import FORMATS, random_model, random_packed
from whit.compiled import cuda
from whit.kernels import dequantize
from whit.kernels.gpu import decoding, few
from whit.kernels.gpu import kernel as gpu_kernel
from whit.tensor import PackedWeight

from gpu_harness import relative_error


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
