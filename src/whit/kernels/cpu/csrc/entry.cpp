// The C ABI: the calls themselves. Rows of the weight are the tasks that threads take: a row is computed by one thread in
// one order.
#include <chrono>

#include "digits.h"
#include "isa.h"
#include "planes.h"
#include "team.h"

namespace {

thread_local Scratch arranged, per_row, of_digits;

void member(void* argument) {
  Team& team = *(Team*)argument;
  float* scratch = (float*)per_row.get(team.scratch_bytes);
  if (!scratch) {
    team.failed = 1;
    return;
  }
  const int own = team.joined.fetch_add(1);
  for (int i = 0; i < team.parts; i++) {
    Part& part = team.part[(own + i) % team.parts];
    for (int64_t first; (first = part.next.fetch_add(team.task)) < part.until;)
      team.work(team.context, first, first + team.task < part.until ? first + team.task : part.until, scratch);
  }
}

// Tasks of about 64 KB of codes, in multiples of 8 rows: small enough to even out threads that were held up.
int64_t task_rows(const whit_weight& w) {
  int64_t rows = 65536 / (w.row_bytes > 0 ? w.row_bytes : 1);
  return rows < 8 ? 8 : rows > 1024 ? 1024 : rows & ~(int64_t)7;
}

struct Dot {
  const Kernels* kernels;
  const Rows* rows;
  int count;
  Team* team;
  bool digits;
};

void dot_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Dot& dot = *(const Dot*)context;
  if (dot.digits) return dot.kernels->dot_digits(*dot.rows, first, last);
  auto tile = [&](const whit_weight& w, int64_t from, int64_t to) {
    for (int i = 0; i < dot.count; i++) {
      Rows rows = dot.rows[i];
      rows.w = &w;
      dot.kernels->dot(rows, from, to, scratch);
    }
  };
  if (!by_tiles(*dot.rows->w, *dot.kernels, first, last, tile)) dot.team->failed = 1;
}

struct Decode {
  const Kernels* kernels;
  const whit_weight* w;
  char* out;
  int64_t offset, row_bytes;
  int type;
  Team* team;
};

void decode_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Decode& d = *(const Decode*)context;
  auto tile = [&](const whit_weight& w, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++)
      d.kernels->dequantize(w, row, scratch, d.out + (row - d.offset) * d.row_bytes, d.type);
  };
  if (!by_tiles(*d.w, *d.kernels, d.offset + first, d.offset + last, tile)) d.team->failed = 1;
}

}  // namespace

uint8_t* whit_digit_room(size_t bytes) { return (uint8_t*)of_digits.get(bytes); }

size_t whit_row_scratch(const whit_weight& w) {
  int64_t lanes = w.columns / 4 + 64;  // 16 per block of at least 64 columns, and the last block
  return sizeof(float) * (size_t)(2 * 8 * (w.groups + 48 + lanes) + 8 * (w.groups + 48));
}

int whit_run(Team& team, whit_parallel parallel, int threads) {
  int64_t tasks = (team.rows + team.task - 1) / team.task;
  if (threads > tasks) threads = (int)tasks;
  team.parts = threads < 1 ? 1 : threads < MOST_PARTS ? threads : MOST_PARTS;
  for (int i = 0; i < team.parts; i++) {
    const int64_t until = (i + 1) * tasks / team.parts * team.task;
    team.part[i].next = i * tasks / team.parts * team.task;
    team.part[i].until = until < team.rows ? until : team.rows;
  }
  if (threads > 1 && parallel) parallel(member, &team, (unsigned)threads, 0);
  else member(&team);
  return team.failed ? -4 : 0;
}

#if !defined(WHIT_SOURCES)
#define WHIT_SOURCES ""
#endif

int whit_abi(void) { return WHIT_ABI; }

const char* whit_sources(void) { return WHIT_SOURCES; }

