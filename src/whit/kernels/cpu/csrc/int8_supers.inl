// Few rows of 8-bit activations past superblocks (ggml's k types), whose params take as long to be made as their codes to
// be multiplied. Included by int8_few.inl.

// R rows of the weight past M of x, as few_rows; offsets are taken off as they are made.
template <class V, int BITS, bool TABLE, int R, int M>
static ALWAYS_INLINE void super_rows(const Product8& p, const Parts8<V, BITS, TABLE>& parts, int64_t row, int64_t m0,
                                     float* scratch) {
  const whit_weight& w = *p.w;
  ask_params(w, row, R);
  const int64_t apart = padded_groups(w);
  const float* sums = p.group_sums + m0 * p.sum_stride;
  typename V::G total[R][M], less[R][M];
  EACH(r, R) {
    group_scales<V>(w, row + r, scratch + r * apart);
    V::gstore(scratch + r * apart + w.groups, V::gzero());
    EACH(m, M) { less[r][m] = V::gzero(); });
    auto take = [&](int64_t g, typename V::G offset) __attribute__((always_inline)) {
      EACH(m, M) { less[r][m] = V::fnma(offset, V::gload(sums + m * p.sum_stride + g), less[r][m]); });
    };
    if (w.offsets) super_params<V>(w, w.zero, w.sub_min, 0, row + r, take);
  });
  lane_sums8<V, BITS, TABLE, R, M, false>(p, parts, row, m0, scratch, apart, total);
  EACH(m, M) {
    typename V::G y[R];
    EACH(r, R) {
      y[r] = V::gfma(total[r][m], V::gset1(p.unit), less[r][m]);
      y[r] = shifted8<V, false>(p, m0 + m, y[r], scratch + r * apart, nullptr);
    });
    finish_rows8<V, R>(p, m0 + m, row, y);
  });
}

// A function of its own, lest the others' loops find fewer registers.
template <class V, int BITS, bool TABLE>
static __attribute__((noinline)) void supers_of(const Product8& p, int64_t first, int64_t last, float* scratch) {
  const Parts8<V, BITS, TABLE> parts(p);
  const int64_t count = p.x->count, whole = rows_within<V, BITS>(*p.w);
  int64_t row = first, m;
  for (; row + 4 <= last && row + 4 <= whole; row += 4) {
    for (m = 0; m + 2 <= count; m += 2) super_rows<V, BITS, TABLE, 4, 2>(p, parts, row, m, scratch);
    if (m < count) super_rows<V, BITS, TABLE, 4, 1>(p, parts, row, m, scratch);
  }
  for (; row < last; row++)
    for (m = 0; m < count; m++) super_rows<V, BITS, TABLE, 1, 1>(p, parts, row, m, scratch);
}
