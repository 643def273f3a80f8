// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for 9 rows and more, codes of 4 bits, on Hopper.
//
// Built at run time, one kernel per format and cut, after common.cuh. The host (many.py) also defines
//   GROUP              columns that share a scale: 32, 64 or a multiple of 128; 0: the whole row
//   WG, NT             tiles of 64 outs, and of 8 rows, of a block's tile
//   STAGES             steps of 128 columns in shared memory
//   SPLITS             blocks of a cluster that share the columns of one tile
//   PAIR               2: the two blocks of a cluster multiply neighbouring outs with the same rows; otherwise 1
//   LATE               1: sums of 64 columns are scaled, not weights; for few rows, and groups of 64 or more
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//   PARTS              weights of one format and width that are multiplied by the same x
//
// Four warps multiply 64 outs, whose weights they decode from shared memory into their registers, with all rows of the
// tile: Hopper's product takes its left side from registers and x from shared memory. Codes and x both come as they lie
// in memory, as tiles that one thread asks for, codes even before the kernel in front of this one has made x. A lane
// needs neighbouring columns 2 t and 2 t + 1 of each eight (t: its number among the four that share a row), which are
// byte t of a word of codes; all four read the word. While products of 64 columns run, the next 64 are decoded into
// other registers. Where weights are scaled they are rounded once more (levels of a codebook were before, too).
// Blocks that share the columns of a tile add up out of each other's shared memory, always in the same order.
#define CHUNK 32
#include "codes.cuh"
#ifndef EMULATED
#include "tiles.cuh"
#endif

constexpr int BM = 64 * WG, BN = 8 * NT, BK = 128, CONSUMERS = 128 * WG, THREADS = CONSUMERS + 128, CLUSTER = SPLITS * PAIR;
constexpr int X_HALF = BN * 128, X_BYTES = 2 * X_HALF, W_ROW = BK / 2, W_BYTES = BM * W_ROW, STAGE = X_BYTES + W_BYTES;
constexpr int SLOT = GROUP && GROUP < BK ? GROUP : BK;  // columns for which a scale is held
constexpr int SLOTS = BK / SLOT, TOGETHER = 8;          // of a step; tiles of rows that are multiplied with the same weights
constexpr int PITCH = BM + 4;                           // of a row of sums
constexpr bool SCALE_PAIRS = SCALE == HALF;             // the scale is an operand's type
static_assert(!LATE || SLOT >= 64, "64 columns have one scale");
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
    Weight part[PARTS];
    const u16 *table;     // CODEBOOK: 16 levels as operands
    int columns, rows;
};
struct Tile {
    int row, out, part;
};
struct Block {
    u8 *stages;
    u64 *full, *empty;
    int tiles, first, stride;  // tiles there are (pairs of them), this block's first, and how far on the next is
    int begin, steps;          // of the columns
    u32 rank;
};

DEVICE int tiles_of(const Weight &part) { return (part.outs + BM * PAIR - 1) / (BM * PAIR); }  // or pairs of them
DEVICE int all_tiles(const Params &p) {
    int tiles = 0;
#pragma unroll
    for (int i = 0; i < PARTS; i++) tiles += tiles_of(p.part[i]);
    return tiles;
}
DEVICE Tile tile_of(const Params &p, const Block &b, int index) {
    int across = (p.rows + BN - 1) / BN, outs = all_tiles(p), part = 0;
    int first = index / (TOGETHER * outs) * TOGETHER, size = min(across - first, TOGETHER), within = index % (TOGETHER * outs);
    int out = within / size;
#pragma unroll
    for (int i = 0; i < PARTS - 1; i++)
        if (part == i && out >= tiles_of(p.part[i])) out -= tiles_of(p.part[i]), part++;
    return {(first + within % size) * BN, (out * PAIR + (PAIR > 1 ? (int)b.rank : 0)) * BM, part};
}

DEVICE void ask_codes(const Params &p, const Block &b, const Tile &tile, int step, int slot) {
    copy_tile(b.stages + slot * STAGE + X_BYTES, p.part[tile.part].codes, (b.begin + step) * W_ROW, tile.out, b.full + slot);
}
DEVICE void ask_x(const Params &p, const Block &b, const Tile &tile, int step, int slot) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u8 *to = b.stages + slot * STAGE + h * X_HALF;
        int column = (b.begin + step) * BK + h * 64;
