"""What can be put side by side: the original, a method and a format, an existing checkpoint, a peer library's format.

bf16                        the original itself
nf4-dq, gptq:int4-g64       whit's own (round to nearest where no method is named)
recipe.toml                 a recipe in a file
bitsandbytes:nf4            an installed peer, by its name in report/peers.py
path/to/folder, model.gguf  a checkpoint of any format that transformers (with whit) reads
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whit.errors import RecipeError
from whit.recipe import Recipe, parse_spec, split_list
from whit.report.comparison import Candidate, folder_name
from whit.report.peers import find_peer

Kind = Literal["original", "whit", "peer", "checkpoint"]


@dataclass(frozen=True)
class Entrant:
    """One candidate of a comparison. `method` is a method of whit's or a library's name; empty for a checkpoint."""

    label: str
    kind: Kind
    method: str = ""
    format: str = ""

    @property
    def recipe(self) -> Recipe:
        """Of one of whit's own."""
        if self.format.endswith(".toml"):
            return Recipe.load(self.format)
        return Recipe(self.method, [("*", self.format)])

    @property
    def folder(self) -> str:
        """A name for its output that any file system takes."""
        return folder_name(self.label)


def parse_entrant(text: str) -> Entrant:
    """RecipeError or FormatError, one sentence, for what is none of the four."""
    text = text.strip()
    if find_peer(text) is not None:
        library, _, variant = text.partition(":")
        return Entrant(text, "peer", library, variant)
    path = Path(text).expanduser()
    if path.suffix == ".toml":
        return Entrant(path.stem, "whit", Recipe.load(path).method.name, str(path))
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return Entrant(path.name, "checkpoint", "", str(path))
    if "/" in text:
        raise RecipeError(f"candidate {text!r}: no such folder; a checkpoint must be there; check the path")
    found = Candidate.parse(text)
    if found.is_original:
        return Entrant("bf16", "original", "", "bf16")
    short = text.rpartition(":")[2]
    label = short if parse_spec(short) == found.format else found.format
    return Entrant(label if found.method == "rtn" else f"{found.method}:{label}", "whit", found.method, found.format)


def parse_entrants(text: str) -> tuple[Entrant, ...]:
    """A list with commas; the original comes first whether it is named or not, and nothing comes twice."""
    found = [parse_entrant("bf16"), *(parse_entrant(part) for part in split_list(text) if part.strip())]
    return tuple({entrant.label: entrant for entrant in found}.values())
