// How many.cu makes operands: a lane's place in the tile, the scales of its two rows, and its codes.

// What a lane knows of its place, and of the scales of its two rows: lane t of four holds those of slot t of a round.
struct Lane {
    int lane, out[2];        // rows of W, within bounds
    int codes;               // where the first one's lie among a stage's codes
    u32 byte, unit;          // which of a word is its own (for `permute`); which of a row's units of 16 bytes lies first
    u32 second, down;        // BITS 2: as `byte`, of a word's other eight columns; odd: by how much it is shifted
    u32 mask;                // of its two codes among the bytes that `permute` gives
    float up[2];             // DIRECT: what makes integers of those, but for 2^-20
    u32 lay;                 // the same for both, but for 2^-6 or what MAGIC adds
    float after[2];          // AFTER: those rows' scales
    u32 table, own;          // where the table of pairs lies, and how far on its copy
    int row;                 // the first one's, in the tile
    u32 minus;               // RUN: what is taken off all codes
};
struct Sums {
    float all[NT][4];
#if LATE
    float part[NT][4];       // of 64 columns, without their scales
#endif
};

constexpr float RAISED = CODEBOOK || HALF || DIRECT ? 1.0f : 0x1p6f;  // what scales make up for
#if RUN
#include "many_runs.cuh"
#else
#include "many_scales.cuh"
#endif

// What a lane loads at a time of its two rows: 16 bytes; of 8 bits only the words of 32 bytes that hold its own codes.
// Rows of odd numbers of bits, and of 6, lie 80 or 96 bytes apart, unpermuted: 20 or 24 bytes, as few words at a time as
// all lanes get without waiting for each other.
constexpr int PER_UNIT = BITS == 5 || BITS == 8 ? 2 : DENSE ? 8 / BITS : 12 / BITS;  // times 16 columns in those
constexpr int AHEAD = BITS == 8 && BATCH > 1 ? 2 : 1;                            // loads on their way
constexpr int ROW_WORDS = DENSE ? 4 : PER_UNIT * BITS / 2;                       // of those that are loaded of a row
struct Codes {
    u32 words[2][ROW_WORDS];
};
DEVICE Codes load_codes(const u8 *codes, const Lane &w, int unit) {
    Codes to;
    const u8 *at = codes + (DENSE ? (w.unit ^ unit) << 4 : unit * ROW_WORDS * 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u8 *row = at + h * 8 * W_ROW;
        if constexpr (BITS == 8) {
#pragma unroll
            for (int i = 0; i < 4; i++) to.words[h][i] = *(const u32 *)(codes + ((w.unit ^ (2 * unit + i / 2)) << 4) + h * 8 * W_ROW + i % 2 * 8);
        } else if constexpr (DENSE) {
            uint4 v = *(const uint4 *)row;
            to.words[h][0] = v.x, to.words[h][1] = v.y, to.words[h][2] = v.z, to.words[h][3] = v.w;
        } else if constexpr (BITS == 5) {
#pragma unroll
            for (int i = 0; i < ROW_WORDS; i++) to.words[h][i] = *(const u32 *)(row + 4 * i);
        } else {
#pragma unroll
            for (int i = 0; i < ROW_WORDS; i += 2) {
                uint2 v = *(const uint2 *)(row + 4 * i);
                to.words[h][i] = v.x, to.words[h][i + 1] = v.y;
            }
        }
    }
    return to;
}

// Where the two codes of a lane (its number among four: t) lie after `placed`: bits from the lowest of each half.
struct Bits {
    u32 low, high;
};
DEVICE Bits bits_of(u32 t) {
    if (!DENSE) return {8 - BITS, 0};
    if (BITS == 2) return {t % 2 * 4, t % 2 * 4 + 2};
    return {0, BITS % 8};
}

