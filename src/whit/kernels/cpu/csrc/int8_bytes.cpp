// Weights of bytes as they lie times some rows of x with one scale each, by VNNI: four rows of the weight meet four of x,
// so that nothing is turned but the sums. Where rows of x are few, panels take longer to be turned than to be multiplied.
#include "avx512.h"
#include "many.h"
#include "transpose.h"

namespace {

#include "kernels.inl"
#include "strips.inl"

struct Four {  // rows of the weight, from `row` on: where they lie, their scales and biases
  const Product8& p;
  int64_t row, rows;
  const uint8_t* codes[4];
  const float *scale, *bias;
};

// The sums of the lanes of acc[m][r], as lane r of 128 bits m.
static ALWAYS_INLINE __m512i sum_of_lanes(const __m512i (&acc)[4][4]) {
  __m512i quarter[4];  // of row m of x: in each 128 bits those of the four rows of the weight
#pragma GCC unroll 4
  for (int m = 0; m < 4; m++) {
    const __m512i* a = acc[m];
    const __m512i even = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i odd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    quarter[m] = _mm512_add_epi32(_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd));
  }
  const auto halves = [](__m512i a, __m512i b) __attribute__((always_inline)) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return halves(halves(quarter[0], quarter[1]), halves(quarter[2], quarter[3]));
}

// One for each row of x, four times: for the four rows of the weight.
static ALWAYS_INLINE __m512i each_four(__m128i v) {
  return _mm512_permutexvar_epi32(_mm512_srli_epi32(Avx512::lanes(), 2), _mm512_castsi128_si512(v));
}

// The steps of finish_row8 for rows [m, m + count) of x, of which `sum` has 128 bits each.
static ALWAYS_INLINE void finish_four(const Four& f, int64_t m, int64_t count, __m512i sum) {
  const Product8& p = f.p;
  const whit_rows8& x = *p.x;
  const __mmask8 mask = (__mmask8)((1 << count) - 1);
  sum = _mm512_add_epi32(sum, each_four(_mm_maskz_loadu_epi32(mask, p.starts + m)));
  if (x.zero) {
    const __m128i levels = _mm_maskz_loadu_epi32((__mmask8)((1 << f.rows) - 1), p.row_sums + f.row);
    const __m512i zero = each_four(_mm_maskz_loadu_epi32(mask, x.zero + m));
    sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_broadcast_i32x4(levels)));
  }
  const __m512 by = _mm512_castsi512_ps(each_four(_mm_castps_si128(_mm_maskz_loadu_ps(mask, x.scale + m))));
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), by);
  y = _mm512_mul_ps(y, _mm512_broadcast_f32x4(_mm_loadu_ps(f.scale)));
  if (p.bias) y = _mm512_add_ps(y, _mm512_broadcast_f32x4(_mm_loadu_ps(f.bias)));
  alignas(64) float part[16];
  _mm512_store_ps(part, y);
  for (int64_t i = 0, at = m * p.w->rows + f.row; i < count; i++, at += p.w->rows) {
    if (f.rows == 4 && p.type == WHIT_F32) memcpy((float*)p.y + at, part + 4 * i, 16);
    else for (int64_t r = 0; r < f.rows; r++) store_float(p.y, at + r, part[4 * i + r], p.type);
  }
}

// Four rows of the weight and M of x from m on. `next` is what memory is asked for: what lies behind these rows, or null.
template <int M>
__attribute__((noinline)) void multiply_four(const Four& f, int64_t m, const uint8_t* next) {
  const whit_rows8& x = *f.p.x;
  const int64_t columns = f.p.w->columns;
  const int8_t* q = x.codes + m * x.stride;
  __m512i acc[4][4];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) acc[i / 4][i % 4] = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += 64) {
    const __mmask64 there = columns - c >= 64 ? (__mmask64)-1 : ((__mmask64)1 << (columns - c)) - 1;
    if (next)
      for (int i = 0; i < 4; i++) __builtin_prefetch(next + 4 * c + 64 * i, 0, 2);
    __m512i level[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) level[r] = _mm512_maskz_loadu_epi8(there, f.codes[r] + c);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      const __m512i own = _mm512_loadu_si512(q + i * x.stride + c);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc[i][r]) : "v"(level[r]), "v"(own));
    }
  }
  finish_four(f, m, M, sum_of_lanes(acc));
}

}  // namespace

void whit_bytes8(const Product8& p, int64_t first, int64_t last, float* scratch) {
  const whit_weight& w = *p.w;
  const int64_t count = p.x->count;
  float *scale = scratch, *bias = scratch + STRIP, *own = bias + STRIP;
  for (int64_t strip = first; strip < last; strip += STRIP) {
    const int64_t until = strip + STRIP < last ? strip + STRIP : last;
    strip_params(w, strip, p.unit, own, scale, nullptr);
    for (int64_t r = strip; p.bias && r < until; r++) bias[r - strip] = load_as_float(p.bias, r, p.type);
    for (int64_t row = strip; row < until; row += 4) {
      Four f = {p, row, until - row < 4 ? until - row : 4, {}, scale + row - strip, bias + row - strip};
      for (int64_t r = 0; r < 4; r++) f.codes[r] = w.codes + (row + (r < f.rows ? r : f.rows - 1)) * w.row_bytes;
      const uint8_t* next = f.codes[0] + 4 * w.row_bytes;
      int64_t m = 0;
      for (; m + 4 <= count; m += 4) multiply_four<4>(f, m, m ? nullptr : next);
      if (count - m == 3) multiply_four<3>(f, m, nullptr);
      if (count - m == 2) multiply_four<2>(f, m, nullptr);
      if (count - m == 1) multiply_four<1>(f, m, nullptr);
    }
  }
}
