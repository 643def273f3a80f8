// Few rows of bytes by AMX with a weight of bytes: 16 of its rows are a tile as they lie, and the other operand is x, four
// columns of 16 rows to a lane. Nothing of the weight is turned, and what is turned instead, x and the sums, is small.
// Included by tiles_int8.cpp.

// Blocks between those that are multiplied and those that memory is asked for.
enum { LYING_AHEAD = 8 };

// Some strips as tiles: where their first rows lie, and how far their rows are apart.
struct Lying {
  const uint8_t* at[LYING_STRIPS];
  int64_t apart[LYING_STRIPS];
};

// C += 16 rows of S strips times T tiles of x, in block b.
template <int S, int T>
static ALWAYS_INLINE void multiply_lying(const Lying& w, const uint8_t* x, int64_t b) {
  TILE_LOAD(4, x, 64);
  if constexpr (T == 1) {
    TILE_LOAD(5, w.at[0] + 64 * b, w.apart[0]);
    TILE_INT8_LEVELS(0, 5, 4);
    if (S > 1) TILE_LOAD(6, w.at[1] + 64 * b, w.apart[1]);
    if (S > 1) TILE_INT8_LEVELS(1, 6, 4);
    if (S > 2) TILE_LOAD(7, w.at[2] + 64 * b, w.apart[2]);
    if (S > 2) TILE_INT8_LEVELS(2, 7, 4);
    if (S > 3) TILE_LOAD(5, w.at[3] + 64 * b, w.apart[3]);
    if (S > 3) TILE_INT8_LEVELS(3, 5, 4);
  } else {
    TILE_LOAD(6, w.at[0] + 64 * b, w.apart[0]);
    TILE_INT8_LEVELS(0, 6, 4);
    TILE_LOAD(5, x + 1024, 64);
    TILE_INT8_LEVELS(1, 6, 5);
    if (S > 1) TILE_LOAD(7, w.at[1] + 64 * b, w.apart[1]);
    if (S > 1) TILE_INT8_LEVELS(2, 7, 4);
    if (S > 1) TILE_INT8_LEVELS(3, 7, 5);
  }
}

// Sums of S strips and T tiles of x: (S, T, 16 rows of the weight, 16 of x), as they are stored, and where they go.
struct LyingSums {
  uint8_t* at;
  int64_t tile, row, strips, tiles;  // of x, of the weight; how many
  int64_t params;                    // the first strip's
};

// Each is turned, and finished.
static __attribute__((noinline)) void finish_lying(Int8& kind, const LyingSums& sums) {
  for (int64_t s = 0; s < sums.strips; s++)
    for (int64_t i = 0; i < sums.tiles; i++) {
      uint8_t* at = sums.at + 1024 * (s * sums.tiles + i);
      __m512i v[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) v[k] = _mm512_load_si512(at + 64 * k);
      transpose16(v);
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) _mm512_store_si512(at + 64 * k, v[k]);
      kind.finish(16 * (sums.tile + i), sums.row + s * STRIP, sums.params + s, at);
    }
}

// Sums of all columns. The rows of `next` are asked for, where there is one, and the sums `before` are finished while
// products are on their way.
template <int S, int T>
static __attribute__((noinline)) void multiply_strips(Int8& kind, const Lying& w, const uint8_t* x, int64_t x_step,
                                                      const Lying* next, const LyingSums& before, uint8_t* sums) {
  const Tiles& t = kind.t;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t b = 0; b < t.blocks; b++, x += x_step) {
    if (next) {
      const int64_t then = b + LYING_AHEAD;
      const bool here = then < t.blocks;
      for (int s = 0; s < S; s++) {
        const uint8_t* at = here ? w.at[s] + 64 * then : next->at[s] + 64 * (then - t.blocks);
        for (int r = 0; r < 16; r++) __builtin_prefetch(at + r * t.w->row_bytes, 0, 2);
      }
    }
    multiply_lying<S, T>(w, x, b);
  }
  finish_lying(kind, before);
  TILE_STORE(0, sums, 64);
  if (S * T > 1) TILE_STORE(1, sums + 1024, 64);
  if (S * T > 2) TILE_STORE(2, sums + 2048, 64);
  if (S * T > 3) TILE_STORE(3, sums + 3072, 64);
}

