// Products of 8-bit activations on any processor, in the compiler's own vectors.
#include "scalar.h"

#include "encoder.h"

namespace {

#include "kernels.inl"

typedef int32_t Int8 __attribute__((vector_size(32)));
typedef float Float8 __attribute__((vector_size(32)));

struct Plain8 : Scalar {
  struct B { uint8_t v[32]; };
  using I = Int8;
  using G = Float8;
  static constexpr int LANES = 8, TALL = 2;
  static constexpr bool TILES = false;
  static constexpr bool EXACT = true, OWN_PARTS = false;
  using Bits = int;

  static ALWAYS_INLINE Bits bits(int bits) { return bits; }
  template <int BITS>
  static ALWAYS_INLINE B decode(const uint8_t* p, Bits) {
    B b;
    for (int i = 0; i < 32; i++) {
      int at = i * BITS / 8, shift = i * BITS % 8;
      uint32_t two = p[at] | (shift + BITS > 8 ? (uint32_t)p[at + 1] << 8 : 0);
      b.v[i] = (uint8_t)(two >> shift & ((1u << BITS) - 1));
    }
    return b;
  }
  template <int SHIFT>
  static ALWAYS_INLINE B part(B bytes, Bits bits) {
    for (int i = 0; i < 32; i++) bytes.v[i] = (uint8_t)(bytes.v[i] >> SHIFT & ((1 << bits) - 1));
    return bytes;
  }
  static ALWAYS_INLINE void halve(const B& a, const B& b, B& even, B& odd) {  // what lies at even places of a, then b
    for (int i = 0; i < 16; i++) {
      even.v[i] = a.v[2 * i], even.v[16 + i] = b.v[2 * i];
      odd.v[i] = a.v[2 * i + 1], odd.v[16 + i] = b.v[2 * i + 1];
    }
  }
  static ALWAYS_INLINE B table8(const uint8_t* t) {
    B b;
    memcpy(b.v, t, 16), memcpy(b.v + 16, t, 16);
    return b;
  }
  static ALWAYS_INLINE B look8(B codes, const B& table) {
    for (int i = 0; i < 32; i++) codes.v[i] = table.v[codes.v[i] & 15];
    return codes;
  }
  static ALWAYS_INLINE B bload(const int8_t* p) { B b; memcpy(b.v, p, 32); return b; }
  static ALWAYS_INLINE void bstore(uint8_t* p, const B& b) { memcpy(p, b.v, 32); }
  static ALWAYS_INLINE B four(const int8_t* p) { B b; for (int i = 0; i < 32; i++) b.v[i] = (uint8_t)p[i % 4]; return b; }
  static ALWAYS_INLINE I izero() { return I{}; }
  static ALWAYS_INLINE I iset1(int32_t v) { return I{} + v; }
  static ALWAYS_INLINE void istore(int32_t* p, I i) { memcpy(p, &i, 32); }
  template <bool SMALL>
  static ALWAYS_INLINE I dot(I acc, const B& level, const B& q) {
    for (int j = 0; j < 8; j++)
      for (int i = 0; i < 4; i++) acc[j] += (int32_t)level.v[4 * j + i] * (int8_t)q.v[4 * j + i];
    return acc;
  }
  template <bool SMALL>
  static ALWAYS_INLINE void dot_into(I& acc, const B& level, const B& q) { acc = dot<SMALL>(acc, level, q); }
  static ALWAYS_INLINE int32_t isum(I i) { int32_t s = 0; for (int j = 0; j < 8; j++) s += i[j]; return s; }
  static ALWAYS_INLINE G gzero() { return G{}; }
  static ALWAYS_INLINE G gset1(float f) { return G{} + f; }
  static ALWAYS_INLINE G gload(const float* p) { G g; memcpy(&g, p, 32); return g; }
  static ALWAYS_INLINE void gstore(float* p, G g) { memcpy(p, &g, 32); }
  static ALWAYS_INLINE G gadd(G a, G b) { return a + b; }
  static ALWAYS_INLINE G gmul(G a, G b) { return a * b; }
  static ALWAYS_INLINE G gfma(G a, G b, G c) { return a * b + c; }
  static ALWAYS_INLINE G to_g(I i) { G g; for (int j = 0; j < 8; j++) g[j] = (float)i[j]; return g; }
  static ALWAYS_INLINE float gsum(G g) {
    for (int n = 4; n; n /= 2)
      for (int j = 0; j < n; j++) g[j] += g[j + n];
    return g[0];
  }
  static ALWAYS_INLINE void gsum4(const G (&g)[4], float* to) {
    for (int r = 0; r < 4; r++) to[r] = gsum(g[r]);
  }
  template <int>
  static ALWAYS_INLINE G grepeat(const float* p, int shift) {  // lane i has p[i >> shift]
    G g;
    for (int j = 0; j < 8; j++) g[j] = p[j >> shift];
    return g;
  }
  static ALWAYS_INLINE void transpose(B (&v)[8]) {
    B t[8];
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++) memcpy(t[i].v + 4 * j, v[j].v + 4 * i, 4);
    memcpy(v, t, sizeof t);
  }
  // Of |x|, by their bits, in which NaN and infinities are beyond all numbers.
  static ALWAYS_INLINE F larger(F most, F x) {
    int32_t bits[16], own[16];
    memcpy(bits, &most, 64), memcpy(own, &x, 64);
    for (int i = 0; i < 16; i++) bits[i] = (own[i] & 0x7fffffff) > bits[i] ? own[i] & 0x7fffffff : bits[i];
    memcpy(&most, bits, 64);
    return most;
  }
  static ALWAYS_INLINE int32_t largest(F f) {
    int32_t bits[16], most = 0;
    memcpy(bits, &f, 64);
    for (int i = 0; i < 16; i++) most = bits[i] > most ? bits[i] : most;
    return most;
  }
  static ALWAYS_INLINE void round8(F f, int8_t* to, I& sum) {
    for (int i = 0; i < 16; i++) {
      int q = f[i] > -128 && f[i] < 127.5f ? (int)__builtin_nearbyintf(f[i]) : 0;  // out of range: x is not finite
      to[i] = (int8_t)q;
      sum[0] += q;
    }
  }
};

#include "int8.inl"
#include "encoder.inl"

}  // namespace

extern const Kernels8 whit_int8_scalar;
const Kernels8 whit_int8_scalar = {few8<Plain8>, many8<Plain8>, quantize8<Plain8>, arrange8<Plain8>,
                                  parts8<Plain8>, 32, 0, encode8<Plain8>};
