// The team of threads that makes tokens: one from the first to the last, each member with its own rows of every matrix.
// Included by decoder.cpp.
//
// Between products the team waits at a barrier; what is cheap (norms, the order in which kernels meet their inputs) each
// member does for itself instead. A row is summed by one thread in one order, whatever the size of the team.

namespace {

enum { SPINS = 2000, LINE = 64 };

// Waits by spinning for some microseconds and then by giving way: other programs may need the processor.
struct Barrier {
  std::atomic<int> arrived{0}, phase{0};
  void wait(int members) {
    if (members == 1) return;
    const int now = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase.load(std::memory_order_acquire) == now; spins++) {
      if (spins < SPINS) {
#if defined(__x86_64__) || defined(__i386__)
        _mm_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }
};

struct Best {  // of one member's logits
  float value;
  int64_t token;
  char padding[LINE - 16];
};

struct Run {
  const whit_decoder* d;
  const Steps* steps;
  const int64_t* stops;
  int64_t *tokens, position, count, stop_count, done;
  char *x, *q, *k, *v, *mixed, *gate, *up, *y;  // what the team shares, of the model's type
  void* logits;
  char* banded;  // logits in the order of the head's bands
  Best* best;
  Barrier barrier;
  std::atomic<int> failed{0};
};

size_t element(const whit_decoder& d) { return d.type == WHIT_F32 ? 4 : 2; }

// The inputs of a product in the order in which its kernel meets them; kept until another vector or order is asked for.
struct Inputs {
  const void* x = nullptr;
  int64_t columns = 0, group_size = 0;
  int inputs = 0, codes = 0, type = 0;
  const void* kernels = nullptr;
  Rows rows;
  Product8 product;
  Planes planes;
  whit_rows8 rows8;
  char *room, *lanes;
};

struct Member {
  Run& run;
  const whit_decoder& d;
  const Steps& steps;
  int rank, size;
  Inputs inputs;
  float *params, *scores, *sums;  // room of the kernels, and of attention
  char* normed;

  void wait() { run.barrier.wait(size); }
  char* at(char* base, int64_t index) const { return base + index * (int64_t)element(d); }
  void share(int64_t rows, int64_t step, int64_t& first, int64_t& last) const {
    const int64_t each = (rows + step * size - 1) / (step * size) * step;
    first = each * rank < rows ? each * rank : rows;
    last = first + each < rows ? first + each : rows;
  }
};

}  // namespace
