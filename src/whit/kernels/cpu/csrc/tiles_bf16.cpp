// Many rows of bfloat16 by AMX. Levels that are exact in bfloat16 (integers) are multiplied as they are, and each group's
// sums take its scale in float32. Weights with levels that are not are rounded as a whole, and so are all where `folds`
// says that x was rounded too.
#include <new>

#include "avx512_bf16.h"
#include "tile_ops.h"
#include "tiles.h"
#include "transpose.h"

namespace {

#include "kernels.inl"
#include "strips.inl"
#include "strips_bf16.inl"
#include "tiles.inl"

// Sums of G groups, which wait to be added to the total: tiles (G, 2, 2) of 16 rows of x.
struct Waiting {
  const float *part, *scale, *less, *of_x;  // less: null where it was taken off already, or there is none
  int64_t params, x_tile;
  int rows;  // of x; nothing is stored of a tile beyond them
};

// total += scale part - less sums; tiles of total are `below` floats apart.
template <int N, int G>
static ALWAYS_INLINE void add_rows(const Waiting& a, float* total, int64_t below) {
  __m512 scale[G][N], less[G][N];
#pragma GCC unroll 8
  for (int i = 0; i < G * N; i++) {
    scale[i / N][i % N] = _mm512_loadu_ps(a.scale + i / N * 16 + i % N * a.params);
    less[i / N][i % N] = a.less ? _mm512_loadu_ps(a.less + i / N * 16 + i % N * a.params) : _mm512_setzero_ps();
  }
  for (int row = 0; row < a.rows; row++) {
    float* to = total + (row >> 4) * below + (row & 15) * 16;
    const float* part = a.part + (row >> 4) * 512 + (row & 15) * 16;
    for (int n = 0; n < N; n++) {
      __m512 sum = _mm512_load_ps(to + n * 256);
#pragma GCC unroll 4
      for (int i = 0; i < G; i++) sum = _mm512_fmadd_ps(_mm512_load_ps(part + i * 1024 + n * 256), scale[i][n], sum);
      if (a.less) {
        const float* of_x = a.of_x + (row >> 4) * a.x_tile + (row & 15);
#pragma GCC unroll 4
        for (int i = 0; i < G; i++) sum = _mm512_fnmadd_ps(less[i][n], _mm512_set1_ps(of_x[16 * i]), sum);
      }
      _mm512_store_ps(to + n * 256, sum);
    }
  }
}

// total += blocks [first, until) of x times two strips, group by group; G groups are added at a time. Products and other
// vectors do not take turns: together they take longer than one after the other. `less` is taken off where a group begins.
template <int M, int N, int G>
static ALWAYS_INLINE void groups_of(const Tiles& t, const Spot& s, int64_t chunk, int64_t first, int64_t until,
                                    const Waiting& of, float* total, int64_t below) {
  const int64_t run = t.w->group_size / t.depth;
  Waiting waiting = of;
  int slot = 0;
  for (int64_t b = first, g = first / run; b < until; g++) {
    const bool begins = b == g * run;
    const int64_t end = (g + 1) * run < until ? (g + 1) * run : until;
    zero_sums<M, N>();
    for (; b < end; b++) multiply_block<OfPairs, M, N>(s, b - chunk);
    store_sums<M, N>((uint8_t*)(of.part + slot * 1024), 2048);
    if (++slot < G) continue;
    slot = 0;
    waiting.scale = of.scale + 16 * (g + 1 - G);
    waiting.less = of.less && begins ? of.less + 16 * (g + 1 - G) : nullptr;
    waiting.of_x = of.less ? of.of_x + 16 * (g + 1 - G) : nullptr;
    add_rows<N, G>(waiting, total, below);
  }
}

template <int M, int N>
static __attribute__((noinline)) void multiply_groups(const Tiles& t, const Spot& s, int64_t first, int64_t until,
                                                      const Waiting& of, const Sums& sums) {
  const int64_t run = t.w->group_size / t.depth, below = sums.below / 4, all = until - first;
  float* total = (float*)sums.at;
  for (int i = 0; sums.first && i < M; i++) memset(total + i * below, 0, 1024 * N);
  int64_t done = first;
  if (first % run == 0) {  // whole groups, four or two at a time
    done += all - all % ((run <= 2 ? 4 : 2) * run);
    if (run <= 2) groups_of<M, N, 4>(t, s, first, first, done, of, total, below);
    else groups_of<M, N, 2>(t, s, first, first, done, of, total, below);
  }
  groups_of<M, N, 1>(t, s, first, done, until, of, total, below);
}

// Pairs of the weight itself, rounded once: (vectors, STEPS, 16). Levels of up to 4 bits come from a table, others are
// consecutive.
template <int BITS>
struct Folded {
  __m512 table, by, less;
  __m512i order;
  const float *scale, *off;  // (groups, 16)
  int64_t groups, vectors, g, until;  // vectors of a group
  float lowest;
  Folded(const whit_weight& w, const float* scale, const float* off, int64_t from)
      : table(Pairs::all_levels(w.levels, BITS < 4 ? BITS : 4)), scale(scale), off(off), groups(w.groups),
        lowest(BITS > 4 ? w.levels[0] : 0) {
    uint16_t words[32];
    for (int i = 0; i < 32; i++) words[i] = (uint16_t)(i / 2 + i % 2 * 16);
    order = _mm512_loadu_si512(words);
    vectors = w.groups == 1 ? INT64_MAX : w.group_size / Turned<BITS>::CODES;
    g = from / vectors, until = w.groups == 1 ? INT64_MAX : (g + 1) * vectors;
    move();
  }
  ALWAYS_INLINE void move() {
    const int64_t at = 16 * (g < groups ? g : groups - 1);
    by = _mm512_loadu_ps(scale + at), less = off ? _mm512_loadu_ps(off + at) : _mm512_setzero_ps();
    if (BITS > 4) less = _mm512_fnmadd_ps(by, _mm512_set1_ps(lowest), less);
  }
  ALWAYS_INLINE __m512 weight(__m512i codes) const {
    __m512 level;
    if constexpr (BITS <= 4) level = _mm512_permutexvar_ps(codes, table);
    else level = _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << BITS) - 1)));
    return _mm512_fmsub_ps(level, by, less);
  }
  ALWAYS_INLINE void operator()(int64_t i, __m512i codes, __m512i* to) {
    using T = Turned<BITS>;
    if (i >= until) g++, until += vectors, move();
#pragma GCC unroll 8
    for (int k = 0; k < T::STEPS; k++) {
      const __m512i both = Pairs::both(weight(_mm512_srli_epi32(codes, T::SHIFT * k)),
                                       weight(_mm512_srli_epi32(codes, T::SHIFT * k + 16)));
      _mm512_store_si512(to + k, _mm512_permutexvar_epi16(order, both));
    }
  }
};

