"""Tiny random models of every architecture that reads one text and writes another: two blocks read, three write."""

from __future__ import annotations

import torch
import transformers as hf

SMALL = {
    "vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 300, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
MODELS = {
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "mt5": (hf.MT5ForConditionalGeneration, hf.MT5Config, T5 | {"feed_forward_proj": "gated-gelu"}),
    "umt5": (hf.UMT5ForConditionalGeneration, hf.UMT5Config, T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, SMALL),
    "mbart": (hf.MBartForConditionalGeneration, hf.MBartConfig, SMALL),
    "marian": (hf.MarianMTModel, hf.MarianConfig, SMALL),
    "pegasus": (hf.PegasusForConditionalGeneration, hf.PegasusConfig, SMALL),
    "m2m_100": (hf.M2M100ForConditionalGeneration, hf.M2M100Config, SMALL),
}  # fmt: skip


def made(name: str, **options: object) -> hf.PreTrainedModel:
    """One of MODELS in evaluation mode, no norm or bias of it all ones or zeros."""
    torch.manual_seed(0)
    kind, config, usual = MODELS[name]
    model: hf.PreTrainedModel = kind(config(**usual | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
