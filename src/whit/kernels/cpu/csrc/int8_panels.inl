// Many rows of 8-bit activations by panels of 48 rows of the weight. Included by int8.inl.

typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint32_t Words16 __attribute__((vector_size(64)));

template <class To, class From>
static ALWAYS_INLINE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bytes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The same steps for a tile of `count` rows of x and `rows` of the weight, 16 at a time where there are as many.
template <class V, class Sum>
static ALWAYS_INLINE void finish_tile(const Product8& p, int64_t m0, int64_t count, int64_t row, int64_t rows,
                                      const Sum* sums, const float* scale) {
  const whit_rows8& x = *p.x;
  for (int64_t m = 0; m < count; m++, sums += WIDE8) {
    int64_t r = 0;
    for (; r + 16 <= rows; r += 16) {
      typename V::F y;
      if constexpr (std::is_same<Sum, int32_t>::value) {
        Ints16 sum, levels;
        memcpy(&sum, sums + r, 64);
        if (x.zero) {
          memcpy(&levels, p.row_sums + row + r, 64);
          sum = same_bits<Ints16>(same_bits<Words16>(sum) - (uint32_t)x.zero[m0 + m] * same_bits<Words16>(levels));
        }
        y = V::mul(same_bits<typename V::F>(__builtin_convertvector(sum, Floats16)), V::set1(x.scale[m0 + m]));
        y = V::mul(y, V::load(scale + r));
      } else {
        y = V::load(sums + r);
      }
      if (p.bias) y = V::add(y, V::convert(p.bias, row + r, p.type));
      V::store_as(p.y, (m0 + m) * p.w->rows + row + r, y, p.type);
    }
    for (; r < rows; r++) {
      if constexpr (std::is_same<Sum, int32_t>::value) finish_row8(p, m0 + m, row + r, sums[r], scale[r]);
      else finish8(p, m0 + m, row + r, sums[r]);
    }
  }
}

// A panel of 48 rows in columns [first, until): bytes (steps of COLUMNS / 4, 48 / LANES vectors) of four columns to a
// lane; rows that are not there stand for the last one. Params as (groups, 48).
template <class V, int BITS, bool TABLE>
static void decode_panel(const Product8& p, int64_t row, int64_t rows, int64_t first, int64_t until, uint8_t* panel) {
  constexpr int COLUMNS = V::LANES * 4, VECTORS = WIDE8 / V::LANES;
  const Decoder8<V, BITS, TABLE> decode(p);
  const whit_weight& w = *p.w;
  const int64_t steps = (until - first + COLUMNS - 1) / COLUMNS;
  for (int v = 0; v < VECTORS; v++) {
    const uint8_t* from[V::LANES];
    for (int r = 0; r < V::LANES; r++) {
      int64_t at = v * V::LANES + r;
      from[r] = w.codes + (row + (at < rows ? at : rows - 1)) * w.row_bytes + first * BITS / 8;
    }
    for (int64_t s = 0; s < steps; s++) {
      typename V::B lines[V::LANES];
UNROLL(16)
      for (int r = 0; r < V::LANES; r++) lines[r] = decode(from[r] + s * (COLUMNS * BITS / 8));
      V::transpose(lines);
      uint8_t* to = panel + (s * V::LANES * VECTORS + v) * COLUMNS;
UNROLL(16)
      for (int k = 0; k < V::LANES; k++) V::bstore(to + k * VECTORS * COLUMNS, lines[k]);
    }
  }
}

// Codes that the next panel is decoded from, which a tile asks for: `lines` of this row of the weight, one for every four
// columns that it multiplies, then as many of the next row.
struct Ask8 {
  const uint8_t* at;
  int64_t lines, row_bytes;
};

// Where the sums of a tile go: to `sums`, which have those of earlier columns already or begin with `start`; or, if there
// are `scale`s of 48 rows of the weight and those of x, to y (y_stride), as float32.
struct To8 {
  const int32_t* start;
  int32_t* sums;
  const float *scale, *by, *bias;
  float* y;
  int64_t y_stride;
};

// The steps of finish_tile, from registers.
template <class V, int M, int N>
static ALWAYS_INLINE void finish_sums8(const To8& to, const typename V::I (&acc)[M][N]) {
  EACH(n, N) {
    const typename V::G scale = V::gload(to.scale + n * V::LANES);
    const typename V::G bias = to.bias ? V::gload(to.bias + n * V::LANES) : V::gzero();
    EACH(m, M) {
      typename V::G y = V::gmul(V::gmul(V::to_g(acc[m][n]), V::gset1(to.by[m])), scale);
      V::gstore(to.y + m * to.y_stride + n * V::LANES, to.bias ? V::gadd(y, bias) : y);
    });
  });
}

