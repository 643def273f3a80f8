// Products of a few rows of activations with rows of codes that stream past them. Included by kernels.inl.

// CHECKED: rows whose last blocks end too near the end of the weight for a whole load.
template <class V, int BITS, int KIND, int M, int R, bool WIDE, bool CHECKED>
static void tile(const Rows& a, int64_t row, const Params* params, const typename V::Table& shared, const Lanes& by,
                 int64_t from, int64_t until, float* totals) {
  using B = Block<BITS>;
  constexpr int STEPS = B::CODES / V::CODES_PER_STEP;
  const whit_weight& w = *a.w;
  const typename V::Table table = shared;
  const Lanes lanes = by;
  const bool has_zero = (w.zero && !w.offsets) || KIND == COUNT, one_zero = w.offsets;
  typename V::F lowered = V::set1(-w.levels[0]);  // what is to be taken off lifted levels, and off counted ones
  if constexpr (KIND == LIFT) lowered = V::set1(w.levels[0] - V::template lift<BITS>());
  const float *scale[R], *zero[R];
  typename V::F total[R][M];
UNROLL(4)
  for (int r = 0; r < R; r++) {
    scale[r] = params[r].scale, zero[r] = params[r].zero;
UNROLL(8)
    for (int m = 0; m < M; m++) total[r][m] = V::load(totals + 16 * (r * M + m));
  }
  const char* x = (const char*)a.x + from * STEPS * 64;
  const float* sums = a.sums + 16 * from;
  const int64_t x_bytes = a.x_bytes, sum_count = a.sum_count, stride = w.row_bytes;
  const uint8_t *codes = w.codes + row * stride + from * B::BYTES, *end = w.codes + w.rows * stride;
  // Into the second cache, since what the first can have on its way is too little for the memory's rate: the rows that
  // follow as they lie, which is how memory is read fastest; of long rows what follows in each.
  const int64_t set = R * stride;
  const bool in_order = set <= 65536;
  const int64_t apart = in_order ? B::BYTES : stride, step = in_order ? R * B::BYTES : B::BYTES;
  const uint8_t* next = w.codes + row * stride + from * step + (in_order ? set > 16384 ? set : 16384 : 4096);

  for (int64_t b = from; b < until; b++, codes += B::BYTES, next += step, x += STEPS * 64, sums += 16) {
    typename V::U bits[R];
UNROLL(4)
    for (int r = 0; r < R; r++) {
      const uint8_t* p = codes + r * stride;
      uint8_t last[LOAD_SPAN + 8];
      if (CHECKED && p + LOAD_SPAN > end) {
        size_t left = p < end ? (size_t)(end - p) : 0;
        memset(last, 0, sizeof last);
        memcpy(last, p, left < LOAD_SPAN ? left : (size_t)LOAD_SPAN);
        p = last;
      } else {
        __builtin_prefetch(next + r * apart, 0, 2);
      }
      bits[r] = V::template block<BITS>(p);
    }
    typename V::F acc[R][M];
    if constexpr (KIND == LIFT) {
UNROLL(8)
      for (int m = 0; m < M; m++) {
        typename V::F less = V::mul(V::load(sums + m * sum_count), lowered);
UNROLL(4)
        for (int r = 0; r < R; r++) acc[r][m] = less;
      }
    }
UNROLL(16)
    for (int k = 0; k < STEPS; k++) {
      typename V::W weights[R];
UNROLL(4)
      for (int r = 0; r < R; r++) {
        if constexpr (KIND == LIFT) weights[r] = V::template lifted<BITS>(bits[r], k, table);
        else if constexpr (KIND == LOOK) weights[r] = V::template look<BITS>(bits[r], table);
        else if constexpr (KIND == COUNT) weights[r] = V::template number<BITS>(bits[r]);
        else weights[r] = V::template gather<BITS>(bits[r], w.levels);
        if constexpr (KIND != LIFT) bits[r] = V::template shift<BITS>(bits[r]);
      }
UNROLL(8)
      for (int m = 0; m < M; m++) {
        typename V::X xs = V::load_x(x + m * x_bytes + k * 64);
UNROLL(4)
        for (int r = 0; r < R; r++)
          acc[r][m] = k || KIND == LIFT ? V::next(weights[r], xs, acc[r][m]) : V::first(weights[r], xs);
      }
    }
    if (has_zero) {
UNROLL(8)
      for (int m = 0; m < M; m++) {
        typename V::F sum = V::load(sums + m * sum_count);
UNROLL(4)
        for (int r = 0; r < R; r++) {
          typename V::F less = lowered;
          if (KIND == LIFT || !one_zero) less = lane_params<V, WIDE>(zero[r], b, lanes);
          acc[r][m] = V::fnma(less, sum, acc[r][m]);
        }
      }
    }
UNROLL(4)
    for (int r = 0; r < R; r++) {
      typename V::F factor = lane_params<V, WIDE>(scale[r], b, lanes);
UNROLL(8)
      for (int m = 0; m < M; m++) total[r][m] = V::fma(acc[r][m], factor, total[r][m]);
    }
  }
UNROLL(4)
  for (int r = 0; r < R; r++)
UNROLL(8)
    for (int m = 0; m < M; m++) V::store(totals + 16 * (r * M + m), total[r][m]);
}

