"""The coverage account: what became of every parameter, as whit.json beside the weights holds it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from whit.checkpoint.files import write_whole
from whit.checkpoint.places import record_of
from whit.checkpoint.reader import read_json
from whit.errors import CheckpointError

Status = Literal["quantized", "kept", "tied", "dropped"]


@dataclass(frozen=True)
class Entry:
    """What became of one parameter.

    - `reason`: why it was kept, or, of a quantized one, in what it differs from the recipe's method.
    - `relative_error`: ||W - W^|| / ||W||. With calibration, `proxy_loss`: tr(dW H dW^T) / tr(W H W^T).
    - `tokens`: how many each expert saw. `activations`: how the inputs of its linear are quantized, where they are.
    """

    name: str
    status: Status
    format: str | None = None
    reason: str | None = None
    bits_per_weight: float | None = None
    relative_error: float | None = None
    proxy_loss: float | None = None
    tokens: tuple[int, ...] | None = None
    activations: str | None = None


CARRIED = "its codes as they were"


@dataclass(frozen=True)
class Account:
    """What was done to a model: the content of whit.json.

    - `bits_per_weight`: every byte of the weight files over every parameter. `files`: their SHA-256, by name.
    - `source`: the model's name, and the fingerprint by which a run knows its own result again. If whit wrote that
      model too, `made` says how: version, recipe, seed, calibration, training and its own `source`.
    - `export`: the kind of file. `decoded`: how many parameters a decoder that shares no code with the writer read
      back, and the largest relative error from what was meant.
    - `training`: the options of a model that was trained end to end.
    - `budget`: if a size was asked for, how the recipe was found and what it was expected to lose. `measured`: what the
      written model lost, where that was measured.
    """

    version: str
    recipe: Mapping[str, Any] | None
    seed: int
    bits_per_weight: float
    size_bytes: int
    parameters: tuple[Entry, ...]
    seconds: float
    peak_memory_bytes: int
    libraries: Mapping[str, str]
    source: Mapping[str, Any]
    files: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    export: str = "whit"
    decoded: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    budget: Mapping[str, Any] | None = None
    measured: Mapping[str, Any] | None = None

    @property
    def carried(self) -> bool:
        """Whether all codes are those of the model that it was made from."""
        reasons = {entry.reason for entry in self.parameters if entry.status == "quantized"}
        return reasons == {CARRIED}

    def counts(self) -> dict[str, int]:
        """Number of parameters of each status."""
        return dict(Counter(entry.status for entry in self.parameters))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in whit.json."""
        return asdict(self)


def load_account(out: Path) -> Account:
    """The account of a folder, or of a single file, that whit wrote."""
    raw = read_json(record_of(out))
    try:
        parameters = tuple(Entry(**entry) for entry in raw.pop("parameters"))
        return Account(parameters=parameters, **raw)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{record_of(out)}: not an account of whit ({error}); it must be as whit wrote it; quantize again"
        ) from None


def add_measured(out: Path, measured: Mapping[str, Any]) -> None:
    """Put what a written model was found to lose into its account, in one step."""
    write_whole(record_of(out), account_bytes(replace(load_account(out), measured=measured)))


def account_bytes(account: Account) -> bytes:
    """The content of whit.json."""
    return (json.dumps(account.to_json(), indent=1, allow_nan=False) + "\n").encode()
