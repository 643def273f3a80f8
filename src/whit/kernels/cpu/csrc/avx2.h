// AVX2 with FMA and F16C: 16 lanes as two halves of 8.
#pragma once
#include <immintrin.h>

#include "digits.h"
#include "isa.h"

namespace {

struct Avx2 {
  struct F { __m256 a, b; };
  struct U { __m256i a, b; };
  using W = F;
  using X = F;
  struct Table { __m256 low, high; };
  struct Window { uint8_t bytes[64]; __m256i shift[2], mask; };
  static constexpr int CODES_PER_STEP = 1;
  static constexpr int ROWS = 2;     // of the weight at a time, for one row of activations
  static constexpr int SIZES = 5;    // the rows of activations at a time, as a sum of 1, 2, 4 and 8
  static constexpr bool WIDE = false;  // whether blocks that lie in one group have a kernel of their own
  static constexpr int LOOK_BITS = 4;  // up to so many bits are looked up
  // Whether consecutive levels of 2 and 3 bits, or of 5 to 8, may be moved up to where they cost less.
  static constexpr bool LIFTS = false, LIFTS_MANY = false;
  static constexpr bool SUPERS = false;  // whether it has a way of its own for what superblocks share
  static constexpr bool COUNTS = true;   // whether converting a small code beats looking it up

