// What products by strips share: codes of 16 rows turned, their params, and results stored. Included after kernels.inl.

// 64 neighbouring codes as bytes, from 8 BITS bytes.
template <int BITS>
static ALWAYS_INLINE __m512i bytes_of(const uint8_t* p) {
  if constexpr (BITS == 8) return _mm512_loadu_si512(p);
  alignas(64) uint8_t from[64], shift[64];
  for (int i = 0; i < 64; i++) from[i] = (uint8_t)(i / 8 * BITS + i % 8), shift[i] = (uint8_t)(i % 8 * BITS);
  __m512i v = _mm512_maskz_loadu_epi8((__mmask64)-1 >> (64 - 8 * BITS), p);
  v = _mm512_multishift_epi64_epi8(_mm512_load_si512(shift), _mm512_permutexvar_epi8(_mm512_load_si512(from), v));
  return _mm512_and_si512(v, _mm512_set1_epi8((1 << BITS) - 1));
}

// The codes of 16 rows, turned, of the vectors [from, until), multiples of 16. Rows that are not there stand for the last
// one. `put(i, vector)` takes them in order.
template <class T, class Put>
static ALWAYS_INLINE void turn(const whit_weight& w, int64_t row, int64_t from, int64_t until, const Put& put) {
  const uint8_t* end = w.codes + w.rows * w.row_bytes;
  for (int64_t c = from, at = from / 16 * T::BYTES; c < until; c += 16, at += T::BYTES) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; r++) {
      const int64_t own = row + r < w.rows ? row + r : w.rows - 1;
      const uint8_t* p = w.codes + own * w.row_bytes + at;
      uint8_t last[64];
      if (__builtin_expect(p + 64 > end, 0)) {
        memset(last, 0, sizeof last);
        memcpy(last, p, (size_t)(end - p < 64 ? end - p : 64));
        p = last;
      }
      v[r] = T::load(p);
    }
    transpose16(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) put(c + i, v[i]);
  }
}

// 16 runs of `count` floats, of which each(r, g) gives 16, as (count, 16).
template <class Each>
static ALWAYS_INLINE void turn_floats(int64_t count, float* to, const Each& each) {
  for (int64_t g = 0; g < count; g += 16) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; r++) v[r] = _mm512_castps_si512(each(r, g));
    transpose16(v);
    if (count - g >= 16) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + 16 * (g + i), v[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        if (g + i < count) _mm512_storeu_si512(to + 16 * (g + i), v[i]);
    }
  }
}

// Of 16 rows, (groups, 16): scales times `unit`; `less`, what is taken off for every unit of the sum of x: (zero + shift)
// scale, or the offset. `own` has room for those of all rows.
static void strip_params(const whit_weight& w, int64_t row, float unit, float* own, float* scale, float* less) {
  const int64_t room = padded_groups(w);
  for (int64_t r = 0; r < STRIP; r++)
    group_params<Avx512>(w, row + r < w.rows ? row + r : w.rows - 1, 0, own + 2 * r * room, own + (2 * r + 1) * room);
  turn_floats(w.groups, scale, [&](int r, int64_t g) __attribute__((always_inline)) {
    return _mm512_mul_ps(_mm512_loadu_ps(own + 2 * r * room + g), _mm512_set1_ps(unit));
  });
  if (!w.zero) return;
  turn_floats(w.groups, less, [&](int r, int64_t g) __attribute__((always_inline)) {
    const __m512 zero = _mm512_loadu_ps(own + (2 * r + 1) * room + g);
    return w.offsets ? zero : _mm512_mul_ps(zero, _mm512_loadu_ps(own + 2 * r * room + g));
  });
}

// Asks for the lines that finish_strip will write, which are too far apart to be foreseen.
static ALWAYS_INLINE void expect_strip(const whit_weight& w, void* y, int type, int64_t m0, int64_t count, int64_t row) {
  const int64_t element = type == WHIT_F32 ? 4 : 2;
  for (int64_t m = 0; m < count; m++) __builtin_prefetch((char*)y + ((m0 + m) * w.rows + row) * element, 1, 3);
}

// y[m0 + m][row + r] = total[m][r] + bias, of `count` rows of x.
static void finish_strip(const whit_weight& w, const void* bias, void* y, int type, int64_t m0, int64_t count,
                         int64_t row, const __m512* total) {
  const int64_t rows = w.rows - row < STRIP ? w.rows - row : STRIP;
  const __m512 own = bias && rows == STRIP ? Avx512::convert(bias, row, type) : _mm512_setzero_ps();
  for (int64_t m = 0; m < count; m++) {
    const int64_t at = (m0 + m) * w.rows + row;
    if (rows == STRIP) {
      Avx512::store_as(y, at, _mm512_add_ps(total[m], own), type);
      continue;
    }
    float part[16];
    _mm512_storeu_ps(part, total[m]);
    for (int64_t r = 0; r < rows; r++)
      store_float(y, at + r, part[r] + (bias ? load_as_float(bias, row + r, type) : 0), type);
  }
}
