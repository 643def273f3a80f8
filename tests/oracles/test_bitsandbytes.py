"""NF4, FP4 and double quantization equal bitsandbytes' own quantize_4bit on CPU, code for code."""

from __future__ import annotations

import pytest
import torch

import whit

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def matrices() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "normal": torch.randn(512, 1024, generator=g),
        "constant": torch.full((64, 128), -0.37),
        "heavy-tailed": torch.randn(256, 512, generator=g) / torch.randn(256, 512, generator=g).abs().clamp(min=1e-3),
        "zeros": torch.zeros(32, 64),
        "tiny": torch.randn(64, 256, generator=g) * 1e-20,
    }


def unpacked(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """bitsandbytes keeps element 2i in the high nibble of byte i."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(shape)


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_codes_and_absmax(table: str, name: str):
    weight = matrices()[name]
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type=table)
    ours = whit.quantize_tensor(weight, table)
    assert torch.equal(ours.params["absmax"].reshape(-1), state.absmax)
    their_codes = unpacked(theirs, weight.shape)
    if table == "fp4":  # plus and minus zero are one level
        their_codes = torch.where(their_codes == 8, 0, their_codes)
        codes = torch.where(ours.codes == 8, 0, ours.codes)
    else:
        codes = ours.codes
    assert torch.equal(codes, their_codes)


@pytest.mark.parametrize("name", ["normal", "constant", "heavy-tailed", "tiny"])
def test_double_quantization_is_bitsandbytes_own(name: str):
    weight = matrices()[name]
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = whit.quantize_tensor(weight, "nf4-dq")
    nested = ours.params["absmax"]
    assert torch.equal(ours.codes, unpacked(theirs, weight.shape))
    assert torch.equal(torch.tensor(nested.format.levels), state.state2.code)
    assert torch.equal(nested.params["offset"].reshape(()), state.offset)
    assert torch.equal(nested.params["absmax"].reshape(-1), state.state2.absmax)
    assert torch.equal(nested.codes.reshape(-1), state.absmax)


def test_fp8_equals_torchs_cast():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    q = whit.quantize_tensor(weight, "fp8")
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    assert torch.equal(q.params["scale"], scale)
    assert torch.equal(q.codes.view(torch.float8_e4m3fn).float(), (weight / scale).to(torch.float8_e4m3fn).float())
