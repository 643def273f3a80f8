// Products of many rows of x with strips of 16 rows of a weight, one row of the weight to a lane.
#pragma once
#include "common.h"

enum { STRIP = 16, ROWS_IN_TILE = 16, PAIRS_IN_BLOCK = 16 };

struct Many {
  const whit_weight* w;
  const uint32_t* x;   // (tiles, pairs, 16): pairs of bfloat16 columns of 16 rows, zeros where there are none
  const float* sums;   // (tiles, w.groups, 16): of x in the columns of a group; null where nothing needs them
  int64_t count, pairs;
  const void* bias;
  void* y;             // (count, w.rows) of `type`, like the bias
  int type;
  int strips;          // that are decoded at a time
};

struct ManyKernels {
  // 16 rows of x, (count, columns) of `type`, from `tile` * 16 on, in the order in which codes of the weight come.
  void (*arrange)(const Many&, const void* x, int64_t tile, uint32_t* to, float* sums);
  void (*multiply)(const Many&, int64_t first, int64_t last, void* scratch);  // rows [first, last) of the weight
};

extern const ManyKernels whit_many_bf16;

// Bytes of scratch of `multiply`: codes turned, and params of each strip; params of one row.
static inline size_t many_scratch(const whit_weight& w, int strips) {
  const int64_t dwords = (w.columns + 3) / 4 + 64;  // at least 4 columns in each
  const int64_t row = 4 * 2 * (w.groups + 48), strip = 64 * dwords + 2 * 64 * w.groups;
  return (size_t)(row + strips * strip + 256);
}
