"""Libraries that only some uses need: which extra of whit (`pip install 'whit[gguf]'`) brings them, and for what.

The one place that says so, beside pyproject.toml.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """`packages` as they are installed, the one that an error names first."""

    packages: tuple[str, ...]
    use: str


EXTRAS = {
    "tasks": Extra(("lm-eval",), "run tasks beyond the nine built in"),
    "report": Extra(("matplotlib", "jinja2"), "draw pictures and write pages"),
    "gguf": Extra(("gguf",), "read .gguf files"),
    "onnx": Extra(("onnx",), "read and write ONNX files"),
    "train": Extra(("peft", "matplotlib"), "train, run and measure adapters"),
    "allocation": Extra(("scipy",), "choose formats for a size or a number of bits"),
}


def missing(extra: str, where: str) -> str:
    """The sentence of an error where an extra's first package is not installed."""
    return (
        f"{where}: {EXTRAS[extra].packages[0]} is not installed; it is needed to {EXTRAS[extra].use}; {install(extra)}"
    )


def install(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install 'whit[{extra}]'"