// A tile of M rows of x and 48 of the weight over `run` lanes of four columns. A function of its own, so that all sums
// stay in registers.
template <class V, int M, bool SMALL, bool ASKING>
static __attribute__((noinline)) void sums8(const int8_t* q, int64_t stride, const uint8_t* panel, int64_t run,
                                            const To8& to, Ask8 ask) {
  const int32_t* start = to.start;
  int32_t* sums = to.sums;
  constexpr int N = WIDE8 / V::LANES;
  // What will be written is a line or three of each row of y: too far apart for the processor to foresee.
  for (int m = 0; to.scale && m < M; m++)
    for (int n = 0; n < WIDE8; n += 16) __builtin_prefetch(to.y + m * to.y_stride + n, 1, 3);
  typename V::I acc[M][N];
  EACH(m, M) {
    EACH(n, N) {
      if (start) acc[m][n] = V::iset1(start[m]);
      else memcpy(&acc[m][n], sums + m * WIDE8 + n * V::LANES, sizeof acc[m][n]);
    });
  });
  for (int64_t k = 0, until; k < run; ask.at += ask.row_bytes) {
    until = ASKING && k + ask.lines < run ? k + ask.lines : run;
    for (const uint8_t* at = ask.at; k < until; k++, at += 64) {
      if (ASKING) __builtin_prefetch(at, 0, 2);
      typename V::B level[N];
      EACH(n, N) { level[n] = V::bload((const int8_t*)panel + (k * N + n) * V::LANES * 4); });
      EACH(m, M) {
        typename V::B four = V::four(q + m * stride + 4 * k);
        EACH(n, N) { V::template dot_into<SMALL>(acc[m][n], level[n], four); });
      });
    }
  }
  if (to.scale) return finish_sums8<V, M, N>(to, acc);
  EACH(m, M) {
    EACH(n, N) { V::istore(sums + m * WIDE8 + n * V::LANES, acc[m][n]); });
  });
}

// What one group of x adds to `total`.
template <class V, int M, bool SMALL>
static __attribute__((noinline)) void run8(const int8_t* q, int64_t stride, const uint8_t* panel, int64_t run,
                                           const int32_t* start, const float* by, int64_t groups, const float* scale,
                                           float* total) {
  constexpr int N = WIDE8 / V::LANES;
  typename V::I acc[M][N];
  EACH(m, M) {
    typename V::I first = V::iset1(start[m * groups]);
    EACH(n, N) { acc[m][n] = first; });
  });
  for (int64_t k = 0; k < run; k++) {
    typename V::B level[N];
    EACH(n, N) { level[n] = V::bload((const int8_t*)panel + (k * N + n) * V::LANES * 4); });
    EACH(m, M) {
      typename V::B four = V::four(q + m * stride + 4 * k);
      EACH(n, N) { V::template dot_into<SMALL>(acc[m][n], level[n], four); });
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

template <class V, int M, bool SMALL>
static void grouped8(const Product8& p, int64_t row, int64_t rows, int64_t m0, const uint8_t* panel, const float* scale,
                  const float* offset) {
  constexpr int N = WIDE8 / V::LANES, RUN = GROUP8 / 4;
  const whit_weight& w = *p.w;
  const whit_rows8& x = *p.x;
  const int8_t* q = x.codes + m0 * x.stride;
  alignas(64) float total[M * WIDE8];
  const int32_t* start = p.starts + m0 * x.groups;
  memset(total, 0, sizeof total);
  const int64_t runs = (w.columns + GROUP8 - 1) / GROUP8;
  int64_t g = 0, next = w.groups == 1 ? w.columns : w.group_size;
  for (int64_t u = 0; u < runs; u++) {
    run8<V, M, SMALL>(q + u * GROUP8, x.stride, panel + u * RUN * WIDE8 * 4, RUN, start + u,
                      x.scale + m0 * x.groups + u, x.groups, scale + g * WIDE8, total);
    if ((u + 1) * GROUP8 < next && u + 1 < runs) continue;
    for (int m = 0; m < M && offset; m++) {
      typename V::G by = V::gset1(-p.group_sums[(m0 + m) * p.sum_stride + g]);
      for (int n = 0; n < N; n++) {
        float* to = total + m * WIDE8 + n * V::LANES;
        V::gstore(to, V::gfma(V::gload(offset + g * WIDE8 + n * V::LANES), by, V::gload(to)));
      }
    }
    g++, next += w.group_size;
  }
  finish_tile<V>(p, m0, M, row, rows, total, scale);
}

// body(m, M) for tiles of x, M a constant.
template <class V, class Body>
static ALWAYS_INLINE void tiles8(int64_t count, const Body& body) {
  int64_t m = 0;
  for (; m + V::TALL <= count; m += V::TALL) body(m, std::integral_constant<int, V::TALL>());
  if constexpr (V::TALL > 4)
    if (m + 4 <= count) body(m, std::integral_constant<int, 4>()), m += 4;
  if (m + 2 <= count) body(m, std::integral_constant<int, 2>()), m += 2;
  if (m < count) body(m, std::integral_constant<int, 1>());
}

