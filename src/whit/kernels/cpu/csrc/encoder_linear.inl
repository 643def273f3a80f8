// Products of an encoder's rows, quantized as they come, with weights in panels. Included by encoder.inl.

// Whether a product is by AMX's tiles, whose codes are signed where they are symmetric. Sums of 8 bits that have a scale
// for every 32 columns take as long to put into memory and to scale as vectors take for all.
template <class V>
static ALWAYS_INLINE bool by_tiles8(const whit_linear8& w) {
  return V::TILES && (w.wide || w.groups == 1);
}

// Codes of 16 bits of one row of x, and its scales.
template <class V>
static void wide_codes(const whit_linear8& w, const float* x, int64_t m, const Room8& room) {
  typedef uint8_t Bytes16 __attribute__((vector_size(16)));
  uint8_t* codes = room.codes + 2 * m * w.stride;
  const int32_t middle = by_tiles8<V>(w) ? 0 : 32768;
  memset(codes + w.in, 0, (size_t)(w.stride - w.in));
  memset(codes + w.stride + w.in, 0, (size_t)(w.stride - w.in));
  for (int64_t first = 0, g = 0; first < w.in; first += w.group_size, g++) {
    const int64_t until = first + w.group_size < w.in ? first + w.group_size : w.in;
    typename V::F most = V::zero();
    for (int64_t c = first; c < until; c += 16) most = V::larger(most, V::load(x + c));
    const Largest largest(V::largest(most));
    const float factor = largest.factor(32767.0f);
    room.scale[m * w.groups + g] = largest.unit(32767.0f);
    for (int64_t c = first; c < until; c += 16) {
      const Floats16 shifted = load16(x + c) * factor + 12582912.0f;  // 1.5 2^23: units are integers
      const Ints16 q = same_bits<Ints16>(shifted) - 0x4b400000 + middle;
      const Bytes16 high = __builtin_convertvector(q >> 8 & 255, Bytes16), low = __builtin_convertvector(q & 255, Bytes16);
      memcpy(codes + c, &high, 16);
      memcpy(codes + w.stride + c, &low, 16);
    }
  }
}

// Codes of one row of x, its scales and the columns that stay exact, which are 0 in x meanwhile.
template <class V>
static void codes_of(const whit_linear8& w, float* x, int64_t m, const Room8& room) {
  if (w.wide) return wide_codes<V>(w, x, m, room);
  uint8_t* codes = room.codes + m * w.stride;
  float *scale = room.scale + m * w.groups, *exact = room.exact + m * w.exact_count;
  for (int64_t c = 0; c < w.exact_count; c++) exact[c] = x[w.columns[c]], x[w.columns[c]] = 0;
  memset(codes + w.in, 0, (size_t)(w.stride - w.in));
  const int64_t size = w.per_group ? w.group_size : w.in;
  const bool symmetric = w.zero != 0;
  const float limit = symmetric ? 127.0f : 255.0f, low = symmetric ? 0 : w.low;
  for (int64_t first = 0, g = 0; first < w.in; first += size) {
    const int64_t until = first + size < w.in ? first + size : w.in;
    typename V::F most = V::zero();
    for (int64_t c = first; c < until; c += 16) {
      Floats16 at = load16(x + c) - low;
      if (!symmetric) at = at < 0.0f ? Floats16{} : at;  // a NaN stays one
      most = V::larger(most, same_bits<typename V::F>(at));
    }
    const Largest largest(V::largest(most));
    const float factor = largest.factor(limit), unit = largest.unit(limit);
    const uint8_t flip = symmetric && by_tiles8<V>(w) ? 0 : 128;
    typename V::I none = V::izero();
    const typename V::F least = V::set1(low), by = V::set1(factor), less = V::set1(symmetric ? 0 : 128.0f);
    for (int64_t c = first; c < until; c += 16) {
      uint8_t own[16];
      V::round8(V::sub(V::mul(V::sub(V::load(x + c), least), by), less), (int8_t*)own, none);
      for (int i = 0; i < 16; i++) codes[c + i] = (uint8_t)(own[i] ^ flip);
    }
    for (int64_t c = first; c < until; c += w.group_size) scale[g++] = unit;
  }
  for (int64_t c = 0; c < w.exact_count; c++) x[w.columns[c]] = exact[c];
}

