// Rows of x (rows, columns) as int8 codes and a scale: codes = round(x 127 / max|x|), as kernels/int8.py defines.
//
// The host (int8.py) defines THREADS of a block and CHUNKS of eight columns that a thread holds, so that a row is read
// once. With OUTLIERS, columns that int8_mark.cu has marked (a single row marks its own) get codes 0, count in no
// row's maximum, and are listed by the first block. With FLOAT8 codes are E4M3 floats: x 448 / max|x|, rounded.
#include "int8_warp.cuh"

constexpr int WARPS = THREADS / 32;
constexpr float LARGEST = FLOAT8 ? 448 : 127;  // code

struct Params {
    const u16 *x;
    const u8 *marks;  // a bit for each column, or null: x is one row
    signed char *codes;
    float *scale;
    int *offset;  // of the rows' products with weights from 0 to 255 where they should be from -128 to 127
    int *listed;  // how many columns are outliers, then these
    float threshold;
    int rows, columns;
};

// The list, thread by thread: always in the same order.
DEVICE void list_columns(const Params &p, const u32 (&marks)[CHUNKS], u32 *turns) {
    int tid = threadIdx.x, warp = tid >> 5, count = 0, at = 0;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) count += count_bits(marks[k]);
    int upto = lanes_with(count > 0) ? warp_prefix(count) : 0;  // most warps have none
    if ((tid & 31) == 31) turns[warp] = upto;
    __syncthreads();
    if (count == 0 && tid != THREADS - 1) return;
    for (int i = 0; i < warp; i++) at += turns[i];
    at += upto;  // behind the thread's own
    if (tid == THREADS - 1) p.listed[0] = at;
    at -= count;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
        for (u32 left = marks[k]; left; left &= left - 1)
            p.listed[++at] = (tid + k * THREADS) * 8 + count_bits((left & (0 - left)) - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS) int8_quantize(const Params p) {
    extern __shared__ uint4 shared[];
    u32 *turns = (u32 *)shared, *largest = turns + WARPS;
    int *sums = (int *)(largest + WARPS);
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, chunks = p.columns / 8;
    if (tid == 0) let_next_begin();
    await_earlier();
    u32 marks[CHUNKS] = {};
#if OUTLIERS
    if (p.marks) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
            if (tid + k * THREADS < chunks) marks[k] = fresh(p.marks + tid + k * THREADS);
        if (blockIdx.x == 0) list_columns(p, marks, turns);
    }
#endif
    for (int row = p.rows - 1 - blockIdx.x; row >= 0; row -= gridDim.x) {  // what was marked last is still near
        const u16 *from = p.x + (long long)row * p.columns;
        uint4 held[CHUNKS];
        u32 most = 0;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            held[k] = make_uint4(0, 0, 0, 0);
            if (tid + k * THREADS < chunks) held[k] = fresh16(from + (tid + k * THREADS) * 8);
        }
#if OUTLIERS
        if (!p.marks) {
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) marks[k] = reached(held[k], p.threshold);
            list_columns(p, marks, turns);
        }
#endif
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            if (OUTLIERS) clear(held[k], marks[k]);
            most = larger_sizes(most, held[k]);
        }
        most = warp_max(larger_of(most));
        if (lane == 0) largest[warp] = most;
        __syncthreads();
        for (int i = 0; i < WARPS; i++) most = max(most, largest[i]);
        float absmax = widen(most), factor = factor_of(absmax, LARGEST);
        int sum = 0;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            uint2 words = FLOAT8 ? float8_of(held[k], factor) : codes_of(held[k], factor);
            if (tid + k * THREADS >= chunks) continue;
            sum = byte_sum(words.x, byte_sum(words.y, sum));
            *(uint2 *)(p.codes + (long long)row * p.columns + (tid + k * THREADS) * 8) = words;
        }
        sum = warp_sum(sum);
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        if (tid == 0) {
            for (int i = 1; i < WARPS; i++) sum += sums[i];
            p.scale[row] = divided(absmax, LARGEST);
            if (!FLOAT8) p.offset[row] = 128 * sum;
        }
        __syncthreads();
    }
}
