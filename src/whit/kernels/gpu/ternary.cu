// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 4 rows of bfloat16 and a ternary W, five digits
// of base 3 to a byte, on Hopper. Built at run time after common.cuh. The host (ternary.py) defines
//   RUN                columns that share a scale: 64, 128, 256 ..., or 0 for the whole row
//   NUMBER             what a scale is: 0 bfloat16, 1 float16, 2 float32
//   ROWS               1, 2 or 4: rows rounded up
//   WARPS, STAGES      of a block; tiles that have room in shared memory
//   SIDE               times 16 outs: a tile
//   ODD                1: rows of W do not begin at whole words
//   EACH               steps of a warp; their x stays in registers where STAYS is 1
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//
// Why it is fast. A byte is looked up once, in a table with a copy for each of the 32 banks, 256 bytes apart, so that one
// permutation makes the address; what is found holds the five codes where one logical operation puts two of them under
// the exponent of 128: 8 operations for ten codes. Operands of the tensor cores are sums in any order, so x is laid down
// in the order of these pairs, divided by what their places are worth. A step is 320 columns, 64 bytes, five runs of 64:
// x of each run is a column of its own in the product, zero elsewhere, so that a run's sum comes apart and gets its own
// scale, although runs end inside of bytes; four threads share a step, and 80 columns touch two runs. A warp has the same
// columns in every tile, and their x in registers. Blocks stay: a tile of W and of its scales is one stretch of memory
// each and is copied a few tiles ahead, whatever rows begin at.

constexpr int THREADS = 32 * WARPS, STEP = 320, CHUNK = 80, OUTS = 16 * SIDE;
constexpr int PARTS = CHUNK / 8;  // of x: eight columns, the operands of two products
constexpr int SCALE_BYTES = NUMBER == 2 ? 4 : 2;
constexpr int UNROLLED = STAYS ? EACH : 1;
constexpr u32 MAGIC = 0x43004300u;  // 128, twice
// Where the codes of five pairs lie: columns 0 1, 2 3, 5 6, 7 8, 4 9 of ten.
DEVICE constexpr u32 place_of(int pair) { return pair % 5 == 4 ? 4 : pair % 5 % 2 * 2; }
constexpr int APART = 256, TABLE = 4096, PART_OF_X = APART / 16;  // bytes between parts of x; of uint4

struct Params {
    const u8 *codes;
    const void *scale;
    const u16 *x, *bias;  // bias: or null
    u16 *y;
    long long code_bytes, scale_bytes;  // of all
    int outs, columns, rows, row_bytes, runs;  // runs of a row; 0: one scale for the matrix
};

struct Shared {
    u32 x, lane;             // where a lane's x lies; four times the lane
    bool has_x[2];           // its column of the product is the first, the second run of its columns of W
    float *sums;             // what x adds to a product for the exponents and the zeros: [row][step][run]
    float *block;            // the warps' sums of two tiles: [turn][warp][row][out]
    u8 *slots;
};

DEVICE float number_at(const u8 *from, int index) {
#if NUMBER == 2
    return ((const float *)from)[index];
#elif NUMBER == 1
    return widen_f16(((const u16 *)from)[index]);
#else
    return bits_float((u32)((const u16 *)from)[index] << 16);
#endif
}

DEVICE int tile_bytes(const Params &p) { return OUTS * p.row_bytes; }
DEVICE int slot_bytes(const Params &p) { return OUTS * (p.row_bytes + p.runs * SCALE_BYTES); }

// Bytes of W, sixteen at a time; `left`: to the end of the weight, which may come sooner.
DEVICE void copy_bytes(u8 *to, const u8 *from, int bytes, long long left) {
    if (left >= bytes) {
#pragma unroll 2
        for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16) copy_behind(to + i, from + i);
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < left; i += THREADS) to[i] = from[i];
    }
}
DEVICE void copy_tile(u8 *slot, const Params &p, int tile) {
    int codes = tile_bytes(p), scales = OUTS * p.runs * SCALE_BYTES;
    if (tile * OUTS < p.outs) {
        long long code = (long long)tile * codes, scale = (long long)tile * scales;
        copy_bytes(slot, p.codes + code, codes, p.code_bytes - code);
        copy_bytes(slot + codes, (const u8 *)p.scale + scale, scales, p.scale_bytes - scale);
    }
    end_copies();
}

DEVICE void fill_table(uint4 *table) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < 256; i += THREADS) {
        u32 left = i, c[5];
        for (int k = 0; k < 5; k++, left /= 3) c[k] = left % 3;
        u32 v = c[0] | c[1] << 16 | c[2] << 2 | c[3] << 18 | c[4] * 0x100010u;
        for (u32 k = 0; k < 8; k++) table[i * 16 + (k + i & 7)] = make_uint4(v, v, v, v);
    }
}

