// What products of bfloat16 and of bytes by tiles share. Included after strips.inl. Registers 0 to 3 hold sums, 4 and 5
// tiles of x, 6 and 7 those of two strips.

struct OfPairs {
  template <int C> static ALWAYS_INLINE void multiply() {
    if constexpr (C == 0) TILE_BF16(0, 4, 6);
    else if constexpr (C == 1) TILE_BF16(1, 4, 7);
    else if constexpr (C == 2) TILE_BF16(2, 5, 6);
    else TILE_BF16(3, 5, 7);
  }
};

struct OfBytes {
  template <int C> static ALWAYS_INLINE void multiply() {
    if constexpr (C == 0) TILE_INT8(0, 4, 6);
    else if constexpr (C == 1) TILE_INT8(1, 4, 7);
    else if constexpr (C == 2) TILE_INT8(2, 5, 6);
    else TILE_INT8(3, 5, 7);
  }
};

// A thread's registers, for as long as this lives.
struct TileScope {
  TileScope(int64_t count, int row_bytes) {
    alignas(64) TileShapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int t = 0; t < 8; t++) {
      shapes.bytes[t] = (uint16_t)(t == 4 || t == 5 ? row_bytes : 64);
      shapes.rows[t] = (uint8_t)(t >= 6 ? row_bytes / 4 : count < 16 ? count : 16);
    }
    TILE_CONFIGURE(shapes);
  }
  ~TileScope() { TILE_RELEASE(); }
};

// Where two tiles of x and two strips are multiplied: blocks of each lie one after the other.
struct Spot {
  const uint8_t *x, *strip;
  int64_t tile_bytes, strip_bytes, strips;  // of a block, and from strip to strip
  const uint8_t* next;                      // of x, of which each block asks for `lines`
  int64_t lines;
};

template <int M, int N>
static ALWAYS_INLINE void zero_sums() {
  TILE_ZERO(0);
  if (N > 1) TILE_ZERO(1);
  if (M > 1) TILE_ZERO(2);
  if (M > 1 && N > 1) TILE_ZERO(3);
}

template <class Op, int M, int N>
static ALWAYS_INLINE void multiply_block(const Spot& s, int64_t b) {
  const uint8_t *x = s.x + 2 * b * s.tile_bytes, *strip = s.strip + b * s.strip_bytes;
  const int64_t row_bytes = s.tile_bytes / 16;
  for (int64_t i = 0; i < s.lines; i++) __builtin_prefetch(s.next + 64 * (b * s.lines + i), 0, 2);
  if (M > 1) {  // a round's strips are too many for the first cache
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      __builtin_prefetch(strip + s.strip_bytes + 64 * i, 0, 3);
      if (N > 1) __builtin_prefetch(strip + s.strips + s.strip_bytes + 64 * i, 0, 3);
    }
  }
  TILE_LOAD(6, strip, 64);
  TILE_LOAD(4, x, row_bytes);
  Op::template multiply<0>();
  if (N > 1) TILE_LOAD(7, strip + s.strips, 64);
  if (N > 1) Op::template multiply<1>();
  if (M > 1) TILE_LOAD(5, x + s.tile_bytes, row_bytes);
  if (M > 1) Op::template multiply<2>();
  if (M > 1 && N > 1) Op::template multiply<3>();
}

// Tiles of 1024 bytes: of the next strip beside, of the next tile of x `below`; `first`: not written yet.
struct Sums {
  uint8_t* at;
  int64_t below;
  bool first;
};

template <int M, int N>
static ALWAYS_INLINE void load_sums(const Sums& sums) {
  TILE_LOAD(0, sums.at, 64);
  if (N > 1) TILE_LOAD(1, sums.at + 1024, 64);
  if (M > 1) TILE_LOAD(2, sums.at + sums.below, 64);
  if (M > 1 && N > 1) TILE_LOAD(3, sums.at + sums.below + 1024, 64);
}

template <int M, int N>
static ALWAYS_INLINE void store_sums(uint8_t* at, int64_t below) {
  TILE_STORE(0, at, 64);
  if (N > 1) TILE_STORE(1, at + 1024, 64);
  if (M > 1) TILE_STORE(2, at + below, 64);
  if (M > 1 && N > 1) TILE_STORE(3, at + below + 1024, 64);
}

// sums += `blocks` of x times those of the strips.
template <class Op, int M, int N>
static __attribute__((noinline)) void multiply_whole(const Spot& s, int64_t blocks, const Sums& sums) {
  if (sums.first) zero_sums<M, N>();
  else load_sums<M, N>(sums);
  for (int64_t b = 0; b < blocks; b++) multiply_block<Op, M, N>(s, b);
  store_sums<M, N>(sums.at, sums.below);
}

