"""Which linears of a block share one input, and where a scale of that input folds. The tables are in groups.py."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from whit.errors import UnsupportedModelError
from whit.model.groups import ADD_ONE, GROUPS, NEEDS_RELU, OPT_POST_NORM, PARALLEL
from whit.model.targets import experts_transposed, find_targets, is_experts


@dataclass(frozen=True, eq=False)
class Folding:
    """One activation into which a scale folds; all are names of the model's parameters.

    `channels` (in,) int64 says which of the source's channels each input column of the consumers sees. `offset` is
    what the module adds to the source's weight. `is_norm`: the weight is a vector; otherwise it is a matrix or a
    stack of them, whose outputs are the channels. `transposed` are the parameters that are stored (in, out).
    """

    weight: str
    bias: str | None
    consumers: tuple[str, ...]
    channels: Tensor
    is_norm: bool
    offset: float = 0.0
    transposed: frozenset[str] = frozenset()


def find_foldings(model: PreTrainedModel) -> dict[str, tuple[Folding, ...]]:
    """The foldings of every block; UnsupportedModelError where the architecture has no table."""
    config, blocks = model.config.get_text_config(), find_blocks(model)
    table = _table(config)
    found = {
        name: tuple(_foldings(model, name, block, table))
        for name, block in zip(blocks.names, blocks.modules, strict=True)
    }
    if not any(found.values()):
        known = ", ".join(sorted(GROUPS))
        raise UnsupportedModelError(
            f"{type(model).__name__}: where scales fold in model type {config.model_type!r} is not known; a transform "
            f"such as awq needs one of {known}; choose a method without a transform, such as gptq"
        )
    return found


def _table(config: PretrainedConfig) -> dict[str, str]:
    """Where scales fold in this configuration; empty where nobody knows."""
    table = GROUPS.get(config.model_type, {})
    if config.model_type == "opt" and not config.do_layer_norm_before:
        table = OPT_POST_NORM
    if config.model_type == "stablelm" and config.use_parallel_residual:
        table = PARALLEL
    if getattr(config, "apply_residual_connection_post_layernorm", False):  # what leaves the norms is the residual too
        table = {source: consumers for source, consumers in table.items() if not source.endswith("norm")}
    if getattr(config, "clip_qkv", None):  # what is clamped lets no factor through
        table = {source: consumers for source, consumers in table.items() if not source.endswith("heads")}
    if "relu" not in (getattr(config, "activation_function", None), getattr(config, "dense_act_fn", None)):
        table = {source: consumers for source, consumers in table.items() if source not in NEEDS_RELU}
    return table


def _foldings(model: PreTrainedModel, prefix: str, block: nn.Module, table: dict[str, str]) -> Iterator[Folding]:
    modules, parameters = dict(block.named_modules()), dict(block.named_parameters())
    config = model.config.get_text_config()

    def parameter(name: str) -> str | None:
        """Of a module its weight; experts are parameters themselves."""
        return next((p for p in (f"{name}.weight", name) if p in parameters), None)

    for key, variants in table.items():
        source, _, layout = key.partition(":")
        for variant in variants.split("|"):
            names = [parameter(name) for name in (source, *variant.split())]
            if None in names:
                continue
            weight, *consumers = [name for name in names if name is not None]
            involved = (weight, *consumers)
            transposed = {n for n in involved if _is_transposed(modules[n.rpartition(".")[0]])}
            is_norm = parameters[weight].dim() == 1
            columns = parameters[consumers[0]].shape[-2 if consumers[0] in transposed else -1]
            rows = parameters[weight].shape[-1 if weight in transposed or is_norm else -2]
            yield Folding(
                f"{prefix}.{weight}",
                f"{prefix}.{source}.bias" if f"{source}.bias" in parameters else None,
                tuple(f"{prefix}.{name}" for name in consumers),
                _channels(config, layout, rows, columns),
                is_norm,
                float(is_norm and config.model_type in ADD_ONE),
                frozenset(f"{prefix}.{name}" for name in transposed),
            )


def _is_transposed(holder: nn.Module) -> bool:
    """Whether the matrices that a module holds are (in, out)."""
    return isinstance(holder, Conv1D) or (is_experts(holder) and experts_transposed(holder))


def _channels(config: PretrainedConfig, layout: str, rows: int, columns: int) -> Tensor:
    """The source's channel of each input column of its consumers."""
    if not layout:
        return torch.arange(rows - columns, rows)
    heads: int = config.num_attention_heads
    within = torch.arange(columns // heads)
    if layout == "packed":
        first = (torch.arange(heads) + 1) * (rows // heads) - len(within)  # values come last in each head
        return (first[:, None] + within).flatten()
    value_heads: int = getattr(config, "num_key_value_heads", None) or heads
    first = rows + (torch.arange(heads) // (heads // value_heads) - value_heads) * len(within)
    return (first[:, None] + within).flatten()


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, by name, in the order in which they run.

    `decoder`: the number of the first one that reads what those before it made of another text; None: there is none.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    decoder: int | None = None


def text_parts(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """What runs on tokens: an encoder, then its decoder; or all of the model; or, where images or sounds come in beside
    them, the language model."""
    if is_encoder_decoder(model):
        return model.get_encoder(), model.get_decoder()
    beside = model.config.get_text_config() is not model.config
    return (model.get_decoder() if beside else model.base_model,)


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether it reads one text and writes another."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and model.get_encoder() is not model.get_decoder()


def find_blocks(model: PreTrainedModel) -> Blocks:
    """The blocks of every part that runs on text: of each, the one list of blocks that holds linears.

    UnsupportedModelError where there is none or more than one.
    """
    holders = [target.holder for target in find_targets(model) if not target.kept_by_default]
    parts, lists = text_parts(model), lists_of_blocks(model, holders)
    takes = getattr(parts[0], "main_input_name", "input_ids")
    takes_tokens = "input_ids" in inspect.signature(parts[0].forward).parameters
    if takes != "input_ids" and (len(lists) == len(parts) or not takes_tokens):
        raise UnsupportedModelError(
            f"{type(model).__name__}: runs on {takes}; calibration runs a model on text; choose a method that needs no "
            "data, such as hqq"
        )
    found: dict[str, nn.ModuleList] = {}
    first = []
    for part in parts:
        inside = {id(module) for module in part.modules()}
        own = {name: blocks for name, blocks in lists.items() if id(blocks) in inside}
        if len(own) != 1:
            said = "none" if not own else f"{len(own)} ({', '.join(own)})"
            raise UnsupportedModelError(
                f"{type(model).__name__}: lists of blocks with linears: {said}; calibration runs a single list; "
                "choose a method that needs no data, such as hqq"
            )
        first.append(sum(map(len, found.values())))
        found |= own
    names = tuple(f"{name}.{i}" for name, blocks in found.items() for i in range(len(blocks)))
    modules = tuple(block for blocks in found.values() for block in blocks)
    return Blocks(names, modules, first[1] if len(parts) > 1 else None)


def lists_of_blocks(model: nn.Module, holders: Collection[str]) -> dict[str, nn.ModuleList]:
    """The outermost lists that hold any of the named linears, packed ones too."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and outermost and any(h.startswith(f"{name}.") for h in holders):
            lists[name] = module
    return lists