#if PAIR > 1  // each asks for half of the rows, for both
        copy_tile(to + b.rank * (X_HALF / 2), p.x, column, tile.row + b.rank * (BN / 2), b.full + slot, (u16)3);
#else
        copy_tile(to, p.x, column, tile.row, b.full + slot);
#endif
    }
}

DEVICE void produce(const Params &p, const Block &b) {
    int asked = 0, ahead = b.first < b.tiles ? min(b.steps, STAGES) : 0;
    Tile tile = tile_of(p, b, b.first);
    for (; asked < ahead; asked++) {
        expect(b.full + asked, STAGE);
        ask_codes(p, b, tile, asked, asked);
    }
    previous_done();
    for (int i = 0; i < ahead; i++) ask_x(p, b, tile, i, i);
    for (int index = b.first, step = ahead; index < b.tiles; index += b.stride, step = 0) {
        tile = tile_of(p, b, index);
        for (; step < b.steps; step++, asked++) {
            int slot = asked % STAGES;
            if (asked >= STAGES) await(b.empty + slot, (asked / STAGES - 1) & 1);
            expect(b.full + slot, STAGE);
            ask_codes(p, b, tile, step, slot);
            ask_x(p, b, tile, step, slot);
        }
    }
}

// What a lane knows of its place, and of the scales of its two rows: lane t of four holds those of slot t of a round.
struct Lane {
    int lane, out[2];        // rows of W, within bounds
    int codes;               // where the first one's lie among a stage's codes
    u32 byte, unit;          // which of a word is its own (for `permute`); which of four units of 16 bytes lies first
    u32 table;               // where its copy of the table of pairs lies
};
struct Round {
    float scale[2], zero[2];
};
struct Slot {
    float scale[2];
    u32 pair[2], rest[2], minus[2];  // as operands; scale = pair + rest where it is no operand itself
};
struct Sums {
    float all[NT][4];
#if LATE
    float part[NT][4];       // of 64 columns, without their scales
#endif
};

DEVICE void load_round(Round &round, const Weight &p, const Lane &w, int slot) {
    int group = GROUP ? min((slot + (w.lane & 3)) * SLOT / (GROUP ? GROUP : 1), p.scales.groups - 1) : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        round.scale[h] = load_scale(p.scales, w.out[h], group);
        round.zero[h] = ZERO ? load_zero(p.scales, w.out[h], group) : 0.0f;
    }
}
DEVICE Slot slot_of(const Round &round, const Lane &w, int slot) {
    Slot s;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int from = (w.lane & 28) | (slot & 3);
        s.scale[h] = of_lane(round.scale[h], from), s.pair[h] = round_pair(s.scale[h], s.scale[h]);
        float rest = s.scale[h] - widen(s.pair[h] & 0xFFFF);
        s.rest[h] = SCALE_PAIRS ? 0 : round_pair(rest, rest);
        float zero = OFFSET + (ZERO ? of_lane(round.zero[h], from) : 0.0f);
        s.minus[h] = round_pair(-(HALF ? 1024.0f : 128.0f) - zero, -(HALF ? 128.0f : 16.0f) - zero);
    }
    return s;
}

// Columns 2 t and 2 t + 1 of a word's eight. The upper code of a byte gets under the exponent three bits higher than the
// lower one, as eight times itself: a product lays both where they belong, and what takes off the exponent divides too.
DEVICE u32 operand(u32 word, const Slot &s, int h, const Lane &w) {
    u32 byte = permute(word, 0, w.byte), pair;
    if constexpr (CODEBOOK) pair = load_shared(w.table + byte * 128);
    else pair = multiply_add(under_exponent(byte * 0x8001u, 0x0078000F, MAGIC), HALF ? 0x30003C00u : 0x3E003F80u, s.minus[h]);
    if constexpr (LATE) return pair;
    else if constexpr (SCALE_PAIRS) return scale_by(pair, s.pair[h]);
    else return multiply_add(pair, s.pair[h], scale_by(pair, s.rest[h]));  // the rest's rounding is far below the sum's
}

