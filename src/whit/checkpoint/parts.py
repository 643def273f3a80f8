"""A GGUF model that lies in several files, as llama.cpp's `gguf-split` cuts it: `model-00001-of-00003.gguf`, ...

The first part has the key-values of the model; `split.count` is the number of parts, and each knows its own number,
`split.no`, from 0 on.
"""

from __future__ import annotations

from pathlib import Path

from whit.checkpoint.choice import parts_of
from whit.checkpoint.gguf import GgufHeader, GgufTensor, read_gguf
from whit.errors import CheckpointError

COUNT, NUMBER = "split.count", "split.no"


def read_gguf_parts(path: Path) -> GgufHeader:
    """The header of a model: of the file, and with the tensors of all other parts, where it is the first of several.

    CheckpointError where a part is missing, or is none of this model.
    """
    header = read_gguf(path)
    count = header.metadata.get(COUNT, 1)
    if type(count) is not int or count < 2:
        return header
    names = parts_of(path.name)
    if len(names) != count:
        raise CheckpointError(
            f"{path}: says that it is one of {count} parts; they must be named as llama.cpp does, "
            f"-00001-of-{count:05}.gguf and so on; name them so, or join them by llama-gguf-split --merge"
        )
    if path.name != names[0]:
        raise CheckpointError(f"{path}: is a part of a model; the first one stands for it; name {names[0]}")
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: of {count} parts {len(missing)} are not beside it, {missing[0]} the first; all must be; get them"
        )
    tensors: dict[str, GgufTensor] = dict(header.tensors)
    for number, name in enumerate(names[1:], 1):
        part = read_gguf(path.with_name(name))
        twice = next((tensor for tensor in part.tensors if tensor in tensors), None)
        said = (part.metadata.get(COUNT), part.metadata.get(NUMBER))
        if said != (count, number) or twice is not None:
            what = f"has {twice!r} once more" if twice is not None else f"does not say {number} of {count}"
            raise CheckpointError(f"{part.path}: {what}; it must be a part of {path.name}; get them together again")
        tensors |= part.tensors
    return GgufHeader(path, header.metadata, tensors)
