// The kernels, once, over a struct V of an instruction set's 16-lane vectors. Included inside an anonymous namespace.
//
// One pass streams R rows of codes past M rows of activations. A block of the stream is loaded once into 16 dwords,
// lane j of which holds the codes of columns [j CODES, (j + 1) CODES); step k looks up code k of every lane in a
// register table and multiplies it with activations that lie in the same order. So no code is moved between lanes, and
// a group's scale is applied once per block, not per weight: y += scale * (sum levels x - zero * sum x).

#if !defined(UNROLL)
#define PRAGMA(text) _Pragma(#text)
#define UNROLL(n) PRAGMA(GCC unroll n)
#endif

enum Kind { LOOK, COUNT, GATHER };  // a register table; consecutive levels, converted; a table in memory

struct Params {      // of one row of the weight
  float *scale, *zero;  // WIDE: one per group; otherwise 16 lanes per block
};

template <class V>
static void convert(const void* from, int64_t first, int64_t count, int type, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) V::store(to + i, V::convert(from, first + i, type));
  if (i && i < count) {  // the last 16 once more, rather than one by one
    V::store(to + count - 16, V::convert(from, first + count - 16, type));
    return;
  }
  for (; i < count; i++) to[i] = load_as_float(from, first + i, type);
}

// Integer zero points are streams like the codes. Writes whole runs of 16: `to` needs room for them.
template <class V>
static void unpack(const whit_weight& w, const void* stream, int bits, int64_t row, float* to) {
  int64_t stride = (w.groups * bits + 7) / 8;
  const uint8_t *p = (const uint8_t*)stream + (w.scale_stride ? row * stride : 0);
  const uint8_t *end = (const uint8_t*)stream + (w.scale_stride ? w.rows : 1) * stride;
  typename V::Window window = V::window(bits);
  uint8_t last[16];
  for (int64_t g = 0; g < w.groups; g += 16, p += 2 * bits) {
    const uint8_t* from = p;
    if (p + 16 > end) {
      memset(last, 0, sizeof last);
      memcpy(last, p, (size_t)(end - p));
      from = last;
    }
    V::store(to + g, V::to_float(V::natural(from, window)));
  }
}

// What the runs of superblocks share: to = outer (integer - bias), in float32.
template <class V>
static void super_params(const whit_weight& w, const void* outer, const uint8_t* inner, float bias, int64_t row,
                         float* to) {
  const int64_t supers = w.groups / w.subs, first = row * supers, each = 16 / w.subs;
  unpack<V>(w, inner, w.sub_bits, row, to);
  float part[32] = {};
  for (int64_t g = 0, super = 0; g < w.groups; super += 16) {
    convert<V>(outer, first + super, supers - super < 16 ? supers - super : 16, w.scale_type, part);
    for (int64_t i = 0; i < 16 && g < w.groups; i += each, g += 16)
      V::store(to + g, V::mul(V::repeat(part + i, w.subs), V::sub(V::load(to + g), V::set1(bias))));
  }
}

// The scales (and zero points, or `shift` without any) of a row, one per group, as float32; or its offsets.
template <class V>
static void group_params(const whit_weight& w, int64_t row, float shift, float* scale, float* zero) {
  if (w.subs) {
    super_params<V>(w, w.scale, w.sub_scale, (float)w.sub_bias, row, scale);
    if (w.zero) super_params<V>(w, w.zero, w.sub_min, 0, row, zero);
    else if (shift != 0)
      for (int64_t g = 0; g < w.groups; g++) zero[g] = shift;
    return;
  }
  int64_t first = row * w.scale_stride;
  if (w.scale_type == WHIT_NESTED) {
    const uint8_t* codes = (const uint8_t*)w.scale;
    float offset = *w.nested_offset;
    for (int64_t g = 0; g < w.groups; g++)
      scale[g] = w.nested_levels[codes[first + g]] * w.nested_absmax[(first + g) >> 8] + offset;
  } else {
    convert<V>(w.scale, first, w.groups, w.scale_type, scale);
  }
  if (w.zero_type == WHIT_CODES) unpack<V>(w, w.zero, w.bits, row, zero);
  else if (w.zero) convert<V>(w.zero, first, w.groups, w.zero_type, zero);
  else if (shift != 0) memset(zero, 0, (size_t)w.groups * 4);
  if (w.offsets)
    for (int64_t g = 0; g < w.groups; g++) zero[g] *= (float)w.offsets;
  else if (shift != 0)
    for (int64_t g = 0; g < w.groups; g++) zero[g] += shift;
}

