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

// A register table; consecutive levels, converted; a table in memory; consecutive levels, moved up by V::lift.
enum Kind { LOOK, COUNT, GATHER, LIFT };

#include "params.inl"
#include "stream.inl"
#include "dequantize.inl"

// Activations of one row in the order in which the kernels meet them, and their sums per lane.
template <class V>
static void arrange(const void* x, int type, int64_t columns, int bits, void* out, float* sums) {
  const int codes = bits <= 2 ? 16 : bits <= 4 ? 8 : 4;
  static_assert(V::CODES_PER_STEP == 1, "pairs of codes have an order of their own");
  int64_t blocks = (columns + 16 * codes - 1) / (16 * codes);
  for (int64_t b = 0; b < blocks; b++) {
    float part[256];
    int64_t first = b * 16 * codes, count = columns - first < 16 * codes ? columns - first : 16 * codes;
    int64_t whole = count & ~(int64_t)15;
    convert<V>(x, first, whole, type, part);
    for (int64_t i = whole; i < count; i++) part[i] = load_as_float(x, first + i, type);
    for (int64_t i = count; i < 16 * codes; i++) part[i] = 0;
    float* to = (float*)out + b * 16 * codes;
    for (int k = 0; k < codes; k++)
      for (int j = 0; j < 16; j++) to[k * 16 + j] = part[j * codes + k];
    if (sums)
      for (int j = 0; j < 16; j++) {
        float s = 0;
        for (int i = 0; i < codes; i++) s += part[j * codes + i];
        sums[16 * b + j] = s;
      }
  }
}

// Groups of columns as round(x 127 / max|x|) max|x| / 127, halves to even; a group that is not finite is NaN.
template <class V>
static void round_row(const void* x, int type, int64_t columns, int64_t size, void* out, int out_type) {
  const typename V::F magic = V::set1(12582912.0f);  // 1.5 2^23: added to small numbers, it rounds them
  float part[256], lane[16];
  for (int64_t first = 0; first < columns; first += size) {
    const int64_t count = columns - first < size ? columns - first : size, padded = (count + 15) & ~(int64_t)15;
    for (int64_t i = count; i < padded; i++) part[i] = 0;
    convert<V>(x, first, count, type, part);
    typename V::F most = V::zero(), none = V::zero();
    for (int64_t i = 0; i < padded; i += 16) {
      const typename V::F some = V::load(part + i);
      most = V::most(most, V::most(some, V::sub(V::zero(), some)));
      none = V::add(none, V::mul(some, V::zero()));  // NaN where a number is not finite
    }
    V::store(lane, most);
    float largest = 0;
    for (int i = 0; i < 16; i++) largest = lane[i] > largest ? lane[i] : largest;
    const typename V::F factor = V::set1(largest > 0 ? 1.0f / largest * 127.0f : 0);  // in the two steps that torch takes
    const typename V::F scale = V::set1(largest / 127.0f + V::sum(none));
    for (int64_t i = 0; i < padded; i += 16) {
      const typename V::F q = V::sub(V::add(V::mul(V::load(part + i), factor), magic), magic);
      V::store(part + i, V::mul(q, scale));
    }
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) V::store_as(out, first + i, V::load(part + i), out_type);
    for (; i < count; i++) store_float(out, first + i, part[i], out_type);
  }
}

template <class V>
static constexpr Kernels kernels_of() {
  return {dot<V>, dequantize<V>, arrange<V>, round_row<V>, 0, V::COUNTS, V::digits, V::SIZES};
}
