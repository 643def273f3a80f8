"""Models and tokenizers by name; everything that cannot be loaded is one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from whit import data
from whit.errors import CheckpointError, DeviceError, EvaluationError, UnsupportedModelError
from whit.evaluation.size import measure_size, weight_files
from whit.integrations.loading import load_causal_lm, load_config, load_tokenizer, maximum_context, model_files


def test_a_folder_loads_in_evaluation_mode_and_its_own_dtype(make_model, tmp_path):
    model = load_causal_lm(str(make_model(tmp_path, dtype=torch.bfloat16)), device="cpu")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert load_causal_lm(str(tmp_path), dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~nobody/x", ""])
def test_a_missing_folder(name):
    for load in (load_causal_lm, load_tokenizer, load_config, model_files):
        with pytest.raises(CheckpointError, match="no such folder"):
            load(name)


def test_a_hub_id_that_is_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: neither a folder here nor in the hub's cache"):
        load_causal_lm("nobody/nothing")


def test_folders_that_are_no_models(tmp_path, make_model):
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        load_causal_lm(str(tmp_path / "file.bin"))
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_pickled_checkpoint_is_never_opened(make_model, tmp_path):
    state = load_causal_lm(str(make_model(tmp_path))).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, which whit never opens"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(CheckpointError, match="no weight file"):
        weight_files(tmp_path)


def test_damaged_and_incomplete_weights(make_model, tmp_path):
    make_model(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="the header claims 2120 bytes and the file has 1000"):
        load_causal_lm(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 3}
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tensors of the model are not in the checkpoint, model\.layers\.2"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "intermediate_size": 24}))
    with pytest.raises(CheckpointError, match=r"another shape than config\.json says"):
        load_causal_lm(str(tmp_path))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(CheckpointError, match="no weight file"):
        weight_files(tmp_path)


def test_models_that_predict_no_next_token(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=32, **small)).save_pretrained(tmp_path / "bert")
    t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        with pytest.raises(UnsupportedModelError, match="is not a causal language model"):
            load_causal_lm(str(tmp_path / name))


def test_devices_and_dtypes(tiny):
    with pytest.raises(DeviceError, match="device tpu: unknown"):
        load_causal_lm(str(tiny), device="tpu")
    with pytest.raises(EvaluationError, match="dtype int3: unknown"):
        load_causal_lm(str(tiny), dtype="int3")
    with pytest.raises(DeviceError, match=r"device cuda:99: torch finds \d+ GPUs here; .* use --device cpu"):
        load_causal_lm(str(tiny), device="cuda:99")


def test_maximum_context(tiny):
    assert maximum_context(load_config(str(tiny))) == 64


def test_what_ships_is_found_by_name(tmp_path, monkeypatch):
    assert data.resolve_model("gpt2") == "gpt2"
    with pytest.raises(CheckpointError, match="no such model ships"):
        data.resolve_model("whit:other")
    with pytest.raises(EvaluationError, match="no such text ships"):
        data.resolve_text("whit:other")
    monkeypatch.setattr(data, "data_path", tmp_path.joinpath)
    for name, call in (("whit:model", data.resolve_model), ("whit:text", data.resolve_text)):
        with pytest.raises((CheckpointError, EvaluationError), match=f"^{name}: this installation"):
            call(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/heldout.txt").write_text("words")
    assert data.resolve_model("whit:model") == str(tmp_path / "model")
    assert data.resolve_text("whit:heldout").read_text() == "words"


def test_size_by_account_by_shards_and_by_architecture(tiny, make_model, tmp_path):
    plain = measure_size(tiny, load_config(str(tiny)))
    shards = tmp_path / "shards"
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(shards, max_shard_size="20KB")
    assert len(weight_files(shards)) > 1
    assert measure_size(shards, load_config(str(shards))).parameters == plain.parameters
    beside = tmp_path / "beside"
    shutil.copytree(tiny, beside)
    shutil.copy(tiny / "model.safetensors", beside / "model.fp16.safetensors")  # the same once more, and not loaded
    assert measure_size(beside, load_config(str(beside))) == plain
    packed = load_config(str(tiny))
    packed.quantization_config = {"quant_method": "gptq"}
    assert measure_size(tiny, packed).parameters == plain.parameters
    account = tmp_path / "account"
    shutil.copytree(tiny, account)
    (account / "whit.json").write_text(json.dumps({"size_bytes": plain.size_bytes, "bits_per_weight": 16.0}))
    assert measure_size(account, packed).bits_per_weight == pytest.approx(16.0, rel=1e-4)
    (account / "whit.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks size_bytes"):
        measure_size(account, packed)
    weight_files(shards)[0].unlink()
    with pytest.raises(CheckpointError, match="all must be there; download them"):
        measure_size(shards, packed)
