// Any processor, without further instructions.
#include "scalar.h"

namespace {
#include "kernels.inl"
}  // namespace

extern const Kernels whit_kernels_scalar;
const Kernels whit_kernels_scalar = kernels_of<Scalar>();