// Consecutive levels of 7 and 8 bits, exact in bfloat16, of the words of `codes`: the bits of 2^23 + code are the code's.
template <int BITS>
struct Counted {
  const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1), magic = _mm512_set1_epi32(0x4b000000);
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  __m512 less;
  explicit Counted(float lowest) : less(_mm512_set1_ps(8388608.0f - lowest)) {}
  ALWAYS_INLINE __m512i level(__m512i codes) const {  // (codes & mask) | magic, as a float
    const __m512i lifted = _mm512_ternarylogic_epi64(codes, mask, magic, 0xea);
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(lifted), less));
  }
  ALWAYS_INLINE __m512i operator()(__m512i codes) const {
    const __m512i low = _mm512_srli_epi32(level(codes), 16);
    return _mm512_ternarylogic_epi64(level(_mm512_srli_epi32(codes, 16)), upper, low, 0xea);
  }
};

// A Look of the weight's bits, made once: for 8 bits that takes as long as to decode a strip of some hundred columns.
struct alignas(64) Tables {
  uint8_t bytes[512];
};

// Columns [from, until) of a strip, from row `row` on, to pairs.
template <int BITS>
static void decode(const Tiles& t, const Tables& tables, int64_t row, int64_t from, int64_t until, const float* scale,
                   const float* less, Ask ask, __m512i* to) {
  using T = Turned<BITS>;
  const whit_weight& w = *t.w;
  const int64_t first = from / T::CODES, last = ((until + T::CODES - 1) / T::CODES + 15) & ~(int64_t)15;
  if (t.folded) {
    Folded<BITS> fold(w, scale, less, first);
    return turn<T>(w, row, first, last, [&](int64_t i, __m512i v) __attribute__((always_inline)) {
      ask.template operator()<T>(i - first);
      fold(i, v, to + (i - first) * T::STEPS);
    });
  }
  auto put = [&](const auto& level) __attribute__((always_inline)) {
    turn<T>(w, row, first, last, [&](int64_t i, __m512i v) __attribute__((always_inline)) {
      ask.template operator()<T>(i - first);
#pragma GCC unroll 8
      for (int k = 0; k < T::STEPS; k++)
        _mm512_store_si512(to + (i - first) * T::STEPS + k, level(k ? _mm512_srli_epi16(v, T::SHIFT * k) : v));
    });
  };
  if constexpr (BITS >= 7)
    if (t.counted) return put(Counted<BITS>(w.levels[0]));
  put(*(const Look<BITS>*)tables.bytes);
}

typedef void (*Decode)(const Tiles&, const Tables&, int64_t, int64_t, int64_t, const float*,
                       const float*, Ask, __m512i*);

