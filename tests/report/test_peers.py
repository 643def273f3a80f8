"""Every peer that is installed loads the shipped model and computes something near it."""

from __future__ import annotations

import pytest
import torch

import whit
from whit.integrations.loading import load_causal_lm
from whit.report.peers import PEERS, find_peer, held_bytes, load_peer

IDS = torch.arange(3, 35)[None] * 11


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    with torch.inference_mode():
        return load_causal_lm("whit:model", device="cpu", dtype="float32")(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", [peer.name for peer in PEERS if not peer.name.startswith("llama.cpp")])
def test_an_installed_peer_computes_the_model(name: str, wanted: torch.Tensor):
    peer = find_peer(name)
    if not peer.is_installed:
        pytest.skip(f"{peer.package} is not installed here")
    model = load_peer(peer, str(whit.resolve_model("whit:model")), "cpu")
    with torch.inference_mode():
        found = model(input_ids=IDS, use_cache=True, logits_to_keep=1).logits.float()
    assert held_bytes(model) < (12e6 if "8" in name else 9.5e6)  # 16.3 MB in 16 bits, 4.2 of them the embedding
    change = (found - wanted[:, -1:]).norm() / wanted[:, -1:].norm()
    assert 0 < change < (1.0 if "int2" in name else 0.4)
