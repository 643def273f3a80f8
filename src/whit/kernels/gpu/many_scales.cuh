// How many.cu scales codes of groups: each lane loads the scales of its two rows, four slots ahead.

struct Round {
    float scale[2], zero[2];
};
struct Loaded {  // a round as it lies in memory: what waits for a load waits until its turn has come
    u32 scale[2];
    float zero[2];
#if SCALE == 3
    u32 code[2];
#endif
};
struct Slot {
    float scale[2];
    u32 pair[2], rest[2], minus[2];  // as operands; scale = pair + rest where it is no operand itself
};
DEVICE void load_round(Loaded &round, const Weight &p, const Lane &w, int slot) {
    int group = GROUP ? min((slot + (w.lane & 3)) * SLOT / (GROUP ? GROUP : 1), p.scales.groups - 1) : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        long long index = (long long)w.out[h] * p.scales.groups + group;
#if SCALE == 3
        round.code[h] = p.scales.codes[index], round.scale[h] = ((const u32 *)p.scales.scale)[index >> 8];
#elif SCALE == 2
        round.scale[h] = ((const u32 *)p.scales.scale)[index];
#else
        round.scale[h] = ((const u16 *)p.scales.scale)[index];
#endif
        round.zero[h] = ZERO ? load_zero(p.scales, w.out[h], group) : 0.0f;
    }
}
DEVICE Round round_of(const Loaded &loaded, const Weight &p) {
    Round round;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 bits = loaded.scale[h];
#if SCALE == 3
        round.scale[h] = p.scales.levels[loaded.code[h]] * bits_float(bits) + *p.scales.offset;
#else
        round.scale[h] = SCALE == 2 ? bits_float(bits) : SCALE == 0 ? bits_float(bits << 16) : widen_f16(bits);
#endif
        round.zero[h] = loaded.zero[h];
    }
    return round;
}
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

// The scales of a tile's steps, and the next ones on their way.
struct Scaling {
    Round now;
    Loaded next;
    int first;  // slot of the block's first step
};
DEVICE void begin_scales(Scaling &r, const Weight &p, const Block &b, const Lane &w) {
    r.first = b.begin * SLOTS;
    load_round(r.next, p, w, r.first);
}
DEVICE void turn_scales(Scaling &r, const Weight &p, const Lane &w, int slot) {  // of the block's columns
    if (slot % 4) return;
    r.now = round_of(r.next, p);
    load_round(r.next, p, w, r.first + slot + 4);
}
// Those of a step's slot.
DEVICE Slot take_slot(Scaling &r, const Weight &p, const Block &, const Lane &w, int, int step, int slot) {
    turn_scales(r, p, w, step * SLOTS + slot);
    return slot_of(r.now, w, step * SLOTS + slot);
}
DEVICE u32 scaled(u32 pair, const Slot &s, int h) {
    if constexpr (SCALE_PAIRS) return scale_by(pair, s.pair[h]);
    else return multiply_add(pair, s.pair[h], scale_by(pair, s.rest[h]));  // the rest's rounding is far below the sum's
}
