// Packed codes as operands of a matrix product: what the products (stream.cu, tiled.cu) share. The host defines
//   CHUNK              columns of a row that a thread holds at a time; four threads share a row, so a step is 4 CHUNK columns
//   STEPS_PER_GROUP    steps that share a scale; 0: the whole row does
//   WIDE               pairs of levels lie 256 bytes apart, so that one permutation makes their address: where shared memory
//                      begins, 1024 on Hopper (default 0: they lie 128 bytes apart)
//   BEGINS             where shared memory begins, if pairs lie there, 128 bytes apart: then no address is added up (default 0)
//   SPREAD             groups side by side in a step, where STEPS_PER_GROUP is 1 (default 1)
//   BARE             1: codes become operands as bits of a bfloat16, without an exponent (`scale_bare`; default 0)
//   PLACED             1: raw integers may lie some bits higher, and x be divided by as much (default 0)
//
// A sum over columns may run in any order as long as both operands agree: each thread loads whole words of its row and
// takes as neighbours the two codes that lie 16 bits apart, so that a shift and one three-input logical operation make
// two of them (integer bits under the exponent of 128 or 1024). Levels are looked up two at a time by the byte, in a
// table with a copy for each of the 32 banks.

#ifndef WIDE
#define WIDE 0
#endif
#ifndef PLACED
#define PLACED 0
#endif
#ifndef SPREAD
#define SPREAD 1
#endif
#ifndef BARE
#define BARE 0
#endif
#ifndef BEGINS
#define BEGINS 0
#endif
constexpr int STEP = 4 * CHUNK;                  // columns
constexpr int WORDS = CHUNK * BITS / 32;         // that a thread holds of one row of W per step
constexpr int UNITS = CHUNK / 8;                 // eight columns: the operands of two mma
constexpr bool DENSE = 32 % BITS == 0;       // codes lie whole in a word
constexpr int PERIOD = DENSE ? 32 / BITS : 32;  // codes after which the pattern repeats
constexpr bool NATURAL = CODEBOOK || BITS == 8; // neighbours in an operand are neighbours in memory
constexpr u32 MAGIC = BARE ? 0 : HALF ? 0x64006400u : 0x43004300u;  // 1024, 128: integers to 7 bits are its lowest bits
constexpr u32 ONES = HALF ? 0x3C003C00u : 0x3F803F80u;
constexpr int TABLE = CODEBOOK ? (WIDE ? 512 : 256) * 32 / 4 : 0;  // of uint4

// By how much a code of a period is shifted to the right, and where it lies then: codes share a shift while they stay in
// the seven bits below bfloat16's exponent, or in eight where they have none.
typedef unsigned long long u64_codes;  // four bits for each code of a period
DEVICE constexpr u64_codes all_shifts() {
    u64_codes all = 0;
    for (int i = 0, shift = 0; i < (DENSE ? PERIOD / 2 : 16); i++) {
        int bit = BITS * i & 15;
        if (bit < BITS) shift = 0;  // the first that begins in its half word
        if (!PLACED || bit - shift + BITS > (BARE ? 8 : 7)) shift = bit;
        all |= (u64_codes)shift << 4 * i;
    }
    return all;
}
DEVICE constexpr u64_codes all_places() {
    u64_codes all = 0;
    for (int i = 0; i < (DENSE ? PERIOD / 2 : 16); i++) all |= ((BITS * i & 15) - (all_shifts() >> 4 * i & 15)) << 4 * i;
    return all;
}
constexpr u64_codes SHIFTS = all_shifts(), PLACES = all_places();
DEVICE constexpr int shift_of(int code) { return (int)(SHIFTS >> 4 * code) & 15; }
DEVICE constexpr int place_of(int code) { return (int)(PLACES >> 4 * code) & 15; }
DEVICE u32 place_at(u32 unit, u32 i) {  // of a code of a unit
    constexpr u32 UNITS_PER_PERIOD = NATURAL ? 1 : PERIOD / 8;
    return PLACED ? place_of(unit % UNITS_PER_PERIOD * 4 + i) : 0;
}

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

// Eight columns of x that lie opposite a thread's unit of W, in the order of the operands; `x`: the thread's chunk.
DEVICE uint4 load_opposite(const u16 *x, u32 unit) {
    constexpr int HALF_PERIOD = NATURAL ? 4 : PERIOD / 2;
    constexpr int UNITS_PER_PERIOD = NATURAL ? 1 : PERIOD / 8;
    x += unit / UNITS_PER_PERIOD * 2 * HALF_PERIOD + unit % UNITS_PER_PERIOD * 4;
    uint2 a = *(const uint2 *)x, b = *(const uint2 *)(x + HALF_PERIOD);
    if (NATURAL) return make_uint4(a.x, a.y, b.x, b.y);
    u32 v[4] = {permute(a.x, b.x, 0x5410), permute(a.x, b.x, 0x7632), permute(a.y, b.y, 0x5410), permute(a.y, b.y, 0x7632)};
#if PLACED
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = scale_by(v[i], (0x3F80u - (place_at(unit, i) << 7)) * 0x10001u);
#endif
    return make_uint4(v[0], v[1], v[2], v[3]);
}

