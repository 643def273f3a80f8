"""Models that read one text and write another, block by block, beside the whole model with hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from two_texts import MODELS, SMALL, made
from whit.calibration.capture import Watch
from whit.calibration.runner import Runner
from whit.calibration.storage import Storage
from whit.errors import UnsupportedModelError
from whit.model.graph import find_blocks
from whit.model.halves import halves


def seen_by_hooks(model: hf.PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """sum x^T x of every linear in float64, the whole model run on each sample."""
    sums: dict[str, Tensor] = {}

    def hook(name: str):
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return note

    linears = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    source, begun, _ = halves(model.config, tokens)
    with torch.no_grad():
        for row, written in zip(source, begun, strict=True):
            model(input_ids=row[None], decoder_input_ids=written[None])
    for each in hooks:
        each.remove()
    return sums


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_sees_what_it_sees_in_the_whole_model(name: str, tmp_path: Path):
    model, tokens = made(name), torch.randint(3, 300, (5, 33))
    state, wanted = model.state_dict(), seen_by_hooks(model, tokens)
    blocks = find_blocks(model)
    assert blocks.decoder == 2
    assert len(blocks.names) == 5
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        runner = Runner(model, lambda key: state[key], tokens, torch.device("cpu"), Storage(tmp_path), True)
        for index in range(len(runner.names)):
            with runner.loaded(index) as parameters:
                watch = Watch({key: p for key, p in parameters.items() if key in wanted})
                with watch:
                    runner.run(index)
                runner.run_exact(index)
                found |= {key: stats[0].hessian for key, stats in watch.stats().stats.items()}
        assert torch.equal(runner.inputs, runner.exact)
    inside = {key for key in wanted if key.startswith(blocks.names)}
    assert found.keys() == inside
    assert len(inside) >= 2 * 6 + 3 * 10
    for key in inside:
        torch.testing.assert_close(found[key].double(), wanted[key], rtol=2e-4, atol=2e-4)


def test_the_decoder_reads_what_the_quantized_encoder_makes(tmp_path: Path):
    model, tokens = made("bart"), torch.randint(3, 300, (3, 32))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.startswith("model.encoder.layers") and value.dim() == 2:
                value.mul_(0.9)
    wanted = seen_by_hooks(model, tokens)["model.decoder.layers.0.encoder_attn.k_proj.weight"]
    changed = model.state_dict()
    with torch.no_grad():
        runner = Runner(model, lambda key: state[key], tokens, torch.device("cpu"), Storage(tmp_path), True)
        for index in range(2):
            names = runner.state_of(index)
            with runner.loaded(index):
                runner.run_exact(index)
            with runner.loaded(index, {key: changed[key] for key in names}):
                runner.run(index)
        with runner.loaded(2) as parameters:
            key = "model.decoder.layers.0.encoder_attn.k_proj.weight"
            with (watch := Watch({key: parameters[key]})):
                runner.run(2)
            with (exact := Watch({key: parameters[key]})):
                runner.run_exact(2)
    torch.testing.assert_close(watch.stats().stats[key][0].hessian.double(), wanted, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(exact.stats().stats[key][0].hessian.double(), wanted, rtol=1e-2)


def test_sounds_are_no_text():
    config = hf.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=100, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="WhisperForConditionalGeneration: runs on input_features"):
        find_blocks(hf.WhisperForConditionalGeneration(config))


def test_halves_end_and_begin_as_in_training():
    tokens = torch.arange(10, 21).repeat(2, 1)
    source, begun, targets = halves(hf.BartConfig(**SMALL), tokens)
    assert source.tolist() == [[10, 11, 12, 13, 2]] * 2
    assert begun.tolist() == [[2, 15, 16, 17, 18, 19]] * 2
    assert targets.tolist() == [[15, 16, 17, 18, 19, 20]] * 2
