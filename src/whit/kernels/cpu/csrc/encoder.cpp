// Calls of whole encoders: how sequences are shared out to threads, and the memory that they need.
#include <sched.h>

#include "encoder.h"
#include "team.h"

#if defined(_WIN32)
#define WHIT_API8 extern "C" __declspec(dllexport)
#else
#define WHIT_API8 extern "C" __attribute__((visibility("default")))
#endif

enum { TOKENS = 128 };  // that a thread takes through all layers at a time: their activations stay in its second cache

void whit_yield() { sched_yield(); }

namespace {

thread_local Scratch room8, own8;

struct Sizes {
  int64_t stride = 0 /* of codes */, groups = 0, exact = 0;  // the most of any linear
  explicit Sizes(const whit_encoder8& e) {
    for (int64_t i = 0; i < e.count; i++)
      for (const whit_linear8* w : {&e.layers[i].qkv, &e.layers[i].out, &e.layers[i].up, &e.layers[i].down}) {
        if ((w->wide ? 2 : 1) * w->stride > stride) stride = (w->wide ? 2 : 1) * w->stride;
        if (w->groups > groups) groups = w->groups;
        if (w->exact_count > exact) exact = w->exact_count;
      }
  }
};

int64_t whole(int64_t count) { return (count + 15) & ~(int64_t)15; }

// A crew's memory, in the order of Room8; false if there is none. What products read of rows is there in tiles of 16.
bool make_room(const whit_encoder8& e, const Sizes& most, int64_t rows, Scratch& memory, Room8& room) {
  const int64_t wide = whole(rows * 3 * e.size), inner = whole(rows * e.inner), context = whole(rows * e.size);
  const int64_t read = whole(rows), scale = whole(read * most.groups), exact = whole(read * most.exact);
  float* at = (float*)memory.get((size_t)(4 * (wide + inner + context + scale + exact) + read * most.stride + 64));
  if (!at) return false;
  room.wide = at, at += wide;
  room.inner = at, at += inner;
  room.context = at, at += context;
  room.scale = at, at += scale;
  room.exact = at, at += exact;
  room.codes = (uint8_t*)at;
  return true;
}

// Each thread's own: keys, values and scores of one head; and a panel of y.
bool make_own(const whit_encoder8& e, int64_t rows, Room8& room) {
  const int64_t padded = whole(e.tokens), head = 2 * padded * (e.size / e.heads) + 8 * padded;
  const int64_t own = whole(head);
  room.own = (float*)own8.get((size_t)(4 * (own + rows * WIDE8) + 64));
  room.totals = room.own + own;
  return room.own != nullptr;
}

struct Call {
  const Kernels8* kernels;
  const whit_encoder8* e;
  const Sizes* most;
  int64_t each, chunks;          // sequences to a chunk, and how many chunks there are
  int (*team_size)();            // of OpenMP's team; null where this thread is alone
  bool together;                 // whether all threads work on the same chunk
  Room8 shared;
  Crew crew;
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0}, ready{0};
};

int64_t taken(const Call& call, int64_t chunk) {
  const int64_t left = call.e->batch - chunk * call.each;
  return left < call.each ? left : call.each;
}

void member(void* argument) {
  Call& call = *(Call*)argument;
  Room8 room = call.shared;
  const bool has_own = make_own(*call.e, call.each * call.e->tokens, room);
  if (!has_own) call.failed = 1;
  if (call.together) {
    const int size = call.team_size ? call.team_size() : 1;
    call.ready.fetch_add(1);
    while (call.ready.load() < size) whit_yield();
    if (call.failed) return;
    call.crew.size = size;  // by each the same
    for (int64_t i = 0; i < call.chunks; i++)
      call.kernels->encode(call.crew, *call.e, i * call.each, taken(call, i), room);
    return;
  }
  if (!has_own || !make_room(*call.e, *call.most, call.each * call.e->tokens, room8, room)) {
    call.failed = 1;
    return;
  }
  Crew alone;
  for (int64_t i; (i = call.next.fetch_add(1)) < call.chunks && !call.failed;)
    call.kernels->encode(alone, *call.e, i * call.each, taken(call, i), room);
}

}  // namespace

// All layers over all sequences, in place. `team_size` is omp_get_num_threads, or null for one thread.
WHIT_API8 int whit_encode8(const whit_encoder8* e, whit_parallel parallel, int (*team_size)(), int isa, int threads) {
  const Kernels8* kernels = whit_kernels8(isa);
  if (!kernels) return -1;
  if (e->batch <= 0 || e->tokens <= 0) return 0;
  if (!parallel || !team_size) threads = 1;
  const whit_embedding8& from = e->embedding;
  for (int64_t i = 0; from.ids && i < e->batch * e->tokens; i++)
    if (from.ids[i] < 0 || from.ids[i] >= from.words) return -5;
  const Sizes most(*e);
  Call call;
  call.kernels = kernels, call.e = e, call.most = &most, call.team_size = nullptr;
  call.together = threads > 1 && e->batch < threads;
  const int64_t rows = e->batch * e->tokens, share = call.together ? 1 : threads;
  const int64_t turns = (rows + share * TOKENS - 1) / (share * TOKENS);  // chunks of each thread
  call.each = (e->batch + share * turns - 1) / (share * turns);
  call.chunks = (e->batch + call.each - 1) / call.each;
  call.shared = Room8();
  if (call.together && !make_room(*e, most, call.each * e->tokens, room8, call.shared)) return -3;
  if (threads > 1) call.team_size = team_size, parallel(member, &call, (unsigned)threads, 0);
  else member(&call);
  return call.failed ? -4 : 0;
}
