// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 8 rows and ggml's types, as fast as W can be read.
//
// Built at run time after common.cuh. The host (runs_row.py) defines what runs_tile.cuh and codes.cuh explain (CHUNK
// is 32) and
//   ROWS               1, 2, 4 or 8: rows rounded up
//   WARPS              of a block; they share the columns of a tile of 16 outs
//   AHEAD              steps of W that a warp has under way
//   ROOM               blocks per multiprocessor to leave registers for
//
// Why it is fast. Instructions bound a stream of codes, so there are few per code. Integers are operands of the tensor
// cores under an exponent, two at a time, with no scale: a thread holds 32 columns, one run or two, and x of each thread
// and run is a column of its own in the product, zero elsewhere. So a run's sum comes back to the thread that has its
// codes, which multiplies it by the run's scale. The sum of x over a run, made once, takes the exponents, the zeros and
// the minimum off. Blocks stay and take tile after tile; the scales of a tile are one stretch of memory for each of their
// fields, copied two tiles ahead; its first codes are asked for before the warps add up the tile in front of it.
#include "codes.cuh"
#include "runs_tile.cuh"

constexpr int V = ROWS * EACH, NT = (V + 1) / 2;     // sums of a chunk and a row of W; products that make them
constexpr int PER_STEP = UNITS * V * 4;              // of uint4: a step of x
constexpr bool SUMMED = HAS_RAW || LESS;             // needs sums of x
constexpr float BIAS = HAS_RAW ? (HALF ? 1024.0f : 128.0f) + OFFSET : 0.0f;  // what is added to a level

struct Shared {
    const uint4 *x;      // a lane's, of the first step
    int stride;          // 0 where a lane has none, and reads zeros
    const float *sums;   // of x: [chunk][row and run]
    Table table;
};
// x in the order of the operands: [step][unit][row and run][lane & 3]; columns of another run are zero.
DEVICE void stage(uint4 *xs, const Params &p, int steps) {
    constexpr bool MIXED = !NATURAL && !DENSE;  // pairs of columns lie in both runs
#pragma unroll 2
    for (int i = threadIdx.x; i < steps * UNITS * 4; i += THREADS) {
        int t = i & 3, unit = i / 4 % UNITS, chunk = i / (4 * UNITS) * 4 + t;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (chunk * CHUNK < p.columns && row < p.rows) v = load_opposite(p.x + (long long)row * p.columns + chunk * CHUNK, unit);
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                u32 mask = EACH == 1 ? 0xFFFFFFFFu : MIXED ? 0xFFFFu << 16 * e : unit / 2 == e ? 0xFFFFFFFFu : 0;
                xs[((i >> 2) * V + row * EACH + e) * 4 + t] = make_uint4(v.x & mask, v.y & mask, v.z & mask, v.w & mask);
            }
        }
    }
    for (int i = threadIdx.x; i < PER_STEP; i += THREADS) xs[steps * PER_STEP + i] = make_uint4(0, 0, 0, 0);
}
DEVICE void sum_runs(float *sums, const uint4 *xs, int steps) {
#pragma unroll 1
    for (int i = threadIdx.x; i < steps * 4 * V; i += THREADS) {
        int chunk = i / V;
        float sum = 0;
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 v = xs[((chunk / 4 * UNITS + unit) * V + i % V) * 4 + chunk % 4];
            u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; k++) sum += widen(pairs[k] & 0xFFFF) + widen(pairs[k] >> 16);
        }
        sums[i] = sum;
    }
}

DEVICE void add_step(float (&sums)[ROWS][2], const Held &held, const Shared &s, const Params &p, const u8 *slot, int step, int lane) {
    float part[NT][4] = {};
    const uint4 *x = s.x + step * s.stride;
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
        u32 top[4], bottom[4];
        decode<HAS_RAW>(top, held.words[0], unit, s.table);
        decode<HAS_RAW>(bottom, held.words[1], unit, s.table);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 b = x[(unit * V + 2 * n) * 4];
            multiply(part[n], top[0], bottom[0], top[1], bottom[1], b.x, b.y);
            multiply(part[n], top[2], bottom[2], top[3], bottom[3], b.z, b.w);
        }
    }
    int chunk = step * 4 + (lane & 3), inside = min(chunk, p.columns / CHUNK - 1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        Run run = run_of(slot, p, h * 8 + (lane >> 2), inside);
#pragma unroll
        for (int v = 0; v < V; v++) {
            float &to = sums[v / EACH][h];
            to += run.scale[v % EACH] * part[v / 2][2 * h + v % 2];
            if (SUMMED) to -= (run.scale[v % EACH] * BIAS + run.less[v % EACH]) * s.sums[chunk * V + v];
        }
    }
}