// Lane 4 g + t of a warp, which multiplies its rows g and g + 8.
DEVICE Lane lane_of(int lane, int warp, u32 table) {
    constexpr u32 ONES_OF = (1u << BITS) - 1;
    Lane w;
    u32 g = lane >> 2, t = lane & 3, second = (2 * t + 1) * BITS;
    Bits at = bits_of(t);
    w.lane = lane, w.unit = g, w.own = lane * 4, w.table = table;
    w.codes = (warp * 16 + g) * W_ROW + (BITS == 8 ? t / 2 * 4 : 0);
    u32 byte = BITS == 8 ? t % 2 * 2 : BITS == 4 ? t : t / 2;  // of the word, that holds the first of the two codes
    if (!DENSE) w.byte = (second < 8 ? 0 : second / 8 - 1) | second / 8 * 0x110 | (second / 8 + 1) << 12;
    else if (CODEBOOK) w.byte = SPACED ? byte << 4 | 0x5504 : byte | 0x4440;
    else w.byte = byte * 0x101 + (BITS == 8 ? 0x4140 : 0x4040);
    w.second = w.byte + 0x202, w.down = second % 8;
    w.mask = ONES_OF << at.low | ONES_OF << (16 + at.high);
    w.up[0] = bits_float((127 + 113 - at.low) << 23), w.up[1] = bits_float((127 + 113 - at.high) << 23);
    constexpr u32 ONE = HALF ? 15 : 254, EXPONENT = HALF ? 10 : 7;
    w.lay = (ONE - at.low) << EXPONENT | (ONE - at.high) << (16 + EXPONENT);
    constexpr float MOVED = OFFSET / RAISED, UNDER = HALF ? 1024.0f : 0.0f;
    w.row = warp * 16 + g, w.minus = round_pair(-MOVED - UNDER * widen(w.lay & 0xFFFF), -MOVED - UNDER * widen(w.lay >> 16));
    return w;
}

// The codes of columns 2 t and 2 t + 1 of eight, the `eight`-th of those that were loaded, each in the lowest eight bits
// of a half, beside others. Of odd numbers of bits the second one's byte is the upper one of the low half and the lower
// one of the high half: shifted to where it begins, it begins the high half, and the one before ends the low one's byte.
DEVICE u32 placed(const Codes &codes, int h, int eight, const Lane &w) {
    const u32(&words)[ROW_WORDS] = codes.words[h];
    if constexpr (DENSE) {
        u32 filling = CODEBOOK && SPACED ? w.own : BITS == 8 && HALF ? MAGIC >> 8 & 0xFF : 0;
        int word = BITS == 2 ? eight / 2 : eight;
        return permute(words[word], filling, BITS == 2 && eight % 2 ? w.second : w.byte);
    } else {
        int byte = eight * BITS, next = byte / 4 + 1;
        return permute(words[byte / 4], words[next < ROW_WORDS ? next : byte / 4], w.byte + byte % 4 * 0x1111) >> w.down;
    }
}

// Columns 2 t and 2 t + 1 of eight. A bfloat16 with nothing but its lowest eight bits is 2^-133 times them, so a code
// that lies among them needs no exponent: one fused product scales two of them and moves them by OFFSET, a power of two,
// exactly but for the last rounding: to 2^-20 of it all, which `finish` takes back. Where that product has no room for
// scales, zero points or float16 an exact one comes first: of bfloat16 to 2^-6 of the integers, which scales make up for;
// of float16 from under an exponent.
DEVICE u32 operand(u32 bits, const Slot &s, int h, const Lane &w) {
    u32 pair;
    if constexpr (CODEBOOK) {
        pair = load_shared(w.table + (SPACED ? bits : bits * 128 + w.own));
    } else {
        if constexpr (BITS != 8) bits = HALF ? under_exponent(bits, w.mask, MAGIC) : bits & w.mask;
        if constexpr (DIRECT) return multiply_add(bits, s.pair[h], s.minus[h]);
        pair = multiply_add(bits, w.lay, s.minus[h]);
    }
    if constexpr (LATE || AFTER) return pair;
    else return scaled(pair, s, h);
}

// The operands of 16 columns, the `turn`-th of those that were loaded, for a product.
DEVICE void decode_step(u32 (&a)[4], const Codes &codes, int turn, const Slot &s, const Lane &w) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = operand(placed(codes, i % 2, 2 * turn + i / 2, w), s, i % 2, w);
}
