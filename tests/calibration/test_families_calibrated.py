"""Statistics of blocks that are not the usual ones, and blocks that cannot run one at a time, which say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import whit
from families import family, save_family
from tiny_text import word_tokenizer
from whit.calibration.capture import MATMULS, Watch
from whit.errors import UnsupportedModelError
from whit.model.graph import find_blocks


@pytest.mark.parametrize(("name", "linear"), [("falcon_mamba", "backbone.layers.0.mixer.dt_proj"),
                                              ("jamba", "model.layers.0.mamba.dt_proj")])  # fmt: skip
def test_a_matrix_that_columns_of_tokens_are_multiplied_by_has_statistics(name: str, linear: str):
    model, seen = family(name), []
    weight = model.get_submodule(linear).weight
    watch = Watch({linear: weight})

    class Noted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in MATMULS and args[0] is weight:
                seen.append(args[1].mT.reshape(-1, args[1].shape[-2]))
            return func(*args, **kwargs or {})

    with torch.no_grad(), Noted(), watch:
        model(torch.arange(5, 30)[None])
    (tokens,) = seen
    found = watch.stats().stats[linear][0]
    assert found.token_count == 25
    torch.testing.assert_close(found.hessian, tokens.T @ tokens)


@pytest.mark.parametrize("name", ["gemma4", "zamba2"])
def test_blocks_that_are_given_more_than_hidden_states_are_refused(name: str, tmp_path: Path):
    """Zamba2's blocks are given the text's embeddings again, Gemma 4's too, in columns of their own."""
    source = save_family(tmp_path / name, name)
    word_tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 100 + 3}" for i in range(2000)))
    calibration = whit.Calibration(tmp_path / "text.txt", samples=3, context=32)
    with pytest.raises(UnsupportedModelError, match="is given more of a text than hidden states"):
        whit.quantize(source, tmp_path / "out", whit.Recipe("gptq", [("*", "int4-g8")]), calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_a_model_of_images_with_several_lists_of_blocks_is_refused_before_it_runs():
    """Segformer's was run on text, which ended in a traceback."""
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[32, 64], num_attention_heads=[2, 4],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=32,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="SegformerForSemanticSegmentation: runs on pixel_values"):
        find_blocks(hf.SegformerForSemanticSegmentation(config))


def test_a_product_with_no_tokens_adds_nothing():
    """JetMoE's experts are multiplied where no token chose them, which was a traceback."""
    weight, x = torch.randn(8, 16), torch.randn(4, 16)
    watch = Watch({"expert": weight})
    with watch:
        torch.nn.functional.linear(x[:0], weight)
        torch.nn.functional.linear(x, weight)
    assert watch.stats().stats["expert"][0].token_count == 4
