"""Which parameters of a transformer can be quantized, found on a skeleton that holds no weights.

A target is a matrix (out_features, in_features) or a stack of them (experts, out, in). Its packed tensors are
buffers of a module of their own, named `<Target.holder>.<tensor>`: a linear `...q_proj` with the parameter
`...q_proj.weight` becomes `...q_proj.codes`, `...q_proj.scale`; a fused expert parameter `...experts.down_proj`
becomes `...experts.down_proj.codes` and so on. Some architectures hold their experts (experts, in, out), and multiply
x @ W (gpt-oss, Llama 4); they are quantized along their inputs all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeGuard

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "conv1d", "embedding", "experts"]
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")
SAME = ("FalconLinear",)  # whose own forward is nn.Linear's, in other words
DIRECT = {  # linears whose holder multiplies by their weight without calling them
    ("MambaMixer", "dt_proj"),
    ("MobileBertLMPredictionHead", "dense"),
}
NARROW = 8  # rows or columns: in fewer, params take the room that codes save (Gemma 3n mixes 4 streams by such)


@dataclass(frozen=True)
class Target:
    """One quantizable parameter. `shape` is the shape as quantized: in_features last.

    `transposed`: the model holds its matrices (in, out), as GPT-2's Conv1D and some experts do.
    """

    parameter: str
    holder: str
    kind: Kind
    shape: tuple[int, ...]
    is_head: bool = False
    is_gate: bool = False
    transposed: bool = False

    @property
    def kept_by_default(self) -> bool:
        """Embeddings, output heads, the gates of experts and the narrowest linears are quantized only where a rule
        names them."""
        return self.is_head or self.is_gate or self.is_narrow or self.kind == "embedding"

    @property
    def is_narrow(self) -> bool:
        """Whether quantization saves next to nothing."""
        return min(self.shape[-2:]) < NARROW


def find_targets(model: nn.Module) -> tuple[Target, ...]:
    """Every quantizable parameter of a transformers model, in module order."""
    heads, gates, direct = _heads(model), _gates(model), {id(module) for module in used_directly(model).values()}
    modules = [(name, module) for name, module in model.named_modules() if id(module) not in direct]
    return tuple(t for name, module in modules for t in _targets_of(name, module, heads, gates))


def _targets_of(name: str, module: nn.Module, heads: set[int], gates: set[int]) -> Iterator[Target]:
    weight = f"{name}.weight"
    if _is_plain_linear(module):
        yield Target(weight, name, "linear", tuple(module.weight.shape), id(module) in heads, id(module) in gates)
    elif isinstance(module, Conv1D):
        yield Target(weight, name, "conv1d", tuple(module.weight.shape[::-1]), id(module) in heads, transposed=True)
    elif isinstance(module, nn.Embedding) and isinstance(module.weight, nn.Parameter):  # not packed already
        yield Target(weight, name, "embedding", tuple(module.weight.shape))
    elif is_experts(module):
        turned = experts_transposed(module)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                shape = tuple(parameter.mT.shape if turned else parameter.shape)
                yield Target(f"{name}.{key}", f"{name}.{key}", "experts", shape, transposed=turned)


def used_directly(model: nn.Module) -> dict[str, nn.Module]:
    """Linears that are no targets, since the module around them computes with their weight itself."""
    return {
        f"{name}.{key}".removeprefix("."): child
        for name, parent in model.named_modules()
        for key, child in parent.named_children()
        if (type(parent).__name__, key) in DIRECT or isinstance(child, NonDynamicallyQuantizableLinear)
    }


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacks of experts."""
    return type(module).__name__.endswith("Experts")


def experts_transposed(module: nn.Module) -> bool:
    """Whether a module's stacks are (experts, in, out).

    transformers says so of most. Where it does not, as of Llama 4's, the shapes do: what `gate_up_proj` gives, twice
    the width between, is what `down_proj` takes.
    """
    said = getattr(module, "is_transposed", None)
    if said is not None:
        return bool(said)
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.dim() != 3:
        return False
    return gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1])


def _gates(model: nn.Module) -> set[int]:
    """Linears beside experts, or inside a gate beside them: they weigh or choose among them, and are as small as they
    are sensitive."""
    blocks = [module for module in model.modules() if any(is_experts(child) for child in module.children())]
    beside = [child for block in blocks for child in block.children()]
    beside = [m for child in beside for m in (child.modules() if _chooses(child) else (child,))]
    return {id(module) for module in beside if isinstance(module, nn.Linear)}


def _chooses(module: nn.Module) -> bool:
    """Whether a module that holds a linear gives each token its experts (HunYuan's, DBRX's and JetMoE's)."""
    return type(module).__name__.endswith(("Gate", "Gating", "Router"))


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear whose forward is torch's: another may do anything with its weight."""
    forward_is_plain = type(module).forward is nn.Linear.forward or type(module).__name__ in SAME
    return isinstance(module, nn.Linear) and forward_is_plain


def _heads(model: nn.Module) -> set[int]:
    """Modules that map to the vocabulary or to classes, with all that is inside them."""
    heads = [getattr(model, name, None) for name in HEADS]
    heads.append(getattr(model, "get_output_embeddings", lambda: None)())
    return {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}


def input_table(model: PreTrainedModel) -> nn.Module | None:
    """The embedding of tokens; None where a model has none, or several (CLIP)."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
        return found
    except NotImplementedError:
        return None


def vocabulary_tables(model: PreTrainedModel) -> dict[str, int]:
    """Modules whose matrix has a row for each token, the input embedding and the head over the vocabulary, and the
    number of tokens."""
    tables = (input_table(model), model.get_output_embeddings())
    count = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(count, int):
        return {}
    return {
        name: count
        for name, module in model.named_modules()
        if any(module is table for table in tables if table is not None)
    }


def tied_weights(model: nn.Module) -> dict[str, str]:
    """For each weight that is stored under another name: that name (what transformers ties on loading)."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {name: source for name, source in ties.items() if name.endswith("weight")}
