"""Users of other libraries: every option of their configurations is taken, or answered with what says it here."""

import inspect
import re
from pathlib import Path

import pytest
import transformers as hf

import whit
from whit.integrations.config import FurtherOptions
from whit.integrations.elsewhere import ANSWERS

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "coming.md"
KINDS = ("BitsAndBytesConfig", "GPTQConfig", "AwqConfig", "TorchAoConfig", "HqqConfig")
OTHERS = ("QuantoConfig", "CompressedTensorsConfig", "FineGrainedFP8Config", "FbgemmFp8Config", "AutoRoundConfig")


def options(kind):
    parameters = inspect.signature(getattr(hf, kind).__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_on_the_page(kind):
    page = PAGE.read_text()
    assert [name for name in options(kind) if f"`{name}`" not in page and f"{name}=" not in page] == []


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_every_option_is_taken_or_answered(kind):
    taken = {*inspect.signature(whit.QuantizationConfig).parameters, *FurtherOptions.__annotations__}
    assert [name for name in options(kind) if name not in taken and name not in ANSWERS] == []
    for name in {*options(kind)} - taken:
        with pytest.raises(whit.WhitError, match=re.escape(f"option '{name}' does not exist; {ANSWERS[name]}")):
            whit.QuantizationConfig(**{name: 1})


def test_anothers_configuration_is_no_format():
    for given in (hf.BitsAndBytesConfig(load_in_4bit=True), {"quant_method": "bitsandbytes"}):
        with pytest.raises(whit.WhitError, match=r"load_in_4bit=True") as error:
            whit.QuantizationConfig(given)
        assert "\n" not in str(error.value)
    with pytest.raises(whit.WhitError, match="load_in_8bit=True"):
        whit.QuantizationConfig(hf.BitsAndBytesConfig(load_in_8bit=True))
    for given in (hf.AwqConfig(bits=4), {"bits": 4}):
        with pytest.raises(whit.WhitError, match="'int4-g128'"):
            whit.QuantizationConfig(given)
