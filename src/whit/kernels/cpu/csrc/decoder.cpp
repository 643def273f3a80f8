// Tokens, one after the other, by one team of threads: what follows what in a token, and the memory that it takes.
#include "decoder.h"

#include <sched.h>

#include "digits.h"
#include "planes.h"
#include "team.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "decoder_team.inl"

#include "decoder_products.inl"

namespace {

thread_local Scratch shared_room, own_room;

const void* normalize(Member& me, const void* x, const void* weight) {
  me.steps.norm(x, weight, me.d.hidden, me.d.epsilon, me.d.type, (float*)me.inputs.room, me.normed);
  me.inputs.x = nullptr;  // the same place, another vector
  return me.normed;
}

void rotate_heads(Member& me, const whit_block& b, int64_t position) {
  const whit_decoder& d = me.d;
  const int64_t dim = d.head_dim, bytes = dim * (int64_t)element(d);
  const char *cos = (const char*)d.cos + position * bytes, *sin = (const char*)d.sin + position * bytes;
  int64_t first, last;
  me.share(d.heads + d.kv_heads, 1, first, last);
  for (int64_t h = first; h < last; h++) {
    const bool is_key = h >= d.heads;
    const int64_t own = is_key ? h - d.heads : h;
    char* x = (is_key ? me.run.k : me.run.q) + own * bytes;
    const void* weight = is_key ? b.k_norm : b.q_norm;
    if (weight) me.steps.norm(x, weight, dim, d.epsilon, d.type, me.sums, x);
    me.steps.rotate(x, cos, sin, dim, d.type);
    if (!is_key) continue;
    const int64_t place = (own * d.capacity + position) * bytes;
    memcpy((char*)b.keys + place, x, (size_t)bytes);
    memcpy((char*)b.values + place, me.run.v + own * bytes, (size_t)bytes);
  }
}

void attend_heads(Member& me, const whit_block& b, int64_t position) {
  const whit_decoder& d = me.d;
  const int64_t dim = d.head_dim, bytes = dim * (int64_t)element(d);
  int64_t first, last;
  me.share(d.heads, 1, first, last);
  for (int64_t h = first; h < last; h++) {
    const int64_t place = h / (d.heads / d.kv_heads) * d.capacity * bytes;
    me.steps.attend({me.run.q + h * bytes, (const char*)b.keys + place, (const char*)b.values + place,
                     me.run.mixed + h * bytes, position + 1, dim, d.scale, d.type, me.scores, me.sums});
  }
}

// x += m input, this member's rows of it.
void add_product(Member& me, const whit_matrix& m, const void* input) {
  int64_t first, last;
  me.share(m.rows, ALIGNED_ROWS, first, last);
  multiply(me, m, input, me.run.y, first, last);
  if (first < last) me.steps.add(me.at(me.run.x, first), me.at(me.run.y, first), last - first, me.d.type);
}

void pass_block(Member& me, const whit_block& b, int64_t position) {
  Run& run = me.run;
  const void* x = normalize(me, run.x, b.attention_norm);
  multiply(me, b.q, x, run.q);
  multiply(me, b.k, x, run.k);
  multiply(me, b.v, x, run.v);
  me.wait();
  rotate_heads(me, b, position);
  me.wait();
  attend_heads(me, b, position);
  me.wait();
  me.inputs.x = nullptr;
  add_product(me, b.o, run.mixed);
  me.wait();
  x = normalize(me, run.x, b.mlp_norm);
  int64_t first, last;
  me.share(me.d.intermediate, ALIGNED_ROWS, first, last);
  multiply(me, b.gate, x, run.gate, first, last);
  multiply(me, b.up, x, run.up, first, last);
  if (first < last) me.steps.gate(me.at(run.gate, first), me.at(run.up, first), last - first, me.d.type);
  me.wait();
  me.inputs.x = nullptr;
  add_product(me, b.down, run.gate);
  me.wait();
}

void embed(Member& me, int64_t token) {
  const whit_matrix* table = &me.d.embedding;
  if (table->bands) {
    token = table->places[token];
    for (table = table->bands; token >= table->rows; table++) token -= table->rows;
  }
  const whit_matrix& m = *table;
  const size_t bytes = (size_t)m.columns * element(me.d);
  if (me.rank == 0 && m.packed) {
    const Kernels& kernels = *whit_kernels(*m.packed, me.d.type, me.d.isa);
    const bool done = by_tiles(*m.packed, kernels, token, token + 1, [&](const whit_weight& w, int64_t row, int64_t) {
      kernels.dequantize(w, row, me.params, me.run.x, me.d.type);
    });
    if (!done) me.run.failed = 1;
  } else if (me.rank == 0)
    memcpy(me.run.x, (const char*)m.dense + (size_t)token * bytes, bytes);
  me.wait();
}

// The first of the likeliest tokens; a NaN is above all, as it is to torch.
bool above(float a, float b) { return a > b || (a != a && b == b); }

int64_t choose(Member& me) {
  const whit_decoder& d = me.d;
  Run& run = me.run;
  int64_t first, last;
  me.share(d.vocabulary, ALIGNED_ROWS, first, last);
  const void* x = normalize(me, run.x, d.norm);
  if (d.head.bands) multiply_bands(me, d.head, x, (char*)run.logits, first, last);
  else multiply(me, d.head, x, run.logits, first, last);
  Best best = {0, -1, {0}};
  for (int64_t token = first; token < last; token++) {
    const float value = load_as_float(run.logits, token, d.type);
    if (best.token < 0 || above(value, best.value)) best.value = value, best.token = token;
  }
  run.best[me.rank] = best;
  me.wait();
  best = run.best[0];
  for (int i = 1; i < me.size; i++)
    if (run.best[i].token >= 0 && above(run.best[i].value, best.value)) best = run.best[i];
  return best.token;
}

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

size_t params_room(const whit_matrix& m, size_t room) {
  for (int64_t i = 0; i < m.band_count; i++) room = params_room(m.bands[i], room);
  return m.packed ? (size_t)most((int64_t)room, (int64_t)whit_row_scratch(*m.packed)) : room;
}

size_t params_room(const whit_decoder& d) {
  size_t room = params_room(d.head, params_room(d.embedding, 64));
  for (int64_t i = 0; i < d.blocks; i++) {
    const whit_block& b = d.block[i];
    for (const whit_matrix* m : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) room = params_room(*m, room);
  }
  return (room + LINE - 1) & ~(size_t)(LINE - 1);
}

void decode(Member& me) {
  Run& run = me.run;
  for (int64_t i = 0; i < run.count; i++) {
    embed(me, run.tokens[i]);
    for (int64_t b = 0; b < me.d.blocks; b++) pass_block(me, me.d.block[b], run.position + i);
    const int64_t token = choose(me);
    bool stops = false;
    for (int64_t s = 0; s < run.stop_count; s++) stops = stops || run.stops[s] == token;
    if (me.rank == 0) run.tokens[i + 1] = token, run.done = i + 1;
    me.wait();  // `best` and `tokens` are read by all before they are written again
    if (stops) return;
  }
}

void join(void* argument) {
  Run& run = *(Run*)argument;
  const whit_decoder& d = *run.d;
  const int size = d.parallel && d.threads > 1 ? d.team_size() : 1, rank = size > 1 ? d.team_member() : 0;
  const int64_t widest = most(most(d.hidden, d.intermediate), d.heads * d.head_dim) + 1024;
  const size_t inputs = 16 * (size_t)widest, params = params_room(d), scores = 4 * (WHIT_SPLIT + 16);
  const size_t sums = (8 * (size_t)d.head_dim + 2 * LINE + LINE - 1) & ~(size_t)(LINE - 1);
  char* room = (char*)own_room.get(inputs + params + scores + sums + (size_t)d.hidden * 4);
  if (!room) run.failed = 1;
  Member me = {run, d, *run.steps, rank, size, {}, nullptr, nullptr, nullptr, nullptr};
  me.wait();
  if (run.failed) return;
  me.inputs.room = room, room += inputs;
  me.params = (float*)room, room += params;
  me.scores = (float*)room, room += scores;
  me.sums = (float*)room, room += sums;
  me.normed = room;
  decode(me);
}

const Steps* steps_for(int isa) {
  switch (isa) {
#if defined(WHIT_HAVE_AVX2)
    case WHIT_AVX2: return &whit_steps_avx2;
#endif
#if defined(WHIT_HAVE_AVX512)
    case WHIT_AVX512:
    case WHIT_AVX512_BF16:
    case WHIT_AMX: return &whit_steps_avx512;
#endif
    default: return &whit_steps_scalar;
  }
}

}  // namespace

