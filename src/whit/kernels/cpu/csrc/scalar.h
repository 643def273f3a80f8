// Any processor: 16 lanes as the compiler's own vectors, which it cuts into whatever the target has (SSE2, NEON).
#pragma once
#define UNROLL(n)
#include "digits.h"
#include "isa.h"

namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef uint32_t Word16 __attribute__((vector_size(64)));

struct Scalar {
  using F = Float16;
  using U = Word16;
  using W = F;
  using X = F;
  struct Table { float v[16]; };
  struct Window { int bits; };
  static constexpr int CODES_PER_STEP = 1;
  static constexpr int ROWS = 1;     // of the weight at a time, for one row of activations
  static constexpr int SIZES = 5;    // the rows of activations at a time, as a sum of 1, 2, 4 and 8
  static constexpr bool WIDE = false;  // whether blocks that lie in one group have a kernel of their own
  static constexpr int LOOK_BITS = 4;  // up to so many bits are looked up
  // Whether consecutive levels of 2 and 3 bits, or of 5 to 8, may be moved up to where they cost less.
  static constexpr bool LIFTS = false, LIFTS_MANY = false;
  static constexpr bool SUPERS = false;  // whether it has a way of its own for what superblocks share
  static constexpr bool COUNTS = true;   // whether converting a small code beats looking it up

  static void digits(const uint8_t* from, int64_t bytes, uint8_t* to) { digits_by_table(from, bytes, to); }
  static ALWAYS_INLINE F set1(float a) { return F{} + a; }
  static ALWAYS_INLINE F zero() { return F{}; }
  static ALWAYS_INLINE F load(const float* p) { F f; memcpy(&f, p, 64); return f; }
  static ALWAYS_INLINE F load_x(const char* p) { return load((const float*)p); }
  static ALWAYS_INLINE void store(float* p, F f) { memcpy(p, &f, 64); }
  static ALWAYS_INLINE F mul(F a, F b) { return a * b; }
  static ALWAYS_INLINE F add(F a, F b) { return a + b; }
  static ALWAYS_INLINE F sub(F a, F b) { return a - b; }
  static ALWAYS_INLINE F fma(F a, F b, F c) { return a * b + c; }
  static ALWAYS_INLINE F fnma(F a, F b, F c) { return c - a * b; }
  static ALWAYS_INLINE F div(F a, F b) { return a / b; }
  static ALWAYS_INLINE F most(F a, F b) { for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
  static ALWAYS_INLINE F least(F a, F b) { for (int i = 0; i < 16; i++) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }
  static ALWAYS_INLINE F floor(F a) { for (int i = 0; i < 16; i++) a[i] = __builtin_floorf(a[i]); return a; }
  static ALWAYS_INLINE F power(F n) { return from_bits((n + 127.0f) * 8388608.0f); }  // 2^n, n from -126 to 127
  static ALWAYS_INLINE F from_bits(F a) {
    U u;
    for (int i = 0; i < 16; i++) u[i] = (uint32_t)(a[i] == a[i] ? a[i] : 0);
    memcpy(&a, &u, 64);
    return a;
  }
  static ALWAYS_INLINE F first(W w, X x) { return w * x; }
  static ALWAYS_INLINE F next(W w, X x, F acc) { return acc + w * x; }
  static ALWAYS_INLINE float sum(F f) {
    float v[16];
    memcpy(v, &f, 64);
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
  }
  static ALWAYS_INLINE F convert(const void* p, int64_t i, int type) {
    F f;
    for (int j = 0; j < 16; j++) f[j] = load_as_float(p, i + j, type);
    return f;
  }
  static ALWAYS_INLINE F repeat(const float* p, int run) {
    F f;
    for (int j = 0; j < 16; j++) f[j] = p[j / run];
    return f;
  }
  template <int RUN>
  static ALWAYS_INLINE F repeat_of(const float* p) { return repeat(p, RUN); }
  template <int BITS>
  static ALWAYS_INLINE U block(const uint8_t* p) {
    constexpr int WIDTH = Block<BITS>::CODES * BITS;
    U u;
    for (int j = 0; j < 16; j++) {
      uint32_t bits = 0;
      for (int i = 0; i < (WIDTH + 7) / 8; i++) bits |= (uint32_t)p[j * WIDTH / 8 + i] << (8 * i);
      u[j] = bits >> (j * WIDTH % 8);
    }
    return u;
  }
  template <int BITS>
  static ALWAYS_INLINE U shift(U u) { return u >> BITS; }
  static ALWAYS_INLINE Table table(const float* levels, int bits) {
    Table t;
    for (int i = 0; i < 16; i++) t.v[i] = levels[i & ((1 << bits) - 1)];
    return t;
  }
  template <int BITS>
  static ALWAYS_INLINE F look(U u, const Table& t) {
    F f;
    for (int i = 0; i < 16; i++) f[i] = t.v[u[i] & 15];
    return f;
  }
  static ALWAYS_INLINE F levels(U u, const Table& t) { return look<4>(u, t); }
  static ALWAYS_INLINE F to_float(U u) { F f; for (int i = 0; i < 16; i++) f[i] = (float)(int32_t)u[i]; return f; }
  template <int BITS>
  static ALWAYS_INLINE F number(U u) {
    return to_float(u & ((1u << BITS) - 1));
  }
  static ALWAYS_INLINE F pick(U u, const float* levels) {
    F f;
    for (int i = 0; i < 16; i++) f[i] = levels[u[i]];
    return f;
  }
  template <int BITS>
  static ALWAYS_INLINE F gather(U u, const float* levels) {
    return pick(u & ((1u << BITS) - 1), levels);
  }
  static ALWAYS_INLINE Window window(int bits) { return {bits}; }
  static ALWAYS_INLINE U natural(const uint8_t* p, const Window& w) {
    U u;
    for (int j = 0; j < 16; j++) {
      int at = j * w.bits / 8, shift = j * w.bits % 8;
      uint32_t two = p[at] | (shift + w.bits > 8 ? (uint32_t)p[at + 1] << 8 : 0);
      u[j] = (two >> shift) & ((1u << w.bits) - 1);
    }
    return u;
  }
  static ALWAYS_INLINE void store_as(void* p, int64_t i, F f, int type) {
    for (int j = 0; j < 16; j++) store_float(p, i + j, f[j], type);
  }
};

}  // namespace
