// AVX-512 (F, BW, DQ, VL): 16 lanes in one register.
#pragma once
#include <immintrin.h>

#include "digits.h"
#include "isa.h"

namespace {

struct Avx512 {
  using F = __m512;
  using U = __m512i;
  using W = F;
  using X = F;
  using Table = __m512;
  struct Window { __m512i from, shift, mask; };
  static constexpr int CODES_PER_STEP = 1;
  static constexpr int ROWS = 4;     // of the weight at a time, for one row of activations
  static constexpr int SIZES = 15;    // the rows of activations at a time, as a sum of 1, 2, 4 and 8
  static constexpr bool WIDE = true;  // whether blocks that lie in one group have a kernel of their own
  static constexpr int LOOK_BITS = 4;  // up to so many bits are looked up
  // Whether consecutive levels of 2 and 3 bits, or of 5 to 8, may be moved up to where they cost less.
  static constexpr bool LIFTS = false, LIFTS_MANY = true;
  static constexpr bool SUPERS = false;  // whether it has a way of its own for what superblocks share
  static constexpr bool COUNTS = false;  // whether converting a small code beats looking it up

  // byte = 27 high + low: three digits by a table of 27, two by one of 9.
  static void digits(const uint8_t* from, int64_t bytes, uint8_t* to) {
    static const uint16_t of_low[32] = {0,  1,  2,  4,  5,  6,  8,  9,  10, 16, 17, 18, 20, 21, 22, 24,
                                        25, 26, 32, 33, 34, 36, 37, 38, 40, 41, 42};
    static const uint16_t of_high[32] = {0, 1 << 6, 2 << 6, 4 << 6, 5 << 6, 6 << 6, 8 << 6, 9 << 6, 10 << 6};
    const __m512i three = _mm512_loadu_si512(of_low), two = _mm512_loadu_si512(of_high);
    const __m512i whole = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 3, 4, 8, 9, 10, 11, 12, -1, -1, -1, -1, -1, -1));
    const __m512i pair = _mm512_set1_epi32(1 | 1024 << 16), first = _mm512_set1_epi64(0xfffff);
    int64_t i = 0;
    for (; i + 32 <= bytes; i += 32, to += 40) {
      const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + i)));
      const __m512i high = _mm512_mulhi_epu16(byte, _mm512_set1_epi16(2428));
      const __m512i low = _mm512_sub_epi16(byte, _mm512_mullo_epi16(high, _mm512_set1_epi16(27)));
      const __m512i five = _mm512_or_si512(_mm512_permutexvar_epi16(low, three), _mm512_permutexvar_epi16(high, two));
      const __m512i ten = _mm512_madd_epi16(five, pair);
      const __m512i twenty = _mm512_ternarylogic_epi64(first, ten, _mm512_srli_epi64(ten, 12), 0xCA);
      const __m512i packed = _mm512_shuffle_epi8(twenty, whole);
      _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(packed));
      _mm_storeu_si128((__m128i*)(to + 10), _mm512_extracti32x4_epi32(packed, 1));
      _mm_storeu_si128((__m128i*)(to + 20), _mm512_extracti32x4_epi32(packed, 2));
      _mm_storeu_si128((__m128i*)(to + 30), _mm512_extracti32x4_epi32(packed, 3));
    }
    digits_by_table(from + i, bytes - i, to);
  }
  static ALWAYS_INLINE F set1(float v) { return _mm512_set1_ps(v); }
  static ALWAYS_INLINE F zero() { return _mm512_setzero_ps(); }
  static ALWAYS_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static ALWAYS_INLINE F load_x(const char* p) { return _mm512_loadu_ps(p); }
  static ALWAYS_INLINE void store(float* p, F f) { _mm512_storeu_ps(p, f); }
  static ALWAYS_INLINE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static ALWAYS_INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
  static ALWAYS_INLINE F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static ALWAYS_INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static ALWAYS_INLINE F fnma(F x, F y, F z) { return _mm512_fnmadd_ps(x, y, z); }
  static ALWAYS_INLINE F div(F x, F y) { return _mm512_div_ps(x, y); }
  static ALWAYS_INLINE F most(F x, F y) { return _mm512_max_ps(x, y); }
  static ALWAYS_INLINE F least(F x, F y) { return _mm512_min_ps(x, y); }
  static ALWAYS_INLINE F floor(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static ALWAYS_INLINE F power(F n) {  // 2^n, n whole and from -126 to 127
    return from_bits(_mm512_mul_ps(_mm512_add_ps(n, set1(127)), set1(8388608.0f)));
  }
  static ALWAYS_INLINE F from_bits(F x) { return _mm512_castsi512_ps(_mm512_cvttps_epi32(x)); }
  static ALWAYS_INLINE F first(W w, X x) { return mul(w, x); }
  static ALWAYS_INLINE F next(W w, X x, F acc) { return fma(w, x, acc); }
  static ALWAYS_INLINE float sum(F f) {
    __m256 s = _mm256_add_ps(_mm512_castps512_ps256(f), _mm512_extractf32x8_ps(f, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
  }
  static ALWAYS_INLINE F convert(const void* p, int64_t i, int type) {
    if (type == WHIT_F32) return load((const float*)p + i);
    __m256i v = _mm256_loadu_si256((const __m256i*)((const uint16_t*)p + i));
    if (type == WHIT_F16) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static ALWAYS_INLINE __m512i lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static ALWAYS_INLINE F repeat(const float* p, int run) {
    unsigned shift = run == 1 ? 0 : run == 2 ? 1 : run == 4 ? 2 : run == 8 ? 3 : 4;
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes(), shift), load(p));
  }
  template <int RUN>
  static ALWAYS_INLINE F repeat_of(const float* p) {  // reads 16 / RUN floats only, which may have been written just now
    if constexpr (RUN == 16) return set1(*p);
    double two;
    memcpy(&two, p, 8);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes(), 3), _mm512_castpd_ps(_mm512_set1_pd(two)));
  }
  template <int WIDTH>
  static ALWAYS_INLINE __m512i spread(const uint8_t* p) {
    constexpr int RUN = WIDTH / 4;  // 16-bit words of four lanes: 5, 6 or 7
    __m512i v = _mm512_maskz_loadu_epi8(((__mmask64)1 << (2 * WIDTH)) - 1, p);
#define WORDS(i) RUN* i, RUN* i + 1, RUN* i + 2, RUN* i + 3, RUN* i + 4, RUN* i + 5, RUN* i + 6, RUN* i + 7
    alignas(64) static const uint16_t words[32] = {WORDS(0), WORDS(1), WORDS(2), WORDS(3)};
#undef WORDS
    v = _mm512_permutexvar_epi16(_mm512_load_si512(words), v);  // indices are taken modulo 32
    constexpr int A = WIDTH / 8, B = 2 * WIDTH / 8, C = 3 * WIDTH / 8;
    v = _mm512_shuffle_epi8(
        v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, A, A + 1, A + 2, A + 3, B, B + 1, B + 2, B + 3, C, C + 1,
                                                C + 2, C + 3)));
    if (WIDTH % 8) v = _mm512_srlv_epi32(v, _mm512_set1_epi64((int64_t)4 << 32));
    return v;
  }
  template <int BITS>
  static ALWAYS_INLINE U block(const uint8_t* p) {
    constexpr int WIDTH = Block<BITS>::CODES * BITS;
    if constexpr (WIDTH == 32) return _mm512_loadu_si512(p);
    else if constexpr (WIDTH == 16) return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    else return spread<WIDTH>(p);
  }
  template <int BITS>
  static ALWAYS_INLINE U shift(U u) { return _mm512_srli_epi32(u, BITS); }
  static ALWAYS_INLINE Table table(const float* levels, int bits) {
    if (bits > 4) return zero();
    float t[16];
    for (int i = 0; i < 16; i++) t[i] = levels[i & ((1 << bits) - 1)];
    return load(t);
  }
  template <int BITS>
  static ALWAYS_INLINE F look(U u, const Table& t) { return _mm512_permutexvar_ps(u, t); }  // the index's low 4 bits
  static ALWAYS_INLINE F levels(U u, const Table& t) { return _mm512_permutexvar_ps(u, t); }
  static ALWAYS_INLINE F to_float(U u) { return _mm512_cvtepi32_ps(u); }
  template <int BITS>
  static ALWAYS_INLINE U low(U u) { return _mm512_and_si512(u, _mm512_set1_epi32((1 << BITS) - 1)); }
  template <int BITS>
  static ALWAYS_INLINE F number(U u) { return to_float(low<BITS>(u)); }
  // A code right below the exponent of 2^BITS is 2^BITS + code: one logical operation, where a number takes a conversion too.
  template <int BITS>
  static constexpr float lift() { return (float)(1 << BITS); }
  static ALWAYS_INLINE Table lift_table(int) { return zero(); }
  template <int BITS>
  static ALWAYS_INLINE F lifted(U u, int step, const Table&) {
    const int left = 23 - BITS - step * BITS;
    const U moved = left >= 0 ? _mm512_slli_epi32(u, left) : _mm512_srli_epi32(u, -left);
    const U mask = _mm512_set1_epi32(((1 << BITS) - 1) << (23 - BITS)), exponent = _mm512_set1_epi32((127 + BITS) << 23);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(moved, mask, exponent, 0xea));
  }
  static ALWAYS_INLINE F pick(U u, const float* levels) { return _mm512_i32gather_ps(u, levels, 4); }
  template <int BITS>
  static ALWAYS_INLINE F gather(U u, const float* levels) { return pick(low<BITS>(u), levels); }
  // 16 neighbouring codes: lane j is the 16-bit window from byte j bits / 8 on, shifted by j bits % 8.
  static ALWAYS_INLINE Window window(int bits) {
    uint8_t from[64];
    int32_t shift[16];
    memset(from, 0x80, sizeof from);
    for (int j = 0; j < 16; j++) {
      int at = j * bits / 8, s = j * bits % 8;
      from[4 * j] = (uint8_t)at;
      if (s + bits > 8) from[4 * j + 1] = (uint8_t)(at + 1);
      shift[j] = s;
    }
    return {_mm512_loadu_si512(from), _mm512_loadu_si512(shift), _mm512_set1_epi32((1 << bits) - 1)};
  }
  static ALWAYS_INLINE U natural(const uint8_t* p, const Window& w) {
    __m512i v = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)), w.from);
    return _mm512_and_si512(_mm512_srlv_epi32(v, w.shift), w.mask);
  }
  static ALWAYS_INLINE void store_as(void* p, int64_t i, F f, int type) {
    if (type == WHIT_F32) return store((float*)p + i, f);
    __m256i* to = (__m256i*)((uint16_t*)p + i);
    if (type == WHIT_F16) return _mm256_storeu_si256(to, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    __m512i u = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(r));
  }
};

}  // namespace
