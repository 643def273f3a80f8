// How work is shared among threads: tasks of a fixed size. Each thread begins in a part of its own, so that what it asks
// of the memory in advance is what it reads next, and then takes what is left of the others'. What a task computes does
// not depend on who takes it, so results do not depend on the number of threads.
#pragma once
#include <atomic>

#include <stdlib.h>

#include "common.h"

// Memory of a thread that grows and is kept: a call must not pay for fresh pages.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { free(data); }
  void* get(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = (bytes + 4095) & ~(size_t)4095;
      data = nullptr;
      if (posix_memalign(&data, 64, size)) data = nullptr, size = 0;
    }
    return data;
  }
};

enum { MOST_PARTS = 64 };

struct alignas(64) Part {  // of the tasks: a cache line each
  std::atomic<int64_t> next;
  int64_t until;
};

struct Team {
  Part part[MOST_PARTS];
  int parts;
  std::atomic<int> joined{0}, failed{0};
  int64_t rows, task;
  void (*work)(void* context, int64_t first, int64_t last, float* scratch);
  void* context;
  size_t scratch_bytes;
};

int whit_run(Team& team, whit_parallel parallel, int threads);  // 0, or a negative number if memory ran out

size_t whit_row_scratch(const whit_weight&);  // bytes that the kernels of a weight need beside it
const Kernels* whit_kernels(const whit_weight&, int type, int isa);  // that multiply it, or null
