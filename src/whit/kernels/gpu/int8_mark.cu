// Which columns of x (rows, columns) hold an |x| of at least `threshold`: a bit for each.
//
// WIDTH lanes read neighbouring columns of a row, eight each, and a block as many rows of its slice at a time as it has such
// groups of lanes. Slices are JOINED, where there are several, in what was zeros.
#include "int8_warp.cuh"

constexpr int THREADS = 256, HEIGHT = THREADS / WIDTH;

struct Params {
    const u16 *x;
    u8 *marks;  // a bit for each column
    float threshold;
    int rows, columns, slice;  // rows of a slice
};

extern "C" __global__ void __launch_bounds__(THREADS) int8_mark(const Params p) {
    extern __shared__ uint4 shared[];
    u8 *found = (u8 *)shared;
    int tid = threadIdx.x, column = (blockIdx.x * WIDTH + tid % WIDTH) * 8;
    int end = min((int)(blockIdx.y + 1) * p.slice, p.rows);
    if (tid == 0) let_next_begin();
    await_earlier();
    u32 mark = 0;
    if (column < p.columns) {
#pragma unroll 8
        for (int row = blockIdx.y * p.slice + tid / WIDTH; row < end; row += HEIGHT)
            mark |= reached(fresh16(p.x + (long long)row * p.columns + column), p.threshold);
    }
#pragma unroll
    for (int d = WIDTH; d < 32; d *= 2) mark |= exchange(mark, d);
    if ((tid & 31) < WIDTH) found[(tid >> 5) * WIDTH + (tid & 31)] = mark;
    __syncthreads();
    if (tid < WIDTH && column < p.columns) {
        for (int i = 1; i < THREADS / 32; i++) mark |= found[i * WIDTH + tid];
        if (!JOINED) p.marks[column / 8] = mark;
        else if (mark) atomicOr((u32 *)p.marks + column / 32, mark << (column & 24));
    }
}
