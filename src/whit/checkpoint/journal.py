"""The lines of a journal: JSON, each with the CRC-32 of its own text, so that a damaged line is known for one."""

from __future__ import annotations

import json
import os
from typing import Any
from zlib import crc32

SUM = "crc32"


def append(descriptor: int, line: dict[str, Any]) -> None:
    """Write a line, and return once it is on the disk."""
    rest = (json.dumps({**line, SUM: _sum(line)}) + "\n").encode()
    while rest:  # a disk that fills up takes a part, and says so when it is asked again
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def parse(content: bytes) -> list[dict[str, Any] | None]:
    """The lines of a journal, None for each that is not as it was written."""
    return [_parsed(line) for line in content.split(b"\n")[:-1]]


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        return line if line.pop(SUM) == _sum(line) else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _sum(line: dict[str, Any]) -> int:
    return crc32(json.dumps(line).encode())
