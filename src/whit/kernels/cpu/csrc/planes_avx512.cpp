// One or two rows of bfloat16 as sums of bytes, by AVX-512 with VNNI and VBMI.
#include "avx512.h"
#include "planes.h"
#include "transpose.h"

namespace {

#include "kernels.inl"

#include "int8_avx512.h"

#include "int8.inl"

enum { UNIT = 16 };                  // columns whose numbers are looked at together: the least that a group of the weight has
enum { ROWS = 4, AHEAD = 16384 };    // of the weight at a time; bytes that memory is asked for in advance
constexpr float NEAR = 2e-6f;        // two bytes are enough where what they leave is not more of the sum of all |x|

// How a call's room is used: for all rows of x their numbers and planes as they come; for each its planes as they are met,
// its scales by lanes, and its sums by groups of the weight.
struct Layout {
  int64_t stride, arranged, lanes, sums;
  explicit Layout(const whit_weight& w) {
    const int parts = parts8<Vnni512>(w.bits), block = 64 * parts;
    stride = (w.columns + STEP8 - 1) / STEP8 * STEP8, arranged = (stride + block - 1) / block * block;
    lanes = arranged / (4 * parts), sums = (w.groups + 15) & ~(int64_t)15;
  }
  int64_t shared() const { return (4 + MOST_PLANES) * stride; }
  int64_t row() const { return MOST_PLANES * arranged + 4 * (lanes + sums); }
};

static size_t bytes(const whit_weight& w, int64_t count) {
  const Layout layout(w);
  return (size_t)(layout.shared() + count * layout.row() + 64);
}

// The largest of each 8 or 16 neighbours, in all of them.
template <int LANE>
static ALWAYS_INLINE __m512i largest_of(__m512i v) {
  v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0xb1));
  v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0x4e));
  v = _mm512_max_epi32(v, _mm512_shuffle_i32x4(v, v, 0xb1));
  return LANE == 16 ? _mm512_max_epi32(v, _mm512_shuffle_i32x4(v, v, 0x4e)) : v;
}

// What the lowest of three signed bytes of q is.
static ALWAYS_INLINE __m512i lowest(__m512i q) { return _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24); }

// x (columns) as whole numbers of up to 24 bits times a power of two for each LANE of them; returns how many bytes they
// need, or 0 where there is no such power.
template <int LANE>
static int whole_numbers(const uint16_t* x, int64_t columns, int64_t stride, int32_t* numbers, float* lanes) {
  __m512 all = _mm512_setzero_ps(), left = all;
  __mmask16 bad = 0;
  for (int64_t c = 0; c < stride; c += 16) {
    const __mmask16 mask = columns - c >= 16 ? 0xffff : columns > c ? (__mmask16)((1 << (columns - c)) - 1) : 0;
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + c)), 16);
    const __m512 f = _mm512_castsi512_ps(bits), size = _mm512_abs_ps(f);
    // The largest becomes at least 2^22 and less than 255 2^15, which is more than three signed bytes hold.
    const __m512i most = largest_of<LANE>(_mm512_castps_si512(size)), tail = _mm512_set1_epi32(0x7f0000);
    const __mmask16 some = _mm512_test_epi32_mask(most, most);
    const __mmask16 long_tail = _mm512_cmpeq_epi32_mask(_mm512_and_si512(most, tail), tail);
    __m512i exponent = _mm512_sub_epi32(_mm512_srli_epi32(most, 23), _mm512_set1_epi32(22));
    exponent = _mm512_mask_add_epi32(exponent, long_tail, exponent, _mm512_set1_epi32(1));
    bad |= some & (_mm512_cmpge_epi32_mask(most, _mm512_set1_epi32(0x7f800000)) |
                   _mm512_cmplt_epi32_mask(exponent, _mm512_set1_epi32(1)));
    const __m512 scale = _mm512_maskz_mov_ps(some, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
    const __m512i inverse = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), exponent), 23);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(f, _mm512_maskz_mov_ps(some, _mm512_castsi512_ps(inverse))));
    _mm512_storeu_si512(numbers + c, q);
    all = _mm512_add_ps(all, size);
    left = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_abs_epi32(lowest(q))), scale, left);
    lanes[c / LANE] = _mm512_cvtss_f32(scale);
    if (LANE == 8) lanes[c / LANE + 1] = _mm_cvtss_f32(_mm512_extractf32x4_ps(scale, 2));
  }
  if (bad) return 0;
  return Vnni512::sum(left) <= NEAR * Vnni512::sum(all) ? 2 : 3;
}

