"""What is wrong, or odd, with another program's quantized checkpoint, before somebody serves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from whit.checkpoint.header import Entry
from whit.checkpoint.reader import Checkpoint
from whit.errors import WhitError
from whit.export.foreign import ForeignSource
from whit.export.lint.engines import engine_findings
from whit.export.lint.findings import Finding, collapsed
from whit.export.lint.onnx import lint_onnx
from whit.export.lint.params import param_findings
from whit.export.readers import READERS, quant_method, read_foreign
from whit.export.readers.base import Packed, sentences
from whit.export.readers.mxfp4 import BLOCKS, SCALES
from whit.export.readers.refused import REFUSED
from whit.model.skeleton import load_skeleton
from whit.model.source import AUXILIARY, COMPUTED
from whit.model.targets import find_targets

MARKS = (
    "qweight", "weight_packed", "SCB", "weight.absmax", "weight_scale", "scales", "biases", "W_q", "weight_scale_inv",
    "trellis", "_weight_qdata", "weight:qdata", "weight._data", "weight._data._data", "weight_scales",
)  # fmt: skip

TOLD_BY_TENSORS = ("torchao", "quanto", "hqq")  # which say of each linear whether it is quantized; no list does


def lint(
    folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint, trust_remote_code: bool = False
) -> list[Finding]:
    """Findings about a folder's quantization: problems first, then notes. Reads scales and zero points, no codes."""
    method = quant_method(config)
    reader = next((reader for name, reader in READERS if name == method), None)
    said = config.get("quantization_config") or config.get("quantization")
    findings = list(_tied_twice(config, checkpoint))
    if reader is None or not isinstance(said, dict):
        return [*findings, *_unclaimed(method, checkpoint)]
    packed: dict[str, Packed] = {}
    for module in _modules(checkpoint):
        try:
            with sentences(module):
                packed |= reader(said, Only(checkpoint, module))
        except WhitError as error:
            findings.append(Finding("problem", module, str(error).removeprefix(f"{checkpoint.folder}: ")))
    for name, item in packed.items():
        module = name.removesuffix(".weight")
        try:
            with sentences(module):
                findings += param_findings(str(method), said, checkpoint, module, item)
        except WhitError as error:
            findings.append(Finding("problem", module, str(error)))
    findings += engine_findings(str(method), said, packed)
    findings += _accounted(folder, config, checkpoint, packed, trust_remote_code)
    return sorted(collapsed(findings), key=lambda finding: finding.kind != "problem")


class Only(Checkpoint):
    """The tensors of one module, or of one stack of experts, so that what is wrong with it does not hide the others."""

    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        self.folder, self.shards, self.metadata = checkpoint.folder, checkpoint.shards, checkpoint.metadata
        self._descriptors = checkpoint._descriptors
        self.entries: dict[str, Entry] = {
            name: entry
            for name, entry in checkpoint.entries.items()
            if name.startswith(f"{module}.") or name in (module + BLOCKS, module + SCALES)
        }


def _modules(checkpoint: Checkpoint) -> list[str]:
    """Names of modules that hold quantized tensors, in file order."""
    found: dict[str, None] = {}
    for name in checkpoint:
        for mark in MARKS:
            if name.endswith(f".{mark}"):
                found[name.removesuffix(f".{mark}")] = None
        if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in checkpoint:
            found[name.removesuffix(BLOCKS)] = None
    return list(found)


def _unclaimed(method: str | None, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Quantized tensors that config.json does not speak of."""
    modules = _modules(checkpoint)
    if method is None and modules:
        yield Finding(
            "problem", modules[0], f"has quantized tensors, as {len(modules)} modules do; config.json must have a "
            "quantization_config that says how; every engine takes this for 16-bit weights and fails",
        )  # fmt: skip
    elif method is not None and method != "whit":
        why = f": {REFUSED[method]}" if method in REFUSED else ""
        yield Finding("note", "config.json", f"says quantized by {method}, which whit does not read{why}")


def _tied_twice(config: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[Finding]:
    heads = [
        name for name in checkpoint if name.endswith(("lm_head.weight", "lm_head.qweight", "lm_head.weight_packed"))
    ]
    embeddings = [name for name in checkpoint if name.endswith(("embed_tokens.weight", "wte.weight"))]
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    if not (tied and heads and embeddings):
        return
    head, embedding = heads[0], embeddings[0]
    same = (
        checkpoint.entries[head].spec == checkpoint.entries[embedding].spec
        and torch.equal(checkpoint[head].view(torch.uint8), checkpoint[embedding].view(torch.uint8))
    )  # fmt: skip
    extra = checkpoint.entries[head].spec.nbytes
    if same:
        yield Finding("note", head, f"is {embedding} again, {extra:,} bytes; a tied head is stored once; drop it")
    else:
        yield Finding(
            "problem", head, f"is stored and differs from {embedding}, though tie_word_embeddings is true; engines use "
            "one or the other; set tie_word_embeddings to false, or drop the head",
        )  # fmt: skip


def _accounted(
    folder: Path,
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    packed: Mapping[str, Packed],
    trust_remote_code: bool,
) -> Iterator[Finding]:
    """Parameters that the model lacks or the file does, and linears that are neither quantized nor excepted."""
    try:
        skeleton = load_skeleton(folder, trust_remote_code)
        source = ForeignSource(skeleton, read_foreign(config, checkpoint))
    except WhitError as error:
        for line in str(error).splitlines():
            yield Finding("problem", "model", line.removeprefix(f"{folder}: "))
        return
    for name, reason in source.dropped.items():
        if reason == AUXILIARY:
            yield Finding("note", name, f"is {reason}, and whit leaves it out of what it writes")
        elif name in checkpoint and reason != COMPUTED:
            yield Finding("problem", name, f"is in the file and {reason}; nothing accounts for it; drop it")
    said = config.get("quantization_config") or config.get("quantization") or {}
    if said.get("quant_method") in TOLD_BY_TENSORS and "quant_config" not in said:
        return
    excepted = _excepted(said)
    for target in find_targets(skeleton):
        keys = source.origins[target.parameter].keys if target.parameter in source.origins else ()
        if target.kept_by_default or target.kind == "embedding" or not keys or any(key in packed for key in keys):
            continue
        if not any(fnmatchcase(name, f"*{part}*") for part in excepted for name in (target.holder, keys[0])):
            yield Finding(
                "problem", target.holder, "has 16-bit weights and no exception in config.json; engines expect a "
                "quantized linear there; name it in the list of modules that are not converted",
            )  # fmt: skip


def _excepted(said: Mapping[str, Any]) -> list[str]:
    """What the various lists of exceptions name, as pieces of module names."""
    names: list[str] = []
    for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "skip_modules"):
        listed = said.get(key)
        names += [str(name) for name in listed] if isinstance(listed, list) else []
    dynamic = said.get("dynamic")
    for pattern in dynamic if isinstance(dynamic, dict) else ():
        if str(pattern).startswith("-:"):
            names.append(str(pattern)[2:].strip("^$").replace("\\", ""))
    extra = said.get("extra_config")  # AutoRound's, by name or regex
    for name, options in extra.items() if isinstance(extra, dict) else ():
        if isinstance(options, dict) and isinstance(options.get("bits"), int) and options["bits"] >= 16:
            names.append(str(name).strip("^$").replace("\\", ""))
    names += [key for key, value in said.items() if value is False and "." in key]
    return [name.removeprefix("re:").strip(".*") for name in names if name]


__all__ = ["Finding", "lint", "lint_onnx"]
