"""The nodes of a decoder of Llama's family, as onnxruntime-genai's model builder lays them out for CPUs.

x = embedding[input_ids]; in each block h = norm(x), a = GroupQueryAttention(W_q h, W_k h, W_v h) with rotary
embedding inside, x += W_o a, h = norm(x), x += W_down (silu(W_gate h) * W_up h); logits = W_head norm(x). A sum and the
norm after it are one node, SkipSimplifiedLayerNormalization. Everything is computed in float32; kept matrices have
their own type and are cast, which ONNX Runtime does once, on loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whit.export.base import Parameter
from whit.export.onnx.names import EMBEDDING, HEAD, LAST_NORM, onnx_name

MICROSOFT = "com.microsoft"
CONTRIBUTED = ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention", "SkipSimplifiedLayerNormalization")
FLOAT, INT32, INT64 = 1, 6, 7  # TensorProto.DataType
MASK = "/model/attn_mask_reformat/attn_mask_subgraph"
SEQLENS, TOTAL = f"{MASK}/Sub/Cast/output_0", f"{MASK}/Gather/Cast/output_0"


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration is in the graph. `windows` has for each block how far back it looks, -1: all."""

    layers: int
    heads: int
    kv_heads: int
    head_width: int
    epsilon: float
    windows: tuple[int, ...]