template <int BITS>
static Decode decoder(const float* levels, Tables& tables) {
  static_assert(sizeof(Look<BITS>) <= sizeof tables.bytes, "room for 256 levels");
  new (tables.bytes) Look<BITS>(levels);
  return decode<BITS>;
}

static Decode decoder_of(const whit_weight& w, Tables& tables) {
  switch (w.bits) {
    case 1: return decoder<1>(w.levels, tables);
    case 2: return decoder<2>(w.levels, tables);
    case 3: return decoder<3>(w.levels, tables);
    case 4: return decoder<4>(w.levels, tables);
    case 5: return decoder<5>(w.levels, tables);
    case 6: return decoder<6>(w.levels, tables);
    case 7: return decoder<7>(w.levels, tables);
    default: return decoder<8>(w.levels, tables);
  }
}

struct Bf16 {
  enum { BYTES = 2 };
  const Tiles& t;
  const whit_weight& w;
  Tables tables;
  Decode decode_strip;
  int64_t size;  // of a strip's params
  float *scale, *less, *own, *parts;

  Bf16(const Tiles& t, float* params)
      : t(t), w(*t.w), decode_strip(decoder_of(w, tables)), size(16 * w.groups), scale(params + 4096),
        less(scale + t.strips * size), own(less + t.strips * size), parts(params) {}

  void params(int64_t row, int64_t s) { strip_params(w, row, 1, own, scale + s * size, less + s * size); }
  void decode(int64_t row, int64_t s, int64_t from, int64_t until, Ask ask, __m512i* to) {
    decode_strip(t, tables, row, from, until, scale + s * size, w.zero ? less + s * size : nullptr, ask, to);
  }
  template <int M, int N>
  void multiply(const Spot& spot, int64_t tile, int64_t s, int64_t b, int64_t until, const Sums& sums) {
    if (t.whole) return multiply_whole<OfPairs, M, N>(spot, until - b, sums);
    const int64_t rows = t.count - 16 * tile;
    const Waiting of = {parts, scale + s * size, w.zero ? less + s * size : nullptr,
                        t.sums ? t.sums + tile * size : nullptr, size, size, (int)(rows < 16 * M ? rows : 16 * M)};
    multiply_groups<M, N>(t, spot, b, until, of, sums);
  }
  // Sums that went through all columns get their scale; then rows [m, m + 16) of y.
  void finish(int64_t m, int64_t row, int64_t s, uint8_t* at) {
    const int64_t rows = t.count - m < 16 ? t.count - m : 16;
    __m512* sums = (__m512*)at;
    expect_strip(w, t.y, t.type, m, rows, row);
    for (int64_t r = 0; t.whole && !t.folded && r < rows; r++) {
      sums[r] = _mm512_mul_ps(sums[r], _mm512_loadu_ps(scale + s * size));
      if (w.zero) sums[r] = _mm512_fnmadd_ps(_mm512_loadu_ps(less + s * size), _mm512_set1_ps(t.sums[m + r]), sums[r]);
    }
    finish_strip(w, t.bias, t.y, t.type, m, rows, row, sums);
  }
};

static void multiply(const Tiles& t, int64_t first, int64_t last, void* scratch) {
  uint8_t* room = aligned(scratch);
  Bf16 kind(t, (float*)(room + t.strips * (16 * 2 * t.chunk + TILE_BLOCK * 1024)));
  multiply_all(t, first, last, room, kind);
}

static void arrange_tile(const Tiles& t, int64_t tile) {
  const whit_weight& w = *t.w;
  const uint16_t* x = (const uint16_t*)t.x + 16 * tile * w.columns;
  const int64_t rows = t.count - 16 * tile;
  const __m512i by = order_of_pairs(w.bits <= 2 ? 16 : w.bits <= 4 ? 8 : 4);
  uint8_t* to = t.tiles + tile / 2 * 2 * t.tile_bytes + tile % 2 * 32 * t.depth;
  for (int64_t c = 0; c < w.columns; c += 32, to += 2048) {
    const __mmask32 mask = w.columns - c >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (w.columns - c)) - 1;
    for (int64_t r = 0; r < 16; r++) {
      __m512i v = r < rows ? _mm512_maskz_loadu_epi16(mask, x + r * w.columns + c) : _mm512_setzero_si512();
      v = _mm512_permutexvar_epi16(by, v);
      if (t.depth == 32) _mm512_store_si512(to + 64 * r, v);
      else {
        _mm256_store_si256((__m256i*)(to + 32 * r), _mm512_castsi512_si256(v));
        _mm256_store_si256((__m256i*)(to + 1024 + 32 * r), _mm512_extracti64x4_epi64(v, 1));
      }
    }
  }
  if (t.sums) sum_groups(w, x, rows, t.sums + tile * 16 * w.groups);
}

}  // namespace

const TileKernels whit_tiles_bf16 = {arrange_tile, multiply};
