// y (rows, outs) = codes (rows, columns) W (outs, columns)^T, both int8, with everything that follows the exact sums.
//
// Built at run time after common.cuh, for Hopper. The host (int8.py) also defines
//   WG, BN             tiles of 64 rows, and outs, of a block's tile
//   STAGES             steps of 128 columns in shared memory
//   SPLITS             blocks of a cluster that share the columns of one tile
//   PAIR               2: the two blocks of a cluster multiply neighbouring rows with the same weights; otherwise 1
//   ACROSS, BOXES      outs of a box of 64 rows, and such boxes of four warps that leave through shared memory
//   OUTLIERS, SHIFTED  columns in 16 bits; zero points of the rows
//
// Why it is fast. The weights are read as they lie in the file, as unsigned codes + 128, and wgmma multiplies signed by
// unsigned: sums are 128 sum_j code_j too large, which the quantizing kernel counted. One thread asks for tiles of both
// matrices, four steps and more ahead; those of the weight even before the kernel in front of this one has made x. The
// scales, the outlier columns and the bias are fetched by warps of their own while the products run, and are applied in
// registers, so that no int32 is ever written. For few rows blocks share the columns, and add up out of each other's
// shared memory: integers, in whatever order the same. What outlier columns need of W a warp takes out of the steps as they
// pass (reading single bytes of many rows would take memory long), and floats are multiplied where the sums lie, by mma,
// sixteen columns at a time, all there are.
#include "int8_warp.cuh"
#include "int8_hopper.cuh"

constexpr int BM = 64 * WG, BK = 128, CONSUMERS = 128 * WG, HELPERS = 96, THREADS = CONSUMERS + 32 + HELPERS, CLUSTER = SPLITS * PAIR;
constexpr int X_BYTES = BM * BK, W_BYTES = BN * BK, STAGE = X_BYTES + W_BYTES, PITCH = BN + 8;
constexpr int AT_A_TIME = 4;  // loads of outliers that a thread has under way
constexpr bool THROUGH = WG == 2 && SPLITS == 1;  // outs leave through shared memory, beside the next tile's products
constexpr int BOX = 64 * ACROSS * 2, Y_BYTES = THROUGH ? WG * BOXES * BOX : 0;  // of a box of 64 rows and ACROSS outs
constexpr int AT_ONCE = BOXES * ACROSS == BN ? BOXES : 1;  // boxes of a group that are sent together
constexpr bool TAKE = OUTLIERS && SPLITS == 1;  // one of the helpers' warps is there for the outliers
constexpr int GROUP = 16 / PAIR;  // tiles of rows that are multiplied with the same weights, one after the other
enum { READY = 1, FREE, AMONG, FIRST, SECOND };  // barriers

struct Params {
    Map x, weight, boxes;  // the codes as (columns, rows) and (columns, outs); y as (outs, rows), where THROUGH
    const u8 *codes;       // the weight's again
    const u16 *floats;     // (rows, columns), what was quantized
    const float *scale;    // of the rows
    const int *offset;     // of the rows
    const int *zero;       // of the rows, where SHIFTED
    const float *row_scale;  // of the outs
    const int *sums;       // of the outs' signed codes, where SHIFTED
    const u16 *bias;       // of the outs, or null
    const int *listed;     // how many columns are outliers, then these
    u16 *y;
    int outs, columns, rows;
};

struct Aside {  // what a tile needs beside the sums
    float row_scale[BN], bias[BN], scale[BM];
    int offset[BM];
#if SHIFTED
    int sums[BN], zero[BM];
#endif
#if OUTLIERS
    int count, here;  // columns that are outliers; how many of them lie here
#if SPLITS == 1
    u16 x[BM * OUTLIERS_AT_ONCE], weight[BN * OUTLIERS_AT_ONCE];
#else
    float x[OUTLIERS_AT_ONCE * BM], weight[OUTLIERS_AT_ONCE * BN];
#endif
#endif
};

