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
    """The same model, in place, frozen and ready for adapters beside its weights, packed in any format or floating.

    Nothing of it is trainable any more: adapters that are put on afterwards are. Norms, embeddings and head keep the
    dtype that they were loaded in. They are frozen, so no small update is lost in it, norms sum in float32 inside, and
    a float32 norm would turn the activations of a bfloat16 model, and all its products, into float32. PEFT itself
    keeps its adapters in float32 (`autocast_adapter_dtype`).

    The output of the input embedding requires a gradient, lest checkpointed blocks be cut off from the loss.
    `gradient_checkpointing` keeps only the inputs of blocks for the backward pass (non-reentrant; it works in
    `model.train()` mode only). PEFT counts packed weights as weights from now on.

    Raises UnsupportedModelError for packed weights that accelerate has offloaded, and for gradient checkpointing where
    the architecture has none.
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
            f"{type(model).__name__}: is no transformers model; its input embedding must be known; "
            "pass the model that from_pretrained gave"
        )
    if wanted and not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedModelError(
            f"{type(model).__name__}: has no gradient checkpointing; all activations must be kept; "
            "pass gradient_checkpointing=False"
        )
