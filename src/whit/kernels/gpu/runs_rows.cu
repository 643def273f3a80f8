// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 32 rows of bfloat16 and ggml's types.
//
// Built at run time after common.cuh. The host (runs_rows.py) defines what runs_tile.cuh and codes.cuh explain (CHUNK is
// 32) and
//   ROWS               8, 16 or 32: rows rounded up
//   WARPS              of a block; they share the columns of a tile of 16 outs
//   AHEAD              steps of W that a warp has under way
//
// Why it is fast. Two codes at a time become levels, which are exact, and then weights by two products and sums: a
// scale is two bfloat16s, so that a weight is rounded once, as if its scale were not. They are operands of the tensor cores
// for all rows. Blocks stay: a slice of x (blockIdx.y) is laid into shared memory once, in the order of the operands;
// the last block to come to a tile adds the slices, in their order. Scales are copied a tile ahead.
#include "codes.cuh"
#include "runs_tile.cuh"

constexpr int NT = ROWS / 8, PER_STEP = UNITS * ROWS * 4;  // tiles of 8 rows; of uint4: a step of x
constexpr float MOST_ZERO = 64;                            // of scales: below 256 integers are exact
constexpr bool MIXED = EACH == 2 && !NATURAL && !DENSE;    // pairs of columns lie in both runs

struct Factors {  // of a run, or of two whose columns lie side by side in pairs
    u32 high, low;   // of the scale
    u32 zero, rest;  // LESS: minus what is taken off a raw level, and minus what is left of the minimum then
};
// Minimum: the nearest integer of scales is taken off the levels, where nothing is rounded.
DEVICE float nearest_zero(float scale, float less) {
    float root = inverse_root(scale * scale), steps = less * scale * root * root;
    steps = steps < MOST_ZERO ? steps > -MOST_ZERO ? steps : -MOST_ZERO : MOST_ZERO;  // also where the scale is 0
    return steps + 12582912.0f - 12582912.0f;
}
DEVICE Factors factors_of(const Run &run, int first, int second) {
    Factors f = {};
    float a = run.scale[first], b = run.scale[second];
    f.high = round_pair(a, b);
    f.low = round_pair(a - widen(f.high & 0xFFFF), b - widen(f.high >> 16));
    if (LESS) {
        float za = nearest_zero(a, run.less[first]), zb = nearest_zero(b, run.less[second]);
        f.zero = round_pair(-128.0f - OFFSET - za, -128.0f - OFFSET - zb);
        f.rest = round_pair(za * a - run.less[first], zb * b - run.less[second]);
    }
    return f;
}
DEVICE u32 weights(u32 levels, const Factors &f) {
    if (!LESS) return multiply_add(levels, f.high, scale_by(levels, f.low));
    levels = add_pair(levels, f.zero);
    return multiply_add(levels, f.high, multiply_add(levels, f.low, f.rest));
}

DEVICE void stage(uint4 *xs, const Params &p, int begin, int steps) {
#pragma unroll 2
    for (int i = threadIdx.x; i < steps * UNITS * ROWS * 4; i += THREADS) {
        int t = i & 3, row = i / 4 % ROWS, unit = i / (4 * ROWS) % UNITS, chunk = (begin + i / PER_STEP) * 4 + t;
        xs[i] = make_uint4(0, 0, 0, 0);
        if (chunk * CHUNK < p.columns && row < p.rows) xs[i] = load_opposite(p.x + (long long)row * p.columns + chunk * CHUNK, unit);
    }
}

DEVICE void add_step(float (&sums)[NT][4], const Held &held, const uint4 *x, const Params &p, const u8 *slot, const Table &table, int chunk) {
    int lane = threadIdx.x & 31;
    Factors factors[2][MIXED ? 1 : EACH];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        Run run = run_of(slot, p, h * 8 + (lane >> 2), min(chunk, p.columns / CHUNK - 1));
        factors[h][0] = factors_of(run, 0, MIXED ? EACH - 1 : 0);
        if (!MIXED && EACH == 2) factors[h][EACH - 1] = factors_of(run, EACH - 1, EACH - 1);
    }
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
        u32 pairs[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            decode<LESS != 0>(pairs[h], held.words[h], unit, table);
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[h][i] = weights(pairs[h][i], factors[h][MIXED || EACH == 1 ? 0 : unit / 2]);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 b = x[(unit * ROWS + 8 * n) * 4];
            multiply(sums[n], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b.x, b.y);
            multiply(sums[n], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b.z, b.w);
        }
    }
}