struct Tile {
    int row, out;
};

struct Block {
    u8 *stages, *y;
    u64 *full, *empty;
    Aside *aside;
    int tiles, first, stride;  // tiles there are (pairs of them), this block's first, and how far on the next is
    int begin, steps;          // of the columns
    u32 rank;
};

DEVICE Tile tile_of(const Params &p, const Block &b, int index) {
    int across = (p.rows + BM * PAIR - 1) / (BM * PAIR), outs = (p.outs + BN - 1) / BN;
    int first = index / (GROUP * outs) * GROUP, size = min(across - first, GROUP), within = index % (GROUP * outs);
    return {((first + within % size) * PAIR + (PAIR > 1 ? (int)b.rank : 0)) * BM, within / size * BN};
}

DEVICE void ask_weight(const Params &p, const Block &b, const Tile &tile, int step, int slot) {
    u8 *to = b.stages + slot * STAGE + X_BYTES;
    int column = (b.begin + step) * BK;
#if PAIR > 1  // each asks for half of it, for both
    copy_tile(to + b.rank * (W_BYTES / 2), p.weight, column, tile.out + b.rank * (BN / 2), b.full + slot, (u16)3);
#else
    copy_tile(to, p.weight, column, tile.out, b.full + slot);
#endif
}

DEVICE void produce(const Params &p, const Block &b) {
    int asked = 0, ahead = b.first < b.tiles ? min(b.steps, STAGES) : 0;
    Tile tile = tile_of(p, b, b.first);
    for (; asked < ahead; asked++) {
        expect(b.full + asked, STAGE);
        ask_weight(p, b, tile, asked, asked);
    }
    await_earlier();
    for (int i = 0; i < ahead; i++) copy_tile(b.stages + i * STAGE, p.x, (b.begin + i) * BK, tile.row, b.full + i);
    for (int index = b.first, step = ahead; index < b.tiles; index += b.stride, step = 0) {
        tile = tile_of(p, b, index);
        for (; step < b.steps; step++, asked++) {
            int slot = asked % STAGES;
            if (asked >= STAGES) await(b.empty + slot, (asked / STAGES - 1) & 1);
            expect(b.full + slot, STAGE);
            ask_weight(p, b, tile, step, slot);
            copy_tile(b.stages + slot * STAGE, p.x, (b.begin + step) * BK, tile.row, b.full + slot);
        }
    }
}

// A warp needs a step no longer.
DEVICE void release(const Block &b, int slot, int lane) {
    if (lane) return;
#if PAIR > 1
    for (u32 rank = 0; rank < 2; rank++) arrive(b.empty + slot, rank);
#else
    arrive(b.empty + slot);
#endif
}

#if OUTLIERS
#include "int8_outliers.cuh"
#endif

DEVICE void assist(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    constexpr int REST = TAKE ? HELPERS - 32 : HELPERS;
    int taken = 0, column = -1;  // of the warp that takes outliers: steps, and a lane's column
    for (int index = b.first; index < b.tiles; index += b.stride) {
        Tile tile = tile_of(p, b, index);
        if (index != b.first) meet<FREE, CONSUMERS + HELPERS>();
#if OUTLIERS && SPLITS == 1
        if (tid >= REST) {
            if (index == b.first) {
                for (int i = tid - REST; i < BN * OUTLIERS_AT_ONCE; i += 32) a.weight[i] = 0;
                await_earlier();
                int count = fresh(p.listed);
                if (tid - REST < min(count, OUTLIERS_AT_ONCE)) column = fresh(p.listed + 1 + tid - REST);
                __syncwarp();
            }
            take_outliers(p, b, tile, taken, column, tid - REST);
            announce<READY, CONSUMERS + HELPERS>();
            continue;
        }
#endif
        for (int n = tid; n < BN; n += REST) {
            int out = min(tile.out + n, p.outs - 1);
            a.row_scale[n] = p.row_scale[out], a.bias[n] = p.bias ? widen(p.bias[out]) : 0;
#if SHIFTED
            a.sums[n] = p.sums[out];
#endif
        }
        if (index == b.first) await_earlier();
        for (int m = tid; m < BM; m += REST) {
            int row = min(tile.row + m, p.rows - 1);
            a.scale[m] = fresh(p.scale + row), a.offset[m] = fresh(p.offset + row);
#if SHIFTED
            a.zero[m] = fresh(p.zero + row);
#endif
        }
#if OUTLIERS
        fetch_outliers<TAKE ? BM : BM + BN>(p, a, tile, fresh(p.listed), 0, tid, REST);
#endif
        announce<READY, CONSUMERS + HELPERS>();
    }
}

