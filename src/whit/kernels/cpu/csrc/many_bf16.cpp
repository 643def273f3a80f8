// Many rows of bfloat16 with AVX512-BF16, exact where levels are exact in bfloat16 (integers): products and sums of a
// group are float32, its scale is applied to the sum.
//
// 16 rows of the weight are a strip. Its codes are turned, as they lie, so that a lane holds neighbouring codes of one
// row: 4 bits stay 4 bits, and a strip stays in the second cache. Every step takes two codes of each lane through a
// table in a register and multiplies them with 16 rows of x, broadcast from memory: two instructions to decode for 16
// that multiply, whatever the number of rows.
#include "avx512_bf16.h"
#include "many.h"
#include "transpose.h"

namespace {

#include "kernels.inl"
#include "strips.inl"
#include "strips_bf16.inl"

struct Strip {
  const __m512i* codes;          // [from, until) of the vectors of 16 rows; or their levels in bfloat16, (vectors, steps)
  const float *scale, *less;     // (groups, 16); less: zero * scale or the offset, null without
  const uint8_t* next;           // what is read after this strip
  int64_t from, until;
};

// total (M, 16) += x (M, columns) times a strip, group by group.
template <int BITS, int M, bool DECODED>
static __attribute__((noinline)) void tile(const whit_weight& w, const Strip& strip, const uint32_t* x,
                                           const float* sums, const Look<BITS>& looks, __m512* total) {
  using T = Turned<BITS>;
  const Look<BITS> look = looks;
  const int64_t run = w.groups == 1 ? strip.until : w.group_size / T::CODES;
  const __m512i* next = strip.codes;
  x += strip.from * T::STEPS * ROWS_IN_TILE;
  for (int64_t c = strip.from, g = c / run; c < strip.until; g++) {
    const bool whole = c == g * run;  // or what is left of a group that began in the part before
    const int64_t until = (g + 1) * run < strip.until ? (g + 1) * run : strip.until;
    __m512 acc[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
    for (; c < until; c++, next += DECODED ? T::STEPS : 1) {
      __m512i codes = DECODED ? _mm512_setzero_si512() : *next;
      __builtin_prefetch(strip.next + 64 * c, 0, 2);
#pragma GCC unroll 8
      for (int k = 0; k < T::STEPS; k++, x += ROWS_IN_TILE) {
        const __m512i level = DECODED ? next[k] : look(k ? _mm512_srli_epi16(codes, T::SHIFT * k) : codes);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)  // broadcasts from memory, which costs nothing
          __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc[m]) : "v"(level), "m"(x[m]));
      }
    }
    const __m512 scale = _mm512_loadu_ps(strip.scale + 16 * g);
    if (strip.less && whole) {
      const __m512 less = _mm512_loadu_ps(strip.less + 16 * g);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
        total[m] = _mm512_fnmadd_ps(less, _mm512_set1_ps(sums[16 * g + m]), _mm512_fmadd_ps(acc[m], scale, total[m]));
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) total[m] = _mm512_fmadd_ps(acc[m], scale, total[m]);
    }
  }
}

template <int BITS, bool DECODED>
static ALWAYS_INLINE void some(const whit_weight& w, int64_t rows, const Strip& strip, const uint32_t* x,
                               const float* sums, const Look<BITS>& look, __m512* total) {
  if (rows > 12) tile<BITS, 16, DECODED>(w, strip, x, sums, look, total);
  else if (rows > 8) tile<BITS, 12, DECODED>(w, strip, x, sums, look, total);
  else if (rows > 4) tile<BITS, 8, DECODED>(w, strip, x, sums, look, total);
  else tile<BITS, 4, DECODED>(w, strip, x, sums, look, total);
}

static ALWAYS_INLINE void clear(__m512* total) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS_IN_TILE; m++) total[m] = _mm512_setzero_ps();
}