// The signed bytes of the numbers, `apart` from plane to plane, the highest first, and the sums of x by groups.
static void planes_of(const whit_weight& w, const int32_t* numbers, int count, int lane, float* lanes, int8_t* planes,
                      int64_t apart, float* sums) {
  const int64_t size = w.groups == 1 ? apart : w.group_size;
  const __m512i half = _mm512_set1_epi32(128), both = _mm512_srlv_epi32(Vnni512::lanes(), _mm512_set1_epi32(lane == 8 ? 3 : 4));
  for (int64_t c = 0; c < apart; c += size, sums++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t u = c; u < c + size && u < apart; u += UNIT) {
      __m512i q = _mm512_loadu_si512(numbers + u);
      if (count == 2) q = _mm512_srai_epi32(_mm512_add_epi32(q, half), 8);
      const __m512 scale = _mm512_permutexvar_ps(both, _mm512_castps128_ps512(_mm_loadl_pi(_mm_setzero_ps(), (const __m64*)(lanes + u / lane))));
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), scale, sum);
      for (int plane = count - 1; plane >= 0; plane--) {
        _mm_storeu_si128((__m128i*)(planes + plane * apart + u), _mm512_cvtepi32_epi8(q));
        q = _mm512_srai_epi32(_mm512_add_epi32(q, half), 8);  // what its lowest byte, signed, leaves
      }
    }
    *sums = Vnni512::sum(sum);
  }
}

static bool arrange(Planes& p, const void* x, int64_t count, void* room) {
  const whit_weight& w = *p.w;
  const Layout layout(w);
  const int lane = w.bits == 2 ? 16 : 8;
  int32_t* numbers = (int32_t*)room;
  int8_t* planes = (int8_t*)(numbers + layout.stride);
  float *lanes = (float*)(planes + MOST_PLANES * layout.stride), *sums = lanes + count * layout.lanes;
  int8_t* arranged = (int8_t*)(sums + count * layout.sums);
  p.lanes = lanes, p.lane_stride = layout.lanes, p.group_sums = sums, p.sum_stride = layout.sums;
  p.arranged = arranged, p.arranged_stride = layout.arranged, p.shift = (int)-w.levels[0], p.unit = 1;
  for (int64_t m = 0; m < count; m++, lanes += layout.lanes, sums += layout.sums, arranged += MOST_PLANES * layout.arranged) {
    const uint16_t* row = (const uint16_t*)x + m * w.columns;
    const int own = lane == 16 ? whole_numbers<16>(row, w.columns, layout.stride, numbers, lanes)
                               : whole_numbers<8>(row, w.columns, layout.stride, numbers, lanes);
    if (!own) return false;
    p.planes[m] = own;
    const int64_t filled = layout.stride / lane;
    for (int64_t i = 0; i < layout.lanes; i++) lanes[i] = i < filled ? lanes[i] * (own == 2 ? 256.0f : 1.0f) : 0;
    memset(sums, 0, 4 * (size_t)layout.sums);
    planes_of(w, numbers, own, lane, lanes, planes, layout.stride, sums);
    for (int plane = 0; plane < own; plane++)
      arrange8<Vnni512>(planes + plane * layout.stride, layout.stride, w.bits, arranged + plane * layout.arranged,
                        layout.arranged);
  }
  return true;
}

// total = the sums of lanes of R rows of codes past M of x, as lane_sums8's.
template <int BITS, int R, int M, int PLANES, bool WIDE>
static ALWAYS_INLINE void lane_sums(const Planes& p, const Parts8<Vnni512, BITS, false>& parts, int64_t row, int64_t m0,
                                    const float* scale, int64_t apart, __m512 (&total)[R][M]) {
  using S = Step8<Vnni512, BITS>;
  const whit_weight& w = *p.w;
  const int64_t steps = (w.columns + S::COLUMNS - 1) / S::COLUMNS, size = w.group_size, stride = w.row_bytes;
  const int shift = w.groups == 1 ? 62 : __builtin_ctzll((uint64_t)(WIDE ? size / S::COLUMNS : size / (4 * S::PARTS)));
  const int64_t in_step = WIDE ? 0 : S::COLUMNS / size, plane = p.arranged_stride;
  const uint8_t *codes = w.codes + row * stride, *end = w.codes + w.rows * stride;
  const uint8_t* next = codes + (R * stride > AHEAD ? R * stride : AHEAD);  // as lane_sums8 asks
  const int8_t* q = p.arranged + MOST_PLANES * m0 * plane;
  const float* by = p.lanes + m0 * p.lane_stride;
  EACH(r, R) { EACH(m, M) { total[r][m] = _mm512_setzero_ps(); }); });
  for (int64_t s = 0; s < steps; s++, codes += S::BYTES, next += R * S::BYTES, q += S::COLUMNS, by += 16) {
    const float* own_scale = scale + (WIDE ? s >> shift : s * in_step);
    __m512i x[M][PLANES][S::PARTS];
    EACH(m, M) {
      EACH(k, PLANES) {
        EACH(i, S::PARTS) { x[m][k][i] = _mm512_loadu_si512(q + (MOST_PLANES * m + k) * plane + i * 64); });
      });
    });
    EACH(r, R) {
      const uint8_t* from = codes + r * stride;
      uint8_t last[64];
      __builtin_prefetch(next + r * S::BYTES, 0, 2);
      __asm__ volatile("" ::: "memory");  // lest all be asked for at once
      if (R == 1) from = within<S::BYTES>(from, end, last);
      __m512i level[S::PARTS];
      parts(from, level);
      const float* scales = own_scale + r * apart;
      const __m512 own = WIDE ? _mm512_set1_ps(*scales) : Vnni512::grepeat<S::COLUMNS / UNIT>(scales, shift);
      EACH(m, M) {
        __m512i dot = _mm512_setzero_si512();
        EACH(k, PLANES) {
          if (k) dot = _mm512_slli_epi32(dot, 8);
          EACH(i, S::PARTS) { dot = _mm512_dpbusd_epi32(dot, level[i], x[m][k][i]); });
        });
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_loadu_ps(by + m * p.lane_stride));
        total[r][m] = _mm512_fmadd_ps(scaled, own, total[r][m]);
      });
    });
  }
}

