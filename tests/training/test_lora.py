"""PEFT's LoRA, unpatched, on packed weights; the oracle is the dequantized model with the same adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

import whit
from whit.model.targets import find_targets
from whit.modules import Dtypes, QuantizedLinear, empty_packed, install

from tiny_models import save_tiny, tiny_inputs

hf.logging.disable_progress_bar()

FORMATS = ("int4-g32", "nf4-dq", "int3-g64", "int2-g32", "int8", "q4_k", "fp8", "ternary")
NAMED = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are wide enough for superblocks of 256."""
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config)
    path: Path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def quantized(folder: Path, format: str = "int4-g32", dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    config = whit.QuantizationConfig(format)
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def with_adapter(model: hf.PreTrainedModel, targets: str | list[str] = "all-linear", **more: bool) -> peft.PeftModel:
    """LoRA whose two halves are both random: at PEFT's own start the gradient of A is nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False, **more}
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))


def loss(model: peft.PeftModel) -> Tensor:
    inputs = tiny_inputs("llama")
    return model(**inputs, labels=inputs["input_ids"]).loss


def gradients(model: peft.PeftModel) -> dict[str, Tensor]:
    model.train()
    loss(model).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_the_dequantized_model(folder, format, checkpointing):
    model = quantized(folder, format)
    plain = copy.deepcopy(model).dequantize()
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    prepared = whit.prepare_for_training(model, gradient_checkpointing=checkpointing)
    assert prepared is model
    assert prepared.is_gradient_checkpointing is checkpointing
    found, wanted = gradients(with_adapter(model)), gradients(with_adapter(plain))
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * 7 * 2
    assert max(relative(found[name], wanted[name]) for name in found) < 1e-4


@pytest.mark.parametrize("format", ["int4-g32", "nf4-dq"])
def test_gradients_in_bfloat16(folder, format):
    model = quantized(folder, format, torch.bfloat16)
    truth = copy.deepcopy(model).dequantize().float()
    plain = copy.deepcopy(model).dequantize()
    whit.prepare_for_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found, other, wanted = (
        gradients(with_adapter(model)),
        gradients(with_adapter(plain)),
        gradients(with_adapter(truth)),
    )
    assert {p.dtype for n, p in with_adapter(model).named_parameters() if "lora" in n} == {torch.float32}
    for name in found:  # as far from float32 as bfloat16 itself is
        assert relative(found[name], wanted[name]) < 1.5 * relative(other[name], wanted[name]) + 0.01


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("format", ["nf4-dq", "int4-g32", "int3-g64-asym", "q4_k", "ternary", "mxfp4", "int2-g32+r4"])
def test_variants_of_lora(folder, format, variant):
    model = quantized(folder, format)
    plain = copy.deepcopy(model).dequantize()
    whit.prepare_for_training(model)
    found, wanted = gradients(with_adapter(model, **variant)), gradients(with_adapter(plain, **variant))
    assert found.keys() == wanted.keys()
    assert any("magnitude" in name for name in found) == ("use_dora" in variant)
    assert max(relative(found[name], wanted[name]) for name in found) < 1e-4


def train(model: hf.PreTrainedModel, steps: int = 30) -> tuple[peft.PeftModel, list[float]]:
    adapted = with_adapter(model).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        (now := loss(adapted)).backward()
        optimizer.step()
        losses.append(now.item())
    return adapted, losses


@pytest.mark.parametrize("format", ["int4-g32", "int2-g32"])
def test_loss_falls_as_the_dequantized_models_and_the_packed_weights_stay(folder, format):
    model = quantized(folder, format)
    _, wanted = train(copy.deepcopy(model).dequantize())
    whit.prepare_for_training(model)
    before = {name: t.clone() for name, t in model.named_buffers()}
    adapted, losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(wanted, rel=0.02)
    after = {name.replace(".base_layer", ""): t for name, t in adapted.base_model.model.named_buffers()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("targets", ["all-linear", NAMED])
def test_an_adapter_comes_back(folder, tmp_path, targets):
    adapted = with_adapter(whit.prepare_for_training(quantized(folder)), targets).eval()
    wrapped = {n.rpartition(".")[2] for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert wrapped == (set(NAMED) if targets == NAMED else {*NAMED, "k_proj", "o_proj", "gate_proj", "up_proj"})
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(folder), tmp_path).eval()
    with torch.no_grad():
        wanted, found = (m(**tiny_inputs("llama")).logits for m in (adapted, again))
    assert torch.equal(found, wanted)
    with adapted.disable_adapter(), torch.no_grad():
        assert not torch.equal(adapted(**tiny_inputs("llama")).logits, wanted)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_packed_weights_is_refused(folder, safe):
    model = quantized(folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapted = with_adapter(model)
    with pytest.raises(whit.WhitError, match=r"dequantize\(\)"):
        adapted.merge_and_unload(safe_merge=safe)
    after = {n.replace(".base_layer", ""): t for n, t in adapted.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_way_that_the_refusal_names_merges(folder, tmp_path):
    adapted = with_adapter(whit.prepare_for_training(quantized(folder))).eval()
    adapted.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(quantized(folder).dequantize(), tmp_path).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**tiny_inputs("llama")).logits, adapted(**tiny_inputs("llama")).logits, rtol=1e-3, atol=1e-4
        )


def test_preparing_changes_nothing_that_is_saved(tmp_path):
    model = quantized(save_tiny(tmp_path / "plain", "llama-tied"))
    names = list(model.state_dict())
    prepared = whit.prepare_for_training(whit.prepare_for_training(model))
    assert list(prepared.state_dict()) == names
    prepared.load_state_dict(prepared.state_dict())
    prepared.save_pretrained(tmp_path / "saved")
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    total = whit.count_parameters(prepared)[1]
    assert whit.count_parameters(prepared)[0] == 0
    plain = copy.deepcopy(prepared).dequantize()
    assert sum(p.numel() + getattr(p, "ds_numel", 0) for p in plain.parameters()) == total  # as PEFT counts
    assert whit.count_parameters(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))[1] == total


def test_peft_counts_packed_weights_of_mistral(capsys):
    config = hf.MistralConfig()  # the defaults are Mistral-7B-v0.1
    with torch.device("meta"):
        model = hf.MistralForCausalLM(config).bfloat16()
    for target in find_targets(model):
        if not target.kept_by_default:
            format = whit.parse_format("nf4-dq")
            install(model, target, empty_packed(format, target.shape), Dtypes(torch.bfloat16))
    whit.prepare_for_training(model)
    options = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, options)
    adapted.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 13,631,488 || all params: 7,255,363,584 ||")
    assert whit.count_parameters(adapted) == (13_631_488, 7_255_363_584)
    copied = copy.deepcopy(adapted.base_model.model.model.layers[0].mlp.up_proj)
    assert sum(p.ds_numel for p in copied.parameters()) == 4096 * 14336


def test_what_cannot_be_prepared_is_said():
    with pytest.raises(whit.WhitError, match="not a transformers model"):
        whit.prepare_for_training(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gpt_neox"])
def test_gradients_of_other_architectures(tmp_path, architecture):
    model = quantized(save_tiny(tmp_path, architecture))
    plain = copy.deepcopy(model).dequantize()
    whit.prepare_for_training(model)
    for module in [*model.modules(), *plain.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found, wanted = gradients(with_adapter(model)), gradients(with_adapter(plain))
    assert found.keys() == wanted.keys()
    assert max(relative(found[name], wanted[name]) for name in found) < 1e-4
