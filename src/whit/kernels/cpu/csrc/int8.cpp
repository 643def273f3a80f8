// Calls of the products of 8-bit activations.
#include "digits.h"
#include "many.h"
#include "team.h"
#include "tiles.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#if defined(_WIN32)
#define WHIT_API8 extern "C" __declspec(dllexport)
#else
#define WHIT_API8 extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Rows of x that meet bytes as they lie by VNNI: panels take longer to be turned than these to be multiplied. More of them
// where four rows of both fit in the first cache and are so long that what their sums cost is little (measured: Zen 4).
enum { BYTES_MOST = 8, BYTES_MORE = 16, BYTES_LONG = 1024, BYTES_FIT = 4096 };

thread_local Scratch sums8, rows8;

#if defined(__x86_64__) || defined(__i386__)
bool has_vnni() {
  unsigned a, b, c = 0, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1) && (c >> 1 & 1);  // AVX512_VNNI, AVX512_VBMI
}
#endif

#if defined(WHIT_HAVE_INT8_AVX512) && defined(WHIT_HAVE_TILES_INT8)
// Many rows are tiles.h's. An Emerald Rapids reads 27 GB/s where 16 KB come in advance, 17 where its own prefetcher is
// waited for; on Zen 4 that one is the faster.
const Kernels8* by_tiles8() {
  static Kernels8 kernels = whit_int8_avx512;
  kernels.encode = whit_encode_amx, kernels.ahead = 16384;
  return &kernels;
}
#endif

const Kernels8* find(int isa) {
  switch (isa) {
    case 0: return &whit_int8_scalar;
#if defined(WHIT_HAVE_INT8_AVX2)
    case 1: return whit_has(WHIT_AVX2) ? &whit_int8_avx2 : nullptr;
#endif
#if defined(WHIT_HAVE_INT8_AVX512)
    case 2: return whit_has(WHIT_AVX512) && has_vnni() ? &whit_int8_avx512 : nullptr;
#endif
#if defined(WHIT_HAVE_INT8_AVX512) && defined(WHIT_HAVE_TILES_INT8)
    case 3: return find(2) && (whit_amx() & AMX_INT8) ? by_tiles8() : nullptr;
#endif
    default: return nullptr;
  }
}

// Few rows share scales by powers of two.
bool runs_pow2(const whit_weight& w) {
  const int64_t runs = w.group_size / GROUP8;
  return w.groups == 1 || (runs & (runs - 1)) == 0;
}

struct Call8 {
  const Kernels8* kernels;
  const Product8* product;
  const Kernels* floats;  // of the same instruction set, for codes that are digits
  Team* team;
};

template <class Product>
void by_parts(const Call8& call, int64_t first, int64_t last, float* scratch, Product product) {
  auto tile = [&](const whit_weight& w, int64_t from, int64_t to) {
    Product8 part = *call.product;
    part.w = &w;
    product(part, from, to, scratch);
  };
  if (!by_tiles(*call.product->w, *call.floats, first, last, tile, WIDE8)) call.team->failed = 1;
}

void few_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Call8& call = *(const Call8*)context;
  by_parts(call, first, last, scratch, call.kernels->few);
}

void many_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Call8& call = *(const Call8*)context;
  by_parts(call, first, last, scratch, call.kernels->many);
}

#if defined(WHIT_HAVE_INT8_AVX512)
void bytes_task(void* context, int64_t first, int64_t last, float* scratch) {
  whit_bytes8(*((const Call8*)context)->product, first, last, scratch);
}

bool by_bytes(const Product8& p, int isa) {
  const whit_weight& w = *p.w;
  const bool more = isa == 2 && w.columns >= BYTES_LONG && w.columns <= BYTES_FIT;
  const int64_t most = more ? BYTES_MORE : BYTES_MOST;
  return isa >= 2 && w.bits == 8 && !w.zero && w.groups == 1 && p.x->groups == 1 && p.x->count <= most;
}
#endif

void quantize_task(void* context, int64_t first, int64_t last, float*) {
  (*(const Quantize8*)context)(first, last);
}

int quantize(const Quantize8& call, int64_t count, whit_parallel parallel, int threads) {
  Team team;
  team.rows = count, team.task = 8, team.work = quantize_task, team.context = (void*)&call, team.scratch_bytes = 64;
  return whit_run(team, parallel, threads);
}

}  // namespace