// How many rows can be read in whole blocks; those after them are near the end of the weight.
template <int BITS>
static int64_t whole_rows(const Rows& a) {
  const int64_t stride = a.w->row_bytes, left = a.w->rows * stride - LOAD_SPAN - (a.blocks - 1) * Block<BITS>::BYTES;
  return left < 0 ? 0 : left / stride + 1;
}

// The sums of x in the columns of each group, zeros beyond the last one.
template <int CODES>
static void sum_groups(const Rows& a, int m, float* to) {
  const whit_weight& w = *a.w;
  const float* lanes = a.sums + m * a.sum_count;
  const int64_t all = 16 * a.blocks, each = w.groups == 1 ? all : w.group_size / CODES;
  memset(to, 0, (size_t)padded_groups(w) * 4);
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t until = (g + 1) * each < all ? (g + 1) * each : all;
    for (int64_t lane = g * each; lane < until; lane++) to[g] += lanes[lane];
  }
}

// totals (M, 16) = what a row's offsets take off, by the sums of x in the columns of each group.
template <class V, int M>
static void take_offsets(const whit_weight& w, int64_t row, float* zero, const float* group_sums, float* totals) {
  typename V::F total[M];
UNROLL(8)
  for (int m = 0; m < M; m++) total[m] = V::zero();
  const int64_t stride = padded_groups(w);
  auto take = [&](int64_t g, typename V::F offset) __attribute__((always_inline)) {
UNROLL(8)
    for (int m = 0; m < M; m++) total[m] = V::fnma(offset, V::load(group_sums + m * stride + g), total[m]);
  };
  if (w.subs) {
    super_params<V>(w, w.zero, w.sub_min, 0, row, take);
  } else {
    group_zeros<V>(w, row, 0, zero);
    V::store(zero + w.groups, V::zero());
    for (int64_t g = 0; g < w.groups; g += 16) take(g, V::load(zero + g));
  }
UNROLL(8)
  for (int m = 0; m < M; m++) V::store(totals + 16 * m, total[m]);
}

template <class V, int KIND>
static ALWAYS_INLINE typename V::Table table_of(const whit_weight& w) {
  if constexpr (KIND == LIFT) return V::lift_table(w.bits);
  else return V::table(w.levels, w.bits);
}

