// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias, W read once as the packed codes that the file holds.
//
// Built at run time, one kernel per format and configuration, after common.cuh. The host (stream.py) also defines
//   CHUNK              columns of a row that a thread holds at a time; four threads share a row, so a step is 4 CHUNK columns
//   STEPS_PER_GROUP    steps that share a scale; 0: the whole row does
//   MT, NT             tiles of 16 outs per warp, tiles of 8 rows
//   WO, WK             warps along outs and along columns
//   DEPTH              steps that a warp loads before it computes
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//
// Why it is fast. The outs are the M of mma.m16n8k16 and the rows its N, so 1 to 8 rows cost one instruction. A sum over
// columns may run in any order as long as both operands agree: each thread loads whole words of its row (16 bytes at a
// time, straight to registers) and takes as neighbours the two codes that lie 16 bits apart, so that a shift and one
// three-input logical operation make two of them (integer bits under the exponent of 128 or 1024). x is brought into
// that order once per block, in shared memory. Levels are looked up two at a time by the byte, in a table with a copy
// for each of the 32 banks. Scales multiply float32 sums of a group, not weights. Warps that split columns are added in
// a fixed order; blocks too, by the last one to finish: no atomics on floats, and a row's result does not depend on
// what other rows are there.

constexpr int THREADS = 32 * WO * WK;
constexpr int OUTS = 16 * MT * WO;           // of a block
constexpr int ROWS = 8 * NT;                 // of a block
constexpr int STEP = 4 * CHUNK;                  // columns
constexpr int WORDS = CHUNK * BITS / 32;         // that a thread holds of one row of W per step
constexpr int UNITS = CHUNK / 8;                 // eight columns: the operands of two mma
constexpr int STAGE = WK * DEPTH;                // steps between two barriers
constexpr bool DENSE = 32 % BITS == 0;       // codes lie whole in a word
constexpr int PERIOD = DENSE ? 32 / BITS : 32;  // codes after which the pattern repeats
constexpr bool NATURAL = CODEBOOK || BITS == 8; // neighbours in an operand are neighbours in memory
constexpr u32 MAGIC = HALF ? 0x64006400u : 0x43004300u;  // 1024, 128: integers to 7 bits are its lowest bits
constexpr u32 ONES = HALF ? 0x3C003C00u : 0x3F803F80u;
constexpr int TABLE = CODEBOOK ? 256 * 32 / 4 : 0;  // of uint4

struct Params {
    const u32 *codes;
    Scales scales;
    const u16 *table;           // CODEBOOK: 16 levels as operands
    const u16 *x;
    const u16 *bias;            // or null
    u16 *y;
    float *partial;             // (splits, rows, outs) where there are several
    u32 *arrived;               // zeros, one per block of outs and rows; left at zero
    int outs, columns, rows, row_words, split_steps;
};

struct Held {  // what a warp holds of W for one stage
    u32 words[DEPTH][MT][2][WORDS];
    float scale[DEPTH][MT][2];
    float zero[DEPTH][MT][2];
};

DEVICE void load_words(u32 (&to)[WORDS], const u32 *from) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            uint4 v = load16(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 2) {
            uint2 v = load8(from + i);
            to[i] = v.x, to[i + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++) to[i] = load4(from + i);
    }
}

DEVICE void load_held(Held &held, const Params &p, int first_step, int end, int first_out, int lane) {
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
        int step = first_step + u;
        if (step >= end) break;
#pragma unroll
        for (int m = 0; m < 2 * MT; m++) {
            int out = min(first_out + m * 8 + (lane >> 2), p.outs - 1);
            load_words(held.words[u][m >> 1][m & 1], p.codes + (long long)out * p.row_words + (step * 4 + (lane & 3)) * WORDS);
#if STEPS_PER_GROUP
            held.scale[u][m >> 1][m & 1] = load_scale(p.scales, out, step / STEPS_PER_GROUP);
            if (ZERO) held.zero[u][m >> 1][m & 1] = load_zero(p.scales, out, step / STEPS_PER_GROUP);
#endif
        }
    }
}

