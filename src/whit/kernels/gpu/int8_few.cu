// y (rows, outs) = x (rows, columns) W (outs, columns)^T for up to 16 rows: quantized and multiplied in one launch.
//
// Built at run time after common.cuh, for Hopper. The host (int8.py) also defines
//   XR                 rows that there is room for: 8 or 16
//   BN, STAGES         outs of a block; steps of 128 columns of W in shared memory
//   SPLITS             blocks of a cluster that share the columns
//   TURNS              times that a thread of four warps takes eight columns, of all rows
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

constexpr int BK = 128, CONSUMERS = 128, HELPERS = 96, THREADS = CONSUMERS + 32 + HELPERS, CLUSTER = SPLITS;
constexpr int STAGE = BN * BK, TILE = XR * BK, PITCH = BN + 8;
enum { AMONG = 1, MARKED };  // barriers

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
    int sums[XR][PITCH];
    float extra[XR][PITCH];  // of the outliers
    float row_scale[BN], bias[BN], scale[XR], factor[XR];
    u32 largest[XR];  // |x| of this block's columns, as bits
    int total[XR], count;  // sums of this block's codes; how many of its columns are outliers
};

struct Block {
    u8 *stages, *tiles;  // of W, and of the codes of x, all of these
    u64 *full, *empty, *told;
    Aside *aside;
    u8 *marks;  // a bit for each of this block's columns
    int out, begin, steps, chunks;  // its first out; its steps; eights of columns of x
    u32 rank;
};

DEVICE void produce(const Params &p, const Block &b) {
    for (int step = 0; step < b.steps; step++) {
        int slot = step % STAGES;
        if (step >= STAGES) await(b.empty + slot, (step / STAGES - 1) & 1);
        expect(b.full + slot, STAGE);
        copy_tile(b.stages + slot * STAGE, p.weight, (b.begin + step) * BK, b.out, b.full + slot);
    }
}

DEVICE float element(const uint4 &v, int i) {
    u32 pair = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return widen(i & 1 ? pair >> 16 : pair & 0xFFFF);
}

struct Held {  // eight columns of all rows
    uint4 row[XR];
};

DEVICE void load_chunk(Held &held, const Params &p, const Block &b, int chunk) {
#pragma unroll
    for (int m = 0; m < XR; m++) {
        held.row[m] = make_uint4(0, 0, 0, 0);
        if (chunk < b.chunks && m < p.rows) held.row[m] = fresh16(p.x + (long long)m * p.columns + b.begin * BK + chunk * 8);
    }
}

// The largest |x| of each row, but for columns that hold an outlier; these are marked.
DEVICE void find_largest(Held &held, const Params &p, const Block &b, int tid) {
    u32 most[XR] = {};
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn++) {
        int chunk = turn * CONSUMERS + tid;
        load_chunk(held, p, b, chunk);
        u32 marks = 0;
#if OUTLIERS
#pragma unroll
        for (int m = 0; m < XR; m++)
#pragma unroll
            for (int i = 0; i < 8; i++) marks |= (u32)(fabsf(element(held.row[m], i)) >= p.threshold) << i;
        if (chunk < b.chunks) b.marks[chunk] = marks;
#endif
#pragma unroll
        for (int m = 0; m < XR; m++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (!(marks >> i & 1)) most[m] = max(most[m], float_bits(element(held.row[m], i)) & 0x7FFFFFFF);
    }
#pragma unroll
    for (int m = 0; m < XR; m++) {
        u32 all = warp_max(most[m]);
        if ((tid & 31) == 0) atomicMax(b.aside->largest + m, all);
    }
}

// By all blocks of the cluster together.
DEVICE void find_scales(const Block &b, int tid) {
    Aside &a = *b.aside;
    if (tid >= XR) return;
    u32 most = 0;
    for (int r = 0; r < SPLITS; r++) most = max(most, load_word(a.largest + tid, r));
    float absmax = bits_float(most);
    a.scale[tid] = divided(absmax, 127), a.factor[tid] = absmax > 0 ? multiplied(divided(1, absmax), 127) : 0;
}

// Codes as wgmma reads them; what is left of a step after the last column meets weights of zero.
DEVICE void quantize(Held &held, const Params &p, const Block &b, int tid) {
    int sums[XR] = {};
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn++) {
        int chunk = turn * CONSUMERS + tid;
        if (TURNS > 1) load_chunk(held, p, b, chunk);
        if (chunk >= b.chunks) break;
        u32 marks = OUTLIERS ? b.marks[chunk] : 0;
        u8 *tile = b.tiles + (chunk >> 4) * TILE + (chunk & 1) * 8;
#pragma unroll
        for (int m = 0; m < XR; m++) {
            u32 words[2] = {};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int code = marks >> i & 1 ? 0 : nearest(multiplied(element(held.row[m], i), b.aside->factor[m]));
                code = max(min(code, 127), -128);
                sums[m] += code;
                words[i >> 2] |= (u32)(code & 0xFF) << 8 * (i & 3);
            }
            *(uint2 *)(tile + m * BK + ((chunk >> 1 & 7) ^ (m & 7)) * 16) = make_uint2(words[0], words[1]);
        }
    }
#pragma unroll
    for (int m = 0; m < XR; m++) {
        int all = warp_sum(sums[m]);
        if ((tid & 31) == 0) atomicAdd(b.aside->total + m, all);
    }
}

