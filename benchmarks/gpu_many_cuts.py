"""Cuts of the fused product for more rows: which are tried, and which is dispatched."""

from __future__ import annotations

from whit.formats import parse_format
from whit.kernels.gpu import many, stream, tuned
from whit.kernels.gpu.many import Config

PROCESSORS = 132


def cuts(rows: int, shape: tuple[int, int], spec: str) -> list[Config]:
    """The cuts that are tried: those whose blocks fill a good part of the device, or most of them do."""
    scheme = scheme_of(spec, shape[1])
    bits, levels = scheme.storage.bits, bool(scheme.storage.levels)
    high = (32, 2, 4) if levels else (32, 2, 6) if bits <= 4 else (32, 4, 4)
    more = 2 if bits > 4 else 1  # steps of as many columns
    if rows <= 16 and bits == 4:
        kinds = ((1, 4, 2), (4, 2, 1)) if levels else ((1, 4, 2), (1, 3, 3), (4, 3, 1))
        found = [
            Config(groups, 2, stages, split, late=1, min_blocks=blocks)
            for groups, stages, blocks in kinds
            for split in (1, 2, 4, 8)
        ]
    elif rows <= 64:
        tiles = next(n for n in many.ROW_TILES if 8 * n >= rows)
        found = [
            Config(groups, tiles, stages, split, 1, 0, blocks, lead, apart=apart)
            for groups, stages, lead, blocks in ((2, 3 * more, 8, 1), (2, 3, 8, 2), (2, 4, 6, 2), (4, 2 * more, 6, 1))
            for split, apart in ((1, 0), (2, 0), (3, 0), (4, 1), (8, 1))
        ]
    elif rows <= 256:
        found = [Config(2, tiles, stages, split, lead=lead) for tiles, stages, lead in (high, (16, 3, 6))
                 for split in (1, 2, 3)]  # fmt: skip
    else:
        found = [Config(2, high[0], high[1], 1, pair, lead=high[2], halve=halve) for pair in (1, 2) for halve in (0, 1)]
    invariant = tuned.invariant_many(scheme, shape, rows, (9, PROCESSORS))
    return [*dict.fromkeys([*(c for c in found if is_sensible(c, rows, shape[0], levels)), invariant])]


def is_sensible(config: Config, rows: int, outs: int, levels: bool) -> bool:
    if not config.fits(levels):
        return False
    blocks, room = config.grid([outs], rows, 1 << 20)[0], PROCESSORS * config.min_blocks
    if config.split == 1:
        return rows > 256 or 2 * blocks > room
    return room < 3 * blocks <= 4 * room


def scheme_of(spec: str, columns: int) -> stream.Scheme:
    found = stream.scheme(parse_format(spec), columns)
    assert not isinstance(found, str), found
    assert many.why_not(found, columns) is None
    return found


def taken(rows: int, shape: tuple[int, int], spec: str) -> list[Config]:
    """The cut that is dispatched, if any."""
    found = best_many(scheme_of(spec, shape[1]), shape, rows, (9, PROCESSORS))
    return [] if found is None else [found]


best_many = tuned.best_many
