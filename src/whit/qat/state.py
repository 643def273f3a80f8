"""What a run of training needs to go on bit for bit: masters, the optimizer's averages, and the number of the step.

One safetensors file, written whole or not at all. Its metadata holds the run's fingerprint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whit.checkpoint.files import write_tensors
from whit.errors import OutputError

AVERAGES = ("exp_avg", "exp_avg_sq", "step")


class StateFile:
    """The state at `path` of the run with this fingerprint, saved every `every` seconds."""

    def __init__(self, path: Path, fingerprint: str, every: float = 60.0, restart: bool = False) -> None:
        self.path, self.fingerprint, self.every = path, fingerprint, every
        self._last = time.monotonic()
        if restart:
            path.unlink(missing_ok=True)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= self.every

    def save(
        self, step: int, seconds: float, variables: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Everything after `step` steps."""
        tensors = {f"value/{name}": value for name, value in variables.items()}
        for name, value in variables.items():
            for key in AVERAGES:
                if (found := optimizer.state.get(value, {}).get(key)) is not None:
                    tensors[f"{key}/{name}"] = found
        metadata = {"fingerprint": self.fingerprint, "step": json.dumps(step), "seconds": json.dumps(seconds)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
        self._last = time.monotonic()

    def load(self, variables: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Puts everything where it was; the steps and seconds that are done, 0 where there is no file.

        OutputError where the file is another run's.
        """
        if not self.path.exists():
            return 0, 0.0
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    raise OutputError(
                        f"{self.path}: the state of a run with another model, text or options; "
                        "it must be finished with the same ones; or pass --restart to begin again"
                    )
                names = set(file.keys())
                for name, value in variables.items():
                    value.copy_(file.get_tensor(f"value/{name}"))
                    if any(f"{key}/{name}" in names for key in AVERAGES):  # then all of them are
                        for key in AVERAGES:
                            where = value.device if key != "step" or _fused(optimizer) else torch.device("cpu")
                            optimizer.state[value][key] = file.get_tensor(f"{key}/{name}").to(where)
                return int(json.loads(metadata["step"])), float(json.loads(metadata["seconds"]))
        except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
            raise OutputError(
                f"{self.path}: not a state of training ({error}); pass --restart to begin again"
            ) from None

    def remove(self) -> None:
        """The run is finished."""
        self.path.unlink(missing_ok=True)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))
