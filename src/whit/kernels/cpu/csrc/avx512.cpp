// AVX-512 without further extensions.
#include "avx512.h"

namespace {
#include "kernels.inl"
}  // namespace

const Kernels whit_kernels_avx512 = kernels_of<Avx512>();
