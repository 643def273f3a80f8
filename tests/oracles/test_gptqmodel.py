"""GPTQModel, through transformers, computes from whit's GPTQ and AWQ files what whit computes from them.

Transformers asks for optimum too. Neither is installed with its dependencies: they would bring another torch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf

import whit
from whit.integrations.loading import load_causal_lm

pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
pytest.importorskip("optimum", reason="transformers opens GPTQ files with optimum only")
pytestmark = pytest.mark.slow
CASES = [
    ("int2-g32", "gptq"), ("int3-g32", "gptq"), ("int4-g32", "gptq"), ("int8-g32", "gptq"), ("int3-channel", "gptq"),
    ("int2-g32-act", "gptq"), ("int3-g32-act", "gptq"), ("int4-g32-act", "gptq"), ("int8-g32-act", "gptq"),
    ("int4-g32-asym", "gptq-v2"), ("int8-g32-asym", "gptq-v2"), ("int2-g32-asym-act", "gptq-v2"),
    ("int3-g32-asym-act", "gptq-v2"), ("int4-g32-asym-act", "gptq-v2"), ("int8-g32-asym-act", "gptq-v2"),
    ("int4-g64-asym", "awq"), ("int4-g32", "awq"),
]  # fmt: skip
KERNELS = {"gptq": "TorchLinear", "gptq-v2": "TorchLinear", "awq": "AwqTorchLinear"}  # theirs that run on any processor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptqmodel") / "model"
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("format", "export"), CASES)
def test_gptqmodel_computes_our_logits_from_our_files(format: str, export: str, model: Path, tmp_path: Path):
    whit.quantize(model, tmp_path / "out", whit.Recipe(rules=[("*", format)]), export=export)
    backend = hf.AwqConfig(backend="torch_awq") if export == "awq" else None
    config = backend or hf.GPTQConfig(bits=int(format[3]), backend="gptq_torch")
    options = {"quantization_config": config, "device_map": "cpu", "dtype": torch.float16}
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    kinds = [type(module) for module in theirs.modules()]
    assert Counter(k.__name__ for k in kinds if k.__module__.startswith("gptqmodel.")) == {KERNELS[export]: 14}
    if export != "awq":
        index = theirs.model.layers[0].mlp.down_proj.g_idx
        assert bool((index.diff() < 0).any()) == format.endswith("-act")
    ours = load_causal_lm(str(tmp_path / "out"), device="cpu", dtype="float16")
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = theirs(tokens).logits.float(), ours(tokens).logits.float()
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-3  # both in float16
