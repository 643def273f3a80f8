// Codes whose scales belong to runs of columns: ggml's types, ternary and binary. A weight is s level - o in float32, the
// product and the difference each rounded, as formats/ggml says. The host (runs.py) defines
//   BITS, DIGITS       width of a code; 1: codes are five digits of base 3 to a byte, and are made 2 bits wide when read
//   RUN                columns that share s and o: 16, a multiple of 32, or 0 for the whole row
//   SUBS               runs of a superblock, which share d and dmin; 0: s is a number of its own
//   PART, BIAS         bits of a run's integers, and what was added to those of s
//   NUMBER             what an s of its own is: 0 bfloat16, 1 float16, 2 float32, 4: a byte, the power of two that is twice s
//   LESS               0 no o, 1: -o is a number like s, 2: dmin times an integer
//   LOW, STRIDE        a level is LOW + STRIDE code
//   TABLE              1: levels are a table's instead

constexpr int CHUNK = 32;                                 // columns that a thread decodes together
constexpr int HELD = DIGITS ? 3 : BITS;                   // words that hold them
constexpr int WORDS = DIGITS ? 2 : BITS;                  // the same as codes of whole bits
constexpr int PARTS = RUN == 16 ? 2 : 1;                  // runs of a chunk

struct Weight {
    const u8 *codes;
    const void *scale;   // s, or d of a superblock
    const void *less;    // -o, or dmin
    const u8 *scales, *mins;  // integers of the runs, PART bits each
    const float *levels;  // 16 of them
    long long bytes;      // of all codes
    int outs, columns, row_bytes, runs, supers, part_bytes;  // of a row; runs 0: one for the matrix
};

struct Run {
    float scale, less;
};

DEVICE u32 integer_of(const u8 *row, int index) {
    int bit = index * PART, shift = bit & 7;
    u32 low = row[bit >> 3];
    if (8 % PART && shift + PART > 8) low |= (u32)row[(bit >> 3) + 1] << 8;
    return low >> shift & ((1u << PART) - 1);
}

DEVICE float number_of(const void *p, long long index) {
#if NUMBER == 4
    u32 e = ((const u8 *)p)[index];
    return bits_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
#elif NUMBER == 2
    return ((const float *)p)[index];
#elif NUMBER == 1
    return widen_f16(((const u16 *)p)[index]);
#else
    return bits_float((u32)((const u16 *)p)[index] << 16);
#endif
}

DEVICE Run run_of(const Weight &w, int out, int run) {
    Run found = {0, 0};
#if SUBS
    long long super = (long long)out * w.supers + run / SUBS;
    float integer = (float)((int)integer_of(w.scales + (long long)out * w.part_bytes, run) - BIAS);
    found.scale = multiplied(widen_f16(((const u16 *)w.scale)[super]), integer);
    if (LESS == 2) {
        integer = (float)integer_of(w.mins + (long long)out * w.part_bytes, run);
        found.less = multiplied(widen_f16(((const u16 *)w.less)[super]), integer);
    }
#else
    long long index = (long long)(w.runs ? out : 0) * w.runs + (RUN ? run : 0);
    found.scale = number_of(w.scale, index);
    if (LESS) found.less = -number_of(w.less, index);
#endif
    return found;
}

struct Chunk {  // as it lies
    u32 words[HELD];
    int turn;  // DIGITS: the digit of its first byte that is its first code, and eight times the byte of its first word
};

DEVICE void load_chunk(Chunk &to, const Weight &w, int out, int chunk) {
    const u8 *row = w.codes + (long long)out * w.row_bytes;
#if DIGITS
    const u8 *from = row + chunk * CHUNK / 5;
    u32 aside = (u32)((unsigned long long)from & 3);
    const u8 *end = w.codes + w.bytes;
    from -= aside, to.turn = chunk * CHUNK % 5 | aside << 6;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        to.words[i] = 0;
        if (from + 4 * i + 4 <= end) to.words[i] = load4(from + 4 * i);
        else
            for (int k = 0; k < 4; k++)
                if (from + 4 * i + k < end) to.words[i] |= (u32)from[4 * i + k] << 8 * k;
    }
#else
    const u8 *from = row + chunk * (4 * BITS);
    if constexpr (BITS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < BITS; i += 4) {
            uint4 v = load16(from + 4 * i);
            to.words[i] = v.x, to.words[i + 1] = v.y, to.words[i + 2] = v.z, to.words[i + 3] = v.w;
        }
    } else if constexpr (BITS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < BITS; i += 2) {
            uint2 v = load8(from + 4 * i);
            to.words[i] = v.x, to.words[i + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < BITS; i++) to.words[i] = load4(from + 4 * i);
    }
#endif
}

DEVICE u32 joined(u32 low, u32 high, u32 shift) {  // 32 bits from a place in 64
    return shift ? low >> shift | high << (32 - shift) : low;
}

// The codes in whole bits. `digits`: the five codes of each byte, two bits each.
DEVICE void unpack(u32 (&to)[WORDS], const Chunk &from, const u16 *digits) {
#if DIGITS
    u32 aside = from.turn >> 6 << 3, turn = 2 * (from.turn & 63);
    u32 bytes[2] = {joined(from.words[0], from.words[1], aside), joined(from.words[1], from.words[2], aside)};
    u32 ten[8];
#pragma unroll
    for (int i = 0; i < 8; i++) ten[i] = digits[bytes[i >> 2] >> 8 * (i & 3) & 0xFF];
    u32 low = ten[0] | ten[1] << 10 | ten[2] << 20 | ten[3] << 30;
    u32 middle = ten[3] >> 2 | ten[4] << 8 | ten[5] << 18 | ten[6] << 28;
    u32 high = ten[6] >> 4 | ten[7] << 6;
    to[0] = joined(low, middle, turn), to[1] = joined(middle, high, turn);
#else
#pragma unroll
    for (int i = 0; i < WORDS; i++) to[i] = from.words[i];
#endif
}

// Weight `i` of codes in whole bits. 2^23 has steps of 1: a code below its exponent is a float.
template <int N> DEVICE float decoded(const u32 (&words)[N], int i, const Run &run, const float *levels) {
    constexpr u32 MASK = (1u << BITS) - 1;
    int bit = i * BITS, at = bit >> 5, shift = bit & 31;
    u32 code = words[at] >> shift;
    if (shift + BITS > 32) code |= words[(at + 1) % N] << (32 - shift);
    float level;
    if (TABLE) level = levels[code & MASK];
    else level = bits_float(under_exponent(code, MASK, 0x4B000000u)) - (STRIDE == 1 ? 8388608.0f - (LOW) : 8388608.0f);
    if (STRIDE == 2) level = level + level + (LOW);
    float weight = multiplied(level, run.scale);
    return LESS ? weight - run.less : weight;
}

// What lies in shared memory: levels, or the digits of every byte.
DEVICE void fill_tables(uint4 *shared, const Weight &w, int threads) {
    if (TABLE)
        for (int i = threadIdx.x; i < 16; i += threads) ((float *)shared)[i] = w.levels[i];
    if (DIGITS)
        for (u32 i = threadIdx.x; i < 256; i += threads) {
            u32 all = 0, left = i;
            for (int k = 0; k < 5; k++, left /= 3) all |= left % 3 << 2 * k;
            ((u16 *)shared)[i] = all;
        }
}
constexpr int TABLES = DIGITS ? 32 : TABLE ? 4 : 0;  // of uint4
