// AVX-512 with VNNI and VBMI: four products of bytes to a lane in one instruction, codes of any width to bytes in two.
// In a namespace of whoever includes it, after kernels.inl.
#pragma once

struct Vnni512 : Avx512 {
  using B = __m512i;
  using I = __m512i;
  using G = __m512;
  static constexpr int LANES = 16, TALL = 8;
  static constexpr bool EXACT = true, OWN_PARTS = true, TILES = false, SUPERS = true;
  struct Bits { __m512i from, shift, mask; };

  static ALWAYS_INLINE Bits bits(int bits) {
    alignas(64) uint8_t from[64], shift[64];
    for (int i = 0; i < 64; i++) from[i] = (uint8_t)(i / 8 * bits + i % 8), shift[i] = (uint8_t)(i % 8 * bits);
    __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    __asm__("" : "+v"(mask));  // lest it be made anew, from a general register, at every step
    return {_mm512_load_si512(from), _mm512_load_si512(shift), mask};
  }
  template <int BITS>
  static ALWAYS_INLINE B decode(const uint8_t* p, const Bits& bits) {
    if constexpr (BITS == 8) return _mm512_loadu_si512(p);
    if constexpr (BITS == 4) {
      __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
      return _mm512_ternarylogic_epi64(v, _mm512_slli_epi16(v, 4), bits.mask, 0xa8);  // (a | b) & c
    }
    __m512i v = _mm512_maskz_loadu_epi8((__mmask64)-1 >> (64 - 8 * BITS), p);
    v = _mm512_permutexvar_epi8(bits.from, v);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(bits.shift, v), bits.mask);
  }
  template <int SHIFT>
  static ALWAYS_INLINE B part(B bytes, const Bits& bits) {
    return _mm512_and_si512(SHIFT ? _mm512_srli_epi16(bytes, SHIFT) : bytes, bits.mask);
  }
  // Codes of 2, 3 and 4 bits to the vectors of few rows. A look-up takes the low 6 bits of a byte: its table holds each
  // level as often as there are other bits, so that nothing needs to be masked.
  static ALWAYS_INLINE __m512i table_at(int bits, int shift, const uint8_t* levels) {
    alignas(64) uint8_t t[64];
    for (int i = 0; i < 64; i++) t[i] = levels[i >> shift & ((1 << bits) - 1)];
    return _mm512_load_si512(t);
  }
  static ALWAYS_INLINE B once(const uint8_t* p) {  // or each use would load it anew
    B bytes = _mm512_loadu_si512(p);
    __asm__("" : "+v"(bytes));
    return bytes;
  }
  template <int BITS, bool TABLE>
  struct Parts {
    __m512i mask, from, shift, tables[3];
    explicit Parts(const uint8_t* levels) : mask(Vnni512::bits(BITS).mask) {
      const uint8_t codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      for (int i = 0; i < 3; i++) tables[i] = table_at(BITS, BITS == 2 ? 2 * i : 0, TABLE ? levels : codes);
      alignas(64) uint8_t f[64], s[64];  // 16 codes of 3 bits to 8 bytes; of these four, then four of the next eight
      for (int i = 0; i < 64; i++) f[i] = (uint8_t)(i / 8 * 6 + i % 8), s[i] = (uint8_t)(3 * (i % 4 + i % 8 / 4 * 8));
      from = _mm512_load_si512(f), shift = _mm512_load_si512(s);
    }
    template <int TABLE_OF>
    ALWAYS_INLINE B level(B codes) const {
      return TABLE ? _mm512_permutexvar_epi8(codes, tables[TABLE_OF]) : _mm512_and_si512(codes, mask);
    }
    ALWAYS_INLINE void operator()(const uint8_t* p, B (&to)[2]) const {
      if constexpr (BITS == 4) {
        const B bytes = once(p);
        to[0] = level<0>(bytes), to[1] = level<0>(_mm512_srli_epi16(bytes, 4));
      } else {
        const B v = _mm512_permutexvar_epi8(from, _mm512_maskz_loadu_epi8((__mmask64)-1 >> 16, p));
        const __m512i next = _mm512_add_epi8(shift, _mm512_set1_epi8(12));
        to[0] = level<0>(_mm512_multishift_epi64_epi8(shift, v));
        to[1] = level<0>(_mm512_multishift_epi64_epi8(next, v));
      }
    }
    ALWAYS_INLINE void operator()(const uint8_t* p, B (&to)[4]) const {
      const B bytes = once(p);
      to[0] = level<0>(bytes);
      to[1] = _mm512_permutexvar_epi8(bytes, tables[1]), to[2] = _mm512_permutexvar_epi8(bytes, tables[2]);
      to[3] = level<0>(_mm512_srli_epi16(bytes, 6));
    }
  };
  // What lies at even places of a, then b, and at odd ones.
  static ALWAYS_INLINE void halve(B a, B b, B& even, B& odd) {
    const __m512i quads = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), low = _mm512_set1_epi16(255);
    const B low8 = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
    const B high8 = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    even = _mm512_permutexvar_epi64(quads, low8), odd = _mm512_permutexvar_epi64(quads, high8);
  }
  static ALWAYS_INLINE void halve_words(B a, B b, B& even, B& odd) {  // of 4 bytes
    const __m512i at = _mm512_slli_epi32(lanes(), 1);
    even = _mm512_permutex2var_epi32(a, at, b);
    odd = _mm512_permutex2var_epi32(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
  }
  static ALWAYS_INLINE B table8(const uint8_t* t) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)t)); }
  static ALWAYS_INLINE B look8(B codes, B table) { return _mm512_shuffle_epi8(table, codes); }
  static ALWAYS_INLINE B bload(const int8_t* p) { return _mm512_loadu_si512(p); }
  static ALWAYS_INLINE void bstore(uint8_t* p, B b) { _mm512_storeu_si512(p, b); }
  static ALWAYS_INLINE B four(const int8_t* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  static ALWAYS_INLINE I izero() { return _mm512_setzero_si512(); }
  static ALWAYS_INLINE I iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static ALWAYS_INLINE void istore(int32_t* p, I i) { _mm512_storeu_si512(p, i); }
  template <bool SMALL>
  static ALWAYS_INLINE I dot(I acc, B level, B q) { return _mm512_dpbusd_epi32(acc, level, q); }
  template <bool SMALL>  // in place: compilers tend to move a register full of sums at every step
  static ALWAYS_INLINE void dot_into(I& acc, B level, B q) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(level), "v"(q));
  }
  static ALWAYS_INLINE int32_t isum(I i) { return _mm512_reduce_add_epi32(i); }
  static ALWAYS_INLINE G gzero() { return _mm512_setzero_ps(); }
  static ALWAYS_INLINE G gset1(float f) { return _mm512_set1_ps(f); }
  static ALWAYS_INLINE G gload(const float* p) { return _mm512_loadu_ps(p); }
  static ALWAYS_INLINE void gstore(float* p, G g) { _mm512_storeu_ps(p, g); }
  static ALWAYS_INLINE G gadd(G a, G b) { return _mm512_add_ps(a, b); }
  static ALWAYS_INLINE G gmul(G a, G b) { return _mm512_mul_ps(a, b); }
  static ALWAYS_INLINE G gfma(G a, G b, G c) { return _mm512_fmadd_ps(a, b, c); }
  static ALWAYS_INLINE G to_g(I i) { return _mm512_cvtepi32_ps(i); }
  static ALWAYS_INLINE float gsum(G g) { return sum(g); }
  static ALWAYS_INLINE void gsum4(const G (&g)[4], float* to) {
    G a = _mm512_add_ps(_mm512_unpacklo_ps(g[0], g[1]), _mm512_unpackhi_ps(g[0], g[1]));
    G b = _mm512_add_ps(_mm512_unpacklo_ps(g[2], g[3]), _mm512_unpackhi_ps(g[2], g[3]));
    a = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  template <int MOST>  // how many numbers are needed: up to four are found in each quarter of a register
  static ALWAYS_INLINE G grepeat(const float* p, int shift) {  // lane i has p[i >> shift]
    const __m512i at = _mm512_srl_epi32(lanes(), _mm_cvtsi32_si128(shift));
    if constexpr (MOST <= 4) return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), at);
    return _mm512_permutexvar_ps(at, _mm512_loadu_ps(p));
  }
  // super_params_of: integers become bytes, 64 at a time, and what superblocks share stays in a register.
  template <int SUBS, bool BIASED, class Put>
  static ALWAYS_INLINE void supers(const whit_weight& w, const void* outer, const uint8_t* inner, float bias, int64_t row,
                                   const Put& put) {
    enum { EACH = 16 / SUBS };  // superblocks in 16 groups
    static const Bits all[] = {bits(1), bits(2), bits(3), bits(4), bits(5), bits(6), bits(7), bits(8)};
    const Bits own = all[w.sub_bits - 1];
    const __m512i in_super = _mm512_srli_epi32(lanes(), SUBS == 8 ? 3 : 4);
    const __m512 less = _mm512_set1_ps(bias);
    const int64_t count = w.groups / SUBS, run = 8 * w.sub_bits;
    int64_t left = (w.groups * w.sub_bits + 7) / 8, super = 0;
    for (const uint8_t* p = inner + row * left; left > 0; p += run, left -= run, super += 4 * EACH) {
      const __mmask64 there = (__mmask64)-1 >> (64 - (left < run ? left : run));
      const __m512i packed = _mm512_permutexvar_epi8(own.from, _mm512_maskz_loadu_epi8(there, p));
      const __m512i codes = _mm512_and_si512(_mm512_multishift_epi64_epi8(own.shift, packed), own.mask);
      const int64_t some = count - super < 4 * EACH ? count - super : 4 * EACH;
      const __m512 outers = some_of(outer, row * count + super, (__mmask16)((1 << some) - 1), w.scale_type);
      auto sixteen = [&](int k) __attribute__((always_inline)) {
        const __m512i four = _mm512_maskz_permutexvar_epi8(0x1111111111111111, lane_from(16 * k), codes);
        __m512 number = _mm512_cvtepi32_ps(four);
        if (BIASED) number = _mm512_sub_ps(number, less);
        const __m512i at = _mm512_add_epi32(in_super, _mm512_set1_epi32(EACH * k));
        put((super + EACH * k) * SUBS, _mm512_mul_ps(_mm512_permutexvar_ps(at, outers), number));
      };
      sixteen(0);
      if (some > EACH) sixteen(1);
      if (some > 2 * EACH) sixteen(2);
      if (some > 3 * EACH) sixteen(3);
    }
  }
  static ALWAYS_INLINE __m512i lane_from(int first) { return _mm512_add_epi32(lanes(), _mm512_set1_epi32(first)); }
  static ALWAYS_INLINE __m512 some_of(const void* p, int64_t first, __mmask16 mask, int type) {
    if (type == WHIT_F32) return _mm512_maskz_loadu_ps(mask, (const float*)p + first);
    const __m256i v = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)p + first);
    if (type == WHIT_F16) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static ALWAYS_INLINE void transpose(B (&v)[16]) { transpose16(v); }
  // Of |x|, by their bits, in which NaN and infinities are beyond all numbers.
  static ALWAYS_INLINE F larger(F most, F x) {
    const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(x));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), bits));
  }
  static ALWAYS_INLINE int32_t largest(F f) { return _mm512_reduce_max_epi32(_mm512_castps_si512(f)); }
  static ALWAYS_INLINE void round8(F f, int8_t* to, I& sum) {
    // Beyond the bytes are only rows that are not finite, or whose largest is subnormal.
    const __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(f, _mm512_set1_ps(-128)), _mm512_set1_ps(127)));
    _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8(q));
    sum = _mm512_add_epi32(sum, q);
  }
};
