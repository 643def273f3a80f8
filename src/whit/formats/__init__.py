"""Which numbers exist. A new format is one file and one name in FORMATS."""

from __future__ import annotations

import difflib
import re

from whit.errors import FormatError
from whit.formats.absmax import Absmax8
from whit.formats.act_order import ActOrder
from whit.formats.affine import Affine
from whit.formats.bands import PATTERN as BANDS
from whit.formats.bands import Bands
from whit.formats.codebook import FP4, NF4, Codebook
from whit.formats.ggml import Ggml
from whit.formats.lowrank import PATTERN as SIDE_CAR
from whit.formats.lowrank import LowRank
from whit.formats.microfloat import BFloat16, Float8
from whit.formats.offset import Offset
from whit.formats.rotated import PATTERN as ROTATED
from whit.formats.rotated import Rotated
from whit.formats.signs import Binary, Ternary
from whit.tensor import Format

FORMATS = (Affine, Codebook, Ggml, Float8, BFloat16, Absmax8, Offset, Ternary, Binary, ActOrder)

EXAMPLES = {
    "int8": "8-bit integers, one float32 scale per row (the same as int8-channel)",
    "int8-absmax": "as bitsandbytes rounds to 8 bits: w = code max|w| / 127",
    "int8-tensor": "one scale for the whole tensor",
    "int8-g128": "one bfloat16 scale per 128 columns",
    "int6-g64": "", "int5-g64": "", "int4-channel": "",
    "int4-g128": "the usual 4-bit format: 4.125 bits per weight",
    "int4-g64": "", "int4-g32": "",
    "int4-g128-asym": "with a 4-bit zero point per group",
    "int4-g64-asym-fz": "with a float16 zero point per group (what HQQ was made for)",
    "int4-g64-offset": "with a bfloat16 offset per group, as MLX has it: w = code scale + offset",
    "int4-g128-act": "groups of columns of like activation, as GPTQ's act-order has them",
    "int3-g64": "", "int3-g64-asym": "", "int2-g64": "", "int2-g32": "", "int2-g32-asym": "", "int1-g32": "",
    "nf4": "QLoRA's 4-bit NormalFloat, groups of 64",
    "nf4-dq": "with double quantization: 4.127 bits per weight",
    "nf4-g128": "", "fp4": "4-bit floats, groups of 64", "fp4-dq": "",
    "codebook(-1,-0.3,0.3,1)-g64": "any table of 2 to 256 levels, largest magnitude 1",
    "q4_k": "llama.cpp's 4-bit k-quant: superblocks of 256 columns, 4.5 bits per weight",
    "q2_k": "", "q3_k": "", "q5_k": "", "q6_k": "",
    "q4_0": "llama.cpp's simple types: groups of 32 columns", "q4_1": "", "q5_0": "", "q5_1": "", "q8_0": "",
    "iq4_nl": "llama.cpp's 4-bit tables", "iq4_xs": "",
    "tq1_0": "llama.cpp's ternary types: 1.69 and 2.06 bits per weight", "tq2_0": "",
    "ternary-g64": "-1, 0 or 1 times a bfloat16 scale per 64 columns: 1.85 bits per weight",
    "ternary": "one float32 scale per row",
    "ternary-absmean": "its scale is mean |w|, as BitNet b1.58 trains with, not the one of least squared error",
    "ternary-tensor-absmean": "one such scale for the whole matrix, BitNet b1.58's own",
    "binary-g64": "the sign times a bfloat16 scale per 64 columns: 1.25 bits per weight", "binary": "",
    "mxfp4": "4-bit floats in groups of 32 with a power of two as their scale",
    "fp8": "8-bit floats (E4M3), one scale per row", "fp8-tensor": "",
    "int2-g32+r16": "any format with a side-car of rank 16 for linears: two bfloat16 factors that repair it",
    "int8+h64": "any format with 64 columns at a time rotated, inputs too: what is large in one of them is spread",
    "bf16": "keep in 16 bits",
}  # fmt: skip

# What others call it, and what it is here.
ELSEWHERE = {
    **dict.fromkeys(("4bit", "4-bit", "int4_weight_only", "normalfloat4"), "nf4"),
    **dict.fromkeys(("8bit", "8-bit", "w8a16", "int8_weight_only"), "int8"),
    **dict.fromkeys(("w4a16", "int4wo", "uint4"), "int4-g128"),
    "gptq": "int4-g128 with the method gptq", "awq": "int4-g128 with the method awq",
    "hqq": "int4-g64-asym-fz with the method hqq", "bitnet": "ternary", "1.58bit": "ternary",
    **dict.fromkeys(("fp16", "float16", "f16", "bfloat16", "none"), "bf16"), "q4": "q4_k", "q8": "q8_0",
}  # fmt: skip


def parse_format(spec: str | Format) -> Format:
    """The format that a shorthand such as `int4-g128-asym` names; FormatError names the nearest right one."""
    if not isinstance(spec, str):
        if not hasattr(spec, "encode"):
            raise FormatError(f"format {spec!r}: is neither a name nor a Format; it must be; write one such as 'int8'")
        return spec
    text = spec.strip().lower()
    if table := BANDS.fullmatch(text):
        return Bands(tuple(_band(part) for part in re.split(r",(?![^(]*\))", table["parts"])))
    if pair := SIDE_CAR.fullmatch(text):
        return LowRank(parse_format(pair["base"]), int(pair["rank"]))
    if turn := ROTATED.fullmatch(text):
        return Rotated(parse_format(turn["base"]), int(turn["size"]))
    for family in FORMATS:
        if (found := family.parse(text)) is not None:
            return found
    known = ELSEWHERE.get(text) or next(iter(difflib.get_close_matches(text, EXAMPLES, n=1, cutoff=0.3)), None)
    hint = f"did you mean {known}?" if known else f"for example {', '.join(list(EXAMPLES)[:4])}."
    raise FormatError(f"{spec!r} is not a format; {hint} `whit quantize --help` lists all")


def _band(text: str) -> tuple[Format, int]:
    """`q5_k:1024`, or `q2_k` for all that is left."""
    format, colon, count = text.partition(":")
    if colon and not count.strip().isdecimal():
        raise FormatError(f"band {text!r}: {count!r} is not a number of rows; it must be one; write q5_k:1024")
    return parse_format(format), int(count or 0)


__all__ = [
    "EXAMPLES", "FORMATS", "FP4", "NF4", "Affine", "BFloat16", "Bands", "Codebook", "Float8", "Ggml", "LowRank",
    "Rotated",
    "parse_format",
]  # fmt: skip
