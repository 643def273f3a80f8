"""Vocabularies of models whose embedding or head is packed, and what PEFT counts of a model as it was loaded."""

import peft
import pytest
import torch
import transformers as hf

import whit

RULES = {
    "embedding": [("model.embed_tokens", "int8-channel")],
    "head": [("lm_head", "int8-channel")],
    "both": [("model.embed_tokens", "int8-channel"), ("lm_head", "int8-channel")],
}


SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
LORA = peft.LoraConfig(target_modules=["q_proj"])


def loaded(folder, rules=(), tied=False):
    hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, vocab_size=100, tie_word_embeddings=tied)).save_pretrained(folder)
    config = whit.QuantizationConfig("int4-g64", rules=rules)
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("tokens", [104, 96])
@pytest.mark.parametrize(("rules", "tied"), [(r, False) for r in RULES.values()] + [(RULES["embedding"], True)])
def test_a_packed_vocabulary_is_not_resized_to_an_empty_one(tmp_path, rules, tied, tokens):
    with pytest.raises(whit.WhitError, match=r"resizing the vocabulary.*modules_to_not_convert"):
        loaded(tmp_path, rules, tied).resize_token_embeddings(tokens, mean_resizing=tokens < 100)


def test_a_vocabulary_in_floats_is_resized(tmp_path):
    model = loaded(tmp_path)
    model.resize_token_embeddings(104)
    assert model(torch.tensor([[1, 103]])).logits.shape == (1, 2, 104)


def test_starts_that_change_the_base_say_what_to_do_instead(tmp_path):
    for start in ("pissa", "pissa_niter_4", "olora"):
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=start)
        with pytest.raises(whit.WhitError, match=r"whit\.initialize_adapter"):
            peft.get_peft_model(loaded(tmp_path), config)


def test_peft_counts_packed_weights_of_a_model_as_it_was_loaded(tmp_path):
    model = loaded(tmp_path / "plain")
    plain = sum(p.numel() for p in hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").parameters())
    names = list(model.state_dict())
    adapted = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), LORA)
    trained, every = adapted.get_nb_trainable_parameters()
    assert every - trained == plain
    loaded(tmp_path / "plain").save_pretrained(tmp_path / "saved")
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert list(saved.state_dict()) == names
    assert peft.get_peft_model(saved, LORA).get_nb_trainable_parameters()[1] == every