// Asks for what strips of the next columns are decoded from, or of the next rows: beside each vector one line.
struct Ask {
  const uint8_t* at;
  int64_t row_bytes;
  template <class T>
  ALWAYS_INLINE void operator()(int64_t i) const {
    __builtin_prefetch(at + (i & 15) * row_bytes + (i >> 4) * T::BYTES, 0, 2);
  }
};

static ALWAYS_INLINE uint8_t* aligned(void* p) { return (uint8_t*)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

// Rows [first, last) of the weight. A Kind has a strip's params, decodes it, multiplies (two, if M and N) tiles of x by
// strips and finishes sums. Some strips are decoded in some columns, and meet all tiles of x; x stays in the second
// cache as long as it takes.
template <class Kind>
static ALWAYS_INLINE void multiply_all(const Tiles& t, int64_t first, int64_t last, uint8_t* scratch, Kind& kind) {
  const whit_weight& w = *t.w;
  const TileScope scope(t.count, Kind::BYTES * t.depth);
  const int64_t tile_bytes = 16 * Kind::BYTES * t.depth, strip_bytes = 16 * Kind::BYTES * t.chunk, below = 1024 * t.strips;
  const int64_t per = t.chunk / t.depth, all = t.blocks * t.depth;
  uint8_t *decoded = scratch, *totals = decoded + t.strips * strip_bytes;
  for (int64_t row = first; row < last; row += t.strips * STRIP) {
    const int64_t left = (last - row + STRIP - 1) / STRIP, strips = left < t.strips ? left : t.strips;
    const int64_t pairs = (strips + 1) / 2, lines = (2 * tile_bytes / 64 + pairs - 1) / pairs;
    for (int64_t s = 0; s < strips; s++) kind.params(row + s * STRIP, s);
    for (int64_t m0 = 0; m0 < t.count; m0 += 16 * TILE_BLOCK) {
      const int64_t some = (t.count - m0 + 15) / 16, tiles = some < TILE_BLOCK ? some : TILE_BLOCK;
      for (int64_t b = 0; b < t.blocks; b += per) {
        const int64_t until = b + per < t.blocks ? b + per : t.blocks, column = b * t.depth;
        const bool ends = until == t.blocks;
        for (int64_t s = 0; s < strips; s++) {
          const int64_t then = column + t.ahead, asked = row + (s + (then < all ? 0 : t.strips)) * STRIP;
          const int64_t at = (asked < w.rows ? asked : 0) * w.row_bytes + (then < all ? then : then - all) * w.bits / 8;
          kind.decode(row + s * STRIP, s, column, column + t.chunk < w.columns ? column + t.chunk : w.columns,
                      Ask{w.codes + at, w.row_bytes}, (__m512i*)(decoded + s * strip_bytes));
        }
        for (int64_t m = 0; m < tiles; m += 2)
          for (int64_t s = 0; s < strips; s += 2) {
            const int64_t tile = m0 / 16 + m;
            const uint8_t* x = t.tiles + tile * t.tile_bytes;
            const uint8_t* next = m + 2 < tiles ? x + 2 * (t.tile_bytes + b * tile_bytes)
                                                : t.tiles + m0 / 16 * t.tile_bytes + (ends ? 0 : 2 * until * tile_bytes);
            const Spot spot = {x + 2 * b * tile_bytes, decoded + s * strip_bytes, tile_bytes, 64 * Kind::BYTES * t.depth / 4,
                               strip_bytes, next + s / 2 * lines * 64 * (until - b), tiles > 2 ? lines : 0};
            const Sums sums = {totals + m * below + s * 1024, below, b == 0};
            if (m + 1 < tiles) {
              if (s + 1 < strips) kind.template multiply<2, 2>(spot, tile, s, b, until, sums);
              else kind.template multiply<2, 1>(spot, tile, s, b, until, sums);
            } else if (s + 1 < strips) kind.template multiply<1, 2>(spot, tile, s, b, until, sums);
            else kind.template multiply<1, 1>(spot, tile, s, b, until, sums);
            for (int i = 0; ends && i < 4; i++)
              if (m + i / 2 < tiles && s + i % 2 < strips)
                kind.finish(16 * (tile + i / 2), row + (s + i % 2) * STRIP, s + i % 2,
                            sums.at + i / 2 * below + i % 2 * 1024);
          }
      }
    }
  }
}
