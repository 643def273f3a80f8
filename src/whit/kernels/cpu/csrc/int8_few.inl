// Few rows of 8-bit activations: the weight's rows stream past them as they lie. Included by int8.inl.

// Few rows of x take codes as they lie, in PARTS vectors of a byte to a column, to which x was put in the same order
// (`arranged`): where 8 / BITS columns lie in a byte, each in a vector of its own; where V says so 3 bits by fours. A lane
// of the products then holds 4 PARTS neighbouring columns. Other widths are spread first.
template <class V, int BITS>
static constexpr int parts_of() { return BITS == 4 ? 2 : BITS == 2 ? 4 : BITS == 3 && V::OWN_PARTS ? 2 : 1; }

template <class V>
static int parts8(int bits) {
  return bits == 4 ? parts_of<V, 4>() : bits == 3 ? parts_of<V, 3>() : bits == 2 ? parts_of<V, 2>() : 1;
}

template <class V, int BITS, bool TABLE, bool OWN = V::OWN_PARTS && BITS <= 4>
struct Parts8 {
  Decoder8<V, BITS, TABLE> decode;
  explicit Parts8(const Product8& p) : decode(p) {}
  template <int PARTS>
  ALWAYS_INLINE void operator()(const uint8_t* p, typename V::B (&level)[PARTS]) const {
    if constexpr (PARTS == 1) {
      level[0] = decode.whole(p);
    } else {
      const typename V::B bytes = V::bload((const int8_t*)p);
      EACH(i, PARTS) {
        typename V::B codes = V::template part<i * BITS>(bytes, decode.state);
        level[i] = TABLE ? V::look8(codes, decode.table) : codes;
      });
    }
  }
};
template <class V, int BITS, bool TABLE>
struct Parts8<V, BITS, TABLE, true> : V::template Parts<BITS, TABLE> {
  explicit Parts8(const Product8& p) : V::template Parts<BITS, TABLE>(p.table) {}
};

// x's codes in the order of the parts, zeros beyond the last one.
template <class V>
static void arrange8(const int8_t* codes, int64_t stride, int bits, int8_t* to, int64_t to_stride) {
  constexpr int WIDTH = V::LANES * 4;
  const int parts = parts8<V>(bits);
  for (int64_t c = 0; c < to_stride; c += parts * WIDTH) {
    typename V::B in[4], out[4];
    for (int i = 0; i < parts; i++) {
      alignas(64) static const int8_t none[64] = {0};
      in[i] = V::bload(c + i * WIDTH < stride ? codes + c + i * WIDTH : none);
    }
    if (parts == 1) {
      out[0] = in[0];
    } else if (bits == 3) {
      if constexpr (V::OWN_PARTS) V::halve_words(in[0], in[1], out[0], out[1]);
    } else if (parts == 2) {
      V::halve(in[0], in[1], out[0], out[1]);
    } else {
      typename V::B even[2], odd[2];
      V::halve(in[0], in[1], even[0], odd[0]), V::halve(in[2], in[3], even[1], odd[1]);
      V::halve(even[0], even[1], out[0], out[2]), V::halve(odd[0], odd[1], out[1], out[3]);
    }
    for (int i = 0; i < parts; i++) V::bstore((uint8_t*)to + c + i * WIDTH, out[i]);
  }
}

// How the bytes of `BITS` bits lie in steps of whole parts.
template <class V, int BITS>
struct Step8 {
  static constexpr int PARTS = parts_of<V, BITS>(), COLUMNS = V::LANES * 4 * PARTS, BYTES = COLUMNS * BITS / 8;
};

// Ask for codes that are to come. Whole bytes mostly come as fast as memory gives them: one row after the other is what
// AMD's prefetcher takes for a stream, and other requests, or several rows at once, only stand in its way; Intel's ends at
// every page, and is asked `ahead`.
template <int BITS>
static ALWAYS_INLINE void ask(const uint8_t* codes, int64_t ahead) {
  if (BITS < 8) __builtin_prefetch(codes + 16384, 0, 2);
  else if (ahead) __builtin_prefetch(codes + ahead, 0, 2);
}

// y, sums of lanes, with what the shifts, zero points and offsets of the levels take from it; without OFFSETS those are
// taken already.
template <class V, bool OFFSETS = true>
static ALWAYS_INLINE typename V::G shifted8(const Product8& p, int64_t m, typename V::G y, const float* scale,
                                            const float* zero) {
  const whit_weight& w = *p.w;
  const float* sums = p.group_sums + m * p.sum_stride;
  const typename V::G shift = V::gset1(-p.unit * (float)p.shift), minus = V::gset1(-1.0f);
  if constexpr (OFFSETS)
    for (int64_t g = 0; g < w.groups && w.offsets; g += V::LANES)
      y = V::gfma(V::gmul(V::gload(zero + g), minus), V::gload(sums + g), y);
  if (!p.shift && (w.offsets || !w.zero)) return y;
  for (int64_t g = 0; g < w.groups; g += V::LANES) {
    typename V::G by = w.zero && !w.offsets ? V::gfma(V::gload(zero + g), minus, shift) : shift;
    y = V::gfma(V::gmul(V::gload(scale + g), by), V::gload(sums + g), y);
  }
  return y;
}

