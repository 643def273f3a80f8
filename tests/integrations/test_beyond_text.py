"""Models that are asked for less often: with images or sounds, several embeddings, linears in other words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import whit
from tiny_text import word_tokenizer
from whit import GPTQ, Calibration, Recipe
from whit.errors import UnsupportedModelError
from whit.evaluation import EvaluationOptions, evaluate
from whit.pipeline import dequantize

from tiny_models import DECODER, ENCODER

SIGHT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 8}  # fmt: skip
TEXT = {**ENCODER, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128,
           "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0,
           "max_position_embeddings": 64, "decoder_start_token_id": 0}  # fmt: skip
SOUND = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
GPT = {"vocab_size": 128, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(6, 18)[None]
IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MODELS = {
    "siglip": (hf.SiglipModel, lambda: hf.SiglipConfig(text_config=TEXT, vision_config=SIGHT),
               {"input_ids": IDS, "pixel_values": IMAGE}),
    "gemma3": (hf.Gemma3ForConditionalGeneration, lambda: hf.Gemma3Config(
        text_config={**DECODER, "head_dim": 16}, vision_config=SIGHT, mm_tokens_per_image=4, image_token_index=5),
        {"input_ids": IDS}),
    "llava": (hf.LlavaForConditionalGeneration, lambda: hf.LlavaConfig(
        text_config={**DECODER, "model_type": "llama"}, vision_config={**SIGHT, "model_type": "clip_vision_model"},
        image_token_index=5), {"input_ids": IDS}),
    "qwen2_5_vl": (hf.Qwen2_5_VLForConditionalGeneration, lambda: hf.Qwen2_5_VLConfig(
        text_config={**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                                    "rope_theta": 10000.0}},
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
                       "patch_size": 8}, image_token_id=5), {"input_ids": IDS}),
    "clip": (hf.CLIPModel, lambda: hf.CLIPConfig(text_config=TEXT, vision_config=SIGHT),
             {"input_ids": IDS, "pixel_values": IMAGE}),
    "wav2vec2": (hf.Wav2Vec2ForCTC, lambda: hf.Wav2Vec2Config(**SOUND), {"input_values": torch.ones(1, 4000)}),
    "vit": (hf.ViTForImageClassification, lambda: hf.ViTConfig(**SIGHT), {"pixel_values": IMAGE}),
    "marian": (hf.MarianMTModel, lambda: hf.MarianConfig(**SEQ2SEQ), {"input_ids": IDS, "decoder_input_ids": IDS}),
    "falcon": (hf.FalconForCausalLM, lambda: hf.FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4), {"input_ids": IDS}),
    "bloom": (hf.BloomForCausalLM, lambda: hf.BloomConfig(**GPT, hidden_size=64), {"input_ids": IDS}),
    "gptj": (hf.GPTJForCausalLM, lambda: hf.GPTJConfig(**GPT, n_embd=64, rotary_dim=8, n_positions=64),
             {"input_ids": IDS}),
    "deberta": (hf.DebertaV2ForMaskedLM, lambda: hf.DebertaV2Config(
        **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16), {"input_ids": IDS}),
}  # fmt: skip


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model_class, config, _ = MODELS[request.param]
    torch.manual_seed(0)
    model_class(config()).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def outputs(folder: Path, name: str, **options: object) -> torch.Tensor:
    model_class, _, inputs = MODELS[name]
    with torch.no_grad():
        found = model_class.from_pretrained(folder, **options).eval()(**inputs)
    return torch.cat([found.text_embeds, found.image_embeds]) if "text_embeds" in found else found.logits


@pytest.mark.parametrize(("saved", "name"), [(name, name) for name in MODELS], indirect=["saved"])
def test_they_are_quantized_loaded_and_written_plain(saved: Path, name: str, tmp_path: Path):
    """SigLIP's and Gemma 3's could not be loaded, CLIP's and wav2vec2's not be written, Marian's not be read again."""
    plain = outputs(saved, name)
    account = whit.quantize(saved, tmp_path / "out", "int8-g32")
    assert account.counts()["quantized"] >= 8
    found = outputs(tmp_path / "out", name)
    loading = outputs(saved, name, quantization_config=whit.QuantizationConfig("int8-g32"))
    assert torch.allclose(found, loading, atol=1e-5)
    assert (found - plain).norm() < 0.1 * plain.norm()
    dequantize(tmp_path / "out", tmp_path / "plain")
    near = outputs(tmp_path / "plain", name, dtype=torch.float32)
    assert (near - found).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize(
    ("saved", "name"), [(n, n) for n in ("falcon", "bloom", "gptj", "deberta")], indirect=["saved"]
)
def test_what_blocks_return_beside_hidden_states_is_no_hindrance(saved: Path, name: str, tmp_path: Path):
    text = [" ".join(f"w{i % 120 + 3}" for i in range(2000))]
    account = whit.quantize(
        saved, tmp_path / "out", Recipe(GPTQ(), [("*", "int4-g32")]), calibration=Calibration(text, 8, 32)
    )
    calibrated = [e for e in account.parameters if e.status == "quantized" and ("layer" in e.name or ".h." in e.name)]
    assert len(calibrated) >= 8
    assert all(entry.proxy_loss is not None and entry.reason is None for entry in calibrated)
    assert torch.isfinite(outputs(tmp_path / "out", name)).all()


@pytest.mark.parametrize(("saved", "name"), [(n, n) for n in ("gemma3", "llava", "qwen2_5_vl")], indirect=["saved"])
@pytest.mark.parametrize("export", ["whit", "gptq"])
def test_what_sees_is_measured_on_text(saved: Path, name: str, export: str, tmp_path: Path):
    """It was said that LLaVA and Qwen 2.5 VL are no causal language models."""
    whit.quantize(saved, tmp_path / "out", "int8-g32", export=export)
    if export != "whit":  # as another program would have written it
        (tmp_path / "out/whit.json").unlink()
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 110 + 10}" for i in range(100)))
    options = EvaluationOptions(baseline=str(saved), text=str(tmp_path / "text.txt"), context=32, dtype="float32")
    found = evaluate(str(tmp_path / "out"), options)
    assert found.baseline.kl_mean < 1e-3
    plain = MODELS[name][0](MODELS[name][1]())
    assert round(8 * found.size_bytes / found.bits_per_weight) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("saved", ["vit", "wav2vec2"], indirect=True)
def test_what_runs_on_no_text_is_not_calibrated_on_one(saved: Path, tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match=r"runs on (pixel|input)_values; .* no data, such as hqq"):
        whit.quantize(saved, tmp_path / "out", Recipe(GPTQ(), [("*", "int4-g32")]), calibration=Calibration(samples=2))
