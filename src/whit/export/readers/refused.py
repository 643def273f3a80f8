"""Quantizers whose files are not read here: why, and what to do instead, for a sentence."""

from __future__ import annotations

INSTEAD = "quantize the original model, with whit --format"
REFUSED = {
    "aqlm": f"AQLM, sums of learned codebooks; {INSTEAD} q2_k or int2-g64",
    "vptq": f"VPTQ, learned vectors; {INSTEAD} q2_k or int2-g64",
    "spqr": f"SpQR, integers with outliers beside them; {INSTEAD} int3-g64",
    "higgs": f"HIGGS, rotated vectors in the order of one GPU's kernel; {INSTEAD} int4-g64+h64",
    "quip": f"QuIP#, rotated lattices; {INSTEAD} q2_k or int2-g64",
    "exl2": f"ExLlamaV2's own; {INSTEAD} int4-g128",
    "exl3": f"ExLlamaV3's own, rotated trellises; {INSTEAD} int4-g128",
    "fp_quant": f"FP-Quant, rotated MXFP4 and NVFP4; {INSTEAD} mxfp4",
    "fouroversix": f"Four Over Six's NVFP4; {INSTEAD} mxfp4",
    "quark": "AMD Quark; export it there with --export_weight_format and AutoAWQ's or compressed-tensors' layout",
    "sinq": f"SINQ, a scale for rows and columns; {INSTEAD} int4-g64",
    "metal": f"transformers' own for Apple's GPUs; {INSTEAD} int4-g64-offset, or convert it with MLX",
}
