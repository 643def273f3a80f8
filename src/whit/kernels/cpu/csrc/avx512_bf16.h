// AVX-512 with BF16: pairs of bfloat16 products summed in float32, for activations in bfloat16 and levels that are
// exact in it (integers). A lane holds two codes per step, in its two 16-bit words.
#pragma once
#include "avx512.h"

namespace {

struct Pairs : Avx512 {
  using W = __m512bh;
  using X = __m512bh;
  struct Table { __m512i low, high; };  // `high` for 6 bits only
  static constexpr int CODES_PER_STEP = 2;
  static constexpr int LOOK_BITS = 6;
  static constexpr bool LIFTS = true, LIFTS_MANY = false;

  static ALWAYS_INLINE X load_x(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static ALWAYS_INLINE F first(W w, X x) { return _mm512_dpbf16_ps(zero(), w, x); }
  static ALWAYS_INLINE F next(W w, X x, F acc) { return _mm512_dpbf16_ps(acc, w, x); }
  template <int BITS>
  static ALWAYS_INLINE U block(const uint8_t* p) {
    if constexpr (BITS == 1) return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
    if constexpr (BITS == 2 || BITS == 4) return _mm512_loadu_si512(p);
    if constexpr (BITS == 5) {  // two codes per word, 10 bits from bit 10 w on, four words from byte 5 w / 4 on
#define WORDS(i) 5 * i, 5 * i + 1, 5 * i + 2, 5 * i + 3, 5 * i + 4, 0, 0, 0
      alignas(64) static const uint16_t words[32] = {WORDS(0), WORDS(1), WORDS(2), WORDS(3)};
#undef WORDS
      const __m512i some = _mm512_permutexvar_epi16(_mm512_load_si512(words), _mm512_loadu_si512(p));
      const __m512i pairs = _mm512_shuffle_epi8(
          some, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9)));
      return _mm512_srlv_epi16(pairs, _mm512_set1_epi64(0x0006000400020000));
    }
    // Four codes of 3 bits or two of 6 per word: 12 bits from byte 12 w / 8 on, shifted by 0 or 4.
    const __m512i dwords = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
    __m512i v = _mm512_permutexvar_epi32(dwords, _mm512_maskz_loadu_epi32(0x0fff, p));
    v = _mm512_shuffle_epi8(
        v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11)));
    return _mm512_srlv_epi16(v, _mm512_set1_epi32(4 << 16));
  }
  template <int BITS>
  static ALWAYS_INLINE U shift(U u) { return _mm512_srli_epi16(u, BITS); }
  // All 16 levels, those of fewer bits as often as they fit.
  static ALWAYS_INLINE __m512 all_levels(const float* levels, int bits) {
    const int count = 1 << bits;
    const __m512i index = _mm512_and_si512(lanes(), _mm512_set1_epi32(count - 1));
    return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps((__mmask16)(0xffff >> (16 - count)), levels));
  }
  static ALWAYS_INLINE __m512i both(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
  static ALWAYS_INLINE __m512i twice(__m512 f) { return both(f, f); }
  static ALWAYS_INLINE Table table(const float* levels, int bits) {
    if (bits <= 4) return {twice(all_levels(levels, bits)), _mm512_setzero_si512()};
    const __m512i low = both(load(levels), load(levels + 16));
    return {low, bits == 5 ? low : both(load(levels + 32), load(levels + 48))};
  }
  static ALWAYS_INLINE W look_in(U u, __m512i t) {  // the index's low 5 bits
    return (__m512bh)_mm512_permutexvar_epi16(u, t);
  }
  template <int BITS>
  static ALWAYS_INLINE W look(U u, const Table& t) {  // and its low 6
    if constexpr (BITS == 6) return (__m512bh)_mm512_permutex2var_epi16(t.low, u, t.high);
    else return look_in(u, t.low);
  }

  // Consecutive levels of 2 and 3 bits moved up to lift + code: where a code lies right below the exponent of such a
  // number, or is put there by a shift, that takes one logical operation, which every pipe has, and no look-up, which
  // competes with the products. All are exact, and what the lift adds is taken off by the sum of x.
  template <int BITS>
  static constexpr float lift() { return BITS == 3 ? 8 : 16; }
  static ALWAYS_INLINE Table lift_table(int bits) {  // by the index' low 3 bits; for 2 bits by those above the lowest
    const __m512i i = lanes(), two = _mm512_and_si512(_mm512_srli_epi32(i, 1), _mm512_set1_epi32(3));
    const __m512 code = _mm512_cvtepi32_ps(bits == 2 ? two : _mm512_and_si512(i, _mm512_set1_epi32(7)));
    const __m512i table = twice(_mm512_add_ps(code, set1(bits == 2 ? lift<2>() : lift<3>())));
    return {table, table};
  }
  template <int BITS>
  static ALWAYS_INLINE W below_exponent(U u) {  // of 16 + code or 8 + code: (u & MASK) | EXPONENT
    constexpr int MASK = BITS == 2 ? 0x18 : 0x70, EXPONENT = BITS == 2 ? 0x4180 : 0x4100;
    return (__m512bh)_mm512_ternarylogic_epi64(u, _mm512_set1_epi16(MASK), _mm512_set1_epi16(EXPONENT), 0xea);
  }
  template <int BITS>
  static ALWAYS_INLINE W lifted(U u, int step, const Table& t) {
    if constexpr (BITS == 2) {
      const U moved = step < 2 ? _mm512_add_epi16(u, u) : _mm512_srli_epi16(u, 4 * (step / 2) - 1);
      return step % 2 ? below_exponent<2>(moved) : look_in(moved, t.low);
    } else {
      if (step == 0) return look_in(u, t.low);
      return below_exponent<3>(step == 1 ? _mm512_add_epi16(u, u) : _mm512_srli_epi16(u, 3 * step - 4));
    }
  }
};

