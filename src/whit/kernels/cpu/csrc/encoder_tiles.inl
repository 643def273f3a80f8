// Products of an encoder's rows by AMX. Included by encoder_linear.inl where there are tiles.
//
// Codes are tiles of 16 rows as they lie, panels are tiles of 16 of their rows, four columns to a lane. Codes are signed
// here where they are symmetric, so that sums begin at 0. Codes of 16 bits have a scale for a group: sums of 16 rows and 16
// of the weight are put into memory, four groups at a time, and added to totals in registers while the next four are
// multiplied. Rows are whole tiles: what is beyond the last one is room, and never stored.

enum { TILE8 = 16, AT_ONCE8 = 4 };  // rows of a tile; groups

#define OF_TILE(C, DO, ...)                                \
  do {                                                     \
    if constexpr (C == 0) DO(0 __VA_ARGS__);               \
    else if constexpr (C == 1) DO(1 __VA_ARGS__);          \
    else if constexpr (C == 2) DO(2 __VA_ARGS__);          \
    else if constexpr (C == 3) DO(3 __VA_ARGS__);          \
    else if constexpr (C == 4) DO(4 __VA_ARGS__);          \
    else DO(5 __VA_ARGS__);                                \
  } while (0)

template <int C>
static ALWAYS_INLINE void zero_tile8() { OF_TILE(C, TILE_ZERO); }

template <int C>
static ALWAYS_INLINE void store_tile8(int32_t* to) { OF_TILE(C, TILE_STORE, , to, 64); }

// Tile C += codes (6) times levels (7).
template <int C, bool SIGNED>
static ALWAYS_INLINE void multiply_tile8() {
  if constexpr (SIGNED) OF_TILE(C, TILE_INT8_SIGNED, , 6, 7);
  else OF_TILE(C, TILE_INT8_LEVELS, , 6, 7);
}

// A thread's registers as long as this lives: sums, codes and levels.
struct TileScope8 {
  explicit TileScope8(int64_t depth) {
    alignas(64) TileShapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int t = 0; t < 8; t++) {
      shapes.bytes[t] = (uint16_t)(t == 6 ? depth : 64);
      shapes.rows[t] = (uint8_t)(t == 7 ? depth / 4 : TILE8);
    }
    TILE_CONFIGURE(shapes);
  }
  ~TileScope8() { TILE_RELEASE(); }
};

// Where 16 rows from m on meet 16 of a panel.
struct Spot8 {
  const whit_linear8& w;
  const Room8& room;
  int64_t panel, part, m;
  const uint8_t* codes() const { return room.codes + m * w.stride * (w.wide ? 2 : 1); }
  const int8_t* levels() const { return w.panels + panel * w.stride * WIDE8 + 64 * part; }
  int64_t row() const { return panel * WIDE8 + TILE8 * part; }
};

// y = totals + bias + what columns that stay exact give, and what comes then.
template <class V, Then THEN>
static ALWAYS_INLINE void finish_tile8(const Spot8& s, int64_t rows, typename V::G (&total)[TILE8], float* y,
                                       int64_t y_stride) {
  const whit_linear8& w = s.w;
  const int64_t at = TILE8 * s.part, count = w.exact_count;
  const typename V::G bias = V::gload(w.bias + s.panel * WIDE8 + at);
  EACH(m, TILE8) { total[m] = V::gadd(total[m], bias); });
  const float *exact = w.exact + s.panel * count * WIDE8 + at, *x = s.room.exact + s.m * count;
  for (int64_t c = 0; c < count; c++) {
    const typename V::G own = V::gload(exact + c * WIDE8);
    EACH(m, TILE8) { total[m] = V::gfma(V::gset1(x[m * count + c]), own, total[m]); });
  }
  float* to = y + s.m * y_stride + s.row();
  alignas(64) float kept[TILE8 * 16];
  EACH(m, TILE8) { V::gstore(kept + 16 * m, total[m]); });
  const int64_t left = rows - s.m < TILE8 ? rows - s.m : TILE8;
  for (int64_t m = 0; m < left; m++, to += y_stride) {
    Floats16 f = load16(kept + 16 * m);
    if (THEN == GELU) f = gelu16<V>(f);
    if (THEN == ADD) f += load16(to);
    store16(to, f);
  }
}

