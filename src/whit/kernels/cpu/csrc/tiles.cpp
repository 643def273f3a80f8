// Calls of the products by tiles.
#include "tiles.h"

#include "team.h"

namespace {

struct Call {
  const TileKernels* kernels;
  Tiles tiles;
};

void arrange_task(void* context, int64_t first, int64_t last, float*) {
  const Call& call = *(const Call*)context;
  const Tiles& t = call.tiles;
  for (int64_t tile = first; tile < last; tile++) {
    if (t.p && t.p->raw) {
      const int64_t from = 16 * tile, until = from + 16 < t.count ? from + 16 : t.count;
      (*t.p->raw)(from, until);
      for (int64_t m = from; m < until; m++) t.p->starts[m] = -t.p->shift * t.p->x->sums[m];
    }
    call.kernels->arrange(t, tile);
  }
}

void multiply_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Call& call = *(const Call*)context;
  call.kernels->multiply(call.tiles, first, last, scratch);
}

thread_local Scratch arranged;

// x is read once for as many strips as stay in the second cache; each thread has some tasks, to even out what held it
// up. How many there are changes no sum.
int strips_of(const whit_weight& w, int64_t most, int threads) {
  const int64_t shared = w.rows / (16 * 3 * (int64_t)(threads < 1 ? 1 : threads));
  const int64_t strips = (shared < most ? shared : most) & ~(int64_t)1;
  return (int)(strips < 2 ? 2 : strips);
}

int run(Call& call, int threads) {
  Tiles& t = call.tiles;
  const whit_weight& w = *t.w;
  const int64_t tiles = (t.count + 15) / 16, sums = t.p || !w.zero ? 0 : tiles * 16 * w.groups;
  uint8_t* room = (uint8_t*)arranged.get((size_t)((tiles + 1) / 2 * 2 * t.tile_bytes + 4 * sums + 64));
  if (!room) return -3;
  t.tiles = room, t.sums = sums ? (float*)(room + (tiles + 1) / 2 * 2 * t.tile_bytes) : nullptr;
  const bool few = t.count <= 32;
  t.strips = strips_of(w, few ? FEW_STRIPS : TILE_STRIPS, threads);
  t.chunk = (few ? FEW_CHUNK : TILE_CHUNK) / (t.p ? 1 : 2);
  if (t.chunk < 256 && w.bits <= 2) t.chunk = 256;
  t.ahead = !few || t.chunk > FEW_AHEAD ? t.chunk : FEW_AHEAD;
  Team arrange, multiply;
  arrange.rows = tiles, arrange.task = 1, arrange.work = arrange_task, arrange.context = &call;
  arrange.scratch_bytes = 64;
  multiply.rows = w.rows, multiply.task = 16 * t.strips, multiply.work = multiply_task, multiply.context = &call;
  // Decoded strips, their sums, those of four groups, and params.
  multiply.scratch_bytes = (size_t)(t.strips * (16 * (t.p ? 1 : 2) * t.chunk + TILE_BLOCK * 1024) + 16384 + 64) +
                           4 * (size_t)(t.strips * 2 * 16 * w.groups + 2 * 16 * (w.groups + 48));
  const int status = whit_run(arrange, w.parallel, t.count * w.columns <= ALONE8 ? 1 : threads);
  return status ? status : whit_run(multiply, w.parallel, threads);
}

#if defined(WHIT_HAVE_TILES_INT8)
// Weights of bytes, which are tiles as they lie.
int run_lying(Call& call, int threads) {
  Tiles& t = call.tiles;
  const whit_weight& w = *t.w;
  const int64_t tiles = (t.count + 15) / 16;
  t.tiles = (uint8_t*)arranged.get((size_t)((tiles + 1) / 2 * 2 * t.tile_bytes + 64));
  if (!t.tiles) return -3;
  call.kernels = &whit_tiles_int8_few;
  t.strips = strips_of(w, tiles > 1 || t.blocks > 16 ? 2 : LYING_STRIPS, threads);
  Team arrange, multiply;
  arrange.rows = tiles, arrange.task = 1, arrange.work = arrange_task, arrange.context = &call;
  arrange.scratch_bytes = 64;
  multiply.rows = w.rows, multiply.task = 16 * t.strips, multiply.work = multiply_task, multiply.context = &call;
  // Sums, a strip that is copied, and params of two turns.
  multiply.scratch_bytes = (size_t)(LYING_SUMS + 1024 * t.blocks + 64) + 4 * (size_t)(2 * 16 * t.strips + 2 * 16 * 49);
  const int status = whit_run(arrange, w.parallel, t.count * w.columns <= ALONE8 ? 1 : threads);
  return status ? status : whit_run(multiply, w.parallel, threads);
}
#endif

}  // namespace

int whit_tiles(const whit_weight* w, const void* x, const void* bias, void* y, int64_t count, int type, bool folds,
               int threads) {
#if defined(WHIT_HAVE_TILES_BF16)
  if (!(whit_amx() & AMX_BF16) || type != WHIT_BF16) return -1;
  Call call = {&whit_tiles_bf16, {}};
  Tiles& t = call.tiles;
  bool exact = true;
  for (int i = 0; i < 1 << w->bits; i++) exact = exact && w->levels[i] == bf16_to_float(float_to_bf16(w->levels[i]));
  t.w = w, t.x = x, t.bias = bias, t.y = y, t.count = count, t.type = type;
  t.depth = w->groups > 1 && w->group_size % 32 ? 16 : 32;
  t.blocks = (w->columns + t.depth - 1) / t.depth, t.tile_bytes = (w->columns + 31) / 32 * 1024;
  t.folded = count > 32 && (folds || !exact) && (w->bits <= 4 || w->consecutive);
  t.counted = exact && w->consecutive;
  t.whole = t.folded || w->groups == 1;
  return run(call, threads);
#else
  return -1;
#endif
}

int whit_tiles8(const Product8& p, int threads) {
#if defined(WHIT_HAVE_TILES_INT8)
  if (!(whit_amx() & AMX_INT8) || p.x->groups != 1 || p.w->groups != 1 || p.w->zero) return -1;
  Call call = {&whit_tiles_int8, {}};
  Tiles& t = call.tiles;
  t.w = p.w, t.p = &p, t.bias = p.bias, t.y = p.y, t.count = p.x->count, t.type = p.type;
  t.depth = 64, t.blocks = (p.w->columns + 63) / 64, t.tile_bytes = t.blocks * 1024, t.whole = true;
  if (p.w->bits == 8 && p.w->columns >= 64 && t.count * p.w->columns <= LYING_MOST) return run_lying(call, threads);
  return run(call, threads);
#else
  return -1;
#endif
}
