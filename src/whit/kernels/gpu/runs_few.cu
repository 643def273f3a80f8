// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 32 rows: W is decoded in registers.
//
// Built at run time after common.cuh. The host (runs.py) also defines
//   ROWS               1, 2, 4, 8, 16 or 32: rows rounded up
//   WARPS              of a block; they share the columns of a tile of 16 outs
//   AHEAD              steps of W that a warp has under way
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//
// Why it is fast. The packed bytes are read once. A thread decodes 32 neighbouring columns of two rows of W to the very
// numbers that the dequantized matrix holds, rounded to x's type, and these are operands of the tensor cores as they
// are: four threads share a step of 128 columns, and x is read in the same order, from the first cache. The next
// steps' bytes are under way while one is decoded. Warps are added up in their order.
#include "runs.cuh"

constexpr int THREADS = 32 * WARPS, STEP = 4 * CHUNK;
constexpr int NT = ROWS > 8 ? ROWS / 8 : 1;  // tiles of 8 rows

struct Params {
    Weight w;
    const u16 *x;
    const u16 *bias;  // or null
    u16 *y;
    int rows;
};

struct Held {  // a thread's part of a step: rows 8 apart
    Chunk chunk[2];
    Run run[2][PARTS];
};

DEVICE void load_held(Held &held, const Weight &w, const int (&out)[2], int chunk) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        load_chunk(held.chunk[h], w, out[h], chunk);
#pragma unroll
        for (int i = 0; i < PARTS; i++) held.run[h][i] = run_of(w, out[h], RUN ? chunk * CHUNK / RUN + i : 0);
    }
}

DEVICE void add_step(float (&sums)[NT][4], const Held &held, const Params &p, int chunk, bool inside, int lane,
                      const uint4 *shared) {
    u32 words[2][WORDS];
    const u16 *x = p.x + chunk * CHUNK;
#pragma unroll
    for (int h = 0; h < 2; h++) unpack(words[h], held.chunk[h], (const u16 *)shared);
#pragma unroll
    for (int unit = 0; unit < CHUNK / 8; unit++) {
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int row = min(8 * n + min(lane >> 2, ROWS - 1), p.rows - 1);
            b[n] = make_uint4(0, 0, 0, 0);
            if (inside) b[n] = *(const uint4 *)(x + (long long)row * p.w.columns + unit * 8);
        }
        u32 pairs[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int at = unit * 8 + 2 * i;
                const Run &run = held.run[h][PARTS > 1 ? unit / 2 : 0];
                pairs[h][i] = round_pair(decoded(words[h], at, run, (const float *)shared), decoded(words[h], at + 1, run, (const float *)shared));
            }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            multiply(sums[n], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b[n].x, b[n].y);
            multiply(sums[n], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b[n].z, b[n].w);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) runs_few(const Params p) {
    extern __shared__ uint4 shared[];  // tables, then the warps' sums
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, chunks = p.w.columns / CHUNK, steps = (chunks + 3) / 4;
    int first_out = blockIdx.x * 16, out[2];
#pragma unroll
    for (int h = 0; h < 2; h++) out[h] = min(first_out + h * 8 + (lane >> 2), p.w.outs - 1);
    Held held[AHEAD];
    auto chunk_of = [&](int step) { return step * 4 + (lane & 3); };
    auto load = [&](Held &to, int step) { load_held(to, p.w, out, min(chunk_of(step), chunks - 1)); };
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (warp + j * WARPS < steps) load(held[j], warp + j * WARPS);
    fill_tables(shared, p.w, THREADS);
    __syncthreads();
    float sums[NT][4] = {};
#pragma unroll 1
    for (int first = warp; first < steps; first += AHEAD * WARPS) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int step = first + j * WARPS, next = step + AHEAD * WARPS;
            if (step >= steps) break;
            Held now = held[j];
            if (next < steps) load(held[j], next);
            add_step(sums, now, p, chunk_of(step), chunk_of(step) < chunks, lane, shared);
        }
    }
    float *block = (float *)(shared + TABLES);  // [warp][row][out]
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int row = 8 * n + 2 * (lane & 3) + (e & 1), at = (e >> 1) * 8 + (lane >> 2);
            if (row < ROWS) block[(warp * ROWS + row) * 16 + at] = sums[n][e];
        }
    __syncthreads();
    for (int i = tid; i < 16 * p.rows; i += THREADS) {
        int at = first_out + i % 16, row = i / 16;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += block[w * ROWS * 16 + i];
        if (at >= p.w.outs) continue;
        if (p.bias) sum += widen(p.bias[at]);
        p.y[(long long)row * p.w.outs + at] = (u16)round_pair(sum, sum);
    }
}
