"""The model that budgets are met for; none of the tests writes into its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("budget") / "model", "llama")
