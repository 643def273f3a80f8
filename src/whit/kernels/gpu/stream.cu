// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias, W read once as the packed codes that the file holds.
//
// Built at run time, one kernel per format and configuration, after common.cuh. The host (stream.py) also defines
//   CHUNK, STEPS_PER_GROUP    as codes.cuh says
//   MT, NT             tiles of 16 outs per warp, tiles of 8 rows
//   WO, WK             warps along outs and along columns
//   DEPTH              steps that a warp loads before it computes
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//
// Why it is fast. The outs are the M of mma.m16n8k16 and the rows its N, so 1 to 8 rows cost one instruction. Codes go
// straight to registers and become operands there (codes.cuh); x is brought into their order once per block, in shared
// memory. Scales multiply float32 sums of a group, not weights. Warps that split columns are added in a fixed order;
// blocks too, by the last one to finish: no atomics on floats, and a row's result does not depend on what other rows
// are there.
#include "codes.cuh"
#include "sums.cuh"

constexpr int THREADS = 32 * WO * WK;
constexpr int OUTS = 16 * MT * WO;           // of a block
constexpr int ROWS = 8 * NT;                 // of a block
constexpr int STAGE = WK * DEPTH;                // steps between two barriers

struct Held {  // what a warp holds of W for one stage
    u32 words[DEPTH][MT][2][WORDS];
    float scale[DEPTH][MT][2];
    float zero[DEPTH][MT][2];
};

DEVICE void load_held(Held &held, const Params &p, int first_step, int end, int first_out, int lane) {
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
        int step = first_step + u;
        if (step >= end) break;
#pragma unroll
        for (int m = 0; m < 2 * MT; m++) {
            int out = min(first_out + m * 8 + (lane >> 2), p.outs - 1);
            load_words(held.words[u][m >> 1][m & 1], p.codes + (long long)out * p.row_words + (step * 4 + (lane & 3)) * WORDS);
#if STEPS_PER_GROUP
            held.scale[u][m >> 1][m & 1] = load_scale(p.scales, out, step / STEPS_PER_GROUP);
            if (ZERO) held.zero[u][m >> 1][m & 1] = load_zero(p.scales, out, step / STEPS_PER_GROUP);
#endif
        }
    }
}

// Eight columns of x per thread and unit, in the order of the operands: [step][unit][row][lane & 3].
DEVICE void stage_x(uint4 *xs, const Params &p, int first_step, int end, int first_row, int rows, u32 tid) {
    u32 count = STAGE * UNITS * 4 * rows;
#pragma unroll 2
    for (u32 i = tid; i < count; i += THREADS) {
        u32 unit = i % UNITS, t = i / UNITS % 4, step = i / (4 * UNITS) % STAGE, row = i / (4 * UNITS * STAGE);
        if (first_step + (int)step >= end) continue;
        const u16 *chunk = p.x + (long long)(first_row + row) * p.columns + (first_step + step) * STEP + t * CHUNK;
        xs[((step * UNITS + unit) * rows + row) * 4 + t] = load_opposite(chunk, unit);
    }
}

struct Sums {
    float all[MT][NT][4];
};

DEVICE void compute(Sums &sums, const Held &held, const uint4 *xs, const Table &table, int steps, int slot, int rows, int lane) {
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
        if (slot + u >= steps) break;
#if STEPS_PER_GROUP
        float part[MT][NT][4] = {};
#endif
        float total[NT][4] = {};  // of x over the group, for zero points
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                int row = n * 8 + (lane >> 2);
                b[n] = make_uint4(0, 0, 0, 0);
                if (row < rows) b[n] = xs[(((slot + u) * UNITS + unit) * rows + row) * 4 + (lane & 3)];
                if (ZERO && STEPS_PER_GROUP) {
                    multiply(total[n], ONES, ONES, ONES, ONES, b[n].x, b[n].y);
                    multiply(total[n], ONES, ONES, ONES, ONES, b[n].z, b[n].w);
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 top[4], bottom[4];
                decode(top, held.words[u][m][0], unit, table);
                decode(bottom, held.words[u][m][1], unit, table);
#pragma unroll
                for (int n = 0; n < NT; n++) {
#if STEPS_PER_GROUP
                    float(&to)[4] = part[m][n];
#else
                    float(&to)[4] = sums.all[m][n];
#endif
                    multiply(to, top[0], bottom[0], top[1], bottom[1], b[n].x, b[n].y);
                    multiply(to, top[2], bottom[2], top[3], bottom[3], b[n].z, b[n].w);
                }
            }
        }
#if STEPS_PER_GROUP
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float value = part[m][n][e];
                    if (ZERO) value -= held.zero[u][m][e >> 1] * total[n][e];
                    sums.all[m][n][e] += held.scale[u][m][e >> 1] * value;
                }
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) stream(const Params p) {
    extern __shared__ uint4 shared[];
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, wo = warp % WO, wk = warp / WO;
    int block_out = blockIdx.x * OUTS, first_out = block_out + wo * 16 * MT;
    int first_row = blockIdx.z * ROWS, rows = min(p.rows - first_row, ROWS);
    int begin = blockIdx.y * p.split_steps, end = min(begin + p.split_steps, p.columns / STEP);
    int stages = (end - begin + STAGE - 1) / STAGE;
    Table table = {(const u8 *)shared, (u32)lane * 4};
    uint4 *xs[2] = {shared + TABLE, shared + TABLE + STAGE * UNITS * 4 * rows};

    Held first, second;
    load_held(first, p, begin + wk * DEPTH, end, first_out, lane);
    if (CODEBOOK) fill_table(shared, p.table, THREADS);
    stage_x(xs[0], p, begin, end, first_row, rows, tid);
    __syncthreads();

    Sums sums = {};
    auto stage = [&](Held &now, Held &next, int s) {
        int at = begin + s * STAGE;
        load_held(next, p, at + STAGE + wk * DEPTH, end, first_out, lane);
        compute(sums, now, xs[s & 1], table, min(STAGE, end - at), wk * DEPTH, rows, lane);
        if (s + 1 < stages) stage_x(xs[(s + 1) & 1], p, at + STAGE, end, first_row, rows, tid);
        __syncthreads();
    };
#pragma unroll 1
    for (int s = 0; s < stages; s += 2) {
        stage(first, second, s);
        if (s + 1 < stages) stage(second, first, s + 1);
    }

#if !STEPS_PER_GROUP
    for (int m = 0; m < MT; m++)
        for (int h = 0; h < 2; h++) {
            float scale = load_scale(p.scales, min(first_out + m * 16 + h * 8 + (lane >> 2), p.outs - 1), 0);
            for (int n = 0; n < NT; n++) sums.all[m][n][2 * h] *= scale, sums.all[m][n][2 * h + 1] *= scale;
        }
#endif

    // The warps along columns add up in turn: [row][out].
    float *block = (float *)shared;
#pragma unroll 1
    for (int turn = 0; turn < WK; turn++) {
        if (wk == turn)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int row = n * 8 + (lane & 3) * 2 + (e & 1), out = (wo * MT + m) * 16 + (e >> 1) * 8 + (lane >> 2);
                        float *to = block + row * OUTS + out;
                        if (row < rows) *to = turn ? *to + sums.all[m][n][e] : sums.all[m][n][e];
                    }
        __syncthreads();
    }
    finish(p, block, OUTS, OUTS, first_row, rows, THREADS);
}