// Levels as sums of two numbers in bfloat16, so that tables keep 16 bits.
struct PairsOfTwo : Pairs {
  static constexpr int LOOK_BITS = 4;
  static constexpr bool LIFTS = false;
  struct W { __m512bh high, low; };
  static ALWAYS_INLINE F first(W w, X x) { return Pairs::next(w.high, x, Pairs::first(w.low, x)); }
  static ALWAYS_INLINE F next(W w, X x, F acc) { return Pairs::next(w.high, x, Pairs::next(w.low, x, acc)); }
  static ALWAYS_INLINE Table table(const float* levels, int bits) {
    const __m512 all = all_levels(levels, bits);
    const __m512i high = twice(all);
    const __m512 rounded = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16);
    return {twice(_mm512_sub_ps(all, rounded)), high};
  }
  template <int BITS>
  static ALWAYS_INLINE W look(U u, const Table& t) { return {look_in(u, t.high), look_in(u, t.low)}; }
};

// Consecutive levels of 8 bits as sums of two lifted numbers of four bits: 16 + low and 256 + 16 high.
struct PairsOfNibbles : Pairs {
  static constexpr int LOOK_BITS = 0;  // codes of 8 bits only, and none of them looked up
  static constexpr bool LIFTS = false, LIFTS_MANY = true;
  struct W { __m512bh high, low; };
  static ALWAYS_INLINE F first(W w, X x) { return Pairs::next(w.high, x, Pairs::first(w.low, x)); }
  static ALWAYS_INLINE F next(W w, X x, F acc) { return Pairs::next(w.high, x, Pairs::next(w.low, x, acc)); }
  template <int BITS>
  static ALWAYS_INLINE U block(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int BITS>
  static constexpr float lift() { return 272; }
  static ALWAYS_INLINE Table lift_table(int) { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static ALWAYS_INLINE __m512bh nibble(U moved, int exponent) {
    return (__m512bh)_mm512_ternarylogic_epi64(moved, _mm512_set1_epi16(0x78), _mm512_set1_epi16((short)exponent), 0xea);
  }
  template <int BITS>
  static ALWAYS_INLINE W lifted(U u, int step, const Table&) {
    const U low = step ? _mm512_srli_epi16(u, 5) : _mm512_slli_epi16(u, 3);
    return {nibble(_mm512_srli_epi16(u, step ? 9 : 1), 0x4380), nibble(low, 0x4180)};
  }
};

}  // namespace