// How a block finds the params of its lanes. Blocks in one group: 2^shift of them share one. Otherwise a block has `in`
// groups, each of `run` lanes; run 0: they lie spread, 16 to a block.
struct Lanes {
  int shift, run;
  int64_t in;
};

static ALWAYS_INLINE Lanes lanes_of(const whit_weight& w, int codes, int shift) {
  const int64_t size = w.group_size;
  if (16 * codes % size || size % codes || 16 % (size / codes)) return {shift, 0, 0};
  return {shift, (int)(size / codes), 16 * codes / size};
}

template <class V, bool WIDE>
static ALWAYS_INLINE typename V::F lane_params(const float* params, int64_t b, const Lanes& lanes) {
  if (WIDE) return V::set1(params[b >> lanes.shift]);
  return lanes.run ? V::repeat(params + b * lanes.in, lanes.run) : V::load(params + 16 * b);
}

// From one per group to one per lane: lane j of block b begins at column b * columns + j * codes.
template <class V>
static void spread(const whit_weight& w, const float* group, int64_t blocks, int codes, float* lanes) {
  int64_t size = w.group_size;
  if (w.groups == 1 || size % (16 * codes) == 0) {
    for (int64_t b = 0; b < blocks; b++)
      V::store(lanes + 16 * b, V::set1(group[w.groups == 1 ? 0 : b * 16 * codes / size]));
    return;
  }
  int64_t g = 0, next = size;
  for (int64_t lane = 0; lane < 16 * blocks; lane++) {
    while (lane * codes >= next) g++, next += size;
    lanes[lane] = g < w.groups ? group[g] : 0;
  }
}

static ALWAYS_INLINE int64_t padded_groups(const whit_weight& w) { return w.groups + 48; }

