// Products of 8-bit activations by AVX-512 with VNNI and VBMI.
#include "avx512.h"
#include "encoder.h"
#include "transpose.h"

namespace {

#include "kernels.inl"

#include "int8_avx512.h"

#include "int8.inl"
#include "encoder.inl"

}  // namespace

const Kernels8 whit_int8_avx512 = {few8<Vnni512>, many8<Vnni512>, quantize8<Vnni512>, arrange8<Vnni512>,
                                   parts8<Vnni512>, 64, 0, encode8<Vnni512>};
