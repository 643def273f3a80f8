"""ONNX Runtime computes from whit's ONNX files what whit computes from the same codes: a prompt, then one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import whit
from whit.integrations.loading import load_causal_lm

from tiny_models import DECODER, save_tiny

pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
SYMMETRIC = [("*", "int4-g32-f32")]
ASYMMETRIC = [("*", "int4-g16-asym-f32"), ("*mlp*", "int8-g64-asym-f32"), ("lm_head", "int8-g32-f32")]
MIXED = [
    ("*", "int2-g32-asym-f32"),
    ("*v_proj", "int2-g16-f32"),
    ("*o_proj", "bf16"),
    ("*embed_tokens", "int4-g32-f32"),
]
CASES = [
    ("llama", SYMMETRIC), ("llama", ASYMMETRIC), ("llama", MIXED), ("llama-tied", SYMMETRIC), ("llama-tied", MIXED),
    ("mistral", ASYMMETRIC), ("qwen2", SYMMETRIC), ("qwen2", MIXED), ("qwen3", ASYMMETRIC),
]  # fmt: skip


def check(model: Path, rules: list[tuple[str, str]], folder: Path, most: float) -> None:
    recipe = whit.Recipe(rules=rules)
    account = whit.quantize(model, folder / "onnx", recipe, export="onnx")
    assert account.decoded is not None
    assert account.decoded["largest_error"] == 0
    whit.quantize(model, folder / "whit", recipe)
    ours = load_causal_lm(str(folder / "whit"), device="cpu", dtype="float32")
    tokens = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompt = ours(tokens, use_cache=True)
        wanted = (prompt.logits, ours(tokens[:, :1], past_key_values=prompt.past_key_values).logits)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    theirs = ort.InferenceSession(str(folder / "onnx/model.onnx"), options, providers=["CPUExecutionProvider"])
    past = {node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32) for node in theirs.get_inputs()[2:]}
    for step, expected in zip((tokens, tokens[:, :1]), wanted, strict=True):
        seen = next(iter(past.values())).shape[2] + step.shape[1]
        inputs: dict[str, Any] = {"input_ids": step.numpy(), "attention_mask": np.ones((1, seen), np.int64), **past}
        logits, *present = theirs.run(None, inputs)
        past = dict(zip(past, present, strict=True))
        assert (np.abs(logits - expected.numpy()).max() / np.abs(logits).max()).item() < most


@pytest.mark.parametrize(("architecture", "rules"), CASES)
def test_onnx_runtime_computes_our_logits(architecture: str, rules: list[tuple[str, str]], tmp_path: Path):
    save_tiny(tmp_path / "model", architecture, torch.bfloat16)
    check(tmp_path / "model", rules, tmp_path, 3e-6)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
TURNS = [
    (hf.LlamaConfig, {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    (hf.LlamaConfig, {"rope_parameters": YARN}),
    (hf.MistralConfig, {"sliding_window": 5}),
    (hf.Qwen2Config, {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("kind", "more"), TURNS)
def test_rotary_scaling_windows_and_biases(kind: Any, more: dict[str, Any], tmp_path: Path):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(kind(**DECODER, **more))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    check(tmp_path / "model", SYMMETRIC, tmp_path, 3e-6)


@pytest.mark.shared
@pytest.mark.slow
def test_onnx_runtime_computes_our_logits_of_the_real_model(shared: Path, tmp_path: Path):
    rules = [("*", "int4-g32-f32"), ("*down_proj", "int8-g32-asym-f32")]
    check(shared / "models/smollm2-135m-fp", rules, tmp_path, 1e-4)