DEVICE void add_tile(float (&sums)[ROWS][2], Held (&held)[AHEAD], const Shared &s, const Params &p, const u8 *slot, int tile, int steps) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int first = warp; first < steps; first += AHEAD * WARPS) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int step = first + j * WARPS, next = step + AHEAD * WARPS;
            if (step >= steps) break;
            add_step(sums, held[j], s, p, slot, step, lane);
            if (next < steps) load_held(held[j], p, tile, next * 4 + (lane & 3), lane);
        }
    }
}

// A warp's sums of a tile: [warp][row][out].
DEVICE void lay_sums(float *block, const float (&sums)[ROWS][2], int lane, int warp) {
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = sums[row][h];
            sum += from_lane(sum, 1), sum += from_lane(sum, 2);
            if (!(lane & 3)) block[(warp * ROWS + row) * OUTS + h * 8 + (lane >> 2)] = sum;
        }
}
DEVICE void join(const Params &p, const float *block, int tile) {
#pragma unroll 1
    for (int i = threadIdx.x; i < OUTS * p.rows; i += THREADS) {
        int out = tile * OUTS + i % OUTS, row = i / OUTS;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += block[w * ROWS * OUTS + i];
        if (out >= p.outs) continue;
        if (p.bias) sum += widen(p.bias[out]);
        p.y[(long long)row * p.outs + out] = (u16)round_pair(sum, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, ROOM) runs_row(const Params p) {
    extern __shared__ uint4 shared[];  // table, x and zeros, its sums, the warps' sums of two tiles, scales of two tiles
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3, column = lane >> 2;
    int steps = (p.columns / CHUNK + 3) / 4, tiles = (p.outs + OUTS - 1) / OUTS, apart = gridDim.x;
    uint4 *xs = shared + TABLE;
    float *x_sums = (float *)(xs + (steps + 1) * PER_STEP), *block = x_sums + steps * 4 * V;
    u8 *slots = (u8 *)(block + 2 * WARPS * ROWS * OUTS);
    Held held[AHEAD];
    int tile = blockIdx.x, turn = 0;
    begin_tile(held, p, tile, steps);
    copy_scales(slots, p, tile), end_copies();
    if (tile + apart < tiles) copy_scales(slots + slot_bytes(p), p, tile + apart);
    end_copies();
    if (CODEBOOK) fill_table(shared, p.levels, THREADS);
    next_may_begin(), previous_done();
    stage(xs, p, steps);
    copies_left<1>();
    __syncthreads();
    bool has_x = column / 2 == t && column % 2 < V;
    Shared s = {xs + (has_x ? column % 2 * 4 + t : steps * PER_STEP + (lane / 8 ^ 1)), has_x ? PER_STEP : 0, x_sums, {(const u8 *)shared, (u32)lane * 4}};
    if (SUMMED) {
        sum_runs(x_sums, xs, steps);
        __syncthreads();
    }
#pragma unroll 1
    for (; tile < tiles; tile += apart, turn ^= 1) {
        float sums[ROWS][2] = {};
        u8 *slot = slots + turn * slot_bytes(p);
        float *mine = block + turn * WARPS * ROWS * OUTS;
        add_tile(sums, held, s, p, slot, tile, steps);
        if (tile + apart < tiles) begin_tile(held, p, tile + apart, steps);
        lay_sums(mine, sums, lane, warp);
        copies_left<0>();
        __syncthreads();  // sums and the next tile's scales are there, and this one's are done with
        if (tile + 2 * apart < tiles) copy_scales(slot, p, tile + 2 * apart);
        end_copies();
        join(p, mine, tile);
    }
}
