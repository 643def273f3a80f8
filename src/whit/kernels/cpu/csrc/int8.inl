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

// What ends beyond the weight is read from a copy.
template <int BYTES>
static ALWAYS_INLINE const uint8_t* within(const uint8_t* p, const uint8_t* end, uint8_t* last) {
  if (__builtin_expect(p + BYTES <= end, 1)) return p;
  memset(last, 0, 64);
  if (p < end) memcpy(last, p, (size_t)(end - p));
  return last;
}

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
    return whole(within<V::LANES * BITS / 2>(p, end, last));
  }
  ALWAYS_INLINE typename V::B whole(const uint8_t* p) const {
    typename V::B codes = V::template decode<BITS>(p, state);
    return TABLE ? V::look8(codes, table) : codes;
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

#include "int8_few.inl"
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
