"""AutoRound: 200 iterations of signed gradient descent on each decoder layer, batches of 8, unless told otherwise."""

from __future__ import annotations

from importlib.metadata import version as installed

from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from adapters import Job, Took, Weights, load, timed


def quantize(job: Job) -> tuple[Weights, Took]:
    """Quantize in memory; AutoRound leaves the dequantized weights in the modules."""
    row = job.row
    samples, context = job.tokens.shape
    data = DataLoader([{"input_ids": ids} for ids in job.tokens], batch_size=min(8, samples), shuffle=False)
    quantizer = AutoRound(
        load(job, place=False),
        AutoTokenizer.from_pretrained(job.model),
        bits=row.bits,
        group_size=row.group_size or -1,
        sym=row.symmetric,
        dataset=data,
        nsamples=samples,
        seqlen=context,
        batch_size=min(8, samples),
        device_map=job.device,
        seed=job.seed,
        **job.options,
    )
    (model, _), took = timed(quantizer.quantize)
    return dict(model.state_dict()), took


def version() -> str:
    """What ran."""
    return installed("auto-round")
