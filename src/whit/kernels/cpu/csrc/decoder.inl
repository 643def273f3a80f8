// What lies between the products of a decoder, over a struct V of an instruction set. Included after kernels.inl.

// e^x to about one unit in the last place, for |x| below 88; beyond, as for 88.
template <class V>
static ALWAYS_INLINE typename V::F exponential(typename V::F x) {
  x = V::least(V::most(x, V::set1(-87.0f)), V::set1(88.0f));
  typename V::F n = V::floor(V::fma(x, V::set1(1.44269504f), V::set1(0.5f)));
  typename V::F r = V::fnma(n, V::set1(0.693359375f), x);  // ln 2 in two parts: n times the first is exact
  r = V::fnma(n, V::set1(-2.12194440e-4f), r);
  typename V::F y = V::set1(1.0f / 5040);
  y = V::fma(y, r, V::set1(1.0f / 720));
  y = V::fma(y, r, V::set1(1.0f / 120));
  y = V::fma(y, r, V::set1(1.0f / 24));
  y = V::fma(y, r, V::set1(1.0f / 6));
  y = V::fma(y, r, V::set1(0.5f));
  y = V::fma(y, r, V::set1(1.0f));
  y = V::fma(y, r, V::set1(1.0f));
  return V::mul(y, V::power(n));
}

// The exponential of torch's attention, for x <= 0: 2^f - 1 - f as a cubic of the fraction f of x log2 e, and the sum's
// bits made from it (Malossi et al., Fast exponential computation on SIMD architectures, 2015).
template <class V>
static ALWAYS_INLINE typename V::F quick_exponential(typename V::F x) {
  typename V::F y = V::mul(V::most(x, V::set1(-87.0f)), V::set1(1.44269504f));
  typename V::F f = V::sub(y, V::floor(y));
  typename V::F c = V::fma(f, V::set1(-0.079204240f), V::set1(-0.224338365f));
  c = V::fma(f, c, V::set1(0.303542605f));
  c = V::fma(f, c, V::set1(1.07034348e-4f));
  return V::from_bits(V::fma(V::sub(y, c), V::set1(8388608.0f), V::set1(1065353216.0f)));
}

template <class V>
static ALWAYS_INLINE float first_sum(typename V::F f) {  // of one vector, in the order of its lanes
  float lanes[16], sum = 0;
  V::store(lanes, f);
  for (int i = 0; i < 16; i++) sum += lanes[i];
  return sum;
}

template <class V>
static void to_floats(const void* x, int64_t n, int type, float* out) { convert<V>(x, 0, n, type, out); }

template <class V>
static void from_floats(const float* x, int64_t n, int type, void* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) V::store_as(out, i, V::load(x + i), type);
  for (; i < n; i++) store_float(out, i, x[i], type);
}

// The sum of squares as torch sums a row: lanes of 8 times 4 accumulators, in cascades of at least 16.
template <class V>
static float sum_of_squares(const float* x, int64_t n) {
  const int64_t size = n / 32;
  int power = 0;
  while (((int64_t)1 << power) < size) power++;
  power = power / 4 > 4 ? power / 4 : 4;
  const int64_t step = (int64_t)1 << power;
  typename V::F sums[4][2];
  for (int level = 0; level < 4; level++) sums[level][0] = sums[level][1] = V::zero();
  auto add = [&](int64_t i) {
    for (int half = 0; half < 2; half++) {
      typename V::F f = V::load(x + 32 * i + 16 * half);
      sums[0][half] = V::add(sums[0][half], V::mul(f, f));
    }
  };
  int64_t i = 0;
  while (i + step <= size) {
    for (int64_t j = 0; j < step; j++) add(i++);
    for (int level = 1; level < 4; level++) {
      for (int half = 0; half < 2; half++) {
        sums[level][half] = V::add(sums[level][half], sums[level - 1][half]);
        sums[level - 1][half] = V::zero();
      }
      if (i & ((step - 1) << (level * power))) break;
    }
  }
  while (i < size) add(i++);
  float lanes[32];
  for (int half = 0; half < 2; half++) {
    for (int level = 1; level < 4; level++) sums[0][half] = V::add(sums[0][half], sums[level][half]);
    V::store(lanes + 16 * half, sums[0][half]);
  }
  int64_t c = 32 * size;
  for (; c + 8 <= n; c += 8)
    for (int j = 0; j < 8; j++) lanes[j] += x[c + j] * x[c + j];
  float sum = 0;
  for (; c < n; c++) sum += x[c] * x[c];
  for (int j = 0; j < 8; j++) {
    for (int k = 1; k < 4; k++) lanes[j] += lanes[8 * k + j];
    sum += lanes[j];
  }
  return sum;
}

template <class V>
static void norm(const void* x, const void* weight, int64_t n, float epsilon, int type, float* room, void* out) {
  to_floats<V>(x, n, type, room);
  const float factor = 1.0f / __builtin_sqrtf(sum_of_squares<V>(room, n) / (float)n + epsilon);
  for (int64_t i = 0; i < n; i++) room[i] *= factor;
  if (type != WHIT_F32) {
    from_floats<V>(room, n, type, out);
    to_floats<V>(out, n, type, room);
  }
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) V::store_as(out, i, V::mul(V::convert(weight, i, type), V::load(room + i)), type);
  for (; i < n; i++) store_float(out, i, load_as_float(weight, i, type) * room[i], type);
}

static ALWAYS_INLINE float rounded(float f, int type) {
  uint16_t half;
  if (type == WHIT_F32) return f;
  store_float(&half, 0, f, type);
  return load_as_float(&half, 0, type);
}

