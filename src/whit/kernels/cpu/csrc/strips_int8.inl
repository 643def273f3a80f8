// Codes of a strip as bytes, four columns to a lane. Included after strips.inl.

// How codes lie in a turned dword: PARTS operands of every PARTS-th column each, in bytes.
template <int BITS>
struct Turned8 {
  static constexpr int PARTS = BITS == 2 ? 4 : BITS == 4 ? 2 : 1, CODES = 4 * PARTS, VECTORS = GROUP8 / CODES;
  static constexpr int BYTES = 16 * CODES * BITS / 8;  // of a row in one vector
  static ALWAYS_INLINE __m512i load(const uint8_t* p) {
    if constexpr (PARTS > 1 || BITS == 8) return _mm512_loadu_si512(p);
    else return bytes_of<BITS>(p);
  }
};

// Operand k of a vector of codes, as stored levels.
template <int BITS, bool TABLE>
struct Level8 {
  __m512i mask, table;
  explicit Level8(const Product8& p)
      : mask(_mm512_set1_epi8(BITS == 8 ? -1 : (1 << BITS) - 1)),
        table(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p.table))) {}
  ALWAYS_INLINE __m512i operator()(__m512i codes, int k) const {
    __m512i level = k ? _mm512_srli_epi16(codes, BITS * k) : codes;
    if constexpr (Turned8<BITS>::PARTS > 1) level = _mm512_and_si512(level, mask);
    return TABLE ? _mm512_shuffle_epi8(table, level) : level;
  }
};

// In which order the columns of x meet them: 4 PARTS i + PARTS j + k becomes byte j of operand k of dword i.
static __m512i order_of_fours(int bits) {
  const int parts = bits == 2 ? 4 : bits == 4 ? 2 : 1;
  uint8_t order[64];
  for (int i = 0; i < 64; i++) order[i] = (uint8_t)(i / (4 * parts) * 4 * parts + i % 4 * parts + i / 4 % parts);
  return _mm512_loadu_si512(order);
}
