// Products of 8-bit activations over a struct V of an instruction set. Included after kernels.inl, in its namespace.
//
// Few rows of x stream past rows of the weight, which stay in the order of their columns. For many rows a panel of 48
// rows of the weight is decoded once to bytes, four columns of a row to a lane, and stays in the second cache while
// tiles of 8 rows of x pass by: no lane ever needs another's sum.

// Loops whose indices are constants before the compiler looks at arrays: their elements stay in registers. The body
// closes by });
template <int... I>
struct Indices {
  template <class F>
  ALWAYS_INLINE void operator<<(const F& body) const { (body(std::integral_constant<int, I>()), ...); }
};
template <int... I>
static constexpr Indices<I...> indices_of(std::integer_sequence<int, I...>) { return {}; }
#define EACH(i, count) indices_of(std::make_integer_sequence<int, count>()) << ([&](auto i) __attribute__((always_inline))

template <class V, int BITS, bool TABLE>
struct Decoder8 {
  typename V::Bits state;
  typename V::B table;
  const uint8_t* end;
  explicit Decoder8(const Product8& p) : state(V::bits(BITS)), end(p.w->codes + p.w->rows * p.w->row_bytes) {
    if (TABLE) table = V::table8(p.table);
  }
  // Neighbouring columns, as bytes.
  ALWAYS_INLINE typename V::B operator()(const uint8_t* p) const {
    uint8_t last[64];
    typename V::B codes = V::template decode<BITS>(within(p, V::LANES * BITS / 2, last), state);
    return TABLE ? V::look8(codes, table) : codes;
  }
  template <int PARTS>
  ALWAYS_INLINE void parts(const uint8_t* p, typename V::B (&level)[PARTS]) const {
    if constexpr (PARTS == 1) {
      level[0] = (*this)(p);
    } else {
      uint8_t last[64];
      const typename V::B bytes = V::bload((const int8_t*)within(p, V::LANES * 4, last));
      EACH(i, PARTS) {
        typename V::B codes = V::template part<i * BITS>(bytes, state);
        level[i] = TABLE ? V::look8(codes, table) : codes;
      });
    }
  }
  ALWAYS_INLINE const uint8_t* within(const uint8_t* p, int bytes, uint8_t* last) const {
    if (__builtin_expect(p + bytes <= end, 1)) return p;
    memset(last, 0, 64);
    if (p < end) memcpy(last, p, (size_t)(end - p));
    return last;
  }
};

// Whether pairs of products fit 16 bits; where the instruction needs no such care, one kernel serves all.
template <class V, int BITS, bool TABLE>
static constexpr bool small_levels() { return V::EXACT || (!TABLE && BITS < 8); }

static ALWAYS_INLINE void finish8(const Product8& p, int64_t m, int64_t row, float y) {
  if (p.bias) y += load_as_float(p.bias, row, p.type);
  store_float(p.y, m * p.w->rows + row, y, p.type);
}

// One group: exact integers to the end, then the rounding steps of int8.int8_linear. Modulo 2^32, as the zero point of a
// row that is not finite is any integer; its scale makes the result NaN.
static ALWAYS_INLINE void finish_row8(const Product8& p, int64_t m, int64_t row, int32_t sum, float scale) {
  const whit_rows8& x = *p.x;
  if (x.zero) sum = (int32_t)((uint32_t)sum - (uint32_t)x.zero[m] * (uint32_t)p.row_sums[row]);
  finish8(p, m, row, (float)sum * x.scale[m] * scale);
}

// Few rows of x take a vector of codes as it lies: 8 / BITS columns of a byte lie in as many vectors, to which x was
// put in the same order (`arranged`). A lane then holds 32 / BITS neighbouring columns. Other widths are spread first.
template <int BITS>
static constexpr int parts_of() { return BITS == 4 ? 2 : BITS == 2 ? 4 : 1; }

// Ask for codes that are to come. Whole bytes come as fast as memory gives them: one row after the other is what the
// processor's own prefetcher takes for a stream, and other requests, or several rows at once, only stand in its way.
template <int BITS>
static ALWAYS_INLINE void ask(const uint8_t* codes) {
  if (BITS < 8) __builtin_prefetch(codes + 16384, 0, 2);
}