// Eight columns of x per thread and unit, in the order of the operands: [step][unit][row][lane & 3].
DEVICE void stage_x(uint4 *xs, const Params &p, int first_step, int end, int first_row, int rows, u32 tid) {
    u32 count = STAGE * UNITS * 4 * rows;
#pragma unroll 2
    for (u32 i = tid; i < count; i += THREADS) {
        u32 unit = i % UNITS, t = i / UNITS % 4, step = i / (4 * UNITS) % STAGE, row = i / (4 * UNITS * STAGE);
        if (first_step + (int)step >= end) continue;
        int column = (first_step + step) * STEP + t * CHUNK;
        constexpr int HALF_PERIOD = NATURAL ? 4 : PERIOD / 2;
        constexpr int UNITS_PER_PERIOD = NATURAL ? 1 : PERIOD / 8;
        column += unit / UNITS_PER_PERIOD * 2 * HALF_PERIOD + unit % UNITS_PER_PERIOD * 4;
        const u16 *from = p.x + (long long)(first_row + row) * p.columns + column;
        uint2 a = *(const uint2 *)from, b = *(const uint2 *)(from + HALF_PERIOD);
        uint4 v;
        if (NATURAL) {
            v.x = a.x, v.y = a.y, v.z = b.x, v.w = b.y;
        } else {
            v.x = permute(a.x, b.x, 0x5410), v.y = permute(a.x, b.x, 0x7632);
            v.z = permute(a.y, b.y, 0x5410), v.w = permute(a.y, b.y, 0x7632);
        }
        xs[((step * UNITS + unit) * rows + row) * 4 + t] = v;
    }
}

DEVICE constexpr u32 both(u32 v) { return v | v << 16; }
DEVICE constexpr u32 minus_offset() {  // -(1024 + OFFSET) or -(128 + OFFSET), twice
    if (HALF) {  // 1024 .. 2047 has steps of 1
        return both(0xE400u + OFFSET);
    }
    return both(0xC300u + OFFSET);  // 128 .. 255 has steps of 1
}

// The four operands of a unit of one row of W.
DEVICE void decode(u32 (&pairs)[4], const u32 (&words)[WORDS], int unit, const u32 *table) {
    constexpr u32 MASK = both((1u << BITS) - 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (CODEBOOK) {
            u32 word = words[unit], at = i == 0 ? word << 5 : word >> (8 * i - 5);
            pairs[i] = table[at & 0x1FE0u];
        } else if constexpr (BITS == 8) {
            u32 word = words[2 * unit + i / 2];
            if constexpr (HALF) {
                pairs[i] = add_pair(permute(word, MAGIC, i % 2 ? 0x5352 : 0x5150), both(0xE400u + OFFSET));
            } else {
                float low = bits_float(permute(word, 0x4B000000u, 0x7440 + 2 * (i % 2))) - (8388608.0f + OFFSET);
                float high = bits_float(permute(word, 0x4B000000u, 0x7441 + 2 * (i % 2))) - (8388608.0f + OFFSET);
                pairs[i] = round_pair(low, high);
            }
        } else if constexpr (DENSE) {
            int word = unit * 8 / PERIOD, code = unit % (PERIOD / 8) * 4 + i;
            pairs[i] = add_pair(under_exponent(words[word] >> (BITS * code), MASK, MAGIC), minus_offset());
        } else {  // 32 codes in 2 BITS half words; code j + 16 lies BITS half words after code j
            int bit = BITS * (unit * 4 + i), at = bit >> 4, shift = bit & 15;
            auto halves = [&](int k) {
                u32 selector = (k & 1 ? 0x0032 : 0x0010) | ((k + BITS) & 1 ? 0x7600 : 0x5400);
                return permute(words[k >> 1], words[(k + BITS) >> 1], selector);
            };
            u32 here = shift + BITS <= 16 ? MASK : both((1u << (16 - shift)) - 1);
            u32 v = under_exponent(halves(at) >> shift, here, MAGIC);
            if (shift + BITS > 16) v = under_exponent(halves(at + 1) << (16 - shift), MASK & ~here, v);
            pairs[i] = add_pair(v, minus_offset());
        }
    }
}

struct Sums {
    float all[MT][NT][4];
};

DEVICE void compute(Sums &sums, const Held &held, const uint4 *xs, const u32 *table, int steps, int slot, int rows, int lane) {
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
        if (slot + u >= steps) break;
#if STEPS_PER_GROUP
        float part[MT][NT][4] = {};
#endif
        float total[NT][4] = {};  // of x over the group, for zero points
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                int row = n * 8 + (lane >> 2);
                b[n] = make_uint4(0, 0, 0, 0);
                if (row < rows) b[n] = xs[(((slot + u) * UNITS + unit) * rows + row) * 4 + (lane & 3)];
                if (ZERO && STEPS_PER_GROUP) {
                    multiply(total[n], ONES, ONES, ONES, ONES, b[n].x, b[n].y);
                    multiply(total[n], ONES, ONES, ONES, ONES, b[n].z, b[n].w);
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 top[4], bottom[4];
                decode(top, held.words[u][m][0], unit, table);
                decode(bottom, held.words[u][m][1], unit, table);
#pragma unroll
                for (int n = 0; n < NT; n++) {
#if STEPS_PER_GROUP
                    float(&to)[4] = part[m][n];
#else
                    float(&to)[4] = sums.all[m][n];
#endif
                    multiply(to, top[0], bottom[0], top[1], bottom[1], b[n].x, b[n].y);
                    multiply(to, top[2], bottom[2], top[3], bottom[3], b[n].z, b[n].w);
                }
            }
        }
