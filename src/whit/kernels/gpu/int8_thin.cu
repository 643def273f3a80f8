// y (rows, outs) = codes (rows, columns) W (outs, columns)^T, both int8, for up to 64 rows: as fast as W can be read.
//
// Built at run time after common.cuh, for Hopper. The host (int8_thin.py) also defines
//   BN                 rows that there is room for: 8, 16, 32 or 64
//   OUTS, STAGES       outs of a block's tile; steps of 128 columns of W in shared memory
//   LEAD               steps of x there, at most as many
//   PACE               steps of W under way at a time
//   SPLITS             blocks of a cluster that share the columns of one tile
//   BLOCKS             per multiprocessor to leave registers for
//   OUTLIERS           1: columns in 16 bits
//
// Why it is fast. The outs take the place of 64 in wgmma's left tile and the rows the narrow one, so that tiles of x are
// small, and two blocks fit beside each other, of one kernel or of two: while one multiplies its last steps and the rows of
// the next one are quantized, W of that is on its way into shared memory. (To have more of it fetched into the second cache
// took longer in all cases that were measured.) W comes from far and lies there for many steps, x is near and for few. Sums
// are integers: each block of a cluster finishes outs of its own, and is sent the others' sums of these; no block waits until
// what it wrote can be seen by others, which takes half a microsecond each time. What outlier columns need of W is taken out
// of the steps as they pass (reading single bytes of many rows takes memory a third of the time of all of W).
#define WG 1
#define WEIGHT_LEFT
#include "int8_warp.cuh"
#include "int8_hopper.cuh"

constexpr int BK = 128, TEAMS = OUTS > 128 ? OUTS / 128 : 1, HEIGHTS = OUTS / 64 / TEAMS;  // fours of warps; 64 outs of each
constexpr int CONSUMERS = 128 * TEAMS, HELPERS = 96, THREADS = CONSUMERS + 32 + HELPERS, CLUSTER = SPLITS;
constexpr int W_BYTES = OUTS * BK, X_BYTES = BN * BK, TILES = STAGES * W_BYTES + LEAD * X_BYTES, SHARE = OUTS / SPLITS;
constexpr int LAID = BN * OUTS * 4;  // bytes of the sums that a block adds up, which take the place of the stages
constexpr int ROOM = ((TILES > LAID ? TILES : LAID) + 1023) / 1024 * 1024;
static_assert(SHARE % 16 == 0, "a warp's sums go to one block");
static_assert(0 < PACE && PACE <= STAGES, "a step that is awaited lies there");
static_assert(2 <= LEAD && LEAD <= STAGES, "a step is done when the next is under way, and frees one of W and one of x");
constexpr int READERS = CONSUMERS + (OUTLIERS ? 32 : 0);  // of the stages
enum { AMONG = 1, TOGETHER };  // barriers

struct Params {
    Map x, weight;         // the codes as (columns, rows) and (columns, outs)
    const u8 *codes;       // the weight's again
    const u16 *floats;     // (rows, columns), what was quantized
    const float *scale;    // of the rows
    const int *offset;     // of the rows
    const float *row_scale;  // of the outs
    const u16 *bias;       // of the outs, or null
    const int *listed;     // how many columns are outliers, then these
    u16 *y;
    int outs, columns, rows;
    int late;              // steps of W that are still to be asked for when the next kernel may begin
};

struct Aside {  // what the block's own outs need beside the sums
    float row_scale[SHARE], bias[SHARE], scale[BN];
    int offset[BN];
#if OUTLIERS
    int count;  // columns that are outliers
    float x[OUTLIERS_AT_ONCE][BN], weight[OUTLIERS_AT_ONCE][SHARE];
#endif
};

struct Block {
    u8 *stages, *rows;
    u64 *full, *ready, *empty;  // of W; of x; of both
    u64 *sent;         // what the blocks of the cluster send
    Aside *aside;
    int out, own;      // first outs of the tile, and of those that this block finishes
    int begin, steps;  // of the columns
    int rank;
};

DEVICE void ask_weight(const Params &p, const Block &b, int step) {
    int slot = step % STAGES;
    expect(b.full + slot, W_BYTES);
    copy_tile(b.stages + slot * W_BYTES, p.weight, (b.begin + step) * BK, b.out, b.full + slot);
}
DEVICE void ask_rows(const Params &p, const Block &b, int step) {
    int slot = step % LEAD;
    expect(b.ready + slot, X_BYTES);
    copy_tile(b.rows + slot * X_BYTES, p.x, (b.begin + step) * BK, 0, b.ready + slot);
}

