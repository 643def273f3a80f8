"""What the caches of families with states hold, and estimates for models whose configuration says little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from families import FAMILIES, family, save_family
from whit.errors import UnsupportedModelError
from whit.memory import Planner, Situation, find_subject
from whit.memory.cache import cache_bytes, cache_layers

TOKENS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
NO_CACHE = {  # encoders, and what keeps its state elsewhere
    "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "electra", "xlm-roberta", "camembert", "deberta-v2",
    "mobilebert", "modernbert",
}  # fmt: skip
STATES = {
    "mamba": 2, "falcon_mamba": 2, "mamba2": 2, "jamba": 1, "bamba": 1, "zamba2": 4, "recurrent_gemma": 2,
    "nemotron_h": 1, "lfm2": 1, "qwen3_next": 1, "qwen3_5": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - NO_CACHE))
def test_the_cache_is_what_transformers_holds(name: str):
    model = family(name)
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
    pairs = [getattr(layer, key, None) for layer in cache.layers for key in ("keys", "values")]
    held = sum(t.nbytes for t in pairs if t is not None)
    assert cache_bytes(cache_layers(model.config)[0], 40, 1, "auto", torch.float32) == held > 0


def test_windows_and_no_attention_at_all():
    for name, elements in (("mamba", 0), ("falcon_mamba", 0), ("recurrent_gemma", 16 * 2 * 16)):
        assert cache_bytes(cache_layers(family(name).config)[0], 40, 1, "auto", torch.float32) == 4 * elements


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_an_estimate_and_its_states_are_said(name: str, tmp_path: Path):
    planner = Planner(find_subject(str(save_family(tmp_path / name, name))), Situation(context=64))
    assert planner.need(planner.weights("int8-g8")).total_bytes > 0
    said = [int(note.split(" ")[0]) for note in planner.notes if note.endswith("a state of fixed size, not counted")]
    assert sum(said) == STATES.get(name, 0)


def test_stages_of_several_widths_are_refused_in_a_sentence(tmp_path: Path):
    config = hf.ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, patch_size=4, image_size=16)
    hf.ConvNextForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="ConvNextConfig: has no single hidden_size and num_hidden_layers"):
        _ = Planner(find_subject(str(tmp_path)), Situation(context=64)).rows(())
