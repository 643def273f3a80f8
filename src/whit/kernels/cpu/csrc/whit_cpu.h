// The C ABI of whit's CPU kernels: plain structs and functions, called through ctypes. No torch headers.
//
// A weight lies in layout `bits`: each row of codes is a stream of `bits`-bit unsigned integers, least significant bit
// first, padded to a byte. w[row][column] = (levels[code] - zero[row][group]) * scale[row][group].
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define WHIT_API extern "C" __declspec(dllexport)
#else
#define WHIT_API extern "C" __attribute__((visibility("default")))
#endif

enum { WHIT_ABI = 10 };
enum whit_type { WHIT_F32 = 0, WHIT_BF16 = 1, WHIT_F16 = 2, WHIT_CODES = 3, WHIT_NESTED = 4, WHIT_NONE = 5 };
enum whit_isa { WHIT_SCALAR = 0, WHIT_AVX2 = 1, WHIT_AVX512 = 2, WHIT_AVX512_BF16 = 3, WHIT_AMX = 4, WHIT_ISAS = 5 };

// How OpenMP starts a team: GOMP_parallel(function, data, threads, flags).
typedef void (*whit_parallel)(void (*)(void*), void*, unsigned, unsigned);

typedef struct {
  const uint8_t* codes;
  int64_t rows, columns, row_bytes;
  int64_t group_size, groups;    // columns that share a scale; how many such groups a row has
  const void* scale;             // (rows, groups) of scale_type; WHIT_NESTED: uint8 codes into nested_levels
  const void* zero;              // (rows, groups) of zero_type, or null; WHIT_CODES: streams of `bits` like the codes
  const float* levels;           // 2^bits values
  const float* nested_levels;    // double quantization: scale = nested_levels[code] * nested_absmax[i / 256] + offset
  const float* nested_absmax;
  const float* nested_offset;
  int64_t scale_stride;          // groups, or 0 where one scale serves all rows
  int32_t bits, scale_type, zero_type;
  int32_t consecutive;           // whether levels[i] = levels[0] + i
  whit_parallel parallel;        // null: one thread
  // Superblocks: groups share an outer scale (and an outer offset, `zero`) by `subs`, and have integers of their own,
  // streams of sub_bits like the codes: scale = outer (integer - sub_bias), offset = outer integer. Otherwise subs is 0.
  const uint8_t *sub_scale, *sub_min;
  int32_t subs, sub_bits, sub_bias;
  int32_t offsets;               // not 0: `zero` holds offsets, times this: w = levels[code] scale - offset
  // Not 0: codes lie as digits of base 3, five to a byte, so many bytes a row; bits is 2, row_bytes those of whole bits.
  int64_t digit_bytes;
} whit_weight;

// y (rows_of_x, w.rows) = x (rows_of_x, w.columns) w^T + bias, sums in float32. x and y are contiguous and of `type`,
// bias too (or null). `isa` is one of whit_isa that whit_has() affirms. Returns 0, or a negative number if it cannot.
WHIT_API int whit_linear(const whit_weight* w, const void* x, const void* bias, void* y, int64_t rows_of_x, int type,
                         int isa, int threads);

// out (last - first, w.columns), contiguous and of `type`: rows [first, last) of the weight, as the reference decodes.
WHIT_API int whit_dequantize(const whit_weight* w, void* out, int64_t first, int64_t last, int type, int isa,
                             int threads);

// out (rows, columns) of out_type = x (rows, columns) of `type`, contiguous, with every `group` (up to 256) columns of a
// row rounded to int8: round(x 127 / max|x|) max|x| / 127. Returns 0, or a negative number if it cannot.
WHIT_API int whit_round(const void* x, int64_t rows, int64_t columns, int type, int64_t group, void* out, int out_type,
                        whit_parallel parallel, int isa, int threads);

// sums (columns, columns) += x^T x, below and on the diagonal only, of bfloat16 x (rows, columns). Products are exact,
// 128 rows at a time are summed in float32, these sums in float64. Returns 0, or a negative number if it cannot.
WHIT_API int whit_gram(const void* x, int64_t rows, int64_t columns, float* sums, whit_parallel parallel, int isa,
                       int threads);

WHIT_API int whit_has(int isa);  // 1 if this processor and its operating system run it
WHIT_API int whit_abi(void);
WHIT_API const char* whit_sources(void);  // the hash of the sources that this was built from
// Seconds that reading takes; memory is asked for `ahead` bytes in advance, or left to the processor's prefetcher with 0.
WHIT_API double whit_read(const void* data, int64_t bytes, whit_parallel parallel, int ahead, int threads);
