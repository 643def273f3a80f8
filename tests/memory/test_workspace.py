"""What a kernel needs beside the weights: nothing where it multiplies them packed."""

from __future__ import annotations

import pytest
import torch

from whit.kernels.reference import Reference
from whit.memory import Planner, Situation, find_subject


def test_only_kernels_that_dequantize_need_room(monkeypatch: pytest.MonkeyPatch):
    largest = 768 * 256

    def activations(device: str) -> int:
        planner = Planner(find_subject("whit:model"), Situation(context=64, device=device))
        plain, packed = (planner.need(planner.weights(spec)).activations_bytes for spec in ("bf16", "int4-g64"))
        return packed - plain

    monkeypatch.setattr("whit.memory.activations.select", lambda packed, x: object())
    assert activations("cpu") == 0
    assert activations("cuda") == largest * torch.bfloat16.itemsize
    monkeypatch.setattr("whit.memory.activations.select", lambda packed, x: Reference())
    assert activations("cpu") > largest * 4


def test_ternary_weights_take_two_bits_on_a_gpu():
    def weights(device: str, spec: str) -> int:
        planner = Planner(find_subject("whit:model"), Situation(context=64, device=device))
        return planner.need(planner.weights(spec)).weights_bytes

    assert weights("cuda", "int2-g64") == weights("cpu", "int2-g64")
    file, held = weights("cpu", "ternary-g64"), weights("cuda", "ternary-g64")
    assert 1.05 < held / file < 1.25  # 1.85 bits become 2.25, beside what is not quantized
