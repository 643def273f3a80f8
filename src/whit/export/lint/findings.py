"""One thing that a lint has to say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from whit.spoken import of_all_blocks


@dataclass(frozen=True)
class Finding:
    """`kind`: a problem makes some engine fail or compute something else; a note is good to know."""

    kind: Literal["problem", "note"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.message}"


def collapsed(findings: Iterable[Finding]) -> list[Finding]:
    """One for modules that differ only in a block's number."""
    alike: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.kind, of_all_blocks(finding.where), of_all_blocks(finding.message))
        alike.setdefault(key, []).append(finding)
    result = []
    for (_, where, _), group in alike.items():
        first = group[0]
        many = Finding(first.kind, f"{where} ({len(group)} modules)", first.message)
        result.append(first if len(group) == 1 else many)
    return result
