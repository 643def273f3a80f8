// Streams of codes past a few rows of bfloat16.
#include "avx512_bf16.h"

namespace {

#include "kernels.inl"

}  // namespace

const Kernels whit_kernels_avx512_bf16 = {dot<Pairs>, dequantize<Avx512>, arrange<Pairs>, read_all, 1, 0, Pairs::SIZES};
const Kernels whit_kernels_bf16_tables = {
    dot<PairsOfTwo>, dequantize<Avx512>, arrange<Pairs>, read_all, 1, 0, Pairs::SIZES};