// The sums of lanes with what the shifts and zero points of the levels take from them.
template <class V>
static ALWAYS_INLINE typename V::G shifted8(const Product8& p, int64_t m, typename V::G total, const float* scale,
                                            const float* zero) {
  const whit_weight& w = *p.w;
  const float* sums = p.group_sums + m * p.sum_stride;
  const typename V::G shift = V::gset1(-p.unit * (float)p.shift), minus = V::gset1(-1.0f);
  typename V::G y = V::gmul(total, V::gset1(p.unit));
  for (int64_t g = 0; g < w.groups && w.offsets; g += V::LANES)
    y = V::gfma(V::gmul(V::gload(zero + g), minus), V::gload(sums + g), y);
  for (int64_t g = 0; g < w.groups; g += V::LANES) {
    typename V::G by = w.zero && !w.offsets ? V::gfma(V::gload(zero + g), minus, shift) : shift;
    y = V::gfma(V::gmul(V::gload(scale + g), by), V::gload(sums + g), y);
  }
  return y;
}

template <class V, int BITS, bool TABLE, int M, bool GROUPED>
static ALWAYS_INLINE void few_rows(const Product8& p, const Decoder8<V, BITS, TABLE>& decode, int64_t row, int64_t m0,
                                   float* scratch) {
  constexpr int PARTS = parts_of<BITS>(), BYTES = PARTS > 1 ? V::LANES * 4 : V::LANES * BITS / 2;
  constexpr int COLUMNS = V::LANES * 4 * PARTS;
  constexpr bool SMALL = small_levels<V, BITS, TABLE>();
  const whit_weight& w = *p.w;
  const whit_rows8& x = *p.x;
  const int64_t steps = (w.columns + COLUMNS - 1) / COLUMNS, size = w.group_size;
  const uint8_t* codes = w.codes + row * w.row_bytes;
  const int8_t* q[M];
  typename V::I acc[M];
  typename V::G total[M];
  EACH(m, M) { q[m] = p.arranged + (m0 + m) * p.arranged_stride, acc[m] = V::izero(), total[m] = V::gzero(); });
  float *scale = scratch, *zero = scratch + padded_groups(w);
  group_params<V>(w, row, 0, scale, zero);
  if constexpr (!GROUPED) {
    for (int64_t s = 0; s < steps; s++) {
      ask<BITS>(codes + s * BYTES);
      typename V::B level[PARTS];
      decode.parts(codes + s * BYTES, level);
      EACH(m, M) {
        EACH(i, PARTS) {
          acc[m] = V::template dot<SMALL>(acc[m], level[i], V::bload(q[m] + s * COLUMNS + i * V::LANES * 4));
        });
      });
    }
    EACH(m, M) {
      finish_row8(p, m0 + m, row, V::isum(acc[m]) - p.shift * x.sums[m0 + m], scale[0] * p.unit);
    });
  } else {
    // Lanes share the scales of the weight by runs of 2^run_shift, or all lanes of 2^block_shift steps do.
    const bool wide = w.groups == 1 || size >= COLUMNS;
    const int run_shift = __builtin_ctzll((uint64_t)(wide ? COLUMNS : size) / (4 * PARTS));
    const int block_shift = w.groups == 1 ? 62 : wide ? __builtin_ctzll((uint64_t)(size / COLUMNS)) : 0;
    const int64_t in_step = wide ? 0 : COLUMNS / size;
    const float* by[M];
    EACH(m, M) { by[m] = p.lanes + (m0 + m) * p.lane_stride; });
    for (int g = 0; g < V::LANES; g++) scale[w.groups + g] = zero[w.groups + g] = 0;
    for (int64_t s = 0; s < steps; s++) {
      ask<BITS>(codes + s * BYTES);
      typename V::B level[PARTS];
      decode.parts(codes + s * BYTES, level);
      typename V::G own = wide ? V::gset1(scale[s >> block_shift]) : V::grepeat(scale + s * in_step, run_shift);
      EACH(m, M) {
        typename V::I dot = V::izero();
        EACH(i, PARTS) {
          dot = V::template dot<SMALL>(dot, level[i], V::bload(q[m] + s * COLUMNS + i * V::LANES * 4));
        });
        total[m] = V::gfma(V::gmul(V::to_g(dot), V::gload(by[m] + s * V::LANES)), own, total[m]);
      });
    }
    EACH(m, M) {
      finish8(p, m0 + m, row, V::gsum(shifted8<V>(p, m0 + m, total[m], scale, zero)));
    });
  }
}

// Ask for what lies beside the codes of `count` rows: too little a row for the processor to see a stream.
static ALWAYS_INLINE void ask_run(const void* data, int64_t row, int64_t count, int64_t bytes) {
  const char *p = (const char*)data + row * bytes, *until = p + count * bytes;
  for (; p < until; p += 64) __builtin_prefetch(p, 0, 2);
}