#if STEPS_PER_GROUP
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float value = part[m][n][e];
                    if (ZERO) value -= held.zero[u][m][e >> 1] * total[n][e];
                    sums.all[m][n][e] += held.scale[u][m][e >> 1] * value;
                }
#endif
    }
}

DEVICE void store(const Params &p, int row, int out, float value) {
    if (p.bias) value += widen(p.bias[out]);
    p.y[(long long)row * p.outs + out] = (u16)round_pair(value, value);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) stream(const Params p) {
    extern __shared__ uint4 shared[];
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, wo = warp % WO, wk = warp / WO;
    int block_out = blockIdx.x * OUTS, first_out = block_out + wo * 16 * MT;
    int first_row = blockIdx.z * ROWS, rows = min(p.rows - first_row, ROWS);
    int begin = blockIdx.y * p.split_steps, end = min(begin + p.split_steps, p.columns / STEP);
    int stages = (end - begin + STAGE - 1) / STAGE;
    const u32 *table = (const u32 *)shared + lane;
    uint4 *xs[2] = {shared + TABLE, shared + TABLE + STAGE * UNITS * 4 * rows};

    Held first, second;
    load_held(first, p, begin + wk * DEPTH, end, first_out, lane);
    if (CODEBOOK)
#pragma unroll 1
        for (int i = tid; i < TABLE; i += THREADS) {
            u32 pair = p.table[i >> 3 & 15] | (u32)p.table[i >> 7] << 16;
            shared[i] = make_uint4(pair, pair, pair, pair);
        }
    stage_x(xs[0], p, begin, end, first_row, rows, tid);
    __syncthreads();

    Sums sums = {};
    auto stage = [&](Held &now, Held &next, int s) {
        int at = begin + s * STAGE;
        load_held(next, p, at + STAGE + wk * DEPTH, end, first_out, lane);
        compute(sums, now, xs[s & 1], table, min(STAGE, end - at), wk * DEPTH, rows, lane);
        if (s + 1 < stages) stage_x(xs[(s + 1) & 1], p, at + STAGE, end, first_row, rows, tid);
        __syncthreads();
    };
#pragma unroll 1
    for (int s = 0; s < stages; s += 2) {
        stage(first, second, s);
        if (s + 1 < stages) stage(second, first, s + 1);
    }

#if !STEPS_PER_GROUP
    for (int m = 0; m < MT; m++)
        for (int h = 0; h < 2; h++) {
            float scale = load_scale(p.scales, min(first_out + m * 16 + h * 8 + (lane >> 2), p.outs - 1), 0);
            for (int n = 0; n < NT; n++) sums.all[m][n][2 * h] *= scale, sums.all[m][n][2 * h + 1] *= scale;
        }
#endif

    // The warps along columns add up in turn: [row][out].
    float *block = (float *)shared;
#pragma unroll 1
    for (int turn = 0; turn < WK; turn++) {
        if (wk == turn)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int row = n * 8 + (lane & 3) * 2 + (e & 1), out = (wo * MT + m) * 16 + (e >> 1) * 8 + (lane >> 2);
                        float *to = block + row * OUTS + out;
                        if (row < rows) *to = turn ? *to + sums.all[m][n][e] : sums.all[m][n][e];
                    }
        __syncthreads();
    }
    int splits = gridDim.y;
#pragma unroll 1
    for (int i = tid; i < rows * OUTS; i += THREADS) {
        int row = first_row + i / OUTS, out = block_out + i % OUTS;
        if (out >= p.outs) continue;
        if (splits == 1) store(p, row, out, block[i]);
        else p.partial[((long long)blockIdx.y * p.rows + row) * p.outs + out] = block[i];
    }
    if (splits == 1) return;

    // The last block to arrive adds the splits, always in the same order.
    __threadfence();
    __syncthreads();
    u32 *ticket = (u32 *)shared, *arrived = p.arrived + blockIdx.z * gridDim.x + blockIdx.x;
    if (tid == 0) *ticket = atomicAdd(arrived, 1u);
    __syncthreads();
    if (*ticket != splits - 1) return;
    __threadfence();
#pragma unroll 1
    for (int i = tid; i < rows * OUTS; i += THREADS) {
        int row = first_row + i / OUTS, out = block_out + i % OUTS;
        if (out >= p.outs) continue;
        float value = 0;
#pragma unroll 4
        for (int k = 0; k < splits; k++) value += load_uncached(p.partial + ((long long)k * p.rows + row) * p.outs + out);
        store(p, row, out, value);
    }
    if (tid == 0) *arrived = 0;
}
