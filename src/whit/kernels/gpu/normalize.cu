// One block per row of x: residual += added, rounded, and its RMS norm (norm.cuh). Built after common.cuh. Macros:
//   COLUMNS, THREADS   of a row, a multiple of 8; of a block
//   ADDED              0: nothing is added
#include "norm.cuh"

struct Params {
    u16 *residual;
    const u16 *added, *weight;
    u16 *y;
    float epsilon;
};

extern "C" __global__ void __launch_bounds__(THREADS) normalize(const Params p) {
    extern __shared__ uint4 shared[];
    next_may_begin();
    uint4 weights[ROW_HELD];
    load_weights(weights, p.weight);
    previous_done();
    long long row = (long long)blockIdx.x * ROW_UNITS;
    uint4 held[ROW_HELD];
    norm_row(held, (uint4 *)p.residual + row, (const uint4 *)p.added + row, weights, p.epsilon, (float *)shared);
#pragma unroll
    for (int h = 0; h < ROW_HELD; h++) {
        int unit = h * THREADS + threadIdx.x;
        if (unit < ROW_UNITS) ((uint4 *)p.y)[row + unit] = held[h];
    }
}
