"""`whit generate` decodes in compiled code unless it is told not to, and says where it does not."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from whit.cli import build_app
from whit.kernels.cpu import library

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")
COMMAND = ["generate", "whit:model", "--prompt", "Once upon a time", "--max-new-tokens", "12", "--device", "cpu"]


def run(*options: str) -> tuple[str, str]:
    result = CliRunner().invoke(build_app(), [*COMMAND, *options, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["text"], result.stderr


@pytest.mark.parametrize("drawing", [["--greedy"], ["--seed", "3"]])
def test_the_text_is_the_same_compiled_or_not(drawing):
    text, said = run(*drawing, "--dtype", "float32")
    assert "compile:" not in said
    assert run(*drawing, "--dtype", "float32", "--no-compile")[0] == text


def test_what_is_not_covered_is_said():
    text, said = run("--greedy", "--kv-cache", "int8")
    assert "compile: the cache is a QuantizedCache, not a DynamicCache; transformers' own loop takes this call" in said
    assert text


def test_llama_cpp_users_type_short_options():
    words = ["generate", "whit:model", "-p", "Once upon a time", "-n", "3", "--greedy", "--json"]
    result = CliRunner().invoke(build_app(), words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["new_tokens"] == 3
