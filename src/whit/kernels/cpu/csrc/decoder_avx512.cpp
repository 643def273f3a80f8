// The steps between a decoder's products, with AVX-512.
#include "avx512.h"
#include "decoder.h"

namespace {
#include "kernels.inl"
#include "decoder.inl"
}  // namespace

const Steps whit_steps_avx512 = steps_of<Avx512>();