template <class V, int BITS, int KIND, int M, int R, bool WIDE>
static void tile(const Rows& a, int64_t row, const Params* params, const typename V::Table& table, const Lanes& lanes,
                 int64_t from, int64_t until, float* totals) {
  using B = Block<BITS>;
  constexpr int STEPS = B::CODES / V::CODES_PER_STEP;
  const whit_weight& w = *a.w;
  const uint8_t* end = w.codes + w.rows * w.row_bytes;
  const bool has_zero = (w.zero && !w.offsets) || KIND == COUNT;
  const char* x[M];
  for (int m = 0; m < M; m++) x[m] = (const char*)a.x + m * a.x_bytes;
  typename V::F total[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = from ? V::load(totals + 16 * (r * M + m)) : V::zero();
  const uint8_t* codes = w.codes + row * w.row_bytes;
  // Into the second cache: what the first can have on its way is too little for the memory's rate.
  const int64_t set = R * w.row_bytes, ahead = set <= 16384 ? 16384 / set * set : 4096;
  uint8_t last[R][LOAD_SPAN + 8];

  for (int64_t b = from; b < until; b++) {
    typename V::U bits[R];
UNROLL(4)
    for (int r = 0; r < R; r++) {
      const uint8_t* p = codes + r * w.row_bytes + b * B::BYTES;
      if (__builtin_expect(p + LOAD_SPAN > end, 0)) {
        size_t left = p < end ? (size_t)(end - p) : 0;
        memset(last[r], 0, sizeof last[r]);
        memcpy(last[r], p, left < LOAD_SPAN ? left : (size_t)LOAD_SPAN);
        p = last[r];
      } else {
        __builtin_prefetch(p + ahead, 0, 2);
      }
      bits[r] = V::template block<BITS>(p);
    }
    typename V::F acc[R][M];
UNROLL(16)
    for (int k = 0; k < STEPS; k++) {
      typename V::W weights[R];
UNROLL(4)
      for (int r = 0; r < R; r++) {
        if constexpr (KIND == LOOK) weights[r] = V::template look<BITS>(bits[r], table);
        else if constexpr (KIND == COUNT) weights[r] = V::template number<BITS>(bits[r]);
        else weights[r] = V::template gather<BITS>(bits[r], w.levels);
        bits[r] = V::template shift<BITS>(bits[r]);
      }
UNROLL(8)
      for (int m = 0; m < M; m++) {
        typename V::X xs = V::load_x(x[m] + (b * STEPS + k) * 64);
UNROLL(4)
        for (int r = 0; r < R; r++)
          acc[r][m] = k ? V::next(weights[r], xs, acc[r][m]) : V::first(weights[r], xs);
      }
    }
    if (has_zero) {
UNROLL(8)
      for (int m = 0; m < M; m++) {
        typename V::F sum = V::load(a.sums + m * a.sum_count + 16 * b);
UNROLL(4)
        for (int r = 0; r < R; r++) {
          typename V::F zero =
              w.offsets ? V::set1(-w.levels[0]) : lane_params<V, WIDE>(params[r].zero, b, lanes);
          acc[r][m] = V::fnma(zero, sum, acc[r][m]);
        }
      }
    }
    if (__builtin_expect(w.offsets, 0)) {
UNROLL(8)
      for (int m = 0; m < M; m++) {
        typename V::F sum = V::load(a.sums + m * a.sum_count + 16 * b);
UNROLL(4)
        for (int r = 0; r < R; r++) {
          typename V::F less = lane_params<V, WIDE>(params[r].zero, b, lanes);
          total[r][m] = V::fnma(less, sum, total[r][m]);
        }
      }
    }
UNROLL(4)
    for (int r = 0; r < R; r++) {
      typename V::F scale = lane_params<V, WIDE>(params[r].scale, b, lanes);
UNROLL(8)
      for (int m = 0; m < M; m++) total[r][m] = V::fma(acc[r][m], scale, total[r][m]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) V::store(totals + 16 * (r * M + m), total[r][m]);
}

template <class V, int BITS, int KIND, int M, bool WIDE>
static void stream(const Rows& a, int64_t first, int64_t last, float* scratch, int block_shift) {
  using B = Block<BITS>;
  // With several rows of activations, a few blocks of all of them stay in the first cache while SET rows pass by.
  constexpr int R = V::ROWS >= 4 && M >= 4 ? 2 : V::ROWS >= 4 || M == 1 ? V::ROWS : 1, SET = M == 1 ? R : 8;
  constexpr int64_t X_BYTES = M * (B::CODES / V::CODES_PER_STEP) * 64, CHUNK = X_BYTES < 16384 ? 16384 / X_BYTES : 1;
  const whit_weight& w = *a.w;
  const float shift = KIND == COUNT ? -w.levels[0] : 0;
  const typename V::Table table = V::table(w.levels, w.bits);
  const Lanes lanes = WIDE ? Lanes{block_shift, 0, 0} : lanes_of(w, B::CODES, 0);
  const int64_t groups = padded_groups(w), spread_lanes = WIDE || lanes.run ? 0 : 16 * a.blocks, step = M == 1 ? a.blocks : CHUNK;
  Params params[SET];
  float totals[SET * M * 16];
  for (int64_t row = first; row < last; row += SET) {
    const int count = last - row < SET ? (int)(last - row) : SET;
    for (int r = 0; r < count; r++) {
      float *scale = scratch + r * 2 * (groups + spread_lanes), *zero = scale + groups;
      params[r] = {scale, zero};
      group_params<V>(w, row + r, shift, scale, zero);
      if (WIDE) continue;
      memset(scale + w.groups, 0, (size_t)(groups - w.groups) * 4);
      memset(zero + w.groups, 0, (size_t)(groups - w.groups) * 4);
      if (lanes.run) continue;
      params[r] = {scale + 2 * groups, scale + 2 * groups + spread_lanes};
      spread<V>(w, scale, a.blocks, B::CODES, params[r].scale);
      if (w.zero || KIND == COUNT) spread<V>(w, zero, a.blocks, B::CODES, params[r].zero);
    }
    for (int64_t b = 0; b < a.blocks; b += step) {
      const int64_t until = b + step < a.blocks ? b + step : a.blocks;
      int r = 0;
      for (; r + R <= count; r += R)
        tile<V, BITS, KIND, M, R, WIDE>(a, row + r, params + r, table, lanes, b, until, totals + r * M * 16);
      for (; r < count; r++)
        tile<V, BITS, KIND, M, 1, WIDE>(a, row + r, params + r, table, lanes, b, until, totals + r * M * 16);
    }
    for (int r = 0; r < count; r++)
      for (int m = 0; m < M; m++) {
        float y = V::sum(V::load(totals + 16 * (r * M + m)));
        if (a.bias) y += load_as_float(a.bias, row + r, a.type);
        store_float(a.y, m * w.rows + row + r, y, a.type);
      }
  }
}

template <class V, int BITS, int KIND, bool WIDE>
static void stream_some(const Rows& a, int64_t first, int64_t last, float* scratch, int block_shift) {
  if (a.m == 1) return stream<V, BITS, KIND, 1, WIDE>(a, first, last, scratch, block_shift);
  if constexpr (V::SIZES & 2)
    if (a.m == 2) return stream<V, BITS, KIND, 2, WIDE>(a, first, last, scratch, block_shift);
  if constexpr (V::SIZES & 4)
    if (a.m == 4) return stream<V, BITS, KIND, 4, WIDE>(a, first, last, scratch, block_shift);
  if constexpr (V::SIZES & 8) return stream<V, BITS, KIND, 8, WIDE>(a, first, last, scratch, block_shift);
}

template <class V, int BITS, int KIND>
static void stream_rows(const Rows& a, int64_t first, int64_t last, float* scratch) {
  // WIDE: every block lies inside one group, and groups hold 2^block_shift blocks.
  int64_t columns = Block<BITS>::COLUMNS, size = a.w->group_size, count = size / columns;
  bool whole = a.w->groups == 1, wide = whole || (size % columns == 0 && (count & (count - 1)) == 0);
  int block_shift = whole ? 63 : 0;
  while (!whole && ((int64_t)1 << block_shift) < count) block_shift++;
  if constexpr (V::WIDE)
    if (wide) return stream_some<V, BITS, KIND, true>(a, first, last, scratch, block_shift);
  stream_some<V, BITS, KIND, false>(a, first, last, scratch, block_shift);
}

template <class V>
static void dot(const Rows& a, int64_t first, int64_t last, float* scratch) {
  if constexpr (V::COUNTS) {
    if (a.w->consecutive) switch (a.w->bits) {
        case 1: return stream_rows<V, 1, COUNT>(a, first, last, scratch);
        case 2: return stream_rows<V, 2, COUNT>(a, first, last, scratch);
        case 3: return stream_rows<V, 3, COUNT>(a, first, last, scratch);
        case 4: return stream_rows<V, 4, COUNT>(a, first, last, scratch);
      }
  }
  switch (a.w->bits) {
    case 1: return stream_rows<V, 1, LOOK>(a, first, last, scratch);
    case 2: return stream_rows<V, 2, LOOK>(a, first, last, scratch);
    case 3: return stream_rows<V, 3, LOOK>(a, first, last, scratch);
    case 4: return stream_rows<V, 4, LOOK>(a, first, last, scratch);
  }
  if constexpr (V::CODES_PER_STEP == 1) {
    if (a.w->consecutive) switch (a.w->bits) {
        case 5: return stream_rows<V, 5, COUNT>(a, first, last, scratch);
        case 6: return stream_rows<V, 6, COUNT>(a, first, last, scratch);
        case 7: return stream_rows<V, 7, COUNT>(a, first, last, scratch);
        default: return stream_rows<V, 8, COUNT>(a, first, last, scratch);
      }
    switch (a.w->bits) {
      case 5: return stream_rows<V, 5, GATHER>(a, first, last, scratch);
      case 6: return stream_rows<V, 6, GATHER>(a, first, last, scratch);
      case 7: return stream_rows<V, 7, GATHER>(a, first, last, scratch);
      default: return stream_rows<V, 8, GATHER>(a, first, last, scratch);
    }
  }
}

// One row in the order of its columns, rounded exactly as (levels[code] - zero) * scale in float32 and then to TYPE;
// OFFSET: as levels[code] * scale - offset.
template <class V, int KIND, int TYPE, bool ZERO, bool OFFSET = false>
static void dequantize_as(const whit_weight& w, int64_t row, const float* scale, const float* zero, void* out) {
  // Locals, since what is written through `out` might be `w` for all that the compiler knows.
  const typename V::Table table = V::table(w.levels, w.bits);
  const typename V::Window window = V::window(w.bits);
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

// Activations of one row in the order in which the kernels meet them, and their sums per lane.
template <class V>
static void arrange(const void* x, int type, int64_t columns, int bits, void* out, float* sums) {
  const int codes = bits <= 2 ? 16 : bits <= 4 ? 8 : 4;
  const int lanes = 16 * V::CODES_PER_STEP, steps = codes / V::CODES_PER_STEP;
  int64_t blocks = (columns + 16 * codes - 1) / (16 * codes);
  for (int64_t b = 0; b < blocks; b++) {
    float part[256];
    int64_t first = b * 16 * codes, count = columns - first < 16 * codes ? columns - first : 16 * codes;
    int64_t whole = count & ~(int64_t)15;
    if (V::CODES_PER_STEP == 1 || sums) {
      convert<V>(x, first, whole, type, part);
      for (int64_t i = whole; i < count; i++) part[i] = load_as_float(x, first + i, type);
      for (int64_t i = count; i < 16 * codes; i++) part[i] = 0;
    }
    if (V::CODES_PER_STEP == 1) {
      float* to = (float*)out + b * 16 * codes;
      for (int k = 0; k < steps; k++)
        for (int j = 0; j < lanes; j++) to[k * lanes + j] = part[j * steps + k];
    } else {
      uint16_t raw[256];
      memset(raw, 0, sizeof raw);
      memcpy(raw, (const uint16_t*)x + first, (size_t)count * 2);
      uint16_t* to = (uint16_t*)out + b * 16 * codes;
      for (int k = 0; k < steps; k++)
        for (int j = 0; j < lanes; j++) to[k * lanes + j] = raw[j * steps + k];
    }
    if (sums)
      for (int j = 0; j < 16; j++) {
        float s = 0;
        for (int i = 0; i < codes; i++) s += part[j * codes + i];
        sums[16 * b + j] = s;
      }
  }
}

static uint64_t read_all(const uint8_t* data, int64_t bytes) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  const uint64_t* p = (const uint64_t*)data;
  for (int64_t i = 0; i + 4 <= bytes / 8; i += 4) a ^= p[i], b ^= p[i + 1], c ^= p[i + 2], d ^= p[i + 3];
  return a ^ b ^ c ^ d;
}

template <class V>
static constexpr Kernels kernels_of() {
  return {dot<V>, dequantize<V>, arrange<V>, read_all, V::CODES_PER_STEP == 2, V::COUNTS, V::SIZES};
}