// Up to 16 rows of x: 16 vectors are turned right before they are multiplied, which the processor does while products
// of those before them are still on their way.
template <int BITS>
static void multiply_once(const Many& a, int64_t first, int64_t last, void* scratch) {
  using T = Turned<BITS>;
  const whit_weight& w = *a.w;
  const Look<BITS> look(w.levels);
  const int64_t vectors = (w.columns + T::CODES - 1) / T::CODES, params_size = 16 * w.groups;
  __m512i* codes = (__m512i*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  float *scale = (float*)(codes + 16), *less = scale + params_size, *own = less + params_size;
  for (int64_t row = first; row < last; row += STRIP) {
    __m512 total[ROWS_IN_TILE];
    clear(total);
    expect_strip(w, a.y, a.type, 0, a.count, row);
    strip_params(w, row, 1, own, scale, less);
    const uint8_t* next = w.codes + (row + STRIP < w.rows ? row + STRIP : 0) * w.row_bytes;
    for (int64_t c = 0; c < vectors; c += 16) {
      turn<T>(w, row, c, c + 16, [&](int64_t i, __m512i v) __attribute__((always_inline)) {
        _mm512_store_si512(codes + (i - c), v);
      });
      some<BITS, false>(w, a.count, {codes, scale, w.zero ? less : nullptr, next, c, c + 16 < vectors ? c + 16 : vectors},
                        a.x, a.sums, look, total);
    }
    finish_strip(w, a.bias, a.y, a.type, 0, a.count, row, total);
  }
}

// DECODED: a table of several registers is asked once, not for every 16 rows of x.
template <int BITS, bool DECODED>
static void multiply_bits(const Many& a, int64_t first, int64_t last, void* scratch) {
  using T = Turned<BITS>;
  if constexpr (!DECODED)
    if (a.count <= ROWS_IN_TILE) return multiply_once<BITS>(a, first, last, scratch);
  const whit_weight& w = *a.w;
  const Look<BITS> look(w.levels);
  const int64_t all = (w.columns + T::CODES - 1) / T::CODES, dwords = (all + 15) & ~(int64_t)15;
  const int64_t vectors = DECODED ? dwords * T::STEPS : dwords, params_size = 16 * w.groups;
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
          for (int k = 0; k < T::STEPS; k++)
            _mm512_store_si512(to + i * T::STEPS + k, look(_mm512_srli_epi16(v, T::SHIFT * k)));
      });
      strip_params(w, row + s * STRIP, 1, own, scale + s * params_size, less + s * params_size);
    }
    for (int64_t m = 0; m < a.count; m += ROWS_IN_TILE) {
      const uint32_t* x = a.x + m * a.pairs;
      const float* sums = w.zero ? a.sums + m * w.groups : nullptr;
      const int64_t rows = a.count - m < ROWS_IN_TILE ? a.count - m : ROWS_IN_TILE;
      for (int64_t s = 0; s < strips; s++) {
        const int64_t after = m ? row : row + (a.strips + s) * STRIP;
        Strip strip = {codes + s * vectors, scale + s * params_size, w.zero ? less + s * params_size : nullptr,
                       w.codes + (after < w.rows ? after : 0) * w.row_bytes, 0, all};
        __m512 total[ROWS_IN_TILE];
        clear(total);
        expect_strip(w, a.y, a.type, m, rows, row + s * STRIP);
        some<BITS, DECODED>(w, rows, strip, x, sums, look, total);
        finish_strip(w, a.bias, a.y, a.type, m, rows, row + s * STRIP, total);
      }
    }
  }
}

template <int BITS>
static void multiply_wide(const Many& a, int64_t first, int64_t last, void* scratch) {
  if (a.decoded) multiply_bits<BITS, true>(a, first, last, scratch);
  else multiply_bits<BITS, false>(a, first, last, scratch);
}

static void multiply(const Many& a, int64_t first, int64_t last, void* scratch) {
  switch (a.w->bits) {
    case 1: return multiply_bits<1, false>(a, first, last, scratch);
    case 2: return multiply_bits<2, false>(a, first, last, scratch);
    case 3: return multiply_bits<3, false>(a, first, last, scratch);
    case 4: return multiply_bits<4, false>(a, first, last, scratch);
    case 5: return multiply_bits<5, false>(a, first, last, scratch);
    case 6: return multiply_wide<6>(a, first, last, scratch);
    case 7: return multiply_wide<7>(a, first, last, scratch);
    default: return multiply_wide<8>(a, first, last, scratch);
  }
}

static void arrange_tile(const Many& a, const void* from, int64_t tile, uint32_t* to, float* sums) {
  const whit_weight& w = *a.w;
  const uint16_t* x = (const uint16_t*)from + tile * ROWS_IN_TILE * w.columns;
  const int64_t rows = a.count - tile * ROWS_IN_TILE;
  const int codes = w.bits <= 2 ? 16 : w.bits <= 4 ? 8 : 4;
  const __m512i by = order_of_pairs(codes);
  for (int64_t c = 0; c < w.columns; c += 32, to += 16 * ROWS_IN_TILE) {
    const __mmask32 mask = w.columns - c >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (w.columns - c)) - 1;
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS_IN_TILE; r++) {
      v[r] = r < rows ? _mm512_maskz_loadu_epi16(mask, x + r * w.columns + c) : _mm512_setzero_si512();
      v[r] = _mm512_permutexvar_epi16(by, v[r]);
    }
    transpose16(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * ROWS_IN_TILE, v[i]);
  }
  if (sums) sum_groups(w, x, rows, sums);
}

}  // namespace

const ManyKernels whit_many_bf16 = {arrange_tile, multiply};
