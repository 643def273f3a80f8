// y (outs) = x (columns) W (outs, columns)^T + bias for one row and codes of 2 to 4 bits, on Hopper.
//
// Built at run time, one kernel per format and cut, after common.cuh. The host (digits.py) also defines
//   PARTS              weights of one format and width that are multiplied by the same x
//   STEPS_PER_GROUP    steps of 64 columns that share a scale: 1, 2 or 4; 0: the whole row does
//   WARPS, EACH        so many warps have 512 columns each, EACH times; with one more, which copies
//   SPLITS             blocks of a cluster that share the columns
//   STAGES             tiles, of 16 outs and the warps' columns, that have room in shared memory
//   MOST               sixteens of outs of a block, at most
//
// Small weights take less time to read than a product takes to begin and to end, and then instructions bound it. So there
// are few. Four codes of a word, one of each byte, are operands of the integer tensor cores where they lie: one logical
// operation makes them, and x of those columns is divided by what their place is worth. x is an integer, too, of 30 bits
// by the largest of a warp's columns, in four digits of base 256, each in a column of its own of the product. No sum of
// a group is rounded, and what is lost of x is less than a float32 sum loses. A product has eight columns: four threads
// hold columns of two groups, whose sums come apart. Sums begin at 1.5 * 2^23 as float32, less what the offset of the
// codes adds: as they end they are float32.
// A block asks for as many tiles as have room when it begins, and takes half of a multiprocessor: those of the product
// behind it are there and ask for theirs. A warp takes x of its own columns from memory itself and keeps its digits in
// registers; warps wait for copies and for nothing else until all tiles are done. Then their sums are added, in order.
#include "int8_cluster.cuh"
#ifndef EMULATED
DEVICE void copy_row(void *to, const void *from, u32 bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
DEVICE void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // to what copies
DEVICE int to_integer(float v) { return __float2int_rn(v); }
#endif

constexpr int THREADS = 32 * (WARPS + 1), COLUMNS = 512 * WARPS, ALL = COLUMNS * EACH, OUTS = 16, STEPS = 4;  // steps of each side of a warp's columns
constexpr int PAD = 16;                                // bytes between rows, which then lie in other banks
constexpr int PRODUCTS = 4, WORDS = BITS;              // of a step; words of the 32 codes that a thread has of a row
constexpr int TOGETHER = STEPS_PER_GROUP ? STEPS_PER_GROUP : STEPS;  // steps that are summed as integers
constexpr int CODES = COLUMNS * BITS / 8, GROUPS = STEPS_PER_GROUP ? COLUMNS / (64 * TOGETHER) : 0, SCALE_BYTES = SCALE == 2 ? 4 : 2;
constexpr int SCALES = (GROUPS * SCALE_BYTES + 15) / 16 * 16;  // bytes of a row that are copied: slices may begin 8 aside
constexpr int CODE_ROW = CODES + PAD, SCALE_ROW = SCALES + PAD, TILE = OUTS * (CODE_ROW + SCALE_ROW);
constexpr int DIGIT_ROW = STEPS * PRODUCTS * 2 + 4;    // words of a digit of a thread's columns
constexpr int WARP_DIGITS = 16 * DIGIT_ROW;            // words
constexpr bool PASSING = EACH == 1;                    // digits of x lie where the last stage is, until they are in registers
constexpr int SLOT = !PASSING || TILE > 4 * WARPS * WARP_DIGITS ? TILE : 4 * WARPS * WARP_DIGITS;
constexpr int FIRST = 0x4B400000;                      // 1.5 * 2^23 as float32
constexpr float FIRST_FLOAT = 12582912.0f;

struct Part {
    const u8 *codes, *scale;
    const u16 *bias;
    u16 *y;
    int outs, tiles;
};
struct Params {
    Part part[PARTS];
    const u16 *x;
    int columns, tiles;  // of all
};
struct Shared {
    float sums[MOST][WARPS][OUTS];
    float inbox[SPLITS][MOST * OUTS];
    u64 full[STAGES], empty[STAGES], sent, taken;  // taken: the digits of x are in registers
};
struct Place {
    int part, tile;
};
DEVICE Place place_of(const Params &p, int tile) {
    Place at = {0, tile};
#pragma unroll
    for (int i = 0; i < PARTS - 1; i++)
        if (at.part == i && at.tile >= p.part[i].tiles) at.tile -= p.part[i].tiles, at.part++;
    return at;
}

DEVICE u8 *slot_at(u8 *slots, int k) { return slots + k % STAGES * SLOT; }

DEVICE int scales_aside(int column) { return GROUPS ? column / (64 * TOGETHER) * SCALE_BYTES % 16 : 0; }

// Where a lane's row of codes or of scales begins, of tile k of the block.
struct Row {
    const u8 *from;
    u32 bytes, place;
};
DEVICE Row row_of(const Params &p, int first, int k, int rank) {
    int row = threadIdx.x & 15, column = rank * ALL + k % EACH * COLUMNS;
    Place at = place_of(p, first + k / EACH * (int)(gridDim.x / SPLITS));
    const Part &part = p.part[at.part];
    long long out = min(at.tile * OUTS + row, part.outs - 1);
    if (threadIdx.x & 16) {
        const u8 *from = part.scale + (out * p.columns + column) / (64 * TOGETHER) * SCALE_BYTES;
        return {from - scales_aside(column), SCALES, (u32)(OUTS * CODE_ROW + row * SCALE_ROW)};
    }
    return {part.codes + (out * p.columns + column) * BITS / 8, CODES, (u32)(row * CODE_ROW)};
}

// The copying warp: a lane per row of codes and per row of scales.
DEVICE void copy_tiles(const Params &p, Shared &s, u8 *slots, int first, int count, int rank) {
    int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int k = 0; k < count; k++) {
        if (k >= STAGES) await(s.empty + k % STAGES, k / STAGES - 1 & 1);
        else if (PASSING && k == STAGES - 1) await(&s.taken, 0);
        if (lane == 0) expect(s.full + k % STAGES, OUTS * (CODES + SCALES));
        __syncwarp();
        Row row = row_of(p, first, k, rank);
        if (row.bytes) copy_row(slot_at(slots, k) + row.place, row.from, row.bytes, s.full + k % STAGES);
    }
}

