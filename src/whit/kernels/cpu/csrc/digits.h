// Codes of base 3, five to a byte (1.6 bits each), as the 2-bit codes that the kernels read: rows of the weight are
// turned a tile at a time, into room that stays in the cache, just before they are multiplied.
#pragma once
#include "common.h"

enum { DIGIT_TILE = 16384, DIGIT_SLACK = 2 * LOAD_SPAN };  // bytes of 2-bit codes at a time, and beyond the last

// The five digits of a byte, 2 bits each, the first lowest.
struct DigitTable {
  uint16_t bits[256];
  constexpr DigitTable() : bits() {
    for (int byte = 0; byte < 256; byte++)
      for (int i = 0, left = byte; i < 5; i++, left /= 3) bits[byte] = (uint16_t)(bits[byte] | left % 3 << 2 * i);
  }
};

// `to` may be written up to 16 bytes beyond the last code.
static inline void digits_by_table(const uint8_t* from, int64_t bytes, uint8_t* to) {
  static constexpr DigitTable table;
  for (int64_t i = 0; i < bytes; i += 4, to += 5) {
    uint64_t word = 0;
    for (int k = 0; k < 4 && i + k < bytes; k++) word |= (uint64_t)table.bits[from[i + k]] << 10 * k;
    memcpy(to, &word, 8);
  }
}

enum { DIGIT_BYTES = 32, DIGIT_COLUMNS = 160, DIGIT_X = 320 };  // of a block: codes, columns, and bytes of one row of x

// Whether one row of x meets the digits themselves.
static inline bool takes_digits(const Kernels& kernels, const whit_weight& w) {
  return kernels.dot_digits && w.digit_bytes && w.groups == 1 && !w.zero && w.scale_type <= WHIT_F16;
}

static inline int64_t digit_x_bytes(const whit_weight& w) {
  return (w.digit_bytes + DIGIT_BYTES - 1) / DIGIT_BYTES * DIGIT_X;
}

uint8_t* whit_digit_room(size_t bytes);  // of this thread, or null

// body(weight, first, last) for rows [first, last) in tiles, or at once where codes lie in whole bits. The weight that
// `body` gets has whole bits in these rows alone; a tile has at least so many. False: no memory.
template <class Body>
static ALWAYS_INLINE bool by_tiles(const whit_weight& w, const Kernels& kernels, int64_t first, int64_t last, Body body,
                                   int64_t least = 8) {
  if (!w.digit_bytes) {
    body(w, first, last);
    return true;
  }
  int64_t step = DIGIT_TILE / w.row_bytes & ~(int64_t)7;
  if (step < least) step = least;
  uint8_t* room = whit_digit_room((size_t)(step * w.row_bytes + DIGIT_SLACK));
  if (!room) return false;
  whit_weight part = w;
  for (int64_t row = first; row < last; row += step) {
    const int64_t until = row + step < last ? row + step : last;
    for (int64_t r = row; r < until; r++)
      kernels.digits(w.codes + r * w.digit_bytes, w.digit_bytes, room + (r - row) * w.row_bytes);
    part.codes = room - row * w.row_bytes;
    body(part, row, until);
  }
  return true;
}
