// The products of a box, as slab.cu takes them: scales, x and codes as operands of mma.sync, and the sums.

// Every thread lays down its part of the table of pairs, for a level that each lane reads once (`levels`: 16 operands):
// fill_table, which reads two for each pair, waits for memory each time, and x is asked for after it.
DEVICE void lay_pairs(uint4 *table, const u16 *levels, int tid) {
    u32 level = levels[tid & 15];
#pragma unroll 4
    for (int i = tid; i < 256 * 8; i += THREADS) {
        u32 pair = word_of(level, i >> 3 & 15) | word_of(level, i >> 7) << 16;
        table[i] = make_uint4(pair, pair, pair, pair);
    }
}

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

// x of a step for a lane, in the order of the operands, and the sums by column that products of codes begin from.
struct Operand {
    uint4 x[UNITS][RT];
    float from[RT][2];
};
DEVICE const u8 *x_at(const u8 *x, int step, int unit, int eight, int lane) {  // a lane's eight columns of one row
    int row = lane >> 2, column = step * STEP + (lane & 3) * CHUNK;
    return x + (column >> 6) * X_BOX + (8 * eight + row) * 128 + (((column & 63) / 8 + unit ^ row) << 4);
}
DEVICE uint4 arranged(const uint4 &v) {  // opposite integers: pairs lie four columns apart
    uint4 a = make_uint4(permute(v.x, v.z, 0x5410), permute(v.x, v.z, 0x7632), permute(v.y, v.w, 0x5410), permute(v.y, v.w, 0x7632));
    if (PLACES_FOUR) a = make_uint4(scale_by(a.x, LARGER), scale_by(a.y, LESS), scale_by(a.z, LARGER), scale_by(a.w, LESS));
    return a;
}
DEVICE void add_offsets(float (&sums)[2][4], const uint4 &v) {
    multiply(sums[0], minus_of(0), minus_of(0), minus_of(1), minus_of(1), v.x, v.y);
    multiply(sums[1], minus_of(2), minus_of(2), minus_of(3), minus_of(3), v.z, v.w);
}
DEVICE void load_x(Operand &o, const u8 *x, int step, int lane) {
#pragma unroll
    for (int n = 0; n < RT; n++) {
        float sums[2][4] = {};
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            o.x[u][n] = *(const uint4 *)x_at(x, step, u, n, lane);
            if (INTEGERS) o.x[u][n] = arranged(o.x[u][n]), add_offsets(sums, o.x[u][n]);
        }
        o.from[n][0] = sums[0][0] + sums[1][0], o.from[n][1] = sums[0][1] + sums[1][1];
    }
}

// The four operands of a unit.
DEVICE void take(u32 (&pairs)[4], u32 word, const Table &table) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (CODEBOOK) pairs[i] = look_up(table, word, i);
        else pairs[i] = word >> (4 * i - lies_at(i)) & both(15u << lies_at(i));
    }
}

// Which of eight outs a lane takes: so that lanes that read together find theirs in all banks.
DEVICE int out_of(int lane) { return (lane >> 2 & 1) << 2 | (lane >> 2 & 2) | lane >> 4; }

DEVICE void load_codes(u32 (&words)[WORDS], const u8 *row, int step, int out, int lane) {
    int at = step * (STEP / 2) + (lane & 3) * (CHUNK / 2);  // of a row's 128 bytes
    const u8 *from = row + ((at >> 4 ^ out) << 4 | at & 15);
    if constexpr (WORDS == 4) {
        uint4 v = *(const uint4 *)from;
        words[0] = v.x, words[1] = v.y, words[WORDS - 2] = v.z, words[WORDS - 1] = v.w;
    } else if constexpr (WORDS == 2) {
        uint2 v = *(const uint2 *)from;
        words[0] = v.x, words[WORDS - 1] = v.y;
    } else {
        words[0] = *(const u32 *)from;
    }
}

struct Turn {  // a box
    const u8 *codes, *x, *scales;
};
// The sums of a box: rows 2 t and 2 t + 1 of each eight with outs g and g + 8 of each sixteen.
DEVICE void add_box(float (&sums)[MT][RT][4], const Turn &turn, const Levels &levels, const Table &table, int first, int lane) {
    int out = out_of(lane);
#pragma unroll 1
    for (int s = 0; s < STEPS; s++) {
        Operand o;
        load_x(o, turn.x, s, lane);
#pragma unroll
        for (int m = 0; m < MT; m += PAIR) {
            float part[PAIR][RT][4];
            u32 words[PAIR][2][WORDS];
            int row = first + 16 * m + out;
#pragma unroll
            for (int i = 0; i < 2 * min(PAIR, MT - m); i++) load_codes(words[i / 2][i % 2], turn.codes + (row + 8 * i) * 128, s, out, lane);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                u32 top[PAIR][4], bottom[PAIR][4];
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++) take(top[i], words[i][0][u], table), take(bottom[i], words[i][1][u], table);
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++)
#pragma unroll
                    for (int n = 0; n < RT; n++) {
                        if (u == 0) multiply_from(part[i][n], o.from[n][0], o.from[n][1], top[i][0], bottom[i][0], top[i][1], bottom[i][1], o.x[u][n].x, o.x[u][n].y);
                        else multiply(part[i][n], top[i][0], bottom[i][0], top[i][1], bottom[i][1], o.x[u][n].x, o.x[u][n].y);
                    }
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++)
#pragma unroll
                    for (int n = 0; n < RT; n++) multiply(part[i][n], top[i][2], bottom[i][2], top[i][3], bottom[i][3], o.x[u][n].z, o.x[u][n].w);
            }
#pragma unroll
            for (int i = 0; i < 2 * min(PAIR, MT - m); i++) {
                float scale = scale_at(turn.scales, row + 8 * i, s, levels);
#pragma unroll
                for (int n = 0; n < RT; n++)
#pragma unroll
                    for (int e = 2 * (i % 2); e < 2 * (i % 2) + 2; e++) sums[m + i / 2][n][e] += scale * part[i / 2][n][e];
            }
        }
    }
}
