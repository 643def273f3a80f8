// x^T x of bfloat16 with AVX512-BF16. A block of 48 x 48 sums is one task: 8 x 48 of them at a time are in registers.
#include <immintrin.h>

#include "isa.h"

namespace {

enum { CHUNK = 64, HIGH = 8, WIDE = GRAM_WIDTH / 16 };  // pairs of rows summed in float32; a register tile

void pack(const Gram& g, int64_t panel) {
  const int64_t first = panel * GRAM_WIDTH;
  __mmask16 mask[WIDE];
  for (int v = 0; v < WIDE; v++) {
    int64_t left = g.columns - first - 16 * v;
    mask[v] = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
  }
  uint32_t* to = g.panels + panel * g.pairs * GRAM_WIDTH;
  for (int64_t t = 0; t < g.pairs; t++, to += GRAM_WIDTH) {
    const uint16_t* x = g.x + 2 * t * g.columns + first;
    const bool two = 2 * t + 1 < g.rows;
    for (int v = 0; v < WIDE; v++) {
      __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask[v], x + 16 * v));
      __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(two ? mask[v] : 0, x + g.columns + 16 * v));
      _mm512_storeu_si512(to + 16 * v, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
}

// total[8][48] += a^T b over `count` pairs.
void tile(const uint32_t* a, const uint32_t* b, int64_t count, double* total) {
  __m512 acc[HIGH][WIDE];
#pragma GCC unroll 8
  for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 3
    for (int v = 0; v < WIDE; v++) acc[r][v] = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; t++, a += GRAM_WIDTH, b += GRAM_WIDTH) {
    __m512bh wide[WIDE];
#pragma GCC unroll 3
    for (int v = 0; v < WIDE; v++) wide[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < HIGH; r++) {
      __m512bh high = (__m512bh)_mm512_set1_epi32((int)a[r]);
#pragma GCC unroll 3
      for (int v = 0; v < WIDE; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], wide[v], high);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 3
    for (int v = 0; v < WIDE; v++) {
      double* to = total + r * GRAM_WIDTH + 16 * v;
      __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(acc[r][v]));
      __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(acc[r][v], 1));
      _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
      _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), high));
    }
}

void block(const Gram& g, int64_t i, int64_t j, double* total) {
  const uint32_t *a = g.panels + i * g.pairs * GRAM_WIDTH, *b = g.panels + j * g.pairs * GRAM_WIDTH;
  memset(total, 0, sizeof(double) * GRAM_WIDTH * GRAM_WIDTH);
  for (int64_t t = 0; t < g.pairs; t += CHUNK) {
    const int64_t count = g.pairs - t < CHUNK ? g.pairs - t : CHUNK;
    for (int r = 0; r < GRAM_WIDTH; r += HIGH)
      tile(a + t * GRAM_WIDTH + r, b + t * GRAM_WIDTH, count, total + r * GRAM_WIDTH);
  }
  for (int64_t r = 0; r < GRAM_WIDTH && i * GRAM_WIDTH + r < g.columns; r++) {
    const int64_t row = i * GRAM_WIDTH + r, first = j * GRAM_WIDTH, most = row - first + 1;
    float* to = g.sums + row * g.columns + first;
    for (int64_t c = 0; c < GRAM_WIDTH && c < most; c++) to[c] = (float)((double)to[c] + total[r * GRAM_WIDTH + c]);
  }
}

}  // namespace

const GramKernels whit_gram_bf16 = {pack, block};
