"""`whit inspect` of a .gguf file: its header, which is checked whole."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from whit.checkpoint.parts import read_gguf_parts

SHOWN = ("general.name", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.pre", "quantize.imatrix.file")


def gguf_facts(path: Path) -> dict[str, Any]:
    """What a file says of itself, in the shape of a folder's facts; types are ggml's."""
    header = read_gguf_parts(path)
    counts, elements, sizes = Counter[str](), Counter[str](), Counter[str]()
    for tensor in header.tensors.values():
        counts[tensor.type] += 1
        elements[tensor.type] += prod(tensor.shape)
        sizes[tensor.type] += tensor.stop - tensor.start
    total, size_bytes = sum(elements.values()), sum(file.stat().st_size for file in header.paths)
    architecture = str(header.metadata.get("general.architecture"))
    facts = {
        key: value if isinstance(value, str | int | float) else str(value)
        for key, value in header.metadata.items()
        if key in SHOWN or key.startswith(f"{architecture}.")
    }
    return {
        "model": path.name,
        "architectures": [architecture],
        "quant_method": "gguf",
        "tensors": len(header.tensors),
        "elements": total,
        "size_bytes": size_bytes,
        "bits_per_element": 8 * size_bytes / max(total, 1),
        "dtypes": {n: {"tensors": counts[n], "elements": elements[n], "bytes": sizes[n]} for n in counts},
        "files": [file.name for file in header.paths],
        "metadata": facts,
    }
