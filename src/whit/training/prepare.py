"""A quantized model made ready for adapters.

QLoRA: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from whit.errors import UnsupportedModelError
from whit.modules import PackedModule, make_countable

Model = TypeVar("Model", bound=nn.Module)


def prepare_for_training(model: Model, *, gradient_checkpointing: bool = True) -> Model:
    """Freeze a model, in place, so that adapters can be put on its weights, packed or not; returns the same model.

    All its parameters are frozen; adapters that are added afterwards are trainable. Norms, embeddings and head keep the
    dtype that they were loaded in, unlike in PEFT's own function: they are frozen, so no small update can be lost,
    norms sum in float32 anyway, and a float32 norm would turn the activations of a bfloat16 model, and all its
    products, into float32. PEFT itself keeps adapters in float32 (`autocast_adapter_dtype`).

    The output of the input embedding requires a gradient, because checkpointed blocks would otherwise be cut off from
    the loss. `gradient_checkpointing` keeps only the inputs of blocks for the backward pass (non-reentrant; active in
    `model.train()` mode). PEFT counts packed weights as the weights that they stand for from now on.

    Raises UnsupportedModelError for packed weights that accelerate has offloaded, and for gradient checkpointing if the
    architecture has none.
    """
    _check_resident(model)
    _check_checkpointing(model, gradient_checkpointing)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PackedModule):
            make_countable(module)
    interface: Any = model
    if hasattr(model, "_require_grads_hook"):  # prepared before: not a second hook
        interface.disable_input_require_grads()
    interface.enable_input_require_grads()
    if gradient_checkpointing:
        interface.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _check_resident(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule) or not hasattr(module, "_hf_hook"):
            continue
        if module.packed.device.type == "meta":
            raise UnsupportedModelError(
                f"{name}: its packed weight is offloaded; the backward pass needs it where it is computed with; "
                "load the model with a device_map that offloads nothing"
            )


def _check_checkpointing(model: nn.Module, wanted: bool) -> None:
    if not hasattr(model, "enable_input_require_grads"):
        raise UnsupportedModelError(
            f"{type(model).__name__}: is not a transformers model; its input embedding must be known; "
            "pass the model that from_pretrained gave"
        )
    if wanted and not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedModelError(
            f"{type(model).__name__}: has no gradient checkpointing; all activations must be kept; "
            "pass gradient_checkpointing=False"
        )
