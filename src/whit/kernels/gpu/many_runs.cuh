// How many.cu scales codes of ggml's types, whose runs of columns have scales, and minima, of their own. The host defines
//   RUN, SUBS          columns of a run (16, or a multiple of 32); runs of a superblock, 0: there are none
//   INTEGER, BIAS      bits of a run's integers, and what was added to those of d
//   NUMBER             what d is: 1 float16, 4: a byte, the power of two that is twice d
//   LESS               0 no minimum, 1: m, a number of the run, is added, 2: dmin times an integer is taken off
//
// Three warps make operands of the scales of a step, for its rows and runs, into the stage in which its codes arrive: so
// they are made once, not by every lane that has codes of the row, and beside the products, not between them. The warps
// take turns at 32 rows each. A scale is two operands, `pair` + `rest`; of a minimum a whole number of scales is taken off
// the codes (`minus`), and `off` is what is left: a weight is rounded once.

constexpr int MAKERS = 3;                                            // warps
constexpr int SHARED_BY = SUBS ? SUBS * RUN : RUN;                   // columns that have one d
constexpr int NUMBERS = BK > SHARED_BY ? BK / SHARED_BY : 1, NUMBER_SIZE = NUMBER == 4 ? 1 : 2;  // of a step and a row
constexpr int NUMBER_WORDS = (NUMBERS * NUMBER_SIZE + 3) / 4;
constexpr int INTEGER_BYTES = SUBS ? SLOTS * INTEGER / 8 : 0, INTEGER_WORDS = SUBS ? (INTEGER_BYTES + 3) / 4 : 1;

struct Raw {  // the fields of a row and a step, as they lie
    u32 d[NUMBER_WORDS], less[NUMBER_WORDS], scales[INTEGER_WORDS], mins[INTEGER_WORDS];
};
// As many bytes, which lie at a multiple of the largest power of two in their number.
template <int BYTES> DEVICE void load_field(u32 *to, const u8 *from) {
    if constexpr (BYTES % 8 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 8; i++) {
            uint2 v = ((const uint2 *)from)[i];
            to[2 * i] = v.x, to[2 * i + 1] = v.y;
        }
    } else if constexpr (BYTES % 4 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 4; i++) to[i] = ((const u32 *)from)[i];
    } else if constexpr (BYTES % 2 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 2; i++) to[i / 2] = (i % 2 ? to[i / 2] : 0) | (u32)((const u16 *)from)[i] << i % 2 * 16;
    } else {
#pragma unroll
        for (int i = 0; i < BYTES; i++) to[i / 4] = (i % 4 ? to[i / 4] : 0) | (u32)from[i] << i % 4 * 8;
    }
}
DEVICE void load_raw(Raw &raw, const Weight &p, int out, int step) {
    const Scales &s = p.scales;
    int first = step * BK / SHARED_BY * NUMBER_SIZE;
    load_field<NUMBERS * NUMBER_SIZE>(raw.d, s.field[0] + (long long)out * s.pitch[0] + first);
    if constexpr (LESS != 0) load_field<NUMBERS * NUMBER_SIZE>(raw.less, s.field[1] + (long long)out * s.pitch[1] + first);
    if constexpr (SUBS != 0) load_field<INTEGER_BYTES>(raw.scales, s.field[2] + (long long)out * s.pitch[2] + step * INTEGER_BYTES);
    if constexpr (LESS == 2) load_field<INTEGER_BYTES>(raw.mins, s.field[3] + (long long)out * s.pitch[3] + step * INTEGER_BYTES);
}

// What is ahead in the second cache is there when its load comes.
DEVICE void prefetch_stretch(const u8 *from, int bytes) {
#pragma unroll 1
    for (int i = 0; i < bytes; i += 128) prefetch(from + i);
    prefetch(from + bytes - 1);
}
DEVICE void prefetch_fields(const Params &p, const Block &b, int index, int maker) {
    if (index >= b.tiles) return;
    Tile tile = tile_of(p, b, index);
    const Weight &part = p.part[tile.part];
#pragma unroll 1
    for (int row = maker; row < BM; row += 32 * MAKERS) {
        long long out = min(tile.out + row, part.outs - 1);
#pragma unroll
        for (int f = 0; f < 4; f++) {
            const u8 *from = part.scales.field[f] + out * part.scales.pitch[f];
            int before = f < 2 ? b.begin * BK / SHARED_BY * NUMBER_SIZE : b.begin * INTEGER_BYTES;
            int bytes = f < 2 ? b.steps * BK / SHARED_BY * NUMBER_SIZE : b.steps * INTEGER_BYTES;
            if (f == 0 || (f == 1 ? LESS != 0 : f == 2 ? SUBS != 0 : LESS == 2)) prefetch_stretch(from + before, bytes);
        }
    }
}

DEVICE float number_at(const u32 (&words)[NUMBER_WORDS], int i) {
    u32 v = words[i * NUMBER_SIZE / 4] >> i * NUMBER_SIZE % 4 * 8;
    if constexpr (NUMBER == 4) return bits_float((v & 0xFF) < 2 ? 0x00200000u << (v & 0xFF) : ((v & 0xFF) - 1) << 23);
    return widen_f16(v & 0xFFFF);
}
DEVICE float integer_at(const u32 (&words)[INTEGER_WORDS], int i, float bias) {
    int bit = i * INTEGER, at = bit / 32, shift = bit % 32;
    u32 v;
    if constexpr (INTEGER == 8) {
        v = permute(words[at], 0x4B000000u, 0x7440 | shift / 8);
    } else {
        v = words[at] >> shift;
        if (shift + INTEGER > 32) v |= words[at + 1 < INTEGER_WORDS ? at + 1 : at] << (32 - shift);
        v = under_exponent(v, (1u << INTEGER) - 1, 0x4B000000u);
    }
    return bits_float(v) - (8388608.0f + bias);
}

