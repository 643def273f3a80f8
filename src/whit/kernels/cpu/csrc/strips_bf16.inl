// Codes of a strip as bfloat16, a pair of columns to a lane. Included after strips.inl.

// How codes lie in a turned dword: CODES of them, of which a step takes k and k + CODES / 2.
template <int BITS>
struct Turned {
  static constexpr int CODES = BITS <= 2 ? 16 : BITS <= 4 ? 8 : 4, STEPS = CODES / 2, SHIFT = BITS <= 4 ? BITS : 8;
  static constexpr int BYTES = 16 * CODES * BITS / 8;  // of a row in one vector
  static ALWAYS_INLINE __m512i load(const uint8_t* p) {
    if constexpr (BITS <= 4) return Pairs::block<BITS>(p);
    else return bytes_of<BITS>(p);
  }
};

// 2^BITS levels in bfloat16, in registers; an index is the low BITS of each word.
template <int BITS>
struct Look {
  static constexpr int COUNT = BITS <= 5 ? 1 : 1 << (BITS - 5);
  __m512i table[COUNT];
  explicit Look(const float* levels) {
    for (int i = 0; i < COUNT; i++) {
      uint16_t t[32];
      for (int j = 0; j < 32; j++) t[j] = float_to_bf16(levels[(32 * i + j) & ((1 << BITS) - 1)]);
      table[i] = _mm512_loadu_si512(t);
    }
  }
  ALWAYS_INLINE __m512i half(__m512i index, int first) const {  // by 7 bits of the index
    __m512i low = _mm512_permutex2var_epi16(table[first], index, table[first + 1]);
    __m512i high = _mm512_permutex2var_epi16(table[first + 2], index, table[first + 3]);
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)), low, high);
  }
  ALWAYS_INLINE __m512i operator()(__m512i index) const {
    if constexpr (COUNT == 1) return _mm512_permutexvar_epi16(index, table[0]);
    else if constexpr (COUNT == 2) return _mm512_permutex2var_epi16(table[0], index, table[1]);
    else if constexpr (COUNT == 4) return half(index, 0);
    else return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(128)), half(index, 0),
                                        half(index, 4));
  }
};

// In which order the columns of x meet pairs of turned codes: word i of 32 is column order[i].
static __m512i order_of_pairs(int codes) {
  uint16_t order[32];
  for (int i = 0; i < 32; i++) {
    const int pair = i / 2 % (codes / 2);
    order[i] = (uint16_t)(i / codes * codes + pair + (i & 1) * (codes / 2));
  }
  return _mm512_loadu_si512(order);
}

// Of up to 16 rows of x, (groups, 16): sums over the columns of each group of the weight.
static void sum_groups(const whit_weight& w, const uint16_t* x, int64_t rows, float* sums) {
  for (int64_t g = 0; g < w.groups; g++, sums += 16)
    for (int64_t r = 0; r < 16; r++) {
      const int64_t size = w.groups == 1 ? w.columns : w.group_size, first = g * size;
      const int64_t until = first + size < w.columns ? first + size : w.columns;
      int64_t c = first;
      __m512 sum = _mm512_setzero_ps();
      for (; r < rows && c + 16 <= until; c += 16)
        sum = _mm512_add_ps(sum, Avx512::convert(x + r * w.columns, c, WHIT_BF16));
      sums[r] = Avx512::sum(sum);
      for (; r < rows && c < until; c++) sums[r] += bf16_to_float(x[r * w.columns + c]);
    }
}