static ALWAYS_INLINE void ask_params(const whit_weight& w, int64_t row, int64_t count) {
  const int64_t groups = w.subs ? w.groups / w.subs : w.groups;
  const int one = w.scale_type == WHIT_NESTED ? 1 : w.scale_type == WHIT_F32 ? 4 : 2;
  if (!w.scale_stride) return;
  ask_run(w.scale, row, count, groups * one);
  if (w.zero)
    ask_run(w.zero, row, count, w.zero_type == WHIT_CODES ? (groups * w.bits + 7) / 8 : groups * (w.zero_type ? 2 : 4));
  if (w.sub_scale) ask_run(w.sub_scale, row, count, (w.groups * w.sub_bits + 7) / 8);
  if (w.sub_min) ask_run(w.sub_min, row, count, (w.groups * w.sub_bits + 7) / 8);
}

// Four rows of the weight past one of x: its codes and scales are loaded once, and the sums at the end overlap.
template <class V, int BITS, bool TABLE>
static ALWAYS_INLINE void four_rows(const Product8& p, const Decoder8<V, BITS, TABLE>& decode, int64_t row,
                                    float* scratch) {
  constexpr int PARTS = parts_of<BITS>(), BYTES = PARTS > 1 ? V::LANES * 4 : V::LANES * BITS / 2;
  constexpr int COLUMNS = V::LANES * 4 * PARTS;
  constexpr bool SMALL = small_levels<V, BITS, TABLE>();
  const whit_weight& w = *p.w;
  const int64_t steps = (w.columns + COLUMNS - 1) / COLUMNS, size = w.group_size, groups = padded_groups(w);
  const bool wide = w.groups == 1 || size >= COLUMNS;
  const int run_shift = __builtin_ctzll((uint64_t)(wide ? COLUMNS : size) / (4 * PARTS));
  const int block_shift = w.groups == 1 ? 62 : wide ? __builtin_ctzll((uint64_t)(size / COLUMNS)) : 0;
  const int64_t in_step = wide ? 0 : COLUMNS / size;
  const uint8_t* codes = w.codes + row * w.row_bytes;
  // Into the second cache, since what the first can have on its way is too little for the memory's rate: the rows that
  // follow as they lie, which is how memory is read fastest; of long rows what follows in each.
  const int64_t set = 4 * w.row_bytes, ahead = set > 16384 ? set : 16384;
  const bool in_order = set <= 65536;
  const int64_t apart = in_order ? BYTES : w.row_bytes, apace = in_order ? 4 * BYTES : BYTES;
  const uint8_t* next = codes + (in_order ? ahead : 4096);
  ask_params(w, row + ahead / (w.row_bytes ? w.row_bytes : 1), 4);
  float *scale[4], *zero[4];
  typename V::G total[4];
  const bool plain = !w.subs && !w.zero && w.scale_type != WHIT_NESTED && w.scale_stride == w.groups;
  if (plain) {  // the scales of four rows lie side by side
    convert<V>(w.scale, row * w.groups, 4 * w.groups, w.scale_type, scratch);
    V::gstore(scratch + 4 * w.groups, V::gzero());
  }
  EACH(r, 4) {
    scale[r] = zero[r] = plain ? scratch + r * w.groups : scratch + 2 * r * groups;
    total[r] = V::gzero();
    if (!plain) {
      zero[r] = scale[r] + groups;
      group_params<V>(w, row + r, 0, scale[r], zero[r]);
      V::gstore(scale[r] + w.groups, V::gzero()), V::gstore(zero[r] + w.groups, V::gzero());
    }
  });
  for (int64_t s = 0; s < steps; s++) {
    typename V::B q[PARTS];
    EACH(i, PARTS) { q[i] = V::bload(p.arranged + s * COLUMNS + i * V::LANES * 4); });
    const typename V::G by = V::gload(p.lanes + s * V::LANES);
    EACH(r, 4) {
      __builtin_prefetch(next + s * apace + r * apart, 0, 2);
      typename V::B level[PARTS];
      decode.parts(codes + r * w.row_bytes + s * BYTES, level);
      typename V::G own = wide ? V::gset1(scale[r][s >> block_shift]) : V::grepeat(scale[r] + s * in_step, run_shift);
      typename V::I dot = V::izero();
      EACH(i, PARTS) { dot = V::template dot<SMALL>(dot, level[i], q[i]); });
      total[r] = V::gfma(V::gmul(V::to_g(dot), by), own, total[r]);
    });
  }
  EACH(r, 4) { total[r] = shifted8<V>(p, 0, total[r], scale[r], zero[r]); });
  float y[4];
  V::gsum4(total, y);
  EACH(r, 4) { finish8(p, 0, row + r, y[r]); });
}

