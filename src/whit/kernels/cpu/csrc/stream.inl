// Products of a few rows of activations with rows of codes that stream past them. Included by kernels.inl.

template <class V, int BITS, int KIND, int M, int R, bool WIDE>
static void tile(const Rows& a, int64_t row, const Params* params, const typename V::Table& table, const Lanes& lanes,
                 int64_t from, int64_t until, float* totals) {
  using B = Block<BITS>;
  constexpr int STEPS = B::CODES / V::CODES_PER_STEP;
  const whit_weight& w = *a.w;
  const uint8_t* end = w.codes + w.rows * w.row_bytes;
  const bool has_zero = (w.zero && !w.offsets) || KIND == COUNT;
  typename V::F lowered = V::zero();  // what is to be taken off lifted levels
  if constexpr (KIND == LIFT) lowered = V::set1(w.levels[0] - V::template lift<BITS>());
  const char* x[M];
  for (int m = 0; m < M; m++) x[m] = (const char*)a.x + m * a.x_bytes;
  typename V::F total[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = V::load(totals + 16 * (r * M + m));
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
    if constexpr (KIND == LIFT) {
UNROLL(8)
      for (int m = 0; m < M; m++) {
        typename V::F less = V::mul(V::load(a.sums + m * a.sum_count + 16 * b), lowered);
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
        typename V::X xs = V::load_x(x[m] + (b * STEPS + k) * 64);
UNROLL(4)
        for (int r = 0; r < R; r++)
          acc[r][m] = k || KIND == LIFT ? V::next(weights[r], xs, acc[r][m]) : V::first(weights[r], xs);
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
  const int64_t groups = padded_groups(w), spread_lanes = WIDE || lanes.run ? 0 : 16 * a.blocks, step = M == 1 ? a.blocks : CHUNK;
  Params params[SET];
  float totals[SET * M * 16];
  float* group_sums = scratch + 2 * SET * (groups + spread_lanes);
  for (int m = 0; m < M && w.offsets; m++) sum_groups<B::CODES>(a, m, group_sums + m * groups);
  for (int64_t row = first; row < last; row += SET) {
    const int count = last - row < SET ? (int)(last - row) : SET;
    for (int r = 0; r < count; r++) {
      float *scale = scratch + r * 2 * (groups + spread_lanes), *zero = scale + groups;
      params[r] = {scale, zero};
      group_params<V>(w, row + r, shift, scale, zero);
      if (w.offsets) V::store(zero + w.groups, V::zero());
      for (int m = 0; m < M; m++) {
        typename V::F total = V::zero();  // offsets are taken off once per row, by the sums of groups
        for (int64_t g = 0; g < w.groups && w.offsets; g += 16)
          total = V::fnma(V::load(zero + g), V::load(group_sums + m * groups + g), total);
        V::store(totals + 16 * (r * M + m), total);
      }
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
