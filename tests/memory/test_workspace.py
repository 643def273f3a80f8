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
