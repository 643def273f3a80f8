// How many.cu makes operands: a lane's place in the tile, the scales of its two rows, and its codes.

// What a lane knows of its place, and of the scales of its two rows: lane t of four holds those of slot t of a round.
struct Lane {
    int lane, out[2];        // rows of W, within bounds
    int codes;               // where the first one's lie among a stage's codes
    u32 byte, unit;          // which of a word is its own (for `permute`); which of a row's units of 16 bytes lies first
    u32 second;              // BITS 2: as `byte`, of a word's other eight columns
    u32 mask;                // of its two codes among the bytes that `permute` gives
    float up[2];             // DIRECT: what makes integers of those, but for 2^-20
    u32 lay;                 // the same for both, but for 2^-6 or what MAGIC adds
    u32 table, own;          // where the table of pairs lies, and how far on its copy
};
struct Round {
    float scale[2], zero[2];
#if SCALE == 3
    u32 code[2];             // of the scales' levels, looked up a round after they were loaded: no warp waits for them
#endif
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
#if SCALE == 3
        long long index = (long long)w.out[h] * p.scales.groups + group;
        round.code[h] = p.scales.codes[index], round.scale[h] = ((const float *)p.scales.scale)[index >> 8];
#else
        round.scale[h] = load_scale(p.scales, w.out[h], group);
#endif
        round.zero[h] = ZERO ? load_zero(p.scales, w.out[h], group) : 0.0f;
    }
}
DEVICE void look_up_scales(Round &round, const Weight &p) {
#if SCALE == 3
#pragma unroll
    for (int h = 0; h < 2; h++) round.scale[h] = p.scales.levels[round.code[h]] * round.scale[h] + *p.scales.offset;
#endif
}
constexpr float RAISED = CODEBOOK || HALF || DIRECT ? 1.0f : 0x1p6f;  // what scales make up for
DEVICE Slot slot_of(const Round &round, const Lane &w, int slot) {
    Slot s;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int from = (w.lane & 28) | (slot & 3);
        s.scale[h] = of_lane(round.scale[h], from);
        if constexpr (DIRECT) {
            float down = s.scale[h] * (-OFFSET * 0x1p-20f);
            s.pair[h] = round_pair(s.scale[h] * w.up[0], s.scale[h] * w.up[1]), s.minus[h] = round_pair(down, down);
            continue;
        }
        if constexpr (!AFTER) s.scale[h] *= RAISED;
        s.pair[h] = round_pair(s.scale[h], s.scale[h]);
        float rest = s.scale[h] - widen(s.pair[h] & 0xFFFF);
        s.rest[h] = SCALE_PAIRS ? 0 : round_pair(rest, rest);
        float zero = (OFFSET + (ZERO ? of_lane(round.zero[h], from) : 0.0f)) / RAISED, magic = HALF ? 1024.0f : 0.0f;
        s.minus[h] = round_pair(-zero - magic * widen(w.lay & 0xFFFF), -zero - magic * widen(w.lay >> 16));
    }
    return s;
}

// What a lane loads of 16 bytes of its two rows; of 8 bits only the words that hold its own.
constexpr int PER_UNIT = 8 / BITS, AHEAD = BITS < 8 ? 1 : BATCH > 1 ? 4 : 2;  // times 16 columns in those; loads on their way
struct Codes {
#if BITS == 8
    u32 words[2][2];
#else
    uint4 rows[2];
#endif
};
DEVICE Codes load_codes(const u8 *codes, const Lane &w, int unit) {
    const u8 *at = codes + ((w.unit ^ unit) << 4);
#if BITS == 8
    auto word = [&](int byte) { return *(const u32 *)(at + byte); };
    return {{{word(0), word(8)}, {word(8 * W_ROW), word(8 * W_ROW + 8)}}};
#else
    return {{*(const uint4 *)at, *(const uint4 *)(at + 8 * W_ROW)}};
#endif
}
DEVICE u32 word_of(const Codes &codes, int h, int turn, int eight) {  // that holds those columns
#if BITS == 8
    return codes.words[h][eight];
#else
    const uint4 &row = codes.rows[h];
    int word = BITS == 4 ? 2 * turn + eight : turn;
    return word == 0 ? row.x : word == 1 ? row.y : word == 2 ? row.z : row.w;
#endif
}

// Lane 4 g + t of a warp, which multiplies its rows g and g + 8.
DEVICE Lane lane_of(int lane, int warp, u32 table) {
    Lane w;
    u32 g = lane >> 2, t = lane & 3;
    w.lane = lane, w.unit = g, w.own = lane * 4, w.table = table;
    w.codes = (warp * 16 + g) * W_ROW + (BITS == 8 ? t / 2 * 4 : 0);
    u32 byte = BITS == 8 ? t % 2 * 2 : BITS == 4 ? t : t / 2;  // of the word, that holds the first of the two codes
    u32 shift = BITS == 2 ? t % 2 * 4 : 0, up = BITS == 8 ? 0 : BITS;
    w.byte = CODEBOOK ? (SPACED ? byte << 4 | 0x5504 : byte | 0x4440) : byte * 0x101 + (BITS == 8 ? 0x4140 : 0x4040);
    w.second = w.byte + 0x202;
    w.mask = (((1u << BITS) - 1) << shift) * (1 | 0x10000u << up);
    w.up[0] = bits_float((127 + 113 - shift) << 23), w.up[1] = bits_float((127 + 113 - shift - up) << 23);
    w.lay = HALF ? 0x3C003C00u - (shift << 10) * 0x10001u - (up << 26) : 0x7F007F00u - (shift << 7) * 0x10001u - (up << 23);
    return w;
}

// Columns 2 t and 2 t + 1 of eight. A bfloat16 with nothing but its lowest eight bits is 2^-133 times them, so a code
// that lies among them needs no exponent: one fused product scales two of them and moves them by OFFSET, a power of two,
// exactly but for the last rounding: to 2^-20 of it all, which `finish` takes back. Where that product has no room for
// scales, zero points or float16 an exact one comes first: of bfloat16 to 2^-6 of the integers, which scales make up for;
// of float16 from under an exponent.
DEVICE u32 operand(u32 word, int eight, const Slot &s, int h, const Lane &w) {
    u32 selector = BITS == 2 && eight ? w.second : w.byte, pair;
    if constexpr (CODEBOOK) {
        u32 byte = permute(word, SPACED ? w.own : 0, selector);
        pair = load_shared(w.table + (SPACED ? byte : byte * 128 + w.own));
    } else {
        u32 bits = permute(word, BITS == 8 && HALF ? MAGIC >> 8 & 0xFF : 0, selector);
        if constexpr (BITS != 8) bits = HALF ? under_exponent(bits, w.mask, MAGIC) : bits & w.mask;
        if constexpr (DIRECT) return multiply_add(bits, s.pair[h], s.minus[h]);
        pair = multiply_add(bits, w.lay, s.minus[h]);
    }
    if constexpr (LATE || AFTER) return pair;
    else if constexpr (SCALE_PAIRS) return scale_by(pair, s.pair[h]);
    else return multiply_add(pair, s.pair[h], scale_by(pair, s.rest[h]));  // the rest's rounding is far below the sum's
}

// The operands of 16 columns, the `turn`-th of those that were loaded, for a product.
DEVICE void decode_step(u32 (&a)[4], const Codes &codes, int turn, const Slot &s, const Lane &w) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = operand(word_of(codes, i % 2, turn, i / 2), i / 2, s, i % 2, w);
}