  // byte = 27 high + low: three digits by a table of 27, two by one of 9.
  static void digits(const uint8_t* from, int64_t bytes, uint8_t* to) {
    const __m256i low_first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 16, 17, 18, 20, 21, 22, 24));
    const __m256i low_last = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(25, 26, 32, 33, 34, 36, 37, 38, 40, 41, 42, 0, 0, 0, 0, 0));
    const __m256i high_all = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0));
    const __m256i nothing = _mm256_set1_epi16((short)0x8000), pair = _mm256_set1_epi32(1 | 1024 << 16);
    const __m256i whole = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 8, 9, 10, 11, 12, -1, -1, -1, -1, -1, -1));
    const __m256i first = _mm256_set1_epi64x(0xfffff), second = _mm256_set1_epi64x((long long)0xfffff << 20);
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16, to += 20) {
      const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(from + i)));
      const __m256i high = _mm256_mulhi_epu16(byte, _mm256_set1_epi16(2428));
      const __m256i low = _mm256_sub_epi16(byte, _mm256_mullo_epi16(high, _mm256_set1_epi16(27)));
      const __m256i index = _mm256_or_si256(low, nothing);
      const __m256i beyond = _mm256_cmpgt_epi16(low, _mm256_set1_epi16(15));
      const __m256i three =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(low_first, index), _mm256_shuffle_epi8(low_last, index), beyond);
      const __m256i five = _mm256_or_si256(three, _mm256_slli_epi16(_mm256_shuffle_epi8(high_all, high), 6));
      const __m256i ten = _mm256_madd_epi16(five, pair);
      const __m256i twenty = _mm256_or_si256(_mm256_and_si256(ten, first),
                                             _mm256_and_si256(_mm256_srli_epi64(ten, 12), second));
      const __m256i packed = _mm256_shuffle_epi8(twenty, whole);
      _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
      _mm_storeu_si128((__m128i*)(to + 10), _mm256_extracti128_si256(packed, 1));
    }
    digits_by_table(from + i, bytes - i, to);
  }
  static ALWAYS_INLINE F set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static ALWAYS_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static ALWAYS_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static ALWAYS_INLINE F load_x(const char* p) { return load((const float*)p); }
  static ALWAYS_INLINE void store(float* p, F f) { _mm256_storeu_ps(p, f.a), _mm256_storeu_ps(p + 8, f.b); }
  static ALWAYS_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static ALWAYS_INLINE F fnma(F x, F y, F z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
  }
  static ALWAYS_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F most(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F least(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F floor(F x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
  static ALWAYS_INLINE F power(F n) {  // 2^n, n whole and from -126 to 127
    return from_bits(mul(add(n, set1(127)), set1(8388608.0f)));
  }
  static ALWAYS_INLINE F from_bits(F x) {
    return {_mm256_castsi256_ps(_mm256_cvttps_epi32(x.a)), _mm256_castsi256_ps(_mm256_cvttps_epi32(x.b))};
  }
  static ALWAYS_INLINE F first(W w, X x) { return mul(w, x); }
  static ALWAYS_INLINE F next(W w, X x, F acc) { return fma(w, x, acc); }
  static ALWAYS_INLINE float sum(F f) {
    __m256 s = _mm256_add_ps(f.a, f.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
  }
  static ALWAYS_INLINE F convert(const void* p, int64_t i, int type) {
    if (type == WHIT_F32) return load((const float*)p + i);
    const __m128i* q = (const __m128i*)((const uint16_t*)p + i);
    __m128i low = _mm_loadu_si128(q), high = _mm_loadu_si128(q + 1);
    if (type == WHIT_F16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
  }
  static ALWAYS_INLINE F repeat(const float* p, int run) {
    if (run == 1) return load(p);
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int shift = run == 2 ? 1 : run == 4 ? 2 : run == 8 ? 3 : 4;
    __m256 v = _mm256_loadu_ps(p);
    return {_mm256_permutevar8x32_ps(v, _mm256_srli_epi32(lane, shift)),
            _mm256_permutevar8x32_ps(v, _mm256_srli_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(8)), shift))};
  }
  template <int RUN>
  static ALWAYS_INLINE F repeat_of(const float* p) { return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[RUN == 8])}; }
  // Two runs of bytes, one per 128-bit lane, each four dwords of `WIDTH` bits.
  template <int WIDTH>
  static ALWAYS_INLINE __m256i spread(const uint8_t* p) {
    constexpr int RUN = WIDTH / 2;  // bytes of four lanes
    __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                        _mm_loadu_si128((const __m128i*)(p + RUN)), 1);
    constexpr int A = WIDTH / 8, B = 2 * WIDTH / 8, C = 3 * WIDTH / 8;
    const __m256i from = _mm256_setr_epi8(0, 1, 2, 3, A, A + 1, A + 2, A + 3, B, B + 1, B + 2, B + 3, C, C + 1, C + 2,
                                          C + 3, 0, 1, 2, 3, A, A + 1, A + 2, A + 3, B, B + 1, B + 2, B + 3, C, C + 1,
                                          C + 2, C + 3);
    v = _mm256_shuffle_epi8(v, from);
    if (WIDTH % 8) v = _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    return v;
  }
  template <int BITS>
  static ALWAYS_INLINE U block(const uint8_t* p) {
    constexpr int WIDTH = Block<BITS>::CODES * BITS;
    if (WIDTH == 32) return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
    if (WIDTH == 16)
      return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
              _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 16)))};
    return {spread<WIDTH>(p), spread<WIDTH>(p + WIDTH)};
  }
  template <int BITS>
  static ALWAYS_INLINE U shift(U u) { return {_mm256_srli_epi32(u.a, BITS), _mm256_srli_epi32(u.b, BITS)}; }
  static ALWAYS_INLINE Table table(const float* levels, int bits) {
    float t[16];
    for (int i = 0; i < 16; i++) t[i] = levels[i & ((1 << bits) - 1)];
    return {_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)};
  }
  static ALWAYS_INLINE __m256 look16(__m256i u, const Table& t) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, u), _mm256_permutevar8x32_ps(t.high, u),
                            _mm256_castsi256_ps(_mm256_slli_epi32(u, 28)));
  }
  template <int BITS>
  static ALWAYS_INLINE F look(U u, const Table& t) {
    if (BITS <= 3) return {_mm256_permutevar8x32_ps(t.low, u.a), _mm256_permutevar8x32_ps(t.low, u.b)};
    return {look16(u.a, t), look16(u.b, t)};
  }
  static ALWAYS_INLINE F levels(U u, const Table& t) { return look<4>(u, t); }
  static ALWAYS_INLINE F to_float(U u) { return {_mm256_cvtepi32_ps(u.a), _mm256_cvtepi32_ps(u.b)}; }
  template <int BITS>
  static ALWAYS_INLINE U low(U u) {
    __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
    return {_mm256_and_si256(u.a, mask), _mm256_and_si256(u.b, mask)};
  }
  template <int BITS>
  static ALWAYS_INLINE F number(U u) { return to_float(low<BITS>(u)); }
  static ALWAYS_INLINE F pick(U u, const float* levels) {
    return {_mm256_i32gather_ps(levels, u.a, 4), _mm256_i32gather_ps(levels, u.b, 4)};
  }
  template <int BITS>
  static ALWAYS_INLINE F gather(U u, const float* levels) { return pick(low<BITS>(u), levels); }
  // 16 neighbouring codes: lane j is the 16-bit window from byte j bits / 8 on, shifted by j bits % 8.
  static ALWAYS_INLINE Window window(int bits) {
    Window w;
    uint8_t from[2][32];
    int32_t shift[2][8];
    memset(from, 0x80, sizeof from);
    for (int j = 0; j < 16; j++) {
      int at = j * bits / 8, s = j * bits % 8;
      from[j / 8][4 * (j % 8)] = (uint8_t)at;
      if (s + bits > 8) from[j / 8][4 * (j % 8) + 1] = (uint8_t)(at + 1);
      shift[j / 8][j % 8] = s;
    }
    memcpy(w.bytes, from, sizeof from);
    for (int h = 0; h < 2; h++) w.shift[h] = _mm256_loadu_si256((const __m256i*)shift[h]);
    w.mask = _mm256_set1_epi32((1 << bits) - 1);
    return w;
  }
  static ALWAYS_INLINE U natural(const uint8_t* p, const Window& w) {
    __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    __m256i a = _mm256_shuffle_epi8(v, _mm256_loadu_si256((const __m256i*)w.bytes));
    __m256i b = _mm256_shuffle_epi8(v, _mm256_loadu_si256((const __m256i*)(w.bytes + 32)));
    return {_mm256_and_si256(_mm256_srlv_epi32(a, w.shift[0]), w.mask),
            _mm256_and_si256(_mm256_srlv_epi32(b, w.shift[1]), w.mask)};
  }
  static ALWAYS_INLINE __m256i round_bf16(__m256 f) {
    __m256i u = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  }
  static ALWAYS_INLINE void store_as(void* p, int64_t i, F f, int type) {
    if (type == WHIT_F32) return store((float*)p + i, f);
    __m128i* to = (__m128i*)((uint16_t*)p + i);
    if (type == WHIT_F16) {
      _mm_storeu_si128(to, _mm256_cvtps_ph(f.a, _MM_FROUND_TO_NEAREST_INT));
      _mm_storeu_si128(to + 1, _mm256_cvtps_ph(f.b, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
    __m256i v = _mm256_packus_epi32(round_bf16(f.a), round_bf16(f.b));
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(v, 0xd8));
  }
};

}  // namespace