// 48 rows of the weight times all rows of x, which share their scales: in columns that leave room in the second cache
// for the codes of the panel that comes next.
template <class V, int BITS, bool TABLE>
static void whole_panel(const Product8& p, int64_t row, int64_t rows, uint8_t* panel, const float* scale) {
  constexpr bool SMALL = small_levels<V, BITS, TABLE>();
  const whit_weight& w = *p.w;
  const whit_rows8& x = *p.x;
  int32_t* kept = (int32_t*)(panel + WIDE8 * CHUNK8);
  const bool plain = rows == WIDE8 && p.type == WHIT_F32 && !x.zero;
  for (int64_t first = 0; first < w.columns; first += CHUNK8) {
    const int64_t until = first + CHUNK8 < w.columns ? first + CHUNK8 : w.columns;
    const bool last = until == w.columns;
    decode_panel<V, BITS, TABLE>(p, row, rows, first, until, panel);
    // The next panel's codes are these columns of the next rows, or the next columns of these.
    const int64_t coming = last ? 0 : until, row_next = last ? row + WIDE8 : row;
    const int64_t asked = w.columns - coming < CHUNK8 ? w.columns - coming : CHUNK8;
    const int64_t in_row = (asked * BITS + 7) / 8, run = (until - first + 3) / 4;
    const int64_t rows_asked = w.rows - row_next < WIDE8 ? w.rows - row_next : WIDE8;
    const bool whole = in_row == w.row_bytes;
    const int64_t lines = whole ? run : (in_row + 63) / 64, row_step = whole ? 64 * run : w.row_bytes;
    int64_t left = whole ? rows_asked * w.row_bytes / 64 : rows_asked * lines;
    Ask8 ask = {w.codes + row_next * w.row_bytes + coming * BITS / 8, lines, row_step};
    tiles8<V>(x.count, [&](int64_t m, auto M) {
      alignas(64) int32_t own[M * WIDE8];
      int32_t* sums = w.columns > CHUNK8 ? kept + m * WIDE8 : own;
      To8 to = {first ? nullptr : p.starts + m, sums, nullptr, x.scale + m, nullptr, nullptr, w.rows};
      if (last && plain) {
        to.scale = scale, to.y = (float*)p.y + m * w.rows + row;
        to.bias = p.bias ? (const float*)p.bias + row : nullptr;
      }
      (left > 0 ? sums8<V, M, SMALL, true> : sums8<V, M, SMALL, false>)(
          x.codes + m * x.stride + first, x.stride, panel, run, to, ask);
      ask.at += (run + lines - 1) / lines * row_step, left -= run;
      if (last && !plain) finish_tile<V>(p, m, M, row, rows, sums, scale);
    });
  }
}

template <class V, int BITS, bool TABLE>
static void many_of(const Product8& p, int64_t first, int64_t last, float* scratch) {
  const whit_weight& w = *p.w;
  const int64_t groups = padded_groups(w);
  float *row_scale = scratch, *row_zero = scratch + groups, *scale = scratch + 2 * groups;
  float* offset = scale + w.groups * WIDE8;
  uint8_t* panel = (uint8_t*)(((uintptr_t)(offset + w.groups * WIDE8) + 63) & ~(uintptr_t)63);
  for (int64_t row = first; row < last; row += WIDE8) {
    const int64_t rows = last - row < WIDE8 ? last - row : WIDE8;
    for (int64_t r = 0; r < WIDE8; r++) {
      group_params<V>(w, row + (r < rows ? r : rows - 1), 0, row_scale, row_zero);
      for (int64_t g = 0; g < w.groups; g++) scale[g * WIDE8 + r] = row_scale[g] * p.unit;
      for (int64_t g = 0; g < w.groups && w.zero; g++) offset[g * WIDE8 + r] = w.offsets ? row_zero[g] : row_scale[g] * row_zero[g];
    }
    if (p.x->groups == 1) {
      whole_panel<V, BITS, TABLE>(p, row, rows, panel, scale);
      continue;
    }
    decode_panel<V, BITS, TABLE>(p, row, rows, 0, w.columns, panel);
    tiles8<V>(p.x->count, [&](int64_t m, auto M) {
      grouped8<V, M, small_levels<V, BITS, TABLE>()>(p, row, rows, m, panel, scale, w.zero ? offset : nullptr);
    });
  }
}

template <class V>
static void many8(const Product8& p, int64_t first, int64_t last, float* scratch) {
  switch (p.w->bits) {
    case 2:
      if (p.has_table) return many_of<V, 2, true>(p, first, last, scratch);
      return many_of<V, 2, false>(p, first, last, scratch);
    case 3:
      if (p.has_table) return many_of<V, 3, true>(p, first, last, scratch);
      return many_of<V, 3, false>(p, first, last, scratch);
    case 4:
      if (p.has_table) return many_of<V, 4, true>(p, first, last, scratch);
      return many_of<V, 4, false>(p, first, last, scratch);
    case 5: return many_of<V, 5, false>(p, first, last, scratch);
    case 6: return many_of<V, 6, false>(p, first, last, scratch);
    case 8: return many_of<V, 8, false>(p, first, last, scratch);
  }
}
