"""What somebody passes who has not read the signature: it is understood, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import whit
from whit.errors import WhitError
from whit.pipeline.coverage import load_account

MODEL = "whit:model"


@pytest.mark.parametrize("recipe", ["int4-g64", whit.Affine(4, 64), "file"])
def test_a_recipe_may_be_a_format_or_a_file(recipe: object, tmp_path: Path):
    if recipe == "file":
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(whit.Recipe(rules=[("*", "int4-g64")]).to_toml())
    account = whit.quantize(MODEL, tmp_path / "out", recipe)  # type: ignore[arg-type]
    assert {entry.format for entry in account.parameters if entry.format} == {"int4-g64"}


def test_the_name_of_out_says_the_kind_of_file(tmp_path: Path):
    whit.quantize(MODEL, tmp_path / "small.gguf", "q4_0")
    assert (tmp_path / "small.gguf").read_bytes()[:4] == b"GGUF"


def test_a_calibration_may_be_texts_or_a_file(tmp_path: Path):
    texts = [f"It was late in the evening when number {n} came home, and nobody said a word." for n in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    few = {"samples": 2, "context": 32}
    hashes = set()
    for name, text in (("a", texts), ("b", tmp_path / "text.txt")):
        account = whit.quantize(
            MODEL, tmp_path / name, whit.Recipe("gptq", [("*.0.self_attn.*", "int4-g64")]),
            calibration=whit.Calibration(text, **few),  # type: ignore[arg-type]
        )  # fmt: skip
        hashes.add(account.calibration["sha256"])
    assert len(hashes) == 1
    assert hash(whit.Calibration(texts)) == hash(whit.Calibration(tuple(texts)))
    with pytest.raises(WhitError, match=r"the calibration texts: .* tokens; a sample has"):
        whit.quantize(MODEL, tmp_path / "out", whit.Recipe("gptq", [("*", "int4-g64")]), calibration=["a few words"])


NET = nn.Sequential(nn.Linear(64, 64))
Q = whit.quantize_tensor(torch.ones(4, 64), "int8")
GPTQ = whit.Recipe("gptq", [("*", "int4-g64")])
REFUSED = {
    "a module is for quantize_model": (lambda out: whit.quantize(NET, out), "MODEL: is of type Sequential.*_model"),
    "out is None": (lambda out: whit.quantize(MODEL, None), "OUT: is of type NoneType"),
    "options are a dict": (lambda out: whit.quantize(MODEL, out, options={"seed": 1}), "options: is of type dict"),
    "a seed is a text": (lambda out: whit.Options(seed="a"), "seed 'a': is of type str"),
    "samples are a text": (lambda out: whit.Calibration(samples="8"), "calibration: samples: is of type str"),
    "a text is a number": (lambda out: whit.Calibration([1, 2]), "a text: is of type int; it must be a file"),
    "the texts are empty": (lambda out: whit.quantize(MODEL, out, GPTQ, calibration=["", " "]), "are empty"),
    "a method is a class": (lambda out: whit.Recipe(whit.GPTQ), r"method: is the class GPTQ; .* such as whit.GPTQ\(\)"),
    "a method is a number": (lambda out: whit.Recipe(5), "method: is of type int"),
    "a tensor is a text": (lambda out: whit.quantize_tensor("x", "int8"), "tensor: str holds no numbers"),
    "a tensor is None": (lambda out: whit.quantize_tensor(None, "int8"), "tensor: NoneType holds no numbers"),
    "shapes differ": (lambda out: whit.error(torch.ones(3, 3), Q), r"shape \[3, 3\] and .* \[4, 64\]"),
    "no quantized tensor": (lambda out: whit.error(torch.ones(3), torch.ones(3)), "error: is of type Tensor"),
    "nothing is packed": (lambda out: whit.bits_per_weight(Q), "is of type QuantizedTensor; pack it"),
    "compile is for transformers": (lambda out: whit.compile(NET, strict=True), "is not a transformers model"),
    "a tuning is a dict": (lambda out: whit.finetune(MODEL, "x.jsonl", out, {"rank": 4}), "tuning: is of type dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_sentence(name: str, tmp_path: Path):
    call, said = REFUSED[name]
    with pytest.raises(WhitError, match=said) as caught:
        call(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_account_tells_how_the_model_before_it_was_made(tmp_path: Path):
    from whit.pipeline import run
    from whit.pipeline.job import Options
    from whit.pipeline.transcode import prepare_transcode

    calibration = whit.Calibration(samples=1, context=32, seed=3)
    recipe = whit.Recipe("gptq", [("*.0.self_attn.*", "int4-g64")])
    first = whit.quantize(MODEL, tmp_path / "first", recipe, calibration=calibration)
    run(prepare_transcode(tmp_path / "first", tmp_path / "second", "gptq", Options()))
    second = load_account(tmp_path / "second")
    made = second.source["made"]
    assert made["recipe"] == first.recipe
    assert made["calibration"] == first.calibration
    assert (second.carried, made["carried"], first.carried) == (True, False, False)
    assert "made" not in first.source


def test_help_names_all_that_there_is():
    assert [name for name in whit.__all__ if name not in str(whit.__doc__)] == []
    assert [name for name in whit.__all__ if not getattr(whit, name).__doc__] == []