size_t whit_derived8(Product8& p, bool few, const Kernels8& kernels) {
  const whit_weight& w = *p.w;
  const whit_rows8& x = *p.x;
  const bool grouped = x.groups > 1;
  const int parts = kernels.parts(w.bits), block = kernels.bytes * parts;
  p.arranged_stride = few ? (x.stride + block - 1) / block * block : 0;
  p.sum_stride = grouped && (few || w.zero) ? (w.groups + 15) & ~(int64_t)15 : 0;
  p.lane_stride = !grouped || !few ? 0 : p.arranged_stride / (scales_once(w.bits) ? GROUP8 : 4 * parts);
  if (scales_once(w.bits)) p.lane_stride = (p.lane_stride + 31) & ~(int64_t)15;  // the last are read with what follows
  const int64_t starts = few ? 0 : x.groups;
  return (size_t)(x.count * (4 * (p.sum_stride + p.lane_stride + starts) + p.arranged_stride)) + 64;
}

void whit_derive8(Product8& p, bool few, const Kernels8& kernels, void* room) {
  const whit_weight& w = *p.w;
  const whit_rows8& x = *p.x;
  whit_derived8(p, few, kernels);
  const int in_group = scales_once(w.bits) ? 1 : GROUP8 / 4 / kernels.parts(w.bits);
  float *sums = (float*)room, *lanes = sums + x.count * p.sum_stride;
  int32_t* starts = (int32_t*)(lanes + x.count * p.lane_stride);
  int8_t* arranged = (int8_t*)(starts + (few ? 0 : x.count * x.groups));
  p.group_sums = sums, p.lanes = lanes, p.starts = starts, p.arranged = arranged, p.ahead = kernels.ahead;
  for (int64_t i = 0; i < x.count * x.groups && !few; i++) starts[i] = -p.shift * x.sums[i];
  for (int64_t m = 0; m < x.count; m++) {
    const float* scale = x.scale + m * x.groups;
    const int32_t* of_codes = x.sums + m * x.groups;
    const int64_t size = w.groups == 1 ? x.groups : w.group_size / GROUP8;
    for (int64_t g = 0; g < p.sum_stride; g++, sums++) {
      const int64_t until = (g + 1) * size < x.groups ? (g + 1) * size : x.groups;
      float sum = 0;
      for (int64_t u = g * size; g < w.groups && u < until; u++) sum += scale[u] * (float)of_codes[u];
      *sums = sum;
    }
    float* end = lanes + p.lane_stride;
    for (int64_t u = 0; u < x.groups && lanes < end; u++)
      for (int i = 0; i < in_group; i++) *lanes++ = scale[u];
    while (lanes < end) *lanes++ = 0;
    if (few) kernels.arrange(x.codes + m * x.stride, x.stride, w.bits, arranged, p.arranged_stride);
    arranged += p.arranged_stride;
  }
}

const Kernels8* whit_kernels8(int isa) {  // asked once: a virtual machine takes microseconds to say what it has
  static const Kernels8* const found[] = {find(0), find(1), find(2), find(3)};
  return isa >= 0 && isa < 4 ? found[isa] : nullptr;
}

WHIT_API8 int whit_quantize8(const void* x, int64_t count, int64_t columns, int type, int8_t* codes, float* scale,
                             int32_t* sums, int64_t stride, int64_t groups, whit_parallel parallel, int isa,
                             int threads) {
  const Kernels8* kernels = whit_kernels8(isa);
  if (!kernels) return -1;
  const int64_t element = type == WHIT_F32 ? 4 : 2;
  const Quantize8 call = {kernels, (const char*)x, columns, stride, groups, columns * element, type, codes, scale, sums};
  return quantize(call, count, parallel, threads);
}

