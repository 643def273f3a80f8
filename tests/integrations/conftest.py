"""What tests of the transformers integration share; transformers' progress bars would drown the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tiny_models import save_tiny

transformers.logging.disable_progress_bar()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny checkpoint, the test's own."""
    return save_tiny(tmp_path / "llama", "llama")
