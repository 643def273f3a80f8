// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for 9 rows and more, codes of 2 to 6 and 8 bits, on Hopper.
//
// Built at run time, one kernel per format and cut, after common.cuh. The host (many.py) also defines
//   GROUP              columns that share a scale: 32, 64 or a multiple of 128; 0: the whole row
//   WG, NT             tiles of 64 outs, and of 8 rows, of a block's tile
//   STAGES, LEAD       steps of 128 bytes of W's rows (3, 6 bits: 96, 5: 80), and pieces of 64 columns of x, in shared memory; LEAD is even
//   SPLITS             blocks that share the columns of one tile, in a cluster
//   APART              1: they are in no cluster, and meet in memory: for numbers that do not fill the device as clusters;
//                      2: and each waits for the others and adds up its part, where all run at a time
//   PAIR               blocks of a cluster that multiply neighbouring outs with the same rows and columns
//   LATE               1: sums of 64 columns are scaled, not weights; for few rows, 4 bits, and groups of 64 or more
//   MIXED              1: tiles of the last turn are of half the height where that gives more blocks work
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//   SPACED             1: pairs of levels lie 256 bytes apart, so that one permutation makes an address, where there is room
//   OUT_BOXES          boxes of 64 rows of outs for which four warps have room until they are copied to y; 0: none, y is stored to
//   PARTS              weights of one format and width that are multiplied by the same x
//   RUN                columns of a run of one of ggml's types (many_runs.cuh); 0: scales are common.cuh's
//
// Four warps multiply 64 outs, whose weights they decode from shared memory into their registers, with all rows of the
// tile: Hopper's product takes its left side from registers and x from shared memory. Codes and x both come as they lie
// in memory, as tiles that one thread asks for, codes even before the kernel in front of this one has made x. A lane
// needs neighbouring columns 2 t and 2 t + 1 of each eight (t: its number among the four that share a row): of 4 bits,
// byte t of a word of codes, which all four read. While products of 64 columns run, the next 64 are decoded into
// other registers; where registers are few, 16 and 16. Where weights are scaled they are rounded once more (levels of a
// codebook were before, too). Tiles of codes are 128 bytes wide: twice as many rows of 64 bytes take longer to copy.
// Blocks that share the columns of a tile write their sums of what another finishes into its shared memory; each adds up
// what it finishes itself, always in the same order. Blocks apart lay their sums in memory, and the last to come adds up, or
// each its part.
#define CHUNK 32
#ifndef RUN
#define RUN 0
#endif
#include "codes.cuh"
#ifndef EMULATED
#include "tiles.cuh"
#endif
constexpr int BATCH = MIN_BLOCKS > 1 || WG > 2 ? 1 : 4;  // products of 16 columns that are asked for together
constexpr int RING = BATCH > 1 ? 2 * BATCH : 4;          // sets of operands: those that are made, and those of products under way
constexpr int BM = 64 * WG, BN = 8 * NT, BK = BITS == 3 ? 256 : DENSE ? 1024 / BITS : 128, PIECES = BK / 64, CONSUMERS = 128 * WG, CLUSTER = (APART ? 1 : SPLITS) * PAIR;
// With two times four warps and many sums there are too few registers for all: the other four warps give theirs, but for
// what they make factors of runs with.
constexpr bool TRADED = WG == 2 && (MIN_BLOCKS == 1 || RUN && MIN_BLOCKS == 2);
constexpr int HELD = MIN_BLOCKS == 2 ? 96 : RUN ? 224 : 232, LEFT_OVER = MIN_BLOCKS == 2 ? 48 : RUN ? 56 : 40;
constexpr int THREADS = CONSUMERS + (TRADED || RUN ? 128 : 32);
constexpr int SLOT = RUN ? (RUN < 32 ? RUN : 32) : GROUP && GROUP < 128 ? GROUP : 128;  // columns for which a scale is held
constexpr int SLOTS = BK / SLOT, TOGETHER = 8;          // of a step; tiles of rows that are multiplied with the same weights
constexpr int PAIRS = NT / 2, OWN = (PAIRS + SPLITS - 1) / SPLITS;  // pairs of tiles of rows, and those a block finishes at most
constexpr int HANDED = 2 * OWN * CONSUMERS * 16;        // bytes of sums that a block hands to another
#if RUN
constexpr bool AFTER = false, DIRECT = false;
constexpr int FACTORS = LESS ? 8 : 4, MADE = SLOTS * BM * FACTORS, PARTS_MADE = BM / 32;  // bytes of a run's, of a step's; by a warp each
struct Scales {
    const u8 *field[4];   // d, dmin or m, the integers of each
    int pitch[4];         // bytes of a row of W; 0: there is none
};
#else
constexpr int MADE = 0, PARTS_MADE = 0;
constexpr bool AFTER = GROUP == 0 && !CODEBOOK && !LATE;  // a row's one scale is its sums'
constexpr bool DIRECT = SCALE_PAIRS && !AFTER && !HALF && !CODEBOOK && !ZERO && OFFSET == 1 << (BITS - 1) && !LATE;  // scaled where they lie
#endif
constexpr int X_PIECE = BN * 128, W_ROW = BK * BITS / 8, W_BYTES = BM * W_ROW;
constexpr int TILES = STAGES * (W_BYTES + MADE) + LEAD * X_PIECE;
constexpr int FRONT = 1024;                             // bytes before the tiles: a word for blocks apart, barriers
static_assert(8 * (2 + 2 * STAGES + 2 * LEAD) <= FRONT, "room for barriers");
static_assert(!APART || PAIR == 1 && !MIXED, "blocks that know nothing of each other");
static_assert(!LATE || SLOT >= 64 && BITS == 4, "64 columns have one scale");
static_assert(!MIXED || NT >= 16 && SPLITS == 1 && !LATE, "tall tiles, one after the other");
enum { AMONG = 1 };  // barrier of the consumers

