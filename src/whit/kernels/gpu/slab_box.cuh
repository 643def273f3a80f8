// The products of a box, as slab.cu takes them: scales, x and codes as operands of mma.sync, and the sums.

struct Levels {  // of scales
    const float *values;
    float offset;
};
DEVICE float scale_at(const u8 *box, int row, int step, const Levels &levels) {
    const u8 *at = box + row * SCALE_ROW + step * SCALE_BYTES;
    if constexpr (SCALE == 3) return levels.values[*at] * *(const float *)(box + OUTS * SCALE_ROW + row * 4) + levels.offset;
    else if constexpr (SCALE == 2) return *(const float *)at;
    else if constexpr (SCALE == 1) return widen_f16(*(const u16 *)at);
    else return bits_float((u32)*(const u16 *)at << 16);
}

// Columns of a step that a thread holds lie in pieces of 16, of four threads side by side, so that lanes which read x
// together find theirs in all banks; those of 3 bits in one, as 32 of their codes belong together.
constexpr int PIECE = DENSE ? min_of(CHUNK, 16) : CHUNK, PIECE_WORDS = PIECE * BITS / 32;
DEVICE constexpr int piece_at(int unit) { return 8 * unit / PIECE * 4 * PIECE; }  // columns

// Codes that one operation takes, a pair, begin at the same bit of two half words: of 2, 3 and 4 bits 8, 16 and 4 columns
// apart. `pair` counts them along a thread's words until they repeat; 8 bits are neighbours.
constexpr int PAIRS = BITS == 8 ? 4 : PERIOD / 2;
DEVICE constexpr int bit_of(int pair) { return BITS == 8 ? 0 : BITS * pair & 15; }
DEVICE constexpr int lies_at(int pair) {  // where it stays: whole in the lower byte
    if (HALF || BITS == 8 || bit_of(pair) + BITS > 16) return 0;
    return DENSE ? bit_of(pair) & 7 : bit_of(pair) + BITS <= 8 ? bit_of(pair) : bit_of(pair) - (bit_of(pair) + BITS <= 14 ? 6 : 8);
}
DEVICE constexpr u32 minus_of(int pair) { return both(ZERO ? 1u << lies_at(pair) : 0x8000u | OFFSET << lies_at(pair)); }
DEVICE constexpr u32 larger_by(int pair) { return both(0x5F80u - (lies_at(pair) << 7)); }  // 2^64 / 2^lies_at in bfloat16
DEVICE constexpr int first_pair(int unit) { return 4 * unit % PAIRS; }

