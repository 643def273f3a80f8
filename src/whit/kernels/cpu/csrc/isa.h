// The kernels of each instruction set. A file that the compiler or the target cannot build is left out of the build,
// and entry.cpp's WHIT_HAVE_ macro for it is not defined.
#pragma once
#include "common.h"

extern const Kernels whit_kernels_scalar, whit_kernels_avx2, whit_kernels_avx512, whit_kernels_avx512_bf16;
