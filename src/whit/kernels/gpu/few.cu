// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 16 rows, as fast as W can be read.
//
// Built at run time, one kernel per format and cut, after common.cuh. The host (few.py) also defines
//   CHUNK, STEPS_PER_GROUP    as codes.cuh says
//   ROWS               1, 2, 4, 8 or 16: rows rounded up
//   WARPS              of a block; they share the columns of a tile of 16 outs
//   AHEAD              steps of W that a warp has under way
//   PARTS              weights of one format and width that are multiplied by the same x, one after the other
//   EVEN               1: all warps have whole rounds of AHEAD steps, each with its own scale, and these lie aligned
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//   WIDE               as codes.cuh says
//   SPREAD             groups side by side in a step; up to 8 rows times groups
//   NORMED             columns of x of one row, of which every block makes the RMS norm for itself; 0: x is as it is. Where
//                      eight neighbouring columns are an operand's: codes of 4 and 8 bits
//   GATED              1: two weights, of gates and ups, whose tiles have eight outs of each; y = silu(gate) * up, one row
//   ONTO               1: the result of one row is added to what y has
//
// What bounds a stream of codes is instructions, so there are few per code. Blocks stay and take tile after tile: x, in
// the order of the operands, and the table of a codebook are laid into shared memory once. Integers are multiplied with
// the exponent's bit that the unpacking leaves in them; the sum of x over a step, made once, takes it off again, and the
// zero point with it. Scales stay as they were loaded until their step is due. The next tile's codes are asked for
// before the warps add up, always in the same order.
// A row of W is read 64 bytes at a time where its groups allow it, or memory answers half of what it could: four threads
// then hold columns of SPREAD groups, and x of each group is a row of its own in the product (`V`), zero elsewhere, so
// that its sum comes apart from the others' and gets its own scale.
// Requests to the first cache are few, too: in EVEN cuts the scales of a round come in one, and where a thread's codes of
// a step are eight bytes (PAIRED), it asks for 16 of one of its rows and gets the other row's from its neighbour's
// neighbour. Where x is too large for a block it is cut into slices of columns (blockIdx.y), and the last block to come to
// a tile adds them.
#define SCALED (SPREAD > 1 && ROWS * SPREAD > 8)  // codes themselves, before they are multiplied
#define BARE (SCALED && !HALF && !CODEBOOK && BITS < 8 && ZERO % 3 == 0 && SCALE == 0)
#define PLACED (BARE || !HALF && !ZERO && !CODEBOOK && BITS < 4 && !SCALED)
#include "codes.cuh"
#include "sums.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr bool SUMMED = !SCALED && (HAS_RAW || ZERO);  // needs sums of x
constexpr float BIAS = PLACED ? 1.0f : HAS_RAW ? (HALF ? 1024.0f : 128.0f) + OFFSET : 0.0f;  // what is added to a code
constexpr int LEVELS = SCALE == 3 ? 64 : 0;  // of uint4: the levels of quantized scales
constexpr int PER_STEP = UNITS * ROWS * 4;   // of uint4: a step of x
constexpr int SIDES = SCALED ? 1 : SPREAD;   // groups whose sums come apart
constexpr int V = ROWS * SIDES, LANES = 4 / SIDES;  // rows of the product; threads that share a group
constexpr bool PAIRED = WORDS == 2 && SPREAD == 1;
constexpr int SCALE_BYTES = SCALE == 3 ? 1 : SCALE == 2 ? 4 : 2;
constexpr int SCALE_WORDS = EVEN ? AHEAD * SPREAD * SCALE_BYTES / 4 : 1;  // of a round
constexpr int KINDS = SIDES > 1 ? 2 : 1;    // scales of a row of W and step that a thread needs: of columns 2 t, 2 t + 1
constexpr int NT = ROWS > 8 ? ROWS / 8 : 1;  // tiles of 8 rows
static_assert(SPREAD == 1 || STEPS_PER_GROUP == 1, "a step holds whole groups");
#include "few_ends.cuh"
#include "few_x.cuh"

#include "few_scales.cuh"

struct Held {  // what a thread holds of W for one step: rows 8 apart
    u32 words[2][WORDS];
    Raw scale[2][KINDS];
    float zero[2][KINDS];
};
struct Rows {  // where a thread's two rows of W lie, from the warp's first step on
    const u32 *codes[2];
    int out[2], part, tile;
    Scales scales[GATED + 1];
    float offset[GATED + 1];  // SCALE 3
};

