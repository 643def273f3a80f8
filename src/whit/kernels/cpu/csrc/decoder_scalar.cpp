// The steps between a decoder's products, for any processor.
#include "scalar.h"
#include "decoder.h"

namespace {
#include "kernels.inl"
#include "decoder.inl"
}  // namespace

const Steps whit_steps_scalar = steps_of<Scalar>();
