"""llama.cpp as a peer, where a binding of it is installed: pip install --no-deps llama-cpp-py-sync cffi pycparser."""

from __future__ import annotations

import pytest
import torch

import whit
from whit.errors import WhitError
from whit.integrations.loading import load_causal_lm
from whit.report.llama_cpp import FILE_TYPES, LlamaCpp
from whit.report.peers import PEERS, find_peer, load_peer

IDS = torch.arange(3, 27)[None] * 7


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("llama_cpp_py_sync", reason="no binding of llama.cpp here (pip install llama-cpp-py-sync)")
    found = load_peer(find_peer("llama.cpp:q8_0"), whit.resolve_model("whit:model"), "cpu")
    yield found
    found.close()


def test_it_computes_the_model(model: LlamaCpp):
    with torch.inference_mode():
        wanted = load_causal_lm("whit:model", device="cpu", dtype="float32")(IDS).logits
    found = model(IDS.repeat(2, 1)).logits
    assert found.shape == (2, *wanted.shape[1:])
    assert torch.equal(found[0], found[1])
    assert (found[0] - wanted[0]).norm() / wanted.norm() < 0.02  # 8 bits, and its own 8-bit activations


def test_its_cache_goes_on_where_it_stopped(model: LlamaCpp):
    whole = model(IDS).logits
    begun = model(IDS[:, :20], use_cache=True, logits_to_keep=1)
    assert torch.allclose(begun.logits[0, -1], whole[0, 19], atol=0.05)
    for place in range(20, 24):
        begun = model(IDS[:, place : place + 1], past_key_values=begun.past_key_values, use_cache=True)
        assert begun.logits.shape[1] == 1
        assert torch.allclose(begun.logits[0, -1], whole[0, place], atol=0.05)


def test_what_it_holds_is_the_file(model: LlamaCpp, tmp_path):
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "model.gguf").stat().st_size == model.get_memory_footprint() < 10e6


def test_every_file_type_is_a_candidate():
    assert [peer.name for peer in PEERS if peer.name.startswith("llama.cpp:")] == [f"llama.cpp:{n}" for n in FILE_TYPES]


@pytest.mark.parametrize("name", [peer.name for peer in PEERS])
def test_a_peer_that_is_not_there_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch):
    peer = find_peer(name)
    monkeypatch.setattr("whit.report.peers.find_spec", lambda package: None)
    with pytest.raises(WhitError, match=f"{peer.package} is not installed; it must be; pip install {peer.install}"):
        load_peer(peer, "nowhere", "cpu")
