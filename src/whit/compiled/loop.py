"""The decoding loop that `generate` is given: transformers' sampling loop around a compiled step, for one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from whit.compiled.llama import Compiled

AT_ONCE = 32  # tokens that compiled code decodes before Python may be interrupted
ROOM = 256  # tokens for which there is room beyond the prompt, before the cache is made larger
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class NotCovered(Exception):
    """A call that the loop does not take, raised before it has done anything."""


class Placed(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache whose keys and values come to lie where the decoder reads them, and nowhere else."""

    def __init__(self, layer: DynamicLayer, room: Tensor) -> None:
        """`room` (2, kv_heads, capacity, head_dim); what the layer holds already moves there."""
        super().__init__()
        self.room, held = room, layer.get_seq_length()
        self.lazy_initialization(room, room)
        if held:
            self.update(layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        held: int = self.get_seq_length()
        beyond = held + key_states.shape[-2] > self.room.shape[2]
        if beyond or torch.is_grad_enabled():  # a call of another's, after one of ours that was broken off
            return super().update(key_states, value_states)  # type: ignore[no-any-return]
        whole = self.room[:, None, :, : held + key_states.shape[-2]]
        whole[0, :, :, held:], whole[1, :, :, held:] = key_states, value_states
        self.keys, self.values = whole[0], whole[1]
        return self.keys, self.values


class States:
    """Keys and values of a sequence, with room to grow, and the decoder that reads them."""

    def __init__(self, compiled: Compiled, cache: Any, most: int, coming: int = 0) -> None:
        """Before a prompt of `coming` tokens goes through the cache; `most` tokens at the most will lie here."""
        self.compiled, self.most, self.cache = compiled, most, cache
        self.tensor = compiled.room(min(cache.get_seq_length() + coming + ROOM, most))
        for i, layer in enumerate(cache.layers):  # none yet, perhaps
            if type(layer) is DynamicLayer:
                cache.layers[i] = Placed(layer, self.tensor[i])

    def begin(self) -> None:
        """The prompt has gone through the cache."""
        self.length: int = self.cache.get_seq_length()
        for layer, (keys, values) in zip(self.cache.layers, self.tensor, strict=True):
            if type(layer) is not Placed:
                keys[:, : self.length], values[:, : self.length] = layer.keys[0], layer.values[0]
                # Once is enough:
                layer.keys, layer.values = layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone()
        self.decoder = self.compiled.decoder(self.tensor)

    def decode(self, token: int, count: int, stops: list[int]) -> list[int]:
        """`Decoder.decode` after all that lies here."""
        if self.length + count > self.tensor.shape[3]:
            wider = self.compiled.room(min(max(2 * self.tensor.shape[3], self.length + count), self.most))
            wider[:, :, :, : self.length] = self.tensor[:, :, :, : self.length]
            self.tensor, self.decoder = wider, self.compiled.decoder(wider)
            self.give_back()  # the narrower one is nobody's then
        found = self.decoder.decode(token, self.length, count, stops)
        self.length += len(found)
        return found

    def give_back(self) -> None:
        """Let the cache hold all that lies here."""
        for i, (keys, values) in enumerate(self.tensor):
            layer = self.cache.layers[i]
            if type(layer) is Placed:
                self.cache.layers[i] = layer = DynamicLayer()
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys[None, :, : self.length], values[None, :, : self.length]


def decode_loop(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
    compiled: Compiled, streams_to: Any = None, **model_kwargs: Any,
) -> Any:  # fmt: skip
    """What GenerationMixin._sample does for one sequence: its result and its random numbers."""
    past = _require_covered(input_ids, stopping_criteria, generation_config, model_kwargs)
    cache, config = model_kwargs["past_key_values"], generation_config
    if streams_to is not None:
        streams_to.put(input_ids.cpu())
    coming = input_ids.shape[1] - past
    states = States(compiled, cache, max(stopping_criteria.max_length, input_ids.shape[1] + 1), coming)
    outputs = model(input_ids=input_ids[:, past:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = outputs.logits[:, -1].to(torch.float32)
    states.begin()
    kept: dict[str, tuple[Tensor, ...]] = {"scores": (), "logits": ()}
    stops = _plain_stops(logits_processor, stopping_criteria, config, streams_to)
    while True:
        scores = logits_processor(input_ids, logits.clone() if config.output_logits else logits)
        kept["scores"] += (scores,) if config.output_scores else ()
        kept["logits"] += (logits,) if config.output_logits else ()
        if config.do_sample:
            token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
        else:
            token = torch.argmax(scores, dim=-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=-1)
        if streams_to is not None:
            streams_to.put(token[0].cpu())
        if stopping_criteria(input_ids, kept["scores"] if config.output_scores else None).all():
            break
        if stops is not None:
            input_ids = _all_at_once(states, input_ids, stops, stopping_criteria.max_length)
            break
        states.decode(int(token), 1, [])
        logits = states.decoder.logits[None].to(torch.float32, copy=True)
    if streams_to is not None:
        streams_to.end()
    states.give_back()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=kept["scores"] or None, logits=kept["logits"] or None, past_key_values=cache
    )


def _all_at_once(states: States, input_ids: Tensor, stops: list[int], max_length: int) -> Tensor:
    """The likeliest tokens up to a stop or `max_length`, with nothing in Python between them."""
    found = [int(input_ids[0, -1])]
    left = max_length - input_ids.shape[1]
    while left > 0 and (len(found) == 1 or found[-1] not in stops):
        found += states.decode(found[-1], min(left, AT_ONCE), stops)
        left = max_length - input_ids.shape[1] - len(found) + 1
    return torch.cat([input_ids, torch.tensor([found[1:]], dtype=input_ids.dtype)], dim=-1)


def _plain_stops(logits_processor: Any, stopping_criteria: Any, config: Any, streamer: Any) -> list[int] | None:
    """The tokens that end a plain greedy search; None where something looks at every token."""
    if config.do_sample or len(logits_processor) or streamer is not None:
        return None
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return None
    stops: list[int] = []
    for criteria in stopping_criteria:
        if type(criteria) is EosTokenCriteria:
            stops += criteria.eos_token_id.reshape(-1).tolist()
        elif type(criteria) is not MaxLengthCriteria:
            return None
    return stops


def _require_covered(input_ids: Tensor, stopping_criteria: Any, config: Any, model_kwargs: dict[str, Any]) -> int:
    """How many of the tokens lie in the cache already. Raises NotCovered for what only transformers' loop does."""
    cache: Any = model_kwargs.get("past_key_values")
    if config.get_generation_mode() not in MODES:
        raise NotCovered(f"compile: {config.get_generation_mode().value} is neither greedy search nor sampling")
    if len(input_ids) != 1 or not input_ids.numel() or model_kwargs.get("inputs_embeds") is not None:
        raise NotCovered(f"compile: the input is {tuple(input_ids.shape)}; compiled decoding takes one row of tokens")
    mask: Tensor | None = model_kwargs.get("attention_mask")
    if mask is not None and not (mask.ndim == 2 and bool((mask == 1).all())):
        raise NotCovered("compile: some tokens are masked")
    # transformers drops a mask that hides nothing and keeps its length; older releases leave it here.
    seen = mask.shape[1] if mask is not None else getattr(config, "_mask_length", -1)
    if type(cache) is not DynamicCache or not model_kwargs.get("use_cache", True):
        raise NotCovered(f"compile: the cache is a {type(cache).__name__}, not a DynamicCache")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise NotCovered("compile: attentions or hidden states are asked for")
    if config.prefill_chunk_size is not None or stopping_criteria.max_length is None:
        raise NotCovered("compile: the prompt is to be cut, or nothing says how long the text may become")
    past: int = cache.get_seq_length()
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotCovered(f"compile: the cache has a {type(layer).__name__}")
        if window is not None and (past or stopping_criteria.max_length >= window or config.return_dict_in_generate):
            raise NotCovered(f"compile: attention slides over {window} tokens")
    if past and (seen != input_ids.shape[1] or past >= input_ids.shape[1]):
        raise NotCovered(f"compile: {past} tokens are cached, of which {input_ids.shape[1]} tokens are no continuation")
    positions = model_kwargs.get("position_ids")
    if positions is not None and not torch.equal(positions[0, -1:], torch.tensor([input_ids.shape[1] - 1])):
        raise NotCovered("compile: positions are given")
    return past