DEVICE void load_held(Held &held, const Rows &rows, int begin, int step) {
    if constexpr (PAIRED) {
        uint4 v = load16(rows.codes[0] + step * 4 * WORDS);
        held.words[0][0] = v.x, held.words[0][WORDS - 1] = v.y, held.words[1][0] = v.z, held.words[1][WORDS - 1] = v.w;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (!PAIRED) load_words(held.words[h], rows.codes[h] + step * 4 * WORDS);
#if STEPS_PER_GROUP
#pragma unroll
        for (int kind = 0; kind < KINDS; kind++) {
            int group = (begin + step) / STEPS_PER_GROUP * SPREAD + group_of(threadIdx.x, kind);
            if (!EVEN) held.scale[h][kind] = load_raw(rows.scales[GATED * h], rows.out[h], group);
            if (ZERO) held.zero[h][kind] = load_zero(rows.scales[GATED * h], rows.out[h], group);
        }
#endif
    }
}

DEVICE int tiles_of(const Params &p) { return (p.outs + TILE_OUTS - 1) / TILE_OUTS; }

DEVICE Rows rows_of(const Several &all, int tile, int begin, int lane) {
    Rows rows;
    rows.part = 0;
    if (!GATED) {
#pragma unroll
        for (int i = 0; i < PARTS - 1; i++)
            if (rows.part == i && tile >= tiles_of(all.part[i])) tile -= tiles_of(all.part[i]), rows.part++;
    }
    rows.tile = tile;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const Params &p = all.part[GATED ? h : rows.part];
        if (h <= GATED) rows.scales[h] = p.scales, rows.offset[h] = SCALE == 3 ? *p.scales.offset : 0.0f;
        rows.out[h] = min(tile * TILE_OUTS + (GATED ? 0 : h * 8) + (lane >> 2), p.outs - 1);
        rows.codes[h] = p.codes + (long long)rows.out[h] * p.row_words + (begin * 4 + (lane & 3)) * WORDS;
    }
    if (PAIRED) {
        const u32 *first = all.part[rows.part].codes, *second = all.part[GATED ? 1 : rows.part].codes;
        int lower = lane >> 1 & 1, out = lower ? rows.out[1] : rows.out[0], words = all.part[rows.part].row_words;
        rows.codes[0] = (lower ? second : first) + (long long)out * words + begin * 4 * WORDS + (lane & 1) * 4;
    }
    return rows;
}

#include "few_steps.cuh"

DEVICE float joined(const float *block, int row, int out) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
#pragma unroll
        for (int group = 0; group < SIDES; group++) sum += block[((w * ROWS + row) * SIDES + group) * 16 + out];
    return sum;
}

// The warps' sums of a tile, [warp][row][group][out], become outs of y, or of a slice.
DEVICE void join(float *block, u32 *ticket, const Sums &sums, const Several &all, const Params &p, int tile, u32 old, int tid) {
    int lane = tid & 31, warp = tid >> 5, slices = gridDim.y, slice = blockIdx.y;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int row = 8 * n + 2 * (lane & 3) + (e & 1), out = (e >> 1) * 8 + (lane >> 2);
            if (row < V) block[(warp * V + row) * 16 + out] = (BARE ? 0x1p20f : 1.0f) * sums.all[n][e];
        }
    __syncthreads();
#pragma unroll 1
    for (int i = tid; i < TILE_OUTS * p.rows; i += THREADS) {
        int in_tile = i % TILE_OUTS, out = tile * TILE_OUTS + in_tile, row = i / TILE_OUTS;
        float sum = joined(block, row, in_tile), up = GATED ? joined(block, row, in_tile + 8) : 0;
        if (out >= p.outs) continue;
        if (slices == 1) put(all, p, row, out, sum, up, old);
        else p.partial[((long long)slice * p.rows + row) * p.outs + out] = sum;
    }
    if (NORMED || GATED || ONTO || slices == 1) return;
    __threadfence();
    __syncthreads();
    if (tid == 0) *ticket = atomicAdd(p.arrived + tile, 1u);
    __syncthreads();
    if (*ticket != (u32)slices - 1) return;
    __threadfence();
#pragma unroll 1
    for (int i = tid; i < 16 * p.rows; i += THREADS) {
        int out = tile * 16 + i % 16, row = i / 16;
        if (out >= p.outs) continue;
        float sum = 0;
#pragma unroll 4
        for (int k = 0; k < slices; k++) sum += load_uncached(p.partial + ((long long)k * p.rows + row) * p.outs + out);
        store(p, row, out, sum);
    }
    if (tid == 0) p.arrived[tile] = 0;
}

