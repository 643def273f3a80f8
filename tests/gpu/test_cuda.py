"""The main paths on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import whit
from whit.data import resolve_model
from whit.integrations.loading import load_causal_lm
from whit.methods import Blocks
from whit.methods.descent import Descent, Recorded
from whit.modules import remove_packed
from whit.tensor import LayerStats

pytestmark = pytest.mark.gpu
SPECS = ["int8", "int4-g64", "int4-g64-asym-fz", "int3-g64-asym", "nf4-dq", "fp4", "fp8", "int2-g32"]


@pytest.mark.parametrize("method", ["rtn", "clip", "hqq"])
@pytest.mark.parametrize("spec", SPECS)
def test_tensors_quantize_alike_on_both_devices(spec: str, method: str):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    here, there = whit.quantize_tensor(weight, spec, method), whit.quantize_tensor(weight.cuda(), spec, method)
    assert there.codes.device.type == "cuda"
    different = (here.codes != there.codes.cpu()).float().mean()
    # Sums are added in another order there; hqq's repeated rounding makes more of that. Nothing of rtn is a sum.
    assert different <= {"rtn": 0, "clip": 1e-3, "hqq": 0.02}[method]
    if method == "rtn":
        alike = {
            name: there.params[name].cpu() for name, param in here.params.items() if isinstance(param, torch.Tensor)
        }
        assert all(torch.equal(here.params[name], param) for name, param in alike.items())
    assert whit.error(weight.cuda(), there).mse == pytest.approx(whit.error(weight, here).mse, rel=1e-2)


@pytest.mark.parametrize("spec", ["int8", "nf4-dq", "int4-g64"])
def test_loading_on_the_fly_and_again(spec: str, tmp_path):
    folder = resolve_model("whit:model")
    config = whit.QuantizationConfig(spec, compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="auto")
    assert {b.device.type for b in model.buffers()} == {"cuda"}
    ids = AutoTokenizer.from_pretrained(folder)("It was late", return_tensors="pt").input_ids.cuda()
    expected = model(ids).logits
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] == ids.shape[1] + 8
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert torch.equal(again(ids).logits, expected)


def test_part_of_the_model_on_the_cpu():
    folder = resolve_model("whit:model")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{i}": 0 if i < 4 else "cpu" for i in range(8)}
    config = whit.QuantizationConfig("int4-g64")
    split = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=places)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": 0})
    ids = torch.arange(10, 30)[None].cuda()
    expected = whole(ids).logits.float()
    assert (split(ids).logits.float() - expected).norm() < 0.03 * expected.norm()  # bfloat16, on two devices


@pytest.mark.parametrize("method", ["hqq", "gptq"])
def test_the_pipeline_quantizes_on_the_device(method: str, tmp_path):
    recipe, options = whit.Recipe(method, [("*", "int4-g64")]), whit.Options(device="cuda")
    calibration = whit.Calibration("whit:text", samples=8, context=512) if method == "gptq" else None
    account = whit.quantize("whit:model", tmp_path / "out", recipe, calibration=calibration, options=options)
    assert account.counts()["quantized"] == 56


@pytest.mark.parametrize(
    "spec", ["int4-g64", "int3-g128-asym", "int4-channel", "nf4-g64", "nf4-dq", "int2-g32", "iq4_nl", "q2_k", "q6_k"]
)
@pytest.mark.parametrize("sweeps", [0, 1])
def test_recorded_walks_choose_the_codes_of_plain_ones(spec: str, sweeps: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(96, 320, generator=generator, device="cuda")
    x = torch.randn(900, 320, generator=generator, device="cuda") @ torch.randn(
        320, 320, generator=generator, device="cuda"
    )
    stats, format, method = LayerStats(x.T @ x, 900), whit.parse_format(spec), whit.GPTQ(sweeps=sweeps)
    recorded = [method(weight, stats, format) for _ in range(2)]
    monkeypatch.setattr("whit.methods.columns.Columns._is_recorded", False)
    ours = method(weight, stats, format)
    for other in recorded:
        assert (other.codes != ours.codes).float().mean() < 1e-3  # the order of sums differs in float64
        torch.testing.assert_close(other.dequantize(), ours.dequantize(), rtol=1e-2, atol=1e-1)
    assert torch.equal(recorded[0].codes, recorded[1].codes)


def test_refinement_never_waits_for_the_device_inside_a_step(tmp_path, monkeypatch: pytest.MonkeyPatch):
    step = Descent.step

    def watched(self: Descent, *arguments) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Descent, "step", watched)
    calibration, options = whit.Calibration("whit:text", samples=8, context=512), whit.Options(device="cuda")
    accounts = [
        whit.quantize("whit:model", tmp_path / str(i), whit.Recipe(method, [("*", "int3-g64")]),
                      calibration=calibration, options=options)
        for i, method in enumerate((whit.Refine().start, whit.Refine(steps=20, batch=4)))
    ]  # fmt: skip
    assert accounts[0].files != accounts[1].files


@pytest.mark.parametrize("method", [whit.Refine(steps=16, batch=4), Blocks(steps=16, batch=4)])
@pytest.mark.parametrize("spec", ["int3-g64", "int2-g32-asym", "ternary-g64", "nf4-g64", "q4_k"])
def test_recorded_steps_of_a_block_move_as_launched_ones(
    spec: str, method: whit.Refine, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    made: list[Recorded] = []
    init = Recorded.__init__
    monkeypatch.setattr(Recorded, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
    calibration, options = whit.Calibration("whit:text", samples=8, context=256), whit.Options(device="cuda")
    recipe = whit.Recipe(method, [("*", spec)])

    def run(name: str) -> dict[str, torch.Tensor]:
        whit.quantize("whit:model", tmp_path / name, recipe, calibration=calibration, options=options)
        model = load_causal_lm(str(tmp_path / name), dtype="float32")
        remove_packed(model, torch.float32)
        return dict(model.named_parameters())

    recorded = run("recorded")
    assert made
    count = len(made)
    monkeypatch.setattr(Descent, "_record", lambda self, numbers: None)
    launched = run("launched")
    assert len(made) == count
    for name, value in launched.items():  # attention's gradients may differ in their last bits
        near = (recorded[name] - value).abs().mean() / value.abs().mean().clamp(min=1e-9)
        assert near < 0.02, (name, float(near))
