// Which columns of x (rows, columns) hold an |x| of at least `threshold`: a bit for each.
//
// A warp reads 256 neighbouring columns of a row, a block eight rows of its slice at a time; slices are JOINED where there
// are zeros to begin with.
#include "int8_warp.cuh"

constexpr int THREADS = 256, LANES = THREADS / 32;

struct Params {
    const u16 *x;
    u8 *marks;  // a bit for each column
    float threshold;
    int rows, columns, slice;  // rows of a slice
};

extern "C" __global__ void __launch_bounds__(THREADS) int8_mark(const Params p) {
    extern __shared__ uint4 shared[];
    u8 *found = (u8 *)shared;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = (blockIdx.x * 32 + lane) * 8;
    int end = min((int)(blockIdx.y + 1) * p.slice, p.rows);
    if (threadIdx.x == 0) let_next_begin();
    await_earlier();
    u32 mark = 0;
    if (column < p.columns) {
#pragma unroll 8
        for (int row = blockIdx.y * p.slice + warp; row < end; row += LANES)
            mark |= reached(fresh16(p.x + (long long)row * p.columns + column), p.threshold);
    }
    found[threadIdx.x] = mark;
    __syncthreads();
    if (warp == 0 && column < p.columns) {
        for (int i = 1; i < LANES; i++) mark |= found[i * 32 + lane];
        if (!JOINED) p.marks[column / 8] = mark;
        else if (mark) atomicOr((u32 *)p.marks + column / 32, mark << (column & 24));
    }
}
