// Calls of the products of many rows.
#include "many.h"

#include "team.h"
#include "tiles.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace {

#if defined(WHIT_HAVE_MANY_BF16) || defined(WHIT_HAVE_MANY_INT8)
bool has(int bit) {  // of the extensions in ecx: 1 VBMI, 11 VNNI
  unsigned a, b, c = 0, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> bit & 1);
}
#endif

const ManyKernels* find() {
#if defined(WHIT_HAVE_MANY_BF16)
  if (whit_has(WHIT_AVX512_BF16) && has(1)) return &whit_many_bf16;
#endif
  return nullptr;
}

const ManyKernels8* find8() {
#if defined(WHIT_HAVE_MANY_INT8)
  if (whit_has(WHIT_AVX512) && has(1) && has(11)) return &whit_many_int8;
#endif
  return nullptr;
}

// Asked once: a virtual machine takes microseconds to say what it has.
const ManyKernels* kernels_for(int isa) {
  static const ManyKernels* const found = find();
  return isa >= WHIT_AVX512_BF16 ? found : nullptr;
}

const ManyKernels8* kernels8() {
  static const ManyKernels8* const found = find8();
  return found;
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

struct Call8 {
  const ManyKernels8* kernels;
  Many8 many;
};

void arrange_task8(void* context, int64_t first, int64_t last, float*) {
  const Call8& call = *(const Call8*)context;
  const Many8& a = call.many;
  for (int64_t m = first * ROWS8_IN_TILE; m < last * ROWS8_IN_TILE; m += ROWS8_IN_TILE)
    call.kernels->arrange(a, m, (uint32_t*)a.x + m * a.width, a.sums ? (float*)a.sums + m * a.p->w->groups : nullptr);
}

void multiply_task8(void* context, int64_t first, int64_t last, float* scratch) {
  const Call8& call = *(const Call8*)context;
  call.kernels->multiply(call.many, first, last, scratch);
}

thread_local Scratch arranged_many;

// What is turned at a time stays in the second cache, and is used once for each tile of x.
int strips_of(int64_t vectors, int64_t count) {
  const int64_t most = count <= 2 * ROWS_IN_TILE ? 1 : 8, strips = (64 << 10) / (64 * vectors);
  return (int)(strips < 1 ? 1 : strips < most ? strips : most);
}

// Tasks of at least 64 rows.
int64_t task_rows(int strips) {
  const int64_t rows = strips * STRIP;
  return rows < 64 ? (64 + rows - 1) / rows * rows : rows;
}

// Vectors of a strip, up to whole runs of 16.
int64_t vectors_of(const whit_weight& w, int codes) { return ((w.columns + codes - 1) / codes + 15) & ~(int64_t)15; }

}  // namespace

WHIT_API int whit_has_many(int isa) { return kernels_for(isa) != nullptr; }

WHIT_API int whit_many(const whit_weight* w, const void* x, const void* bias, void* y, int64_t count, int type, int isa,
                       int threads, int folds) {
  const ManyKernels* kernels = kernels_for(isa);
  if (!kernels || type != WHIT_BF16) return -1;
  if (isa == WHIT_AMX && count >= TILES_FROM) return whit_tiles(w, x, bias, y, count, type, folds, threads);
  const int64_t tiles = (count + ROWS_IN_TILE - 1) / ROWS_IN_TILE;
  const int64_t pairs = (w->columns + 31) / 32 * PAIRS_IN_BLOCK, sums = w->zero ? w->groups : 0;
  uint32_t* room = (uint32_t*)arranged_many.get((size_t)(tiles * ROWS_IN_TILE * (pairs + sums) * 4 + 64));
  if (!room) return -3;
  const bool decoded = w->bits > 5 && count > ROWS_IN_TILE;
  const int64_t vectors = vectors_of(*w, w->bits <= 2 ? 16 : w->bits <= 4 ? 8 : 4) * (decoded ? 2 : 1);
  const int strips = strips_of(vectors, count);
  Call call = {kernels, {w, room, nullptr, count, pairs, bias, y, type, strips, decoded}, x};
  if (sums) call.many.sums = (const float*)(room + tiles * ROWS_IN_TILE * pairs);
  Team arrange, multiply;
  arrange.rows = tiles, arrange.task = 1, arrange.work = arrange_task, arrange.context = &call;
  arrange.scratch_bytes = 64;
  multiply.rows = w->rows, multiply.task = task_rows(strips), multiply.work = multiply_task, multiply.context = &call;
  multiply.scratch_bytes = many_scratch(*w, strips, vectors);
  int status = whit_run(arrange, w->parallel, threads);
  return status ? status : whit_run(multiply, w->parallel, threads);
}

int whit_strips8(const Product8& p, int threads) {
  const ManyKernels8* kernels = kernels8();
  if (!kernels) return -1;
  const whit_weight& w = *p.w;
  const int64_t tiles = (p.x->count + ROWS8_IN_TILE - 1) / ROWS8_IN_TILE, rows = tiles * ROWS8_IN_TILE;
  const int64_t width = (w.columns + GROUP8 - 1) / GROUP8 * WIDTH8, sums = w.zero ? w.groups : 0;
  uint32_t* room = (uint32_t*)arranged_many.get((size_t)(rows * (width + sums) * 4 + 64));
  if (!room) return -3;
  const bool decoded = p.x->count > DECODED_FROM && w.bits <= 4;
  const int parts = w.bits == 2 ? 4 : w.bits == 4 ? 2 : 1;
  const int64_t vectors = vectors_of(w, 4 * parts) * (decoded ? parts : 1);
  const int strips = strips_of(vectors, p.x->count);
  Call8 call = {kernels, {&p, room, sums ? (const float*)(room + rows * width) : nullptr, width, strips,
                         decoded}};
  Team arrange, multiply;
  arrange.rows = tiles, arrange.task = 1, arrange.work = arrange_task8, arrange.context = &call;
  arrange.scratch_bytes = 64;
  multiply.rows = w.rows, multiply.task = task_rows(strips), multiply.work = multiply_task8, multiply.context = &call;
  multiply.scratch_bytes = many_scratch(w, strips, vectors);
  int status = whit_run(arrange, w.parallel, threads);
  return status ? status : whit_run(multiply, w.parallel, threads);
}
