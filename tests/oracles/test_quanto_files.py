"""optimum-quanto's own tensors, saved by its own class, dequantize as whit reads them, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from whit.pipeline.job import open_source

from tiny_models import save_tiny, tiny_config

quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")

KINDS: dict[str, tuple[dict[str, str], str | None, str | None]] = {
    "int8": ({"weights": "qint8"}, "int8-channel", None),
    "int4": ({"weights": "qint4"}, "int4-channel-offset-f32", None),
    "int2": ({"weights": "qint2"}, "int2-channel-offset-f32", None),
    "float8": ({"weights": "qfloat8_e4m3fn"}, "fp8", None),
    "float8-e5m2": ({"weights": "qfloat8_e5m2"}, None, None),
    "int8-int8": ({"weights": "qint8", "activations": "qint8"}, "int8-channel", "int8-static"),
}


def saved(folder: Path, options: dict[str, str]) -> Any:
    """A model quantized by quanto and saved; the model itself."""
    save_tiny(folder / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quanto.quantize(model, **{key: quanto.qtypes[name] for key, name in options.items()}, exclude="lm_head")
        if "activations" in options:
            with quanto.Calibration():
                model(torch.arange(3, 33)[None])
        quanto.freeze(model)
        quanto.QuantizedModelForCausalLM(model).save_pretrained(folder / "out")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_dequantize(kind: str, tmp_path: Path):
    options, format, inputs = KINDS[kind]
    model = saved(tmp_path, options)
    source = open_source(tmp_path / "out")
    names = [name for name, weight in model.named_parameters() if hasattr(weight, "_data")]
    assert len(names) == 14
    for name in names:
        assert torch.equal(source.read(name), model.get_parameter(name).dequantize()), name
        found = source.format(name)
        assert (None if found is None else str(found)) == format
        if format is not None:
            how = source.input_rounding(name)
            assert (None if how is None else str(how[0])) == inputs


@pytest.mark.parametrize("kind", ["qint4", "qint2"])
def test_groups(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows of more than 128 columns have groups, whose rows no file says."""
    import tiny_models

    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 160, 192, 40
    monkeypatch.setattr(tiny_models, "tiny_config", lambda architecture: config)
    model = saved(tmp_path, {"weights": kind})
    source, formats = open_source(tmp_path / "out"), set()
    for name, weight in model.named_parameters():
        if hasattr(weight, "_data"):
            assert torch.equal(source.read(name), weight.dequantize()), name
            formats.add(str(source.format(name)))
    bits = kind.removeprefix("qint")
    assert formats == {f"int{bits}-g32-offset-f32", f"int{bits}-g96-offset-f32"}
