"""LoRA adapters put on a model as the settings say, or the reason why they cannot be."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from whit.errors import TrainingError
from whit.extras import missing
from whit.modules import PackedModule, QuantizedExperts, QuantizedLinear
from whit.randomness import seeded
from whit.training.prepare import prepare_for_training
from whit.training.settings import ALL_LINEAR, Tuning

NAMED = 12  # names that an error lists
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}  # relative, of the logits
NOISE = 3  # times what the mere length of a row changes


def add_adapters(model: Any, tuning: Tuning, seed: int) -> Any:  # peft.PeftModel
    """The model, prepared for training, with fresh adapters in float32; A is random by the seed, B is 0.

    Raises TrainingError where PEFT is not installed, and for targets that are not there or cannot be adapted.
    """
    try:
        import peft
    except ImportError:
        raise TrainingError(missing("train", "adapters")) from None
    from whit.training.lora import use_fused

    check_targets(model, tuning.targets)
    prepare_for_training(model, gradient_checkpointing=tuning.checkpointing)
    everything = tuning.targets == (ALL_LINEAR,)
    config = peft.LoraConfig(
        r=tuning.rank, lora_alpha=tuning.alpha, lora_dropout=tuning.dropout, use_dora=tuning.dora,
        use_rslora=tuning.rslora, target_modules=ALL_LINEAR if everything else list(tuning.targets),
        task_type="CAUSAL_LM", fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
    )  # fmt: skip
    use_fused(config)
    with seeded(seed, torch.device("cpu")):
        adapted = peft.get_peft_model(model, config)
    for parameter in adapters(adapted):
        parameter.data = parameter.data.float()
    config.target_modules = sorted(config.target_modules)  # a set would be written in any order
    return adapted


def adapters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_packing(model: Any) -> None:
    """TrainingError where examples in one row see each other: tried with two short ones, whose first is changed.

    What an architecture makes of positions that begin again is not said anywhere.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _unpackable(model, "takes no positions")
    size = int(model.config.get_text_config().vocab_size)
    tokens = torch.arange(3, 19, device=model.device).reshape(2, 8) % size
    positions = torch.arange(8, device=model.device).repeat(2)[None]
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.cat([start, tokens[1]])[None], position_ids=positions, use_cache=False).logits[0, 8:]
            for start in (tokens[0], tokens[0].flip(0))
        )
        alone = model(input_ids=tokens[1][None], use_cache=False).logits[0]
        ahead = model(input_ids=tokens.flip(0).reshape(1, -1), use_cache=False).logits[0, :8]  # sees no more than alone
    usual = ROUNDING.get(first.dtype, 1e-3)  # other shapes and attention kernels round otherwise
    noise = NOISE * _distance(ahead, alone)
    if not (_distance(second, first) <= usual and _distance(alone, first) <= max(usual, noise)):
        raise _unpackable(model, "lets examples in one row see each other")


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm())


def _unpackable(model: Any, reason: str) -> TrainingError:
    return TrainingError(
        f"{type(model).__name__}: {reason}; packed examples must be apart; pass --no-packing to give each its own row"
    )


def check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """TrainingError where a name matches no linear, or where all are asked for and some are stacks of experts."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    if targets == (ALL_LINEAR,):
        stacks = list(_stacks(model))
        if stacks:
            raise TrainingError(
                f"{stacks[0]}: holds the matrices of all experts in one tensor ({len(stacks)} such); an adapter sits "
                f"beside a linear; name the linears that there are with --target {_names(linears)}"
            )
        return
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise TrainingError(
                f"target {target}: matches no linear of the model; it must name one; there are {_names(linears)}"
            )


def _stacks(model: nn.Module) -> Any:
    """Names of three-dimensional weights, packed or not."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            yield name
        elif not isinstance(module, PackedModule | QuantizedLinear):
            yield from (f"{name}.{key}" for key, p in module.named_parameters(recurse=False) if p.dim() == 3)


def _names(linears: list[str]) -> str:
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in linears if name.rpartition(".")[2] != "lm_head"))
    return ",".join(last[:NAMED]) + (",..." if len(last) > NAMED else "")
