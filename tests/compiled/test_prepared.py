"""Prepared weights in a file: written once, mapped by later processes, never mistaken for another model's."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import whit
from tiny_text import word_tokenizer
from whit.activations import parse_activations
from whit.cli import build_app
from whit.errors import CheckpointError, OutputError, UnsupportedModelError
from whit.kernels.cpu import Cpu8, library
from whit.layouts import BITS
from whit.modules import PackedModule
from whit.tensor import PackedWeight

from tiny_models import save_tiny, tiny_model

pytestmark = [
    pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built"),
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say which files are mapped"),
]
GREEDY = {"max_new_tokens": 20, "do_sample": False}
PROMPT = torch.tensor([[5, 9, 77, 31]])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return quantized(tmp_path / "model")


def quantized(folder: Path, seed: int = 0) -> Path:
    """A tiny model as whit saves it: an embedding of 8 bits that is the head too, 4 bits elsewhere, odd sizes too."""
    plain = folder.with_name(f"{folder.name}-plain-{seed}")
    tiny_model("llama-tied", seed, torch.bfloat16).save_pretrained(plain)
    rules = [("*", "int4-g32"), ("model.embed_tokens", "int8-g32"), ("*.down_proj", "nf4-dq")]
    config = whit.QuantizationConfig(whit.Recipe(rules=rules))
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(folder)
    return folder


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def mapped_from(model) -> set[str]:
    """The files that the packed tensors of a model lie in."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    found = set()
    for module in model.modules():
        if isinstance(module, PackedModule):
            for tensor in module.packed.tensors.values():
                for place, *_, path in (line for line in lines if len(line) > 5):
                    first, last = (int(end, 16) for end in place.split("-"))
                    if first <= tensor.data_ptr() < last:
                        found.add(path)
    return found


def test_the_first_process_writes_the_file_and_the_second_maps_it(checkpoint: Path, tmp_path: Path):
    expected = load(checkpoint).generate(PROMPT, **GREEDY)
    place = tmp_path / "prepared"
    found = []
    for _ in range(2):
        model = whit.compile(load(checkpoint), strict=True, prepared=place)
        (file,) = place.iterdir()
        assert mapped_from(model) == {str(file)}
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        assert torch.equal(model.generate.uncompiled(PROMPT, **GREEDY), expected)
        found.append((file.name, file.stat().st_mtime_ns))
        whit.compile(model, strict=True, prepared=place)  # again: nothing changes
    assert found[0] == found[1]
    assert re.fullmatch(r"model-[0-9a-f]{32}\.safetensors", found[0][0])
    state, stored = model.state_dict(), load_file(file)  # another reader of the file
    names = [name for name in state if name.endswith((".codes", ".scale"))]
    assert names
    for name in names:
        assert torch.equal(stored[name], state[name])
        assert torch.equal(stored[name], load_file(checkpoint / "model.safetensors")[name])


def test_another_checkpoint_in_the_same_place_has_a_file_of_its_own(checkpoint: Path, tmp_path: Path):
    place = tmp_path / "prepared"
    whit.compile(load(checkpoint), strict=True, prepared=place)
    quantized(checkpoint, seed=1)
    expected = load(checkpoint).generate(PROMPT, **GREEDY)
    model = whit.compile(load(checkpoint), strict=True, prepared=place)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert len(list(place.iterdir())) == 2


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def rename_tensor(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"q_proj.codes", b"q_proj.other"))


def change_key(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1
    file.write_bytes(raw)


def move(file: Path) -> None:
    """The same tensors, eight bytes on."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :])


@pytest.mark.parametrize("harm", [cut, rename_tensor, change_key, move])
def test_a_damaged_file_is_one_sentence_until_it_is_made_again(checkpoint: Path, tmp_path: Path, harm):
    place = tmp_path / "prepared"
    expected = whit.compile(load(checkpoint), strict=True, prepared=place).generate(PROMPT, **GREEDY)
    (file,) = place.iterdir()
    harm(file)
    with pytest.raises(CheckpointError, match=r"delete it, or ask for a rebuild") as said:
        whit.compile(load(checkpoint), strict=True, prepared=place)
    assert str(file) in str(said.value)
    assert "\n" not in str(said.value)
    model = whit.compile(load(checkpoint), strict=True, prepared=place, rebuild=True)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert [path.name for path in place.iterdir()] == [file.name]


def test_weights_that_are_not_the_checkpoints_are_refused(checkpoint: Path, tmp_path: Path):
    changed = load(checkpoint)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.codes[0, 0] ^= 1
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj\.codes is not as it was loaded"):
        whit.compile(changed, strict=True, prepared=tmp_path / "prepared")
    ran = load(checkpoint)
    ran.model.layers[0].self_attn.q_proj.codes = ran.model.layers[0].self_attn.q_proj.codes.clone()
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.codes is not as it was loaded"):
        whit.compile(ran, strict=True, prepared=tmp_path / "prepared")
    plain = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "float", "llama"))
    with pytest.raises(UnsupportedModelError, match="not loaded from a checkpoint that whit has quantized"):
        whit.compile(plain, strict=True, prepared=tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_a_folder_that_cannot_be_written_to(checkpoint: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="name another folder"):
        whit.compile(load(checkpoint), strict=True, prepared=tmp_path / "file" / "prepared")


def test_derived_tensors_come_from_the_file(random: torch.Generator):
    """Levels summed by row, for inputs with a zero point: `restore` makes none."""
    how = parse_activations("int8-static-asym")
    packed = BITS.pack(whit.quantize_tensor(torch.randn(48, 64, generator=random), "int8"))
    ranges = {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([3], dtype=torch.int8)}
    packed = replace(packed, tensors={**packed.tensors, **ranges}, activations=how)
    prepared = Cpu8().prepare(packed)
    assert {*prepared.tensors} > {*packed.tensors}
    kept = PackedWeight(packed.layout, packed.format, packed.shape, dict(prepared.tensors), activations=how)
    x = torch.randn(3, 64, generator=random).bfloat16()
    restored = Cpu8().restore(kept)
    assert all(restored.tensors[key] is prepared.tensors[key] for key in prepared.tensors)
    assert torch.equal(Cpu8().linear(x, restored, None), Cpu8().linear(x, packed, None))


def test_the_command_line_keeps_prepared_weights(checkpoint: Path, tmp_path: Path):
    word_tokenizer(unknown="w3").save_pretrained(checkpoint)
    place, said = tmp_path / "prepared", []
    for options in ([], ["--prepared", str(place)], ["--prepared", str(place)]):
        command = ["generate", str(checkpoint), "--prompt", "w5 w9", "--greedy", "--device", "cpu", "--json", *options]
        result = CliRunner().invoke(build_app(), command)
        assert result.exit_code == 0, result.output
        said.append(json.loads(result.stdout)["text"])
    assert said[0] == said[1] == said[2]
    assert len(list(place.iterdir())) == 1
