"""Text from a language model, the same for a seed, without touching the caller's random numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from whit.errors import EvaluationError
from whit.integrations.cache import QuantizedCache
from whit.randomness import check_seed, seeded


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `greedy` takes the likeliest and ignores temperature and top_p.

    `kv_cache` is the format of keys and values (a SPEC such as int8 or int4-g32, of which the last `recent` tokens stay
    in 16 bits), empty for the model's own type.
    """

    max_new_tokens: int = 50
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    greedy: bool = False
    kv_cache: str = ""
    recent: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.max_new_tokens < 1:
            raise EvaluationError(f"max_new_tokens {self.max_new_tokens}: too few; ask for at least one token")
        if not self.greedy and not self.temperature > 0:
            raise EvaluationError(f"temperature {self.temperature}: must be above 0; or use --greedy")
        if not self.greedy and not 0 < self.top_p <= 1:
            raise EvaluationError(f"top_p {self.top_p}: must lie in (0, 1]; use 1 to draw from all tokens")

    @property
    def drawing(self) -> dict[str, Any]:
        """As arguments of transformers' `generate`."""
        if self.greedy:  # needs none; the neutral values keep the model's own settings out of it
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Generated:
    """The continuation without the prompt, and what it took; `seconds` counts the prompt's pass too."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


def generate(model: Any, tokenizer: Any, prompt: str, sampling: Sampling, streamer: Any = None) -> Generated:
    """Continue the prompt; a model that reads one text and writes another (T5, BART) answers it.

    Raises EvaluationError for an empty prompt, one that leaves the model no position, and logits that are not numbers.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = int(inputs["input_ids"].shape[1])
    _check_length(model, length, sampling)
    stop = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    first_stop = stop[0] if isinstance(stop, list) else stop
    if sampling.kv_cache and writes_another(model):
        raise EvaluationError("kv_cache: keeps keys and values of one text; the model reads another; leave it out")
    cache = QuantizedCache(model.config, sampling.kv_cache, sampling.recent) if sampling.kv_cache else None
    start = time.perf_counter()
    with seeded(sampling.seed), torch.inference_mode():
        try:
            output = model.generate(
                **inputs,
                **sampling.drawing,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=first_stop if pad is None else pad,
                streamer=streamer,
                **({} if cache is None else {"past_key_values": cache}),
            )
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):  # torch's only name for it
                raise
            raise EvaluationError(
                f"{model.name_or_path or 'the model'}: a next token has no finite probability; every one must; "
                "try --dtype float32 or check the weights"
            ) from error
    seconds = time.perf_counter() - start
    new = output[0, 1:] if writes_another(model) else output[0, length:]  # that begins with a token of its own
    return Generated(tokenizer.decode(new, skip_special_tokens=True), length, int(new.numel()), seconds)


def writes_another(model: Any) -> bool:
    """Whether the model reads one text and writes another, which does not begin with it."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _check_length(model: Any, length: int, sampling: Sampling) -> None:
    """Whether a prompt of so many tokens can be continued."""
    if length == 0:
        raise EvaluationError("prompt: is empty; the model continues a text; give it at least one word")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    both = max(length, sampling.max_new_tokens) if writes_another(model) else length + sampling.max_new_tokens
    if limit and both > limit:
        raise EvaluationError(
            f"prompt: {length} tokens and {sampling.max_new_tokens} new ones exceed the model's {limit} positions; "
            "shorten the prompt or lower --max-new-tokens"
        )


def chat_prompt(tokenizer: Any, message: str) -> str:
    """The message as one user turn in the model's chat template. Raises EvaluationError where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("chat: the tokenizer has no chat template; leave --chat out, or use an instruction model")
    turns = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
