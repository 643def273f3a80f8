"""A causal language model and its tokenizer, by local folder, GGUF file or hub id, through the plain Auto classes.

Importing whit registers its quantizer with transformers, so whit's own checkpoints need nothing special here.
Whatever transformers or the hub answers is said again as one sentence.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from whit.checkpoint.choice import parts_of
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.parts import read_gguf_parts
from whit.checkpoint.reader import Checkpoint
from whit.devices import find_device
from whit.errors import (
    CheckpointError,
    EvaluationError,
    UnsupportedModelError,
    WhitWarning,
    is_out_of_memory,
    reason_of,
)
from whit.export.readers.gguf import gguf_config, gguf_tokenizer
from whit.integrations.foreign import instead_of, is_foreign, load_foreign

DTYPES = ("auto", "float32", "bfloat16", "float16")
_FOREIGN_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)

T = TypeVar("T")
ADVICE = "check the folder or fetch it again"


def load_causal_lm(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, quantization: Any = None,
    two_texts: bool = False,
) -> Any:  # transformers.PreTrainedModel  # fmt: skip
    """The model in evaluation mode, on `device`, in `dtype` ("auto": the dtype of the checkpoint).

    A QuantizationConfig as `quantization` quantizes a full-precision checkpoint while it is loaded. With `two_texts` a
    model may read one text and write another (T5, BART).

    Raises CheckpointError for a folder or id that cannot be read or lacks tensors, UnsupportedModelError for a model
    that is not a causal language model, EvaluationError for a device or dtype that is not there.
    """
    placement = _placement(device)
    if dtype not in DTYPES:
        raise EvaluationError(f"dtype {dtype}: unknown; use one of {', '.join(DTYPES)}")
    config = load_config(name, trust_remote_code=trust_remote_code)
    auto_class = causal_class(name, config, two_texts)
    source, options = _source(name, trust_remote_code, weights=True)
    file = options.get("gguf_file")
    if file is not None or is_foreign(Path(source)):
        floats = dtype if dtype == "auto" else getattr(torch, dtype)
        place = Path(source, file or "")
        try:
            model, info = _translated(name, lambda: load_foreign(place, floats, trust_remote_code, **placement))
            return _complete(name, model, info)
        except UnsupportedModelError as error:
            if file is None or len(parts_of(file)) > 1 or importlib.util.find_spec("gguf") is None:
                raise
            warnings.warn(f"{error}; until then transformers dequantizes all of it", WhitWarning, stacklevel=2)
    if not options:
        Checkpoint(Path(source)).close()  # a missing or damaged file is said as every command says it
    if quantization is not None:
        placement["quantization_config"] = quantization
    advice = instead_of(Path(source)) if not options else None
    model, info = _translated(
        name,
        lambda: auto_class.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=None if "gguf_file" in options else True,  # never a pickle
            **placement,
            **options,
        ),
        advice or ADVICE,
    )
    return _complete(name, model, info)


def _complete(name: str, model: Any, info: Any) -> Any:
    """The model in evaluation mode, if the checkpoint had all of it."""
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and only warns
        raise CheckpointError(
            f"{name}: {len(missing)} tensors of the model are not in the checkpoint, {missing[0]} the first; "
            "all must be; fetch or write the checkpoint again"
        )
    return model.eval()


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:  # transformers.PreTrainedTokenizerBase
    """The tokenizer beside the model. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    source, options = _source(name, trust_remote_code)
    if not options and not _has_tokenizer(Path(source)):
        raise CheckpointError(f"{name}: holds no tokenizer; a text needs one; copy its files beside the weights")
    if file := options.get("gguf_file"):
        return gguf_tokenizer(Path(source, file))
    return _translated(
        name, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    )


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:  # transformers.PretrainedConfig
    """The configuration alone; no weights are read."""
    from transformers import AutoConfig

    source, options = _source(name, trust_remote_code)
    if file := options.get("gguf_file"):
        try:
            return gguf_config(Path(source, file))
        except UnsupportedModelError:  # transformers may know more architectures
            pass
    return _translated(name, lambda: AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options))


def model_files(name: str) -> Path:
    """The folder (or .gguf file) that holds the weights; for a hub id, its snapshot in the local cache."""
    return resolve_model(name)


def maximum_context(config: Any) -> int | None:
    """How many positions the model was built for; None where the architecture sets no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None


def _source(name: str, trust_remote_code: bool = False, weights: bool = False) -> tuple[str, dict[str, str]]:
    """The folder to hand to from_pretrained, and `gguf_file` where it is a file in it."""
    path = resolve_model(name, trust_remote_code, weights)
    if path.is_file():
        read_gguf_parts(path)  # nothing else opens a file that lies about itself
        return str(path.parent), {"gguf_file": path.name}
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{name}: the folder holds no config.json; it must be a model folder; check the path")
    return str(path), {}


def _placement(device: str) -> dict[str, Any]:
    if find_device(device).type == "cpu":
        return {}
    return {"device_map": "auto" if device == "auto" else {"": device}}


def _needs_images(architecture: str) -> bool:
    """Whether it cannot be given text alone (BLIP)."""
    import transformers

    kind = getattr(transformers, architecture, None)
    images = inspect.signature(kind.forward).parameters.get("pixel_values") if kind else None
    return images is not None and images.default is images.empty


def causal_class(name: str, config: Any, two_texts: bool = False) -> Any:
    """The auto class that loads the model of that name; UnsupportedModelError where it predicts no next token.

    One that sees is a causal model where it is given text alone. BERT and T5 load as "causal" models with a warning, or
    not at all; the figures would mean nothing.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto as auto

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    mapped = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    sees = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    architectures = getattr(config, "architectures", None) or ([mapped] if mapped else [])
    known = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if two_texts and auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in architectures:
        return AutoModelForSeq2SeqLM
    if not getattr(config, "is_encoder_decoder", False):
        if sees in architectures and mapped not in architectures and not _needs_images(sees):
            return AutoModelForImageTextToText
        if mapped is not None and any(a in known or a.endswith("ForConditionalGeneration") for a in architectures):
            return AutoModelForCausalLM
    said = ", ".join(architectures) or config.model_type
    raise UnsupportedModelError(
        f"{name}: {said} is not a causal language model; next-token figures need one; name a decoder model"
    )


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((folder / name).is_file() for name in names)


def _translated(name: str, action: Callable[[], T], advice: str = ADVICE) -> T:
    """Run `action`; whatever transformers, safetensors or the hub raises becomes one sentence."""
    try:
        return action()
    except torch.OutOfMemoryError as error:
        raise CheckpointError(f"{name}: does not fit into the device's memory; use --device cpu") from error
    except (*_FOREIGN_ERRORS, MemoryError) as error:
        said = str(error)
        if is_out_of_memory(error):
            message = "does not fit into memory; `whit memory` says what it takes; make room, or take it quantized"
        elif "trust_remote_code" in said:
            message = "brings its own Python code, which runs only on demand; read it and pass --trust-remote-code"
        elif "ignore_mismatched_sizes" in said:  # its table of shapes goes to a log
            message = "a tensor has another shape than config.json says; both must agree; fetch them again together"
        else:
            message = f"transformers cannot load it ({reason_of(error)}); {advice}"
        raise CheckpointError(f"{name}: {message}") from error
