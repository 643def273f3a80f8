"""Low-rank side-cars end to end: the account, loading, other kinds of file, and what they repair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import whit
from stopping import stop_after_a_block
from tiny_text import random_words, write_words
from whit import GPTQ, Calibration, Recipe, quantize
from whit.export import EXPORTERS
from whit.formats.lowrank import LowRank
from whit.kernels import explain, packed_linear
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.pipeline.job import Options, open_source

from tiny_models import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")

SPEC = "int2-g32+r8"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = write_words(tmp_path_factory.mktemp("text"), random_words(3000, 1, seed=7))
    return Calibration(path, samples=8, context=48)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def logits(folder: Path) -> Tensor:
    tokens = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    return found


def test_a_model_with_side_cars_is_written_counted_and_loaded(llama: Path, tmp_path: Path):
    account = quantize(llama, tmp_path / "out", Recipe("rtn", [("*", SPEC)]))
    entry = next(e for e in account.parameters if e.name.endswith("layers.0.mlp.down_proj.weight"))
    assert entry.format == SPEC
    assert entry.bits_per_weight == pytest.approx(2 + 16 / 32 + 16 * 8 * (64 + 128) / (64 * 128))
    stored = open_source(tmp_path / "out").checkpoint
    assert stored["model.layers.0.mlp.down_proj.low_rank_a"].shape == (8, 128)
    assert stored["model.layers.0.mlp.down_proj.low_rank_b"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    module = model.model.layers[0].mlp.down_proj
    assert isinstance(module, QuantizedLinear)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    codes = BITS.unpack(module.packed)
    near = codes.format.base.decode(codes.codes, codes.params)
    beside = codes.params["low_rank_b"].float() @ codes.params["low_rank_a"].float()
    torch.testing.assert_close(module(x), x @ (near + beside).T, rtol=1e-4, atol=1e-4)
    assert float(beside.norm()) > 0.1 * float(near.norm())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "out"))


@pytest.mark.parametrize("method", ["rtn", "hqq", pytest.param("refine", marks=pytest.mark.slow)])
def test_a_side_car_repairs_what_any_method_leaves(llama: Path, method: str, tmp_path: Path, text: Calibration):
    chosen = whit.Refine(steps=3, batch=4) if method == "refine" else method
    exact, lost = logits(llama), {}
    for spec in ("int2-g32", SPEC):
        calibration = text if method == "refine" else None
        account = quantize(llama, tmp_path / spec, Recipe(chosen, [("*", spec)]), calibration=calibration)
        lost[spec] = float((logits(tmp_path / spec) - exact).square().mean())
        assert account.decoded is None
    assert lost[SPEC] < 0.8 * lost["int2-g32"]


def test_with_calibration_it_is_weighted_by_the_inputs(llama: Path, tmp_path: Path, text: Calibration):
    losses = {}
    for rank in (0, 16):
        spec = f"int2-g32+r{rank}" if rank else "int2-g32"
        account = quantize(llama, tmp_path / spec, Recipe(GPTQ(), [("*", spec)]), calibration=text)
        losses[rank] = sum(e.proxy_loss or 0.0 for e in account.parameters)
    assert losses[16] < 0.6 * losses[0]


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bytes(llama: Path, tmp_path: Path, text: Calibration):
    recipe = Recipe(GPTQ(), [("*", SPEC)])

    quantize(llama, tmp_path / "whole", recipe, calibration=text)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "parts", recipe, calibration=text, options=Options(progress=stop_after_a_block))
    quantize(llama, tmp_path / "parts", recipe, calibration=text)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_experts_and_embeddings_go_without_and_it_is_said(tmp_path: Path):
    folder = save_tiny(tmp_path / "moe", "qwen3_moe")
    rules = [("*", SPEC), ("model.embed_tokens", SPEC)]
    account = quantize(folder, tmp_path / "out", Recipe("rtn", rules))
    by_name = {e.name: e for e in account.parameters}
    for name, entry in by_name.items():
        if "experts" in name or "embed" in name:
            assert (entry.format, entry.reason) == ("int2-g32", "a side-car goes beside linears alone")
    assert by_name["model.layers.0.self_attn.q_proj.weight"].format == SPEC
    with pytest.raises(whit.WhitError, match="rank must be below both"):
        quantize(folder, tmp_path / "wide", Recipe("rtn", [("*", "int2-g32+r64")]))


@pytest.mark.parametrize("export", [e.name for e in EXPORTERS if e.name not in ("whit", "bf16")])
def test_files_that_cannot_hold_one_say_so(llama: Path, export: str, tmp_path: Path):
    base = {"bitsandbytes": "nf4", "compressed-tensors-int8": "int8", "gguf": "q4_0", "hqq": "int4-g32-asym-fz"}
    spec = f"{base.get(export, 'int4-g32-asym')}+r8"
    with pytest.raises(whit.WhitError) as refusal:
        quantize(llama, tmp_path / "out", Recipe("rtn", [("*", spec)]), export=export)
    assert not (tmp_path / "out").exists()
    assert all(len(line.split()) > 4 for line in str(refusal.value).splitlines())


def test_on_the_fly_and_as_one_tensor(llama: Path):
    config = whit.QuantizationConfig(SPEC)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    q = whit.quantize_tensor(tiny_model("llama").model.layers[0].self_attn.q_proj.weight.data, SPEC)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.dequantize(torch.float32), q.dequantize())
    assert str(whit.parse_format(SPEC)) == SPEC


def test_the_kernel_for_the_codes_runs_beside_the_factors():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=g)
    packed = BITS.pack(whit.quantize_tensor(weight, "int4-g32+r16"))
    plain = BITS.pack(whit.quantize_tensor(weight, "int4-g32"))
    x = torch.randn(3, 128, generator=g, requires_grad=True)
    used = {name for name, reason in explain(packed, x) if reason == "used"}
    assert used <= {"cpu+side-car", "reference"}
    assert any("no side-car" in reason for _, reason in explain(plain, x))
    exact = BITS.unpack(packed).dequantize()
    y = packed_linear(x, packed)
    torch.testing.assert_close(y, x @ exact.T, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, exact.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_a_recipe_gets_side_cars_by_one_option():
    recipe = Recipe("rtn", [("*", "int4-g32"), ("lm_head", "bf16"), ("*.0.*", "int3-g32+r4")]).with_side_cars(8)
    assert [str(f) for _, f in recipe.rules] == ["int4-g32+r8", "bf16", "int3-g32+r4"]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    for wrong in ("bf16+r8", "int4+r8+r8"):
        with pytest.raises(whit.WhitError):
            whit.parse_format(wrong)
    with pytest.raises(whit.WhitError, match="mix q4_k_m"):
        Recipe("rtn", [], mix="q4_k_m").with_side_cars(8)
    assert LowRank(whit.parse_format("nf4"), 3).rank == 3
