"""The model that tests of training begin with; none of them writes into its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import save_tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qat") / "model", "llama-tied", torch.bfloat16)