class Decoder:
    """`nodes`, in order, over the parameters of a model by transformers' names; `used` are those that are read."""

    def __init__(self, onnx: Any, shape: Shape, parameters: Mapping[str, Parameter]) -> None:
        self.onnx, self.shape, self.parameters = onnx, shape, parameters
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.used: set[str] = set()
        self.table = EMBEDDING if EMBEDDING in parameters else HEAD
        self._mask()
        stream = self._embedding()
        added: tuple[str, ...] = (stream,)
        for layer in range(shape.layers):
            added = self._block(layer, added)
        last, _ = self._norm(LAST_NORM, added, f"/model/layers.{shape.layers}/final_norm_layernorm", keeps=False)
        self._linear(HEAD if HEAD in parameters else EMBEDDING, last, "/lm_head", "logits")

    def _add(self, op: str, name: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        """A node, whose outputs have names of their own or the node's; the first output."""
        outputs = outputs if outputs and outputs[0] else (f"{name}/output_0",)
        domain = MICROSOFT if op in CONTRIBUTED else ""
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def _int64(self, *values: int, scalar: bool = False) -> str:
        """A constant by its value."""
        name = f"/model/constants/INT64/{values[0] if scalar else list(values)}"
        if name not in self.constants:
            shape = () if scalar else (len(values),)
            self.constants[name] = self.onnx.helper.make_tensor(name, INT64, shape, values)
        return name

    def _mask(self) -> None:
        """Tokens before the last one of each row, and the length of the longest row."""
        count = self._add("ReduceSum", f"{MASK}/ReduceSum", ["attention_mask", self._int64(1)], keepdims=0)
        before = self._add("Sub", f"{MASK}/Sub", [count, self._int64(1)])
        self._add("Cast", f"{MASK}/Sub/Cast", [before], SEQLENS, to=INT32)
        sizes = self._add("Shape", f"{MASK}/Shape", ["attention_mask"])
        total = self._add("Gather", f"{MASK}/Gather", [sizes, self._int64(1, scalar=True)], axis=0)
        self._add("Cast", f"{MASK}/Gather/Cast", [total], TOTAL, to=INT32)

    def _name(self, parameter: str) -> str:
        self.used.add(parameter)
        return onnx_name(parameter, self.shape.layers)

    def _floats(self, parameter: str, node: str) -> str:
        """A kept parameter in float32."""
        name, spec = self._name(parameter), self.parameters[parameter].spec
        if len(spec.shape) == 1 or spec.dtype == torch.float32:
            return name
        return self._add("Cast", f"{node}/Cast", [name], to=FLOAT)

    def _embedding(self) -> str:
        base, parameter = "/model/embed_tokens", self.parameters[self.table]
        name, format = self._name(self.table), parameter.format
        if format is None:
            rows = self._add("Gather", f"{base}/Gather", [name, "input_ids"])
            return (
                rows if parameter.spec.dtype == torch.float32 else self._add("Cast", f"{base}/Cast", [rows], to=FLOAT)
            )
        rows_count, columns = parameter.spec.shape
        flat = self._int64(rows_count, columns * format.bits // 8)
        codes = self._add("Reshape", f"{base}/Reshape", [f"{name}_Q{format.bits}", flat])
        zero = f"{name}_zero_points"
        if "zero_point" not in format.param_specs(*parameter.spec.shape):  # the operator has no middle by default
            width = -(-columns // format.group_size * format.bits // 8)
            byte = sum(1 << (shift + format.bits - 1) for shift in range(0, 8, format.bits))
            middle = self.onnx.helper.make_tensor("value", 2, (1,), [byte])
            zero = self._add("ConstantOfShape", f"{base}/Middle", [self._int64(rows_count, width)], value=middle)
        return self._add(
            "GatherBlockQuantized", f"{base}/GatherBlockQuantized", [codes, "input_ids", f"{name}_scales", zero],
            bits=format.bits, block_size=format.group_size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def _norm(self, weight: str, added: Sequence[str], name: str, keeps: bool = True) -> tuple[str, str]:
        """The norm of one tensor or of the sum of two, and that sum where it `keeps` it."""
        scale, output = self._floats(weight, name), f"{name}/output_0"
        if len(added) == 1:
            how = {"axis": -1, "stash_type": 1, "epsilon": self.shape.epsilon}
            self._add("SimplifiedLayerNormalization", f"{name}/LayerNorm", [added[0], scale], output, **how)
            return output, added[0]
        outputs = (output, "", "", f"{name}/output_3") if keeps else (output,)
        epsilon = self.shape.epsilon
        inputs = [*added, scale]
        self._add("SkipSimplifiedLayerNormalization", f"{name}/SkipLayerNorm", inputs, *outputs, epsilon=epsilon)
        return output, outputs[-1]

    def _linear(self, weight: str, inputs: str, base: str, output: str = "") -> str:
        """W x, and the bias where there is one."""
        parameter = self.parameters[weight]
        bias = weight.removesuffix("weight") + "bias"
        product = "" if bias in self.parameters else output
        if parameter.format is None:
            node = f"{base}/MatMul"
            turned = self._add("Transpose", f"{node}/Transpose", [self._floats(weight, node)], perm=[1, 0])
            found = self._add("MatMul", node, [inputs, turned], product)
        else:
            found = self._matmul_nbits(parameter, inputs, base, product)
        if bias in self.parameters:
            found = self._add("Add", f"{base}/Add", [found, self._floats(bias, f"{base}/Add")], output)
        return found

    def _matmul_nbits(self, parameter: Parameter, inputs: str, base: str, output: str) -> str:
        format, (rows, columns), name = parameter.format, parameter.spec.shape, self._name(parameter.name)
        assert format is not None
        tensors = [f"{name}_Q{format.bits}", f"{name}_scales"]
        if "zero_point" in format.param_specs(rows, columns):
            tensors.append(f"{name}_zero_points")
        return self._add(
            "MatMulNBits", f"{base}/MatMul_Q{format.bits}", [inputs, *tensors], output,
            K=columns, N=rows, bits=format.bits, block_size=format.group_size, accuracy_level=0,
        )  # fmt: skip

    def _head_norm(self, weight: str, inputs: str, base: str, heads: int) -> str:
        """The norm of each head (batch, length, heads * width), where the model has one."""
        if weight not in self.parameters:
            return inputs
        width = self.shape.head_width
        cut = self._add("Reshape", f"{base}/Reshape_1", [inputs, self._int64(0, -1, width)])
        normal, _ = self._norm(weight, (cut,), base)
        return self._add("Reshape", f"{base}/Reshape_2", [normal, self._int64(0, -1, heads * width)])

    def _block(self, layer: int, added: Sequence[str]) -> tuple[str, ...]:
        """The two tensors whose sum leaves the block."""
        holder, base = f"model.layers.{layer}", f"/model/layers.{layer}"
        normal, stream = self._norm(f"{holder}.input_layernorm.weight", added, f"{base}/input_layernorm")
        attended = self._attention(layer, normal)
        normal, stream = self._norm(
            f"{holder}.post_attention_layernorm.weight", (stream, attended), f"{base}/post_attention_layernorm"
        )
        gate, up = (
            self._linear(f"{holder}.mlp.{part}_proj.weight", normal, f"{base}/mlp/{part}_proj")
            for part in ("gate", "up")
        )
        sigmoid = self._add("Sigmoid", f"{base}/mlp/act_fn/Sigmoid", [gate])
        active = self._add("Mul", f"{base}/mlp/act_fn/Mul", [gate, sigmoid])
        product = self._add("Mul", f"{base}/mlp/Mul", [active, up])
        return stream, self._linear(f"{holder}.mlp.down_proj.weight", product, f"{base}/mlp/down_proj")

    def _attention(self, layer: int, inputs: str) -> str:
        shape, holder, base = self.shape, f"model.layers.{layer}.self_attn", f"/model/layers.{layer}/attn"
        q, k, v = (self._linear(f"{holder}.{n}_proj.weight", inputs, f"{base}/{n}_proj") for n in "qkv")
        q = self._head_norm(f"{holder}.q_norm.weight", q, f"{base}/q_norm", shape.heads)
        k = self._head_norm(f"{holder}.k_norm.weight", k, f"{base}/k_norm", shape.kv_heads)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        name = f"{base}/GroupQueryAttention"
        attended = self._add(
            "GroupQueryAttention", name, [q, k, v, *past, SEQLENS, TOTAL, "cos_cache", "sin_cache"],
            f"{name}/output_0", *(f"present.{layer}.{kind}" for kind in ("key", "value")),
            num_heads=shape.heads, kv_num_heads=shape.kv_heads, scale=shape.head_width**-0.5,
            local_window_size=shape.windows[layer], softcap=0.0, do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        return self._linear(f"{holder}.o_proj.weight", attended, f"{base}/o_proj")
