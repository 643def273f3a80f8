// y (outs) = x (columns) W (outs, columns)^T for one row: quantized and multiplied in one launch, as fast as W can be read.
//
// Built at run time after common.cuh. The host (int8_row.py) also defines
//   CHUNKS             eights of columns of x that a thread holds
//   AHEAD              steps of 64 columns of W that a warp has under way
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//   OUTLIERS           1: columns in which |x| reaches the threshold are multiplied as floats
//
// Why it is fast. Blocks stay and take tile after tile of 16 outs, whose columns their warps share; W goes from memory into
// registers, the first of it before the kernel in front is done, and from there into the tensor cores. Every block
// quantizes the whole row for itself, which is little, so that no two wait for each other. What an outlier column needs of
// W is asked for before a tile's products and used after them. Warps, and floats, are added up in their order.
#include "int8_warp.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, STEP = 64, PARTS = THREADS / 16;

struct Params {
    const u8 *codes;         // each 128 above its value
    const u16 *x;
    const float *row_scale;  // of the outs
    const u16 *bias;         // of the outs, or null
    u16 *y;
    float threshold;
    int outs, columns;
};

struct Aside {
    int sums[2][WARPS][16];
    float extra[2][PARTS][16];
    u32 largest[WARPS], upto[WARPS];
    int totals[WARPS];
};

struct Row {  // as all threads know it after `take_row`
    float scale;
    int offset, outliers;
};

#ifndef EMULATED
// d (16, 8) += a (16, 32, unsigned) b (32, 8, signed).
DEVICE void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// The outlier columns, thread by thread: always in the same order.
DEVICE int list_columns(const u32 (&marks)[CHUNKS], u16 *list, Aside &a) {
    int tid = threadIdx.x, warp = tid >> 5, count = 0, at = 0, all = 0;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) count += count_bits(marks[k]);
    int upto = warp_prefix(count);
    if ((tid & 31) == 31) a.upto[warp] = upto;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) {
        if (i == warp) at = all;
        all += a.upto[i];
    }
    at += upto - count;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
        for (u32 left = marks[k]; left; left &= left - 1) list[at++] = (tid + k * THREADS) * 8 + count_bits((left & (0 - left)) - 1);
    return all;
}

// x as codes in shared memory, all of it by every block.
DEVICE Row take_row(const Params &p, u8 *codes, u16 *list, Aside &a) {
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, chunks = p.columns / 8, sum = 0;
    uint4 held[CHUNKS];
    u32 most = 0, marks[CHUNKS] = {};
    Row row = {0, 0, 0};
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        held[k] = make_uint4(0, 0, 0, 0);
        if (tid + k * THREADS < chunks) held[k] = fresh16(p.x + (tid + k * THREADS) * 8);
    }
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        if (OUTLIERS) marks[k] = reached(held[k], p.threshold), clear(held[k], marks[k]);
        most = larger_sizes(most, held[k]);
    }
    most = warp_max(larger_of(most));
    if (lane == 0) a.largest[warp] = most;
    if (OUTLIERS) row.outliers = list_columns(marks, list, a);
    else __syncthreads();
    for (int i = 0; i < WARPS; i++) most = max(most, a.largest[i]);
    float absmax = widen(most), factor = factor_of(absmax);
    row.scale = divided(absmax, 127);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        uint2 words = codes_of(held[k], factor);
        if (tid + k * THREADS >= chunks) continue;
        sum = byte_sum(words.x, byte_sum(words.y, sum));
        *(uint2 *)(codes + (tid + k * THREADS) * 8) = words;
    }
    sum = warp_sum(sum);
    if (lane == 0) a.totals[warp] = sum;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) row.offset += 128 * a.totals[i];
    return row;
}

struct Held {  // a thread's part of a step: 16 columns of rows 8 apart
    uint4 row[2];
};
struct Rows {  // where they lie
    const u8 *row[2];
};