template <class V, int BITS, bool TABLE, bool GROUPED>
static void few_of(const Product8& p, int64_t first, int64_t last, float* scratch) {
  const Decoder8<V, BITS, TABLE> decode(p);
  int64_t row = first;
  if constexpr (GROUPED && BITS < 8)
    for (; row + 4 <= last && p.x->count == 1; row += 4) four_rows(p, decode, row, scratch);
  for (; row < last; row++) {
    int64_t m = 0;
    for (; m + 2 <= p.x->count; m += 2) few_rows<V, BITS, TABLE, 2, GROUPED>(p, decode, row, m, scratch);
    if (m < p.x->count) few_rows<V, BITS, TABLE, 1, GROUPED>(p, decode, row, m, scratch);
  }
}

#include "int8_panels.inl"

template <class V, bool GROUPED>
static void few_bits(const Product8& p, int64_t first, int64_t last, float* scratch) {
  switch (p.w->bits) {
    case 2:
      if (p.has_table) return few_of<V, 2, true, GROUPED>(p, first, last, scratch);
      return few_of<V, 2, false, GROUPED>(p, first, last, scratch);
    case 3:
      if (p.has_table) return few_of<V, 3, true, GROUPED>(p, first, last, scratch);
      return few_of<V, 3, false, GROUPED>(p, first, last, scratch);
    case 4:
      if (p.has_table) return few_of<V, 4, true, GROUPED>(p, first, last, scratch);
      return few_of<V, 4, false, GROUPED>(p, first, last, scratch);
    case 5: return few_of<V, 5, false, GROUPED>(p, first, last, scratch);
    case 6: return few_of<V, 6, false, GROUPED>(p, first, last, scratch);
    case 8: return few_of<V, 8, false, GROUPED>(p, first, last, scratch);
  }
}

template <class V>
static void few8(const Product8& p, int64_t first, int64_t last, float* scratch) {
  if (p.x->groups == 1) few_bits<V, false>(p, first, last, scratch);
  else few_bits<V, true>(p, first, last, scratch);
}

// The largest |x| of what shares a scale, of its bits.
struct Largest {
  int32_t bits;
  explicit Largest(int32_t of) : bits(of) {}
  bool finite() const { return bits < 0x7f800000; }
  // In the two steps that torch takes; 0 where all are 0.
  float factor(float limit) const { return finite() && bits ? 1.0f / same_bits<float>(bits) * limit : 0; }
  float unit(float limit) const { return finite() ? same_bits<float>(bits) / limit : __builtin_nanf(""); }
};

// Codes = round(x 127 / max|x|), scale = max|x| / 127, of a row or of 32 columns at a time, as int8.quantize_rows.
template <class V>
static void quantize8(const void* x, int type, int64_t columns, int64_t stride, int64_t groups, int8_t* codes,
                      float* scale, int32_t* sums) {
  const int64_t size = groups == 1 ? columns : GROUP8;
  memset(codes + columns, 0, (size_t)(stride - columns));
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = g * size < columns ? g * size : columns;
    const int64_t until = first + size < columns ? first + size : columns;
    const int64_t whole = first + ((until - first) & ~(int64_t)15);
    typename V::F most = V::zero();
    for (int64_t c = first; c < whole; c += 16) most = V::larger(most, V::convert(x, c, type));
    int32_t bits = V::largest(most);
    for (int64_t c = whole; c < until; c++) {
      const int32_t own = same_bits<int32_t>(load_as_float(x, c, type)) & 0x7fffffff;
      bits = own > bits ? own : bits;
    }
    const Largest largest(bits);
    const float factor = largest.factor(127.0f);
    typename V::I lanes = V::izero();
    for (int64_t c = first; c < whole; c += 16)
      V::round8(V::mul(V::convert(x, c, type), V::set1(factor)), codes + c, lanes);
    int32_t sum = V::isum(lanes);
    for (int64_t c = whole; c < until; c++) {
      const float f = load_as_float(x, c, type) * factor;
      int q = f > -128 && f < 127.5f ? (int)__builtin_nearbyintf(f) : 0;  // out of range: x is not finite
      codes[c] = (int8_t)q;
      sum += q;
    }
    scale[g] = largest.unit(127.0f);
    sums[g] = sum;
  }
}