DEVICE void add_tile(float (&sums)[NT][4], Held (&held)[AHEAD], const uint4 *x, const Params &p, const u8 *slot, const Table &table, int tile, int begin, int steps) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int first = warp; first < steps; first += AHEAD * WARPS) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int step = first + j * WARPS, next = step + AHEAD * WARPS;
            if (step >= steps) break;
            add_step(sums, held[j], x + step * PER_STEP, p, slot, table, (begin + step) * 4 + (lane & 3));
            if (next < steps) load_held(held[j], p, tile, (begin + next) * 4 + (lane & 3), lane);
        }
    }
}

DEVICE void lay_sums(float *block, const float (&sums)[NT][4]) {  // [warp][row][out]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            block[(warp * ROWS + 8 * n + 2 * (lane & 3) + (e & 1)) * OUTS + (e >> 1) * 8 + (lane >> 2)] = sums[n][e];
}
DEVICE void store(const Params &p, int row, int out, float sum) {
    if (p.bias) sum += widen(p.bias[out]);
    p.y[(long long)row * p.outs + out] = (u16)round_pair(sum, sum);
}
DEVICE void join(const Params &p, const float *block, u32 *ticket, int tile) {
    int slices = gridDim.y;
#pragma unroll 1
    for (int i = threadIdx.x; i < OUTS * p.rows; i += THREADS) {
        int out = tile * OUTS + i % OUTS, row = i / OUTS;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += block[w * ROWS * OUTS + i];
        if (out >= p.outs) continue;
        if (slices == 1) store(p, row, out, sum);
        else p.partial[((long long)blockIdx.y * p.rows + row) * p.outs + out] = sum;
    }
    if (slices == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *ticket = atomicAdd(p.arrived + tile, 1u);
    __syncthreads();
    if (*ticket != (u32)slices - 1) return;
    __threadfence();
#pragma unroll 1
    for (int i = threadIdx.x; i < OUTS * p.rows; i += THREADS) {
        int out = tile * OUTS + i % OUTS, row = i / OUTS;
        if (out >= p.outs) continue;
        float sum = 0;
#pragma unroll 4
        for (int k = 0; k < slices; k++) sum += load_uncached(p.partial + ((long long)k * p.rows + row) * p.outs + out);
        store(p, row, out, sum);
    }
    if (threadIdx.x == 0) p.arrived[tile] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) runs_rows(const Params p) {
    extern __shared__ uint4 shared[];  // table, a slice of x, the warps' sums and scales of two tiles, a ticket
    int lane = threadIdx.x & 31, tiles = (p.outs + OUTS - 1) / OUTS, apart = gridDim.x;
    int begin = blockIdx.y * p.slice_steps, steps = min(p.slice_steps, (p.columns / CHUNK + 3) / 4 - begin);
    uint4 *xs = shared + TABLE;
    float *block = (float *)(xs + p.slice_steps * PER_STEP);
    u8 *slots = (u8 *)(block + 2 * WARPS * ROWS * OUTS);
    u32 *ticket = (u32 *)(slots + 2 * slot_bytes(p));
    Held held[AHEAD];
    int tile = blockIdx.x, turn = 0;
    begin_tile(held, p, tile, begin, steps);
    copy_scales(slots, p, tile), end_copies();
    if (tile + apart < tiles) copy_scales(slots + slot_bytes(p), p, tile + apart);
    end_copies();
    if (CODEBOOK) fill_table(shared, p.levels, THREADS);
    next_may_begin(), previous_done();
    stage(xs, p, begin, steps);
    copies_left<1>();
    __syncthreads();
    Table table = {(const u8 *)shared, (u32)lane * 4};
    const uint4 *x = xs + lane;  // of row lane / 4, the chunk of lane % 4
#pragma unroll 1
    for (; tile < tiles; tile += apart, turn ^= 1) {
        float sums[NT][4] = {};
        u8 *slot = slots + turn * slot_bytes(p);
        float *mine = block + turn * WARPS * ROWS * OUTS;
        add_tile(sums, held, x, p, slot, table, tile, begin, steps);
        if (tile + apart < tiles) begin_tile(held, p, tile + apart, begin, steps);
        lay_sums(mine, sums);
        copies_left<0>();
        __syncthreads();  // sums and the next tile's scales are there, and this one's are done with
        if (tile + 2 * apart < tiles) copy_scales(slot, p, tile + 2 * apart);
        end_copies();
        join(p, mine, ticket, tile);
    }
}
