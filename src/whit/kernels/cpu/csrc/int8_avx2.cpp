// AVX2: pairs of byte products summed in 16 bits where they fit, products of 16 bits where they might not.
#include "avx2.h"
#include "encoder.h"

namespace {

#include "kernels.inl"

struct Bytes2 : Avx2 {
  using B = __m256i;
  using I = __m256i;
  using G = __m256;
  static constexpr int LANES = 8, TALL = 2;
  static constexpr bool TILES = false;
  static constexpr bool EXACT = false, OWN_PARTS = false;
  struct Bits { __m256i from, by, mask; };  // of 16-bit windows

  // Code i lies in the 16-bit window from byte i bits / 8 on; a product by 2^(8 - shift) moves it to bits 8 and up.
  static ALWAYS_INLINE Bits bits(int bits) {
    alignas(32) uint8_t from[32];
    alignas(32) uint16_t by[16];
    for (int i = 0; i < 8; i++) {
      from[2 * i] = from[16 + 2 * i] = (uint8_t)(i * bits / 8);
      from[2 * i + 1] = from[16 + 2 * i + 1] = (uint8_t)(i * bits % 8 + bits > 8 ? i * bits / 8 + 1 : 0x80);
      by[i] = by[8 + i] = (uint16_t)(1 << (8 - i * bits % 8));
    }
    return {_mm256_load_si256((const __m256i*)from), _mm256_load_si256((const __m256i*)by),
            _mm256_set1_epi8((char)((1 << bits) - 1))};
  }
  static ALWAYS_INLINE __m128i eight(const uint8_t* p, int bytes) {  // two runs of 8 codes in the halves
    uint64_t v = 0;
    memcpy(&v, p, (size_t)bytes);
    return _mm_cvtsi64_si128((int64_t)v);
  }
  template <int BITS>
  static ALWAYS_INLINE B sixteen(const uint8_t* p, const Bits& bits) {  // 16 codes in the upper bytes of words
    __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(p, BITS)), eight(p + BITS, BITS), 1);
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(v, bits.from), bits.by), 8);
  }
  template <int BITS>
  static ALWAYS_INLINE B decode(const uint8_t* p, const Bits& bits) {
    if constexpr (BITS == 8) return _mm256_loadu_si256((const __m256i*)p);
    if constexpr (BITS == 4) {
      __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
      return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), bits.mask);
    }
    // packus works in 128-bit halves: the middle quarters change places
    __m256i v = _mm256_packus_epi16(sixteen<BITS>(p, bits), sixteen<BITS>(p + 2 * BITS, bits));
    return _mm256_and_si256(_mm256_permute4x64_epi64(v, 0xd8), bits.mask);
  }
  template <int SHIFT>
  static ALWAYS_INLINE B part(B bytes, const Bits& bits) {
    return _mm256_and_si256(SHIFT ? _mm256_srli_epi16(bytes, SHIFT) : bytes, bits.mask);
  }
  // What lies at even places of a, then b, and at odd ones.
  static ALWAYS_INLINE void halve(B a, B b, B& even, B& odd) {
    const __m256i low = _mm256_set1_epi16(255);
    const B low8 = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    const B high8 = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    even = _mm256_permute4x64_epi64(low8, 0xd8), odd = _mm256_permute4x64_epi64(high8, 0xd8);
  }
  static ALWAYS_INLINE B table8(const uint8_t* t) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)t));
  }
  static ALWAYS_INLINE B look8(B codes, B table) { return _mm256_shuffle_epi8(table, codes); }
  static ALWAYS_INLINE B bload(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static ALWAYS_INLINE void bstore(uint8_t* p, B b) { _mm256_storeu_si256((__m256i*)p, b); }
  static ALWAYS_INLINE B four(const int8_t* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  static ALWAYS_INLINE I izero() { return _mm256_setzero_si256(); }
  static ALWAYS_INLINE I iset1(int32_t v) { return _mm256_set1_epi32(v); }
  static ALWAYS_INLINE void istore(int32_t* p, I i) { _mm256_storeu_si256((__m256i*)p, i); }
  template <bool SMALL>
  static ALWAYS_INLINE I dot(I acc, B level, B q) {
    if constexpr (SMALL)  // levels of up to 7 bits: 2 * 127 * 127 < 2^15
      return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(level, q), _mm256_set1_epi16(1)));
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(level, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(level, 8), _mm256_srai_epi16(q, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  template <bool SMALL>
  static ALWAYS_INLINE void dot_into(I& acc, B level, B q) { acc = dot<SMALL>(acc, level, q); }
  static ALWAYS_INLINE int32_t isum(I i) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static ALWAYS_INLINE G gzero() { return _mm256_setzero_ps(); }
  static ALWAYS_INLINE G gset1(float f) { return _mm256_set1_ps(f); }
  static ALWAYS_INLINE G gload(const float* p) { return _mm256_loadu_ps(p); }
  static ALWAYS_INLINE void gstore(float* p, G g) { _mm256_storeu_ps(p, g); }
  static ALWAYS_INLINE G gadd(G a, G b) { return _mm256_add_ps(a, b); }
  static ALWAYS_INLINE G gmul(G a, G b) { return _mm256_mul_ps(a, b); }
  static ALWAYS_INLINE G gfma(G a, G b, G c) { return _mm256_fmadd_ps(a, b, c); }
  static ALWAYS_INLINE G to_g(I i) { return _mm256_cvtepi32_ps(i); }
  static ALWAYS_INLINE float gsum(G g) { return sum({g, _mm256_setzero_ps()}); }
  static ALWAYS_INLINE void gsum4(const G (&g)[4], float* to) {
    for (int r = 0; r < 4; r++) to[r] = gsum(g[r]);
  }
  template <int>
  static ALWAYS_INLINE G grepeat(const float* p, int shift) {  // lane i has p[i >> shift]
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), _mm256_srl_epi32(lanes, _mm_cvtsi32_si128(shift)));
  }
  static ALWAYS_INLINE void transpose(B (&v)[8]) {  // of dwords
    B t[8], u[8];
UNROLL(4)
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
UNROLL(2)
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
UNROLL(4)
    for (int i = 0; i < 4; i++) {
      v[i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x20);
      v[4 + i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
    }
  }
  // Of |x|, by their bits, in which NaN and infinities are beyond all numbers.
  static ALWAYS_INLINE F larger(F most, F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {larger(most.a, _mm256_andnot_ps(sign, x.a)), larger(most.b, _mm256_andnot_ps(sign, x.b))};
  }
  static ALWAYS_INLINE __m256 larger(__m256 x, __m256 y) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
  }
  static ALWAYS_INLINE int32_t largest(F f) {
    alignas(32) int32_t v[8];
    _mm256_store_ps((float*)v, larger(f.a, f.b));
    int32_t most = v[0];
    for (int i = 1; i < 8; i++) most = v[i] > most ? v[i] : most;
    return most;
  }
  static ALWAYS_INLINE void round8(F f, int8_t* to, I& sum) {
    // Beyond the bytes are only rows that are not finite, or whose largest is subnormal.
    const __m256 low = _mm256_set1_ps(-128), high = _mm256_set1_ps(127);
    __m256i a = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(f.a, low), high));
    __m256i b = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(f.b, low), high));
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)to, bytes);
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
  }
};

#include "int8.inl"
#include "encoder.inl"

}  // namespace

const Kernels8 whit_int8_avx2 = {few8<Bytes2>, many8<Bytes2>, quantize8<Bytes2>, arrange8<Bytes2>,
                                 parts8<Bytes2>, 32, 0, encode8<Bytes2>};
