"""whit memory: weights exact to the byte, known parameter counts, textbook rows, caches, training, what fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

import whit
from whit.errors import CheckpointError, RecipeError
from whit.memory import SHAPES, Planner, Situation, find_subject
from whit.memory.activations import Widths, saved_bytes
from whit.memory.subject import of_shape

from tiny_models import ARCHITECTURES, save_tiny, tiny_model

# The number of parameters that each model's own page on the hub says.
PUBLISHED = {
    "LLaMA-7B": 6_738_415_616, "LLaMA-13B": 13_015_864_320, "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248, "Llama-3-70B": 70_553_706_496, "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B": 46_702_792_704, "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648, "Gemma-2-2B": 2_614_341_888, "Gemma-2-9B": 9_241_705_984,
    "Phi-3-mini": 3_821_079_552, "Llama-3.2-1B": 1_235_814_400,
}  # fmt: skip


def config_alone(folder: Path, place: Path) -> str:
    """A folder with nothing in it but the model's config.json."""
    place.mkdir()
    shutil.copy(folder / "config.json", place / "config.json")
    return str(place)


def planner(model: str, **changes) -> Planner:
    return Planner(find_subject(model), Situation(**{"context": 64, **changes}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predicted_bytes_are_the_bytes_written_in_every_architecture(architecture: str, tmp_path: Path):
    folder = save_tiny(tmp_path / "model", architecture, torch.bfloat16)
    predicted = planner(config_alone(folder, tmp_path / "config")).weights("int4-g32").size_bytes
    whit.quantize(folder, tmp_path / "out", whit.Recipe(rules=[("*", "int4-g32")]))
    assert predicted == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("spec", ["int8", "int3-g64-asym", "int4-g32-asym-fz", "nf4-dq", "fp4", "fp8", "int1-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_the_bytes_written_in_every_kind_of_format(spec: str, dtype: torch.dtype, tmp_path: Path):
    folder = save_tiny(tmp_path / "model", "llama", dtype)
    rules = (("lm_head", "int8"), ("model.embed_tokens", "int4-g32"))
    predicted = planner(config_alone(folder, tmp_path / "config"), rules=rules).weights(spec)
    account = whit.quantize(folder, tmp_path / "out", whit.Recipe(rules=[("*", spec), *rules]))
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert (predicted.size_bytes, predicted.bits_per_weight) == (written, account.bits_per_weight)
    with_weights = planner(str(folder), rules=rules).weights(spec)
    assert with_weights.size_bytes == written


def test_the_table_of_shapes_has_the_published_numbers_of_parameters():
    assert {shape.name: of_shape(shape).parameters for shape in SHAPES if shape.name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("7B", (28, 14, 7, 3.5)), ("LLaMA-13B", (52, 26, 13, 6.5)), ("LLaMA-70B", (280, 140, 70, 35))],
)
def test_textbook_rows_are_the_known_gigabytes(name: str, gigabytes: tuple[float, ...]):
    rows = planner(name).textbook()
    assert tuple(row["weights_bytes"] / 1e9 for row in rows) == gigabytes


def test_names_are_found_however_they_are_spelt():
    for text in ("llama 7b", "LLaMA-7B", "7b", "huggyllama/llama-7b"):
        assert find_subject(text).name == "LLaMA-7B"
    assert find_subject("meta-llama/Meta-Llama-3-8B-Instruct".replace("Meta-Llama", "Llama")).name == "Llama-3-8B"
    unknown = find_subject("33.3B")
    assert not unknown.exists  # so that no command to run it with is proposed
    assert abs(unknown.parameters / 33.3e9 - 1) < 0.1
    assert "taken as a Llama" in unknown.notes[0]


def test_a_gguf_file_is_counted_as_it_runs(tmp_path: Path):
    whit.quantize("whit:model", tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q8_0")]), export="gguf")
    subject = find_subject(str(tmp_path / "m.gguf"))
    assert subject.parameters == find_subject("whit:model").parameters
    row = Planner(subject, Situation(context=64)).rows(())[0]
    assert (row.format, row.weights_bytes) == ("as stored", (tmp_path / "m.gguf").stat().st_size)
    assert not subject.notes  # it said that the file runs dequantized, as it once did


def test_what_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "model.pkl").write_bytes(b"")
    for name in (str(tmp_path / "model.pkl"), "./no/such/folder"):
        with pytest.raises(CheckpointError, match=r"; .*or give a name such as Llama-3-8B or a number such as 7B$"):
            find_subject(name)


def test_the_cache_counts_grouped_heads_windows_and_precision():
    dense = planner("Llama-3-8B", context=1000, batch=3)
    per_token = 32 * 8 * 128 * 2 * 2  # layers x kv_heads x head_dim x (keys, values) x bytes
    assert dense.need(dense.weights("bf16")).kv_cache_bytes == 3 * 1000 * per_token
    eighth = planner("Llama-3-8B", context=1000, cache_format="int8")
    scale = 32 * 8 * 2 * 4  # one float32 a head
    assert eighth.need(eighth.weights("bf16")).kv_cache_bytes == 1000 * (per_token // 2 + scale)
    gemma = planner("Gemma-2-9B", context=8192)
    one = 8 * 256 * 2 * 2
    assert gemma.need(gemma.weights("bf16")).kv_cache_bytes == 21 * one * 8192 + 21 * one * 4096
    with pytest.raises(RecipeError, match="not divisible by group_size 256"):
        planner("Llama-3-8B", cache_format="int4-g256")


def test_the_cache_is_what_transformers_holds():
    for architecture in ("llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "phi3"):
        model = tiny_model(architecture)
        cache = model(torch.zeros(2, 12, dtype=torch.long), use_cache=True).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        layers, _ = whit.memory.cache.cache_layers(model.config)
        assert whit.memory.cache.cache_bytes(layers, 12, 2, "auto", torch.float32) == held, architecture


def saved_by_autograd(layers: int, dtype: torch.dtype, **changes) -> int:
    """Bytes of every tensor that a forward pass over 64 tokens leaves for the backward pass, weights aside."""
    config = hf.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        intermediate_size=352,
        vocab_size=64,
        num_hidden_layers=layers,
        **changes,
    )
    model = hf.LlamaForCausalLM(config).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=torch.arange(64)[None], use_cache=False).logits.sum()
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_training_keeps_what_autograd_saves(dtype: torch.dtype, kv_heads: int):
    with torch.random.fork_rng():
        few, many = (saved_by_autograd(n, dtype, num_key_value_heads=kv_heads) for n in (1, 3))
    measured = (many - few) / 2 / 64  # bytes per layer and token
    shape = Widths(128, 352, 128, 32 * kv_heads, 64, 1, gated=True)
    assert 0.9 < saved_bytes(shape, dtype) / measured < 1.1


def test_training_bytes_by_hand():
    full = planner("7B", train="full")
    (checkpointing, plain) = full.rows(["bf16"])
    assert full.need(full.weights("bf16"), checkpointing=True).optimizer_bytes == 14 * 6_738_415_616
    assert checkpointing.activations_bytes < plain.activations_bytes / 4
    assert checkpointing.kv_cache_bytes == 0
    lora = planner("7B", train="qlora", rank=8)
    assert lora.rows(["nf4-dq"])[0].optimizer_bytes == 16 * 32 * 4 * 8 * (4096 + 4096)
    for train, spec in (("full", "nf4"), ("qlora", "bf16")):
        with pytest.raises(RecipeError, match=f"train {train}"):
            planner("7B", train=train).rows([spec])


def test_what_fits_is_the_best_and_the_longest():
    ask = planner("Llama-3.1-8B", context=2048, device="cuda")
    budget = 10 * 10**9
    fits = ask.fits(budget, ())
    assert fits[0].need.format == "int6-g64"  # int8 takes more
    for found in fits:
        weights = ask.weights(found.need.format)
        assert ask.need(weights, found.longest_context).total_bytes <= budget
        if found.longest_context < 131072:
            assert ask.need(weights, found.longest_context + 1).total_bytes > budget
    assert not ask.fits(10**9, ())


def test_the_command_line(whit: Callable[..., tuple[int, str, str]]):
    def run(*arguments: str) -> str:
        status, out, _ = whit("memory", *arguments)
        assert not status
        return out

    result = json.loads(
        run("7B", "--fit", "8GB", "--device", "cuda", "--json", "--format", "int4-g128", "--format", "bf16")
    )
    assert [row["format"] for row in result["rows"]] == ["int4-g128", "bf16"]
    for row in result["rows"]:
        parts = ("weights_bytes", "kv_cache_bytes", "activations_bytes", "optimizer_bytes", "overhead_bytes")
        assert row["total_bytes"] == sum(row[part] for part in parts)
    assert [found["format"] for found in result["fits"]] == ["int4-g128"]
    assert "whit quantize MODEL OUT --method gptq --format int4-g128" in result["next"][1]
    screen = run("LLaMA-13B", "--fit", "24GiB", "--context", "512")
    assert "FP32 52.00 GB" in screen
    assert "longest context" in screen
    assert "qlora" in run("13B", "--train", "qlora")


def test_models_that_are_quantized_already_have_a_row_as_they_are(tmp_path: Path):
    folder = save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    whit.quantize(folder, tmp_path / "out", whit.Recipe(rules=[("*", "nf4")]))
    row = planner(str(tmp_path / "out")).rows(())[0]
    assert row.format == "as stored"
    assert row.weights_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_formats_that_do_not_fit_are_noted_not_dropped(tmp_path: Path):
    config = hf.LlamaConfig(hidden_size=96, intermediate_size=96, num_attention_heads=2, num_hidden_layers=1)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    ask = planner(str(tmp_path))
    shown = {row.format for row in ask.rows(())}
    assert "int8-channel" in shown
    assert any(note.startswith("int4-g128 is left out: ") for note in ask.notes)