// Sums of one group of codes of 16 bits to `to`: of upper bytes, which are signed, and behind these of lower ones.
template <int C>
static ALWAYS_INLINE void multiply_group8(const Spot8& s, int64_t group, int64_t depth, int32_t* to) {
  const whit_linear8& w = s.w;
  const int64_t first = group * w.group_size, until = first + w.group_size < w.in ? first + w.group_size : w.in;
  const uint8_t* codes = s.codes();
  const int8_t* levels = s.levels();
  zero_tile8<C>(), zero_tile8<C + 1>();
  for (int64_t c = first; c < until; c += depth) {
    TILE_LOAD(7, levels + c * WIDE8, 4 * WIDE8);
    TILE_LOAD(6, codes + c, 2 * w.stride);
    multiply_tile8<C, true>();
    TILE_LOAD(6, codes + w.stride + c, 2 * w.stride);
    multiply_tile8<C + 1, false>();
  }
  store_tile8<C>(to), store_tile8<C + 1>(to + 256);
}

// total += the sums of a group in its scales.
template <class V, bool WIDE>
static ALWAYS_INLINE void add_group8(const Spot8& s, int64_t group, const int32_t* sums, typename V::G (&total)[TILE8]) {
  const whit_linear8& w = s.w;
  const float* by = s.room.scale + s.m * w.groups + group;
  const typename V::G scale = V::gload(w.scale + (s.panel * w.groups + group) * WIDE8 + TILE8 * s.part);
  EACH(m, TILE8) {
    Ints16 sum = same_bits<Ints16>(load16((const float*)sums + 16 * m));
    if (WIDE) sum = (sum << 8) + same_bits<Ints16>(load16((const float*)sums + 256 + 16 * m));
    const typename V::G part = V::gmul(V::to_g(same_bits<typename V::I>(sum)), V::gset1(by[m * w.groups]));
    total[m] = V::gfma(part, scale, total[m]);
  });
}

// Codes of 16 bits: 16 rows and 16 of the weight through all groups.
template <class V, Then THEN>
static __attribute__((noinline)) void groups_tile8(const Spot8& s, int64_t rows, int64_t depth, float* y,
                                                   int64_t y_stride) {
  alignas(64) int32_t sums[2][AT_ONCE8 * 512];
  const int64_t groups = s.w.groups;
  typename V::G total[TILE8];
  EACH(m, TILE8) { total[m] = V::gzero(); });
  for (int64_t g = 0; g < groups + AT_ONCE8; g += AT_ONCE8) {
    int32_t* to = sums[g / AT_ONCE8 & 1];
    const int32_t* from = sums[~(g / AT_ONCE8) & 1];
    EACH(i, AT_ONCE8) {
      if (g + i < groups) multiply_group8<i % 2 * 2>(s, g + i, depth, to + i * 512);
    });
    if (!g) continue;
    EACH(i, AT_ONCE8) {
      if (g - AT_ONCE8 + i < groups) add_group8<V, true>(s, g - AT_ONCE8 + i, from + i * 512, total);
    });
  }
  finish_tile8<V, THEN>(s, rows, total, y, y_stride);
}

// One scale for a row: sums of M tiles of rows and a whole panel through all columns.
template <class V, int M, Then THEN, bool SIGNED>
static __attribute__((noinline)) void whole_tiles8(const Spot8& s, int64_t rows, float* y, int64_t y_stride) {
  const whit_linear8& w = s.w;
  alignas(64) int32_t sums[3 * M * 256];
  EACH(c, 3 * M) { zero_tile8<c>(); });
  const uint8_t* codes = s.codes();
  const int8_t* levels = s.levels();
  for (int64_t c = 0; c < w.stride; c += 64) {
    EACH(n, 3) {
      TILE_LOAD(7, levels + c * WIDE8 + 64 * n, 4 * WIDE8);
      EACH(m, M) {
        TILE_LOAD(6, codes + m * TILE8 * w.stride + c, w.stride);
        multiply_tile8<3 * m + n, SIGNED>();
      });
    });
  }
  EACH(c, 3 * M) { store_tile8<c>(sums + 256 * c); });
  for (int64_t i = 0; i < 3 * M; i++) {
    const Spot8 own = {w, s.room, s.panel, i % 3, s.m + i / 3 * TILE8};
    if (own.row() >= w.out) continue;
    typename V::G total[TILE8];
    EACH(m, TILE8) { total[m] = V::gzero(); });
    add_group8<V, false>(own, 0, sums + 256 * i, total);
    finish_tile8<V, THEN>(own, rows, total, y, y_stride);
  }
}