// Minus the nearest whole number of scales to `less`, and what is left of it, both 1 / RAISED times as large as the
// levels: there nothing is rounded, and what is left is at most half a scale.
constexpr float MOST_ZERO = 64 / RAISED, WHOLE = 12582912.0f / RAISED;  // below 256 integers are exact; floats from there on are whole
DEVICE u32 apart(float raised, float less) {
    float zero = fmaxf(fminf(less * near_inverse(raised), MOST_ZERO), -MOST_ZERO);  // also where the scale is 0
    zero = zero + WHOLE - WHOLE;
    return round_pair(-zero, zero * raised - less);
}

// The factors of a row's runs of a step, the first ones at `to`.
DEVICE void make_row(u8 *to, const Raw &raw) {
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
        float raised = number_at(raw.d, i * SLOT / SHARED_BY) * RAISED, less = LESS ? number_at(raw.less, i * SLOT / SHARED_BY) : 0;
        if (SUBS) raised = multiplied(raised, integer_at(raw.scales, i, BIAS));
        if (LESS == 1) less = -less;
        if (LESS == 2) less = multiplied(less, integer_at(raw.mins, i, 0));
        u32 factor = round_pair(raised, raised - widen(round_pair(raised, 0) & 0xFFFF));
        u8 *at = to + i * BM * FACTORS;
        if constexpr (LESS == 0) *(u32 *)at = factor;
        else *(uint2 *)at = make_uint2(factor, apart(raised, less));
    }
}
DEVICE void make(const Params &p, const Block &b, int maker, int lane) {
    int tiles = b.first < b.tiles ? (b.tiles - 1 - b.first) / b.stride + 1 : 0, all = tiles * b.steps * PARTS_MADE, at = 0;
    Walk walk = {tile_of(p, b, b.first), b.first, 0};
    auto load = [&](Raw &raw, int i) {
        for (; at < i / PARTS_MADE; at++) {
            go_on(walk, p, b);
            if (walk.step == 0) prefetch_fields(p, b, walk.index + b.stride, maker * 32 + lane);
        }
        const Weight &part = p.part[walk.tile.part];
        load_raw(raw, part, min(walk.tile.out + i % PARTS_MADE * 32 + lane, part.outs - 1), b.begin + walk.step);
    };
    Raw next;
    if (maker < all) load(next, maker);
    if (all) prefetch_fields(p, b, b.first, maker * 32 + lane), prefetch_fields(p, b, b.first + b.stride, maker * 32 + lane);
#pragma unroll 1
    for (int i = maker; i < all; i += MAKERS) {
        int step = i / PARTS_MADE, slot = step % STAGES;
        Raw raw = next;
        if (i + MAKERS < all) load(next, i + MAKERS);
        if (step >= STAGES) await(b.spent + slot, step / STAGES - 1 & 1);
        make_row(b.made + slot * MADE + (i % PARTS_MADE * 32 + lane) * FACTORS, raw);
        __syncwarp();
        if (lane == 0) arrive(b.full + slot);
    }
}

// A lane's two rows in a run, as operands; and the next run's factors, on their way.
struct Slot {
    float scale[2];
    u32 pair[2], rest[2], minus[2], off[2];
};
struct Scaling {
    u32 factor[2], less[2];
};
DEVICE void begin_scales(Scaling &, const Weight &, const Block &, const Lane &) {}
DEVICE void ask_slot(Scaling &r, const Block &b, const Lane &w, int stage, int slot) {
    const u8 *at = b.made + stage * MADE + (slot * BM + w.row) * FACTORS;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if constexpr (LESS == 0) {
            r.factor[h] = *(const u32 *)(at + h * 8 * FACTORS);
        } else {
            uint2 v = *(const uint2 *)(at + h * 8 * FACTORS);
            r.factor[h] = v.x, r.less[h] = v.y;
        }
    }
}
DEVICE void hold_slot(Scaling &r) {  // in registers
#pragma unroll
    for (int h = 0; h < 2; h++) {
        r.factor[h] = kept(r.factor[h]);
        if (LESS) r.less[h] = kept(r.less[h]);
    }
}
DEVICE Slot take_slot(Scaling &r, const Weight &, const Block &b, const Lane &w, int stage, int, int slot) {
    Slot s;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        s.pair[h] = both_low(r.factor[h]), s.rest[h] = both_high(r.factor[h]);
        s.minus[h] = LESS ? both_low(r.less[h]) : w.minus;
        if (LESS && HALF) s.minus[h] = add_pair(s.minus[h], w.minus);
        if (LESS) s.off[h] = both_high(r.less[h]);
    }
    if (slot + 1 < SLOTS) ask_slot(r, b, w, stage, slot + 1);
    return s;
}
DEVICE u32 scaled(u32 pair, const Slot &s, int h) {
    return multiply_add(pair, s.pair[h], LESS ? multiply_add(pair, s.rest[h], s.off[h]) : scale_by(pair, s.rest[h]));
}
