// The params of a row of the weight in float32, one per group, and how the lanes of a block find theirs. Included by
// kernels.inl.

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

// How 16 neighbouring codes of any width are spread to lanes: made once, since that takes longer than a row's params.
template <class V>
static const typename V::Window& window_of(int bits) {
  struct Windows {
    typename V::Window of[9];
    Windows() {
      for (int i = 1; i <= 8; i++) of[i] = V::window(i);
    }
  };
  static const Windows windows;
  return windows.of[bits];
}

// Integer zero points are streams like the codes. Writes whole runs of 16: `to` needs room for them.
template <class V>
static void unpack(const whit_weight& w, const void* stream, int bits, int64_t row, float* to) {
  int64_t stride = (w.groups * bits + 7) / 8;
  const uint8_t *p = (const uint8_t*)stream + (w.scale_stride ? row * stride : 0);
  const uint8_t *end = (const uint8_t*)stream + (w.scale_stride ? w.rows : 1) * stride;
  const typename V::Window window = window_of<V>(bits);
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

// What the runs of superblocks share: outer (integer - bias), in float32; SUBS is w.subs. put(g, params) takes those of
// 16 runs from g on, zeros after the last one.
template <class V, int SUBS, bool BIASED, class Put>
static ALWAYS_INLINE void super_params_of(const whit_weight& w, const void* outer, const uint8_t* inner, float bias,
                                          int64_t row, const Put& put) {
  enum { EACH = 16 / SUBS };  // superblocks in 16 runs
  const int bytes = 2 * w.sub_bits;
  const int64_t supers = w.groups / SUBS, stride = (w.groups * w.sub_bits + 7) / 8;
  const uint8_t *p = inner + row * stride, *end = inner + w.rows * stride;
  const typename V::Window window = window_of<V>(w.sub_bits);
  const typename V::F less = V::set1(bias);
  float part[16 + EACH];
  for (int64_t super = 0; super < supers; super += 16) {
    const int64_t first = row * supers + super, count = supers - super < 16 ? supers - super : 16;
    if (first + 16 <= w.rows * supers) V::store(part, V::convert(outer, first, w.scale_type));
    else
      for (int64_t i = 0; i < count; i++) part[i] = load_as_float(outer, first + i, w.scale_type);
    part[count] = 0;
    for (int64_t i = 0; i < count; i += EACH, p += bytes) {
      const uint8_t* from = p;
      uint8_t last[16];
      if (__builtin_expect(p + 16 > end, 0)) {
        memset(last, 0, sizeof last);
        memcpy(last, p, (size_t)(end - p));
        from = last;
      }
      typename V::F number = V::to_float(V::natural(from, window));
      if (BIASED) number = V::sub(number, less);
      put((super + i) * SUBS, V::mul(V::template repeat_of<SUBS>(part + i), number));
    }
  }
}

template <class V, class Put>
static ALWAYS_INLINE void super_params(const whit_weight& w, const void* outer, const uint8_t* inner, int bias,
                                       int64_t row, const Put& put) {
  if constexpr (V::SUPERS) {
    if (w.subs == 8 && bias) V::template supers<8, true>(w, outer, inner, (float)bias, row, put);
    else if (w.subs == 8) V::template supers<8, false>(w, outer, inner, 0, row, put);
    else if (bias) V::template supers<16, true>(w, outer, inner, (float)bias, row, put);
    else V::template supers<16, false>(w, outer, inner, 0, row, put);
  } else if (w.subs == 8) {
    if (bias) super_params_of<V, 8, true>(w, outer, inner, (float)bias, row, put);
    else super_params_of<V, 8, false>(w, outer, inner, 0, row, put);
  } else {
    if (bias) super_params_of<V, 16, true>(w, outer, inner, (float)bias, row, put);
    else super_params_of<V, 16, false>(w, outer, inner, 0, row, put);
  }
}

// The scales of a row, one per group, as float32.
template <class V>
static void group_scales(const whit_weight& w, int64_t row, float* scale) {
  const int64_t first = row * w.scale_stride;
  if (w.subs) {
    super_params<V>(w, w.scale, w.sub_scale, w.sub_bias, row,
                    [&](int64_t g, typename V::F f) __attribute__((always_inline)) { V::store(scale + g, f); });
  } else if (w.scale_type == WHIT_NESTED) {
    const uint8_t* codes = (const uint8_t*)w.scale;
    float offset = *w.nested_offset;
    for (int64_t g = 0; g < w.groups; g++)
      scale[g] = w.nested_levels[codes[first + g]] * w.nested_absmax[(first + g) >> 8] + offset;
  } else {
    convert<V>(w.scale, first, w.groups, w.scale_type, scale);
  }
}

// Their zero points plus `shift`, or `shift` without any; or their offsets.
template <class V>
static void group_zeros(const whit_weight& w, int64_t row, float shift, float* zero) {
  if (w.zero && w.subs)
    return super_params<V>(w, w.zero, w.sub_min, 0, row,
                           [&](int64_t g, typename V::F f) __attribute__((always_inline)) { V::store(zero + g, f); });
  if (w.zero_type == WHIT_CODES) unpack<V>(w, w.zero, w.bits, row, zero);
  else if (w.zero) convert<V>(w.zero, row * w.scale_stride, w.groups, w.zero_type, zero);
  else if (shift != 0) memset(zero, 0, (size_t)w.groups * 4);
  if (w.offsets)
    for (int64_t g = 0; g < w.groups; g += 16) V::store(zero + g, V::mul(V::load(zero + g), V::set1((float)w.offsets)));
  else if (shift != 0)
    for (int64_t g = 0; g < w.groups; g += 16) V::store(zero + g, V::add(V::load(zero + g), V::set1(shift)));
}

template <class V>
static void group_params(const whit_weight& w, int64_t row, float shift, float* scale, float* zero) {
  group_scales<V>(w, row, scale);
  group_zeros<V>(w, row, shift, zero);
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

// Ask for what lies beside the codes of `count` rows: too little a row for the processor to see a stream.
static ALWAYS_INLINE void ask_run(const void* data, int64_t row, int64_t count, int64_t bytes) {
  const char *p = (const char*)data + row * bytes, *until = p + count * bytes;
  for (; p < until; p += 64) __builtin_prefetch(p, 0, 2);
}

// Of the scales of a row, without those of its sub-groups.
static ALWAYS_INLINE int64_t scale_bytes(const whit_weight& w) {
  const int64_t groups = w.subs ? w.groups / w.subs : w.groups;
  return groups * (w.scale_type == WHIT_NESTED ? 1 : w.scale_type == WHIT_F32 ? 4 : 2);
}

// Of `count` rows, as far behind `row` as codes are asked for: 16 KB, or where the rows that follow begin.
static ALWAYS_INLINE void ask_params(const whit_weight& w, int64_t row, int64_t count) {
  if (!w.scale_stride || w.row_bytes <= 0) return;
  const int64_t groups = w.subs ? w.groups / w.subs : w.groups;
  row += count * w.row_bytes > 16384 ? count : 16384 / w.row_bytes;
  ask_run(w.scale, row, count, scale_bytes(w));
  if (w.zero)
    ask_run(w.zero, row, count, w.zero_type == WHIT_CODES ? (groups * w.bits + 7) / 8 : groups * (w.zero_type ? 2 : 4));
  if (w.sub_scale) ask_run(w.sub_scale, row, count, (w.groups * w.sub_bits + 7) / 8);
  if (w.sub_min) ask_run(w.sub_min, row, count, (w.groups * w.sub_bits + 7) / 8);
}