DEVICE constexpr u32 both(u32 v) { return v | v << 16; }
DEVICE constexpr u32 minus_offset() {  // -(1024 + OFFSET) or -(128 + OFFSET), twice
    if (HALF) {  // 1024 .. 2047 has steps of 1
        return both(0xE400u + OFFSET);
    }
    return both(0xC300u + OFFSET);  // 128 .. 255 has steps of 1
}

// Where a codebook's pairs lie in shared memory, and the copy that a lane reads.
struct Table {
    const u8 *pairs;
    u32 lane;  // times 4
};
DEVICE u32 look_up(const Table &table, u32 word, int byte) {
#if WIDE
    return shared_word(permute(word, table.lane, 0x5504 | byte << 4) + WIDE);
#elif BEGINS
    return shared_word(under_exponent(byte == 0 ? word << 7 : word >> (8 * byte - 7), 0x7F80, table.lane) + BEGINS);
#else
    return *(const u32 *)(table.pairs + under_exponent(byte == 0 ? word << 7 : word >> (8 * byte - 7), 0x7F80, table.lane));
#endif
}

// The four operands of a unit of one row of W; RAW: integers that still lack minus_offset().
constexpr bool HAS_RAW = !CODEBOOK && BITS < 8;
template <bool RAW = false> DEVICE void decode(u32 (&pairs)[4], const u32 (&words)[WORDS], int unit, const Table &table) {
    constexpr u32 MASK = both((1u << BITS) - 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (CODEBOOK) {
            pairs[i] = look_up(table, words[unit], i);
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
            u32 v = under_exponent(words[word] >> shift_of(code), MASK << place_of(code), MAGIC);
            pairs[i] = RAW ? v : add_pair(v, minus_offset());
        } else {  // 32 codes in 2 BITS half words; code j + 16 lies BITS half words after code j
            int bit = BITS * (unit % 4 * 4 + i), at = bit >> 4, shift = bit & 15, period = unit / 4 * BITS;
            auto halves = [&](int k) {
                u32 selector = (k & 1 ? 0x0032 : 0x0010) | ((k + BITS) & 1 ? 0x7600 : 0x5400);
                return permute(words[period + (k >> 1)], words[period + ((k + BITS) >> 1)], selector);
            };
            u32 here = shift + BITS <= 16 ? MASK : both((1u << (16 - shift)) - 1);
            int by = shift_of(unit % 4 * 4 + i), place = shift - by;
            u32 v = under_exponent(halves(at) >> by, here << place, MAGIC);
            if (shift + BITS > 16) v = under_exponent(halves(at + 1) << (16 - by), (MASK & ~here) << place, v);
            pairs[i] = RAW ? v : add_pair(v, minus_offset());
        }
    }
}

#if BARE
// A bfloat16 with nothing but its lowest eight bits is 2^-133 times them: one fused product scales a raw code and moves it
// by its offset, a power of two, exactly but for the last rounding, to 2^-20 of it all.
DEVICE void scale_bare(u32 (&pairs)[4], int unit, float scale) {
    float down = scale * (-0x1p-20f * (ZERO ? 0.5f : OFFSET));
    u32 scale_pair = round_pair(scale * 0x1p113f, scale * 0x1p113f), minus = round_pair(down, down);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 place = place_at(unit, i);
        pairs[i] = multiply_add(pairs[i], scale_pair, place ? scale_by(minus, both(0x3F80u + (place << 7))) : minus);
    }
}
#endif
#ifdef SCALE
// Codes that `decode` gave, scaled before they are multiplied and rounded once, as the dequantizing kernel does.
constexpr bool SCALE_PAIRS = SCALE == HALF && ZERO != 2;  // the scale is an operand's type, the zero point exact in it
DEVICE void scale_pairs(u32 (&pairs)[4], float scale, float zero) {
    u32 scale_pair = round_pair(scale, scale), zero_pair = round_pair(-zero, -zero);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (SCALE_PAIRS) {
            if (ZERO) pairs[i] = add_pair(pairs[i], zero_pair);
            pairs[i] = scale_by(pairs[i], scale_pair);
        } else {
            if (!ZERO) zero = 0;
            pairs[i] = round_pair((widen(pairs[i] & 0xFFFF) - zero) * scale, (widen(pairs[i] >> 16) - zero) * scale);
        }
    }
}
#endif

// Every thread writes its part of the table of pairs; `levels`: 16 operands.
DEVICE void fill_table(uint4 *table, const u16 *levels, u32 threads) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 256 * 8; i += threads) {
        u32 pair = levels[i >> 3 & 15] | (u32)levels[i >> 7] << 16;
        table[WIDE ? i + (i & ~7) : i] = make_uint4(pair, pair, pair, pair);
    }
}
// The same where x waits for it: each lane reads one level, once, and no pair waits for memory.
[[maybe_unused]] DEVICE void lay_table(uint4 *table, const u16 *levels, u32 threads) {
    u32 level = levels[threadIdx.x & 15];
#pragma unroll 4
    for (int i = threadIdx.x; i < 256 * 8; i += threads) {
        u32 pair = word_of(level, i >> 3 & 15) | word_of(level, i >> 7) << 16;
        table[WIDE ? i + (i & ~7) : i] = make_uint4(pair, pair, pair, pair);
    }
}
