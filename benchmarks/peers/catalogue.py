"""What is compared: the rows, the peers, and the order in which their runs are done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """An integer format that all peers are asked for; `group_size` 0 is one scale per row of a matrix."""

    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{where}{'' if self.symmetric else '-asym'}"


# The most telling first: a run that is cut short has learnt the most.
ROWS = (
    Row(4, 64, True), Row(3, 64, True), Row(2, 32, False), Row(4, 64, False), Row(3, 32, True), Row(2, 64, False),
    Row(3, 64, False), Row(4, 0, True), Row(2, 32, True), Row(3, 32, False), Row(4, 0, False), Row(2, 64, True),
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A quantizer: the module in `adapters/` that drives it, the environment it is installed in, its options."""

    adapter: str
    environment: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_tokens: bool = True  # without, all seeds are one


BEST_START = {"name": "gptq", "act_order": True, "refit": True, "sweeps": 2}
# Everything at its own defaults, unless the name says otherwise.
PEERS: Mapping[str, Peer] = {
    "whit-refine": Peer("with_whit", options={"name": "refine"}),
    "whit-gptq": Peer("with_whit", options={"name": "gptq"}),
    "whit-awq": Peer("with_whit", options={"name": "awq"}),
    "gptqmodel": Peer("with_gptqmodel", "gptqmodel"),
    "llmcompressor-gptq": Peer("with_llmcompressor", "llmcompressor", {"method": "gptq"}),
    "llmcompressor-awq": Peer("with_llmcompressor", "llmcompressor", {"method": "awq", "batch_size": 16}),  # 1: 9 min
    "autoround": Peer("with_autoround", "autoround", {"iters": 200}),
    "hqq": Peer("with_hqq", "hqq", needs_tokens=False),
    "whit-gptq-refit": Peer("with_whit", options={"name": "gptq", "refit": True, "sweeps": 1}),
    "whit-gptq-order": Peer("with_whit", options={"name": "gptq", "act_order": True}),
    "whit-gptq-all": Peer("with_whit", options=BEST_START),
    "whit-gptaq": Peer("with_whit", options={"name": "gptq", "refit": True, "sweeps": 1, "asymmetric": 0.25}),
    "whit-awq-gptq": Peer(
        "with_whit", options={"name": "gptq", "refit": True, "sweeps": 1, "transform": {"name": "awq"}}
    ),
    "whit-awq-refine": Peer("with_whit", options={"name": "refine", "transform": {"name": "awq"}}),
    "whit-refine-f16": Peer("with_whit", options={"name": "refine", "suffix": "-f16"}),
    "whit-refine-order": Peer("with_whit", options={"name": "refine", "start": BEST_START}),
    "whit-refine-800": Peer("with_whit", options={"name": "refine", "steps": 800}),
    "whit-rtn": Peer("with_whit", options={"name": "rtn"}, needs_tokens=False),
    "whit-hqq": Peer("with_whit", options={"name": "hqq"}, needs_tokens=False),
    "autoround-20": Peer("with_autoround", "autoround", {"iters": 20}),
}
DEFAULT_PEERS = tuple(PEERS)[:8]


@dataclass(frozen=True)
class Task:
    """One run: a row, a peer, a seed of the calibration tokens."""

    row: Row
    peer: str
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.peer}.{self.row}.seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """For a child process."""
        peer = PEERS[self.peer]
        return {"row": asdict(self.row), "adapter": peer.adapter, "options": dict(peer.options), "seed": self.seed}


def tasks(rows: Sequence[Row], peers: Sequence[str], seeds: Iterable[int]) -> Iterator[Task]:
    """The first seed of all rows, then the others; a peer that sees no tokens has one run a row."""
    seeds = list(seeds)
    for seed in seeds:
        for row in rows:
            for peer in peers:
                if PEERS[peer].needs_tokens or seed == seeds[0]:
                    yield Task(row, peer, seed)


def parse_rows(text: str) -> list[Row]:
    """`all`, or names such as int4-g64,int3-g64-asym."""
    known = {str(row): row for row in ROWS}
    return list(ROWS) if text == "all" else [known[name] for name in text.split(",")]
