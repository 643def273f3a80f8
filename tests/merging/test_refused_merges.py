"""Adapters that do not fit, routes that cannot be gone and texts that lack are said before the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import adapter
from safetensors.torch import load_file, save_file

import whit
from whit.cli.merge import merge as command
from whit.errors import EvaluationError, OutputError
from whit.merging import Merge, merge, prepare_merge

from tiny_models import save_tiny


def _rewrite(folder: Path, out: Path, change) -> Path:
    shutil.copytree(folder, out)
    tensors, config = (
        load_file(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

BROKEN = {
    "one factor of two": lambda t, c: t.pop(KEY),
    "weights must be finite": lambda t, c: t[KEY].fill_(float("nan")),
    "says rank 4": lambda t, c: t.update({KEY: torch.zeros(3, 64)}),
    "both must agree": lambda t, c: t.update({KEY: torch.zeros(4, 32)}),
    "a IA3 adapter": lambda t, c: c.update(peft_type="IA3"),
    "not a part of LoRA": lambda t, c: t.update({"base_model.model.strange": torch.zeros(1)}),
    "not a sum of matrices": lambda t, c: c.update(alora_invocation_tokens=[1]),
    "lacks DoRA": lambda t, c: c.update(use_dora=True),
    "no such linear": lambda t, c: t.update({KEY.replace("layers.0", "layers.7"): t.pop(KEY), KEY.replace(
        "layers.0", "layers.7").replace("lora_A", "lora_B"): t.pop(KEY.replace("lora_A", "lora_B"))}),
}  # fmt: skip


@pytest.mark.parametrize("said", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(said: str, packed: Path, trained: Path, tmp_path: Path):
    broken = _rewrite(trained, tmp_path / "broken", BROKEN[said])
    with pytest.raises(whit.WhitError, match=said) as refusal:
        merge(packed, broken, tmp_path / "out", Merge("sidecar"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_small_file_that_lies_outside_is_said_before_the_work(packed: Path, trained: Path, tmp_path: Path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    (folder / "vocab.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("{}")
    with pytest.raises(whit.WhitError, match="outside of the model"):
        prepare_merge(folder, trained, tmp_path / "out", Merge("sidecar"), whit.Options())


def test_routes_that_cannot_be_gone_are_refused(plain: Path, packed: Path, trained: Path, tmp_path: Path):
    out = tmp_path / "out"
    for model, wanted, said in (
        (packed, Merge("melt"), "must be one of requantize, sidecar, bf16"),
        (plain, Merge("sidecar"), "is not quantized"),
        (plain, Merge("requantize"), "add --format"),
        (packed, Merge("bf16", "int4"), "drop one of them"),
        (packed, Merge("bf16", export="gguf"), "not a gguf file"),
        (packed, Merge(source=packed), "must be the model in full precision"),
        (packed, Merge("sidecar", export="gptq"), "gptq"),
    ):
        with pytest.raises(whit.WhitError, match=said):
            merge(model, trained, out, wanted)
    with pytest.raises(whit.WhitError, match="holds no adapter_config"):
        merge(packed, plain, out)
    dora = adapter(packed, tmp_path / "dora", use_dora=True)
    with pytest.raises(whit.WhitError, match="DoRA rescales whole rows"):
        merge(packed, dora, out, Merge("sidecar"))
    other = save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(whit.WhitError, match="no such linear"):
        merge(other, trained, out)
    tied = save_tiny(tmp_path / "tied", "llama-tied")
    with pytest.raises(whit.WhitError, match="shares its weight"):
        merge(tied, adapter(tied, tmp_path / "head", target_modules=["lm_head"]), out)
    assert not out.exists()


def test_what_began_with_the_loss_goes_into_no_weights_without_it(plain, packed, trained, tmp_path):
    begun = shutil.copytree(trained, tmp_path / "begun")
    record = {"tuning": {"format": "int4-g32", "method": None, "init": "data"}}
    (begun / "whit.json").write_text(json.dumps(record))
    for model, wanted in ((plain, Merge("bf16")), (packed, Merge(source=plain))):
        with pytest.raises(whit.WhitError, match=r"init data.* name the model quantized to int4-g32 by rtn"):
            merge(model, begun, tmp_path / "out", wanted)
    merge(packed, begun, tmp_path / "out", Merge("sidecar"))
    (begun / "base").mkdir()
    with pytest.raises(whit.WhitError, match=r"name .*begun/base$"):
        merge(plain, begun, tmp_path / "other", Merge("bf16"))
    record["tuning"]["init"] = "default"
    (begun / "whit.json").write_text(json.dumps(record))
    merge(plain, begun, tmp_path / "other", Merge("bf16"))


def test_what_is_wrong_with_the_text_or_the_output_is_said_before_the_work(packed: Path, trained: Path, tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"none.txt: no such file"):
        command(str(packed), trained, tmp_path / "out", text=str(tmp_path / "none.txt"))
    assert not (tmp_path / "out").exists()
    for out in (trained, trained / "inside"):
        with pytest.raises(OutputError, match=r"lies inside ADAPTER .+ as ADAPTER is never written"):
            merge(packed, trained, out, options=whit.Options(restart=True))
