"""Where codes lie for the CPU kernels: once, on huge pages, and the pages they were copied from are let go."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

import whit
from whit.kernels.cpu import library
from whit.kernels.cpu.memory import HUGE, PAGE_MAP, in_huge_pages, release
from whit.modules import QuantizedLinear

COMPILED = library()

pytestmark = pytest.mark.skipif(isinstance(COMPILED, str), reason=f"CPU kernels: {COMPILED}")


def mapping_flags(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_large_codes_move_to_huge_pages_with_their_values(random: Generator):
    codes = torch.randint(0, 256, (1024, 5000), generator=random, dtype=torch.uint8)
    moved = in_huge_pages(codes)
    assert torch.equal(moved, codes)
    if sys.platform == "linux":
        assert moved.data_ptr() % HUGE == 0
        flags = mapping_flags(moved.data_ptr())
        assert "hg" in flags, "huge pages were not asked for"
        assert "sh" not in flags, "shared memory needs a further setting for huge pages"
    assert in_huge_pages(moved[:8]).data_ptr() == moved.data_ptr()


def resident_pages(tensor: Tensor) -> int:
    """How many of a tensor's pages are in this process's memory."""
    first, last = tensor.data_ptr() // 4096, (tensor.data_ptr() + tensor.nbytes - 1) // 4096 + 1
    with PAGE_MAP.open("rb") as file:
        file.seek(8 * first)
        return sum(byte >> 7 for byte in file.read(8 * (last - first))[7::8])


@pytest.mark.skipif(not PAGE_MAP.exists(), reason="the system does not say which pages are a file's")
def test_a_mapped_source_leaves_memory_as_it_is_copied_unless_it_was_written_to(tmp_path: Path):
    size = 3 * HUGE + 5000
    (tmp_path / "codes").write_bytes(bytes(range(256)) * (size // 256 + 1))
    mapped = torch.from_file(str(tmp_path / "codes"), size=size, dtype=torch.uint8)[3:]
    moved = in_huge_pages(mapped, source_goes=True)
    assert torch.equal(moved[:256], torch.arange(3, 259).to(torch.uint8))
    assert resident_pages(mapped) <= 2, "only pages that it shares with its neighbours"
    assert torch.equal(mapped, moved), "they come back from the file"
    mapped[HUGE] = 77
    changed = in_huge_pages(mapped, source_goes=True)
    assert mapped[HUGE] == changed[HUGE] == 77
    plain = torch.full((size,), 5, dtype=torch.uint8)
    assert torch.equal(in_huge_pages(plain, source_goes=True), plain)
    assert release(plain) == 0
    assert plain.min() == 5


def test_the_module_holds_its_codes_once(random: Generator):
    quantized = whit.quantize_tensor(torch.randn(2048, 5000, generator=random), "int4-g32")
    module = QuantizedLinear.from_quantized(quantized)
    before, codes = module.codes.clone(), module.codes.data_ptr()
    first = module(torch.ones(1, 5000))
    assert module.codes.data_ptr() != codes
    assert module.packed.tensors["codes"] is module.codes
    assert torch.equal(module.codes, before)
    assert torch.equal(module(torch.ones(1, 5000)), first)