struct Weight {
    Map codes;            // as (bytes, outs)
    Scales scales;
    const u16 *bias;      // or null
    u16 *y;
    int outs;
};
struct Params {
    Map x;                // as (columns, rows)
    Map boxes[PARTS];     // OUT_BOXES: each y as (outs, rows)
    Weight part[PARTS];
    const u16 *table;     // CODEBOOK: 16 levels as operands
    float4 *partial;      // APART: (tiles, SPLITS, NT, consumers) sums
    u32 *arrived;         // APART: zeros, one per tile, or per warp of a tile; left at zero
    int columns, rows;
};
struct Tile {
    int row, out, part;
    bool low;
};
struct Block {
    u8 *stages, *rows, *made;   // of W; of x; RUN: factors of a stage's runs
    u8 *sums, *table, *outs;    // what other blocks have handed over; pairs of levels; boxes of outs
    u64 *full, *spent, *ready, *empty;  // steps of W that have come, and that are decoded; pieces of x, and those done
    int tiles, first, stride;  // tiles there are (or pairs of them), this block's first, and how far on the next is
    int whole;                 // tiles before those of half the height
    int begin, steps;          // of the columns
    u32 side, share;           // which of the blocks that share x, and of those that share the columns
};

DEVICE int tiles_of(const Weight &part) { return (part.outs + BM * PAIR - 1) / (BM * PAIR); }  // or pairs of them
DEVICE int all_tiles(const Params &p) {
    int tiles = 0;
#pragma unroll
    for (int i = 0; i < PARTS; i++) tiles += tiles_of(p.part[i]);
    return tiles;
}
DEVICE Tile tile_of(const Params &p, const Block &b, int item) {
    int index = item < b.whole ? item : b.whole + (item - b.whole) / 2;
    int across = (p.rows + BN - 1) / BN, outs = all_tiles(p), part = 0;
    int first = index / (TOGETHER * outs) * TOGETHER, size = min(across - first, TOGETHER), within = index % (TOGETHER * outs);
    int out = within / size;
#pragma unroll
    for (int i = 0; i < PARTS - 1; i++)
        if (part == i && out >= tiles_of(p.part[i])) out -= tiles_of(p.part[i]), part++;
    int row = (first + within % size) * BN + (item < b.whole ? 0 : (item - b.whole) % 2 * (BN / 2));
    return {row, (out * PAIR + (int)b.side) * BM, part, item >= b.whole};
}

// Where the producer is among the steps of the block's tiles.
struct Walk {
    Tile tile;
    int index, step;
};
DEVICE void go_on(Walk &w, const Params &p, const Block &b) {
    if (++w.step < b.steps) return;
    w.step = 0, w.index += b.stride;
    if (w.index < b.tiles) w.tile = tile_of(p, b, w.index);
}