// Exact integers: a row of the weight and M of x, each with one scale.
template <class V, int BITS, bool TABLE, int M>
static ALWAYS_INLINE void whole_rows8(const Product8& p, const Parts8<V, BITS, TABLE>& parts, int64_t row, int64_t m0,
                                      float* scratch) {
  using S = Step8<V, BITS>;
  constexpr bool SMALL = small_levels<V, BITS, TABLE>();
  const whit_weight& w = *p.w;
  const int64_t steps = (w.columns + S::COLUMNS - 1) / S::COLUMNS;
  const uint8_t *codes = w.codes + row * w.row_bytes, *end = w.codes + w.rows * w.row_bytes;
  const int8_t* q[M];
  typename V::I acc[M];
  EACH(m, M) { q[m] = p.arranged + (m0 + m) * p.arranged_stride, acc[m] = V::izero(); });
  group_params<V>(w, row, 0, scratch, scratch + padded_groups(w));
  for (int64_t s = 0; s < steps; s++) {
    ask<BITS>(codes + s * S::BYTES, p.ahead);
    uint8_t last[64];
    typename V::B level[S::PARTS];
    parts(within<S::BYTES>(codes + s * S::BYTES, end, last), level);
    EACH(m, M) {
      EACH(i, S::PARTS) {
        acc[m] = V::template dot<SMALL>(acc[m], level[i], V::bload(q[m] + s * S::COLUMNS + i * V::LANES * 4));
      });
    });
  }
  EACH(m, M) {
    finish_row8(p, m0 + m, row, V::isum(acc[m]) - p.shift * p.x->sums[m0 + m], scratch[0] * p.unit);
  });
}

// The params of R rows, one per group, zeros beyond the last one: `scale` and `zero` of the first; returns how far those
// of the next row lie.
template <class V, int R>
static ALWAYS_INLINE int64_t row_params8(const whit_weight& w, int64_t row, float* scratch, float*& scale,
                                         float*& zero) {
  scale = zero = scratch;
  if (!w.subs && !w.zero && w.scale_type != WHIT_NESTED && w.scale_stride == w.groups) {  // rows lie side by side
    convert<V>(w.scale, row * w.groups, R * w.groups, w.scale_type, scratch);
    V::gstore(scratch + R * w.groups, V::gzero());
    return w.groups;
  }
  const int64_t groups = padded_groups(w);
  zero = scratch + groups;
  for (int r = 0; r < R; r++, scratch += 2 * groups) {
    group_params<V>(w, row + r, 0, scratch, scratch + groups);
    V::gstore(scratch + w.groups, V::gzero()), V::gstore(scratch + groups + w.groups, V::gzero());
  }
  return 2 * groups;
}

// total = the sums of lanes of R rows of codes past M of x. WIDE: all lanes of 2^shift steps share a scale of the weight;
// otherwise runs of 2^shift lanes do.
template <class V, int BITS, bool TABLE, int R, int M, bool WIDE>
static ALWAYS_INLINE void lane_sums8(const Product8& p, const Parts8<V, BITS, TABLE>& parts, int64_t row, int64_t m0,
                                     const float* scale, int64_t apart, typename V::G (&total)[R][M]) {
  using S = Step8<V, BITS>;
  constexpr bool SMALL = small_levels<V, BITS, TABLE>();
  const whit_weight& w = *p.w;
  const int64_t steps = (w.columns + S::COLUMNS - 1) / S::COLUMNS, size = w.group_size, stride = w.row_bytes;
  const int shift = w.groups == 1 ? 62 : __builtin_ctzll((uint64_t)(WIDE ? size / S::COLUMNS : size / (4 * S::PARTS)));
  const int64_t in_step = WIDE ? 0 : S::COLUMNS / size;
  const uint8_t *codes = w.codes + row * stride, *end = w.codes + w.rows * stride;
  // Into the second cache, since what the first can have on its way is too little for the memory's rate: the rows that
  // follow as they lie, which is how memory is read fastest.
  const uint8_t* next = codes + (R * stride > 16384 ? R * stride : 16384);
  const int8_t* q = p.arranged + m0 * p.arranged_stride;
  const float* by = p.lanes + m0 * p.lane_stride;
  constexpr bool ONCE = scales_once(BITS);
  constexpr int SCALES = ONCE ? S::COLUMNS / GROUP8 : V::LANES;  // of x, in a step
  typename V::G sums[R][M];
  EACH(r, R) { EACH(m, M) { sums[r][m] = V::gzero(); }); });
  for (int64_t s = 0; s < steps; s++, codes += S::BYTES, next += R * S::BYTES, q += S::COLUMNS, by += SCALES) {
    const float* own_scale = scale + (WIDE ? s >> shift : s * in_step);
    typename V::B x[M][S::PARTS];
    EACH(m, M) {
      EACH(i, S::PARTS) { x[m][i] = V::bload(q + m * p.arranged_stride + i * V::LANES * 4); });
    });
    EACH(r, R) {
      const uint8_t* from = codes + r * stride;
      uint8_t last[64];
      if (BITS < 8) __builtin_prefetch(next + r * S::BYTES, 0, 2);
      __asm__ volatile("" ::: "memory");  // lest all be asked for at once, which cold weights come an eighth slower by
      if (R == 1) from = within<S::BYTES>(from, end, last);
      typename V::B level[S::PARTS];
      parts(from, level);
      const float* scales = own_scale + r * apart;
      typename V::G own;
      if constexpr (WIDE) own = V::gset1(*scales);
      else own = V::template grepeat<S::COLUMNS / GROUP8>(scales, shift);
      EACH(m, M) {
        typename V::I dot = V::izero();
        EACH(i, S::PARTS) { dot = V::template dot<SMALL>(dot, level[i], x[m][i]); });
        const float* of_x = by + m * p.lane_stride;
        const typename V::G each = ONCE ? V::template grepeat<2>(of_x, 3) : V::gload(of_x);
        sums[r][m] = V::gfma(V::gmul(V::to_g(dot), each), own, sums[r][m]);
      });
    });
  }
  EACH(r, R) { EACH(m, M) { total[r][m] = sums[r][m]; }); });
}