// W is asked for as fast as it comes and no faster: where a whole prefetch is under way at once, the few rows that are
// quantized meanwhile wait behind it.
DEVICE void produce_weight(const Params &p, const Block &b) {
    int ahead = min(b.steps, STAGES), late = max(b.steps - p.late, 0);
    if (late <= ahead) let_next_begin();
    for (int step = 0; step < b.steps; step++) {
        int slot = step % STAGES, before = step - PACE;
        if (step >= STAGES) await(b.empty + slot, (step / STAGES - 1) & 1);
        if (before >= 0) await(b.full + before % STAGES, before / STAGES & 1);
        if (step == late && late > ahead) let_next_begin();
        ask_weight(p, b, step);
    }
}
DEVICE void produce_rows(const Params &p, const Block &b) {
    await_earlier();
    for (int step = 0; step < b.steps; step++) {
        if (step >= LEAD) await(b.empty + (step - LEAD) % STAGES, (step - LEAD) / STAGES & 1);
        ask_rows(p, b, step);
    }
}

// Blocks of a cluster send to each other when all have begun (every thread asks once), and to where the stages were when
// these are nothing to anybody any more (every thread of all blocks comes here).
DEVICE void await_begun() {
    if (SPLITS > 1) cluster_wait();
}
DEVICE void leave_stages() {
    if (SPLITS > 1) cluster_arrive(), cluster_wait();
}

#if OUTLIERS
#include "int8_thin_outliers.cuh"
#endif

DEVICE void assist(const Params &p, const Block &b, int tid) {
    constexpr int REST = OUTLIERS ? HELPERS - 64 : HELPERS - 32;
    Aside &a = *b.aside;
#if OUTLIERS
    if (tid >= REST && tid < REST + 32) {
        await_begun();
        return take_outliers(p, b, tid - REST);
    }
#endif
    if (tid == HELPERS - 32) produce_rows(p, b);
    __syncwarp();
    await_begun();
    if (tid >= HELPERS - 32) return;
    for (int n = tid; n < SHARE; n += REST) {
        int out = min(b.own + n, p.outs - 1);
        a.row_scale[n] = p.row_scale[out], a.bias[n] = p.bias ? widen(p.bias[out]) : 0;
    }
    await_earlier();
    for (int m = tid; m < p.rows; m += REST) a.scale[m] = fresh(p.scale + m), a.offset[m] = fresh(p.offset + m);
#if OUTLIERS
    fetch_rows(p, b, tid, REST);
#endif
}

// Where the sums of 16 outs (of this block's), eight rows and a lane lie, of those that a block of the cluster sent.
DEVICE int4 *place_of(const Block &b, int rank, int sixteen, int eight, int lane) {
    return (int4 *)b.stages + ((rank * (SHARE / 16) + sixteen) * (BN / 8) + eight) * 32 + lane;
}

DEVICE void lay_down(const Block &b, int (&sums)[HEIGHTS][BN / 8][4], int tid) {
    int lane = tid & 31, first = (tid >> 7) * HEIGHTS * 4 + (tid >> 5 & 3);
#pragma unroll
    for (int h = 0; h < HEIGHTS; h++) {
        settle(sums[h]);
        int sixteen = first + h * 4, to = sixteen / (SHARE / 16);
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            int4 v = {sums[h][j][0], sums[h][j][1], sums[h][j][2], sums[h][j][3]};
            int4 *place = place_of(b, b.rank, sixteen % (SHARE / 16), j, lane);
            if (SPLITS > 1) send(place, v, to, b.sent);
            else *place = v;
        }
    }
}

DEVICE void consume(const Params &p, const Block &b, int tid) {
    int sums[HEIGHTS][BN / 8][4] = {}, lane = tid & 31, first = (tid >> 7) * HEIGHTS * 64;
#pragma unroll
    for (int h = 0; h < HEIGHTS; h++) settle(sums[h]);
#pragma unroll 1
    for (int step = 0; step < b.steps; step++) {
        int slot = step % STAGES;
        await(b.full + slot, step / STAGES & 1);
        await(b.ready + step % LEAD, step / LEAD & 1);
        const u8 *stage = b.stages + slot * W_BYTES;
        u64 right = describe(b.rows + step % LEAD * X_BYTES);
        begin_products();
#pragma unroll
        for (int k = 0; k < BK / 32; k++)
#pragma unroll
            for (int h = 0; h < HEIGHTS; h++) multiply_tiles(sums[h], describe(stage + (first + h * 64) * BK), right, k);
        end_products();
        await_products<1>();
        if (step && lane == 0) arrive(b.empty + (step + STAGES - 1) % STAGES);
    }
    await_products<0>();
    await_begun();
    leave_stages();
    if (SPLITS == 1) meet<AMONG, READERS>();
    lay_down(b, sums, tid);
}