namespace {

// All ways of a product; x is quantized first where it is not yet.
int multiply(Product8& product, int64_t few, int isa, int threads) {
  const whit_weight& w = *product.w;
  const whit_rows8& x = *product.x;
  const Kernels8* kernels = whit_kernels8(isa);
  if (!kernels) return -1;
  const Kernels* floats = whit_kernels(w, WHIT_F32, isa);
  if (w.digit_bytes) isa = WHIT_SCALAR;  // what takes many rows otherwise than `kernels` reads whole bits
  few = runs_pow2(w) ? few : 0;
  // Rows of whole bytes stream one by one: strips are faster, and bytes as they lie, but for AMD's prefetcher.
  if (scales_once(w.bits) && few > 2 && (x.groups > 1 ? isa >= 2 : isa == 3 && w.groups == 1 && !w.zero)) few = 2;
  const bool streams = x.count <= few;
  void* room = sums8.get(whit_derived8(product, streams, *kernels));
  if (!room) return -3;
  if (isa == 3 && !streams && x.count >= (w.bits == 8 ? +LYING_FROM : +TILES8_FROM)) {
    if (product.raw) product.starts = (int32_t*)room;
    else whit_derive8(product, streams, *kernels, room);
    const int status = whit_tiles8(product, threads);
    if (status != -1) return status;
  }
  if (product.raw) {
    const bool alone = streams || x.count * w.columns <= ALONE8;  // to wake others takes longer
    const int status = quantize(*product.raw, x.count, w.parallel, alone ? 1 : threads);
    if (status) return status;
    product.raw = nullptr;
  }
  whit_derive8(product, streams, *kernels, room);
  if (isa >= 2 && x.groups > 1 && !streams) {
    const int status = whit_strips8(product, threads);
    if (status != -1) return status;
  }
  Team team;
  Call8 call = {kernels, &product, floats, &team};
  const size_t params = sizeof(float) * (size_t)(2 * 4 * (w.groups + 48));
  team.rows = w.rows, team.context = &call;
  if (streams) {
    // Long runs of whole bytes, which the prefetcher follows; each thread has several, to even out what held it up.
    const int64_t bytes = w.bits == 8 ? 1 << 18 : 1 << 15;
    int64_t rows = bytes / (w.row_bytes > 0 ? w.row_bytes : 1);
    team.task = rows < 8 ? 8 : rows > 256 ? 256 : rows & ~(int64_t)7;
    team.work = few_task, team.scratch_bytes = params;
#if defined(WHIT_HAVE_INT8_AVX512)
  } else if (by_bytes(product, isa)) {
    team.task = 64, team.work = bytes_task, team.scratch_bytes = sizeof(float) * (size_t)(32 + 2 * 16 * 49);
#endif
  } else {
    team.task = WIDE8, team.work = many_task;
    const bool grouped = x.groups > 1, kept = !grouped && w.columns > CHUNK8;
    const int64_t columns = grouped || !kept ? w.columns + STEP8 : CHUNK8 + STEP8;
    team.scratch_bytes = params + (size_t)(2 * 4 * WIDE8 * w.groups + WIDE8 * columns + 128);
    if (kept) team.scratch_bytes += (size_t)(4 * WIDE8 * x.count);
  }
  return whit_run(team, w.parallel, threads);
}

}  // namespace

// `table` (16 bytes, or null): stored levels by code; level = (stored - shift) unit. `few`: rows of x that stream.
WHIT_API8 int whit_product8(const whit_weight* w, const whit_rows8* x, const int32_t* row_sums, const void* bias,
                            void* y, int type, const uint8_t* table, int shift, float unit, int64_t few, int isa,
                            int threads) {
  Product8 product = {};
  product.w = w, product.x = x, product.row_sums = row_sums, product.bias = bias, product.y = y, product.type = type;
  product.shift = shift, product.unit = unit, product.has_table = table != nullptr;
  if (table) memcpy(product.table, table, 16);
  return multiply(product, few, isa, threads);
}

// x (count, columns) of `type` quantized by its rows, or by 32 columns of them, and multiplied as whit_product8 does.
WHIT_API8 int whit_linear8(const whit_weight* w, const void* x, int64_t count, int grouped, const void* bias, void* y,
                           int type, const uint8_t* table, int shift, float unit, int64_t few, int isa, int threads) {
  const int64_t stride = (w->columns + STEP8 - 1) / STEP8 * STEP8, groups = grouped ? stride / GROUP8 : 1;
  char* room = (char*)rows8.get((size_t)(count * (stride + 8 * groups) + 64));
  if (!room) return -3;
  float* scale = (float*)(room + count * stride);
  const int64_t row_bytes = w->columns * (type == WHIT_F32 ? 4 : 2);
  const Quantize8 raw = {whit_kernels8(isa), (const char*)x, w->columns, stride, groups, row_bytes, type, (int8_t*)room,
                         scale, (int32_t*)(scale + count * groups)};
  const whit_rows8 rows = {raw.codes, raw.scale, raw.sums, nullptr, count, stride, groups};
  Product8 product = {};
  product.w = w, product.x = &rows, product.raw = &raw, product.bias = bias, product.y = y, product.type = type;
  product.shift = shift, product.unit = unit, product.has_table = table != nullptr;
  if (table) memcpy(product.table, table, 16);
  return multiply(product, few, isa, threads);
}

WHIT_API8 int whit_has8(int isa) { return whit_kernels8(isa) != nullptr; }
