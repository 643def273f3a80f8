"""What is wrong, or odd, with an ONNX graph of quantized products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from whit.checkpoint.onnx import OnnxFile
from whit.checkpoint.reader import read_json
from whit.errors import WhitError
from whit.export.foreign import ForeignSource
from whit.export.lint.engines import engine_findings
from whit.export.lint.findings import Finding, collapsed
from whit.export.lint.params import scale_findings
from whit.export.readers.base import Packed, sentences
from whit.export.readers.onnx import QUANTIZED, packed_matrices, read_onnx_model
from whit.model.skeleton import load_skeleton
from whit.model.source import COMPUTED


def lint_onnx(path: Path, trust_remote_code: bool = False) -> list[Finding]:
    """Findings about a graph and its weights: problems first, then notes. Reads scales and zero points, no codes."""
    findings: list[Finding] = []
    packed: dict[str, Packed] = {}
    try:
        file, config = OnnxFile(path), read_json(path.parent / "config.json")
    except WhitError as error:
        return [Finding("problem", path.name, str(error).removeprefix(f"{path}: "))]
    for node in (node for node in file.nodes if node.op in QUANTIZED):
        try:
            with sentences(node.name):
                found = packed_matrices(file, node, config)
        except WhitError as error:
            findings.append(Finding("problem", node.name, str(error).removeprefix(f"{node.name}: ")))
            continue
        packed |= found
        item = next(iter(found.values()))
        # negative ones are not news to these kernels: ONNX Runtime's own quantizer writes them
        findings += [finding for finding in scale_findings(file, item.keys[1]) if finding.kind == "problem"]
        if item.note is not None:
            findings.append(Finding("note", node.name, item.note))
    file.close()
    findings += engine_findings("onnx", {}, packed)
    if not any(finding.kind == "problem" for finding in findings):
        findings += _accounted(path, trust_remote_code)
    return sorted(collapsed(findings), key=lambda finding: finding.kind != "problem")


def _accounted(path: Path, trust_remote_code: bool) -> Iterator[Finding]:
    """Parameters that the model lacks or the graph does."""
    try:
        source = ForeignSource(load_skeleton(path.parent, trust_remote_code), read_onnx_model(path))
    except WhitError as error:
        for line in str(error).splitlines():
            yield Finding("problem", "model", line.removeprefix(f"{path.parent}: "))
        return
    for name, reason in source.dropped.items():
        if name in source.checkpoint and reason != COMPUTED:
            yield Finding("problem", name, f"is in the file and {reason}; nothing accounts for it; drop it")
    source.checkpoint.close()
