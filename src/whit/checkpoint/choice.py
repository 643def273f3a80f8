"""Which .gguf file of several is meant: `repo:Q4_K_M`, as users of llama.cpp and ollama type it.

Files are told apart by the end of their names, where their makers write the type: `Model-7B-Q4_K_M.gguf`,
`BF16/model-BF16-00001-of-00003.gguf`. A file in parts is named by its first one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from whit.errors import CheckpointError

TYPE = re.compile(r"(?:(?:UD|i1)-)?(?:I?Q\d\w*|TQ\d_\d|BF16|FP?16|FP?32|(?:MX|NV)FP4\w*)$", re.IGNORECASE)
PART = re.compile(r"-(\d{5})-of-(\d{5})$")
BESIDE = ("mmproj", "imatrix")  # what sees, and what weighs columns: no models
SHOWN = 12  # choices that a sentence names


def choose(files: Iterable[str], wanted: str | None, place: str) -> tuple[str, ...]:
    """The file of `place` that `wanted` (a type such as "Q4_K_M", or a file's name) means, all its parts in order.

    Without `wanted`, the only one of files that hold one. CheckpointError where none or several are meant.
    """
    models = models_of(files)
    if not models:
        raise CheckpointError(
            f"{place}:{wanted}: {place} holds no .gguf file of a model; one must be there; drop :{wanted}"
        )
    if wanted is None:
        found = list(models)
    else:
        asked = wanted.casefold().removesuffix(".gguf")
        ends = re.compile(rf"(?:^|[-._/]){re.escape(asked)}(?:{PART.pattern[:-1]})?$")
        found = [name for name in models if _type(name).casefold() == asked]
        found = found or [name for name in models if ends.search(name.casefold().removesuffix(".gguf"))]
    if len(found) == 1:
        return models[found[0]]
    said = _choices(place, found or list(models))
    if wanted is None:
        raise CheckpointError(f"{place}: holds {len(models)} .gguf files; one must be chosen; name {said}")
    count = f"{len(found)} files" if found else "no file"
    raise CheckpointError(f"{place}:{wanted}: {count} there of that type; one must be meant; name {said}")


def parts_of(name: str) -> tuple[str, ...]:
    """The names of all parts of a file, by that of one; the name itself where it is no part."""
    stem = name.removesuffix(".gguf")
    found = PART.search(stem)
    if found is None:
        return (name,)
    return tuple(f"{stem[: found.start()]}-{n + 1:05}-of-{found[2]}.gguf" for n in range(int(found[2])))


def models_of(files: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """All models among the files: the first part of each, and all of them."""
    found = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.suffix == ".gguf" and not path.name.casefold().startswith(BESIDE):
            parts = parts_of(name)
            found[parts[0]] = parts
    return found


def _stem(name: str) -> str:
    return PART.sub("", PurePosixPath(name).name.removesuffix(".gguf"))


def _type(name: str) -> str:
    """The type at the end of a name; all of the name where there is none."""
    stem = _stem(name)
    starts = [found.end() for found in re.finditer(r"^|[-._]", stem)]
    return next((stem[start:] for start in starts if TYPE.fullmatch(stem, start)), stem)


def _choices(place: str, names: list[str]) -> str:
    """How each file is named, by its type where no other file has it."""
    types = [_type(name) for name in names]
    unique = [t if types.count(t) == 1 else _stem(n) for t, n in zip(types, names, strict=True)]
    said = [f"{place}:{each}" for each in unique[:SHOWN]]
    return " or ".join(said) + (f", or one of {len(unique) - SHOWN} more" if len(unique) > SHOWN else "")