typedef void (*MultiplyStrips)(Int8&, const Lying&, const uint8_t*, int64_t, const Lying*, const LyingSums&, uint8_t*);

// Where strips from `row` on lie; one whose tiles would end beyond the weight is copied, with zeros.
static Lying lying_strips(const whit_weight& w, int64_t row, int64_t strips, int64_t width, uint8_t* copy) {
  Lying found = {};
  for (int64_t s = 0; s < strips; s++, row += STRIP) {
    found.at[s] = w.codes + row * w.row_bytes, found.apart[s] = w.row_bytes;
    if (!copy || (row + 15) * w.row_bytes + width <= w.rows * w.row_bytes) continue;
    memset(copy, 0, (size_t)(16 * width));
    for (int64_t r = 0; r < 16 && row + r < w.rows; r++)
      memcpy(copy + r * width, w.codes + (row + r) * w.row_bytes, (size_t)w.columns);
    found.at[s] = copy, found.apart[s] = width;
  }
  return found;
}

static void multiply_few(const Tiles& t, int64_t first, int64_t last, void* scratch) {
  static const MultiplyStrips one[] = {multiply_strips<1, 1>, multiply_strips<2, 1>, multiply_strips<3, 1>,
                                       multiply_strips<4, 1>};
  static const MultiplyStrips two[] = {multiply_strips<1, 2>, multiply_strips<2, 2>};
  const whit_weight& w = *t.w;
  const TileScope scope(16, 64);
  uint8_t *sums = aligned(scratch), *copy = sums + LYING_SUMS;
  Int8 kind(t, (float*)(copy + 1024 * t.blocks), 2 * t.strips);
  LyingSums before = {};
  const int64_t tiles = (t.count + 15) / 16, beside = tiles > 1 ? 2 : 1, width = 64 * t.blocks;
  int64_t params = 0, turn = 0;
  for (int64_t row = first; row < last; row += t.strips * STRIP, params = t.strips - params) {
    const int64_t left = (last - row + STRIP - 1) / STRIP, strips = left < t.strips ? left : t.strips;
    const int64_t coming = row + t.strips * STRIP + strips * STRIP <= w.rows ? row + t.strips * STRIP : 0;
    const Lying own = lying_strips(w, row, strips, width, copy), next = lying_strips(w, coming, strips, width, nullptr);
    for (int64_t s = 0; s < strips; s++) kind.params(row + s * STRIP, params + s);
    for (int64_t tile = 0; tile < tiles; tile += 2, turn++) {
      const int64_t at_once = tile + 1 < tiles ? 2 : 1;
      uint8_t* to = sums + turn % 2 * LYING_SUMS / 2;
      (at_once > 1 ? two : one)[strips - 1](kind, own, t.tiles + tile * t.tile_bytes, 1024 * beside,
                                            tile ? nullptr : &next, before, to);
      before = {to, tile, row, strips, at_once, params};
    }
  }
  finish_lying(kind, before);
}

// A tile of x, four columns of its 16 rows to a lane: (blocks, 16, 16, 4), beside another where there are several.
static void arrange_few(const Tiles& t, int64_t tile) {
  const whit_rows8& x = *t.p->x;
  const int8_t* from = x.codes + 16 * tile * x.stride;
  const int64_t rows = t.count - 16 * tile, beside = t.count > 16 ? 2 : 1;
  uint8_t* to = t.tiles + tile / beside * beside * t.tile_bytes + tile % beside * 1024;
  for (int64_t c = 0; c < 64 * t.blocks; c += 64, to += 1024 * beside) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; r++) v[r] = r < rows ? _mm512_loadu_si512(from + r * x.stride + c) : _mm512_setzero_si512();
    transpose16(v);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) _mm512_store_si512(to + 64 * r, v[r]);
  }
}
