"""Where the weights of a run come from: read ahead one by one, or block by block with what calibration saw of them."""

from __future__ import annotations

from whit.pipeline.feed.base import Feed, Given, NothingRuns
from whit.pipeline.feed.blocks import BlockFeed
from whit.pipeline.feed.reading import BlockReader, ReadAhead

__all__ = ["BlockFeed", "BlockReader", "Feed", "Given", "NothingRuns", "ReadAhead"]
