// Calls of the x^T x product: columns are packed in panels, then every pair of panels is a task.
#include "isa.h"
#include "team.h"

namespace {

struct Job {
  const GramKernels* kernels;
  Gram gram;
};

void pack_task(void* context, int64_t first, int64_t last, float*) {
  const Job& job = *(const Job*)context;
  for (int64_t panel = first; panel < last; panel++) job.kernels->pack(job.gram, panel);
}

void block_task(void* context, int64_t first, int64_t last, float* scratch) {
  const Job& job = *(const Job*)context;
  int64_t i = 0, j = first;  // the first-th of (0, 0), (1, 0), (1, 1), (2, 0), ...
  while (j > i) j -= ++i;
  for (int64_t n = first; n < last; n++) {
    job.kernels->block(job.gram, i, j, (double*)scratch);
    if (++j > i) i++, j = 0;
  }
}

const GramKernels* kernels_for(int isa) {
#if defined(WHIT_HAVE_AVX512_BF16)
  if (isa == WHIT_AVX512_BF16) return &whit_gram_bf16;
#endif
  (void)isa;
  return nullptr;
}

thread_local Scratch packed;

}  // namespace

int whit_gram(const void* x, int64_t rows, int64_t columns, float* sums, whit_parallel parallel, int isa, int threads) {
  const GramKernels* kernels = kernels_for(isa);
  if (!kernels) return -1;
  const int64_t panels = (columns + GRAM_WIDTH - 1) / GRAM_WIDTH, pairs = (rows + 1) / 2;
  Job job = {kernels, {(const uint16_t*)x, rows, columns, pairs, nullptr, sums}};
  job.gram.panels = (uint32_t*)packed.get((size_t)(panels * pairs * GRAM_WIDTH * 4));
  if (!job.gram.panels) return -3;
  Team pack, multiply;
  pack.rows = panels, pack.task = 1, pack.work = pack_task, pack.context = &job, pack.scratch_bytes = 64;
  multiply.rows = panels * (panels + 1) / 2, multiply.task = 1, multiply.work = block_task, multiply.context = &job;
  multiply.scratch_bytes = sizeof(double) * GRAM_WIDTH * GRAM_WIDTH;
  int status = whit_run(pack, parallel, threads);
  return status ? status : whit_run(multiply, parallel, threads);
}