DEVICE void ask_codes(const Params &p, const Block &b, Walk &w, int asked) {
    int slot = asked % STAGES;
    expect(b.full + slot, W_BYTES);
    copy_tile(b.stages + slot * W_BYTES, p.part[w.tile.part].codes, (b.begin + w.step) * W_ROW, w.tile.out, b.full + slot);
    go_on(w, p, b);
}
constexpr int BOXES = MIXED ? 2 : 1;  // of rows of x for a tile
DEVICE void ask_x(const Params &p, const Block &b, Walk &w, int asked) {
    int slot = asked % LEAD, column = (b.begin + w.step) * BK + asked % PIECES * 64;
    int boxes = w.tile.low ? 1 : BOXES;
    expect(b.ready + slot, boxes * (X_PIECE / BOXES));
#pragma unroll
    for (int i = 0; i < BOXES; i++) {
        if (i >= boxes) continue;
        u8 *to = b.rows + slot * X_PIECE + i * (X_PIECE / BOXES);
        int row = w.tile.row + i * (BN / BOXES);
#if PAIR > 1  // each asks for its part of the rows, for all
        constexpr int PART = BN / BOXES / PAIR;
        u16 all = ((1 << PAIR) - 1) << b.share * PAIR;
        copy_tile(to + b.side * PART * 128, p.x, column, row + b.side * PART, b.ready + slot, all);
#else
        copy_tile(to, p.x, column, row, b.ready + slot);
#endif
    }
    if (asked % PIECES == PIECES - 1) go_on(w, p, b);
}

DEVICE void produce(const Params &p, const Block &b) {
    int tiles = b.first < b.tiles ? (b.tiles - 1 - b.first) / b.stride + 1 : 0, steps = tiles * b.steps, pieces = PIECES * steps;
    Walk codes = {tile_of(p, b, b.first), b.first, 0}, x = codes;
    int asked = 0, early = min(MIN_BLOCKS > 1 ? STAGES : steps <= 8 ? 4 : 2, min(STAGES, steps));
    for (; asked < early; asked++) ask_codes(p, b, codes, asked);
    previous_done();
    for (int i = 0; i < min(pieces, LEAD); i++) {  // turn about: all codes at once would be in the way of the first rows
        ask_x(p, b, x, i);
        if (i % PIECES == PIECES - 1 && asked < min(steps, STAGES)) ask_codes(p, b, codes, asked++);
    }
    for (; asked < min(steps, STAGES); asked++) ask_codes(p, b, codes, asked);
    for (int i = 0; i < pieces; i++) {
        int step = i / PIECES;
        if (i % PIECES == PIECES - 1 && step + STAGES < steps) {
            await(b.spent + step % STAGES, step / STAGES & 1);
            ask_codes(p, b, codes, step + STAGES);
        }
        if (i + LEAD >= pieces) continue;
        await(b.empty + i % LEAD, i / LEAD & 1);
        ask_x(p, b, x, i + LEAD);
    }
}

#include "many_decode.cuh"

#include "many_sums.cuh"
#include "many_finish.cuh"

// A lane turns to a tile, whose first scales are then on their way.
DEVICE Tile enter(const Params &p, const Block &b, int index, int warp, Lane &w, Scaling &r) {
    Tile tile = tile_of(p, b, index);
    const Weight &part = p.part[tile.part];
#pragma unroll
    for (int h = 0; h < 2; h++) w.out[h] = min(tile.out + warp * 16 + (w.lane >> 2) + 8 * h, part.outs - 1);
    begin_scales(r, part, b, w);
#if !RUN
    if (AFTER) w.after[0] = load_scale(part.scales, w.out[0], 0), w.after[1] = load_scale(part.scales, w.out[1], 0);
#endif
    return tile;
}