// Eight outs of a row per thread and turn.
DEVICE void finish(const Params &p, const Block &b, int tid) {
    constexpr int EIGHTS = SHARE / 8, TURNS = (BN * EIGHTS + THREADS - 1) / THREADS;
    Aside &a = *b.aside;
    float y[TURNS][8];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int i = turn * THREADS + tid, m = i / EIGHTS, n = i % EIGHTS * 8;
        if (m >= p.rows) continue;
        int total[8] = {};
#pragma unroll
        for (int r = 0; r < SPLITS; r++)
#pragma unroll
            for (int e = 0; e < 8; e++)
                total[e] += ((const int *)place_of(b, r, n / 16, m / 8, e * 4 + m % 8 / 2))[n / 8 % 2 * 2 + m % 2];
#pragma unroll
        for (int e = 0; e < 8; e++) y[turn][e] = multiplied(multiplied((float)(total[e] - a.offset[m]), a.scale[m]), a.row_scale[n + e]);
    }
#if OUTLIERS
    for (int from = 0;;) {
        int here = min(a.count - from, OUTLIERS_AT_ONCE);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int i = turn * THREADS + tid, m = i / EIGHTS, n = i % EIGHTS * 8;
            if (m >= p.rows) continue;
            for (int k = 0; k < here; k++)
#pragma unroll
                for (int e = 0; e < 8; e++) y[turn][e] += a.x[k][m] * a.weight[k][n + e];
        }
        from += OUTLIERS_AT_ONCE;
        if (from >= a.count) break;
        meet<TOGETHER, THREADS>();
        fetch_more(p, b, from, min(a.count - from, OUTLIERS_AT_ONCE), tid);
        meet<TOGETHER, THREADS>();
    }
#endif
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int i = turn * THREADS + tid, m = i / EIGHTS, n = i % EIGHTS * 8;
        if (m >= p.rows) continue;
        u32 pairs[4];
#pragma unroll
        for (int e = 0; e < 4; e++) pairs[e] = round_pair(y[turn][2 * e] + a.bias[n + 2 * e], y[turn][2 * e + 1] + a.bias[n + 2 * e + 1]);
        store8(p.y + (long long)m * p.outs, b.own + n, p.outs, pairs);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) int8_thin(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];
    int tid = threadIdx.x, steps = (p.columns + BK - 1) / BK, share = (steps + SPLITS - 1) / SPLITS;
    Block b;
    b.rank = SPLITS > 1 ? (int)cluster_rank() : 0;
    b.stages = (u8 *)shared + (-shared_address(shared) & 1023);
    b.rows = b.stages + STAGES * W_BYTES, b.full = (u64 *)(b.stages + ROOM), b.empty = b.full + STAGES;
    b.ready = b.empty + STAGES, b.sent = b.ready + LEAD, b.aside = (Aside *)(b.sent + 2 - (LEAD & 1));
    b.out = blockIdx.x / SPLITS * OUTS, b.own = b.out + b.rank * SHARE;
    b.begin = min(b.rank * share, steps), b.steps = min(share, steps - b.begin);
    if (tid == CONSUMERS) {
        for (int i = 0; i < STAGES; i++) make_barrier(b.full + i, 1), make_barrier(b.empty + i, READERS / 32);
        for (int i = 0; i < LEAD; i++) make_barrier(b.ready + i, 1);
        make_barrier(b.sent, 1);
        publish_barriers();
        if (SPLITS > 1 && !OUTLIERS) expect(b.sent, LAID);
    }
    if (SPLITS > 1) cluster_arrive();
    __syncthreads();
    if (tid < CONSUMERS) consume(p, b, tid);
    else {
        if (tid >= CONSUMERS + 32) assist(p, b, tid - CONSUMERS - 32);
        else {
            if (tid == CONSUMERS) produce_weight(p, b);
            __syncwarp();
            await_begun();
        }
        leave_stages();
    }
    __syncthreads();
    if (SPLITS > 1) await_sent(b.sent, 0);
    finish(p, b, tid);
}