#include "digits_x.cuh"

DEVICE float number_at(const u8 *from, int index) {
#if SCALE == 2
    return ((const float *)from)[index];
#elif SCALE == 1
    return widen_f16(((const u16 *)from)[index]);
#else
    return bits_float((u32)((const u16 *)from)[index] << 16);
#endif
}

DEVICE void load_codes(u32 (&to)[PRODUCTS][2], const u8 *from) {
    u32 words[WORDS];
    if constexpr (WORDS == 4) {
        uint4 v = *(const uint4 *)from;
        words[0] = v.x, words[1] = v.y, words[WORDS - 2] = v.z, words[WORDS - 1] = v.w;
    } else if constexpr (WORDS == 2) {
        uint2 v = *(const uint2 *)from;
        words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = ((const u32 *)from)[i];
    }
    take(to, words);
}

// The sums of 16 outs over a warp's columns, in digits: rows g and g + 8, columns 2 t and 2 t + 1.
DEVICE void add_tile(float (&sums)[4], const Held &held, const Begin &begin, const u8 *slot, int aside, int warp, int lane) {
    int t = lane & 3, side = t >> 1, g = lane >> 2;
    const u8 *codes = slot + g * CODE_ROW + warp * (512 * BITS / 8) + side * (256 * BITS / 8) + (t & 1) * (4 * WORDS);
    const u8 *scales = slot + OUTS * CODE_ROW + g * SCALE_ROW + aside + (warp * 8 + side * 4) / TOGETHER * SCALE_BYTES;
    int d[STEPS / TOGETHER][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 top[PRODUCTS][2], bottom[PRODUCTS][2];
        load_codes(top, codes + step * (8 * WORDS)), load_codes(bottom, codes + 8 * CODE_ROW + step * (8 * WORDS));
        int(&to)[4] = d[step / TOGETHER];
#pragma unroll
        for (int e = 0; e < 4; e++) to[e] = (step % TOGETHER ? to[e] : 0) + begin.first[step][e & 1];
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++)
            multiply_bytes(to, top[i][0], bottom[i][0], top[i][1], bottom[i][1], held.digits[step][i][0], held.digits[step][i][1]);
    }
#pragma unroll
    for (int group = 0; group < STEPS / TOGETHER; group++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float scale = GROUPS ? number_at(scales + h * 8 * SCALE_ROW, group) : 1.0f;
#pragma unroll
            for (int e = 0; e < 2; e++) sums[2 * h + e] += scale * (bits_float((u32)d[group][2 * h + e]) - FIRST_FLOAT);
        }
}

