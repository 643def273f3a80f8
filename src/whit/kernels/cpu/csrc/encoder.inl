// The layers of an encoder over a struct V of an instruction set. Included after int8.inl, in its namespace.
//
// Work is cut into phases, and a phase into tasks that the threads of a crew take in turn; what a task computes does not
// depend on who takes it. A crew is one thread with sequences of its own, or all of them with one after the other.

template <class V>
static ALWAYS_INLINE Floats16 fused(Floats16 a, Floats16 b, Floats16 c) {
  return same_bits<Floats16>(V::fma(same_bits<typename V::F>(a), same_bits<typename V::F>(b), same_bits<typename V::F>(c)));
}

// e^x for x <= 88, to 2^-22; 0 below -87.
template <class V>
static ALWAYS_INLINE Floats16 exponential(Floats16 x) {
  const Floats16 one = Floats16{} + 1.0f, magic = Floats16{} + 12582912.0f;  // 1.5 2^23: units are integers
  const Floats16 low = Floats16{} - 87.0f, at = x < low ? low : x;
  const Floats16 shifted = fused<V>(at, Floats16{} + 1.44269504088896341f, magic), n = shifted - magic;
  Floats16 r = fused<V>(n, Floats16{} - 0.693145751953125f, at);
  r = fused<V>(n, Floats16{} - 1.42860682030941723e-6f, r);  // at - n ln 2 in two steps
  Floats16 y = Floats16{} + 1.0f / 720;
  y = fused<V>(y, r, Floats16{} + 1.0f / 120);
  y = fused<V>(y, r, Floats16{} + 1.0f / 24);
  y = fused<V>(y, r, Floats16{} + 1.0f / 6);
  y = fused<V>(y, r, Floats16{} + 0.5f);
  y = fused<V>(y, r, one);
  y = fused<V>(y, r, one);
  const Ints16 power = (same_bits<Ints16>(shifted) - 0x4b400000 + 127) << 23;
  y = y * same_bits<Floats16>(power);
  return x < low ? Floats16{} : y;
}

// x Phi(x) = x / 2 + x / 2 erf(x / 2^.5), to 2e-6 for |x| up to 8: erf there is x times a polynomial of x^2, of which
// 0 to 5.2^2 is -1 to 1, least in its largest error times x^2 / 2 (at Chebyshev's points); 1 beyond.
template <class V>
static ALWAYS_INLINE Floats16 gelu16(Floats16 x) {
  constexpr float END = 5.2f;
  constexpr float POLYNOMIAL[] = {0.0017312119f,  -0.00506314356f, 0.00573430443f, -0.00691798283f, 0.0150359552f,
                                  -0.0262552854f, 0.0368292443f,   -0.0491795056f, 0.0638007447f,   -0.0798822716f,
                                  0.100061446f,   -0.135486871f,   0.271899849f};
  const Floats16 half = 0.5f * x;
  const Floats16 within = same_bits<Floats16>(V::most(V::least(same_bits<typename V::F>(x), V::set1(END)), V::set1(-END)));
  const Floats16 at = fused<V>(within * within, Floats16{} + 2 / (END * END), Floats16{} - 1.0f);
  Floats16 p = Floats16{} + POLYNOMIAL[0];
  EACH(i, 12) { p = fused<V>(p, at, Floats16{} + POLYNOMIAL[i + 1]); });
  return fused<V>(half, within * p, half);
}

static ALWAYS_INLINE Floats16 load16(const float* p) { Floats16 f; memcpy(&f, p, 64); return f; }
static ALWAYS_INLINE void store16(float* p, Floats16 f) { memcpy(p, &f, 64); }

static ALWAYS_INLINE float sum16(Floats16 f) {
  float s = 0;
  for (int i = 0; i < 8; i++) s += f[i] + f[i + 8];
  return s;
}

// All threads of the crew have done all tasks when it returns.
template <class Task>
static ALWAYS_INLINE void phase8(Crew& crew, int64_t tasks, const Task& task) {
  if (crew.size == 1) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  for (int64_t i; (i = crew.next.fetch_add(1)) < tasks;) task(i);
  const int turn = crew.turn.load();
  if (crew.arrived.fetch_add(1) + 1 == crew.size) {
    crew.arrived = 0, crew.next = 0;
    crew.turn = turn + 1;
  } else {
    for (int spins = 0; crew.turn.load(std::memory_order_acquire) == turn; spins++)
      if (spins > 4096) whit_yield();
  }
}

