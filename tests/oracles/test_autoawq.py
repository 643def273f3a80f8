"""AutoAWQ's own unpacking restores from whit's AWQ files the weights that whit reads from them.

Its package imports model classes that transformers no longer has; the file that unpacks needs nothing but torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import whit
from whit.checkpoint.reader import read_json
from whit.pipeline.job import open_source

from tiny_models import save_tiny

SPEC = importlib.util.find_spec("awq")
pytestmark = pytest.mark.skipif(SPEC is None, reason="autoawq is not installed")
TENSORS = ("qweight", "qzeros", "scales")


@pytest.fixture(scope="module")
def packing() -> ModuleType:
    """awq.utils.packing_utils, without the package around it."""
    assert SPEC is not None
    assert SPEC.submodule_search_locations is not None
    file = Path(SPEC.submodule_search_locations[0]) / "utils/packing_utils.py"
    spec = importlib.util.spec_from_file_location("autoawq_packing", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("format", ["int4-g32-asym", "int4-g32", "int4-g64-asym"])
def test_it_restores_every_weight(format: str, packing: ModuleType, tmp_path: Path):
    save_tiny(tmp_path / "model", "llama", torch.float16)
    whit.quantize(tmp_path / "model", tmp_path / "out", whit.Recipe(rules=[("*", format)]), export="awq")
    tensors, source = load_file(tmp_path / "out/model.safetensors"), open_source(tmp_path / "out")
    said = read_json(tmp_path / "out/config.json")["quantization_config"]
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        stored = [tensors[f"{module}.{key}"] for key in TENSORS]
        found = packing.dequantize_gemm(*stored, said["bits"], said["group_size"])
        assert found.dtype == torch.float16
        assert torch.equal(found.T.float(), source.read(f"{module}.weight").to(torch.float16).float())