DEVICE void consume(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    await_earlier();
    Held held;
    find_largest(held, p, b, tid);
#if OUTLIERS
    announce<MARKED, CONSUMERS + HELPERS>();
#endif
    meet<AMONG, CONSUMERS>();
#if SPLITS > 1
    if (tid < SPLITS) arrive(b.told, tid);
    await(b.told, 0);
#endif
    find_scales(b, tid);
    meet<AMONG, CONSUMERS>();
    quantize(held, p, b, tid);
    publish_tiles();
    meet<AMONG, CONSUMERS>();

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
    if (tid >= 32) return;  // the first warp has the rows
    int m = lane >> 2, n = 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int h = 0; h < XR / 8; h++) {
            int row = m + 8 * h, offset = 128 * a.total[row];
            *(int2 *)(a.sums[row] + j * 8 + n) = make_int2(sums[j][2 * h] - offset, sums[j][2 * h + 1] - offset);
        }
}

#if OUTLIERS
// x times W of the outlier columns, as floats, one after the other; a weight is rounded as if it had been dequantized.
DEVICE void add_outliers(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    int count = 0;
    for (int c = 0; c < b.chunks; c++) count += count_bits(b.marks[c]);
    if (tid == 0) a.count = count;
    if (!count) return;
    constexpr int MINE = (BN + HELPERS - 1) / HELPERS;
    float sum[MINE][XR] = {};
    for (int c = 0; c < b.chunks; c++)
        for (u32 left = b.marks[c]; left; left &= left - 1) {
            int column = b.begin * BK + c * 8 + count_bits((left & (0 - left)) - 1);
            float weight[MINE];
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                int n = min(tid + i * HELPERS, BN - 1), out = min(b.out + n, p.outs - 1);
                float w = multiplied((float)p.codes[(long long)out * p.columns + column] - 128, a.row_scale[n]);
                weight[i] = widen(round_pair(w, w) & 0xFFFF);
            }
#pragma unroll
            for (int m = 0; m < XR; m++) {
                float x = m < p.rows ? widen(fresh(p.x + (long long)m * p.columns + column)) : 0;
#pragma unroll
                for (int i = 0; i < MINE; i++) sum[i][m] += x * weight[i];
            }
        }
#pragma unroll
    for (int i = 0; i < MINE; i++)
#pragma unroll
        for (int m = 0; m < XR; m++)
            if (tid + i * HELPERS < BN) a.extra[m][tid + i * HELPERS] = sum[i][m];
}
#endif

DEVICE void assist(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    for (int n = tid; n < BN; n += HELPERS) {
        int out = min(b.out + n, p.outs - 1);
        a.row_scale[n] = p.row_scale[out], a.bias[n] = p.bias ? widen(p.bias[out]) : 0;
    }
#if OUTLIERS
    meet<MARKED, CONSUMERS + HELPERS>();
    await_earlier();
    add_outliers(p, b, tid);
#endif
}

// Eight outs of a row per thread and turn, the blocks of a cluster by turns.
DEVICE void finish(const Params &p, const Block &b, int tid) {
    Aside &a = *b.aside;
    for (int i = tid * SPLITS + b.rank; i < p.rows * (BN / 8); i += THREADS * SPLITS) {
        int m = i / (BN / 8), n = i % (BN / 8) * 8, out = b.out + n;
        int total[8] = {};
        float extra[8] = {};
#pragma unroll
        for (int r = 0; r < SPLITS; r++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int4 v = load_from(a.sums[m] + n + 4 * h, r);
                total[4 * h] += v.x, total[4 * h + 1] += v.y, total[4 * h + 2] += v.z, total[4 * h + 3] += v.w;
            }
#if OUTLIERS
            if (load_word((u32 *)&a.count, r))
#pragma unroll
                for (int e = 0; e < 8; e++) extra[e] += bits_float(load_word((u32 *)(a.extra[m] + n + e), r));
#endif
        }
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (out + e < p.outs) {
                float y = multiplied(multiplied((float)total[e], a.scale[m]), a.row_scale[n + e]) + extra[e] + a.bias[n + e];
                p.y[(long long)m * p.outs + out + e] = (u16)round_pair(y, y);
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) int8_few(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];
    int tid = threadIdx.x, warp = tid >> 5, steps = (p.columns + BK - 1) / BK, share = (steps + SPLITS - 1) / SPLITS;
    Block b;
    b.rank = SPLITS > 1 ? cluster_rank() : 0;
    b.out = blockIdx.x / SPLITS * BN;
    b.begin = min((int)b.rank * share, steps), b.steps = min(share, steps - b.begin);
    b.chunks = max(min(b.steps * BK, p.columns - b.begin * BK), 0) / 8;
    b.stages = (u8 *)shared + (-shared_address(shared) & 1023), b.tiles = b.stages + STAGES * STAGE;
    b.full = (u64 *)(b.tiles + (share * XR + 64 - XR) * BK), b.empty = b.full + STAGES, b.told = b.empty + STAGES;
    b.aside = (Aside *)(b.told + 2), b.marks = (u8 *)(b.aside + 1);
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) make_barrier(b.full + i, 1), make_barrier(b.empty + i, 4);
        make_barrier(b.told, SPLITS);
        publish_barriers();
        let_next_begin();
    }
    if (tid < XR) b.aside->largest[tid] = 0, b.aside->total[tid] = 0;
    if (SPLITS > 1) cluster_barrier();
    else __syncthreads();

    if (warp < 4) consume(p, b, tid);
    else if (warp > 4) assist(p, b, tid - CONSUMERS - 32);
    else if ((tid & 31) == 0) produce(p, b);
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
