// Many rows of 8-bit activations with a scale per 32 columns, by VNNI: products are exact in int32, four to a lane.
//
// As in many_bf16.cpp a strip of 16 rows of the weight has its codes turned as they lie, one row to a lane. A vector of
// them gives CODES / 4 operands; each meets 12 rows of x, broadcast from memory. What is done per 32 columns and row of
// x is a conversion and a multiplication by the scale of x; the weight's scales follow once per group.
#include "avx512.h"
#include "many.h"
#include "transpose.h"

namespace {

#include "kernels.inl"
#include "strips.inl"
#include "strips_int8.inl"

enum { GROUP = GROUP8, QUADS = GROUP / 4 };

static int64_t strip_vectors8(const whit_weight& w) {
  const int codes = w.bits == 2 ? 16 : w.bits == 4 ? 8 : 4;
  return ((w.columns + codes - 1) / codes + 15) & ~(int64_t)15;
}

struct Strip8 {
  const __m512i* codes;       // as they lie; or decoded to bytes, an operand after the other
  const float *scale, *less;  // (groups, 16); less: null, or zero * scale, or the offset
};

// total (M, 16) = x times a strip. x (32 columns, 8 + 2, M): codes, -shift times their sum, and the scale.
template <int BITS, bool TABLE, int M, bool DECODED>
static __attribute__((noinline)) void tile(const Many8& a, const Strip8& strip, const uint32_t* x, const float* sums,
                                           __m512* total) {
  using T = Turned8<BITS>;
  const whit_weight& w = *a.p->w;
  const Level8<BITS, TABLE> decode(*a.p);
  const int64_t all = (w.columns + GROUP - 1) / GROUP, run = w.groups == 1 ? all : w.group_size / GROUP;
  const __m512i* codes = strip.codes;
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0, u = 0; u < all; g++) {
    const int64_t until = u + run < all ? u + run : all;
    __m512 part[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) part[m] = _mm512_setzero_ps();
    for (; u < until; u++) {
      __m512i acc[M];
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) acc[m] = _mm512_set1_epi32((int)x[QUADS * M + m]);
#pragma GCC unroll 2
      for (int c = 0; c < T::VECTORS; c++, codes += DECODED ? T::PARTS : 1) {
        __builtin_prefetch(codes + 16, 0, 3);
#pragma GCC unroll 4
        for (int k = 0; k < T::PARTS; k++) {
          const __m512i level = DECODED ? codes[k] : decode(*codes, k);
#pragma GCC unroll 12
          for (int m = 0; m < M; m++)  // broadcasts from memory, which costs nothing
            __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc[m]) : "v"(level), "m"(x[(c * T::PARTS + k) * M + m]));
        }
      }
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        float by;
        memcpy(&by, x + (QUADS + 1) * M + m, 4);
        part[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m]), _mm512_set1_ps(by), part[m]);
      }
      x += (QUADS + 2) * M;
    }
    const __m512 scale = _mm512_loadu_ps(strip.scale + 16 * g);
    if (strip.less) {
      const __m512 less = _mm512_loadu_ps(strip.less + 16 * g);
#pragma GCC unroll 12
      for (int m = 0; m < M; m++)
        total[m] = _mm512_fnmadd_ps(less, _mm512_set1_ps(sums[g * M + m]), _mm512_fmadd_ps(part[m], scale, total[m]));
    } else {
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) total[m] = _mm512_fmadd_ps(part[m], scale, total[m]);
    }
  }
}

