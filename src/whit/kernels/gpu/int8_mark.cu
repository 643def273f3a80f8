// Which columns of x (rows, columns) hold an |x| of at least `threshold`: a bit for each.
//
// Half a warp reads 128 neighbouring columns of a row, a block sixteen rows of its slice at a time. The blocks of a cluster
// have a slice each, SLICES of them, and the first of them joins what they found.
#define WG 1
#define BN 8
#include "int8_warp.cuh"
#include "int8_hopper.cuh"

constexpr int THREADS = 256, WIDTH = 16, HEIGHT = THREADS / WIDTH, CLUSTER = SLICES;

struct Params {
    const u16 *x;
    u32 *marks;  // a bit for each column
    float threshold;
    int rows, columns, slice;  // rows of a slice
};

extern "C" __global__ void __launch_bounds__(THREADS) int8_mark(const Params p) {
    extern __shared__ uint4 shared[];
    u8 *found = (u8 *)shared;
    int tid = threadIdx.x, lane = tid % WIDTH, group = blockIdx.x / SLICES, rank = SLICES > 1 ? (int)cluster_rank() : 0;
    int column = (group * WIDTH + lane) * 8, end = min((rank + 1) * p.slice, p.rows);
    if (tid == 0) let_next_begin();
    await_earlier();
    u32 mark = 0;
    if (column < p.columns) {
#pragma unroll 8
        for (int row = rank * p.slice + tid / WIDTH; row < end; row += HEIGHT)
            mark |= reached(fresh16(p.x + (long long)row * p.columns + column), p.threshold);
    }
    found[tid] = mark;
    __syncthreads();
    if (tid < WIDTH) {
        for (int i = 1; i < HEIGHT; i++) mark |= found[i * WIDTH + tid];
        found[tid] = mark;
    }
#if SLICES > 1
    cluster_barrier();
#else
    __syncthreads();
#endif
    int at = group * (WIDTH / 4) + tid;
    if (rank == 0 && tid < WIDTH / 4 && at < (p.columns + 31) / 32) {
        u32 all = 0;
#pragma unroll
        for (int r = 0; r < SLICES; r++) all |= load_word((const u32 *)found + tid, r);
        p.marks[at] = all;
    }
#if SLICES > 1  // the first block reads the others' shared memory
    cluster_barrier();
#endif
}
