"""`whit finetune`: an adapter on top of a model's weights, packed or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from whit.checkpoint.hub import at_revision, hub_name
from whit.checkpoint.work import is_done
from whit.cli.console import console, print_json, say
from whit.cli.options import AsJson, Device, DryRun, Restart, Revision, Seed, TrustRemoteCode
from whit.cli.quiet import quiet_transformers
from whit.cli.training import Progress, sentence, show_plan
from whit.devices import find_device
from whit.memory.tuning import estimate_tuning
from whit.pipeline.job import Options
from whit.spoken import size
from whit.training.init import METHODS as INITS
from whit.training.optimizers import BITSANDBYTES, TORCHAO
from whit.training.ranks import Ranks
from whit.training.settings import DEFAULT_INIT, DTYPES, Tuning

DATA_HELP = "JSON lines: `prompt` and `response`, or `messages`."
TARGET_HELP = "Linears to adapt, by name: q_proj,k_proj,...; or all-linear (the head left out)."
HELD_OUT_HELP = "Score the examples of this file, instead of a share of DATA."
INIT_HELP = (
    "Start the adapter from zero, or from what quantization lost: in the weights (loftq) or in outputs on DATA (data)."
)
METHOD_HELP = (
    "How MODEL is quantized: rtn, clip, hqq; or gptq, refine, ..., which use DATA and write OUT/base, the model that "
    "the adapter belongs to. \\[default: rtn]"
)
OPTIMIZER_HELP = (
    f"adamw is torch's; {', '.join(BITSANDBYTES)} are bitsandbytes', {', '.join(TORCHAO)} torchao's. Where "
    "bitsandbytes' do not run, torchao's or torch's take their place, and the run says so."
)
STEPS_HELP = "This many steps of --batch x --accumulate rows each, instead of --epochs; DATA is repeated as needed."
TOO_LONG_HELP = "Examples longer than --context: cut their ends, drop them, or refuse the file."

PATIENCE = timedelta(days=1)  # the others wait while the first process quantizes by a method that takes its time


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or whit:model; quantized or not.")],
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help=DATA_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's new folder, as PEFT loads it.")],
    format: Annotated[str | None, typer.Option(metavar="SPEC", help="Quantize a full-precision MODEL first.")] = None,
    method: Annotated[str | None, typer.Option(help=METHOD_HELP)] = None,
    init: Annotated[str, typer.Option(metavar="|".join((DEFAULT_INIT, *INITS)), help=INIT_HELP)] = DEFAULT_INIT,
    rank: Annotated[int, typer.Option(help="Rank of the adapter's factors.")] = 16,
    alpha: Annotated[float, typer.Option(help="The adapter's product is multiplied by alpha / rank.")] = 8.0,
    target: Annotated[str, typer.Option(metavar="NAMES", help=TARGET_HELP)] = "all-linear",
    dropout: Annotated[float, typer.Option(help="Dropout of the adapter's inputs.")] = 0.0,
    dora: Annotated[bool, typer.Option("--dora", help="Weight-decomposed adapter (DoRA).")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    epochs: Annotated[float, typer.Option(help="How often DATA is gone through.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help=STEPS_HELP)] = None,
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches per step, over all processes.")] = 4,
    context: Annotated[int | None, typer.Option(help="Tokens in a row. \\[default: 1024, or the model's]")] = None,
    packing: Annotated[bool, typer.Option(help="Fill rows with several examples, which do not see each other.")] = True,
    too_long: Annotated[str, typer.Option(metavar="cut|drop|refuse", help=TOO_LONG_HELP)] = "cut",
    learning_rate: Annotated[
        float, typer.Option(help="The highest learning rate; a cosine follows the warm-up.")
    ] = 2e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the adapter.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: no limit.")] = 1.0,
    optimizer: Annotated[str, typer.Option(help=OPTIMIZER_HELP)] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option(help="Compute blocks again in the backward pass; saves memory.")
    ] = True,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES) + ".")] = "auto",
    holdout: Annotated[float, typer.Option(help="Share of the examples that are scored, not trained on.")] = 0.05,
    held_out: Annotated[Path | None, typer.Option(metavar="FILE", help=HELD_OUT_HELP)] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between scores. \\[default: ten in a run]")] = None,
    shard: Annotated[bool, typer.Option("--shard", help="Spread packed weights over the processes.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    from whit.tuning import prepare_tuning, run_tuning

    model = at_revision(model, revision)
    quiet_transformers()
    if threads is not None:
        torch.set_num_threads(threads)
    tuning = Tuning(
        format=format, method=method, init=init, rank=rank, alpha=alpha,
        targets=tuple(filter(None, target.split(","))), dropout=dropout, dora=dora, rslora=rslora, epochs=epochs,
        steps=steps, batch=batch, accumulate=accumulate, context=context, packing=packing, too_long=too_long,  # type: ignore[arg-type]
        learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay, clip=clip, optimizer=optimizer,
        checkpointing=checkpointing, dtype=dtype, holdout=holdout, evaluate_every=evaluate_every, shard=shard,
    )  # fmt: skip
    options = Options(seed=seed, device=device, restart=restart, trust_remote_code=trust_remote_code)
    with _processes(device):
        job = prepare_tuning(model, data, out, tuning, held_out, options)
        speaks = Ranks.here().first
        done = not dry_run and speaks and is_done(job.out, job.fingerprint, restart)
        expected = estimate_tuning(job) if speaks and not done else None
        if dry_run:
            if speaks:
                show_plan(job, expected, as_json)
            return
        screen = console()
        if expected is not None:
            say(sentence(expected), screen)
        with Progress(screen) as progress:
            record = run_tuning(job, progress if speaks else None)
        if speaks:
            _show(record, model, out, as_json)


def _show(record: dict[str, Any], model: str, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(record)
        return
    losses, scores = record["loss"], record["held_out_loss"]
    print(f"loss {losses['first']:.4f} at first, {losses['last_tenth']:.4f} over the last tenth of the steps")
    if scores:
        print(f"held-out loss {scores['first']:.4f} before, {scores['last']:.4f} after")
    print(f"{record['tokens_per_second']:,.0f} tokens/s, peak memory {size(record['peak_memory_bytes'])}")
    format, method, codes = record["tuning"]["format"], record["tuning"]["method"], ""
    if "base" in record:
        base, model = record["base"], str(out / record["base"]["folder"])
        print(f"{out / base['folder']}: the model that it belongs to, {base['bits_per_weight']:.3f} bits per weight")
    elif format is not None:
        how = f"{format!r}, method={method!r}" if method else repr(format)
        codes = f", quantization_config=whit.QuantizationConfig({how})"
    named = hub_name(model)
    name = f"whit.resolve_model({model!r})" if model.startswith("whit:") else repr(named.repo if named else model)
    name += f", revision={named.revision!r}" if named and named.revision else ""
    print(f"{out}: the adapter; load model = AutoModelForCausalLM.from_pretrained({name}{codes}),")
    print(f"then peft.PeftModel.from_pretrained(model, {str(out)!r})")


@contextmanager
def _processes(device: str) -> Iterator[None]:
    """Join the others, where torchrun or accelerate started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = find_device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
