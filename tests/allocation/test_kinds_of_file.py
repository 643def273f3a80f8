"""A budget's recipe in every kind of file that can mix formats: written, and read back by that file's reader."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers as hf

from whit import Options, Recipe
from whit.allocation import budgeted, free_formats, ladder_of
from whit.calibration import CalibrationTokens
from whit.checkpoint.reader import read_json
from whit.export import exporter_named
from whit.formats import parse_format
from whit.pipeline import run
from whit.pipeline.job import Job, open_source, prepare

pytest.importorskip("scipy")
TOKENS = CalibrationTokens.of(torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0)))
KINDS = {  # bits per weight that lie between two formats of each
    "whit": 3.4, "gptq": 6.4, "gptq-v2": 6.4, "compressed-tensors": 6.6, "mlx": 4.4, "gguf": 4.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As narrow as superblocks allow, and with rows of the feed-forward that no superblock divides."""
    folder = tmp_path_factory.mktemp("kinds") / "model"
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    network = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for block, scale in zip(network.model.layers, (4.0, 1.0), strict=True):  # so that one matters more
            for name, parameter in block.named_parameters():
                parameter.mul_(scale if parameter.dim() == 2 and "v_proj" not in name else 1.0)
    network.to(torch.bfloat16).save_pretrained(folder)
    return folder


def undecided(model: Path, out: Path, kind: str) -> Job:
    return prepare(model, out, Recipe(None, [("*", "bf16")]), Options(device="cpu"), export=kind)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "gptq-v2" else k for k in KINDS])
def test_formats_of_the_recipe_are_those_of_the_file(kind: str, model: Path, tmp_path: Path):
    job = undecided(model, tmp_path / "none", kind)
    size = int(KINDS[kind] * job.plan.parameters / 8)
    found = budgeted(job, size, TOKENS, measure="hessian")
    assert 0.98 * size < found.plan.size_bytes <= size
    planned = {i.name: str(i.format) for i in found.plan.items if i.format is not None}
    assert len(set(planned.values())) > 1
    assert set(planned) == set(free_formats(job, ladder_of(job)))
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    account = run(prepare(model, out, Recipe.from_dict(found.recipe.to_dict()), Options(device="cpu"), export=kind))
    assert account.decoded is None or account.decoded["largest_error"] < 1e-6
    written = {e.name: e.format for e in account.parameters if e.status == "quantized"}
    assert written == planned
    _read_back(kind, out, planned)
    blocks = defaultdict(set)
    for name, form in planned.items():
        for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if name.split(".")[-2] in members:
                blocks[name.split(".")[2], members].add(form)
    if exporter_named(kind).fuses:
        assert all(len(forms) == 1 for forms in blocks.values())


def _read_back(kind: str, out: Path, planned: dict[str, str]) -> None:
    """By gguf-py and compressed-tensors' own configuration where they are installed, by whit's readers otherwise."""
    if kind == "gguf":
        gguf = pytest.importorskip("gguf")
        counts, wanted = defaultdict(int), defaultdict(int)
        for tensor in gguf.GGUFReader(out).tensors:
            counts[tensor.tensor_type.name.lower()] += 1
        for form in planned.values():
            wanted[form] += 1
        assert {form: counts[form] for form in wanted} == wanted
        return
    if kind == "compressed-tensors":
        quantization = pytest.importorskip("compressed_tensors.quantization")
        said = quantization.QuantizationConfig.model_validate(read_json(out / "config.json")["quantization_config"])
        bits = {f"{m}.weight": g.weights.num_bits for g in said.config_groups.values() for m in g.targets}
        assert bits == {name: int(form[3]) for name, form in planned.items()}
    source = open_source(out)
    near = {name: source.format(name) for name in planned}  # type: ignore[union-attr]
    wanted = {name: parse_format(form) for name, form in planned.items()}
    # their readers do not tell all scales' types
    assert {n: (f.bits, f.group_size) for n, f in near.items()} == {
        n: (f.bits, f.group_size) for n, f in wanted.items()
    }
