"""Embeddings and heads in bands of rows, end to end: written, counted, loaded, found by a budget and replayed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

import whit
from tiny_text import word_tokenizer, write_words
from whit import Calibration, Options, Recipe, quantize
from whit.allocation import Group, budgeted, free_formats, measure_divergence, measured, solve
from whit.allocation.tables import SHARES, banded_format, bands_for, bytes_of_band, ranked
from whit.compiled.llama import Compiled
from whit.errors import RecipeError, WhitError
from whit.export import EXPORTERS
from whit.formats import parse_format
from whit.formats.bands import bands_of
from whit.integrations.loading import load_causal_lm
from whit.kernels.cpu import library
from whit.layouts import BITS
from whit.pipeline.job import Job, open_source, prepare

pytest.importorskip("scipy")
VOCABULARY = 512
SPEC = "bands(int8-g32:32,int4-g32:96,int2-g32)"
LADDER = ("int2-g32-asym", "int4-g32", "int8-g32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Words by Zipf's law, in an order of ranks that is not that of their numbers."""
    draw = torch.Generator().manual_seed(7)
    chances = 1 / torch.arange(1, VOCABULARY, dtype=torch.float64)
    words = torch.randperm(VOCABULARY - 1, generator=draw)[torch.multinomial(chances, 4000, True, generator=draw)] + 1
    path = write_words(tmp_path_factory.mktemp("text"), words.tolist())
    return Calibration(path, samples=8, context=48)


@pytest.fixture(autouse=True)
def _tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whit.pipeline.job.load_tokenizer", lambda *_, **__: word_tokenizer(VOCABULARY))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder: Path = tmp_path_factory.mktemp("bands") / "model"
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=request.param,
        initializer_range=0.2,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def undecided(model: Path, text: Calibration, out: Path, export: str = "whit") -> Job:
    return prepare(model, out, Recipe("gptq", [("*", "bf16")]), Options(), text, export)


def test_a_table_in_bands_is_written_counted_and_loaded(model: Path, text: Calibration, tmp_path: Path):
    tied = _is_tied(model)
    names = ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head")
    recipe = Recipe("gptq", [("*", "int4-g32"), *((name, SPEC) for name in names)])
    account = quantize(model, tmp_path / "out", recipe, calibration=text)
    entry = next(e for e in account.parameters if e.name == "model.embed_tokens.weight")
    assert entry.format == SPEC
    bits = (32 * 8.5 + 96 * 4.5 + 384 * 2.5) / 512 + 2 / 64
    assert entry.bits_per_weight == pytest.approx(bits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    source = open_source(tmp_path / "out")
    plain = load_causal_lm(str(model), device="cpu", dtype="float32")
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(source.read(source.tied.get(name, name)))
    tokens = torch.arange(VOCABULARY).reshape(8, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=2e-3, atol=2e-3)
    loaded.save_pretrained(tmp_path / "again")
    again = open_source(tmp_path / "again").checkpoint
    stored = source.checkpoint
    assert all(torch.equal(again[name], stored[name]) for name in stored if "band" in name)
    use = torch.bincount(prepare(model, tmp_path / "x", recipe, Options(), text).calibration.tokens.flatten())  # type: ignore[union-attr]
    best = use.argsort(descending=True, stable=True)[:32]
    module = loaded.lm_head if tied else loaded.model.embed_tokens
    packed = (module if hasattr(module, "packed") else module.source).packed
    assert set((BITS.unpack(packed).codes[0] == 0).nonzero().flatten().tolist()) == set(best.tolist())


@pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_decoding_of_a_table_in_bands(model: Path, text: Calibration, dtype: torch.dtype, tmp_path: Path):
    """The tokens of the model's own loop, and its logits whatever the number of threads."""
    names = ("embed_tokens",) if _is_tied(model) else ("embed_tokens", "lm_head")
    recipe = Recipe("rtn", [("*", "int8-g32"), *((f"*{name}", "bands(int8-g32:35,int4-g32:93,nf4)") for name in names)])
    quantize(model, tmp_path / "out", recipe, calibration=text)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    prompts = [torch.randint(3, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(n)) for n in (1, 7)]
    how = {"max_new_tokens": 20, "do_sample": False}
    expected = [loaded.generate(ids, **how) for ids in prompts]
    whit.compile(loaded, strict=True)
    for ids, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(loaded.generate(ids, **how), tokens)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            compiled = Compiled(loaded, library())  # type: ignore[arg-type]
            decoder = compiled.decoder(compiled.room(4))
            decoder.decode(5, 0, 1)
            found.append(decoder.logits.clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    with torch.no_grad():
        exact = loaded(torch.tensor([[5]])).logits[0, -1]
    near = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found[0], exact, rtol=near, atol=near)


def _is_tied(model: Path) -> bool:
    return not (model / "config.json").read_text().count('"tie_word_embeddings": false')


def test_a_budget_gives_much_used_rows_more_bits(model: Path, text: Calibration, tmp_path: Path):
    """The size is met from below, the same request gives the same recipe, and it is replayed byte for byte."""
    job = undecided(model, text, tmp_path / "none")
    assert job.calibration is not None
    size = int(4.2 * job.plan.parameters / 8)
    found = budgeted(job, size, job.calibration, LADDER, "hessian")
    bands = bands_of(found.plan.formats["model.embed_tokens"])
    assert bands is not None
    bits = [format.bits for format, _ in bands.parts]
    assert bits == sorted(bits, reverse=True)
    assert 0.97 * size < found.plan.size_bytes <= size
    assert budgeted(job, size, job.calibration, LADDER, "hessian").recipe == found.recipe
    assert Recipe.from_dict(found.recipe.to_dict()) == found.recipe
    for name in ("one", "two"):
        quantize(model, tmp_path / name, Recipe.from_dict(found.recipe.to_dict()), calibration=text)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) == found.plan.size_bytes


