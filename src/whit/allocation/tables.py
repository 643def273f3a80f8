"""Tables with a row for each token, of which some are used far more than others: each band of rows is a choice.

The rows are ranked by how often their token occurs in the calibration text, and cut where ranks are multiplied, since
use falls with a power of the rank (Zipf's law). A choice for a band is one like any other, measured with the band alone
in the format; neighbours that get the same format become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from whit.allocation.space import Methods, bytes_of, without_data
from whit.formats.bands import Bands, can_be_band
from whit.methods import Method
from whit.methods.bands import use_of_rows
from whit.model.targets import vocabulary_tables
from whit.pipeline.job import Job
from whit.pipeline.plan import Item
from whit.tensor import Format, TensorSpec

SHARES = (64, 16, 4, 2, 1)  # bands end at a 64th of the rows, a 16th and so on; two more gain a hundredth
LEAST = 8  # rows of the first band: of fewer the text says too little

Band = tuple[int, int]


def bands_for(job: Job, item: Item, formats: Sequence[Format]) -> tuple[Band, ...]:
    """Ranks [first, last) of the rows of each band, none where the table has one format: where it is no table of the
    vocabulary or a small one, where the file holds no bands, or where a format cannot be a band's, such as 16 bits."""
    assert item.target is not None
    rows = item.target.shape[0]
    if len(formats) < 2 or not all(map(can_be_band, formats)):
        return ()
    vocabulary = vocabulary_tables(job.source.model).get(item.target.holder)
    if vocabulary is None or not vocabulary <= rows or rows // SHARES[0] < LEAST:
        return ()
    if job.exporter.problems({item.target: Bands(((formats[0], 1), (formats[1], 0)))}):
        return ()
    ends = [rows // share for share in SHARES]
    return tuple(zip([0, *ends], ends, strict=False))


def method_of_table(job: Job, matrix: Tensor, formats: Sequence[Format], methods: Methods) -> Method:
    """The one method of a table in bands: that of the least squared errors in those of its formats that have others
    than the recipe's own."""
    assert job.recipe is not None
    own, others = job.recipe.method, [format for format in formats if format in methods]
    known = dict.fromkeys([own, *(method for format in others for method in methods[format])])

    def lost(method: Method) -> float:
        near = (without_data(method)(matrix, None, format).dequantize() for format in others)
        return sum(float((matrix - each).square().sum(dtype=torch.float64)) for each in near)

    return min(known, key=lost) if len(known) > 1 else own


def ranked(tokens: Tensor, rows: int) -> Tensor:
    """The rows of a table, int64 (rows,), those used most first."""
    return use_of_rows(tokens, rows).argsort(descending=True, stable=True)


def banded_format(parts: Sequence[tuple[Band, Format]]) -> Format:
    """One format for a table from those of its bands, in their order."""
    joined: list[tuple[Format, int]] = []
    for (first, last), format in parts:
        if joined and joined[-1][0] == format:
            joined[-1] = format, joined[-1][1] + last - first
        else:
            joined.append((format, last - first))
    return joined[0][0] if len(joined) == 1 else Bands((*joined[:-1], (joined[-1][0], 0)))


def bytes_of_band(job: Job, item: Item, format: Format, band: Band) -> int:
    """What a band of a table takes in the file in a format."""
    assert item.target is not None
    shape = (band[1] - band[0], item.target.shape[1])
    some = replace(item, spec=TensorSpec(shape, item.spec.dtype), target=replace(item.target, shape=shape))
    return bytes_of(job, some, format)