template <class V, int R>
static ALWAYS_INLINE void finish_rows8(const Product8& p, int64_t m, int64_t row, const typename V::G (&sums)[R]) {
  if constexpr (R == 4) {
    float y[4];
    V::gsum4(sums, y);
    EACH(r, 4) { finish8(p, m, row + r, y[r]); });
  } else {
    EACH(r, R) { finish8(p, m, row + r, V::gsum(sums[r])); });
  }
}

// R rows of the weight past M of x: what is read of x serves all of them, and the sums at the end overlap. Several rows
// have all their steps within the weight.
template <class V, int BITS, bool TABLE, int R, int M>
static ALWAYS_INLINE void few_rows(const Product8& p, const Parts8<V, BITS, TABLE>& parts, int64_t row, int64_t m0,
                                   float* scratch) {
  const whit_weight& w = *p.w;
  if (BITS < 8) ask_params(w, row, R);
  float *scale, *zero;
  const int64_t apart = row_params8<V, R>(w, row, scratch, scale, zero);
  typename V::G total[R][M];
  if (w.groups == 1 || w.group_size >= Step8<V, BITS>::COLUMNS)
    lane_sums8<V, BITS, TABLE, R, M, true>(p, parts, row, m0, scale, apart, total);
  else lane_sums8<V, BITS, TABLE, R, M, false>(p, parts, row, m0, scale, apart, total);
  EACH(m, M) {
    typename V::G sums[R];
    EACH(r, R) {
      const typename V::G y = V::gmul(total[r][m], V::gset1(p.unit));
      sums[r] = shifted8<V>(p, m0 + m, y, scale + r * apart, zero + r * apart);
    });
    finish_rows8<V, R>(p, m0 + m, row, sums);
  });
}

// How many rows have all their steps within the weight.
template <class V, int BITS>
static int64_t rows_within(const whit_weight& w) {
  using S = Step8<V, BITS>;
  const int64_t own = (w.columns + S::COLUMNS - 1) / S::COLUMNS * S::BYTES, left = w.rows * w.row_bytes - own;
  return left < 0 ? 0 : left / w.row_bytes + 1;
}

#include "int8_supers.inl"

template <class V, int BITS, bool TABLE, bool GROUPED>
static void few_of(const Product8& p, int64_t first, int64_t last, float* scratch) {
  if constexpr (V::SUPERS && GROUPED && BITS >= 4 && BITS < 8)
    if (p.w->subs) return supers_of<V, BITS, TABLE>(p, first, last, scratch);
  const Parts8<V, BITS, TABLE> parts(p);
  const int64_t count = p.x->count;
  int64_t row = first, m;
  if constexpr (GROUPED) {
    const int64_t whole = BITS < 8 ? rows_within<V, BITS>(*p.w) : 0;
    if constexpr (BITS < 8)
      for (; row + 4 <= last && row + 4 <= whole; row += 4) {
        for (m = 0; m + 2 <= count; m += 2) few_rows<V, BITS, TABLE, 4, 2>(p, parts, row, m, scratch);
        if (m < count) few_rows<V, BITS, TABLE, 4, 1>(p, parts, row, m, scratch);
      }
    for (; row < last; row++) {
      m = 0;
      if constexpr (BITS == 8)
        for (; m + 2 <= count; m += 2) few_rows<V, BITS, TABLE, 1, 2>(p, parts, row, m, scratch);
      for (; m < count; m++) few_rows<V, BITS, TABLE, 1, 1>(p, parts, row, m, scratch);
    }
  } else {
    for (; row < last; row++) {
      for (m = 0; m + 2 <= count; m += 2) whole_rows8<V, BITS, TABLE, 2>(p, parts, row, m, scratch);
      if (m < count) whole_rows8<V, BITS, TABLE, 1>(p, parts, row, m, scratch);
    }
  }
}