// What one group of columns adds to a tile of M rows of x and 48 of the weight.
template <class V, int M>
static __attribute__((noinline)) void run_unsigned(const uint8_t* q, int64_t stride, const int8_t* panel, int64_t run,
                                                   const int32_t* start, const float* by, int64_t groups,
                                                   const float* scale, float* total) {
  constexpr int N = WIDE8 / V::LANES;
  typename V::I acc[M][N];
  EACH(n, N) {
    typename V::I first;
    memcpy(&first, start + n * V::LANES, sizeof first);
    EACH(m, M) { acc[m][n] = first; });
  });
  for (int64_t k = 0; k < run; k++) {
    typename V::B level[N];
    EACH(n, N) { level[n] = V::bload(panel + (k * N + n) * V::LANES * 4); });
    EACH(m, M) {
      typename V::B four = V::four((const int8_t*)q + m * stride + 4 * k);
      EACH(n, N) { V::template dot_into<V::EXACT>(acc[m][n], four, level[n]); });
    });
  }
  EACH(m, M) {
    typename V::G one = V::gset1(by[m * groups]);
    EACH(n, N) {
      float* to = total + m * WIDE8 + n * V::LANES;
      typename V::G part = V::gmul(V::to_g(acc[m][n]), one);
      V::gstore(to, V::gfma(part, V::gload(scale + n * V::LANES), V::gload(to)));
    });
  });
}

// The same for codes of 16 bits: two sums of bytes, put together as exact integers.
template <class V, int M>
static __attribute__((noinline)) void run_wide(const uint8_t* q, int64_t stride, const int8_t* panel, int64_t run,
                                               const int32_t* start, const float* by, int64_t groups,
                                               const float* scale, float* total) {
  constexpr int N = WIDE8 / V::LANES;
  typedef int32_t Ints __attribute__((vector_size(4 * V::LANES)));
  typename V::I high[M][N], low[M][N];
  EACH(n, N) {
    typename V::I first;
    memcpy(&first, start + n * V::LANES, sizeof first);
    EACH(m, M) { low[m][n] = first, high[m][n] = V::izero(); });
  });
  for (int64_t k = 0; k < run; k++) {
    typename V::B level[N];
    EACH(n, N) { level[n] = V::bload(panel + (k * N + n) * V::LANES * 4); });
    EACH(m, M) {
      const int8_t* at = (const int8_t*)q + 2 * m * stride + 4 * k;
      typename V::B four = V::four(at), less = V::four(at + stride);
      EACH(n, N) {
        V::template dot_into<V::EXACT>(high[m][n], four, level[n]);
        V::template dot_into<V::EXACT>(low[m][n], less, level[n]);
      });
    });
  }
  EACH(m, M) {
    typename V::G one = V::gset1(by[m * groups]);
    EACH(n, N) {
      float* to = total + m * WIDE8 + n * V::LANES;
      const Ints sum = same_bits<Ints>(high[m][n]) * 256 + same_bits<Ints>(low[m][n]);
      typename V::G part = V::gmul(V::to_g(same_bits<typename V::I>(sum)), one);
      V::gstore(to, V::gfma(part, V::gload(scale + n * V::LANES), V::gload(to)));
    });
  });
}

// What is done with a tile of the product: kept, passed through the GELU, or added to what is there.
enum Then { KEEP, GELU, ADD };

template <class V, int M>
static __attribute__((noinline)) void exact8(const float* x, int64_t count, const float* w, const float* bias,
                                             float* total) {
  constexpr int N = WIDE8 / V::LANES;
  typename V::G acc[M][N];
  EACH(m, M) {
    EACH(n, N) { acc[m][n] = V::gadd(V::gload(total + m * WIDE8 + n * V::LANES), V::gload(bias + n * V::LANES)); });
  });
  for (int64_t c = 0; c < count; c++) {
    typename V::G own[N];
    EACH(n, N) { own[n] = V::gload(w + c * WIDE8 + n * V::LANES); });
    EACH(m, M) {
      typename V::G one = V::gset1(x[m * count + c]);
      EACH(n, N) { acc[m][n] = V::gfma(one, own[n], acc[m][n]); });
    });
  }
  EACH(m, M) {
    EACH(n, N) { V::gstore(total + m * WIDE8 + n * V::LANES, acc[m][n]); });
  });
}

