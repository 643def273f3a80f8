// What every instruction set's file shares. Nothing here may emit code that another file's flags would change:
// everything is static or a type.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "whit_cpu.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

// A lane of the 16-lane kernels holds CODES neighbouring columns; a block is 16 lanes and BYTES of the stream.
template <int BITS>
struct Block {
  static constexpr int CODES = BITS <= 2 ? 16 : BITS <= 4 ? 8 : 4;
  static constexpr int COLUMNS = 16 * CODES;
  static constexpr int BYTES = COLUMNS * BITS / 8;
};

enum { LOAD_SPAN = 72 };  // no kernel reads a block further than this from its first byte

// Activations as the kernels read them: x[m][block][step][lane], zeros beyond the last column, and per lane its sum.
struct Rows {
  const whit_weight* w;
  const void* x;          // m-th row starts at m * x_bytes
  const float* sums;      // m-th row starts at m * sum_count; (blocks, 16)
  int64_t x_bytes, sum_count, blocks;
  int m;                  // rows of x: 1, 2, 4 or 8
  const void* bias;
  void* y;                // first of the m rows of y, each w->rows long
  int type;               // of bias and y
};

struct Kernels {
  // Rows [first, last) of the weight times all rows of x; scratch holds floats of whit_scratch().
  void (*dot)(const Rows&, int64_t first, int64_t last, float* scratch);
  void (*dequantize)(const whit_weight&, int64_t row, float* scratch, void* out, int type);
  void (*arrange)(const void* x, int type, int64_t columns, int bits, void* out, float* sums);
  // One row rounded to int8 in groups of `size` columns, as floats of another type: whit_round.
  void (*round)(const void* x, int type, int64_t columns, int64_t size, void* out, int out_type);
  int pairs;   // 1: x is kept in bfloat16, 32 lanes wide
  int counts;  // 1: small consecutive levels are converted, not looked up, which takes the sums of x
  void (*digits)(const uint8_t* from, int64_t bytes, uint8_t* to);  // five of base 3 to a byte, as 2-bit codes
  int sizes;   // the rows of x that `dot` takes at a time, as a sum of 1, 2, 4 and 8
  // One row of x past digits as they lie, where takes_digits says so; null: not for these.
  void (*arrange_digits)(const void* x, int64_t columns, void* out);
  void (*dot_digits)(const Rows&, int64_t first, int64_t last);
};

static ALWAYS_INLINE float bf16_to_float(uint16_t v) {
  uint32_t u = (uint32_t)v << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static ALWAYS_INLINE uint16_t float_to_bf16(float f) {  // to nearest, ties to even
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40);  // stays a NaN
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static ALWAYS_INLINE float f16_to_float(uint16_t v) {
  uint32_t sign = (uint32_t)(v & 0x8000) << 16, exponent = (v >> 10) & 31, mantissa = v & 0x3ff, u;
  if (exponent == 31) u = sign | 0x7f800000 | mantissa << 13;
  else if (exponent) u = sign | (exponent + 112) << 23 | mantissa << 13;
  else {  // subnormal: mantissa * 2^-24, exact in float32
    float f = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static ALWAYS_INLINE uint16_t float_to_f16(float f) {  // to nearest, ties to even
  uint32_t u;
  memcpy(&u, &f, 4);
  uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and more
  if (u < 0x38800000) {                                   // below 2^-14: a multiple of 2^-24
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;  // the last bit of a float in [0.5, 1) is 2^-24
    uint32_t r;
    memcpy(&r, &a, 4);
    return (uint16_t)(sign | (r - 0x3f000000));
  }
  u += 0xfff + ((u >> 13) & 1);
  return (uint16_t)(sign | ((u - 0x38000000) >> 13));
}

static ALWAYS_INLINE float load_as_float(const void* p, int64_t i, int type) {
  switch (type) {
    case WHIT_F32: return ((const float*)p)[i];
    case WHIT_BF16: return bf16_to_float(((const uint16_t*)p)[i]);
    default: return f16_to_float(((const uint16_t*)p)[i]);
  }
}

static ALWAYS_INLINE void store_float(void* p, int64_t i, float value, int type) {
  switch (type) {
    case WHIT_F32: ((float*)p)[i] = value; break;
    case WHIT_BF16: ((uint16_t*)p)[i] = float_to_bf16(value); break;
    default: ((uint16_t*)p)[i] = float_to_f16(value); break;
  }
}