// As `tile`, where groups of the weight are the 32 columns of a scale of x too (q4_k): a group then has no sum of its own, and
// all sums stay in registers. The same operations in the same order.
template <int BITS, bool TABLE, int M, bool DECODED>
static __attribute__((noinline)) void small_groups(const Many8& a, const Strip8& strip, const uint32_t* x,
                                                   const float* sums, __m512* total) {
  using T = Turned8<BITS>;
  const Level8<BITS, TABLE> decode(*a.p);
  const int64_t groups = (a.p->w->columns + GROUP - 1) / GROUP;
  const __m512i* codes = strip.codes;
  __m512 own[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) own[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++, x += (QUADS + 2) * M) {
    __m512i acc[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) acc[m] = _mm512_set1_epi32((int)x[QUADS * M + m]);
#pragma GCC unroll 8
    for (int c = 0; c < T::VECTORS; c++, codes += DECODED ? T::PARTS : 1) {
      __builtin_prefetch(codes + 16, 0, 3);
#pragma GCC unroll 4
      for (int k = 0; k < T::PARTS; k++) {
        const __m512i level = DECODED ? codes[k] : decode(*codes, k);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++)
          __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc[m]) : "v"(level), "m"(x[(c * T::PARTS + k) * M + m]));
      }
    }
    const __m512 scale = _mm512_loadu_ps(strip.scale + 16 * g);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      float by;
      memcpy(&by, x + (QUADS + 1) * M + m, 4);
      const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m]), _mm512_set1_ps(by));
      own[m] = _mm512_fmadd_ps(part, scale, own[m]);
    }
    if (!strip.less) continue;
    const __m512 less = _mm512_loadu_ps(strip.less + 16 * g);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) own[m] = _mm512_fnmadd_ps(less, _mm512_set1_ps(sums[g * M + m]), own[m]);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) total[m] = own[m];
}

template <int BITS, bool TABLE, int M, bool DECODED>
static ALWAYS_INLINE void some(const Many8& a, const Strip8& strip, const uint32_t* x, const float* sums, __m512* total) {
  const whit_weight& w = *a.p->w;
  if (w.groups > 1 && w.group_size == GROUP) small_groups<BITS, TABLE, M, DECODED>(a, strip, x, sums, total);
  else tile<BITS, TABLE, M, DECODED>(a, strip, x, sums, total);
}

