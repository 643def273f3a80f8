// y (rows, outs) = x (rows, columns) W (outs, columns)^T for up to 64 rows: quantized and multiplied in one launch.
//
// Built at run time after common.cuh, for Hopper. The host (int8.py) also defines
//   XR                 rows that there is room for: 8, 16, 32 or 64
//   BN, STAGES         outs of a block; steps of 128 columns of W in shared memory
//   AHEAD              further steps that are fetched into the second cache
//   SPLITS             blocks of a cluster that share the columns
//   TURNS              times that 128 threads take eight columns each
//   BLOCKS             per multiprocessor to leave registers for
//   BESIDE             1: sums of outliers lie behind the others, 0: in place of x
//   OUTLIERS           1: columns in which an |x| reaches the threshold are multiplied as floats
//
// Why it is fast. With few rows nearly all time goes to reading W, and what is left to waiting for one step after the
// other; here all of them are in one kernel, and W is on its way before the kernel in front of it is done. Each block
// quantizes only its own columns: the blocks of a cluster tell each other the largest |x| of every row, and outlier
// columns are a matter of the block that has them. The rows take the place of 64 in wgmma's left tile; what the others
// read is of no account. Sums are integers, and floats are added block by block: the order is always the same.
#define WG 1
#include "int8_warp.cuh"
#include "int8_hopper.cuh"

constexpr int BK = 128, CONSUMERS = 128, HELPERS = 128, TEAM = CONSUMERS + HELPERS, THREADS = TEAM + 32, CLUSTER = SPLITS;
constexpr int STAGE = BN * BK, TILE = XR * BK, PITCH = BN + 8;
constexpr int LAID = XR * PITCH * 4 * (1 + (OUTLIERS && BESIDE));  // bytes of a block's sums; they take the place of W
constexpr int ROOM = ((STAGES * STAGE > LAID ? STAGES * STAGE : LAID) + 1023) / 1024 * 1024;
constexpr int EACH = XR < 16 ? XR / 2 : 8, GROUPS = XR / (2 * EACH);  // rows of a thread at a time; times that it takes so many
constexpr bool HOLD = GROUPS * TURNS <= (BLOCKS > 1 ? 2 : 4);  // x is read once, and stays in registers
enum { ALONE = 1, TOGETHER };  // barriers

struct Params {
    Map weight;            // the codes as (columns, outs)
    const u8 *codes;       // the same
    const u16 *x;
    const float *row_scale;  // of the outs
    const u16 *bias;       // of the outs, or null
    u16 *y;
    float threshold;
    int outs, columns, rows;
};

struct Aside {
    float row_scale[BN], bias[BN], scale[XR], factor[XR];
    u32 largest[XR];  // |x| of this block's columns, as 16 bits
    int total[XR], count;  // sums of this block's codes; whether one of its columns is an outlier
};

struct Block {
    u8 *stages, *tiles;  // of W, and of the codes of x, all of these
    u64 *full, *empty, *told;
    u8 *marks;  // a bit for each of this block's columns
    Aside *aside;
    int out, begin, steps, chunks;  // its first out; its steps; eights of columns of x
    u32 rank;
};

DEVICE int *extra_of(const Block &b) { return BESIDE ? (int *)b.stages + XR * PITCH : (int *)b.tiles; }

DEVICE void produce(const Params &p, const Block &b) {
    for (int step = 0; step < min(STAGES + AHEAD, b.steps); step++) {
        int column = (b.begin + step) * BK;
        if (step >= STAGES) {
            fetch_tile(p.weight, column, b.out);
            continue;
        }
        expect(b.full + step, STAGE);
        copy_tile(b.stages + step * STAGE, p.weight, column, b.out, b.full + step);
    }
    for (int step = STAGES; step < b.steps; step++) {
        int slot = step % STAGES;
        if (AHEAD && step + AHEAD < b.steps) fetch_tile(p.weight, (b.begin + step + AHEAD) * BK, b.out);
        await(b.empty + slot, (step / STAGES - 1) & 1);
        expect(b.full + slot, STAGE);
        copy_tile(b.stages + slot * STAGE, p.weight, (b.begin + step) * BK, b.out, b.full + slot);
    }
}

struct Held {  // eight columns of some rows
    uint4 row[EACH];
};
struct Place {
    int chunk, row;  // eight columns; the first row
    bool inside;
};