template <class V, int BITS, int KIND, int M, bool WIDE>
static void stream(const Rows& a, int64_t first, int64_t last, float* scratch, int block_shift) {
  using B = Block<BITS>;
  // With several rows of activations, a few blocks of all of them stay in the first cache while SET rows pass by.
  constexpr int R = V::ROWS >= 4 && M >= 4 ? 2 : V::ROWS >= 4 || M == 1 ? V::ROWS : 1, SET = M == 1 ? R : 8;
  constexpr int64_t X_BYTES = M * (B::CODES / V::CODES_PER_STEP) * 64, CHUNK = X_BYTES < 16384 ? 16384 / X_BYTES : 1;
  const whit_weight& w = *a.w;
  const float shift = KIND == COUNT ? -w.levels[0] : 0;
  const typename V::Table table = table_of<V, KIND>(w);
  const Lanes lanes = WIDE ? Lanes{block_shift, 0, 0} : lanes_of(w, B::CODES, 0);
  const int64_t groups = padded_groups(w), spread_lanes = WIDE || lanes.run ? 0 : 16 * a.blocks;
  const int64_t step = M == 1 ? a.blocks : CHUNK, whole = whole_rows<BITS>(a);
  // From an eighth of the codes on, scales asked for early come sooner than they cost; below, the processor's own care does.
  const bool beside = M == 1 && !w.subs && 8 * scale_bytes(w) >= w.row_bytes;
  Params params[SET];
  float totals[SET * M * 16];
  float* group_sums = scratch + 2 * SET * (groups + spread_lanes);
  for (int m = 0; m < M && w.offsets; m++) sum_groups<B::CODES>(a, m, group_sums + m * groups);
  for (int r = 0; r < SET; r++) {  // lanes beyond the last group: no row writes there what is not finite
    float* scale = scratch + r * 2 * (groups + spread_lanes);
    memset(scale + w.groups, 0, (size_t)(groups - w.groups) * 4);
    memset(scale + groups + w.groups, 0, (size_t)(groups - w.groups) * 4);
  }
  for (int64_t row = first; row < last; row += SET) {
    const int count = last - row < SET ? (int)(last - row) : SET;
    if (beside) ask_params(w, row, SET);
    for (int r = 0; r < count; r++) {
      float *scale = scratch + r * 2 * (groups + spread_lanes), *zero = scale + groups;
      params[r] = {scale, zero};
      group_scales<V>(w, row + r, scale);
      if (w.offsets) take_offsets<V, M>(w, row + r, zero, group_sums, totals + 16 * r * M);
      else group_zeros<V>(w, row + r, shift, zero);
      if (!w.offsets) memset(totals + 16 * r * M, 0, 64 * M);
      if (WIDE || lanes.run) continue;
      params[r] = {scale + 2 * groups, scale + 2 * groups + spread_lanes};
      spread<V>(w, scale, a.blocks, B::CODES, params[r].scale);
      if (w.zero || KIND == COUNT) spread<V>(w, zero, a.blocks, B::CODES, params[r].zero);
    }
    for (int64_t b = 0; b < a.blocks; b += step) {
      const int64_t until = b + step < a.blocks ? b + step : a.blocks;
      int r = 0;
      for (; r + R <= count && row + r + R <= whole; r += R)
        tile<V, BITS, KIND, M, R, WIDE, false>(a, row + r, params + r, table, lanes, b, until, totals + r * M * 16);
      for (; r < count; r++)
        tile<V, BITS, KIND, M, 1, WIDE, true>(a, row + r, params + r, table, lanes, b, until, totals + r * M * 16);
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
static void dot_of(const Rows& a, int64_t first, int64_t last, float* scratch) {
  if constexpr (V::COUNTS) {
    if (a.w->consecutive) switch (a.w->bits) {
        case 1: return stream_rows<V, 1, COUNT>(a, first, last, scratch);
        case 2: return stream_rows<V, 2, COUNT>(a, first, last, scratch);
        case 3: return stream_rows<V, 3, COUNT>(a, first, last, scratch);
        case 4: return stream_rows<V, 4, COUNT>(a, first, last, scratch);
      }
  }
  if constexpr (V::LIFTS) {
    if (a.w->consecutive) switch (a.w->bits) {
        case 2: return stream_rows<V, 2, LIFT>(a, first, last, scratch);
        case 3: return stream_rows<V, 3, LIFT>(a, first, last, scratch);
      }
  }
  switch (a.w->bits) {
    case 1: return stream_rows<V, 1, LOOK>(a, first, last, scratch);
    case 2: return stream_rows<V, 2, LOOK>(a, first, last, scratch);
    case 3: return stream_rows<V, 3, LOOK>(a, first, last, scratch);
    case 4: return stream_rows<V, 4, LOOK>(a, first, last, scratch);
  }
  if constexpr (V::LOOK_BITS == 6) {
    if (a.w->bits == 5) return stream_rows<V, 5, LOOK>(a, first, last, scratch);
    return stream_rows<V, 6, LOOK>(a, first, last, scratch);
  }
  if constexpr (V::CODES_PER_STEP == 1) {
    constexpr int NUMBER = V::LIFTS_MANY ? LIFT : COUNT;
    if (a.w->consecutive) switch (a.w->bits) {
        case 5: return stream_rows<V, 5, NUMBER>(a, first, last, scratch);
        case 6: return stream_rows<V, 6, NUMBER>(a, first, last, scratch);
        case 7: return stream_rows<V, 7, NUMBER>(a, first, last, scratch);
        default: return stream_rows<V, 8, NUMBER>(a, first, last, scratch);
      }
    switch (a.w->bits) {
      case 5: return stream_rows<V, 5, GATHER>(a, first, last, scratch);
      case 6: return stream_rows<V, 6, GATHER>(a, first, last, scratch);
      case 7: return stream_rows<V, 7, GATHER>(a, first, last, scratch);
      default: return stream_rows<V, 8, GATHER>(a, first, last, scratch);
    }
  }
}

template <class V>
static void dot(const Rows& a, int64_t first, int64_t last, float* scratch) {
  if constexpr (V::LOOK_BITS == 0) return stream_rows<V, 8, LIFT>(a, first, last, scratch);
  else return dot_of<V>(a, first, last, scratch);
}