template <int BITS, bool TABLE, bool DECODED>
static void multiply_as(const Many8& a, int64_t first, int64_t last, void* scratch) {
  using T = Turned8<BITS>;
  const Product8& p = *a.p;
  const whit_weight& w = *p.w;
  const Level8<BITS, TABLE> decode(p);
  const int64_t dwords = strip_vectors8(w), vectors = DECODED ? dwords * T::PARTS : dwords, params_size = 16 * w.groups, count = p.x->count;
  __m512i* codes = (__m512i*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  float *scale = (float*)(codes + a.strips * vectors), *less = scale + a.strips * params_size;
  float* own = less + a.strips * params_size;
  for (int64_t row = first; row < last; row += a.strips * STRIP) {
    const int64_t left = (last - row + STRIP - 1) / STRIP, strips = left < a.strips ? left : a.strips;
    for (int64_t s = 0; s < strips; s++) {
      __m512i* to = codes + s * vectors;
      turn<T>(w, row + s * STRIP, 0, dwords, [&](int64_t i, __m512i v) __attribute__((always_inline)) {
        if constexpr (!DECODED) _mm512_store_si512(to + i, v);
        else
          for (int k = 0; k < T::PARTS; k++) _mm512_store_si512(to + i * T::PARTS + k, decode(v, k));
      });
      strip_params(w, row + s * STRIP, p.unit, own, scale + s * params_size, less + s * params_size);
    }
    for (int64_t m = 0; m < count; m += ROWS8_IN_TILE) {
      const uint32_t* x = a.x + m * a.width;
      const float* sums = w.zero ? a.sums + m * w.groups : nullptr;
      const int64_t rows = tile_rows8(count - m), real = count - m < rows ? count - m : rows;
      for (int64_t s = 0; s < strips; s++) {
        Strip8 strip = {codes + s * vectors, scale + s * params_size, w.zero ? less + s * params_size : nullptr};
        __m512 total[ROWS8_IN_TILE];
        expect_strip(w, p.y, p.type, m, real, row + s * STRIP);
        if (rows == 12) some<BITS, TABLE, 12, DECODED>(a, strip, x, sums, total);
        else if (rows == 8) some<BITS, TABLE, 8, DECODED>(a, strip, x, sums, total);
        else some<BITS, TABLE, 4, DECODED>(a, strip, x, sums, total);
        finish_strip(w, p.bias, p.y, p.type, m, real, row + s * STRIP, total);
      }
    }
  }
}

// Where more rows of x than a few tiles follow, codes are decoded once for all.
template <int BITS, bool TABLE>
static void multiply_bits(const Many8& a, int64_t first, int64_t last, void* scratch) {
  if constexpr (Turned8<BITS>::PARTS > 1 || TABLE)
    if (a.decoded) return multiply_as<BITS, TABLE, true>(a, first, last, scratch);
  multiply_as<BITS, TABLE, false>(a, first, last, scratch);
}

template <int BITS>
static void multiply_small(const Many8& a, int64_t first, int64_t last, void* scratch) {
  if (a.p->has_table) multiply_bits<BITS, true>(a, first, last, scratch);
  else multiply_bits<BITS, false>(a, first, last, scratch);
}

static void multiply(const Many8& a, int64_t first, int64_t last, void* scratch) {
  switch (a.p->w->bits) {
    case 2: return multiply_small<2>(a, first, last, scratch);
    case 3: return multiply_small<3>(a, first, last, scratch);
    case 4: return multiply_small<4>(a, first, last, scratch);
    case 5: return multiply_bits<5, false>(a, first, last, scratch);
    case 6: return multiply_bits<6, false>(a, first, last, scratch);
    default: return multiply_bits<8, false>(a, first, last, scratch);
  }
}

// 16 dwords of each row of a tile from column `first` of `stride` on, turned: vector i has dword i of all rows.
static ALWAYS_INLINE void turn_rows(const void* from, int64_t stride, int64_t first, int64_t left, int64_t rows,
                                    __m512i by, __m512i (&v)[16]) {
  const __mmask16 mask = (__mmask16)(left >= 16 ? 0xffff : (1 << left) - 1);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) {
    v[r] = _mm512_setzero_si512();
    if (r < rows) v[r] = _mm512_maskz_loadu_epi32(mask, (const int32_t*)from + r * stride + first);
    v[r] = _mm512_permutexvar_epi8(by, v[r]);
  }
  transpose16(v);
}

static void arrange_tile(const Many8& a, int64_t first, uint32_t* to, float* sums) {
  const whit_weight& w = *a.p->w;
  const whit_rows8& x = *a.p->x;
  const int64_t rows = tile_rows8(x.count - first), real = x.count - first < rows ? x.count - first : rows;
  const int64_t all = (w.columns + GROUP - 1) / GROUP, stride = x.stride / 4;
  const __m512i by = order_of_fours(w.bits), as_is = order_of_fours(8);
  const __mmask16 mask = (__mmask16)((1 << rows) - 1);
  __m512i starts[16], scales[16], codes[16];
  for (int64_t u = 0; u < all; u++, to += WIDTH8 * rows) {
    if (u % 16 == 0) {
      turn_rows(a.p->starts + first * x.groups, x.groups, u, x.groups - u, real, as_is, starts);
      turn_rows(x.scale + first * x.groups, x.groups, u, x.groups - u, real, as_is, scales);
    }
    if (u % 2 == 0) turn_rows(x.codes + first * x.stride, stride, u * QUADS, stride - u * QUADS, real, by, codes);
    for (int i = 0; i < QUADS; i++) _mm512_mask_storeu_epi32(to + i * rows, mask, codes[u % 2 * QUADS + i]);
    _mm512_mask_storeu_epi32(to + QUADS * rows, mask, starts[u % 16]);
    _mm512_mask_storeu_epi32(to + (QUADS + 1) * rows, mask, scales[u % 16]);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; sums && g < w.groups; g++)
      sums[g * rows + r] = r < real ? a.p->group_sums[(first + r) * a.p->sum_stride + g] : 0;
}

}  // namespace

const ManyKernels8 whit_many_int8 = {arrange_tile, multiply};
