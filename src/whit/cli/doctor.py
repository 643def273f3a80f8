"""`whit doctor`: what this machine has: devices, instruction sets, kernels, and why one is not used."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from whit.cli.console import print_json
from whit.cli.options import AsJson
from whit.extras import EXTRAS, install
from whit.report.machine import PEERS, installed

LIBRARIES = ("whit", "torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve")


def doctor(as_json: AsJson = False) -> None:
    found = examine()
    if as_json:
        print_json(found)
        return
    for title, facts in found.items():
        print(title)
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            print(f"  {name:<{width}}  {', '.join(value) if isinstance(value, list) else value}")


def examine() -> dict[str, dict[str, Any]]:
    """All facts, by title."""
    return {
        "libraries": {name: installed(name) or "missing" for name in LIBRARIES},
        "extras": {name: _extra(name) for name in EXTRAS},
        "peers": {name: installed(name) or "not installed" for name in PEERS},
        "processor": _processor(),
        "gpus": _gpus(),
        "kernels": _kernels(),
    }


def _extra(name: str) -> str:
    """What an extra is for, with the versions of its packages, or how to have it."""
    extra = EXTRAS[name]
    numbers = {package: installed(package) for package in extra.packages}
    if absent := [package for package, number in numbers.items() if number is None]:
        return f"to {extra.use}: {', '.join(absent)} not installed; {install(name)}"
    return f"to {extra.use}: {', '.join(f'{package} {number}' for package, number in numbers.items())}"


def _processor() -> dict[str, Any]:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "instructions": [flag for flag in FLAGS if flag in flags] or ["not known here"],
        "huge pages": pages.read_text().strip() if pages.exists() else "not known here",
        "memory": f"{memory:.1f} GiB" if memory else "not known here",
    }


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return {"cuda": f"none ({built})"}
    facts = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        )
    return facts


def _kernels() -> dict[str, str]:
    """For one weight of a usual format, and one row of activations: which kernel runs, and why others do not."""
    import torch

    import whit
    from whit.kernels import explain
    from whit.kernels.cpu import library
    from whit.layouts import BITS

    packed = BITS.pack(whit.quantize_tensor(torch.ones(64, 128), "int4-g64"))
    compiled = library()
    if isinstance(compiled, str):
        built = f"none: {compiled}"
    else:
        threads = "torch's OpenMP threads" if compiled.parallel else "one thread: torch's OpenMP was not found"
        built = f"{', '.join(compiled.isas)} (the last is used); {threads}"
    return {**dict(explain(packed, torch.ones(1, 128))), "compiled for": built}
