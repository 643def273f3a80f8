// Products by AMX's tiles where there is no AMX: csrc/tiles*.cpp with WHIT_EMULATE_AMX, called by test_cpu_amx.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "team.h"
#include "tiles.h"

// Tasks one after the other, from both ends in turn: nobody may count on their order.
int whit_run(Team& team, whit_parallel, int) {
  std::vector<char> scratch(team.scratch_bytes, (char)0xff);  // NaNs
  const int64_t tasks = (team.rows + team.task - 1) / team.task;
  for (int64_t i = 0; i < tasks; i++) {
    const int64_t first = (i % 2 ? tasks - 1 - i / 2 : i / 2) * team.task;
    const int64_t last = first + team.task < team.rows ? first + team.task : team.rows;
    team.work(team.context, first, last, (float*)scratch.data());
  }
  return 0;
}

WHIT_API int tiles(const whit_weight* w, const void* x, const void* bias, void* y, int64_t count, int folds,
                   int threads) {
  return whit_tiles(w, x, bias, y, count, WHIT_BF16, folds, threads);
}

// The codes of a row of float32, as int8.quantize_rows.
static void quantize(const void* x, int, int64_t columns, int64_t stride, int64_t, int8_t* codes, float* scale,
                     int32_t* sums) {
  const float* from = (const float*)x;
  float most = 0;
  for (int64_t c = 0; c < columns; c++) most = std::max(most, std::fabs(from[c]));
  memset(codes, 0, (size_t)stride);
  *scale = most / 127.0f, *sums = 0;
  for (int64_t c = 0; c < columns; c++) *sums += codes[c] = (int8_t)std::nearbyint(from[c] * (1.0f / most * 127.0f));
}

static Product8 product_of(const whit_weight* w, const whit_rows8* x, const void* bias, void* y, int type,
                           const uint8_t* table, int shift, float unit, std::vector<int32_t>& starts) {
  Product8 p = {};
  p.w = w, p.x = x, p.bias = bias, p.y = y, p.type = type, p.shift = shift, p.unit = unit;
  p.starts = starts.data(), p.has_table = table != nullptr;
  if (table) memcpy(p.table, table, 16);
  return p;
}

WHIT_API int tiles8(const whit_weight* w, const whit_rows8* x, const int32_t* row_sums, const void* bias, void* y,
                    int type, const uint8_t* table, int shift, float unit, int threads) {
  std::vector<int32_t> starts(x->count);
  for (int64_t m = 0; m < x->count; m++) starts[m] = -shift * x->sums[m];
  Product8 p = product_of(w, x, bias, y, type, table, shift, unit, starts);
  p.row_sums = row_sums;
  return whit_tiles8(p, threads);
}

// x (count, w->columns), float32, is quantized where it is arranged.
WHIT_API int linear8(const whit_weight* w, const void* x, int64_t count, void* y, const uint8_t* table, int shift,
                     float unit) {
  const int64_t stride = (w->columns + 63) / 64 * 64;
  std::vector<int8_t> codes(count * stride, 1);
  std::vector<float> scale(count);
  std::vector<int32_t> sums(count), starts(count);
  const whit_rows8 rows = {codes.data(), scale.data(), sums.data(), nullptr, count, stride, 1};
  Kernels8 kernels = {};
  kernels.quantize = quantize;
  const Quantize8 raw = {&kernels, (const char*)x, w->columns, stride, 1, 4 * w->columns, WHIT_F32,
                         codes.data(), scale.data(), sums.data()};
  Product8 p = product_of(w, &rows, nullptr, y, WHIT_F32, table, shift, unit, starts);
  p.raw = &raw;
  return whit_tiles8(p, 2);
}
