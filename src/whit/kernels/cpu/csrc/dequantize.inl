// Rows of the weight as floats. Included by kernels.inl.

// One row in the order of its columns, rounded exactly as (levels[code] - zero) * scale in float32 and then to TYPE;
// OFFSET: as levels[code] * scale - offset.
template <class V, int KIND, int TYPE, bool ZERO, bool OFFSET = false>
static void dequantize_as(const whit_weight& w, int64_t row, const float* scale, const float* zero, void* out) {
  // Locals, since what is written through `out` might be `w` for all that the compiler knows.
  const typename V::Table table = V::table(w.levels, w.bits);
  const typename V::Window window = window_of<V>(w.bits);
  const typename V::F lowest = V::set1(w.levels[0]);
  const float* levels = w.levels;
  const int64_t columns = w.columns, size = w.group_size, bytes = 2 * w.bits;
  const uint8_t *p = w.codes + row * w.row_bytes, *end = w.codes + w.rows * w.row_bytes;
  uint8_t last[32];
  float part[16];
  auto decode = [&](const uint8_t* from, typename V::F shift, typename V::F factor) {
    typename V::U codes = V::natural(from, window);
    typename V::F f;
    if constexpr (KIND == LOOK) f = V::levels(codes, table);
    else if constexpr (KIND == COUNT) f = V::add(V::to_float(codes), lowest);
    else f = V::pick(codes, levels);
    if (OFFSET) return V::sub(V::mul(f, factor), shift);
    return V::mul(ZERO ? V::sub(f, shift) : f, factor);
  };
  for (int64_t c = 0; c < columns; scale++, zero++) {
    const int64_t until = columns - c < size ? columns : c + size;
    const typename V::F shift = V::set1(ZERO ? *zero : 0), factor = V::set1(*scale);
    for (; c + 16 <= until && p + 16 <= end; c += 16, p += bytes) V::store_as(out, c, decode(p, shift, factor), TYPE);
    for (; c < until; c += 16, p += bytes) {
      memset(last, 0, sizeof last);
      memcpy(last, p, (size_t)(end - p < 16 ? end - p : 16));
      V::store(part, decode(last, shift, factor));
      for (int64_t i = c; i < until && i < c + 16; i++) store_float(out, i, part[i - c], TYPE);
    }
    if (c > until) c = until;  // only at the end of the row: groups are multiples of 16
  }
}

template <class V, int KIND, int TYPE>
static void dequantize_kind(const whit_weight& w, int64_t row, float* scratch, void* out) {
  float *scale = scratch, *zero = scratch + padded_groups(w);
  group_params<V>(w, row, 0, scale, zero);
  if (w.offsets) dequantize_as<V, KIND, TYPE, true, true>(w, row, scale, zero, out);
  else if (w.zero) dequantize_as<V, KIND, TYPE, true>(w, row, scale, zero, out);
  else dequantize_as<V, KIND, TYPE, false>(w, row, scale, zero, out);
}

template <class V, int TYPE>
static void dequantize_type(const whit_weight& w, int64_t row, float* scratch, void* out) {
  if (w.bits <= 4) dequantize_kind<V, LOOK, TYPE>(w, row, scratch, out);
  else if (w.consecutive) dequantize_kind<V, COUNT, TYPE>(w, row, scratch, out);
  else dequantize_kind<V, GATHER, TYPE>(w, row, scratch, out);
}

template <class V>
static void dequantize(const whit_weight& w, int64_t row, float* scratch, void* out, int type) {
  if (type == WHIT_F32) dequantize_type<V, WHIT_F32>(w, row, scratch, out);
  else if (type == WHIT_BF16) dequantize_type<V, WHIT_BF16>(w, row, scratch, out);
  else dequantize_type<V, WHIT_F16>(w, row, scratch, out);
}
