"""What must hold for any bytes at all that are read as a header: one sentence, or a file that is safe to read.

No number in a file may size memory that the file's own bytes do not back: the peak while reading stays below a fixed
sum and a fixed multiple of the file's size (a Python object of a list of lists takes 60 bytes per byte of JSON).
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from safetensors import deserialize

from whit.checkpoint.gguf import read_gguf
from whit.checkpoint.header import DTYPES, read_header
from whit.checkpoint.reader import TensorFiles
from whit.errors import CheckpointError
from whit.export.gguf.imatrix import read_imatrix

FIXED_BYTES, BYTES_PER_BYTE = 1 << 20, 120
LONGEST_MESSAGE = 400_000  # characters: a name may be 64 KiB, each of its bytes escaped in four


def check_gguf(path: Path) -> bool:
    """Whether the file was read; tensors must lie inside it and apart, and metadata must be readable."""
    header = read_gguf(path)
    size, position = path.stat().st_size, 0
    for tensor in sorted(header.tensors.values(), key=lambda t: (t.start, t.stop)):
        assert tensor.start <= tensor.stop <= size
        assert tensor.stop == tensor.start or tensor.start >= position
        position = max(position, tensor.stop)
    for value in header.metadata.values():
        if hasattr(value, "__len__") and len(value):
            assert value[len(value) - 1] is not None
    return True


def check_safetensors(path: Path) -> bool:
    """Whether the file was read; every tensor must be readable and the safetensors library must see the same."""
    entries = read_header(path)
    assert sum(entry.stop - entry.start for entry in entries.values()) < path.stat().st_size
    files = TensorFiles()
    files.entries = entries
    with contextlib.closing(files):
        assert all(tuple(files[name].shape) == entry.spec.shape for name, entry in entries.items())
    theirs = dict(deserialize(path.read_bytes()))
    assert {n: (DTYPES[t["dtype"]], tuple(t["shape"])) for n, t in theirs.items()} == {
        n: (e.spec.dtype, e.spec.shape) for n, e in entries.items()
    }
    return True


def check_imatrix(path: Path) -> bool:
    """Whether the file was read, in either of its formats."""
    found = read_imatrix(path)
    assert found.sums.keys() == found.counts.keys()
    assert sum(4 * len(sums) for sums in found.sums.values()) <= path.stat().st_size
    return True


CHECKS: dict[str, Callable[[Path], bool]] = {
    "gguf": check_gguf, "safetensors": check_safetensors, "imatrix": check_imatrix,
}  # fmt: skip


def check(kind: str, content: bytes, path: Path) -> bool:
    """Whether a file of these bytes is read; False where it is refused in one sentence. All else raises."""
    path.write_bytes(content)
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        return CHECKS[kind](path)
    except CheckpointError as error:
        text = str(error)
        assert "\n" not in text, text
        assert len(text) < LONGEST_MESSAGE
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        if not running:
            tracemalloc.stop()
        assert peak < FIXED_BYTES + BYTES_PER_BYTE * len(content), f"{peak} bytes for a file of {len(content)}"