// The operands of 64 columns of a lane's two rows, for four products.
DEVICE void decode_half(u32 (&a)[4][4], const Round &round, Slot s, const Lane &w, const u8 *codes, int half, int slot) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u8 *at = codes + ((w.unit ^ (2 * half + i)) << 4);
        uint4 top = *(const uint4 *)at, bottom = *(const uint4 *)(at + 8 * W_ROW);
        if (SLOT == 32 && i) s = slot_of(round, w, slot + 1);
        a[2 * i][0] = operand(top.x, s, 0, w), a[2 * i][1] = operand(bottom.x, s, 1, w);
        a[2 * i][2] = operand(top.y, s, 0, w), a[2 * i][3] = operand(bottom.y, s, 1, w);
        a[2 * i + 1][0] = operand(top.z, s, 0, w), a[2 * i + 1][1] = operand(bottom.z, s, 1, w);
        a[2 * i + 1][2] = operand(top.w, s, 0, w), a[2 * i + 1][3] = operand(bottom.w, s, 1, w);
    }
}

DEVICE void multiply_half(float (&sums)[NT][4], u32 (&a)[4][4], const u8 *x) {
    auto right = describe_rows(x);
#pragma unroll
    for (int i = 0; i < 4; i++) settle(a[i]);
    begin_products();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply_step(sums, a[i], right, i, LATE && i == 0);
    end_products();
}

DEVICE void release(const Block &b, int slot, int lane) {  // by one branch, or products would wait for each other
#if PAIR > 1
    if (lane < PAIR) arrive(b.empty + slot, (u32)lane);
#else
    if (lane == 0) arrive(b.empty + slot);
#endif
}

// The scales of a tile's steps, and the next ones on their way.
struct Scaling {
    Round now, next;
    int first;  // slot of the block's first step
};
DEVICE void begin_scales(Scaling &r, const Weight &p, const Block &b, const Lane &w) {
    r.first = b.begin * SLOTS;
    load_round(r.next, p, w, r.first);
}
DEVICE void turn_scales(Scaling &r, const Weight &p, const Lane &w, int step) {
    if (step * SLOTS % 4 == 0) r.now = r.next, load_round(r.next, p, w, r.first + step * SLOTS + 4);
}

// Where a step lies among the stages, and the phase of its barrier.
struct Place {
    int slot, phase;
};
DEVICE Place after(const Place &at) {
    bool last = at.slot == STAGES - 1;
    return {last ? 0 : at.slot + 1, last ? at.phase ^ 1 : at.phase};
}
DEVICE const u8 *stage_at(const Block &b, const Place &at) { return b.stages + at.slot * STAGE; }

// All steps of a tile, from `at` on, which moves on.
#if LATE
struct Halves {
    u32 a[2][4][4];
    Slot s[2];
};
template <bool LAST> DEVICE void add_step(Sums &sums, Halves &v, Scaling &r, const Weight &p, const Block &b, const Lane &w, Place &at, int step) {
    at.slot = uniform(at.slot);
    const u8 *stage = stage_at(b, at);
    Place next = after(at);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        multiply_half(sums.part, v.a[h], stage + h * X_HALF);
        if (!h) {
            v.s[1] = slot_of(r.now, w, step * SLOTS + SLOTS / 2);
            decode_half(v.a[1], r.now, v.s[1], w, stage + w.codes, 1, step * SLOTS + SLOTS / 2);
        } else if (!LAST) {
            await(b.full + next.slot, next.phase);
            turn_scales(r, p, w, step + 1);
            Slot s = slot_of(r.now, w, (step + 1) * SLOTS);
            decode_half(v.a[0], r.now, s, w, stage_at(b, next) + w.codes, 0, (step + 1) * SLOTS);
            v.s[0] = s;
        }
        products_left<0>();
        settle(sums.part);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums.all[n][e] += v.s[h].scale[e >> 1] * sums.part[n][e];
    }
    release(b, at.slot, w.lane);
    at = next;
}
DEVICE void add_up(Sums &sums, const Weight &p, const Block &b, const Lane &w, Place &at) {
    Halves v;
    Scaling r;
    begin_scales(r, p, b, w);
    if (b.steps == 0) return;
    await(b.full + at.slot, at.phase);
    turn_scales(r, p, w, 0);
    v.s[0] = slot_of(r.now, w, 0);
    decode_half(v.a[0], r.now, v.s[0], w, stage_at(b, at) + w.codes, 0, 0);
#pragma unroll 1
    for (int step = 0; step < b.steps - 1; step++) add_step<false>(sums, v, r, p, b, w, at, step);
    add_step<true>(sums, v, r, p, b, w, at, b.steps - 1);
}
#else
DEVICE void add_up(Sums &sums, const Weight &p, const Block &b, const Lane &w, Place &at) {
    u32 a[2][4][4];
    Scaling r;
    begin_scales(r, p, b, w);
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < b.steps; step++) {
        at.slot = uniform(at.slot);
        const u8 *stage = stage_at(b, at);
        turn_scales(r, p, w, step);
        await(b.full + at.slot, at.phase);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int part = step * SLOTS + h * (SLOTS / 2);
            decode_half(a[h], r.now, slot_of(r.now, w, part), w, stage + w.codes, h, part);
            multiply_half(sums.all, a[h], stage + h * X_HALF);
            products_left<1>();  // those of the half before are done
            if (!h && step) release(b, before, w.lane);
        }
        before = at.slot, at = after(at);
    }
    products_left<0>();
    settle(sums.all);
    if (b.steps) release(b, before, w.lane);
}
#endif

