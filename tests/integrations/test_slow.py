"""Packed weights on a CPU whose kernels are not there: said once, in a sentence, and right all the same."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf

import whit
from whit.cli.quiet import warnings_in_a_line
from whit.errors import WhitWarning
from whit.integrations import slow
from whit.kernels.cpu import library

from tiny_models import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny(tmp_path_factory.mktemp("slow") / "model", "llama", torch.bfloat16)
    whit.quantize(folder, folder.parent / "packed", whit.Recipe(rules=[("*", "int4-g32")]))
    return str(folder.parent / "packed")


def test_missing_kernels_are_said_where_a_model_is_loaded(saved: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slow, "library", lambda: "not built; make builds it")
    with pytest.warns(WhitWarning, match=r"CPU kernels: not built; make builds it; until then torch decodes"):
        hf.AutoModelForCausalLM.from_pretrained(saved)


def test_nothing_is_said_where_they_are_there_or_nothing_is_packed(saved: str, monkeypatch: pytest.MonkeyPatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", WhitWarning)
        if not isinstance(library(), str):
            hf.AutoModelForCausalLM.from_pretrained(saved)
        monkeypatch.setattr(slow, "library", lambda: "not built")
        slow.warn_of_slow_products(torch.nn.Linear(2, 2))


def test_the_command_line_prints_the_sentence_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: others.append(str(message)))
        warnings_in_a_line()
        warnings_in_a_line()  # once is enough
        warnings.warn("CPU kernels: not built", WhitWarning, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "CPU kernels: not built\n"
    assert others == ["somebody else's"]