DEVICE Place place_of(const Block &b, int group, int turn, int tid) {
    int chunk = turn * 128 + (tid & 127);
    return {chunk, (group * 2 + (tid >> 7)) * EACH, chunk < b.chunks};
}

DEVICE void load_piece(Held &held, const Params &p, const Block &b, const Place &at) {
    const u16 *x = p.x + (long long)at.row * p.columns + b.begin * BK + at.chunk * 8;
#pragma unroll
    for (int m = 0; m < EACH; m++) {
        held.row[m] = make_uint4(0, 0, 0, 0);
        if (at.inside && at.row + m < p.rows) held.row[m] = fresh16(x + (long long)m * p.columns);
    }
}

// A bit for every column that holds an outlier.
DEVICE void mark_columns(Held (&held)[HOLD ? GROUPS * TURNS : 1], const Params &p, const Block &b, int tid) {
#pragma unroll(HOLD ? TURNS : 1)
    for (int turn = 0; turn < TURNS; turn++) {
        u32 marks = 0;
#pragma unroll(HOLD ? GROUPS : 1)
        for (int group = 0; group < GROUPS; group++) {
            Held &mine = held[HOLD ? turn * GROUPS + group : 0];
            load_piece(mine, p, b, place_of(b, group, turn, tid));
#pragma unroll
            for (int m = 0; m < EACH; m++) marks |= reached(mine.row[m], p.threshold);
        }
        Place at = place_of(b, 0, turn, tid);
        if (marks) atomicOr((u32 *)b.marks + (at.chunk >> 2), marks << 8 * (at.chunk & 3));
    }
    meet<TOGETHER, TEAM>();
}

// The largest |x| of each row, but for marked columns.
DEVICE void find_largest(Held (&held)[HOLD ? GROUPS * TURNS : 1], const Params &p, const Block &b, int tid) {
#pragma unroll(HOLD ? GROUPS : 1)
    for (int group = 0; group < GROUPS; group++) {
        u32 most[EACH] = {};
#pragma unroll(HOLD ? TURNS : 1)
        for (int turn = 0; turn < TURNS; turn++) {
            Held &mine = held[HOLD ? turn * GROUPS + group : 0];
            Place at = place_of(b, group, turn, tid);
            if (!HOLD || !OUTLIERS) load_piece(mine, p, b, at);
            u32 marks = OUTLIERS && at.inside ? b.marks[at.chunk] : 0;
#pragma unroll
            for (int m = 0; m < EACH; m++) {
                clear(mine.row[m], marks);
                most[m] = larger_sizes(most[m], mine.row[m]);
            }
        }
#pragma unroll
        for (int m = 0; m < EACH; m++) {
            u32 all = warp_max(larger_of(most[m]));
            if ((tid & 31) == 0) atomicMax(b.aside->largest + place_of(b, group, 0, tid).row + m, all);
        }
    }
    meet<TOGETHER, TEAM>();
}

// By all blocks of the cluster together.
DEVICE void find_scales(const Block &b, int tid) {
    Aside &a = *b.aside;
    if (SPLITS > 1 && tid < SPLITS) arrive(b.told, tid);
    if (tid < XR) {
        u32 most = SPLITS > 1 ? 0 : a.largest[tid];
        if (SPLITS > 1) {
            await(b.told, 0);
#pragma unroll
            for (int r = 0; r < SPLITS; r++) most = max(most, load_word(a.largest + tid, r));
        }
        float absmax = widen(most);
        a.scale[tid] = divided(absmax, 127), a.factor[tid] = factor_of(absmax);
    }
    meet<TOGETHER, TEAM>();
}