// x: [row][step][part][run of the two][lane & 3], ten columns of a row at a time.
DEVICE void stage(uint4 *xs, const Params &p, int steps) {
#pragma unroll 1
    for (int row = 0; row < ROWS; row++) {
        const u16 *from = p.x + (long long)min(row, p.rows - 1) * p.columns;
        u32 *to = (u32 *)(xs + row * steps * PARTS * PART_OF_X);
#pragma unroll 2
        for (int i = threadIdx.x; i < steps * 32; i += THREADS) {
            int ten = i & 7, t = i >> 3 & 3, step = i >> 5, column = step * STEP + t * CHUNK + ten * 10;
            u32 w[5];
#pragma unroll
            for (int k = 0; k < 5; k++) w[k] = column + 2 * k < p.columns ? *(const u32 *)(from + column + 2 * k) : 0;
            u32 pairs[5] = {
                w[0], w[1], permute(w[2], w[3], 0x5432), permute(w[3], w[4], 0x5432), permute(w[2], w[4], 0x7610)};
            int first = 64 - 16 * t - 10 * ten;  // columns before the second run
#pragma unroll
            for (int k = 0; k < 5; k++) {
                int low = (0x47520 >> 4 * k) & 15, high = (0x98631 >> 4 * k) & 15, q = ten * 5 + k;
                u32 v = scale_by(pairs[k], (0x3F80u - (place_of(k) << 7)) * 0x10001u);
                u32 mask = (low < first ? 0xFFFFu : 0) | (high < first ? 0xFFFF0000u : 0);
                u32 *at = to + (step * PARTS + q / 4) * (PART_OF_X * 4) + t * 4 + q % 4;
                at[0] = v & mask, at[16] = v & ~mask;
            }
        }
    }
}

DEVICE uint4 x_of(const Shared &s, int steps, int row, int step, int part) {
    return shared_if(s.has_x[0] || s.has_x[1], s.x + ((row * steps + step) * PARTS + part) * APART);
}

// The product of x with a row of zeros, whose codes are 1.
DEVICE void sum_steps(const Shared &s, int steps, int warp, int lane) {
#pragma unroll 1
    for (int i = warp; i < steps * ROWS; i += WARPS) {
        float part[2][4] = {};
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            uint4 b = x_of(s, steps, i / steps, i % steps, k);
            u32 a[4];
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] = MAGIC + (0x10001u << place_of(4 * k + j));
            multiply(part[0], a[0], a[0], a[1], a[1], b.x, b.y);
            multiply(part[1], a[2], a[2], a[3], a[3], b.z, b.w);
        }
        if (lane < 4) s.sums[i * 8 + 2 * lane] = part[0][0] + part[1][0], s.sums[i * 8 + 2 * lane + 1] = part[0][1] + part[1][1];
    }
}

// The ten pairs of the codes in a word.
DEVICE void decode(u32 (&pairs)[10], u32 word, u32 lane) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 v[2];
#pragma unroll
        for (int k = 0; k < 2; k++) v[k] = shared_word(permute(word, lane, 0x5504 | (2 * i + k) << 4) + 1024);
        u32 *to = pairs + 5 * i;
        to[0] = under_exponent(v[0], 0x00030003u, MAGIC), to[1] = under_exponent(v[0], 0x000C000Cu, MAGIC);
        to[2] = under_exponent(v[1], 0x00030003u, MAGIC), to[3] = under_exponent(v[1], 0x000C000Cu, MAGIC);
        to[4] = under_exponent(v[1], 0x00300000u, under_exponent(v[0], 0x00000030u, MAGIC));
    }
}

// Sixteen bytes of a row of W: words that begin `aside` bytes later than those that memory has.
DEVICE void load_words(u32 (&to)[4], const u8 *from) {
    u32 aside = ODD ? (u32)((unsigned long long)from & 3) : 0, held[5];
    const u32 *words = (const u32 *)(from - aside);
#pragma unroll
    for (int i = 0; i < 4 + ODD; i++) held[i] = words[i];
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = ODD ? permute(held[i], held[i + 1], 0x3210 + aside * 0x1111) : held[i];
}

// A warp's x.
struct Kept {
    uint4 x[STAYS ? EACH : 1][STAYS ? ROWS : 1][PARTS];
};
DEVICE void keep(Kept &held, const Shared &s, int steps, int begin) {
#pragma unroll
    for (int i = 0; i < EACH && STAYS; i++)
#pragma unroll
        for (int row = 0; row < ROWS; row++)
#pragma unroll
            for (int k = 0; k < PARTS; k++) held.x[i][row][k] = x_of(s, steps, row, min(begin + i, steps - 1), k);
}

