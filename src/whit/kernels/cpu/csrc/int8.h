// Products of 8-bit activations: the plan of a call, and the kernels of an instruction set.
//
//   y[m][n] = sum over groups of  scale_m scale_n (sum level q)  -  offset_n (scale_m sum q),   q the codes of x
//
// Levels are codes that the weight stores, or small integers in a table; sums of products are exact int32.
#pragma once
#include <type_traits>
#include <utility>

#include "common.h"

// Columns that x is padded to; columns that share a scale; rows at a time, and columns of them.
enum { STEP8 = 64, GROUP8 = 32, WIDE8 = 48, CHUNK8 = 4096 };

typedef struct {
  const int8_t* codes;   // (count, stride), zeros beyond the last column
  const float* scale;    // (count, groups)
  const int32_t* sums;   // (count, groups): of the codes
  const int32_t* zero;   // (count), with one group only; or null
  int64_t count, stride, groups;  // groups: 1, or one per 32 columns
} whit_rows8;

// Whether few rows of whole bytes find the scales of x by their lanes: as often as there are lanes, those of a row would
// take as much of the first cache as its codes, and rows of the weight come one by one.
static constexpr bool scales_once(int bits) { return bits == 8; }

struct Product8 {
  const whit_weight* w;
  const whit_rows8* x;
  const struct Quantize8* raw;  // what x is to be made of, where tiles take it; null once it is there
  const float* group_sums;   // (count, sum_stride >= w.groups): scale sum q; where x has several groups
  const int8_t* arranged;    // (count, arranged_stride): codes in the order of the parts of bytes
  const float* lanes;        // (count, lane_stride): scales of x, each as often as it has lanes, or `scales_once`
  int32_t* starts;           // (count, x.groups): -shift sum q, from which sums of many rows start
  int64_t sum_stride, lane_stride, arranged_stride;
  const int32_t* row_sums;   // (w.rows): of the levels, where x has zero points
  const void* bias;
  void* y;
  int64_t ahead;             // Kernels8's
  int type;                  // of bias and y
  int shift;                 // stored level = level + shift
  float unit;                // level = integer * unit
  uint8_t table[16];         // stored levels of codes
  int has_table;
};

struct Kernels8 {
  void (*few)(const Product8&, int64_t first, int64_t last, float* scratch);    // rows [first, last) of the weight
  void (*many)(const Product8&, int64_t first, int64_t last, float* scratch);
  void (*quantize)(const void* x, int type, int64_t columns, int64_t stride, int64_t groups, int8_t* codes,
                   float* scale, int32_t* sums);
  // x's codes (stride) in the order in which few rows meet codes of `bits`, and in how many vectors at a time.
  void (*arrange)(const int8_t* codes, int64_t stride, int bits, int8_t* to, int64_t to_stride);
  int (*parts)(int bits);
  int bytes;                 // of a vector
  int ahead;                 // bytes that few rows ask memory for in advance where codes are whole bytes; 0: they do not
  // Sequences [first, first + count) of an encoder through all its layers.
  void (*encode)(struct Crew&, const struct whit_encoder8&, int64_t first, int64_t count, const struct Room8&);
};

// Rows of x as they came, (count, columns) of `type`, and where whit_rows8 has what they become.
struct Quantize8 {
  const Kernels8* kernels;
  const char* x;
  int64_t columns, stride, groups, row_bytes;
  int type;
  int8_t* codes;
  float* scale;
  int32_t* sums;
  void operator()(int64_t first, int64_t last) const {
    for (int64_t m = first; m < last; m++)
      kernels->quantize(x + m * row_bytes, type, columns, stride, groups, codes + m * stride, scale + m * groups,
                        sums + m * groups);
  }
};

// Numbers that one thread quantizes, or puts into order, before others would have been woken.
enum { ALONE8 = 1 << 15 };

// Rows [first, last) of a weight of bytes with one scale for a row, by VNNI, times x whose rows have one scale each.
void whit_bytes8(const Product8&, int64_t first, int64_t last, float* scratch);

extern const Kernels8 whit_int8_scalar, whit_int8_avx2, whit_int8_avx512;
void whit_encode_amx(struct Crew&, const struct whit_encoder8&, int64_t first, int64_t count, const struct Room8&);

const Kernels8* whit_kernels8(int isa);  // null where this processor does not run it

// What all threads read of x: sums, scales and codes in the order in which the kernels meet them, in `room`.
size_t whit_derived8(Product8& p, bool few, const Kernels8& kernels);  // how many bytes that takes
void whit_derive8(Product8& p, bool few, const Kernels8& kernels, void* room);