DEVICE Rows rows_of(const Params &p, int tile, int begin, int lane) {
    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int out = min(tile * 16 + h * 8 + (lane >> 2), p.outs - 1);
        rows.row[h] = p.codes + (long long)out * p.columns + begin * STEP + (lane & 3) * 16;
    }
    return rows;
}

DEVICE void load_step(Held &held, const Rows &rows, int step) {
#pragma unroll
    for (int h = 0; h < 2; h++) held.row[h] = load16(rows.row[h] + step * STEP);
}

DEVICE float weight_of(const Params &p, int out, int column) {  // rounded as if it had been dequantized
    float w = multiplied((float)p.codes[(long long)out * p.columns + column] - 128, p.row_scale[out]);
    return widen(round_pair(w, w) & 0xFFFF);
}

DEVICE void finish(const Params &p, const Aside &a, const Row &row, int tile, int turn, int tid) {
    int out = tile * 16 + tid, total = -row.offset;
    if (tid >= 16 || out >= p.outs) return;
    float extra = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += a.sums[turn][w][tid];
    if (OUTLIERS && row.outliers)
        for (int i = 0; i < min(row.outliers, PARTS); i++) extra += a.extra[turn][i][tid];
    float y = multiplied(multiplied((float)total, row.scale), p.row_scale[out]) + extra + (p.bias ? widen(p.bias[out]) : 0);
    p.y[out] = (u16)round_pair(y, y);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) int8_row(const Params p) {
    extern __shared__ uint4 shared[];  // codes of x, what lies aside, the list
    u8 *codes = (u8 *)shared;
    Aside &a = *(Aside *)(codes + p.columns);
    u16 *list = (u16 *)(&a + 1);
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, tiles = (p.outs + 15) / 16;
    int all = p.columns / STEP, share = (all + WARPS - 1) / WARPS, begin = min(warp * share, all), steps = min(share, all - begin);
    Held held[AHEAD];
    Rows rows = rows_of(p, blockIdx.x, begin, lane);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (j < steps) load_step(held[j], rows, j);
    if (tid == 0) let_next_begin();
    await_earlier();
    Row row = take_row(p, codes, list, a);
    int turn = 0, column = 0;
    float x = 0;
    if (OUTLIERS && tid / 16 < row.outliers) column = list[tid / 16], x = widen(fresh(p.x + column));
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
        int sums[4] = {}, out = min(tile * 16 + tid % 16, p.outs - 1);
        float extra = 0;
        if (OUTLIERS && tid / 16 < row.outliers) extra = x * weight_of(p, out, column);
#pragma unroll 1
        for (int first = 0; first < steps; first += AHEAD)
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                if (first + j >= steps) break;
                uint4 top = held[j].row[0], bottom = held[j].row[1];
                if (first + j + AHEAD < steps) load_step(held[j], rows, first + j + AHEAD);
                uint4 b = *(const uint4 *)(codes + (begin + first + j) * STEP + (lane & 3) * 16);
                multiply_bytes(sums, top.x, bottom.x, top.y, bottom.y, b.x, b.y);
                multiply_bytes(sums, top.z, bottom.z, top.w, bottom.w, b.z, b.w);
            }
        if (tile + gridDim.x < tiles) {
            rows = rows_of(p, tile + gridDim.x, begin, lane);
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (j < steps) load_step(held[j], rows, j);
        }
        if ((lane & 3) == 0) a.sums[turn][warp][lane >> 2] = sums[0], a.sums[turn][warp][8 + (lane >> 2)] = sums[2];
        if (OUTLIERS && row.outliers) {
            for (int i = tid / 16 + PARTS; i < row.outliers; i += PARTS) extra += widen(fresh(p.x + list[i])) * weight_of(p, out, list[i]);
            a.extra[turn][tid / 16][tid % 16] = extra;
        }
        __syncthreads();
        finish(p, a, row, tile, turn, tid);
    }
}
