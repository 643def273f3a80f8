"""`whit.compile` on a GPU: `generate` over a static cache, each token one CUDA graph.

transformers prepares what it always does (prompt, logits processors, stopping criteria), and the loop over tokens is
the one here. Greedy decoding without processors never waits for the host: tokens are chosen on the device, and whether
all sequences have ended is asked for every few tokens. What the loop does not know (beams, an assistant, a cache of the
caller's, scores to be returned) goes to transformers' own `generate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whit.compiled.fused import best_step
from whit.compiled.static import Capture, Decoder, State, captured_on_cuda, static_layers, uncaptured
from whit.errors import UnsupportedModelError

LEAST_LENGTH = 256  # of a cache
ASK_EVERY = 16  # tokens between two looks at whether all sequences have ended
MOST_STOPS = 8
KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "logits_to_keep"}


def compile_cuda(model: Any, options: Mapping[str, Any], capture: Capture = captured_on_cuda) -> nn.Module:
    """Give `model.generate` a static cache and CUDA graphs; returns the same model.

    Options: `batch` and `length` (tokens in all) to prepare for now instead of at the first call. Raises
    UnsupportedModelError for encoder-decoders, and for caches of other kinds (sliding windows, states).

    A graph reads the weights where they lay when it was made. Compile again after the model was moved, its weights were
    replaced, or an adapter was put in, merged or switched.
    """
    unknown = set(options) - {"batch", "length"}
    if unknown:
        raise UnsupportedModelError(f"compile: {sorted(unknown)[0]} is not an option on a GPU; use batch or length")
    refuse(model)
    generator = Generator(model, capture)
    if options:
        with torch.no_grad():
            generator.decoder(int(options.get("batch", 1)), int(options.get("length", LEAST_LENGTH)))
    model.generate = generator.generate
    return model  # type: ignore[no-any-return]


def refuse(model: Any) -> None:
    """Raise UnsupportedModelError where a model's generation is not one token after the other over a static cache."""
    name = type(model).__name__
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        raise UnsupportedModelError(f"compile: {name} does not generate text; give a causal language model")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"compile: {name} has an encoder; only decoders are compiled")
    config = model.config.get_text_config()
    if not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(f"compile: {name} keeps a state and no keys and values; only those are compiled")
    if others := static_layers(config):
        index, kind = next(iter(others.items()))
        raise UnsupportedModelError(f"compile: layer {index} of {name} wants a {kind}; only full attention is compiled")


