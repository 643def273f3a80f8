"""Training text without data: windows that the model itself has written (LLM-QAT, Liu et al. 2023, section 3.1).

Each begins with a token drawn evenly from the vocabulary; the next few are the likeliest, so that a sentence takes
shape, and all others are drawn from the model's own distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whit.calibration import CalibrationTokens
from whit.errors import NonFiniteError
from whit.methods.workers import workers
from whit.pipeline.job import Job
from whit.qat.network import Network

LIKELIEST = 4  # tokens after the first that are not drawn


def sample_windows(network: Network, count: int, context: int, seed: int) -> Tensor:
    """int64 (count, context), the same for the same seed whatever the number of threads."""
    vocabulary = int(network.model.config.get_text_config().vocab_size)
    size = 1 if network.device.type == "cpu" else 64
    firsts = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
    numbers = torch.split(torch.arange(count), size)
    found = []
    with torch.no_grad(), workers(network.device) as team:
        for part in team.map(lambda part: _write(network, firsts[part], context, seed + 1 + int(part[0])), numbers):
            found.append(part.cpu())
    return torch.cat(found)


def own_calibration(job: Job) -> CalibrationTokens:
    """In the place of a job's calibration text: as many windows that its model writes. The whole model is in memory."""
    assert job.calibration is not None
    samples, context = job.calibration.samples, job.calibration.context
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    network = Network(job.source, job.source.read, job.device, dtype)
    tokens = sample_windows(network, samples, context, job.options.seed)
    return CalibrationTokens.of(tokens)


def _write(network: Network, firsts: Tensor, context: int, seed: int) -> Tensor:
    """Windows (n, context) that begin with `firsts` (n,)."""
    generator = torch.Generator(network.device).manual_seed(seed)
    token, cache = firsts.to(network.device)[:, None], None
    written = [token]
    for place in range(1, context):
        output: Any = network.model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if place == 1 and not bool(logits.isfinite().all()):
            raise NonFiniteError(
                "text self: the model's own predictions are not finite; they must be; repair the model"
            )
        if place <= LIKELIEST:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
        written.append(token)
    return torch.cat(written, dim=1)
