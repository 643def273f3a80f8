"""A model that tests of compiled decoding share."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

import whit

from tiny_models import tiny_model


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny model with its own `generate`, as `plain`, beside the compiled one."""
    model = tiny_model("llama")
    whit.compile(model, strict=True)
    model.plain = model.generate.uncompiled
    return model