// The sums of 16 outs over all digits and both groups, at `to`.
DEVICE void lay_sums(float *to, const float (&sums)[4], int lane) {
    float worth = lane & 1 ? 65536.0f : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = (sums[2 * h] + 256.0f * sums[2 * h + 1]) * worth;
        sum += from_lane(sum, 1), sum += from_lane(sum, 2);
        if (!(lane & 3)) to[h * 8 + (lane >> 2)] = sum;
    }
}

DEVICE void store(const Params &p, int i, int first, float sum) {
    Place at = place_of(p, first + i / OUTS * (int)(gridDim.x / SPLITS));
    const Part &part = p.part[at.part];
    int out = at.tile * OUTS + i % OUTS;
    if (out >= part.outs) return;
    if (!GROUPS) sum *= number_at(part.scale, out);
    if (part.bias) sum += widen(part.bias[out]);
    part.y[out] = (u16)round_pair(sum, sum);
}
DEVICE void finish(const Params &p, Shared &s, int first, int count, int rank) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * OUTS; i += THREADS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.sums[i / OUTS][w][i % OUTS];
        if (SPLITS == 1) store(p, i, first, sum);
        else send((u32 *)s.inbox[rank] + i, float_bits(sum), 0, &s.sent);
    }
    if (SPLITS == 1 || rank) return;
    await_sent(&s.sent, 0);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * OUTS; i += THREADS) {
        float sum = 0;
#pragma unroll
        for (int r = 0; r < SPLITS; r++) sum += s.inbox[r][i];
        store(p, i, first, sum);
    }
}

// A warp's sums of all tiles.
DEVICE void add_tiles(const Params &p, Shared &s, u8 *slots, int count, int rank) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slot = 0, phase = 0;
    u32 *digits = (u32 *)(slots + (PASSING ? STAGES - 1 : STAGES) * SLOT) + warp * EACH * WARP_DIGITS;
    Held held;
    Begin begin[EACH];
    float undo[EACH];
    previous_done();
#pragma unroll
    for (int e = 0; e < EACH; e++) undo[e] = lay_digits(digits + e * WARP_DIGITS, p.x + rank * ALL + e * COLUMNS + warp * 512, lane);
    __syncwarp();
#pragma unroll
    for (int e = 0; e < EACH; e++) load_digits(held, digits + e * WARP_DIGITS, lane), set_begin(begin[e], held);
    if (PASSING) {
        publish_shared();
        __syncwarp();
        if (lane == 0) arrive(&s.taken);
    }
#pragma unroll 1
    for (int tile = 0; tile < count; tile++) {
        float total[4] = {};
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            float sums[4] = {};
            if (!PASSING) load_digits(held, digits + e * WARP_DIGITS, lane);
            await(s.full + slot, phase);
            add_tile(sums, held, begin[e], slots + slot * SLOT, scales_aside(rank * ALL + e * COLUMNS), warp, lane);
            __syncwarp();
            if (lane == 0) arrive(s.empty + slot);
            if (++slot == STAGES) slot = 0, phase ^= 1;
#pragma unroll
            for (int i = 0; i < 4; i++) total[i] += undo[e] * sums[i];
        }
        lay_sums(s.sums[tile][warp], total, lane);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) digits(const Params p) {
    extern __shared__ uint4 shared[];  // sums and barriers, slots, the last of which has the digits of x before
    Shared &s = *(Shared *)shared;
    u8 *slots = (u8 *)(shared + (sizeof(Shared) + 15) / 16);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, rank = SPLITS > 1 ? (int)cluster_rank() : 0;
    int first = blockIdx.x / SPLITS, apart = gridDim.x / SPLITS, count = (p.tiles - first + apart - 1) / apart;
    next_may_begin();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) make_barrier(s.full + i, 1), make_barrier(s.empty + i, WARPS);
        make_barrier(&s.sent, 1), make_barrier(&s.taken, WARPS), publish_barriers();
        if (SPLITS > 1 && rank == 0) expect(&s.sent, SPLITS * count * OUTS * 4);
    }
    if (SPLITS > 1) cluster_arrive();
    __syncthreads();
    if (warp == WARPS) copy_tiles(p, s, slots, first, count * EACH, rank);
    else add_tiles(p, s, slots, count, rank);
    if (SPLITS > 1) cluster_wait();
    __syncthreads();
    finish(p, s, first, count, rank);
}
