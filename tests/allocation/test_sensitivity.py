"""What each group of matrices loses in each format: what is measured, against the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_budgets import TINY, TOKENS, undecided

import whit
from whit.allocation import (
    Group,
    free_formats,
    measure_divergence,
    measure_sensitivity,
    measured,
)
from whit.allocation.sensitivity import ROUNDING
from whit.calibration.capture import Watch
from whit.formats import parse_format
from whit.integrations.loading import load_causal_lm


def groups_of(model: Path, out: Path) -> tuple[Group, ...]:
    job = undecided(model, out, export="compressed-tensors")  # whose engines fuse
    names = [i.name for i in job.plan.items if i.target is not None and not i.target.kept_by_default]
    return measure_sensitivity(job, TOKENS, {name: tuple(map(parse_format, TINY)) for name in names})


def test_groups_are_what_reads_one_input_and_more_bits_lose_less(tiny: Path, tmp_path: Path):
    groups = groups_of(tiny, tmp_path / "out")
    short = [{name.split(".")[-2] for name in group.parameters} for group in groups[:4]]
    assert short == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    for group in groups:
        errors = list(group.errors.values())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] > 0
    assert groups == groups_of(tiny, tmp_path / "out")


def test_the_share_is_the_error_behind_the_block(tiny: Path, tmp_path: Path):
    """The probe's share against the whole model, with one matrix replaced and hidden states compared."""
    group = next(g for g in groups_of(tiny, tmp_path / "out") if g.parameters[0].endswith("1.mlp.down_proj.weight"))
    probe = parse_format(TINY[1])
    model = load_causal_lm(str(tiny), device="cpu", dtype="float32")
    weight = dict(model.named_parameters())[group.parameters[0]]
    behind: list[torch.Tensor] = []
    hook = lambda *call: behind.append(call[2][0] if isinstance(call[2], tuple) else call[2])  # noqa: E731
    model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        watch = Watch({"w": weight})
        with watch:
            for row in TOKENS:
                model(row[None])
        near = ROUNDING(weight.data, watch.stats().of("w")[0], probe).dequantize()
        exact = torch.stack(behind).double()
        behind.clear()
        weight.data.copy_(near)
        for row in TOKENS:
            model(row[None])
    lost = torch.stack(behind).double() - exact
    share = float((lost.square().sum(-1) / exact.square().sum(-1)).mean())
    assert group.errors[probe] == pytest.approx(share, rel=1e-3)


def test_the_divergence_is_that_of_the_whole_model(tiny: Path, tmp_path: Path):
    """Of a head, an embedding and a matrix in a block, each replaced in the plain model, every token's KL by hand."""
    job = undecided(tiny, tmp_path / "out")
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.v_proj.weight")
    wanted = {name: free_formats(job, TINY)[name] for name in names}
    groups = measure_divergence(job, TOKENS, wanted)
    model = load_causal_lm(str(tiny), device="cpu", dtype="float32")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        p = model(TOKENS).logits.double().log_softmax(-1)
        for group in groups:
            (name,) = group.parameters
            exact = parameters[name].data.clone()
            for format, error in group.errors.items():
                parameters[name].data.copy_(whit.quantize_tensor(exact, format).dequantize())
                q = model(TOKENS).logits.double().log_softmax(-1)
                assert error == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.01)
            parameters[name].data.copy_(exact)
    assert {group.parameters[0] for group in groups} == set(names)


def test_two_probes_say_nearly_what_every_format_does(tiny: Path, tmp_path: Path):
    job = undecided(tiny, tmp_path / "out")
    wanted = {
        n: f for n, f in free_formats(job, ("int2-g32", "int3-g32", "int4-g32", "int6-g32")).items() if ".0." in n
    }
    every, few = (measured(job, TOKENS, wanted, how) for how in ("kl", "probe"))
    for all_measured, two in zip(every, few, strict=True):
        errors, guesses = list(all_measured.errors.values()), list(two.errors.values())
        assert (errors[0], errors[2]) == (guesses[0], guesses[2])
        assert guesses[1] == pytest.approx(errors[1], rel=0.5)
