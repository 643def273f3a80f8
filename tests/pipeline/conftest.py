"""Models and runs that tests of the pipeline share; none of them writes into these folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import save_tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16 and several shards."""
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama", torch.bfloat16, "60KB")
