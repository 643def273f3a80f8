// The operations of AMX. With WHIT_EMULATE_AMX, in tests on other processors, they are plain loops.
#pragma once
#include "common.h"

struct TileShapes {
  uint8_t palette, start, unused[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};

#if defined(WHIT_EMULATE_AMX)

namespace {

struct Emulated {
  TileShapes shapes;
  alignas(64) uint8_t data[8][1024];
};
thread_local Emulated amx;

void emulated_move(int t, uint8_t* to, const uint8_t* from, int64_t to_stride, int64_t from_stride) {
  for (int r = 0; r < amx.shapes.rows[t]; r++) memcpy(to + r * to_stride, from + r * from_stride, amx.shapes.bytes[t]);
}

template <class Sum, class Multiply>
void emulated_product(int c, int a, int b, const Multiply& multiply) {
  const TileShapes& s = amx.shapes;
  if (s.rows[c] != s.rows[a] || s.bytes[c] != s.bytes[b] || s.bytes[a] != 4 * s.rows[b]) __builtin_trap();
  for (int m = 0; m < s.rows[c]; m++)
    for (int n = 0; n < s.bytes[c] / 4; n++) {
      Sum sum;
      memcpy(&sum, amx.data[c] + 64 * m + 4 * n, 4);
      for (int k = 0; k < s.rows[b]; k++) sum = multiply(sum, amx.data[a] + 64 * m + 4 * k, amx.data[b] + 64 * k + 4 * n);
      memcpy(amx.data[c] + 64 * m + 4 * n, &sum, 4);
    }
}

float emulated_pair(float sum, const uint8_t* a, const uint8_t* b) {
  uint16_t x[2], y[2];
  memcpy(x, a, 4), memcpy(y, b, 4);
  sum += bf16_to_float(x[0]) * bf16_to_float(y[0]);
  return sum + bf16_to_float(x[1]) * bf16_to_float(y[1]);
}

template <class A, class B>
uint32_t emulated_four(uint32_t sum, const uint8_t* a, const uint8_t* b) {
  for (int i = 0; i < 4; i++) sum += (uint32_t)((A)a[i] * (B)b[i]);
  return sum;
}

}  // namespace

#define TILE_CONFIGURE(shapes_of) (amx.shapes = (shapes_of))
#define TILE_RELEASE() memset(&amx, 0, sizeof amx)
#define TILE_ZERO(t) memset(amx.data[t], 0, 1024)
#define TILE_LOAD(t, p, stride) \
  (memset(amx.data[t], 0, 1024), emulated_move(t, amx.data[t], (const uint8_t*)(p), 64, stride))
#define TILE_STORE(t, p, stride) emulated_move(t, (uint8_t*)(p), amx.data[t], stride, 64)
#define TILE_BF16(c, a, b) emulated_product<float>(c, a, b, emulated_pair)
#define TILE_INT8(c, a, b) emulated_product<uint32_t>(c, a, b, emulated_four<int8_t, uint8_t>)
#define TILE_INT8_LEVELS(c, a, b) emulated_product<uint32_t>(c, a, b, emulated_four<uint8_t, int8_t>)
#define TILE_INT8_SIGNED(c, a, b) emulated_product<uint32_t>(c, a, b, emulated_four<int8_t, int8_t>)

#else

#define TILE_CONFIGURE(shapes_of) __asm__ volatile("ldtilecfg %0" : : "m"(shapes_of) : "memory")
#define TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : :)
#define TILE_LOAD(t, p, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"((int64_t)(stride)) : "memory")
// Tile c (rows, 16 sums) += a (rows, 64 bytes) times b (16 fours of bytes or pairs, 16).
#define TILE_BF16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
// Of bytes, b is unsigned, or a is, or neither.
#define TILE_INT8(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define TILE_INT8_LEVELS(c, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define TILE_INT8_SIGNED(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

#endif