// The same for two neighbouring panels, whose six strips of 16 rows meet M tiles of rows two at a time: each product then
// loads one tile, where a panel's three strips load three for two. `strip` is the first of the two.
template <class V, int M, Then THEN, bool SIGNED>
static __attribute__((noinline)) void paired_tiles8(const Spot8& s, int64_t strip, int64_t rows, float* y,
                                                    int64_t y_stride) {
  const whit_linear8& w = s.w;
  const auto of = [&](int64_t m, int64_t n) __attribute__((always_inline)) {
    return Spot8{w, s.room, s.panel + (strip + n) / 3, (strip + n) % 3, s.m + TILE8 * m};
  };
  alignas(64) int32_t sums[2 * M * 256];
  EACH(c, 2 * M) { zero_tile8<c>(); });
  const uint8_t* codes = s.codes();
  const int8_t *one = of(0, 0).levels(), *other = of(0, 1).levels();
  for (int64_t c = 0; c < w.stride; c += 64) {
    TILE_LOAD(6, one + c * WIDE8, 4 * WIDE8);
    TILE_LOAD(4, codes + c, w.stride);
    if constexpr (SIGNED) TILE_INT8_SIGNED(0, 4, 6);
    else TILE_INT8_LEVELS(0, 4, 6);
    TILE_LOAD(7, other + c * WIDE8, 4 * WIDE8);
    if constexpr (SIGNED) TILE_INT8_SIGNED(1, 4, 7);
    else TILE_INT8_LEVELS(1, 4, 7);
    if constexpr (M > 1) {
      TILE_LOAD(5, codes + TILE8 * w.stride + c, w.stride);
      if constexpr (SIGNED) TILE_INT8_SIGNED(2, 5, 6);
      else TILE_INT8_LEVELS(2, 5, 6);
      if constexpr (SIGNED) TILE_INT8_SIGNED(3, 5, 7);
      else TILE_INT8_LEVELS(3, 5, 7);
    }
  }
  EACH(c, 2 * M) { store_tile8<c>(sums + 256 * c); });
  for (int64_t i = 0; i < 2 * M; i++) {
    const Spot8 own = of(i / 2, i % 2);
    if (own.row() >= w.out) continue;
    typename V::G total[TILE8];
    EACH(m, TILE8) { total[m] = V::gzero(); });
    add_group8<V, false>(own, 0, sums + 256 * i, total);
    finish_tile8<V, THEN>(own, rows, total, y, y_stride);
  }
}

// One panel, or two.
template <class V, Then THEN, bool SIGNED>
static void whole_by_tiles(const Spot8& s, int64_t panels, int64_t rows, float* y, int64_t y_stride) {
  for (int64_t strip = 0; strip < (panels > 1 ? 6 : 1); strip += 2) {
    Spot8 own = s;
    for (; own.m + TILE8 < rows; own.m += 2 * TILE8)
      if (panels > 1) paired_tiles8<V, 2, THEN, SIGNED>(own, strip, rows, y, y_stride);
      else whole_tiles8<V, 2, THEN, SIGNED>(own, rows, y, y_stride);
    if (own.m >= rows) continue;
    if (panels > 1) paired_tiles8<V, 1, THEN, SIGNED>(own, strip, rows, y, y_stride);
    else whole_tiles8<V, 1, THEN, SIGNED>(own, rows, y, y_stride);
  }
}

template <class V, Then THEN>
static void linear_by_tiles(Crew& crew, const whit_linear8& w, const Room8& room, int64_t rows, float* y,
                            int64_t y_stride) {
  const int64_t depth = w.wide && w.group_size % 64 ? 32 : 64;
  const TileScope8 scope(depth);
  const int64_t all = (w.out + WIDE8 - 1) / WIDE8, at_once = !w.wide && all % 2 == 0 && all >= 4 * crew.size ? 2 : 1;
  phase8(crew, all / at_once, [&](int64_t task) {
    Spot8 s = {w, room, task * at_once, 0, 0};
    if (!w.wide && w.zero) return whole_by_tiles<V, THEN, true>(s, at_once, rows, y, y_stride);
    if (!w.wide) return whole_by_tiles<V, THEN, false>(s, at_once, rows, y, y_stride);
    for (; s.part < 3 && s.row() < w.out; s.part++)
      for (s.m = 0; s.m < rows; s.m += TILE8) groups_tile8<V, THEN>(s, rows, depth, y, y_stride);
  });
}