int whit_linear(const whit_weight* w, const void* x, const void* bias, void* y, int64_t rows_of_x, int type, int isa,
                int threads) {
  const Kernels* kernels = whit_kernels(*w, type, isa);
  if (!kernels) return -1;
  if (rows_of_x < 1 || rows_of_x > 64) return -2;
  if (type == WHIT_BF16) {
    const int status = whit_planes(w, x, bias, y, rows_of_x, isa, threads);
    if (status != -1) return status;
  }
  const int codes = w->bits <= 2 ? 16 : w->bits <= 4 ? 8 : 4;
  const int64_t blocks = (w->columns + 16 * codes - 1) / (16 * codes), sum_count = 16 * blocks;
  const bool digits = rows_of_x == 1 && takes_digits(*kernels, *w);
  const int64_t x_bytes = digits ? digit_x_bytes(*w) : blocks * 16 * codes * (kernels->pairs ? 2 : 4);
  const int64_t element = type == WHIT_F32 ? 4 : 2;
  const size_t bytes = (size_t)((x_bytes + 4 * sum_count) * rows_of_x);
  char* buffer = (char*)arranged.get(bytes);
  if (!buffer) return -3;
  float* sums = (float*)(buffer + x_bytes * rows_of_x);
  const bool needs_sums = w->zero || (w->consecutive && (w->bits > 4 || kernels->counts));
  if (digits) kernels->arrange_digits(x, w->columns, buffer);
  for (int64_t m = 0; m < rows_of_x && !digits; m++)
    kernels->arrange((const char*)x + m * w->columns * element, type, w->columns, w->bits, buffer + m * x_bytes,
                     needs_sums ? sums + m * sum_count : nullptr);
  Rows rows[64];
  int count = 0;
  for (int64_t m = 0; m < rows_of_x;) {
    int64_t take = 8;  // the most that are left and that share one pass
    while (take > rows_of_x - m || !(kernels->sizes & take)) take /= 2;
    rows[count++] = {w, buffer + m * x_bytes, sums + m * sum_count, x_bytes, sum_count, blocks, (int)take, bias,
                     (char*)y + m * w->rows * element, type};
    m += take;
  }
  Team team;
  Dot dot = {kernels, rows, count, &team, digits};
  team.rows = w->rows, team.task = task_rows(*w), team.work = dot_task, team.context = &dot;
  team.scratch_bytes = whit_row_scratch(*w);
  return whit_run(team, w->parallel, threads);
}

int whit_dequantize(const whit_weight* w, void* out, int64_t first, int64_t last, int type, int isa, int threads) {
  const Kernels* kernels = whit_kernels_for(isa);
  if (!kernels) return -1;
  Team team;
  Decode decode = {kernels, w, (char*)out, first, w->columns * (type == WHIT_F32 ? 4 : 2), type, &team};
  team.rows = last - first, team.task = task_rows(*w), team.work = decode_task, team.context = &decode;
  team.scratch_bytes = whit_row_scratch(*w);
  return whit_run(team, w->parallel, threads);
}

namespace {
struct Rounding {
  const Kernels* kernels;
  const char* x;
  char* out;
  int64_t columns, group, row_bytes, out_bytes;
  int type, out_type;
};
void round_task(void* context, int64_t first, int64_t last, float*) {
  const Rounding& r = *(const Rounding*)context;
  for (int64_t row = first; row < last; row++)
    r.kernels->round(r.x + row * r.row_bytes, r.type, r.columns, r.group, r.out + row * r.out_bytes, r.out_type);
}
}  // namespace

int whit_round(const void* x, int64_t rows, int64_t columns, int type, int64_t group, void* out, int out_type,
               whit_parallel parallel, int isa, int threads) {
  const Kernels* kernels = whit_kernels_for(isa);
  if (!kernels) return -1;
  if (group < 1 || group > 256) return -2;
  Rounding call = {kernels, (const char*)x, (char*)out, columns, group, columns * (type == WHIT_F32 ? 4 : 2),
                   columns * (out_type == WHIT_F32 ? 4 : 2), type, out_type};
  Team team;
  team.rows = rows, team.task = 8, team.work = round_task, team.context = &call, team.scratch_bytes = 64;
  return whit_run(team, parallel, threads);
}

namespace {
struct Reading {
  const uint8_t* data;
  int ahead;
  std::atomic<uint64_t> sum{0};
};
void read_task(void* context, int64_t first, int64_t last, float*) {
  Reading& r = *(Reading*)context;
  const uint64_t* p = (const uint64_t*)r.data;
  uint64_t sum[8] = {};
  int64_t i = first / 8;
  for (; i + 8 <= last / 8; i += 8) {
    if (r.ahead) __builtin_prefetch((const char*)(p + i) + r.ahead, 0, 2);
    for (int k = 0; k < 8; k++) sum[k] ^= p[i + k];
  }
  for (; i < last / 8; i++) sum[0] ^= p[i];
  r.sum ^= sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}
}  // namespace

double whit_read(const void* data, int64_t bytes, whit_parallel parallel, int ahead, int threads) {
  Reading reading;
  reading.data = (const uint8_t*)data, reading.ahead = ahead;
  Team team;
  team.rows = bytes, team.task = 1 << 20, team.work = read_task, team.context = &reading, team.scratch_bytes = 64;
  auto start = std::chrono::steady_clock::now();
  whit_run(team, parallel, threads);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
