// Products by AMX's tiles where there is no AMX: csrc/tiles*.cpp with WHIT_EMULATE_AMX, called by test_cpu_amx.py.
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

WHIT_API int tiles8(const whit_weight* w, const whit_rows8* x, const int32_t* row_sums, const void* bias, void* y,
                    int type, const uint8_t* table, int shift, float unit, int threads) {
  std::vector<int32_t> starts(x->count);
  for (int64_t m = 0; m < x->count; m++) starts[m] = -shift * x->sums[m];
  Product8 p = {};
  p.w = w, p.x = x, p.row_sums = row_sums, p.bias = bias, p.y = y, p.type = type, p.shift = shift, p.unit = unit;
  p.starts = starts.data(), p.has_table = table != nullptr;
  if (table) memcpy(p.table, table, 16);
  return whit_tiles8(p, threads);
}