// Writes the likeliest tokens after tokens[0], which stands at `position`, to tokens[1] and so on: `count` of them, or
// fewer if one of `stops` comes, which is the last then. `logits` (vocabulary, of the model's type) are those of the
// last one. Returns how many there are, or a negative number if there is no memory.
WHIT_API int64_t whit_decode(const whit_decoder* d, int64_t* tokens, int64_t position, int64_t count,
                             const int64_t* stops, int64_t stop_count, void* logits) {
  const size_t size = element(*d), line = LINE;
  const int64_t widths[] = {d->hidden, d->heads * d->head_dim, d->kv_heads * d->head_dim, d->kv_heads * d->head_dim,
                            d->heads * d->head_dim, d->intermediate, d->intermediate, d->hidden};
  size_t bytes = sizeof(Best) * (size_t)d->threads;
  for (int64_t width : widths) bytes += ((size_t)width * size + line - 1) & ~(line - 1);
  if (d->head.bands) bytes += (size_t)d->vocabulary * size;
  char* room = (char*)shared_room.get(bytes);
  if (!room) return -3;
  Run run;
  run.d = d, run.steps = steps_for(d->isa), run.stops = stops, run.tokens = tokens, run.position = position;
  run.count = count, run.stop_count = stop_count, run.done = 0, run.logits = logits, run.best = (Best*)room;
  room += sizeof(Best) * (size_t)d->threads;
  char** parts[] = {&run.x, &run.q, &run.k, &run.v, &run.mixed, &run.gate, &run.up, &run.y};
  for (int i = 0; i < 8; i++) *parts[i] = room, room += ((size_t)widths[i] * size + line - 1) & ~(line - 1);
  run.banded = room;
  if (d->parallel && d->threads > 1) d->parallel(join, &run, (unsigned)d->threads, 0);
  else join(&run);
  return run.failed ? -4 : run.done;
}
