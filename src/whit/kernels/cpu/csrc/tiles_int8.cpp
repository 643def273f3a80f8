// Many rows of 8-bit activations with one scale each, by AMX: levels as unsigned bytes, sums exact in int32 through all
// columns of weights that have one scale for each row.
#include "avx512.h"
#include "tile_ops.h"
#include "tiles.h"
#include "transpose.h"

namespace {

#include "kernels.inl"
#include "strips.inl"
#include "strips_int8.inl"
#include "tiles.inl"

// Columns [from, until) of a strip, from row `row` on, to fours of bytes.
template <int BITS, bool TABLE>
static void decode(const Tiles& t, int64_t row, int64_t from, int64_t until, Ask ask, __m512i* to) {
  using T = Turned8<BITS>;
  const int64_t first = from / T::CODES, last = ((until + T::CODES - 1) / T::CODES + 15) & ~(int64_t)15;
  const Level8<BITS, TABLE> level(*t.p);
  turn<T>(*t.w, row, first, last, [&](int64_t i, __m512i v) __attribute__((always_inline)) {
    ask.template operator()<T>(i - first);
    for (int k = 0; k < T::PARTS; k++) _mm512_store_si512(to + (i - first) * T::PARTS + k, level(v, k));
  });
}

typedef void (*Decode)(const Tiles&, int64_t, int64_t, int64_t, Ask, __m512i*);

static Decode decode_of(const Product8& p) {
  switch (p.w->bits) {
    case 2: return p.has_table ? decode<2, true> : decode<2, false>;
    case 3: return p.has_table ? decode<3, true> : decode<3, false>;
    case 4: return p.has_table ? decode<4, true> : decode<4, false>;
    case 5: return decode<5, false>;
    case 6: return decode<6, false>;
    default: return decode<8, false>;
  }
}

struct Int8 {
  enum { BYTES = 1 };
  const Tiles& t;
  const whit_weight& w;
  Decode decode_strip;
  float *scale, *own;

  Int8(const Tiles& t, float* params, int64_t strips)
      : t(t), w(*t.w), decode_strip(decode_of(*t.p)), scale(params), own(params + 16 * strips) {}

  void params(int64_t row, int64_t s) { strip_params(w, row, t.p->unit, own, scale + 16 * s, nullptr); }
  void decode(int64_t row, int64_t, int64_t from, int64_t until, Ask ask, __m512i* to) {
    decode_strip(t, row, from, until, ask, to);
  }
  template <int M, int N>
  void multiply(const Spot& spot, int64_t, int64_t, int64_t b, int64_t until, const Sums& sums) {
    multiply_whole<OfBytes, M, N>(spot, until - b, sums);
  }
  // The steps of finish_row8, for rows [m, m + 16) of y.
  void finish(int64_t m, int64_t row, int64_t s, const uint8_t* at) {
    const int64_t rows = t.count - m < 16 ? t.count - m : 16;
    expect_strip(w, t.y, t.type, m, rows, row);
    if (w.rows - row < 16 || t.p->x->zero) finish_edge(m, row, s, rows, at);
    else if (t.type == WHIT_F32) finish_whole<WHIT_F32>(m, row, s, rows, at);
    else if (t.type == WHIT_BF16) finish_whole<WHIT_BF16>(m, row, s, rows, at);
    else finish_whole<WHIT_F16>(m, row, s, rows, at);
  }

 private:
  template <int TYPE>
  ALWAYS_INLINE void finish_whole(int64_t m, int64_t row, int64_t s, int64_t rows, const uint8_t* sums) {
    const __m512 by = _mm512_loadu_ps(scale + 16 * s);
    const __m512 bias = t.bias ? Avx512::convert(t.bias, row, TYPE) : _mm512_setzero_ps();
    const int32_t* starts = t.p->starts + m;
    const float* of_x = t.p->x->scale + m;
    for (int64_t r = 0, to = m * w.rows + row; r < rows; r++, to += w.rows) {
      const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + 64 * r), _mm512_set1_epi32(starts[r]));
      const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(of_x[r])), by);
      Avx512::store_as(t.y, to, _mm512_add_ps(y, bias), TYPE);
    }
  }
  __attribute__((noinline)) void finish_edge(int64_t m, int64_t row, int64_t s, int64_t rows, const uint8_t* sums) {
    const whit_rows8& x = *t.p->x;
    const int64_t lanes = w.rows - row < 16 ? w.rows - row : 16;
    const __mmask16 mask = (__mmask16)((1 << lanes) - 1);
    const __m512i levels = x.zero ? _mm512_maskz_loadu_epi32(mask, t.p->row_sums + row) : _mm512_setzero_si512();
    __m512 total[16];
    for (int64_t r = 0; r < rows; r++) {
      __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + 64 * r), _mm512_set1_epi32(t.p->starts[m + r]));
      if (x.zero) sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(x.zero[m + r]), levels));
      total[r] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x.scale[m + r]));
      total[r] = _mm512_mul_ps(total[r], _mm512_loadu_ps(scale + 16 * s));
    }
    finish_strip(w, t.bias, t.y, t.type, m, rows, row, total);
  }
};

static void multiply(const Tiles& t, int64_t first, int64_t last, void* scratch) {
  uint8_t* room = aligned(scratch);
  Int8 kind(t, (float*)(room + t.strips * (16 * t.chunk + TILE_BLOCK * 1024)), t.strips);
  multiply_all(t, first, last, room, kind);
}

static void arrange_tile(const Tiles& t, int64_t tile) {
  const whit_rows8& x = *t.p->x;
  const int8_t* from = x.codes + 16 * tile * x.stride;
  const int64_t rows = t.count - 16 * tile;
  const __m512i by = order_of_fours(t.w->bits);
  uint8_t* to = t.tiles + tile / 2 * 2 * t.tile_bytes + tile % 2 * 1024;
  for (int64_t c = 0; c < 64 * t.blocks; c += 64, to += 2048)
    for (int64_t r = 0; r < 16; r++) {
      const __m512i v = r < rows ? _mm512_loadu_si512(from + r * x.stride + c) : _mm512_setzero_si512();
      _mm512_store_si512(to + 64 * r, _mm512_permutexvar_epi8(by, v));
    }
}

#include "tiles_int8_few.inl"

}  // namespace

const TileKernels whit_tiles_int8 = {arrange_tile, multiply}, whit_tiles_int8_few = {arrange_few, multiply_few};
