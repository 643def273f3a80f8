// One row of bfloat16 past codes of base 3 as they lie, five to a byte, where a row of the weight has one scale. Included
// by avx512_bf16.cpp.
//
// x lies in blocks of 160 columns, digit by digit of 32 bytes: five vectors. A byte is 27 high + low; five tables of up
// to 27 words give the levels of its digits, each right where its column of x is.

// By the 16 bits below and above byte 2428 / 65536, about byte / 27: the first five of those below tell `low`.
struct DigitTables {
  __m512i of[5], by;
  explicit DigitTables(const float* levels) : by(_mm512_set1_epi16(2428)) {
    alignas(64) uint16_t words[5][32] = {};
    for (int byte = 0; byte < 243; byte++)
      for (int k = 0, left = byte; k < 5; k++, left /= 3)
        words[k][k < 3 ? (byte * 2428 & 0xffff) >> 11 : byte / 27] = float_to_bf16(levels[left % 3]);
    for (int k = 0; k < 5; k++) of[k] = _mm512_load_si512(words[k]);
    __asm__("" : "+v"(by));  // lest products become shifts and sums, which take longer
  }
};

static void arrange_digits(const void* from, int64_t columns, void* out) {
  const uint16_t* x = (const uint16_t*)from;
  uint16_t *to = (uint16_t*)out, last[DIGIT_COLUMNS] = {};
  for (int64_t c = 0; c < columns; c += DIGIT_COLUMNS, to += DIGIT_COLUMNS) {
    const uint16_t* block = x + c;
    if (columns - c < DIGIT_COLUMNS) block = (const uint16_t*)memcpy(last, x + c, (size_t)(2 * (columns - c)));
    for (int k = 0; k < 5; k++)
      for (int i = 0; i < 32; i++) to[32 * k + i] = block[5 * i + k];
  }
}

// acc += x times the digits of 32 bytes.
static ALWAYS_INLINE void digit_block(__m256i bytes, const DigitTables& t, const char* x, __m512 (&acc)[5]) {
  const __m512i byte = _mm512_cvtepu8_epi16(bytes), high = _mm512_mulhi_epu16(byte, t.by);
  const __m512i low = _mm512_srli_epi16(_mm512_mullo_epi16(byte, t.by), 11);
#pragma GCC unroll 5
  for (int k = 0; k < 5; k++) {
    const __m512i level = _mm512_permutexvar_epi16(k < 3 ? low : high, t.of[k]);
    acc[k] = _mm512_dpbf16_ps(acc[k], (__m512bh)level, (__m512bh)_mm512_loadu_si512(x + 64 * k));
  }
}

// The sums of R rows: each digit has its own, which are added at the end.
template <int R>
static ALWAYS_INLINE void digit_rows(const Rows& a, const DigitTables& tables, int64_t row, float* y) {
  const DigitTables t = tables;
  const int64_t stride = a.w->digit_bytes, whole = stride & ~(int64_t)(DIGIT_BYTES - 1), set = R * stride;
  const uint8_t *codes = a.w->codes + row * stride, *next = codes + (set > 16384 ? set : 16384);
  const char* x = (const char*)a.x;
  __m512 acc[R][5];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 5
    for (int k = 0; k < 5; k++) acc[r][k] = _mm512_setzero_ps();
  for (int64_t i = 0; i < whole; i += DIGIT_BYTES, x += DIGIT_X, next += R * DIGIT_BYTES) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(next + r * DIGIT_BYTES, 0, 2);
      digit_block(_mm256_loadu_si256((const __m256i*)(codes + r * stride + i)), t, x, acc[r]);
    }
  }
  const __mmask32 rest = ((__mmask32)1 << (stride - whole)) - 1;
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    if (rest) digit_block(_mm256_maskz_loadu_epi8(rest, codes + r * stride + whole), t, x, acc[r]);
    const __m512 ends = _mm512_add_ps(_mm512_add_ps(acc[r][0], acc[r][1]), _mm512_add_ps(acc[r][2], acc[r][3]));
    y[r] = Avx512::sum(_mm512_add_ps(ends, acc[r][4]));
  }
}

static void dot_digits(const Rows& a, int64_t first, int64_t last) {
  const whit_weight& w = *a.w;
  const DigitTables tables(w.levels);
  float y[2], scale;
  auto put = [&](int64_t row, float sum) {
    scale = load_as_float(w.scale, w.scale_stride * row, w.scale_type);
    float value = sum * scale;
    if (a.bias) value += load_as_float(a.bias, row, a.type);
    store_float(a.y, row, value, a.type);
  };
  int64_t row = first;
  for (; row + 2 <= last; row += 2) {
    digit_rows<2>(a, tables, row, y);
    put(row, y[0]), put(row + 1, y[1]);
  }
  if (row < last) digit_rows<1>(a, tables, row, y), put(row, y[0]);
}
