// 16 vectors of 16 dwords, turned: lane j of vector i becomes lane i of vector j.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace {

ALWAYS_INLINE void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // v[4 a + i] has column 4 l + i of rows 4 a .. 4 a + 3 in its 128-bit lane l
    __m512i a = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88), b = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    __m512i c = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd), d = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = t[i];
}

}  // namespace