// The sums of lanes with what zero points, offsets and the first level take from them, group by group.
static ALWAYS_INLINE __m512 taken_off(const Planes& p, int64_t m, __m512 y, const float* scale, const float* zero) {
  const whit_weight& w = *p.w;
  const float* sums = p.group_sums + m * p.sum_stride;
  const __m512 shift = _mm512_set1_ps((float)p.shift);
  for (int64_t g = 0; g < w.groups && w.offsets; g += 16)
    y = _mm512_fnmadd_ps(_mm512_loadu_ps(zero + g), _mm512_loadu_ps(sums + g), y);
  if (!p.shift && (w.offsets || !w.zero)) return y;
  for (int64_t g = 0; g < w.groups; g += 16) {
    const __m512 by = w.zero && !w.offsets ? _mm512_add_ps(_mm512_loadu_ps(zero + g), shift) : shift;
    y = _mm512_fnmadd_ps(_mm512_mul_ps(_mm512_loadu_ps(scale + g), by), _mm512_loadu_ps(sums + g), y);
  }
  return y;
}

// R rows of the weight past M of x; several have all their steps within the weight.
template <int BITS, int R, int M, int PLANES>
static __attribute__((noinline)) void rows_of(const Planes& p, const Parts8<Vnni512, BITS, false>& parts, int64_t row,
                                              int64_t m0, float* scratch) {
  const whit_weight& w = *p.w;
  ask_params(w, row, R);
  float *scale, *zero;
  const int64_t apart = row_params8<Vnni512, R>(w, row, scratch, scale, zero);
  __m512 total[R][M];
  if (w.groups == 1 || w.group_size >= Step8<Vnni512, BITS>::COLUMNS)
    lane_sums<BITS, R, M, PLANES, true>(p, parts, row, m0, scale, apart, total);
  else lane_sums<BITS, R, M, PLANES, false>(p, parts, row, m0, scale, apart, total);
  EACH(m, M) {
    __m512 sums[R];
    EACH(r, R) { sums[r] = taken_off(p, m0 + m, total[r][m], scale + r * apart, zero + r * apart); });
    float y[R];
    if constexpr (R == 4) Vnni512::gsum4(sums, y);
    else EACH(r, R) { y[r] = Vnni512::gsum(sums[r]); });
    EACH(r, R) { finish8(p, m0 + m, row + r, y[r]); });
  });
}

// R rows of the weight past all rows of x, each in as many bytes as it needs: a row's sums are the same in any company.
template <int BITS, int R>
static void rows_past(const Planes& p, const Parts8<Vnni512, BITS, false>& parts, int64_t count, int64_t row,
                      float* scratch) {
  if constexpr (R > 1)
    if (count == 2 && p.planes[0] == 2 && p.planes[1] == 2) return rows_of<BITS, R, 2, 2>(p, parts, row, 0, scratch);
  for (int64_t m = 0; m < count; m++) {
    if (p.planes[m] == 2) rows_of<BITS, R, 1, 2>(p, parts, row, m, scratch);
    else rows_of<BITS, R, 1, 3>(p, parts, row, m, scratch);
  }
}

template <int BITS>
static void dot_bits(const Planes& p, int64_t count, int64_t first, int64_t last, float* scratch) {
  const Parts8<Vnni512, BITS, false> parts(p);
  const int64_t whole = rows_within<Vnni512, BITS>(*p.w);
  int64_t row = first;
  for (; row + ROWS <= last && row + ROWS <= whole; row += ROWS) rows_past<BITS, ROWS>(p, parts, count, row, scratch);
  for (; row < last; row++) rows_past<BITS, 1>(p, parts, count, row, scratch);
}

static void dot(const Planes& p, int64_t count, int64_t first, int64_t last, float* scratch) {
  switch (p.w->bits) {
    case 2: return dot_bits<2>(p, count, first, last, scratch);
    case 3: return dot_bits<3>(p, count, first, last, scratch);
    default: return dot_bits<4>(p, count, first, last, scratch);
  }
}

}  // namespace

const PlaneKernels whit_planes_avx512 = {bytes, arrange, dot};
