// How many.cu makes operands: a lane's place in the tile, the scales of its two rows, and its codes.

// What a lane knows of its place, and of the scales of its two rows: lane t of four holds those of slot t of a round.
struct Lane {
    int lane, out[2];        // rows of W, within bounds
    int codes;               // where the first one's lie among a stage's codes
    u32 byte, unit;          // which of a word is its own (for `permute`); which of a row's units of 16 bytes lies first
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
DEVICE Slot slot_of(const Round &round, const Lane &w, int slot) {
    Slot s;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int from = (w.lane & 28) | (slot & 3);
        s.scale[h] = of_lane(round.scale[h], from), s.pair[h] = round_pair(s.scale[h], s.scale[h]);
        if constexpr (DIRECT) {
            float down = s.scale[h] * (-OFFSET * 0x1p-20f);
            s.pair[h] = round_pair(s.scale[h] * 0x1p113f, s.scale[h] * 0x1p109f), s.minus[h] = round_pair(down, down);
            continue;
        }
        float rest = s.scale[h] - widen(s.pair[h] & 0xFFFF);
        s.rest[h] = SCALE_PAIRS ? 0 : round_pair(rest, rest);
        float zero = OFFSET + (ZERO ? of_lane(round.zero[h], from) : 0.0f);
        s.minus[h] = round_pair(-(HALF ? 1024.0f : 128.0f) - zero, -(HALF ? 128.0f : 16.0f) - zero);
    }
    return s;
}

// What a lane loads of 32 columns of its two rows.
struct Codes {
    uint4 top, bottom;
};
DEVICE Codes load_codes(const u8 *codes, const Lane &w, int unit) {
    const u8 *at = codes + ((w.unit ^ unit) << 4);
    return {*(const uint4 *)at, *(const uint4 *)(at + 8 * W_ROW)};
}

// Columns 2 t and 2 t + 1 of a word's eight. A bfloat16 with nothing but its lowest eight bits is 2^-133 times them: a
// code in the lower four is 2^-133 of itself, in the upper four 2^-129, and one fused product scales both and moves them
// by OFFSET, a power of two, exactly but for the last rounding: to 2^-20 of it all, which `finish` takes back. Otherwise
// the byte gets under an exponent, its upper code three bits higher than the lower one, as eight times itself: a product
// lays both where they belong, and what takes off the exponent divides too.
DEVICE u32 operand(u32 word, const Slot &s, int h, const Lane &w) {
    u32 byte = permute(word, SPACED ? w.own : 0, w.byte), pair;
    if constexpr (DIRECT) return multiply_add(byte & 0x00F0000Fu, s.pair[h], s.minus[h]);
    else if constexpr (CODEBOOK) pair = load_shared(w.table + (SPACED ? byte : byte * 128 + w.own));
    else pair = multiply_add(under_exponent(byte * 0x8001u, 0x0078000F, MAGIC), HALF ? 0x30003C00u : 0x3E003F80u, s.minus[h]);
    if constexpr (LATE) return pair;
    else if constexpr (SCALE_PAIRS) return scale_by(pair, s.pair[h]);
    else return multiply_add(pair, s.pair[h], scale_by(pair, s.rest[h]));  // the rest's rounding is far below the sum's
}

// The operands of 16 columns, the first or the second of those that were loaded, for a product.
DEVICE void decode_step(u32 (&a)[4], const Codes &codes, int second, const Slot &s, const Lane &w) {
    const uint4 &top = codes.top, &bottom = codes.bottom;
    a[0] = operand(second ? top.z : top.x, s, 0, w), a[1] = operand(second ? bottom.z : bottom.x, s, 1, w);
    a[2] = operand(second ? top.w : top.y, s, 0, w), a[3] = operand(second ? bottom.w : bottom.y, s, 1, w);
}