// x of a step for a lane, in the order of the operands, and the sums by column that products of codes begin from: with
// zero points, so many times less.
struct Operand {
    uint4 x[UNITS][RT];
    float from[RT][2];
};
DEVICE const u8 *x_at(const u8 *x, int step, int unit, int eight, int lane) {  // eight columns of one row
    int row = lane >> 2, column = step * STEP + (lane & 3) * PIECE, ahead = piece_at(unit) + 8 * unit % PIECE;
    return x + ((column >> 6) + (ahead >> 6)) * X_BOX + (8 * eight + row) * 128 + (((column & 63) / 8 ^ row ^ (ahead & 63) / 8) << 4);
}
DEVICE uint4 arranged(const uint4 (&v)[UNITS], int unit) {
    uint4 a = v[unit];
    if constexpr (PAIRS == 4 && BITS < 8) {
        a = make_uint4(permute(a.x, a.z, 0x5410), permute(a.x, a.z, 0x7632), permute(a.y, a.w, 0x5410), permute(a.y, a.w, 0x7632));
    } else if constexpr (BITS < 8) {
        constexpr int APART = PAIRS / 8;  // units
        int low = unit / (2 * APART) * 2 * APART + unit % (2 * APART) / 2;
        const uint4 &c = v[low], &d = v[low + APART];
        u32 c0 = unit % 2 ? c.z : c.x, c1 = unit % 2 ? c.w : c.y, d0 = unit % 2 ? d.z : d.x, d1 = unit % 2 ? d.w : d.y;
        a = make_uint4(permute(c0, d0, 0x5410), permute(c0, d0, 0x7632), permute(c1, d1, 0x5410), permute(c1, d1, 0x7632));
    }
    if (HALF) return a;
    int i = first_pair(unit);
    return make_uint4(scale_by(a.x, larger_by(i)), scale_by(a.y, larger_by(i + 1)), scale_by(a.z, larger_by(i + 2)), scale_by(a.w, larger_by(i + 3)));
}
DEVICE void add_offsets(float (&sums)[2][4], const uint4 &v, int unit) {
    u32 minus[4];
#pragma unroll
    for (int i = 0; i < 4; i++) minus[i] = minus_of(first_pair(unit) + i);
    multiply(sums[0], minus[0], minus[0], minus[1], minus[1], v.x, v.y);
    multiply(sums[1], minus[2], minus[2], minus[3], minus[3], v.z, v.w);
}
DEVICE void load_x(Operand &o, const u8 *x, int step, int lane) {
#pragma unroll
    for (int n = 0; n < RT; n++) {
        float sums[2][4] = {};
        uint4 v[UNITS];
#pragma unroll
        for (int u = 0; u < UNITS; u++) v[u] = *(const uint4 *)x_at(x, step, u, n, lane);
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            o.x[u][n] = INTEGERS ? arranged(v, u) : v[u];
            if (INTEGERS) add_offsets(sums, o.x[u][n], u);
        }
        o.from[n][0] = sums[0][0] + sums[1][0], o.from[n][1] = sums[0][1] + sums[1][1];
    }
}

// The four operands of a unit.
DEVICE void take(u32 (&pairs)[4], const u32 (&words)[WORDS], int unit, const Table &table) {
    constexpr u32 CODE = (1u << BITS) - 1;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int pair = first_pair(unit) + i, by = bit_of(pair) - lies_at(pair);
        if constexpr (CODEBOOK) {
            pairs[i] = look_up(table, words[unit], i);
        } else if constexpr (BITS == 8) {
            pairs[i] = permute(words[2 * unit + i / 2], 0, i % 2 ? 0x4342 : 0x4140);
        } else if constexpr (DENSE) {
            pairs[i] = words[unit * BITS / 4] >> by & both(CODE << lies_at(pair));
        } else {  // half words `k` and BITS further, which 32 codes fill
            auto halves = [&](int k) {
                u32 selector = (k & 1 ? 0x0032 : 0x0010) | ((k + BITS) & 1 ? 0x7600 : 0x5400);
                return permute(words[unit / 4 * BITS + (k >> 1)], words[unit / 4 * BITS + ((k + BITS) >> 1)], selector);
            };
            int at = BITS * pair >> 4, over = bit_of(pair) + BITS - 16;
            u32 here = over > 0 ? CODE >> over : CODE;
            pairs[i] = halves(at) >> by & both(here << lies_at(pair));
            if (over > 0) pairs[i] = under_exponent(halves(at + 1) << (BITS - over), both(CODE & ~here), pairs[i]);
        }
    }
}

// Which of eight outs a lane takes: so that lanes that read together find theirs in all banks.
DEVICE int out_of(int lane) { return (lane >> 2 & 1) << 2 | (lane >> 2 & 2) | lane >> 4; }

