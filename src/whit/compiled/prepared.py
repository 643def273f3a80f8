"""Packed weights as the processor's kernels hold them, kept in a file that later processes map instead of preparing.

The file is safetensors, one per model, written beside its place and renamed when it is whole. Its name has the key:
SHA-256 of the checkpoint's files (headers, sizes, times of change, samples of the data), the format of every module and
the number of the kernels' layout. Another checkpoint is another key and another file. Tensors begin at whole lines of
the cache; the mapping asks for huge pages, which file systems with large folios (ext4, xfs) give. Processes share it.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whit.checkpoint.header import byte_view, encode_header, read_header
from whit.errors import CheckpointError, OutputError, UnsupportedModelError
from whit.kernels import Kernel, select
from whit.kernels.cpu import LAYOUT, Cpu, Cpu8
from whit.kernels.cpu.memory import release
from whit.modules import PackedModule
from whit.tensor import TensorSpec

KEY = "~key"  # a tensor of the file: uint8 (32,)
LINE, BLOCK = 64, 4 << 20
SAMPLES, SAMPLE = 64, 4096  # places of each source file that the key looks at, and bytes at each
AGAIN = "it must be as it was written; delete it, or ask for a rebuild"


def use_prepared(model: Any, folder: Path, rebuild: bool) -> None:
    """Let all packed modules of a model hold tensors of the mapped file in `folder`, which is made if it is not there.

    Raises UnsupportedModelError for a model that is not a quantized checkpoint as it was loaded, CheckpointError for a
    file that is damaged, OutputError for a folder that cannot be written to.
    """
    files = _sources(model)
    key = prepared_key(model, files)
    path = folder / f"{Path(model.config._name_or_path).name or 'model'}-{key.hex()[:32]}.safetensors"
    if path.exists() and not rebuild:
        _require_loaded(model, (*files, path))
        held = _mapped(path, key)
    else:
        _require_loaded(model, files)
        held = _mapped(_write(path, key, _prepare(model)), key)
    _adopt(model, held, path)


def prepared_key(model: nn.Module, files: Sequence[Path]) -> bytes:
    """What the file is named after; the data itself is only sampled, so that a start need not read it."""
    found = sha256(f"layout {LAYOUT}".encode())
    for path in files:
        size = path.stat().st_size
        found.update(f"\n{path.name} {size} {path.stat().st_mtime_ns}".encode())
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            found.update(file.read(min(length, size)))
            for place in range(SAMPLES):
                file.seek(size * place // SAMPLES)
                found.update(file.read(SAMPLE))
    for name, module, _ in _modules(model):
        found.update(f"\n{name} {module.format} {module.weight_shape} {module.activations}".encode())
    return found.digest()


def _probe(model: nn.Module, module: PackedModule) -> Tensor:
    """A row of activations such as the module will be given."""
    return torch.empty(1, module.weight_shape[-1], dtype=getattr(model, "dtype", module.weight.dtype))


def _modules(model: nn.Module) -> Iterator[tuple[str, PackedModule, Cpu | Cpu8]]:
    """The packed modules that the processor's kernels multiply by, and which kernel does."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and len(module.weight_shape) == 2:
            kernel: Kernel = select(module.packed, _probe(model, module))
            if isinstance(kernel, Cpu | Cpu8):
                yield name, module, kernel


def _sources(model: Any) -> tuple[Path, ...]:
    """The weight files that a model was loaded from."""
    files = getattr(getattr(model, "hf_quantizer", None), "files", ())
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise UnsupportedModelError(
            "prepared: the model was not loaded from a checkpoint that whit has quantized; it must be, for its files "
            "are what the prepared weights are known by; write one by `whit quantize` and load that"
        )
    return tuple(map(Path, files))