// Sixteen bytes of y, or as much as there is.
DEVICE void store8(const Weight &p, int row, int out, const u32 (&pairs)[4]) {
    u16 *to = p.y + (long long)row * p.outs + out;
    if (p.outs % 8 == 0 && out < p.outs) {
        *(uint4 *)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (out + i < p.outs) to[i] = (u16)(pairs[i >> 1] >> 16 * (i & 1));
}

#if SPLITS == 1
// Four lanes hold two outs each of four eights; afterwards each holds a whole eight.
DEVICE void gather_eights(u32 (&v)[4], int lane) {
    bool odd = lane & 1, high = lane & 2;
    u32 a = exchange(odd ? v[0] : v[1], 1), b = exchange(odd ? v[2] : v[3], 1);
    (odd ? v[0] : v[1]) = a, (odd ? v[2] : v[3]) = b;
    u32 c = exchange(high ? v[0] : v[2], 2), d = exchange(high ? v[1] : v[3], 2);
    (high ? v[0] : v[2]) = c, (high ? v[1] : v[3]) = d;
}

// A lane's sums are outs g and g + 8 of rows 2 t and 2 t + 1; turned, they are outs 2 t and 2 t + 1 of row g.
DEVICE void finish(const Weight &p, const Tile &tile, int rows, const Sums &sums, const Lane &w, int warp_out) {
    float bias[2];
#pragma unroll
    for (int h = 0; h < 2; h++) bias[h] = p.bias ? widen(p.bias[w.out[h]]) : 0.0f;
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
        u32 eights[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *d = sums.all[n + i / 2] + i % 2 * 2;
            eights[i] = transpose(round_pair(d[0] + bias[i % 2], d[1] + bias[i % 2]));
        }
        gather_eights(eights, w.lane);
        int row = tile.row + (n + (w.lane >> 1 & 1)) * 8 + (w.lane >> 2);
        if (row < rows) store8(p, row, warp_out + (w.lane & 1) * 8, eights);
    }
}
#else
// The blocks of a cluster lay down their sums, and each finishes a part of the tile: eight outs per thread and turn.
DEVICE void lay_down(const Block &b, const Sums &sums, int tid) {
    float *block = (float *)b.stages;
    int lane = tid & 31, out = (tid >> 5) * 16 + (lane >> 2), row = 2 * (lane & 3);
    meet<AMONG, CONSUMERS>();  // nobody reads the stages any more
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) block[(n * 8 + row + (e & 1)) * PITCH + out + (e >> 1) * 8] = sums.all[n][e];
}