static ALWAYS_INLINE void rotate(void* x, const void* cos, const void* sin, int64_t dim, int type) {
  for (int64_t i = 0; i < dim / 2; i++) {
    const int64_t j = i + dim / 2;
    const float a = load_as_float(x, i, type), b = load_as_float(x, j, type);
    const float ac = rounded(a * load_as_float(cos, i, type), type), bs = rounded(-b * load_as_float(sin, i, type), type);
    const float bc = rounded(b * load_as_float(cos, j, type), type), as = rounded(a * load_as_float(sin, j, type), type);
    store_float(x, i, ac + bs, type);
    store_float(x, j, bc + as, type);
  }
}

template <class V>
static float dot_product(const float* q, const void* keys, int64_t first, int64_t dim, int type) {
  typename V::F sum = V::zero();
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) sum = V::fma(V::load(q + i), V::convert(keys, first + i, type), sum);
  float total = V::sum(sum);
  for (; i < dim; i++) total += q[i] * load_as_float(keys, first + i, type);
  return total;
}

// A softmax of WHIT_SPLIT keys at a time; shares are rounded to the model's type before they multiply values.
template <class V>
static void attend(const Attention& a) {
  float *sums = a.sums, *scores = a.scores, *q = sums + a.dim;
  to_floats<V>(a.q, a.dim, a.type, q);
  memset(sums, 0, sizeof(float) * (size_t)a.dim);
  float total = 0, highest = -__builtin_inff();
  for (int64_t first = 0; first < a.length; first += WHIT_SPLIT) {
    const int64_t count = a.length - first < WHIT_SPLIT ? a.length - first : WHIT_SPLIT;
    float most = highest;
    for (int64_t t = 0; t < count; t++) {
      scores[t] = dot_product<V>(q, a.keys, (first + t) * a.dim, a.dim, a.type) * a.scale;
      if (scores[t] > most) most = scores[t];
    }
    typename V::F shares = V::zero();
    int64_t t = 0;
    for (; t + 16 <= count; t += 16) {
      typename V::F share = quick_exponential<V>(V::sub(V::load(scores + t), V::set1(most)));
      shares = V::add(shares, share);
      V::store(scores + t, share);
    }
    float sum = t ? V::sum(shares) : 0;
    for (; t < count; t++) sum += scores[t] = __builtin_expf(scores[t] - most);
    const float fade = first ? __builtin_expf(highest - most) : 0;
    total = fade * total + sum, highest = most;
    if (first)
      for (int64_t i = 0; i < a.dim; i++) sums[i] *= fade;
    for (t = 0; t < count; t++) {
      const float share = rounded(scores[t], a.type);
      const typename V::F shared = V::set1(share);
      int64_t i = 0;
      for (; i + 16 <= a.dim; i += 16)
        V::store(sums + i, V::fma(shared, V::convert(a.values, (first + t) * a.dim + i, a.type), V::load(sums + i)));
      for (; i < a.dim; i++) sums[i] += share * load_as_float(a.values, (first + t) * a.dim + i, a.type);
    }
  }
  const float factor = 1.0f / total;
  for (int64_t i = 0; i < a.dim; i++) store_float(a.out, i, sums[i] * factor, a.type);
}

template <class V>
static void gate(void* gated, const void* up, int64_t n, int type) {
  const typename V::F one = V::set1(1);
  for (int64_t i = 0; i < n; i += 16) {
    float g[16] = {0}, u[16] = {0};
    const int64_t count = n - i < 16 ? n - i : 16;
    for (int64_t j = 0; j < count && count < 16; j++)
      g[j] = load_as_float(gated, i + j, type), u[j] = load_as_float(up, i + j, type);
    if (count == 16) V::store(g, V::convert(gated, i, type)), V::store(u, V::convert(up, i, type));
    typename V::F x = V::load(g);
    V::store(g, V::div(x, V::add(one, exponential<V>(V::sub(V::zero(), x)))));
    from_floats<V>(g, count, type, (char*)gated + i * (type == WHIT_F32 ? 4 : 2));
    for (int64_t j = 0; j < count; j++) g[j] = load_as_float(gated, i + j, type) * u[j];
    from_floats<V>(g, count, type, (char*)gated + i * (type == WHIT_F32 ? 4 : 2));
  }
}

template <class V>
static void add(void* x, const void* y, int64_t n, int type) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) V::store_as(x, i, V::add(V::convert(x, i, type), V::convert(y, i, type)), type);
  for (; i < n; i++) store_float(x, i, load_as_float(x, i, type) + load_as_float(y, i, type), type);
}

// Rows [first, last) of a matrix of floats times x.
template <class V>
static void dense(const whit_matrix& m, const float* x, int64_t first, int64_t last, void* y, int type) {
  for (int64_t row = first; row < last; row++) {
    typename V::F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const int64_t at = row * m.columns;
    int64_t c = 0;
    for (; c + 64 <= m.columns; c += 64)
      for (int k = 0; k < 4; k++)
        sums[k] = V::fma(V::load(x + c + 16 * k), V::convert(m.dense, at + c + 16 * k, type), sums[k]);
    for (; c + 16 <= m.columns; c += 16) sums[0] = V::fma(V::load(x + c), V::convert(m.dense, at + c, type), sums[0]);
    float sum = V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
    for (; c < m.columns; c++) sum += x[c] * load_as_float(m.dense, at + c, type);
    if (m.bias) sum += load_as_float(m.bias, row, type);
    store_float(y, row, sum, type);
  }
}

template <class V>
static constexpr Steps steps_of() {
  return {norm<V>, rotate, attend<V>, gate<V>, add<V>, to_floats<V>, dense<V>};
}
