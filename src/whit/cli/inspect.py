"""`whit inspect`: what a model folder holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from whit.checkpoint.header import NAMES, count_parameters
from whit.checkpoint.hub import at_revision, resolve_model
from whit.checkpoint.onnx import OnnxFile, onnx_graph
from whit.checkpoint.places import RECORD, record_of
from whit.checkpoint.reader import Checkpoint, read_config
from whit.checkpoint.writer import file_sha256
from whit.cli.console import on_screen, print_json, say
from whit.cli.inspect_gguf import gguf_facts
from whit.cli.options import MODEL_HELP, AsJson, Revision, TrustRemoteCode
from whit.cli.quiet import quiet_transformers
from whit.cli.shown import counted, reasons, show_totals
from whit.errors import CheckpointError, OutputError
from whit.export.lint import Finding, lint, lint_onnx
from whit.export.readers import quant_method
from whit.export.whit import QUANT_METHOD
from whit.extras import missing
from whit.pipeline.coverage import Account, load_account
from whit.spoken import size, took


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    verify: Annotated[bool, typer.Option("--verify", help="Check the weight files against their SHA-256.")] = False,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw pictures of the model into DIR.")] = None,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    model = at_revision(model, revision)
    place = resolve_model(model)
    if plots is not None:
        draw(place, plots)
    if place.is_file():
        inspect_gguf(place, verify, as_json)
    else:
        inspect_folder(place, verify, as_json, trust_remote_code)


def inspect_gguf(file: Path, verify: bool, as_json: bool) -> None:
    """What a .gguf file holds."""
    account = file if record_of(file).is_file() else file.parent  # where OUT was a folder, it lies beside the file
    if verify and file_sha256(file) not in load_account(account).files.values():
        raise CheckpointError(f"{file}: changed since it was written; SHA-256 must be as in its account; copy it again")
    facts = gguf_facts(file)
    print_json(facts) if as_json else show_plain(facts)


def inspect_folder(folder: Path, verify: bool, as_json: bool, trust_remote_code: bool) -> None:
    """What a model folder holds: its account, if whit wrote it, or its own figures; and what is wrong with it."""
    graph = onnx_graph(folder)
    is_ours = (folder / RECORD).is_file()
    if verify and not is_ours:
        raise CheckpointError(f"{folder}: no {RECORD} with checksums; --verify needs it; only whit's results have one")
    with closing(Checkpoint(folder) if graph is None else OnnxFile(graph)) as checkpoint:  # checks every header
        account = load_account(folder) if is_ours else None
        if account is not None and verify:
            verify_files(folder, account)
        facts = plain_facts(folder, checkpoint) if account is None else account.to_json()
        findings = findings_of(folder, checkpoint, trust_remote_code)
    if as_json:
        print_json({**facts, "findings": [asdict(finding) for finding in findings]})
        return
    show_plain(facts) if account is None else show_account(account, verify)
    show_findings(findings)


def findings_of(folder: Path, checkpoint: Checkpoint | OnnxFile, trust_remote_code: bool = False) -> list[Finding]:
    """What is wrong or odd with a folder that another program quantized, or could read."""
    if isinstance(checkpoint, OnnxFile):
        return lint_onnx(checkpoint.path, trust_remote_code)
    config = read_config(folder)
    return [] if quant_method(config) == QUANT_METHOD else lint(folder, config, checkpoint, trust_remote_code)


def show_findings(findings: list[Finding]) -> None:
    """A line for each, problems first."""
    screen = on_screen()
    for finding in findings:
        say(str(finding), screen)


def draw(folder: Path, out: Path) -> None:
    """The pictures that this checkpoint has; their names on standard error."""
    if find_spec("matplotlib") is None:
        raise OutputError(missing("report", "plots"))
    from whit.report.pictures import draw_checkpoint

    quiet_transformers()
    for file in draw_checkpoint(str(folder), folder, out):
        say(str(file))


def verify_files(folder: Path, account: Account) -> None:
    """CheckpointError naming every weight file that is not as it was written."""
    wrong = [
        name
        for name, digest in account.files.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != digest
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: {', '.join(wrong)} changed since it was written; SHA-256 must be as in {RECORD}; "
            "copy or quantize again"
        )


def _method(recipe: Mapping[str, Any] | None, carried: bool) -> str:
    if recipe is None:
        return "no quantization"
    return "codes carried over" if carried else str(recipe["method"]["name"])


def _made(name: str, made: Mapping[str, Any]) -> str:
    """How an earlier model of a chain was quantized."""
    method = _method(made.get("recipe"), made["carried"])
    text = made.get("calibration")
    seen = f", calibrated on {text['tokens']:,} tokens (SHA-256 {text['sha256'][:12]}...)" if text else ""
    return f"{name} from {made['source']['model']} by whit {made['version']}, {method}, seed {made['seed']}{seen}"


def show_account(account: Account, verified: bool) -> None:
    """The account as tables and lines."""
    screen = on_screen()
    show_totals(screen, account)
    for line in reasons(account.parameters):
        say(line, screen)
    libraries = ", ".join(f"{name} {version}" for name, version in account.libraries.items())
    method = _method(account.recipe, account.carried)
    say(
        f"from {account.source['model']} by whit {account.version}, {method}, seed {account.seed}, "
        f"in {took(account.seconds)} with {size(account.peak_memory_bytes)} of memory ({libraries})",
        screen,
    )
    source = account.source
    made = source.get("made")
    while made is not None:
        say(_made(str(source["model"]), made), screen)
        source = made["source"]
        made = source.get("made")
    if account.budget is not None:
        expected = f"{account.budget['expected']:.4g} {account.budget['unit']}"
        say(f"chosen for its size; expected to lose {expected}", screen)
    if account.measured is not None:
        found = account.measured
        say(
            f"measured on {found['tokens']} tokens of {found['text']}: mean KL divergence {found['kl']:.4g}, "
            f"perplexity {found['perplexity']:.4f} ({found['baseline_perplexity']:.4f})",
            screen,
        )
    if verified:
        say(f"{counted(len(account.files), 'weight file')}, all as written")


def plain_facts(folder: Path, checkpoint: Checkpoint | OnnxFile) -> dict[str, Any]:
    """What a folder without an account says of itself."""
    config = read_config(folder)
    specs = {name: entry.spec for name, entry in checkpoint.entries.items()}
    parameters = count_parameters(specs)
    size_bytes = sum(path.stat().st_size for path in checkpoint.shards)
    counts, elements, sizes = Counter[str](), Counter[str](), Counter[str]()
    for spec in specs.values():
        name = NAMES[spec.dtype]
        counts[name] += 1
        elements[name] += count_parameters({name: spec})
        sizes[name] += spec.nbytes
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return {
        "model": folder.name,
        "architectures": config.get("architectures"),
        "quant_method": "onnx" if isinstance(checkpoint, OnnxFile) else method,
        "tensors": len(specs),
        "elements": parameters,
        "size_bytes": size_bytes,
        "bits_per_element": 8 * size_bytes / max(parameters, 1),
        "dtypes": {n: {"tensors": counts[n], "elements": elements[n], "bytes": sizes[n]} for n in counts},
        "files": [path.name for path in checkpoint.shards],
    }


def show_plain(facts: dict[str, Any]) -> None:
    """The same as a table."""
    screen = on_screen()
    table = Table(
        "dtype", "tensors", "elements", "size", title=f"{facts['model']}: {', '.join(facts['architectures'] or ())}"
    )
    for name, row in facts["dtypes"].items():
        table.add_row(name, str(row["tensors"]), f"{row['elements']:,}", size(row["bytes"]))
    screen.print(table)
    method = facts["quant_method"]
    said = f"quantized by {method}" if method else "not quantized"
    tensors, files = counted(facts["tensors"], "tensor"), counted(len(facts["files"]), "file")
    say(f"{tensors} in {files}, {size(facts['size_bytes'])}, {said}", screen)