// A thread's codes of a step of an out whose row in a box begins at `row`, `out` after a multiple of eight. The tiles' units
// of 16 bytes lie in the swizzle of their width.
DEVICE void load_codes(u32 (&words)[WORDS], const u8 *row, int step, int out, int lane) {
    u32 swizzle = WIDTH == 128 ? out : WIDTH == 64 ? out >> 1 : 0;
#pragma unroll
    for (int i = 0; i < WORDS; i += PIECE_WORDS) {
        u32 at = (step * STEP + (lane & 3) * PIECE) / 8 * BITS + i * 16, of_row = TILES == 1 ? at : at % WIDTH;
        const u8 *from = row + (TILES == 1 ? 0 : at / WIDTH * TILE) + ((of_row >> 4 ^ swizzle) << 4 | of_row & 15);
        if constexpr (PIECE_WORDS == 4) {
            uint4 v = *(const uint4 *)from;
            words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
        } else if constexpr (PIECE_WORDS == 2) {
            uint2 v = *(const uint2 *)from;
            words[i] = v.x, words[i + 1] = v.y;
        } else {
#pragma unroll
            for (int j = 0; j < PIECE_WORDS; j++) words[i + j] = ((const u32 *)from)[j];
        }
    }
}

struct Turn {  // a box
    const u8 *codes, *x, *scales;
    int zeros;  // the bit of a row of zero points that its own begin at
};
DEVICE float zero_at(const Turn &turn, int row, int step) {
    u32 word = *(const u32 *)(turn.scales + OUTS * SCALE_ROW + row * 4) >> (turn.zeros + step * BITS & 31);
    return bits_float(under_exponent(word, (1u << BITS) - 1, 0x4B000000u)) - (8388608.0f - OFFSET);
}
constexpr int AT_ONCE = CODEBOOK || DEEP ? 2 : 1;  // steps: what a level is looked up by is read while others are looked up
// The sums of a box: rows 2 t and 2 t + 1 of each eight with outs g and g + 8 of each sixteen.
DEVICE void add_box(float (&sums)[MT][RT][4], const Turn &turn, const Levels &levels, const Table &table, int first, int lane) {
    int out = out_of(lane);
#pragma unroll AT_ONCE
    for (int s = 0; s < STEPS; s++) {
        Operand o;
        load_x(o, turn.x, s, lane);
#pragma unroll
        for (int m = 0; m < MT; m += PAIR) {
            float part[PAIR][RT][4], zero[PAIR][2];
            u32 words[PAIR][2][WORDS];
            int row = first + 16 * m + out;
#pragma unroll
            for (int i = 0; i < 2 * min(PAIR, MT - m); i++) {
                load_codes(words[i / 2][i % 2], turn.codes + (row + 8 * i) * WIDTH, s, out, lane);
                zero[i / 2][i % 2] = ZERO ? -zero_at(turn, row + 8 * i, s) : 1.0f;
            }
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                u32 top[PAIR][4], bottom[PAIR][4];
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++) take(top[i], words[i][0], u, table), take(bottom[i], words[i][1], u, table);
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++)
#pragma unroll
                    for (int n = 0; n < RT; n++) {
                        const float from[4] = {zero[i][0] * o.from[n][0], zero[i][0] * o.from[n][1], zero[i][1] * o.from[n][0], zero[i][1] * o.from[n][1]};
                        if (u == 0) multiply_from(part[i][n], from, top[i][0], bottom[i][0], top[i][1], bottom[i][1], o.x[u][n].x, o.x[u][n].y);
                        else multiply(part[i][n], top[i][0], bottom[i][0], top[i][1], bottom[i][1], o.x[u][n].x, o.x[u][n].y);
                    }
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++)
#pragma unroll
                    for (int n = 0; n < RT; n++) multiply(part[i][n], top[i][2], bottom[i][2], top[i][3], bottom[i][3], o.x[u][n].z, o.x[u][n].w);
            }
#pragma unroll
            for (int i = 0; i < 2 * min(PAIR, MT - m); i++) {
                float scale = BY_ROW ? 1.0f : scale_at(turn.scales, row + 8 * i, s, levels);
#pragma unroll
                for (int n = 0; n < RT; n++)
#pragma unroll
                    for (int e = 2 * (i % 2); e < 2 * (i % 2) + 2; e++) sums[m + i / 2][n][e] += scale * part[i / 2][n][e];
            }
        }
    }
}