DEVICE void consume(const Params &p, const Block &block, int tid) {
    Block b = block;
    b.begin = uniform(b.begin), b.steps = uniform(b.steps), b.first = uniform(b.first), b.tiles = uniform(b.tiles);
    int warp = uniform(tid >> 5);
    Places at = {{0, 0}, {0, 0}};
    Lane w = lane_of(tid & 31, warp, shared_address(b.table));
    Scaling r;
    Tile tile = enter(p, b, b.first, warp, w, r);
    for (int index = b.first; index < b.tiles; index += b.stride) {
        const Weight &part = p.part[tile.part];
        Sums sums = {};
#if LATE
        settle(sums.part);
#endif
        settle(sums.all);
#if LATE
        add_up(sums, r, part, b, w, at);
#else
        if (MIXED && tile.low) add_up<true>(sums, r, part, b, w, at);
        else add_up<false>(sums, r, part, b, w, at);
#endif
        Tile done = tile;
        Lane then = w;
        if (index + b.stride < b.tiles) tile = enter(p, b, index + b.stride, warp, w, r);
#if APART == 2
        share_sums(p, b, sums, index, tid);
#elif APART
        if (!last_to_come(p, b, sums, index, tid)) continue;
#elif SPLITS > 1
        hand_over(b, sums, tid);
        cluster_barrier();
        add_handed(b, sums, tid);
#endif
#if OUT_BOXES
        send_outs(p, b, done, sums, then, tid);
    }
    if (tid % 128 == 0) await_boxes<0>();
#else
        finish(part, done, p.rows, sums, then, done.out + warp * 16, b.share);
    }
#endif
}

// As lay_table; all warps take as many turns, or what follows would count as divergent.
DEVICE void fill_pairs(uint4 *table, const u16 *levels, int tid) {
    static_assert(TABLE % CONSUMERS == 0, "turns are whole");
    u32 level = levels[tid & 15];
#pragma unroll 4
    for (int i = tid; i < TABLE; i += CONSUMERS) {
        u32 pair = word_of(level, i >> 3 & 15) | word_of(level, i >> 7) << 16;
        table[SPACED ? i + (i & ~7) : i] = make_uint4(pair, pair, pair, pair);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) many(KERNEL_ARGUMENT Params p) {
    extern __shared__ __align__(1024) uint4 shared[];  // 1,024 bytes with barriers, stages, sums, the table
    int tid = threadIdx.x, steps = (p.columns + BK - 1) / BK, most = (steps + SPLITS - 1) / SPLITS;
    Block b;
    if (shared_address(shared) & 1023) __trap();
    b.stages = (u8 *)shared + FRONT, b.rows = b.stages + STAGES * W_BYTES, b.made = b.rows + LEAD * X_PIECE;
    b.sums = APART ? (u8 *)shared : b.stages + TILES, b.outs = b.stages + TILES;
    b.table = b.outs + (APART ? 0 : (SPLITS - 1) * HANDED) + WG * OUT_BOXES * 8192;
    b.full = (u64 *)shared + 2, b.spent = b.full + STAGES, b.ready = b.spent + STAGES, b.empty = b.ready + LEAD;
    u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    b.side = PAIR > 1 ? rank % PAIR : 0, b.share = APART ? blockIdx.x % SPLITS : SPLITS > 1 ? rank / PAIR : 0;
    b.tiles = b.whole = (p.rows + BN - 1) / BN * all_tiles(p);
    b.first = blockIdx.x / (SPLITS * PAIR), b.stride = gridDim.x / (SPLITS * PAIR);
    if (MIXED && 2 * (b.tiles % b.stride) <= b.stride) b.whole -= b.tiles % b.stride, b.tiles += b.tiles - b.whole;
    b.begin = min((int)b.share * most, steps), b.steps = min(most, steps - b.begin);
    if (tid == CONSUMERS) prefetch_map(p.part[0].codes), prefetch_map(p.x);
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) make_barrier(b.full + i, 1 + PARTS_MADE), make_barrier(b.spent + i, 4 * WG);
        for (int i = 0; i < LEAD; i++) make_barrier(b.ready + i, 1), make_barrier(b.empty + i, 4 * WG * PAIR);
        publish_barriers();
    }
    next_may_begin();
    if (CLUSTER > 1) cluster_barrier();
    else __syncthreads();

    int warp = uniform(tid >> 5);
    if (warp < 4 * WG) {
        if constexpr (TRADED) hold_registers<HELD>();
        if (CODEBOOK) fill_pairs((uint4 *)b.table, p.table, tid), meet<AMONG, CONSUMERS>();
        consume(p, b, tid);
    } else {
        if constexpr (TRADED) give_registers<LEFT_OVER>();
        if (tid == CONSUMERS) produce(p, b);
#if RUN
        if (warp > 4 * WG) make(p, b, warp - 4 * WG - 1, tid & 31);
#endif
        __syncwarp();
        if (SPLITS > 1 && !APART) cluster_barrier();  // sums are handed over
    }
    if (SPLITS == 1 && PAIR > 1) cluster_barrier();  // the others write to this block's shared memory until they come this far
}
