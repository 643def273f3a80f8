"""quantize, convert and inspect as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from whit import __version__ as version
from whit.formats import EXAMPLES

from tiny_models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cli") / "model", "llama", torch.bfloat16)


def test_quantize_inspect_and_back(whit, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    status, screen, notes = whit("quantize", model, out, "--format", "int4-g32", "--rule", "lm_head=int8")
    assert status == 0
    assert "bytes of weight files" in screen.splitlines()[0]  # not folded to the width of the table below
    assert "int8-channel" in screen
    assert "on disk; about" in notes.splitlines()[0]  # what it will take, before it starts
    assert notes.splitlines()[1].startswith("1/")  # plain lines where there is no terminal
    assert "was done already" in whit("quantize", model, out, "--format", "int4-g32", "--rule", "lm_head=int8")[1]
    status, screen, notes = whit("inspect", out, "--verify")
    assert status == 0
    assert "rtn, seed 0" in screen
    assert "kept: model.layers.*.input_layernorm.weight (2)" in screen
    assert "1 weight file, all as written" in notes
    status, screen, _ = whit("convert", out, tmp_path / "plain", "--export", "bf16")
    assert status == 0
    assert "largest relative error" in screen
    assert "lossless" in whit("convert", model, tmp_path / "same", "--export", "bf16")[1]
    assert "not quantized" in whit("inspect", model)[1]
    assert whit("convert", tmp_path / "plain", tmp_path / "again", "--export", "whit", "--format", "int8")[0] == 0


def test_an_empty_folder_is_no_result_and_names_are_what_they_are(whit, model: Path, tmp_path: Path):
    """What was just made was said to be "done already", with no word of what it would take; `:x:` became a picture."""
    out = tmp_path / "a:x: [b]"
    out.mkdir()
    status, screen, notes = whit("quantize", model, out, "--format", "int4-g32")
    assert status == 0
    assert "on disk; about" in notes
    assert f"{out}: " in screen.splitlines()[-1]
    assert "peak memory" in screen.splitlines()[-1]


def test_json_and_nothing_else(whit, model: Path, tmp_path: Path):
    status, screen, _ = whit("quantize", model, tmp_path / "out", "--format", "nf4", "--json", "--threads", "1")
    assert status == 0
    account = json.loads(screen)
    assert account == json.loads((tmp_path / "out/whit.json").read_text())
    assert json.loads(whit("inspect", tmp_path / "out", "--json")[1]) == {**account, "findings": []}
    facts = json.loads(whit("inspect", model, "--json")[1])
    assert facts["dtypes"]["BF16"]["tensors"] == facts["tensors"] == 21
    assert facts["quant_method"] is None
    torch.set_num_threads(2)


def test_a_dry_run_prints_the_plan_and_writes_nothing(whit, model: Path, tmp_path: Path):
    status, screen, _ = whit("quantize", model, tmp_path / "out", "--format", "int4-g32", "--dry-run")
    assert status == 0
    for part in ("model.layers.*.mlp.up_proj", "int4-g32", "kept: lm_head.weight: an output head", "of memory on cpu"):
        assert part in screen
    assert [cell.strip() for cell in next(x for x in screen.splitlines() if "lm_head" in x).split("│")][4] == "kept"
    plan = json.loads(whit("quantize", model, tmp_path / "out", "--format", "int4-g32", "--dry-run", "--json")[1])
    assert not list(tmp_path.iterdir())
    account = json.loads(whit("quantize", model, tmp_path / "out", "--format", "int4-g32", "--json")[1])
    assert plan["size_bytes"] == account["size_bytes"]
    assert [e["name"] for e in plan["parameters"]] == [e["name"] for e in account["parameters"]]


def test_rules_go_over_a_recipe_file_and_its_formats_may_not_be_given_twice(whit, model: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[method]\nname = "hqq"\n[[rules]]\nmatch = "*"\nformat = "int4-g32-asym-fz"\n')
    status, screen, _ = whit("quantize", model, tmp_path / "out", "--recipe", recipe, "--rule", "*.0.*=nf4", "--json")
    assert status == 0
    account = json.loads(screen)
    assert account["recipe"]["method"]["name"] == "hqq"
    assert {e["format"] for e in account["parameters"] if e["format"]} == {"int4-g32-asym-fz", "nf4"}
    assert whit("quantize", model, tmp_path / "out2", "--recipe", recipe, "--format", "nf4")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("quantize", "/no/such/model", "{out}"), 1, "no such folder"),
        (("quantize", "{model}", "{model}/out"), 1, "lies inside MODEL"),
        (("quantize", "{model}", "{out}", "--format", "int3-g65x"), 1, "is not a format"),
        (("quantize", "{model}", "{out}", "--format", "int4-g48"), 1, "not divisible by group_size 48"),
        (("quantize", "{model}", "{out}", "--method", "magic"), 1, "is not a method"),
        (("quantize", "{model}", "{out}", "--method", "gpqt"), 1, "blocks; did you mean gptq?"),
        (("quantize", "{model}", "{out}", "--export", "ggfu"), 1, "onnx; did you mean gguf?"),
        (("quantize", "{model}", "{out}", "--rule", "lm_head"), 2, "GLOB=SPEC"),
        (("quantize", "{model}", "{out}", "--rule", "nothing=int8"), 1, "matches no module"),
        (("quantize", "{model}"), 2, "OUT"),
        (("quantize", "{model}", "whit:model"), 1, "is a name of what ships with whit"),
        (("quantize", "{model}", "{out}", "--format", "int8", "--device", "tpu"), 1, "device tpu: unknown"),
        (("convert", "{model}", "{out}", "--export", "bf16", "--format", "int8"), 2, "bf16"),
        (("convert", "{model}", "{out}"), 2, "name the kind of file"),
        (("convert", "{model}", "{out}", "--export", "whit"), 1, "whit file needs a format"),
        (("inspect", "{model}", "--verify"), 1, "no whit.json"),
    ],
)
def test_mistakes_are_said_in_a_sentence(whit, model: Path, tmp_path: Path, arguments, status: int, said: str):
    typed = [a.format(model=model, out=tmp_path / "out") for a in arguments]
    found, screen, notes = whit(*typed)
    assert found == status
    assert said in " ".join(notes.replace("│", " ").split())
    assert "Traceback" not in notes + screen
    assert not list(tmp_path.iterdir())


def test_an_interrupt_says_how_to_go_on(whit, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("whit.cli.runs.run", interrupted)
    status, _, notes = whit("quantize", model, tmp_path / "out", "--format", "int8")
    assert status == 130
    assert notes.splitlines()[-1] == "whit: interrupted: run the same command again to go on from here"


def test_memory_that_ran_out_is_one_sentence(whit, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails_with(error: Exception) -> tuple[int, str, str]:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("whit.cli.runs.run", fail)
        return whit("quantize", model, tmp_path / "out", "--format", "int8")

    torchs = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: tried to allocate 256 bytes. Error")
    ours = MemoryError("the CPU kernel could not run (-3)")
    for error, said in ((torchs, "256 bytes more were asked for"), (ours, str(ours))):
        status, _, notes = fails_with(error)
        assert status == 1
        assert notes.splitlines()[-1].startswith(f"whit: out of memory ({said}); `whit memory MODEL` says")
    with pytest.raises(RuntimeError, match="another"):
        fails_with(RuntimeError("another"))


def test_the_version(whit):
    status, screen, _ = whit("--version")
    assert (status, screen) == (0, f"whit {version}\n")


def test_the_name_of_out_says_the_kind_of_file(whit, tmp_path: Path):
    status, _, notes = whit("quantize", "whit:model", tmp_path / "small.gguf", "--format", "q4_0")
    assert status == 0, notes
    assert (tmp_path / "small.gguf").read_bytes()[:4] == b"GGUF"
    assert whit("convert", "whit:model", tmp_path / "floats.gguf")[0] == 0
    assert "lossless" in whit("convert", tmp_path / "floats.gguf", tmp_path / "plain", "--export", "bf16")[1]


def test_help_lists_all_formats(whit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(whit("quantize", "--help")[1].replace("│", " ").split())
    assert all(spec in text for spec in EXAMPLES if "(" not in spec)
    assert all(
        said in text for said in ("[default: int4-g128,", "[default: 128]", "awq+gptq", "act_order", "asymmetric")
    )


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("--target-bpw", "inf"), 2, "must be a number above 0"),
        (("--target-bpw", "0"), 2, "must be a number above 0"),
        (("--target-size", "abc"), 1, "size 'abc': is not an amount of memory"),
        (("--fit", "-1GB"), 1, "size '-1GB': is not an amount of memory"),
        (("--seed", 1 << 64), 1, "does not fit into 64 bits; a seed must"),
    ],
)
def test_numbers_that_are_none_are_said_before_a_model_is_opened(whit, tmp_path: Path, options, status, said):
    found, _, notes = whit("quantize", tmp_path / "no-model", tmp_path / "out", *options)
    assert (found, said in " ".join(notes.replace("\u2502", "").split())) == (status, True)


def test_a_place_for_an_importance_matrix_is_looked_at_before_it_is_measured(whit, tmp_path: Path):
    (tmp_path / "there.gguf").write_bytes(b"")
    for name, said in (("there.gguf", "there.gguf: exists;"), ("there.gguf/x.gguf", "cannot be made")):
        status, _, notes = whit("imatrix", tmp_path / "no-model", tmp_path / name)
        assert (status, said in notes) == (1, True)


def test_a_seed_beyond_torchs_is_one_sentence(whit):
    status, _, notes = whit("generate", "whit:model", "--prompt", "Hi", "--seed", 10**23)
    assert (status, notes) == (
        1,
        f"whit: seed {10**23}: does not fit into 64 bits; a seed must; choose a smaller one\n",
    )


@pytest.mark.parametrize("command", [("compare", "{model}", "{out}"), ("inspect", "{model}", "--plots", "{out}")])
def test_a_report_where_nothing_can_be_written_is_refused(whit, model: Path, tmp_path: Path, command):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file/out", Path("/proc/out"))[: 2 if command[0] == "compare" else 1]:
        status, _, notes = whit(*(word.format(model=model, out=out) for word in command))
        assert (status, f"{out}: cannot be made (" in notes) == (1, True)


def test_a_comparison_of_nothing_is_refused(whit, model: Path, tmp_path: Path):
    status, _, notes = whit("compare", model, tmp_path / "out", "--candidates", " ,")
    assert (status, "names none" in notes, (tmp_path / "out").exists()) == (2, True, False)


def test_a_dry_run_draws_no_windows(whit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a window beyond the first, which says whether the text is long enough")

    monkeypatch.setattr("whit.calibration.tokens.torch.randint", refuse)
    wanted = ("quantize", "whit:model", tmp_path / "out", "--method", "gptq", "--format", "int4-g64", "--dry-run")
    status, screen, _ = whit(*wanted, "--samples", 10**8, "--context", 512)
    assert status == 0
    assert "26.21 TB of block inputs in files" in screen