DEVICE void finish_share(const Weight &p, const Block &b, const Tile &tile, int rows, int tid) {
    const float *block = (const float *)b.stages;
    int eights = min(rows - tile.row, BN) * (BM / 8);
#pragma unroll 1
    for (int i = b.rank * CONSUMERS + tid; i < eights; i += SPLITS * CONSUMERS) {
        int row = i / (BM / 8), out = i % (BM / 8) * 8;
        float y[8] = {};
#pragma unroll
        for (int r = 0; r < SPLITS; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float4 v = load_from(block + row * PITCH + out + 4 * h, r);
                y[4 * h] += v.x, y[4 * h + 1] += v.y, y[4 * h + 2] += v.z, y[4 * h + 3] += v.w;
            }
        u32 pairs[4];
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (p.bias) y[e] += widen(p.bias[min(tile.out + out + e, p.outs - 1)]);
#pragma unroll
        for (int e = 0; e < 4; e++) pairs[e] = round_pair(y[2 * e], y[2 * e + 1]);
        store8(p, tile.row + row, tile.out + out, pairs);
    }
}
#endif

DEVICE void consume(const Params &p, const Block &block, int tid) {
    Block b = block;
    b.begin = uniform(b.begin), b.steps = uniform(b.steps), b.first = uniform(b.first), b.tiles = uniform(b.tiles);
    int warp = uniform(tid >> 5);
    Place at = {0, 0};
    Lane w;
    w.lane = tid & 31;
    u32 g = w.lane >> 2, t = w.lane & 3;
    w.codes = X_BYTES + (warp * 16 + g) * W_ROW, w.unit = g >> 1 & 3;
    w.byte = t | 0x4440, w.table = shared_address(b.empty + STAGES) + w.lane * 4;
    for (int index = b.first; index < b.tiles; index += b.stride) {
        Tile tile = tile_of(p, b, index);
        const Weight &part = p.part[tile.part];
#pragma unroll
        for (int h = 0; h < 2; h++) w.out[h] = min(tile.out + warp * 16 + (int)g + 8 * h, part.outs - 1);
        Sums sums = {};
#if LATE
        settle(sums.part);
#endif
        settle(sums.all);
        add_up(sums, part, b, w, at);
#if SPLITS == 1
        finish(part, tile, p.rows, sums, w, tile.out + warp * 16);
#else
        lay_down(b, sums, tid);
#endif
    }
}

// As fill_table; all warps take as many turns, or what follows would count as divergent.
DEVICE void fill_pairs(uint4 *table, const u16 *levels, int tid) {
#pragma unroll 1
    for (int first = 0; first < TABLE; first += THREADS) {
        int i = min(first + tid, TABLE - 1);
        u32 pair = levels[i >> 3 & 15] | (u32)levels[i >> 7] << 16;
        table[i] = make_uint4(pair, pair, pair, pair);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) many(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];  // up to 1,024 bytes to where stages may begin, these, barriers, the table
    int tid = threadIdx.x, steps = (p.columns + BK - 1) / BK, share = (steps + SPLITS - 1) / SPLITS;
    Block b;
    b.stages = (u8 *)shared + (-shared_address(shared) & 1023);
    b.full = (u64 *)(b.stages + STAGES * STAGE), b.empty = b.full + STAGES;
    b.rank = CLUSTER > 1 ? cluster_rank() : 0;
    b.tiles = (p.rows + BN - 1) / BN * all_tiles(p);
    b.first = blockIdx.x / CLUSTER, b.stride = gridDim.x / CLUSTER;
    b.begin = SPLITS > 1 ? min((int)b.rank * share, steps) : 0, b.steps = min(share, steps - b.begin);
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) make_barrier(b.full + i, 1), make_barrier(b.empty + i, 4 * WG * PAIR);
        publish_barriers();
    }
    next_may_begin();
    if (CODEBOOK) fill_pairs((uint4 *)(b.empty + STAGES), p.table, tid);
    if (PAIR > 1) cluster_barrier();
    else __syncthreads();

    int warp = uniform(tid >> 5);
    if (warp < 4 * WG) {
        hold_registers();
        consume(p, b, tid);
    } else {
        give_registers();
        if (tid == CONSUMERS) produce(p, b);
    }
#if SPLITS * PAIR > 1  // the others' shared memory is read, or written to, until all have come this far
    __syncwarp();
    cluster_barrier();
#endif
#if SPLITS > 1
    Tile tile = tile_of(p, b, b.first);
    if (warp < 4 * WG) finish_share(p.part[tile.part], b, tile, p.rows, tid);
    __syncwarp();
    cluster_barrier();
#endif
}
