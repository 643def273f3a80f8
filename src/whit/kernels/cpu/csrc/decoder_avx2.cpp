// The steps between a decoder's products, with AVX2.
#include "avx2.h"
#include "decoder.h"

namespace {
#include "kernels.inl"
#include "decoder.inl"
}  // namespace

const Steps whit_steps_avx2 = steps_of<Avx2>();
