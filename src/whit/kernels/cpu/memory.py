"""Memory that is fast to stream: read through pages of 2 MiB, twice the speed of pages of 4 KiB and more.

Linux gives such pages at once to fresh memory that asks for them (madvise); what a file or malloc filled keeps its own.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE = 1 << 21


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy in huge pages; the tensor itself where it is contiguous and a copy would not help.

    Only whole huge pages are asked for, so that no memory is spent beyond the tensor's own size.
    """
    contiguous = tensor.contiguous()
    size = contiguous.numel() * contiguous.element_size()
    if size < 2 * HUGE or not hasattr(mmap, "MADV_HUGEPAGE") or not hasattr(mmap.mmap, "madvise"):
        return contiguous
    # Private: shared memory, mmap's default, takes huge pages only where a further setting allows it.
    area = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(area, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE
    try:
        area.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE * HUGE)
    except OSError:  # a kernel without them
        return contiguous
    moved = raw[start : start + size].view(contiguous.dtype).reshape(contiguous.shape)
    return moved.copy_(contiguous)