// A finished tile of M rows and 48 columns, to y.
template <class V, int M, Then THEN>
static ALWAYS_INLINE void put_tile(const float* total, const whit_linear8& w, int64_t panel, int64_t m0, float* y,
                                   int64_t y_stride) {
  const int64_t first = panel * WIDE8, count = w.out - first < WIDE8 ? w.out - first : WIDE8;
  for (int m = 0; m < M; m++) {
    float* to = y + (m0 + m) * y_stride + first;
    for (int64_t n = 0; n < count; n += 16) {
      Floats16 f = load16(total + m * WIDE8 + n);
      if (THEN == GELU) f = gelu16<V>(f);
      if (THEN == ADD) f += load16(to + n);
      store16(to + n, f);
    }
  }
}

template <class V, int M, Then THEN, bool WIDE>
static void linear_tile(const whit_linear8& w, const Room8& room, int64_t panel, int64_t m0, float* y, int64_t y_stride) {
  alignas(64) float total[M * WIDE8];
  memset(total, 0, sizeof total);
  const int8_t* levels = w.panels + panel * w.stride * WIDE8;
  for (int64_t g = 0, first = 0; g < w.groups; g++, first += w.group_size) {
    const int64_t until = first + w.group_size < w.in ? first + w.group_size : w.in;
    const int64_t at = (panel * w.groups + g) * WIDE8;
    constexpr auto run = WIDE ? run_wide<V, M> : run_unsigned<V, M>;
    run(room.codes + m0 * w.stride * (WIDE ? 2 : 1) + first, w.stride, levels + first * WIDE8, (until - first) / 4,
        w.start + at, room.scale + m0 * w.groups + g, w.groups, w.scale + at, total);
  }
  exact8<V, M>(room.exact + m0 * w.exact_count, w.exact_count, w.exact + panel * w.exact_count * WIDE8,
               w.bias + panel * WIDE8, total);
  put_tile<V, M, THEN>(total, w, panel, m0, y, y_stride);
}

template <class V, Then THEN, bool WIDE>
static void linear_panel(const whit_linear8& w, const Room8& room, int64_t panel, int64_t rows, float* y, int64_t stride) {
  constexpr int TALL = WIDE ? V::TALL / 2 : V::TALL;  // twice the sums are held
  int64_t m = 0;
  for (; m + TALL <= rows; m += TALL) linear_tile<V, TALL, THEN, WIDE>(w, room, panel, m, y, stride);
  if constexpr (TALL > 4)
    if (m + 4 <= rows) linear_tile<V, 4, THEN, WIDE>(w, room, panel, m, y, stride), m += 4;
  if constexpr (TALL > 2)
    if (m + 2 <= rows) linear_tile<V, 2, THEN, WIDE>(w, room, panel, m, y, stride), m += 2;
  for (; m < rows; m++) linear_tile<V, 1, THEN, WIDE>(w, room, panel, m, y, stride);
}

