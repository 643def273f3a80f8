"""What flows between the blocks: where it is kept, in memory or in mapped files, and how much of it is run at once."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whit.errors import OutputError

INPUT_MEMORY = 6 << 30  # bytes of block inputs that stay in memory unless another number is given
AT_ONCE = 64 << 20  # bytes of block inputs that a GPU is given at once: a small block would only wait for Python


@dataclass(frozen=True)
class Storage:
    """Room for block inputs: memory where all copies together take at most `memory` bytes, else files in `folder`.

    On a GPU the memory is pinned, from which it copies at full speed. No result depends on where inputs lie.
    """

    folder: Path
    memory: int = INPUT_MEMORY

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, copies: int) -> list[Tensor]:
        """So many tensors of this shape for work on `device`; OutputError where the disk has no room for the files."""
        count = torch.Size(shape).numel()
        if copies * count * dtype.itemsize <= self.memory:
            pinned = device.type == "cuda"
            return [torch.empty(shape, dtype=dtype, pin_memory=pinned) for _ in range(copies)]
        self._check_room(copies * count * dtype.itemsize)
        return [self._mapped(number, shape, dtype) for number in range(copies)]

    def _mapped(self, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of a file that loses its name at once: it goes with the tensor, or with the process."""
        file, count = self.folder / f"block-inputs-{number}.tmp", torch.Size(shape).numel()
        try:
            return torch.from_file(str(file), shared=True, size=count, dtype=dtype).reshape(shape)
        finally:
            file.unlink(missing_ok=True)

    def _check_room(self, needed: int) -> None:
        """A mapped file on a full disk would end the process without a word."""
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self.folder}: block inputs of more than {self.memory:,} bytes go to the disk, here {needed:,}, and "
                f"{free:,} are free; make room, or give them more memory with --input-memory"
            )


def at_once(inputs: Tensor, device: torch.device) -> int:
    """How many samples of block inputs (samples, context, hidden) are run at once where nothing is kept of them."""
    if device.type == "cpu" or not len(inputs):
        return 1
    return max(AT_ONCE // inputs[0].nbytes, 1)
