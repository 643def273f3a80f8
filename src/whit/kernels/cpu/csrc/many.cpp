// Calls of the products of many rows.
#include "many.h"

#include "team.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace {

#if defined(WHIT_HAVE_MANY_BF16)
bool has_vbmi() {
  unsigned a, b, c = 0, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 1 & 1);
}
#endif

const ManyKernels* find(int isa) {
#if defined(WHIT_HAVE_MANY_BF16)
  if (isa == WHIT_AVX512_BF16 && whit_has(isa) && has_vbmi()) return &whit_many_bf16;
#endif
  (void)isa;
  return nullptr;
}

const ManyKernels* kernels_for(int isa) {  // asked once: a virtual machine takes microseconds to say what it has
  static const ManyKernels* const found = find(WHIT_AVX512_BF16);
  return isa == WHIT_AVX512_BF16 ? found : nullptr;
}

struct Call {
  const ManyKernels* kernels;
  Many many;
  const void* x;
};

void arrange_task(void* context, int64_t first, int64_t last, float*) {
  const Call& call = *(const Call*)context;
  const Many& a = call.many;
  for (int64_t tile = first; tile < last; tile++)
    call.kernels->arrange(a, call.x, tile, (uint32_t*)a.x + tile * a.pairs * ROWS_IN_TILE,
                          a.sums ? (float*)a.sums + tile * a.w->groups * ROWS_IN_TILE : nullptr);
}

void multiply_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Call& call = *(const Call*)context;
  call.kernels->multiply(call.many, first, last, scratch);
}

thread_local Scratch arranged_many;

// Codes of at most 256 KB are turned at a time: with 16 rows of x they stay in the second cache.
int strips_of(const whit_weight& w, int64_t count) {
  const int64_t bytes = STRIP * w.columns * (w.bits <= 2 ? 2 : w.bits <= 4 ? 4 : 8) / 8;
  const int64_t most = count <= 2 * ROWS_IN_TILE ? 1 : 8;
  int64_t strips = (256 << 10) / bytes;
  return (int)(strips < 1 ? 1 : strips < most ? strips : most);
}

}  // namespace

WHIT_API int whit_has_many(int isa) { return kernels_for(isa) != nullptr; }

WHIT_API int whit_many(const whit_weight* w, const void* x, const void* bias, void* y, int64_t count, int type, int isa,
                       int threads) {
  const ManyKernels* kernels = kernels_for(isa);
  if (!kernels || type != WHIT_BF16) return -1;
  const int64_t tiles = (count + ROWS_IN_TILE - 1) / ROWS_IN_TILE;
  const int64_t pairs = (w->columns + 31) / 32 * PAIRS_IN_BLOCK, sums = w->zero ? w->groups : 0;
  uint32_t* room = (uint32_t*)arranged_many.get((size_t)(tiles * ROWS_IN_TILE * (pairs + sums) * 4 + 64));
  if (!room) return -3;
  Call call = {kernels, {w, room, nullptr, count, pairs, bias, y, type, strips_of(*w, count)}, x};
  if (sums) call.many.sums = (const float*)(room + tiles * ROWS_IN_TILE * pairs);
  Team arrange, multiply;
  arrange.rows = tiles, arrange.task = 1, arrange.work = arrange_task, arrange.context = &call;
  arrange.scratch_bytes = 64;
  const int64_t rows = call.many.strips * STRIP;
  multiply.rows = w->rows, multiply.task = rows < 64 ? (64 + rows - 1) / rows * rows : rows;
  multiply.work = multiply_task, multiply.context = &call, multiply.scratch_bytes = many_scratch(*w, call.many.strips);
  int status = whit_run(arrange, w->parallel, threads);
  return status ? status : whit_run(multiply, w->parallel, threads);
}