#include "int8_finish.cuh"

DEVICE void consume(const Params &p, const Block &b, int tid) {
    int lane = tid & 31, taken = 0;
    for (int index = b.first; index < b.tiles; index += b.stride) {
        Tile tile = tile_of(p, b, index);
        int sums[BN / 8][4] = {};
        settle(sums);
#pragma unroll 1
        for (int step = 0; step < b.steps; step++, taken++) {
            int slot = taken % STAGES;
            await(b.full + slot, taken / STAGES & 1);
            const u8 *stage = b.stages + slot * STAGE;
            u64 left = describe(stage + (tid >> 7) * (64 * BK)), right = describe(stage + X_BYTES);
            begin_products();
#pragma unroll
            for (int k = 0; k < BK / 32; k++) multiply_tiles(sums, left, right, k);
            end_products();
            await_products<1>();
            if (step) release(b, (taken + STAGES - 1) % STAGES, lane);
        }
        await_products<0>();
        settle(sums);
        if (b.steps) release(b, (taken + STAGES - 1) % STAGES, lane);
#if SPLITS == 1
        finish(p, b, tile, sums, tid);
#else
        lay_down(b, sums, tid);
#endif
    }
    if (THROUGH && tid % 128 == 0) await_boxes<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) int8_product(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];
    int tid = threadIdx.x, warp = tid >> 5, steps = (p.columns + BK - 1) / BK, share = (steps + SPLITS - 1) / SPLITS;
    Block b;
    b.stages = (u8 *)shared + (-shared_address(shared) & 1023);
    b.y = b.stages + STAGES * STAGE, b.full = (u64 *)(b.y + Y_BYTES), b.empty = b.full + STAGES, b.aside = (Aside *)(b.empty + STAGES);
    b.rank = CLUSTER > 1 ? cluster_rank() : 0;
    b.tiles = (p.rows + BM * PAIR - 1) / (BM * PAIR) * ((p.outs + BN - 1) / BN);
    b.first = blockIdx.x / CLUSTER, b.stride = gridDim.x / CLUSTER;
    b.begin = SPLITS > 1 ? min((int)b.rank * share, steps) : 0, b.steps = min(share, steps - b.begin);
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) make_barrier(b.full + i, 1), make_barrier(b.empty + i, (4 * WG + TAKE) * PAIR);
        publish_barriers();
        let_next_begin();
    }
    if (PAIR > 1) cluster_barrier();
    else __syncthreads();

    if (warp < 4 * WG) {
        hold_registers<WG>();
        consume(p, b, tid);
    } else {
        give_registers<WG>();
        if (warp > 4 * WG) assist(p, b, tid - CONSUMERS - 32);
        else if ((tid & 31) == 0) produce(p, b);
    }
#if SPLITS > 1
    __syncwarp();
    cluster_barrier();
    if (warp < 4 * WG) finish_share(p, b, tile_of(p, b, b.first), tid);
#endif
#if SPLITS * PAIR > 1  // the others' shared memory is read, or written to, until all have come this far
    __syncwarp();
    cluster_arrive();
    cluster_wait();
#endif
}