def _require_loaded(model: nn.Module, files: Sequence[Path]) -> None:
    """Raise UnsupportedModelError unless all packed tensors are still those mapped from these files."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        raise UnsupportedModelError("prepared: this system does not say which files are mapped; use Linux") from None
    known, ranges = {str(file.resolve()) for file in files}, []
    for line in lines:
        place, *_, path = line.split(maxsplit=5)
        if path in known:
            ranges.append([int(end, 16) for end in place.split("-")])
    for name, module, _ in _modules(model):
        for key, tensor in module.packed.tensors.items():
            start, written = tensor.data_ptr(), not tensor.is_inference() and tensor._version > 0
            inside = any(first <= start and start + tensor.nbytes <= last for first, last in ranges)
            if tensor.numel() and (written or not inside):
                raise UnsupportedModelError(
                    f"prepared: {name}.{key} is not as it was loaded from {files[0]}; all packed weights must be; "
                    "load the model again and compile it first"
                )


def _prepare(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that the kernels prepare, by module and key."""
    found: dict[str, Tensor] = {}
    for name, module, _ in _modules(model):
        _, weight = module.ready(_probe(model, module))
        found |= {f"{name}.{key}": tensor for key, tensor in weight.tensors.items()}
    return found


def _write(path: Path, key: bytes, tensors: Mapping[str, Tensor]) -> Path:
    """Write the file, which is there only when it is whole."""
    whole: dict[str, Tensor] = {}
    for name, tensor in {KEY: torch.frombuffer(bytearray(key), dtype=torch.uint8), **tensors}.items():
        whole[name] = tensor
        whole[f"~{name}"] = torch.zeros(-tensor.nbytes % LINE, dtype=torch.uint8)  # safetensors knows no holes
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb", buffering=0) as file:
            for block in _blocks(whole):
                while block:
                    block = block[file.write(block) :]
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise OutputError(f"{path.parent}: {what}; prepared weights must fit there; name another folder") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """The file in blocks: what is written at once lies in large pages of the system's cache."""
    block = bytearray(_header(tensors))
    for tensor in tensors.values():
        rest = byte_view(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        while len(rest):
            room = BLOCK - len(block)
            block += rest[:room]
            rest = rest[room:]
            if len(block) == BLOCK:
                yield bytes(block)
                block.clear()
    yield bytes(block)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The file's header, made so long that the first tensor begins a line."""
    header, _ = encode_header({name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()})
    text = header[8:] + b" " * (-len(header) % LINE)
    return len(text).to_bytes(8, "little") + text


def _mapped(path: Path, key: bytes) -> dict[str, Tensor]:
    """The tensors of a file, of which no byte is read yet but the key's. Raises CheckpointError."""
    try:
        entries = read_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: damaged, its header cannot be trusted; {AGAIN}") from error
    if any(entry.start % LINE for name, entry in entries.items() if not name.startswith("~")):
        raise CheckpointError(f"{path}: its tensors do not begin at whole lines; {AGAIN}")
    with path.open("rb") as file:
        area = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(area, dtype=torch.uint8)
    found = {name: raw[e.start : e.stop].view(e.spec.dtype).reshape(e.spec.shape) for name, e in entries.items()}
    said = found.get(KEY)
    if said is None or bytes(said.tolist()) != key:
        raise CheckpointError(f"{path}: its key is not that of its name; {AGAIN}")
    return found


def _adopt(model: nn.Module, held: Mapping[str, Tensor], path: Path) -> None:
    """Let the modules hold the tensors of the file, all or none."""
    by_module: dict[str, dict[str, Tensor]] = {}
    for whole, tensor in held.items():
        name, _, key = whole.rpartition(".")
        by_module.setdefault(name, {})[key] = tensor
    taken = []
    for name, module, kernel in _modules(model):
        packed, own = module.packed, by_module.get(name, {})
        for key, tensor in packed.tensors.items():
            there = own.get(key)
            if there is None or there.shape != tensor.shape or there.dtype != tensor.dtype:
                raise CheckpointError(f"{path}: {name}.{key} is not {tensor.dtype} {tuple(tensor.shape)}; {AGAIN}")
        tensors = {**{key: own[key] for key in packed.tensors}, **own}  # in the layout's order
        taken.append((module, _probe(model, module), kernel, kernel.restore(replace(packed, tensors=tensors))))
    for module, x, kernel, prepared in taken:
        before = module.packed.tensors
        module.take(x, kernel, prepared)
        for tensor in before.values():
            release(tensor)  # pages of the checkpoint that came along with their neighbours