// Codes as wgmma reads them; what is left of a step after the last column meets weights of zero.
DEVICE void quantize(Held (&held)[HOLD ? GROUPS * TURNS : 1], const Params &p, const Block &b, int tid) {
#pragma unroll(HOLD ? GROUPS : 1)
    for (int group = 0; group < GROUPS; group++) {
        int sums[EACH] = {};
#pragma unroll(HOLD ? TURNS : 1)
        for (int turn = 0; turn < TURNS; turn++) {
            Held &mine = held[HOLD ? turn * GROUPS + group : 0];
            Place at = place_of(b, group, turn, tid);
            if (!HOLD) load_piece(mine, p, b, at);
            u32 marks = !HOLD && OUTLIERS && at.inside ? b.marks[at.chunk] : 0;
            u8 *tile = b.tiles + (at.chunk >> 4) * TILE + (at.chunk & 1) * 8;
#pragma unroll
            for (int m = 0; m < EACH; m++) {
                int row = at.row + m;
                clear(mine.row[m], marks);
                uint2 words = codes_of(mine.row[m], b.aside->factor[row]);
                if (!at.inside) continue;
                sums[m] = byte_sum(words.x, byte_sum(words.y, sums[m]));
                *(uint2 *)(tile + row * BK + ((at.chunk >> 1 & 7) ^ (row & 7)) * 16) = words;
            }
        }
#pragma unroll
        for (int m = 0; m < EACH; m++) {
            int all = warp_sum(sums[m]);
            if ((tid & 31) == 0) atomicAdd(b.aside->total + place_of(b, group, 0, tid).row + m, all);
        }
    }
    publish_tiles();
    meet<TOGETHER, TEAM>();
}

DEVICE void take_rows(const Params &p, const Block &b, int tid) {
    Held held[HOLD ? GROUPS * TURNS : 1];
    await_earlier();
    if (OUTLIERS) mark_columns(held, p, b, tid);
    find_largest(held, p, b, tid);
    find_scales(b, tid);
    quantize(held, p, b, tid);
}

DEVICE void consume(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    int sums[BN / 8][4] = {}, lane = tid & 31;
    settle(sums);
#pragma unroll 1
    for (int step = 0; step < b.steps; step++) {
        int slot = step % STAGES;
        await(b.full + slot, step / STAGES & 1);
        u64 left = describe(b.tiles + step * TILE), right = describe(b.stages + slot * STAGE);
        begin_products();
#pragma unroll
        for (int k = 0; k < BK / 32; k++) multiply_tiles(sums, left, right, k);
        end_products();
        await_products<1>();
        if (step && lane == 0) arrive(b.empty + (step + STAGES - 1) % STAGES);
    }
    await_products<0>();
    settle(sums);
    meet<TOGETHER, TEAM>();  // nobody reads W here any more
    int *block = (int *)b.stages, m = (tid >> 5) * 16 + (lane >> 2), n = 2 * (lane & 3);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = m + 8 * h;
        if (row >= XR) continue;
        int offset = 128 * a.total[row];
#pragma unroll
        for (int j = 0; j < BN / 8; j++)
            *(int2 *)(block + row * PITCH + j * 8 + n) = make_int2(sums[j][2 * h] - offset, sums[j][2 * h + 1] - offset);
    }
}

// x times W of one outlier column, as floats; a weight is rounded as if it had been dequantized.
constexpr int MINE = (BN + HELPERS - 1) / HELPERS;
DEVICE void add_column(float (&sums)[MINE][XR], const Params &p, const Block &b, int column, int tid) {
    float weight[MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        int n = min(tid + i * HELPERS, BN - 1), out = min(b.out + n, p.outs - 1);
        float w = multiplied((float)p.codes[(long long)out * p.columns + column] - 128, b.aside->row_scale[n]);
        weight[i] = widen(round_pair(w, w) & 0xFFFF);
    }
#pragma unroll
    for (int m = 0; m < XR; m++) {
        float x = m < p.rows ? widen(fresh(p.x + (long long)m * p.columns + column)) : 0;
#pragma unroll
        for (int i = 0; i < MINE; i++) sums[i][m] += x * weight[i];
    }
}

