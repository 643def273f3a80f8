"""Formats of installed peer libraries, as transformers itself loads them, and llama.cpp's own; none is a dependency.

Each row of PEERS is a name that a user types, the package that must be there, and what loads a model by it. A new peer
is one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from whit.errors import EvaluationError
from whit.report import llama_cpp


@dataclass(frozen=True)
class Peer:
    """`package` is the import name; `load` quantizes and loads the model of a folder for "cpu" or "cuda"."""

    name: str
    package: str
    install: str
    load: Callable[[str, str], Any]

    @property
    def is_installed(self) -> bool:
        try:
            return find_spec(self.package) is not None
        except ModuleNotFoundError:  # a parent package that is missing
            return False


def _through_transformers(config: Callable[[torch.dtype], Any]) -> Callable[[str, str], Any]:
    """A loader by transformers' quantization_config, which `config` makes for a compute dtype."""

    def load(model: str, device: str) -> Any:
        from transformers import AutoModelForCausalLM

        dtype, placement = torch.bfloat16, {"": device}
        return AutoModelForCausalLM.from_pretrained(
            model, quantization_config=config(dtype), dtype=dtype, device_map=placement
        ).eval()

    return load


def _bitsandbytes(**options: Any) -> Callable[[str, str], Any]:
    def config(dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        compute = {"bnb_4bit_compute_dtype": dtype} if options.get("load_in_4bit") else {}
        return BitsAndBytesConfig(**options, **compute)

    return _through_transformers(config)


def _hqq(bits: int, group_size: int) -> Callable[[str, str], Any]:
    """By hqq itself: transformers 5 has no way to it."""

    def load(model: str, device: str) -> Any:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map={"": device}).eval()
        head = network.get_output_embeddings()
        linears = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear) and m is not head]
        for name, linear in linears:
            config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
            quantized = HQQLinear(linear, config, compute_dtype=torch.bfloat16, device=device)
            network.set_submodule(name, quantized)
        return network

    return load


def _quanto(weights: str) -> Callable[[str, str], Any]:
    def config(dtype: torch.dtype) -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    return _through_transformers(config)


def _torchao(make: Callable[[], Any]) -> Callable[[str, str], Any]:
    def config(dtype: torch.dtype) -> Any:
        from transformers import TorchAoConfig

        return TorchAoConfig(make())

    return _through_transformers(config)


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _torchao_int4() -> Any:
    """On a processor torchao's four bits are a prototype of it, multiplied by torch's own kernel."""
    if torch.cuda.is_available():
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(group_size=64)
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=64)


_FOUR = {"load_in_4bit": True}
PEERS = (
    Peer("bitsandbytes:nf4", "bitsandbytes", "bitsandbytes", _bitsandbytes(**_FOUR, bnb_4bit_quant_type="nf4")),
    Peer("bitsandbytes:nf4-dq", "bitsandbytes", "bitsandbytes",
         _bitsandbytes(**_FOUR, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    Peer("bitsandbytes:fp4", "bitsandbytes", "bitsandbytes", _bitsandbytes(**_FOUR, bnb_4bit_quant_type="fp4")),
    Peer("bitsandbytes:int8", "bitsandbytes", "bitsandbytes", _bitsandbytes(load_in_8bit=True)),
    Peer("hqq-library:int4-g64", "hqq", "hqq", _hqq(4, 64)),
    Peer("hqq-library:int3-g64", "hqq", "hqq", _hqq(3, 64)),
    Peer("hqq-library:int2-g64", "hqq", "hqq", _hqq(2, 64)),
    Peer("quanto:int8", "optimum.quanto", "optimum-quanto", _quanto("int8")),
    Peer("quanto:int4", "optimum.quanto", "optimum-quanto", _quanto("int4")),
    Peer("torchao:int8", "torchao", "torchao", _torchao(_torchao_int8)),
    Peer("torchao:int4", "torchao", "torchao", _torchao(_torchao_int4)),
    *(Peer(f"llama.cpp:{name}", llama_cpp.PACKAGE, llama_cpp.INSTALL, llama_cpp.loader(name))
      for name in llama_cpp.FILE_TYPES),
)  # fmt: skip


def find_peer(name: str) -> Peer | None:
    """The peer of that name, installed or not."""
    return next((peer for peer in PEERS if peer.name == name), None)


def load_peer(peer: Peer, model: str, device: str) -> Any:
    """The model quantized by the peer while it is loaded. EvaluationError where the library is not there."""
    if not peer.is_installed:
        raise EvaluationError(f"{peer.name}: {peer.package} is not installed; it must be; pip install {peer.install}")
    return peer.load(model, device)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; of a tensor that wraps others, as peers' packed weights do, of those."""
    found: dict[int, int] = {}
    waiting: list[Any] = [*model.parameters(), *model.buffers()]
    while waiting:
        tensor = waiting.pop()
        if type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())
