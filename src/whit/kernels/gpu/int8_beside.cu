// Rows of x as int8 codes and scales, as int8_quantize.cu makes them, beside the products of the rows before them.
//
// int8_product.cu leaves a multiprocessor room for one such block, of few registers and of hardly any shared memory. Each row
// is read twice, the second time out of the second cache, and counted when it is there: `done` says how many rows of each
// tile are. All rows before `first` are made by the kernel in front of this one; the next one, which multiplies, is let in
// when that is done.
#include "int8_warp.cuh"
#include "int8_counts.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, AT_ONCE = OUTLIERS ? 3 : 4;

struct Params {
    const u16 *x;
    const u8 *marks;  // a bit for each column, where OUTLIERS
    signed char *codes;
    float *scale;
    int *offset;
    u32 *done;  // rows of each tile
    int first, rows, columns;
};

DEVICE uint4 load_eight(const Params &p, const u16 *from, int chunk) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (chunk >= p.columns / 8) return v;
    v = fresh16(from + chunk * 8);
    if (OUTLIERS) clear(v, fresh(p.marks + chunk));
    return v;
}

DEVICE u32 largest_of(const Params &p, const u16 *from, int tid) {
    u32 most = 0;
#pragma unroll 1
    for (int chunk = tid; chunk < p.columns / 8; chunk += AT_ONCE * THREADS) {
        uint4 held[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) held[k] = load_eight(p, from, chunk + k * THREADS);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) most = larger_sizes(most, held[k]);
    }
    return warp_max(larger_of(most));
}

DEVICE int make_codes(const Params &p, const u16 *from, signed char *to, float factor, int tid) {
    int sum = 0;
#pragma unroll 1
    for (int chunk = tid; chunk < p.columns / 8; chunk += AT_ONCE * THREADS) {
        uint4 held[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) held[k] = load_eight(p, from, chunk + k * THREADS);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (chunk + k * THREADS >= p.columns / 8) break;
            uint2 words = codes_of(held[k], factor);
            sum = byte_sum(words.x, byte_sum(words.y, sum));
            *(uint2 *)(to + (chunk + k * THREADS) * 8) = words;
        }
    }
    return warp_sum(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, 16) int8_beside(const Params p) {
    extern __shared__ uint4 shared[];
    u32 *largest = (u32 *)shared;
    int *sums = (int *)(largest + WARPS), tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    await_earlier();
    if (tid == 0) let_next_begin();
    for (int row = p.first + blockIdx.x; row < p.rows; row += gridDim.x) {
        const u16 *from = p.x + (long long)row * p.columns;
        u32 most = largest_of(p, from, tid);
        if (lane == 0) largest[warp] = most;
        __syncthreads();
        for (int i = 0; i < WARPS; i++) most = max(most, largest[i]);
        float absmax = widen(most);
        int sum = make_codes(p, from, p.codes + (long long)row * p.columns, factor_of(absmax), tid);
        if (lane == 0) sums[warp] = sum;
        between_engines();
        __syncthreads();
        if (tid == 0) {
            for (int i = 1; i < WARPS; i++) sum += sums[i];
            p.scale[row] = divided(absmax, 127), p.offset[row] = 128 * sum;
            count_row(p.done + row / TILE);
        }
    }
}