@pytest.mark.parametrize("model", [True], indirect=True, ids=["tied"])
def test_the_divergence_of_a_band_is_that_of_its_rows(model: Path, text: Calibration, tmp_path: Path):
    """Against the plain model with these rows replaced, in the embedding and in the head tied to it."""
    job = undecided(model, text, tmp_path / "none")
    assert job.calibration is not None
    name, tokens = "model.embed_tokens.weight", job.calibration.tokens
    wanted = {name: free_formats(job, LADDER)[name]}
    groups = measured(job, tokens, wanted, "kl")
    assert [g.band for g in groups] == list(pairwise([0, *(VOCABULARY // share for share in SHARES)]))
    assert all(Group.named(g.name, g.errors) == g for g in groups)
    plain = load_causal_lm(str(model), device="cpu", dtype="float32")
    exact = plain.model.embed_tokens.weight.data.clone()
    low = parse_format(LADDER[0])
    some = measure_divergence(job, tokens, wanted, probes=2 * tokens.shape[1])  # ranks of the other samples
    for found, probed, others in (
        (groups, tokens, tokens),
        (some, tokens[:2], tokens[2:]),
    ):  # ranks of what is not probed
        rank = torch.bincount(others.flatten(), minlength=VOCABULARY).argsort(descending=True, stable=True)
        with torch.no_grad():
            p = plain(probed).logits.double().log_softmax(-1)
            for group in found:
                rows = rank[slice(*group.band)]  # type: ignore[misc]
                plain.model.embed_tokens.weight.data[rows] = whit.quantize_tensor(exact[rows], low, "clip").dequantize()
                q = plain(probed).logits.double().log_softmax(-1)
                assert group.errors[low] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.01)
                plain.model.embed_tokens.weight.data.copy_(exact)
    few = measured(job, tokens, wanted, "probe")
    for every, two in zip(groups, few, strict=True):
        assert two.errors[low] == every.errors[low]
        guessed, real = (found.errors[parse_format("int8-g32")] for found in (two, every))
        assert 1 / 3 < guessed / real < 3


def test_bands_of_one_format_are_one_and_their_bytes_add_up(model: Path, text: Calibration, tmp_path: Path):
    low, middle = (parse_format(spec) for spec in LADDER[:2])
    assert banded_format([((0, 8), low), ((8, 32), low)]) == low
    assert str(banded_format([((0, 8), middle), ((8, 32), low), ((32, 64), low)])) == f"bands({middle}:8,{low})"
    job = undecided(model, text, tmp_path / "none")
    item = next(item for item in job.plan.items if item.name == "model.embed_tokens.weight")
    bands = bands_for(job, item, (low, middle))
    sizes = [bytes_of_band(job, item, low, band) for band in bands]
    assert sum(sizes) == sum(spec.nbytes for spec in BITS.specs(low, (VOCABULARY, 64)).values())
    for other in ("bf16", "int2-g32+r4", SPEC):
        assert bands_for(job, item, (low, parse_format(other))) == ()
    assert bands_for(job, next(i for i in job.plan.items if "q_proj" in i.name), (low, middle)) == ()
    assert ranked(torch.tensor([3, 1, 3, 1, 0]), 4).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("model", [True], indirect=True, ids=["tied"])
def test_a_method_without_data_reads_text_for_bands_alone(model: Path, text: Calibration, tmp_path: Path):
    """And a table has one method, that of the least errors."""
    job = prepare(model, tmp_path / "none", Recipe("rtn", [("*", "bf16")]), Options())
    tokens = undecided(model, text, tmp_path).calibration
    assert tokens is not None
    ladder = (*LADDER, f"clip:{LADDER[0]}")
    found = budgeted(job, int(4.2 * job.plan.parameters / 8), tokens, ladder, "hessian")
    assert bands_of(found.plan.formats["model.embed_tokens"]) is not None
    method = found.recipe.method_for("model.embed_tokens")
    assert method is not None
    assert method.name == "clip"
    assert found.recipe.needs_text
    assert not found.recipe.needs_stats
    account = quantize(model, tmp_path / "out", found.recipe, calibration=text)
    assert account.calibration is not None
    assert all(entry.proxy_loss is None for entry in account.parameters)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == found.plan.size_bytes


@pytest.mark.parametrize("model", [True], indirect=True, ids=["tied"])
def test_solve_uses_bands_like_any_group(model: Path, text: Calibration, tmp_path: Path):
    """Against trying everything: five bands and nothing else free."""
    job = undecided(model, text, tmp_path / "none")
    low, high = (parse_format(spec) for spec in ("int2-g32-asym", "int8-g32"))
    blocks = [Group((name,), {low: 0.0}) for name in free_formats(job, LADDER) if "layers" in name]
    ranges = list(pairwise([0, *(VOCABULARY // share for share in SHARES)]))
    groups = [
        Group(("model.embed_tokens.weight",), {low: 1.0 / (1 + i), high: 0.01}, band=band)
        for i, band in enumerate(ranges)
    ]
    item = next(item for item in job.plan.items if item.name == "model.embed_tokens.weight")
    largest = solve(job, [*groups, *blocks], 10**9)
    assert largest.error == pytest.approx(0.05)
    size = largest.plan.size_bytes - 12_000
    found = solve(job, [*groups, *blocks], size)
    fixed = found.plan.size_bytes - sum(
        bytes_of_band(job, item, f, band) for band, f in zip(ranges, _chosen(found.plan, ranges), strict=True)
    )
    best = min(
        sum(g.errors[f] for g, f in zip(groups, pick, strict=True))
        for pick in _all_picks(low, high)
        if fixed + sum(bytes_of_band(job, item, f, b) for b, f in zip(ranges, pick, strict=True)) <= size
    )
    assert found.error == pytest.approx(best)


def _chosen(plan, ranges):
    bands = bands_of(plan.formats["model.embed_tokens"])
    assert bands is not None
    ends = [sum(bands.counts(VOCABULARY)[: i + 1]) for i in range(len(bands.parts))]
    return [bands.parts[next(i for i, end in enumerate(ends) if last <= end)][0] for _, last in ranges]


def _all_picks(low, high):
    return [[high if number >> i & 1 else low for i in range(len(SHARES))] for number in range(1 << len(SHARES))]


@pytest.mark.parametrize("model", [True], indirect=True, ids=["tied"])
def test_what_cannot_have_bands_is_said(model: Path, text: Calibration, tmp_path: Path):
    for rules, what in (
        ([("*", SPEC)], "q_proj and 6 others .*: bands.* for no table"),
        ([("*", "int4-g32"), ("model.embed_tokens", "bands(int8-g32:600,int2-g32)")], "at least 601"),
    ):
        with pytest.raises(RecipeError, match=what):
            quantize(model, tmp_path / "out", Recipe("gptq", rules), calibration=text)


@pytest.mark.parametrize("model", [True], indirect=True, ids=["tied"])
@pytest.mark.parametrize("export", [e.name for e in EXPORTERS if e.name not in ("whit", "bf16")])
def test_files_that_cannot_hold_bands_say_so(model: Path, text: Calibration, export: str, tmp_path: Path):
    base = {"bitsandbytes": "nf4", "compressed-tensors-int8": "int8", "gguf": "q4_0", "hqq": "int4-g32-asym-fz"}
    recipe = Recipe("gptq", [("*", base.get(export, "int4-g32-asym")), ("model.embed_tokens", SPEC)])
    with pytest.raises(WhitError) as refusal:
        quantize(model, tmp_path / "out", recipe, calibration=text, export=export)
    assert not (tmp_path / "out").exists()
    assert all(len(line.split()) > 4 for line in str(refusal.value).splitlines())