// Codes of 16 bits of one row of x, and its scales.
template <class V>
static void wide_codes(const whit_linear8& w, const float* x, int64_t m, const Room8& room) {
  typedef uint8_t Bytes16 __attribute__((vector_size(16)));
  uint8_t* codes = room.codes + 2 * m * w.stride;
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
      const Ints16 q = same_bits<Ints16>(shifted) - 0x4b400000 + 32768;
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
    typename V::I none = V::izero();
    const typename V::F least = V::set1(low), by = V::set1(factor), less = V::set1(symmetric ? 0 : 128.0f);
    for (int64_t c = first; c < until; c += 16) {
      uint8_t own[16];
      V::round8(V::sub(V::mul(V::sub(V::load(x + c), least), by), less), (int8_t*)own, none);
      for (int i = 0; i < 16; i++) codes[c + i] = (uint8_t)(own[i] ^ 128);
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
static void linear8(Crew& crew, const whit_linear8& w, const Room8& room, int64_t rows, float* y, int64_t stride) {
  phase8(crew, (w.out + WIDE8 - 1) / WIDE8, [&](int64_t panel) {
    if (V::TALL == 8 && w.per_group && !w.wide) grouped_panel<V, THEN>(w, room, panel, rows, y, stride);
    else if (w.wide) linear_panel<V, THEN, true>(w, room, panel, rows, y, stride);
    else linear_panel<V, THEN, false>(w, room, panel, rows, y, stride);
  });
}

// to (M, N vectors) = sum over k of x[m][k] w[k][n]; x (M, x_stride), w (count, w_stride).
template <class V, int M, int N>
static ALWAYS_INLINE void float_tile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count,
                                     float* to, int64_t to_stride, const float* by) {
  typename V::F acc[M][N];
  EACH(m, M) {
    EACH(n, N) { acc[m][n] = V::zero(); });
  });
  for (int64_t k = 0; k < count; k++) {
    typename V::F own[N];
    EACH(n, N) { own[n] = V::load(w + k * w_stride + n * 16); });
    EACH(m, M) {
      typename V::F one = V::set1(x[m * x_stride + k]);
      EACH(n, N) { acc[m][n] = V::fma(one, own[n], acc[m][n]); });
    });
  }
  EACH(m, M) {
    typename V::F one = V::set1(by[m]);
    EACH(n, N) { V::store(to + m * to_stride + n * 16, V::mul(acc[m][n], one)); });
  });
}

template <class V, int M>
static void float_rows(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count, float* to,
                       int64_t to_stride, int64_t columns, const float* by) {
  int64_t n = 0;
  for (; n + 32 <= columns; n += 32) float_tile<V, M, 2>(x, x_stride, w + n, w_stride, count, to + n, to_stride, by);
  if (n < columns) float_tile<V, M, 1>(x, x_stride, w + n, w_stride, count, to + n, to_stride, by);
}

// M queries of one head against all keys (dim, padded) and values (padded, dim); scores (M, padded).
template <class V, int M>
static void attend(const whit_encoder8& e, int64_t sequence, int64_t query, const float* q, int64_t q_stride,
                   const float* keys, const float* values, float* scores, int64_t dim, float* to) {
  const int64_t padded = (e.tokens + 15) & ~(int64_t)15;
  float by[M];
  for (int m = 0; m < M; m++) by[m] = 1.0f / __builtin_sqrtf((float)dim);
  float_rows<V, M>(q, q_stride, keys, padded, dim, scores, padded, padded, by);
  for (int m = 0; m < M; m++) {
    float* own = scores + m * padded;
    for (int64_t k = e.tokens; k < padded; k++) own[k] = -3e38f;
    if (e.mask) {
      const uint8_t* seen = e.mask + sequence * e.mask_batch + (query + m) * e.mask_query;
      for (int64_t k = 0; k < e.tokens; k++) own[k] = seen[k * e.mask_key] ? own[k] : -3e38f;
    }
    Floats16 most = load16(own);
    for (int64_t k = 16; k < padded; k += 16) {
      Floats16 f = load16(own + k);
      most = f > most ? f : most;
    }
    float top = most[0];
    for (int i = 1; i < 16; i++) top = most[i] > top ? most[i] : top;
    Floats16 sum = Floats16{};
    for (int64_t k = 0; k < padded; k += 16) {
      Floats16 f = exponential<V>(load16(own + k) - top);
      sum += f;
      store16(own + k, f);
    }
    by[m] = 1.0f / sum16(sum);
  }
  float_rows<V, M>(scores, padded, values, dim, e.tokens, to, e.size, dim, by);
}