// One step of the SIDE times 16 outs: their products are independent of each other.
typedef uint4 KeptStep[STAYS ? ROWS : 1][PARTS];
DEVICE void add_step(float (&sums)[SIDE][ROWS][2], const Shared &s, const Params &p, const u8 *slot, int steps, int step,
                     float whole, const KeptStep &x) {
    int lane = threadIdx.x & 31, t = lane & 3;
    float part[SIDE][ROWS][2][4] = {};  // two chains of products each, so that none waits for itself
    u32 words[SIDE][2][4];
#pragma unroll
    for (int u = 0; u < SIDE; u++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            load_words(words[u][h], slot + (u * 16 + h * 8 + lane / 4) * p.row_bytes + step * (STEP / 5) + t * (CHUNK / 5));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 pairs[SIDE][2][10];
#pragma unroll
        for (int u = 0; u < SIDE; u++)
#pragma unroll
            for (int h = 0; h < 2; h++) decode(pairs[u][h], words[u][h][i], s.lane);
#pragma unroll
        for (int m = 0; m < 5; m++)
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                int at = (5 * i + m) / 2;
                uint4 b = STAYS ? x[STAYS ? row : 0][at] : x_of(s, steps, row, step, at);
#pragma unroll
                for (int u = 0; u < SIDE; u++) {
                    u32 *top = pairs[u][0] + 2 * m, *bottom = pairs[u][1] + 2 * m;
                    if ((5 * i + m) % 2) multiply(part[u][row][1], top[0], bottom[0], top[1], bottom[1], b.z, b.w);
                    else multiply(part[u][row][0], top[0], bottom[0], top[1], bottom[1], b.x, b.y);
                }
            }
    }
#pragma unroll
    for (int u = 0; u < SIDE; u++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u8 *scales = slot + tile_bytes(p) + (u * 16 + h * 8 + (lane >> 2)) * p.runs * SCALE_BYTES;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int index = RUN ? min((step * 5 + 2 * t + e) / (RUN ? RUN / 64 : 1), p.runs - 1) : 0;
                float scale = p.runs ? number_at(scales, index) : whole;
#pragma unroll
                for (int row = 0; row < ROWS; row++) {
                    float sum = part[u][row][0][2 * h + e] + part[u][row][1][2 * h + e];
                    sums[u][row][h] += scale * (sum - s.sums[(row * steps + step) * 8 + 2 * t + e]);
                }
            }
        }
}

// The sums of all steps of a warp: [row][out].
DEVICE void add_tile(const Shared &s, const Params &p, const u8 *slot, float *block, int steps, float whole,
                     const Kept &held) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float sums[SIDE][ROWS][2] = {};
#pragma unroll UNROLLED
    for (int i = 0; i < EACH; i++)
        if (warp * EACH + i < steps) add_step(sums, s, p, slot, steps, warp * EACH + i, whole, held.x[STAYS ? i : 0]);
#pragma unroll
    for (int u = 0; u < SIDE; u++)
#pragma unroll
        for (int row = 0; row < ROWS; row++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float sum = sums[u][row][h];
                sum += from_lane(sum, 1);
                sum += from_lane(sum, 2);
                if (!(lane & 3)) block[(warp * ROWS + row) * OUTS + u * 16 + h * 8 + (lane >> 2)] = sum;
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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) ternary(const Params p) {
    extern __shared__ uint4 shared[];  // table, x in its gaps and behind it, its sums, the warps' sums, slots
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, run = (lane >> 2) - (lane & 3);
    int steps = (p.columns + STEP - 1) / STEP;
    int tiles = (p.outs + OUTS - 1) / OUTS, behind = ROWS * steps * PARTS * PART_OF_X;
    uint4 *xs = shared + 8;
    Shared s = {kept(shared_place(xs) + (run == 1 ? 64 : 0) + (lane & 3) * 16), kept(lane * 4), {run == 0, run == 1}};
    s.sums = (float *)(shared + (behind > TABLE ? behind : TABLE));
    s.block = s.sums + ROWS * steps * 8, s.slots = (u8 *)(s.block + 2 * WARPS * ROWS * OUTS);
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) copy_tile(s.slots + k * slot_bytes(p), p, blockIdx.x + k * gridDim.x);
    float whole = p.runs ? 0.0f : number_at((const u8 *)p.scale, 0);
    fill_table(shared);
    next_may_begin(), previous_done();
    stage(xs, p, steps);
    __syncthreads();
    sum_steps(s, steps, warp, lane);
    Kept held;
    keep(held, s, steps, warp * EACH);
    int tile = blockIdx.x, slot = 0, turn = 0;
#pragma unroll 1
    for (; tile < tiles; tile += gridDim.x, turn ^= 1) {
        copies_left<STAGES - 2>();
        __syncthreads();  // the tile is here; what was summed last is there; and the slot read last is free
        if (tile != blockIdx.x) join(p, s.block + (turn ^ 1) * WARPS * ROWS * OUTS, tile - gridDim.x);
        int free = slot ? slot - 1 : STAGES - 1;
        copy_tile(s.slots + free * slot_bytes(p), p, tile + (STAGES - 1) * gridDim.x);
        add_tile(s, p, s.slots + slot * slot_bytes(p), s.block + turn * WARPS * ROWS * OUTS, steps, whole, held);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    copies_left<0>();
    __syncthreads();
    join(p, s.block + (turn ^ 1) * WARPS * ROWS * OUTS, tile - gridDim.x);
}
