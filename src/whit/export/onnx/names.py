"""Names in the graphs that onnxruntime-genai's model builder makes, and those of transformers.

`model.layers.0.self_attn.q_proj.weight` is `model.layers.0.attn.q_proj.MatMul.weight` there, its bias
`...q_proj.Add.bias`, a norm of heads `...q_norm.layernorm.weight`, and the last norm counts as that of one more layer:
`model.layers.L.final_norm_layernorm.weight`. A node is called like its weight, with slashes:
`/model/layers.0/attn/q_proj/MatMul_Q4`.
"""

from __future__ import annotations

import re

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LAST_NORM = "model.norm.weight"


def onnx_name(name: str, layers: int) -> str:
    """A parameter of transformers as the graph names it; a quantized matrix adds its tensors' endings to the name."""
    if name == LAST_NORM:
        return f"model.layers.{layers}.final_norm_layernorm.weight"
    name = name.replace(".self_attn.", ".attn.")
    if re.search(r"(_proj|^lm_head)\.weight$", name):
        return name.removesuffix("weight") + "MatMul.weight"
    if name.endswith(".bias"):
        return name.removesuffix("bias") + "Add.bias"
    return re.sub(r"\.([qk])_norm\.weight$", r".\1_norm.layernorm.weight", name)


def parameter_name(name: str) -> str:
    """The inverse, also for a module: `model.layers.0.attn.q_proj` is `model.layers.0.self_attn.q_proj`."""
    if re.fullmatch(r"model\.layers\.\d+\.final_norm_layernorm\.weight", name):
        return LAST_NORM
    name = re.sub(r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn.", name)
    return name.replace(".MatMul.", ".").replace(".Add.", ".").replace("_norm.layernorm.", "_norm.")


def node_module(node: str) -> str:
    """The module whose product a node is, as transformers names it."""
    return parameter_name(re.sub(r"/MatMul(NBits|_Q\d+(G\d+)?)?$", "", node).strip("/").replace("/", "."))
