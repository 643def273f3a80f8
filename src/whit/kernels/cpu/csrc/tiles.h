// Products of many rows of x with strips of 16 rows of a weight by AMX, whose registers are tiles of 16 rows of 64 bytes.
//
// A strip is decoded, some hundred columns at a time, to what such a product takes: pairs of bfloat16 or four bytes of
// neighbouring columns of each of 16 rows. x is put into tiles of 16 rows once, in the order in which codes come.
#pragma once
#include "many.h"

// What is decoded at a time, in bytes of a row, so that two strips and two tiles of x stay in the first cache; rows of x
// for which it is decoded, so that their sums stay in the second one; strips at most.
#if !defined(TILES_TUNED)
enum { TILE_CHUNK = 512, TILE_BLOCK = 32, TILE_STRIPS = 16, FEW_CHUNK = 256, FEW_STRIPS = 2, FEW_AHEAD = 512 };
#endif

struct Tiles {
  const whit_weight* w;
  const Product8* p;    // of bytes; null for bfloat16
  const void* x;        // bfloat16 (count, columns), or null for bytes, which are p->x
  uint8_t* tiles;       // (pairs of tiles, blocks, 2, 16, columns of a block), zeros where there are none
  float* sums;          // bfloat16: (tiles, w->groups, 16) of x in the columns of a group; null where nothing needs them
  int64_t count, blocks, tile_bytes;
  const void* bias;
  void* y;              // (count, w->rows) of `type`, like the bias
  int type;
  int depth;            // columns of a block, which are multiplied at a time: 64 bytes, or 32 or 16 bfloat16
  int strips, chunk;    // decoded side by side; columns that are decoded at a time
  int ahead;            // columns between those that are decoded and those that memory is asked for
  bool whole;           // sums go on through all columns: there is one scale for each row, or
  bool folded;          // the weight itself is decoded, rounded to bfloat16
  bool counted;         // levels are consecutive, and exact in bfloat16
};

struct TileKernels {
  void (*arrange)(const Tiles&, int64_t tile);
  void (*multiply)(const Tiles&, int64_t first, int64_t last, void* scratch);  // rows [first, last) of the weight
};

extern const TileKernels whit_tiles_bf16, whit_tiles_int8;
extern const TileKernels whit_tiles_int8_few;  // for weights of bytes, as they lie

// Rows of x from which they are, and bytes up to which x stays in the second cache; strips of the weight side by side,
// where x is small; bytes of two turns' sums.
enum { LYING_FROM = 5, LYING_MOST = 1 << 20, LYING_STRIPS = 4, LYING_SUMS = 8192 };

// Rows of x, by benchmarks/results/cpu_ways_amx.md, and for bytes by cpu_int8_amx.md.
enum { TILES_FROM = 5, TILES8_FROM = 16 };
enum { AMX_BF16 = 1, AMX_INT8 = 2 };
int whit_amx(void);  // which of these this process may use

// As whit_many and whit_product8; -1 where this processor or these kernels cannot.
int whit_tiles(const whit_weight* w, const void* x, const void* bias, void* y, int64_t count, int type, bool folds,
               int threads);
int whit_tiles8(const Product8& p, int threads);
