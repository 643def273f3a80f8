// Calls of the products of one or two rows of bfloat16 as bytes.
#include "planes.h"

#include <math.h>

#include "team.h"

namespace {

thread_local Scratch arranged;

struct Call {
  const PlaneKernels* kernels;
  const Planes* product;
  int64_t count;
};

void dot_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Call& call = *(const Call*)context;
  call.kernels->dot(*call.product, call.count, first, last, scratch);
}

// Codes that are their levels but for a whole number, and groups whose columns are a power of two.
bool fits(const whit_weight& w) {
  const float first = w.levels[0];
  if (w.digit_bytes || !w.consecutive || w.bits < 2 || w.bits > 4 || first != rintf(first) || fabsf(first) > 256) return false;
  return w.groups == 1 || (w.group_size >= 16 && (w.group_size & (w.group_size - 1)) == 0);
}

}  // namespace

const PlaneKernels* whit_plane_kernels(const whit_weight& w, int type, int isa) {
#if defined(WHIT_HAVE_PLANES_AVX512)
  if (isa == WHIT_AMX && type == WHIT_BF16 && whit_kernels8(2) && fits(w)) return &whit_planes_avx512;
#endif
  return nullptr;
}

int whit_planes(const whit_weight* w, const void* x, const void* bias, void* y, int64_t count, int isa,
                         int threads) {
  const PlaneKernels* kernels = count > PLANES_UNTIL ? nullptr : whit_plane_kernels(*w, WHIT_BF16, isa);
  if (!kernels) return -1;
  void* room = arranged.get(kernels->bytes(*w, count));
  if (!room) return -3;
  Planes product = {};
  product.w = w, product.bias = bias, product.y = y, product.type = WHIT_BF16;
  if (!kernels->arrange(product, x, count, room)) return -1;
  Team team;
  Call call = {kernels, &product, count};
  const int64_t rows = 65536 / (w->row_bytes > 0 ? w->row_bytes : 1);
  team.rows = w->rows, team.task = rows < 8 ? 8 : rows > 1024 ? 1024 : rows & ~(int64_t)7;
  team.work = dot_task, team.context = &call, team.scratch_bytes = whit_row_scratch(*w);
  return whit_run(team, w->parallel, threads);
}
