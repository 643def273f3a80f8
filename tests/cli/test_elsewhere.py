"""Options of other programs are answered with what says the same here; exit status 2, as for all wrong usage."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from whit.cli import build_app


def said(words: str) -> str:
    result = CliRunner().invoke(build_app(), words.split(), env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("quantize M OUT --bits 4", "No such option: --bits; the format says it: --format int4-g128"),
        ("quantize M OUT --bits=3 --group-size 64 --sym False", "--format int3-g64-asym"),
        ("quantize M OUT --wbits 4 --groupsize -1", "--format int4-channel"),
        ("quantize M OUT --bits 16", "--format bf16"),
        ("quantize M OUT --bits 99", "--format int4-g128"),
        ("quantize M OUT --bits", "--format int4-g128"),
        ("convert M OUT --bits 8", "--format int8"),
        ("train M OUT --load-in-4bit", "--format nf4"),
        ("merge M A OUT --bits 2", "--format int2-g32"),
        ("finetune M D OUT --load_in_8bit", "--format int8"),
        ("compare M OUT --bits 4", "the format says it: --candidates int4-g128"),
        ("memory 7B --q-bits 4 --q-group-size 32", "--format int4-g32"),
        ("quantize M OUT Q4_K_M", "Got unexpected extra argument(s) (Q4_K_M); write --format q4_k_m"),
        ("quantize -m M -o OUT", "No such option: -m; MODEL is typed without an option: whit quantize MODEL OUT"),
        ("quantize M --output-dir OUT", "OUT is typed without an option: whit quantize MODEL OUT"),
        ("quantize M OUT --nsamples 4", "it is --samples here"),
        ("generate M -p x --max-tokens 3", "it is --max-new-tokens here"),
    ],
)
def test_what_other_programs_call_it(words: str, expected: str):
    assert expected in said(words)


def test_other_words_keep_their_answers():
    assert "No such option: --formt (Possible options:" in said("quantize M OUT --formt int8")
    assert "extra argument(s) (more)" in said("quantize M OUT more")
    assert "the format says it" not in said("evaluate M --bits 4")
