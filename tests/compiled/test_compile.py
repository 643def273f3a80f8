"""Which backend compiles a model."""

from __future__ import annotations

import pytest
import torch

import whit
from whit.errors import UnsupportedModelError

from tiny_models import tiny_model


def test_a_device_without_a_backend_is_said_and_the_model_stays():
    model = tiny_model("llama").to("meta")
    with pytest.warns(UserWarning, match="is on meta, for which there is no compiled decoding; it runs as before"):
        assert whit.compile(model) is model
    with pytest.raises(UnsupportedModelError, match="is on meta"):
        whit.compile(model, strict=True)


def test_a_model_on_two_devices_is_refused():
    model = tiny_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="lies on cpu, meta; it must lie on one"):
        whit.compile(model, strict=True)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Identity is not a transformers model"):
        whit.compile(torch.nn.Identity(), strict=True)
    empty = torch.nn.Identity()
    empty.config = None
    with pytest.raises(UnsupportedModelError, match="lies on no device"):
        whit.compile(empty, strict=True)
