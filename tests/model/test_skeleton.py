"""What config.json says of a model, where it cannot be so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whit.errors import CheckpointError
from whit.model.skeleton import build_skeleton, load_skeleton

from tiny_models import tiny_config


@pytest.mark.parametrize("depth", [-3, 10**7])
@pytest.mark.parametrize(("architecture", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_numbers_of_blocks_that_are_none(depth: int, architecture: str, key: str, tmp_path: Path):
    raw = tiny_config(architecture).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    for wrong in (raw | {key: depth}, {**raw, "text_config": {key: depth}}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=rf"config\.json says {key} {depth}; it must be a number of blocks"):
            load_skeleton(tmp_path)
        with pytest.raises(CheckpointError, match=rf"says {key} {depth}"):
            build_skeleton(wrong, "here")