// Keys (tokens, dim) as (dim, padded), zeros beyond the last token.
template <class V>
static void turn_keys(const float* from, int64_t stride, int64_t tokens, int64_t dim, float* keys, int64_t padded) {
  const float none[16] = {};
  for (int64_t k = 0; k < padded; k += V::LANES)
    for (int64_t d = 0; d < dim; d += V::LANES) {
      typename V::B lines[V::LANES];
UNROLL(16)
      for (int r = 0; r < V::LANES; r++)
        lines[r] = V::bload((const int8_t*)(k + r < tokens ? from + (k + r) * stride + d : none));
      V::transpose(lines);
UNROLL(16)
      for (int i = 0; i < V::LANES; i++) V::bstore((uint8_t*)(keys + (d + i) * padded + k), lines[i]);
    }
}

template <class V>
static void attention8(Crew& crew, const whit_encoder8& e, int64_t sequence, int64_t count, const Room8& room) {
  constexpr int M = V::TALL > 4 ? 8 : 4;
  const int64_t dim = e.size / e.heads, padded = (e.tokens + 15) & ~(int64_t)15, stride = 3 * e.size;
  phase8(crew, count * e.heads, [&](int64_t task) {
    const int64_t which = task / e.heads, head = task % e.heads;
    const float* q = room.wide + which * e.tokens * stride + head * dim;
    float *keys = room.own, *values = keys + dim * padded, *scores = values + dim * padded;
    for (int64_t k = 0; k < e.tokens; k++) memcpy(values + k * dim, q + k * stride + 2 * e.size, (size_t)dim * 4);
    turn_keys<V>(q + e.size, stride, e.tokens, dim, keys, padded);
    float* to = room.context + which * e.tokens * e.size + head * dim;
    int64_t t = 0;
    for (; t + M <= e.tokens; t += M)
      attend<V, M>(e, sequence + which, t, q + t * stride, stride, keys, values, scores, dim, to + t * e.size);
    for (; t < e.tokens; t++)
      attend<V, 1>(e, sequence + which, t, q + t * stride, stride, keys, values, scores, dim, to + t * e.size);
  });
}

static void norm_row(float* x, int64_t size, const float* weight, const float* bias, float epsilon) {
  Floats16 sum = Floats16{}, squares = Floats16{};
  for (int64_t c = 0; c < size; c += 16) sum += load16(x + c);
  const float mean = sum16(sum) / (float)size;
  for (int64_t c = 0; c < size; c += 16) {
    const Floats16 f = load16(x + c) - mean;
    squares += f * f;
  }
  const float by = 1.0f / __builtin_sqrtf(sum16(squares) / (float)size + epsilon);
  for (int64_t c = 0; c < size; c += 16)
    store16(x + c, (load16(x + c) - mean) * by * load16(weight + c) + load16(bias + c));
}

// Sequences [sequence, sequence + count) through all layers.
template <class V>
static void encode8(Crew& crew, const whit_encoder8& e, int64_t sequence, int64_t count, const Room8& room) {
  const int64_t rows = count * e.tokens;
  float* hidden = e.hidden + sequence * e.tokens * e.size;
  constexpr int64_t RUN = 8;  // rows to a task
  const int64_t runs = (rows + RUN - 1) / RUN;
  const auto each = [&](const auto& body) {
    phase8(crew, runs, [&](int64_t run) {
      for (int64_t m = run * RUN; m < rows && m < (run + 1) * RUN; m++) body(m);
    });
  };
  const auto quantize = [&](const whit_linear8& w, float* x) {
    each([&](int64_t m) { codes_of<V>(w, x + m * w.in, m, room); });
  };
  if (const whit_embedding8& from = e.embedding; from.ids)
    each([&](int64_t m) {
      const float *word = from.word + from.ids[sequence * e.tokens + m] * e.size, *beside = from.beside + m % e.tokens * e.size;
      for (int64_t c = 0; c < e.size; c += 16) store16(hidden + m * e.size + c, load16(word + c) + load16(beside + c));
      norm_row(hidden + m * e.size, e.size, from.norm_weight, from.norm_bias, e.epsilon);
    });
  for (int64_t i = 0; i < e.count; i++) {
    const whit_layer8& layer = e.layers[i];
    const auto norm = [&](int which) {
      each([&](int64_t m) {
        norm_row(hidden + m * e.size, e.size, layer.norm_weight[which], layer.norm_bias[which], e.epsilon);
      });
    };
    quantize(layer.qkv, hidden);
    linear8<V, KEEP>(crew, layer.qkv, room, rows, room.wide, 3 * e.size);
    attention8<V>(crew, e, sequence, count, room);
    quantize(layer.out, room.context);
    linear8<V, ADD>(crew, layer.out, room, rows, hidden, e.size);
    norm(0);
    quantize(layer.up, hidden);
    linear8<V, GELU>(crew, layer.up, room, rows, room.inner, e.inner);
    quantize(layer.down, room.inner);
    linear8<V, ADD>(crew, layer.down, room, rows, hidden, e.size);
    norm(1);
  }
}