DEVICE void begin_tile(Held (&held)[AHEAD], Round &round, const Rows &rows, int begin, int steps) {
    if (EVEN) load_round(round, rows.scales, rows.out, begin * SPREAD);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (EVEN || j < steps) load_held(held[j], rows, begin, j);
}

// All steps of a warp in a tile.
DEVICE void add_tile(Sums &sums, Held (&held)[AHEAD], Round &round, const Shared &s, const Rows &rows, int begin, int steps, int lane) {
#pragma unroll 1
    for (int first = 0; first < steps; first += AHEAD) {
        Round now = round;
        bool more = first + AHEAD < steps;
        if (EVEN) load_round(round, rows.scales, rows.out, (begin + (more ? first + AHEAD : 0)) * SPREAD);  // without a branch
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (!EVEN && first + j >= steps) break;
            Raw raw[2][KINDS];
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int k = 0; k < KINDS; k++) raw[h][k] = EVEN ? raw_of(now, h, j, k, lane) : held[j].scale[h][k];
            add_step(sums, held[j], raw, s, rows, first + j, lane);
            if (EVEN ? more : first + j + AHEAD < steps) load_held(held[j], rows, begin, first + j + AHEAD);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) few(const Several p) {
    extern __shared__ uint4 shared[];  // table, levels, x, its sums, the warps' sums of two tiles, a ticket
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, tiles = 0;
    int in_slice = p.part[0].split_steps, first_step = blockIdx.y * in_slice;
    int all_steps = min(in_slice, p.part[0].columns / STEP - first_step), per_warp = (all_steps + WARPS - 1) / WARPS;
    int in_block = warp * per_warp, begin = first_step + in_block, steps = min(per_warp, all_steps - in_block);
    uint4 *xs = shared + TABLE + LEVELS;
    float *x_sums = (float *)(xs + in_slice * PER_STEP), *blocks = x_sums + (SUMMED ? (in_slice * V + 3) / 4 * 4 : 0);
    u32 *ticket = (u32 *)(blocks + 2 * WARPS * V * 16);
#pragma unroll
    for (int i = 0; i < (GATED ? 1 : PARTS); i++) tiles += tiles_of(p.part[i]);

    Held held[AHEAD];
    Round round;
    Rows rows = rows_of(p, blockIdx.x, begin, lane);
    begin_tile(held, round, rows, begin, steps);
    if (CODEBOOK) lay_table(shared, p.part[0].table, THREADS);
    if (LEVELS)
        for (int i = tid; i < 4 * LEVELS; i += THREADS) ((float *)(shared + TABLE))[i] = p.part[0].scales.levels[i];
#if NORMED
    uint4 weights[ROW_HELD];
    load_weights(weights, p.norm);
    next_may_begin(), previous_done();
    stage_norm(xs, x_sums, p, weights, blocks, tid);
#else
    next_may_begin(), previous_done();
    if (STRAIGHT) stage_row(xs, x_sums, p.part[0], first_step, all_steps, tid);
    else stage(xs, p.part[0], first_step, all_steps, tid);
#endif
    __syncthreads();

    int row = (lane >> 2) / SIDES;
    u32 first_x = shared_place(xs + min(row, ROWS - 1) * 4 + (lane & 3));
    bool has_x = row < ROWS && (lane >> 2) % SIDES == (lane & 3) / LANES;
    Shared s = {kept(first_x), x_sums, (const float *)(shared + TABLE), {(const u8 *)shared, kept((u32)lane * 4)}, has_x};
    if (SUMMED && !STRAIGHT) {
        sum_steps(x_sums, s, xs, all_steps, tid);
        __syncthreads();
    }
    s.x = kept(s.x + in_block * (16 * PER_STEP)), s.sums += in_block * V;
    int turn = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
        Sums sums = {};
        u32 old = old_of(p.part[0], tile, tid);
        add_tile(sums, held, round, s, rows, begin, steps, lane);
        if (!STEPS_PER_GROUP) scale_sums(sums, rows);
        int part = rows.part, in_part = rows.tile;
        if (tile + gridDim.x < tiles) {
            rows = rows_of(p, tile + gridDim.x, begin, lane);
            begin_tile(held, round, rows, begin, steps);
        }
        join(blocks + turn * WARPS * V * 16, ticket, sums, p, p.part[part], in_part, old, tid);
    }
}
