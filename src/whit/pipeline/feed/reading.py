"""Parameters read while others are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from whit.pipeline.feed.base import Given, NothingRuns
from whit.pipeline.job import Job
from whit.pipeline.plan import Item
from whit.pipeline.sources import Coded, Source, floats_dtype, read_finite


class ReadAhead(NothingRuns):
    """For methods without data: while one parameter is worked on, the next is read."""

    def __init__(self, source: Source, items: Sequence[Item], reader: ThreadPoolExecutor) -> None:
        self._weights = _read_ahead(source, items, reader)

    def give(self, item: Item) -> Given:
        return Given(next(self._weights))


def _read_ahead(source: Source, items: Sequence[Item], reader: ThreadPoolExecutor) -> Iterator[Tensor]:
    """The items' parameters in order; the next one is read while the last is worked on."""
    futures = (reader.submit(read_finite, source, item.name) for item in items)
    ahead = next(futures, None)
    while ahead is not None:
        current, ahead = ahead, next(futures, None)
        weight = current.result()
        del current
        yield weight


def reads_ahead(job: Job) -> bool:
    """Whether blocks are read ahead: for a GPU, unless codes are asked of MODEL itself, by another thread."""
    return job.device.type != "cpu" and not isinstance(job.source, Coded)


class BlockReader:
    """Reads parameters by name; where `ahead`, the next block's while this one is worked on.

    That takes the memory of a second block, on the host; a CPU has no time to gain by it. All reading is then one
    thread's, and nothing of it is the GPU's: while a graph is recorded no other thread may ask for pinned memory.
    """

    def __init__(self, source: Source, reader: ThreadPoolExecutor, ahead: bool) -> None:
        self._source, self._reader, self._ahead = source, reader, ahead
        self._coming: dict[str, Future[Tensor]] = {}

    def __call__(self, name: str) -> Tensor:
        """A parameter, or the one that it is tied to."""
        if not self._ahead:
            return self._read(name)
        return (self._coming.pop(name, None) or self._reader.submit(self._read, name)).result()

    def expect(self, names: Sequence[str]) -> None:
        """Begin to read what will be asked for next."""
        if self._ahead:
            self._coming = {name: self._reader.submit(self._read, name) for name in names}

    def _read(self, name: str) -> Tensor:
        name = self._source.tied.get(name, name)
        values = read_finite(self._source, name)
        is_coded = isinstance(self._source, Coded) and self._source.coded(name)
        return values.to(floats_dtype(self._source, name)) if is_coded else values
