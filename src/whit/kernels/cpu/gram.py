"""Sums of x^T x for calibration, by the processor's bfloat16 products: twice the rate of float32, and half the work.

Products of bfloat16 are exact; 128 rows are summed in float32, then in float64 to the end of the call, and rounded once
into the running sum. Elements are computed by one thread each, in one order: no bit depends on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.kernels.cpu.binding import ISAS, check_ran, library

NEEDS = "avx512_bf16"


def add_gram(x: Tensor, sums: Tensor) -> bool:
    """sums (columns, columns) += x^T x for x (rows, columns), below and on the diagonal; the rest stays as it is.

    True where it was added; False, and nothing was, where this processor has no such products or x is not bfloat16.
    `sums` is contiguous float32.
    """
    compiled = library()
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or isinstance(compiled, str) or NEEDS not in compiled.isas:
        return False
    x = x.contiguous()
    isa, threads = ISAS.index(NEEDS), torch.get_num_threads()
    check_ran(compiled.gram(x.data_ptr(), *x.shape, sums.data_ptr(), compiled.parallel, isa, threads))
    return True
