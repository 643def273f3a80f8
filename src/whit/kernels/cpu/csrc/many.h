// Products of many rows of x with strips of 16 rows of a weight, one row of the weight to a lane.
#pragma once
#include "int8.h"

enum { STRIP = 16, ROWS_IN_TILE = 16, PAIRS_IN_BLOCK = 16, ROWS8_IN_TILE = 12, WIDTH8 = GROUP8 / 4 + 2, DECODED_FROM = 48 };

struct Many {
  const whit_weight* w;
  const uint32_t* x;   // (tiles, pairs, 16): pairs of bfloat16 columns of 16 rows, zeros where there are none
  const float* sums;   // (tiles, w.groups, 16): of x in the columns of a group; null where nothing needs them
  int64_t count, pairs;
  const void* bias;
  void* y;             // (count, w.rows) of `type`, like the bias
  int type;
  int strips;          // that are turned at a time
  bool decoded;        // to bfloat16, where more than 5 bits make looking a level up worth more than reading it
};

struct ManyKernels {
  // 16 rows of x, (count, columns) of `type`, from `tile` * 16 on, in the order in which codes of the weight come.
  void (*arrange)(const Many&, const void* x, int64_t tile, uint32_t* to, float* sums);
  void (*multiply)(const Many&, int64_t first, int64_t last, void* scratch);  // rows [first, last) of the weight
};

// 8-bit activations. A tile of 12 rows, or 8 or 4 at the end: per 32 columns eight dwords of codes of each row, then of
// each row -shift times their sum, then the scale.
struct Many8 {
  const Product8* p;
  const uint32_t* x;
  const float* sums;   // (tiles, w.groups, rows of the tile): scale times the sum of codes; null where nothing needs it
  int64_t width;       // dwords of a row of x
  int strips;
  bool decoded;        // to bytes, before the first of more than DECODED_FROM rows of x
};

struct ManyKernels8 {
  void (*arrange)(const Many8&, int64_t first, uint32_t* to, float* sums);  // the tile of x that begins at row `first`
  void (*multiply)(const Many8&, int64_t first, int64_t last, void* scratch);
};

static inline int64_t tile_rows8(int64_t left) { return left > 8 ? 12 : left > 4 ? 8 : 4; }

// Bytes of scratch of `multiply`: the vectors of each strip, their params, and those of 16 rows.
static inline size_t many_scratch(const whit_weight& w, int strips, int64_t vectors) {
  return (size_t)(4 * 2 * STRIP * (w.groups + 48) + strips * 64 * (vectors + 2 * w.groups) + 256);
}

extern const ManyKernels whit_many_bf16;
extern const ManyKernels8 whit_many_int8;

int whit_strips8(const Product8& p, int threads);  // as whit_product8; -1 where this processor cannot
