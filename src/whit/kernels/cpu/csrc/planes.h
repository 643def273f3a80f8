// One or two rows of bfloat16 as sums of bytes, on processors whose products of bytes are their fastest.
//
// As many columns of x as meet in a lane, 8 or 16, share a power of two: x = (2^16 a + 2^8 b + c) 2^e, all signed bytes. A
// bfloat16 number has 8 bits, so what is at least a 2^15th of the largest beside it is exact. Where almost all of x lies in
// the first two bytes, its last is left out. Codes are multiplied as they are, and sums of products are exact integers up
// to where scales are applied.
#pragma once
#include "int8.h"

enum { PLANES_UNTIL = 2, MOST_PLANES = 3 };  // rows of x: floats are as fast from there on

struct Planes : Product8 {
  int planes[PLANES_UNTIL];  // of each row of x
};

struct PlaneKernels {
  size_t (*bytes)(const whit_weight& w, int64_t count);
  // Fills `p`, whose weight, bias, result and type are there, from x (count, w.columns) in `room`. False where an x is not
  // finite, or all are next to nothing: those are not for bytes.
  bool (*arrange)(Planes& p, const void* x, int64_t count, void* room);
  void (*dot)(const Planes& p, int64_t count, int64_t first, int64_t last, float* scratch);  // rows of the weight
};

extern const PlaneKernels whit_planes_avx512;

// Those kernels, or null where the weight, the type of x or the processor is none for them.
const PlaneKernels* whit_plane_kernels(const whit_weight& w, int type, int isa);

// y as whit_linear's, which asks this first where processors have AMX; -1 where w or x is none for it. isa: WHIT_AMX.
WHIT_API int whit_planes(const whit_weight* w, const void* x, const void* bias, void* y, int64_t rows_of_x, int isa,
                         int threads);
