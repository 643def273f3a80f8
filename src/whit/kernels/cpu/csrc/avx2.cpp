// AVX2 with FMA and F16C.
#include "avx2.h"

namespace {
#include "kernels.inl"
}  // namespace

const Kernels whit_kernels_avx2 = kernels_of<Avx2>();