DEVICE void assist(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    for (int n = tid; n < BN; n += HELPERS) {
        int out = min(b.out + n, p.outs - 1);
        a.row_scale[n] = p.row_scale[out], a.bias[n] = p.bias ? widen(p.bias[out]) : 0;
    }
#if OUTLIERS
    meet<ALONE, HELPERS>();
    float sums[MINE][XR] = {};
    bool any = false;
#pragma unroll 1
    for (int step = 0; step < b.steps; step++) {
        uint4 marks = *(const uint4 *)(b.marks + step * (BK / 8));
        any |= (marks.x | marks.y | marks.z | marks.w) != 0;
#pragma unroll 1
        for (int column = (b.begin + step) * BK, w = 0; w < 4; w++, column += 32)
#pragma unroll 1
            for (u32 left = w < 2 ? w ? marks.y : marks.x : w < 3 ? marks.z : marks.w; left; left &= left - 1)
                add_column(sums, p, b, column + count_bits((left & (0 - left)) - 1), tid);
    }
    if (tid == 0) a.count = any;
#endif
    meet<TOGETHER, TEAM>();
#if OUTLIERS
    float *block = (float *)extra_of(b);
    if (!any) return;
#pragma unroll
    for (int i = 0; i < MINE; i++)
#pragma unroll
        for (int m = 0; m < XR; m++)
            if (tid + i * HELPERS < BN) block[m * PITCH + tid + i * HELPERS] = sums[i][m];
#endif
}

// Eight outs of a row per thread and turn, the blocks of a cluster by turns.
DEVICE void finish(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    const int *block = (const int *)b.stages;
    for (int i = tid * SPLITS + b.rank; i < p.rows * (BN / 8); i += THREADS * SPLITS) {
        int m = i / (BN / 8), n = i % (BN / 8) * 8, total[8] = {};
        float y[8], extra[8] = {};
#pragma unroll
        for (int r = 0; r < SPLITS; r++) {
            bool more = OUTLIERS && load_word((u32 *)&a.count, r);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int at = m * PITCH + n + 4 * h;
                int4 v = load_from(block + at, r);
                total[4 * h] += v.x, total[4 * h + 1] += v.y, total[4 * h + 2] += v.z, total[4 * h + 3] += v.w;
                if (!more) continue;
                v = load_from(extra_of(b) + at, r);
                extra[4 * h] += bits_float(v.x), extra[4 * h + 1] += bits_float(v.y);
                extra[4 * h + 2] += bits_float(v.z), extra[4 * h + 3] += bits_float(v.w);
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++)
            y[e] = multiplied(multiplied((float)total[e], a.scale[m]), a.row_scale[n + e]) + extra[e] + a.bias[n + e];
        u32 pairs[4] = {round_pair(y[0], y[1]), round_pair(y[2], y[3]), round_pair(y[4], y[5]), round_pair(y[6], y[7])};
        store8(p.y + (long long)m * p.outs, b.out + n, p.outs, pairs);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) int8_few(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];
    int tid = threadIdx.x, warp = tid >> 5, steps = (p.columns + BK - 1) / BK, share = (steps + SPLITS - 1) / SPLITS;
    Block b;
    b.rank = SPLITS > 1 ? cluster_rank() : 0;
    b.out = blockIdx.x / SPLITS * BN;
    b.begin = min((int)b.rank * share, steps), b.steps = min(share, steps - b.begin);
    b.chunks = max(min(b.steps * BK, p.columns - b.begin * BK), 0) / 8;
    b.stages = (u8 *)shared + (-shared_address(shared) & 1023), b.tiles = b.stages + ROOM;
    b.full = (u64 *)(b.tiles + (share * XR + 64 - XR) * BK), b.empty = b.full + STAGES, b.told = b.empty + STAGES;
    b.marks = (u8 *)(b.told + 2), b.aside = (Aside *)(b.marks + share * (BK / 8));
    if (tid == TEAM) {
        for (int i = 0; i < STAGES; i++) make_barrier(b.full + i, 1), make_barrier(b.empty + i, 4);
        make_barrier(b.told, SPLITS);
        publish_barriers();
        let_next_begin();
    }
    if (tid < XR) b.aside->largest[tid] = 0, b.aside->total[tid] = 0;
    if (OUTLIERS)
        for (int i = tid; i < share * (BK / 8) / 4; i += THREADS) ((u32 *)b.marks)[i] = 0;
    if (SPLITS > 1) cluster_barrier();
    else __syncthreads();

    if (warp < TEAM / 32) {
        take_rows(p, b, tid);
        if (tid < CONSUMERS) consume(p, b, tid);
        else assist(p, b, tid - CONSUMERS);
    } else if (tid == TEAM) {
        produce(p, b);
    }
    __syncwarp();
#if SPLITS > 1
    cluster_barrier();
#else
    __syncthreads();
#endif
    finish(p, b, tid);
#if SPLITS > 1  // the others read this block's shared memory
    cluster_barrier();
#endif
}
