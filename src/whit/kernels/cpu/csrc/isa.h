// The kernels of each instruction set. A file that the compiler or the target cannot build is left out of the build,
// and isa.cpp's WHIT_HAVE_ macro for it is not defined.
#pragma once
#include "common.h"

extern const Kernels whit_kernels_scalar, whit_kernels_avx2, whit_kernels_avx512, whit_kernels_avx512_bf16;
extern const Kernels whit_kernels_bf16_bytes;   // of AVX512_BF16, for consecutive levels of 8 bits
extern const Kernels whit_kernels_bf16_tables;  // of AVX512_BF16, for levels that are no numbers of bfloat16

const Kernels* whit_kernels_for(int isa);  // null where the build has none; the processor is not asked

// A product x^T x in panels of WIDTH columns; pairs of rows of x lie beside each other, as bfloat16 products take them.
enum { GRAM_WIDTH = 48 };

struct Gram {
  const uint16_t* x;
  int64_t rows, columns, pairs;  // pairs = ceil(rows / 2)
  uint32_t* panels;              // (columns / WIDTH, pairs, WIDTH)
  float* sums;
};

struct GramKernels {
  void (*pack)(const Gram&, int64_t panel);
  void (*block)(const Gram&, int64_t i, int64_t j, double* total);  // panel i by panel j <= i
};

extern const GramKernels whit_gram_bf16;
