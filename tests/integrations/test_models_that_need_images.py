"""What predicts text only beside an image."""

from __future__ import annotations

import pytest
import transformers as hf

from whit.errors import UnsupportedModelError
from whit.integrations.loading import causal_class


@pytest.mark.parametrize(
    ("architecture", "loads"),
    [
        ("BlipForConditionalGeneration", False),  # generating and evaluating were tracebacks
        ("Blip2ForConditionalGeneration", False),
        ("LlavaForConditionalGeneration", True),
    ],
)
def test_models_that_cannot_be_given_text_alone_are_refused(architecture: str, loads: bool):
    config = getattr(hf, architecture).config_class(architectures=[architecture])
    if loads:
        assert causal_class("m", config) is hf.AutoModelForImageTextToText
        return
    with pytest.raises(UnsupportedModelError, match=f"{architecture} is not a causal language model"):
        causal_class("m", config)
