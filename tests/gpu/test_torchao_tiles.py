"""torch's own kernel fills the tiles of torchao's Int4TilePackedTo4dTensor as `untile` empties them."""

from __future__ import annotations

import pytest
import torch

from whit.export.readers.torchao_kinds import untile

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (64, 1024), (200, 2048)])
def test_codes_come_back(rows: int, columns: int):
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous().cuda()
    tiles = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    assert torch.equal(untile(tiles.cpu()), codes)
