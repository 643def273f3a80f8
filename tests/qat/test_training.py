"""End-to-end training: what is written is what was trained, a killed run goes on bit for bit, and it teaches."""

from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import whit
from forking import in_child
from tiny_text import word_tokenizer
from whit.cli import build_app
from whit.errors import OutputError, RecipeError, TrainingError
from whit.integrations.loading import load_causal_lm
from whit.qat import Course, Setting, Training, Words, prepare_full, train
from whit.qat.loop import Loop
from whit.qat.network import Network
from whit.qat.sampled import sample_windows
from written import weight_bytes

from tiny_models import save_tiny

TOKENS = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(0))
WORDS = Words(tokens=TOKENS)
QUICK = Course(steps=12, batch=4, rate=0.1, scale_rate=0.03)
MIXED = [
    ("*", "int2-g32"), ("*.0.mlp.*", "int3-g32-asym"), ("*.v_proj", "nf4-dq"), ("*.o_proj", "ternary"),
    ("*.down_proj", "q4_0"),
]  # fmt: skip


def full(model: Path, out: Path, course: Course = QUICK) -> Training:
    return prepare_full(model, out, whit.Recipe("rtn", MIXED), course, WORDS)


def test_the_packed_model_is_the_one_that_was_trained(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loops: list[Loop] = []
    init = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", lambda self, *args: (init(self, *args), loops.append(self))[0])
    course = Course(steps=12, batch=4, rate=0.1, scale_rate=0.03, kept_rate=0.01)
    account = train(full(model, tmp_path / "out", course))
    (loop,) = loops
    decoded = {name: value for one in loop.trained.values() for name, value in one.decode().items()}
    assert len(decoded) > 14  # kept ones too
    packed = load_causal_lm(str(tmp_path / "out"), dtype="float32")
    for name, module in packed.named_modules():
        if isinstance(module, whit.modules.PackedModule):
            assert torch.equal(module.dequantize(torch.float32), decoded[f"{name}.weight"]), name
    with torch.no_grad(), loop.network.holding(decoded):
        assert torch.equal(packed(TOKENS).logits, loop.network.run(TOKENS)[0])
    assert account.training is not None
    assert account.training["mode"] == "full"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no state, no start


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3_moe", "gemma3"])
def test_other_architectures(architecture: str, tmp_path: Path):
    model = save_tiny(tmp_path / "model", architecture)
    recipe = whit.Recipe("rtn", [("*", "int3-g32")])
    seen: list[float] = []
    training = prepare_full(model, tmp_path / "out", recipe, Course(steps=25, batch=8, rate=0.06), WORDS)
    train(training, lambda what, step, total, loss: seen.append(loss))
    assert seen[-1] < 0.9 * seen[0]
    assert load_causal_lm(str(tmp_path / "out"))(TOKENS[:1]).logits.isfinite().all()


def test_a_killed_run_goes_on_bit_for_bit(model: Path, tmp_path: Path):
    train(full(model, tmp_path / "whole" / "out"))

    def killed() -> None:
        def stop(what: str, step: int, total: int, loss: float) -> None:
            if step == 7:
                signal.raise_signal(signal.SIGKILL)

        train(full(model, tmp_path / "cut" / "out"), stop, save_every=0.0)

    assert in_child(killed) == -signal.SIGKILL
    assert (tmp_path / "cut" / ".out.training" / "state.safetensors").exists()
    steps: list[int] = []
    train(full(model, tmp_path / "cut" / "out"), lambda what, step, total, loss: steps.append(step))
    assert steps[0] == 7  # the kill came before step 7 was saved
    assert weight_bytes(tmp_path / "cut" / "out") == weight_bytes(tmp_path / "whole" / "out")


@pytest.mark.parametrize("key", [b'"step":"', b'"seconds":"', b"exp_avg"])
def test_a_damaged_state_is_one_sentence(key: bytes, model: Path, tmp_path: Path):
    def stop(what: str, step: int, total: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(full(model, tmp_path / "out"), stop, save_every=0.0)
    state = tmp_path / ".out.training" / "state.safetensors"
    content = state.read_bytes()
    place = content.index(key) + len(key)
    state.write_bytes(content[:place] + b"x" + content[place + 1 :])
    with pytest.raises(OutputError, match=r"state.safetensors: .* pass --restart to begin again$") as caught:
        train(full(model, tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_saved(model: Path, tmp_path: Path):
    train(full(model, tmp_path / "whole" / "out"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(what: str, step: int, total: int, loss: float) -> None:
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    try:
        with pytest.raises(OutputError, match="out: file too large; the result must fit; make room and run the same"):
            train(full(model, tmp_path / "cut" / "out"), fill, save_every=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "cut" / ".out.training").iterdir()] == ["state.safetensors"]
    steps: list[int] = []
    train(full(model, tmp_path / "cut" / "out"), lambda what, step, total, loss: steps.append(step))
    assert steps[0] == 7  # the disk was full before step 7 was saved
    assert weight_bytes(tmp_path / "cut" / "out") == weight_bytes(tmp_path / "whole" / "out")


def test_a_loss_that_is_not_finite_ends_the_run(model: Path, tmp_path: Path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) by step"):
        train(full(model, tmp_path / "out", replace(QUICK, kept_rate=1e30)))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_run_s_state_is_refused(model: Path, tmp_path: Path):
    def killed() -> None:
        train(full(model, tmp_path / "out"), lambda _, step, *__: step == 3 and signal.raise_signal(9), save_every=0.0)

    in_child(killed)
    with pytest.raises(OutputError, match=r"restart"):
        train(full(model, tmp_path / "out", Course(steps=13, batch=4)))


@pytest.mark.slow
def test_no_byte_depends_on_the_threads(model: Path, tmp_path: Path):
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        train(full(model, tmp_path / str(threads) / "out"))
    torch.set_num_threads(before)
    assert weight_bytes(tmp_path / "1" / "out") == weight_bytes(tmp_path / "3" / "out")


def test_the_start_is_in_the_formats_that_are_written(tmp_path: Path):
    """Those of a mix, and of rules with activations of their own; a rescaled start would be of other weights."""
    for rules, export in (
        ([("*", "q4_k_m")], "gguf"),
        ([("*", "int4-g32"), ("*q_proj", "w4a8-static"), ("*embed_tokens", "bands(int8-g64:9,int4-g64)")], "whit"),
    ):
        setting = Setting(export=export, calibration=whit.Calibration("whit:text", 2, 16))
        training = prepare_full("whit:model", tmp_path / "out", whit.Recipe("rtn", rules), QUICK, WORDS, setting)
        assert training.begin is not None
        written, begun = (
            {i.name: (i.format, i.activations) for i in j.plan.items} for j in (training.job, training.begin)
        )
        assert written == begun
        assert len({str(format) for format, _ in written.values()}) >= 3
    with pytest.raises(RecipeError, match="start awq: it rescales the weights"):
        prepare_full("whit:model", tmp_path / "out", whit.Recipe("awq", [("*", "int4-g64")]), QUICK, WORDS)


@pytest.mark.slow
def test_text_of_its_own(model: Path, tmp_path: Path):
    """Data-free: the windows are drawn from the unquantized model, the same for every number of threads."""
    words = Words("self", windows=8, context=16)
    for name in ("a", "b"):
        train(prepare_full(model, tmp_path / name, whit.Recipe("rtn", MIXED), Course(steps=3, batch=4), words))
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")


@pytest.mark.parametrize("mode", ["full", pytest.param("blocks", marks=pytest.mark.slow)])
def test_what_calibrates_the_start_is_of_the_model_s_own_text_too(
    mode: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without data: no code is chosen by another text than the one that the model has written."""
    used: list[torch.Tensor] = []
    feed = whit.pipeline.loop.BlockFeed
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: word_tokenizer())
    monkeypatch.setattr(whit.pipeline.loop, "BlockFeed", lambda job, method, calibration, *rest: (
        used.append(calibration.tokens), feed(job, method, calibration, *rest))[1])  # fmt: skip
    words = ["train", str(model), str(tmp_path / "out"), "--qat", mode, "--format", "int3-g32", "--text", "self"]
    words += ["--samples", "4", "--context", "24", "--steps", "2", "--batch", "2", "--seed", "3"]
    result = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    source = whit.pipeline.job.open_source(model)
    own = sample_windows(Network(source, source.read, torch.device("cpu"), torch.float32), 4, 24, 3)
    assert [torch.equal(tokens, own) for tokens in used] == [True]


def test_hidden_states_can_be_followed(model: Path, tmp_path: Path):
    course = Course(steps=15, batch=4, rate=0.08, scale_rate=0.03, distill=0.0, hidden=1.0)
    losses: list[float] = []
    train(full(model, tmp_path / "out", course), lambda what, step, total, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_bitnet_s_linears(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights of mean |w| in every step, inputs in 8 bits: the packed model computes what was trained."""
    loops: list[Loop] = []
    init = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", lambda self, *args: (init(self, *args), loops.append(self))[0])
    recipe = whit.Recipe("rtn", [("*", "ternary-tensor-absmean")], activations="int8")
    losses: list[float] = []
    course = Course(steps=15, batch=8, rate=0.03, fitted=True)
    training = prepare_full(model, tmp_path / "out", recipe, course, WORDS)
    train(training, lambda what, step, total, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]
    (loop,) = loops
    packed = load_causal_lm(str(tmp_path / "out"), dtype="float32")
    for name, one in loop.trained.items():
        weight = one.moving.master * one.moving.unit
        scale = weight.abs().mean()
        module = packed.get_submodule(name.removesuffix(".weight"))
        assert str(module.activations) == "int8"
        assert torch.allclose(
            module.dequantize(torch.float32), (weight / scale).round().clamp(-1, 1) * scale, rtol=1e-5
        )
    decoded = {name: value for one in loop.trained.values() for name, value in one.decode().items()}
    with torch.no_grad(), loop.network.holding(decoded):
        logits = loop.network.run(TOKENS)[0]
        assert torch.allclose(packed(TOKENS).logits, logits, atol=1e-3 * float(logits.abs().max()))
