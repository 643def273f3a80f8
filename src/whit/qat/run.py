"""End-to-end training from a model on the disk to a packed one: started, trained, written.

`full`: everything is trained, from the codes that another method chose (they lie in `.OUT.start` until the end), and
the unquantized model itself is the teacher. `scales`: the codes of a quantized model stay, packed, and its params are
trained; the second phase of EfficientQAT (Chen et al. 2024), and the repair of a model that somebody else quantized.
What is written is what was computed with in the last step, bit for bit. The state of an unfinished run lies in
`.OUT.training`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from whit.calibration import Calibration
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.work import is_done
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.pipeline import run as write
from whit.pipeline.coverage import Account, load_account
from whit.pipeline.job import open_source
from whit.qat.job import OWN_TEXT, Training
from whit.qat.loop import Loop
from whit.qat.network import Network
from whit.qat.ready import Ready
from whit.qat.sampled import sample_windows
from whit.qat.start import prepare_kept, prepare_trained, starting_codes, starting_ranges
from whit.qat.state import StateFile
from whit.qat.trained import Value
from whit.tensor import rotation


def train(
    training: Training, progress: Callable[[str, int, int, float], None] | None = None, save_every: float = 60.0
) -> Account:
    """Do a prepared run, or what a killed one left of it. `progress` gets what is done, steps, their total, loss."""
    job = training.job
    if not is_done(job.out, job.fingerprint, job.options.restart):
        return finish(training, learn(training, progress, save_every))
    return load_account(job.out)


def finish(training: Training, values: Mapping[str, Value]) -> Account:
    """Write what `learn` gave. Until that is done the state lies on the disk: a failure here costs no training."""
    job = training.job
    account = write(job, Ready(job.source, values, job.device, training.exact))
    shutil.rmtree(training.place, ignore_errors=True)
    if training.begin is not None:
        shutil.rmtree(training.begin.out, ignore_errors=True)
    return account


def learn(
    training: Training, progress: Callable[[str, int, int, float], None] | None = None, save_every: float = 60.0
) -> dict[str, Value]:
    """The first part of `train`: the values of all parameters after the last step, on the CPU."""
    job, course = training.job, training.course
    state = StateFile(training.place / "state.safetensors", job.fingerprint, save_every, job.options.restart)
    codes = starting_codes(training)
    quantized = {item.name for item in job.plan.items if item.format is not None}
    packed = () if training.mode == "full" else quantized
    network = Network(job.source, job.source.read, job.device, training.dtype, packed)
    teacher = _teacher(training, network)
    tokens = _tokens(training, teacher or network)
    ranges = starting_ranges(training)
    network.quantize_inputs(
        {
            i.target.holder: (i.activations, 0 if i.format is None else rotation(i.format))
            for i in job.plan.items if i.target is not None and i.activations
        },
        ranges,
    )  # fmt: skip
    with torch.no_grad():
        trained = prepare_trained(training, codes)
        trained |= {f"{holder}.inputs": one for holder, one in ranges.items()}
        if course.kept_rate > 0:
            trained |= prepare_kept(job, network)
    loop = Loop(network, teacher, trained, tokens, course)
    loop.run(state, None if progress is None else lambda *step: progress("training", *step))
    with torch.no_grad():
        return {name: value.to("cpu") for one in trained.values() for name, value in one.values().items()}


def _teacher(training: Training, network: Network) -> Network | None:
    """The model whose predictions are followed: one that is named, or the unquantized one that is trained itself."""
    job = training.job
    if not training.course.needs_teacher:
        return None
    if training.setting.teacher is None:
        return network.twin() if training.mode == "full" else None
    trusted = job.options.trust_remote_code
    source = open_source(resolve_model(training.setting.teacher, trusted), trusted)
    return Network(source, source.read, job.device, training.dtype)


def _tokens(training: Training, writer: Network) -> Tensor:
    """int64 (windows, context)."""
    words, job = training.words, training.job
    if words.tokens is not None:
        return words.tokens
    most = maximum_context(job.source.model.config)
    if words.text == OWN_TEXT:
        return sample_windows(writer, words.windows, words.context or min(512, most or 512), training.course.seed)
    tokenizer = load_tokenizer(str(job.source.checkpoint.folder), trust_remote_code=job.options.trust_remote_code)
    text = Calibration(words.text, words.windows, words.context or min(512, most or 512), training.course.seed)
    return text.tokens(tokenizer, most).tokens
