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

from whit.capabilities import rotation
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.work import disk_errors, is_done
from whit.pipeline import run as write
from whit.pipeline.coverage import Account, load_account
from whit.pipeline.job import open_source
from whit.qat.job import Training
from whit.qat.loop import Loop
from whit.qat.network import Network
from whit.qat.ready import Ready
from whit.qat.sampled import sample_windows
from whit.qat.start import prepare_kept, prepare_trained, starting_codes, starting_ranges
from whit.qat.state import StateFile
from whit.qat.trained import Value


def train(
    training: Training, progress: Callable[[str, int, int, float], None] | None = None, save_every: float = 60.0
) -> Account:
    """Do a prepared run, or what a killed one left of it. `progress` gets what is done, steps, their total, loss."""
    job = training.job
    if not is_done(job.out, job.fingerprint, job.options.restart):
        with disk_errors(job.out):
            return finish(training, learn(training, progress, save_every))
    return load_account(job.out)


def finish(training: Training, values: Mapping[str, Value]) -> Account:
    """Write what `learn` returned. Until that is done the state stays on disk, so that a failure here costs no
    training.
    """
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
    tokens = _tokens(training, teacher, network)
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
    if not training.course.needs_teacher:
        return None
    return _named(training) or (network.twin() if training.mode == "full" else None)


def _named(training: Training) -> Network | None:
    """The teacher that is named, where one is."""
    job, name = training.job, training.setting.teacher
    if name is None:
        return None
    trusted = job.options.trust_remote_code
    source = open_source(resolve_model(name, trusted), trusted)
    return Network(source, source.read, job.device, training.dtype)


def _tokens(training: Training, teacher: Network | None, network: Network) -> Tensor:
    """int64 (windows, context); an unquantized model writes them, whether it is followed or not."""
    if training.tokens is not None:
        return training.tokens
    writer = teacher or _named(training) or network
    return sample_windows(writer, training.words.windows, training.context, training.course.seed)
