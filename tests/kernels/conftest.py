"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def threads() -> Iterator[None]:
    """A test may change the number of threads; afterwards it is as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
