"""What tests of several kinds of file share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import save_tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in bfloat16: tied embeddings, experts, Conv1D. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in ("llama-tied", "mixtral", "gpt2"):
        save_tiny(folder / architecture, architecture, torch.bfloat16)
    return folder
