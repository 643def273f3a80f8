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

#include "encoder_linear.inl"

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