// A tile of M rows and 48 of the weight over groups [first, last) of 32 columns: sums of a group and totals of all both
// stay in registers. What earlier groups gave lies in `kept`, where the last ones are not among them they add to it.
template <class V, int M, Then THEN>
static __attribute__((noinline)) void grouped_tile(const whit_linear8& w, const Room8& room, int64_t panel, int64_t m0,
                                                   int64_t first, int64_t last, float* kept, float* y, int64_t y_stride) {
  constexpr int N = WIDE8 / V::LANES;
  typename V::G total[M][N];
  EACH(m, M) {
    EACH(n, N) { total[m][n] = first ? V::gload(kept + m * WIDE8 + n * V::LANES) : V::gzero(); });
  });
  const int8_t* levels = w.panels + (panel * w.stride + first * GROUP8) * WIDE8;
  const int8_t* q = (const int8_t*)room.codes + m0 * w.stride + first * GROUP8;
  const float *by = room.scale + m0 * w.groups, *scale = w.scale + (panel * w.groups + first) * WIDE8;
  const int32_t* start = w.start + (panel * w.groups + first) * WIDE8;
  for (int64_t g = first; g < last; g++, q += GROUP8, levels += GROUP8 * WIDE8, scale += WIDE8, start += WIDE8) {
    typename V::I acc[M][N];
    EACH(n, N) {
      typename V::I own;
      memcpy(&own, start + n * V::LANES, sizeof own);
      EACH(m, M) { acc[m][n] = own; });
    });
    EACH(k, GROUP8 / 4) {
      typename V::B level[N];
      EACH(n, N) { level[n] = V::bload(levels + (k * N + n) * V::LANES * 4); });
      EACH(m, M) {
        typename V::B four = V::four(q + m * w.stride + 4 * k);
        EACH(n, N) { V::template dot_into<V::EXACT>(acc[m][n], four, level[n]); });
      });
    });
    EACH(m, M) {
      typename V::G one = V::gset1(by[m * w.groups + g]);
      EACH(n, N) {
        total[m][n] = V::gfma(V::gmul(V::to_g(acc[m][n]), one), V::gload(scale + n * V::LANES), total[m][n]);
      });
    });
  }
  if (last < w.groups) {
    EACH(m, M) {
      EACH(n, N) { V::gstore(kept + m * WIDE8 + n * V::LANES, total[m][n]); });
    });
    return;
  }
  EACH(m, M) {
    EACH(n, N) { total[m][n] = V::gadd(total[m][n], V::gload(w.bias + panel * WIDE8 + n * V::LANES)); });
  });
  const float *exact = w.exact + panel * w.exact_count * WIDE8, *x = room.exact + m0 * w.exact_count;
  for (int64_t c = 0; c < w.exact_count; c++) {
    EACH(m, M) {
      typename V::G one = V::gset1(x[m * w.exact_count + c]);
      EACH(n, N) { total[m][n] = V::gfma(one, V::gload(exact + c * WIDE8 + n * V::LANES), total[m][n]); });
    });
  }
  alignas(64) float own[M * WIDE8];
  EACH(m, M) {
    EACH(n, N) { V::gstore(own + m * WIDE8 + n * V::LANES, total[m][n]); });
  });
  put_tile<V, M, THEN>(own, w, panel, m0, y, y_stride);
}

// All rows past the groups whose levels stay in the first cache, then past the next ones.
template <class V, Then THEN>
static void grouped_panel(const whit_linear8& w, const Room8& room, int64_t panel, int64_t rows, float* y, int64_t stride) {
  constexpr int64_t AT_ONCE = 12;  // groups: 18 KB of levels
  for (int64_t g = 0; g < w.groups; g += AT_ONCE) {
    const int64_t last = g + AT_ONCE < w.groups ? g + AT_ONCE : w.groups;
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) grouped_tile<V, 4, THEN>(w, room, panel, m, g, last, room.totals + m * WIDE8, y, stride);
    for (; m < rows; m++) grouped_tile<V, 1, THEN>(w, room, panel, m, g, last, room.totals + m * WIDE8, y, stride);
  }
}

template <class V, Then THEN>
static void linear_by_tiles(Crew& crew, const whit_linear8& w, const Room8& room, int64_t rows, float* y, int64_t stride);

#if defined(TILE_CONFIGURE)
#include "encoder_tiles.inl"
#endif

template <class V, Then THEN>
static void linear8(Crew& crew, const whit_linear8& w, const Room8& room, int64_t rows, float* y, int64_t stride) {
  if constexpr (V::TILES)
    if (by_tiles8<V>(w)) return linear_by_tiles<V, THEN>(crew, w, room, rows, y, stride);
  phase8(crew, (w.out + WIDE8 - 1) / WIDE8, [&](int64_t panel) {
    if (V::TALL == 8 && w.per_group && !w.wide) grouped_panel<V, THEN>(w, room, panel, rows, y, stride);
    else if (w.wide) linear_panel<V, THEN, true>(w, room, panel, rows, y, stride);
    else linear_panel<V, THEN, false>(w, room, panel, rows, y, stride);
  });
}
