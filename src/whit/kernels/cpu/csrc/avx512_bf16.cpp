// Streams of codes past a few rows of bfloat16.
#include "avx512_bf16.h"

namespace {

#include "kernels.inl"

// One row of x: word j of step k is column STEPS j + k of a block of 32 STEPS. Sums are those of the two words of a lane.
template <int STEPS>
static void arrange_steps(const uint16_t* x, int64_t columns, uint16_t* to, float* sums) {
  constexpr int EACH = 32 / STEPS;
  uint16_t order[32];
  for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i % EACH * STEPS + i / EACH);
  const __m512i by = _mm512_loadu_si512(order);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t c = 0; c < columns; to += 32 * STEPS) {
    for (int i = 0; i < STEPS; i++, c += 32) {
      const int64_t left = columns - c;
      const __mmask32 mask = left >= 32 ? ~(__mmask32)0 : left > 0 ? ((__mmask32)1 << left) - 1 : 0;
      alignas(64) uint16_t part[32];
      _mm512_store_si512(part, _mm512_permutexvar_epi16(by, _mm512_maskz_loadu_epi16(mask, x + (left > 0 ? c : 0))));
      for (int k = 0; k < STEPS; k++) memcpy(to + 32 * k + EACH * i, part + EACH * k, 2 * EACH);
    }
    if (!sums) continue;
    __m512 sum = _mm512_setzero_ps();
    for (int k = 0; k < STEPS; k++) sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(to + 32 * k), ones);
    _mm512_storeu_ps(sums, sum);
    sums += 16;
  }
}

static void arrange_pairs(const void* x, int, int64_t columns, int bits, void* out, float* sums) {
  if (bits <= 2) arrange_steps<8>((const uint16_t*)x, columns, (uint16_t*)out, sums);
  else if (bits <= 4) arrange_steps<4>((const uint16_t*)x, columns, (uint16_t*)out, sums);
  else arrange_steps<2>((const uint16_t*)x, columns, (uint16_t*)out, sums);
}

#include "digits_bf16.inl"

}  // namespace

const Kernels whit_kernels_avx512_bf16 = {
    dot<Pairs>, dequantize<Avx512>, arrange_pairs, round_row<Avx512>, 1, 1, Avx512::digits, Pairs::SIZES,
    arrange_digits, dot_digits};
const Kernels whit_kernels_bf16_tables = {
    dot<PairsOfTwo>, dequantize<Avx512>, arrange_pairs, round_row<Avx512>, 1, 0, Avx512::digits, Pairs::SIZES};
const Kernels whit_kernels_bf16_bytes = {
    dot<PairsOfNibbles>, dequantize<Avx512>, arrange_pairs, round_row<Avx512>, 1, 1, Avx512::digits, Pairs::SIZES};
