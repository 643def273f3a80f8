"""`whit generate`: continue a text, or answer one by a model that reads one text and writes another."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from whit.checkpoint.hub import at_revision
from whit.cli.console import print_json, say
from whit.cli.options import MODEL_HELP, AsJson, Device, Dtype, Revision, TrustRemoteCode
from whit.cli.quiet import quiet_transformers


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Stop after this many tokens.")] = 50,
    temperature: Annotated[float, typer.Option(help="Above 0; lower is more predictable.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability, (0, 1].")
    ] = 0.9,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    kv_cache: Annotated[str, typer.Option(metavar="SPEC", help="Keep keys and values in int8, int4-g32 ...")] = "",
    kv_recent: Annotated[int, typer.Option(min=0, help="With --kv-cache: the last N tokens stay in 16 bits.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Device = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Decode in compiled code, where the model is supported.")
    ] = True,
    prepared: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Keep the weights there as the CPU kernels use them; later starts only map the file."
        ),
    ] = "",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Write what is in --prepared again.")] = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    from whit.compiled import compile
    from whit.integrations.generation import Sampling, chat_prompt, writes_another
    from whit.integrations.generation import generate as continue_text
    from whit.integrations.loading import load_causal_lm, load_tokenizer

    model = at_revision(model, revision)
    quiet_transformers()
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, greedy, kv_cache, kv_recent)
    words = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    network = load_causal_lm(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, two_texts=True)
    alone = chat or writes_another(network)  # whether the answer is said without the prompt
    asked = chat_prompt(tokenizer, words) if chat else words
    streamer = None
    if not as_json and sys.stdout.isatty():
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=alone, skip_special_tokens=True)
    with warnings.catch_warnings(record=True) as said:
        if compiled:
            options: dict[str, Any] = {"prepared": prepared, "rebuild": rebuild} if prepared else {}
            compile(network, **options)
        result = continue_text(network, tokenizer, asked, sampling, streamer)
    _pass_on(said)
    if as_json:
        print_json(
            {
                "model": model, "prompt": words, "text": result.text, "prompt_tokens": result.prompt_tokens,
                "new_tokens": result.new_tokens, "seconds": result.seconds,
            }
        )  # fmt: skip
    elif streamer is None:
        print(result.text if alone else words + result.text)
    speed = f"{result.new_tokens} tokens in {result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s"
    say(speed)


def _pass_on(warned: list[warnings.WarningMessage]) -> None:
    """What `compile` leaves to transformers is said as a note; all else stays a warning."""
    for warning in warned:
        if str(warning.message).startswith("compile:"):
            say(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