class Generator:
    """`generate` of one model, and the decoder that was captured last."""

    def __init__(self, model: Any, capture: Capture) -> None:
        self.model, self.capture = model, capture
        self.plain_generate = model.generate
        self._decoder: Decoder | None = None

    def decoder(self, batch: int, length: int) -> Decoder:
        """A decoder for these; the last one where it fits."""
        if self._decoder is None or not self._decoder.state.fits(batch, length):
            self._decoder = None  # its memory goes before the next one's comes
            rounded = max(LEAST_LENGTH, 1 << (length - 1).bit_length())
            limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or rounded
            state = State(self.model, batch, max(min(rounded, limit), length))
            self._decoder = self._made(state)
        return self._decoder

    def _made(self, state: State) -> Decoder:
        step = best_step(self.model, state)
        try:
            return Decoder(self.model, state, step, self.capture)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a step that asks the device something cannot be captured
            why, name = str(error).splitlines()[0], type(self.model).__name__
            message = f"compile: a step of {name} cannot be one CUDA graph ({why}); its kernels are launched one by one"
            warnings.warn(message, stacklevel=2)
            self.capture = uncaptured
            return Decoder(self.model, state, step, self.capture)

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As transformers' `generate`."""
        config = generation_config if generation_config is not None else self.model.generation_config
        if others(config, kwargs):
            return self.plain_generate(inputs, generation_config, **kwargs)
        streamer = kwargs.pop("streamer", None)
        loop = partial(self._loop, streamer=streamer)
        return self.plain_generate(inputs, generation_config, custom_generate=loop, **kwargs)

    def _loop(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        streamer: Any = None, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """Tokens (batch, prompt and new ones), as transformers' loop gives them."""
        given = {name for name, value in inputs.items() if value is not None and value is not False}
        positions = inputs.get("position_ids")
        far = positions is not None and bool((positions >= input_ids.shape[1]).any())  # beyond those of a static cache
        if not given <= KNOWN_INPUTS or generation_config.use_cache is False or far:
            more = {} if streamer is None else {"streamer": streamer}
            loop = type(model)._sample
            settings = {"stopping_criteria": stopping_criteria, "generation_config": generation_config}
            return loop(model, input_ids, logits_processor=logits_processor, **settings, **more, **inputs)  # type: ignore[no-any-return]
        decoder = self.decoder(input_ids.shape[0], generation_config.max_length)
        mask = inputs.get("attention_mask")
        tokens = input_ids.to(decoder.state.tokens.device)
        decoder.prefill(tokens, mask, positions if positions is not None and positions.shape == tokens.shape else None)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        simple = not logits_processor and not generation_config.do_sample and streamer is None
        stops = end_tokens(stopping_criteria)
        if simple and stops is not None:
            found = greedy(decoder, tokens, stops, generation_config)
        else:
            found = chosen_on_the_host(
                decoder, tokens, logits_processor, stopping_criteria, generation_config, streamer
            )
        if streamer is not None:
            streamer.end()
        return found


def others(config: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call asks for something that only transformers' own loops do."""

    def asked(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(config, name, None) if value is None else value

    if (asked("num_beams") or 1) > 1 or asked("return_dict_in_generate") or asked("synced_gpus"):
        return True
    names = (
        "custom_generate", "assistant_model", "past_key_values", "inputs_embeds", "cache_implementation",
        "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers", "force_words_ids", "constraints",
        "prefill_chunk_size",
    )  # fmt: skip
    return any(asked(name) is not None for name in names)


def end_tokens(stopping_criteria: Any) -> Tensor | None:
    """The tokens that end a sequence where nothing but these and the length does; None where something else does."""
    known = {"MaxLengthCriteria", "EosTokenCriteria"}
    if any(type(criterion).__name__ not in known for criterion in stopping_criteria):
        return None
    found = next((c.eos_token_id for c in stopping_criteria if hasattr(c, "eos_token_id")), None)
    if found is None:
        return torch.empty(0, dtype=torch.int64)
    stops = torch.as_tensor(found).reshape(-1).to(torch.int64)
    return stops if len(stops) <= MOST_STOPS else None


def greedy(decoder: Decoder, tokens: Tensor, stops: Tensor, config: Any) -> Tensor:
    """The likeliest continuation, chosen on the device."""
    room = config.max_length - tokens.shape[1]
    decoder.stops.fill_(-1)
    decoder.stops[: len(stops)] = stops.to(decoder.stops.device)
    padding = config._pad_token_tensor
    decoder.padding.fill_(0 if padding is None else int(padding))
    count = 0
    while count < room:
        for _ in range(min(ASK_EVERY, room - count)):
            if count:
                decoder.follow()
            else:
                decoder.choose()
            count += 1
        if len(stops) and bool(decoder.ended.all()):
            break
    new = decoder.chosen[:, :count].clone()
    if len(stops):
        new = new[:, : needed(new, stops.to(new.device))]
    return torch.cat((tokens, new), -1)


def needed(new: Tensor, stops: Tensor) -> int:
    """Columns until the last sequence has ended."""
    ends = (new[:, :, None] == stops).any(-1)
    last = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, new.shape[1])
    return int(last.max())


def chosen_on_the_host(
    decoder: Decoder, tokens: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any
) -> Tensor:
    """Sampling, processors, streamers: as transformers' loop, with the step replayed."""
    unfinished = torch.ones(len(tokens), dtype=torch.int64, device=tokens.device)
    has_end, padding = any(hasattr(c, "eos_token_id") for c in criteria), config._pad_token_tensor
    while True:
        scores = processors(tokens, decoder.state.logits.to(torch.float32, copy=True))
        if config.do_sample:
            chosen = torch.multinomial(torch.nn.functional.softmax(scores, -1), 1).squeeze(1)
        else:
            chosen = scores.argmax(-1)
        if has_end:
            chosen = chosen * unfinished + padding.to(tokens.device) * (1 - unfinished)
        tokens = torch.cat((tokens, chosen[:, None]), -1)
        if streamer is not None:
            streamer.put(chosen.cpu())
        unfinished = unfinished & ~criteria(tokens, None)
        if not bool(unfinished.max()):
            return tokens
        decoder.state.tokens.copy_(chosen[:, None])
        decoder.step()
